"""Arms side by side in one process: rounds in rotated order, ratios paired by round, intervals by bootstrap."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Callable

import click
import numpy as np
import torch
from numpy.typing import NDArray

from bench.memory import Memory, peak_of, peak_text, settled
from bench.stopwatch import AttentionWitness, Stopwatch
from bench.surroundings import device_name, environment, gpu_state, load_average, versions
from bench.verdicts import COMPILED_BASELINE, NEAR, Floor, floor_of, ratio_text, verdicts
from model.device import kind_of
from model.interface import DeviceFailed

WARM_UPS = 3  # the first of which is `first_call_s`
RESAMPLES = 2_000
FEWEST_ROUNDS = 5  # for an interval: all that four times span misses their true median in one case of eight

Pictures = NDArray[np.uint8]  # (B, H, W, 3)
Draw = Callable[[Stopwatch], Pictures]


@dataclass(frozen=True)
class Arm:
    """One way to make the picture.

    Attributes:
        name: in the report.
        steps: of one call.
        count_tflop: counts those of all steps of one call, on shapes.
        exact: whether it has to make the baseline's pictures.
        modules: whose weights it needs.
        draw: makes the pictures, timed by the stopwatch that it is given.
    """

    name: str
    steps: int
    count_tflop: Callable[[], float]
    exact: bool
    modules: tuple[torch.nn.Module, ...]
    draw: Draw


@dataclass(frozen=True)
class Spread:
    """Median, tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class Ratio:
    """Median of ratios that belong together, with the 95 % bootstrap interval of that median; None of too few."""

    median: float
    low: float | None
    high: float | None


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(low), float(high))


def ratio(baseline: Sequence[float], arm: Sequence[float]) -> Ratio:
    """How many times faster the arm is, from the times of both in the same rounds."""
    ratios = np.asarray(baseline) / np.asarray(arm)
    if len(ratios) < FEWEST_ROUNDS:
        return Ratio(float(np.median(ratios)), None, None)
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def rotated(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """The order of a round: begins one further each time, every second round backwards."""
    first = turn % len(arms)
    order = [*arms[first:], *arms[:first]]
    return order[::-1] if turn % 2 else order


class Comparison:
    """What was seen of some arms so far. One that fails is left out from then on; the first must not.

    Args:
        arms: at least one; the first is what the others are compared with.
        device: where they run.
    """

    def __init__(self, arms: Sequence[Arm], device: torch.device) -> None:
        self._arms = list(arms)
        self._device = device
        self._warmed: dict[str, WarmUp] = {}
        self._times: dict[str, list[Stopwatch]] = {arm.name: [] for arm in arms}
        self._failed: dict[str, str] = {}
        self._states, self._load_before = [gpu_state(device)], load_average()

    def warm_up(self) -> None:
        """Warm up every arm and say so."""
        for arm in list(self._arms):
            with self._left_out_if_it_fails(arm):
                self._warmed[arm.name] = warm_up(arm, self._device)
                click.echo(f"warmed up: {arm.name}, first call {self._warmed[arm.name].first_call_s:.1f} s", err=True)

    def draw_round(self, turn: int) -> None:
        """Time one picture of each arm."""
        for arm in rotated(self._arms, turn):
            with self._left_out_if_it_fails(arm):
                watch = Stopwatch(self._device)
                arm.draw(watch)
                self._times[arm.name].append(watch)
        self._states.append(gpu_state(self._device))

    @contextmanager
    def _left_out_if_it_fails(self, arm: Arm) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # whatever it is must not cost the figures of the others
            lost = isinstance(exc, RuntimeError) and kind_of(exc) is DeviceFailed and self._times[self._arms[0].name]
            if arm is self._arms[0] or lost:  # on a lost device all would fail, and lose their rounds
                raise
            self._failed[arm.name] = f"{type(exc).__name__}: {str(exc).strip().partition(chr(10))[0]}"
            self._arms = [other for other in self._arms if other is not arm]
            click.echo(f"failed: {arm.name}: {self._failed[arm.name]}", err=True)

    def report(self) -> dict[str, Any]:
        """The figures of all rounds so far; of at least one."""
        floor = floor_of(device_name(self._device))
        return {
            "arms": {arm.name: self._figures(arm, floor) for arm in self._arms},
            "failed": dict(self._failed),
            "floor": None if floor is None else asdict(floor),
            "rounds": len(self._times[self._arms[0].name]),
            "warm_ups": WARM_UPS,
            "clock": "CUDA events, wall clock" if self._device.type == "cuda" else "processor time",
            "gpu_states": [state for state in self._states if state is not None],
            "load_average": [self._load_before, load_average()],
            "environment": environment(),
            "versions": versions(),
        }

    def _figures(self, arm: Arm, floor: Floor | None) -> dict[str, Any]:
        reference = self._arms[0].name
        warmed, times = self._warmed[arm.name], self._times[arm.name]
        figures = {
            **summary(arm.steps, warmed.tflop, times, reference=self._times[reference], floor=floor),
            **warmed.report(arm, self._warmed[reference].pictures),
        }
        if any(other.name == COMPILED_BASELINE for other in self._arms):
            compiled_s, loop_s = (
                [watch.loop_s for watch in self._times[name]] for name in (COMPILED_BASELINE, arm.name)
            )
            figures["speedup_on_compiled"] = asdict(ratio(compiled_s, loop_s))
        return figures


def compare(
    arms: Sequence[Arm],
    device: torch.device,
    *,
    rounds: int,
    limit_s: float,
    keep: Callable[[dict[str, Any]], object] = lambda _report: None,
) -> dict[str, Any]:
    """The report on all arms; the first is what the others are compared with. Others may fail.

    Args:
        arms: at least one.
        device: where they run.
        rounds: of all arms, after three warm-ups of each.
        limit_s: no round but the first begins later than this after the last warm-up.
        keep: given the report of the rounds so far after each of them.
    """
    comparison = Comparison(arms, device)
    comparison.warm_up()
    ends = time.monotonic() + limit_s
    for turn in range(rounds):
        comparison.draw_round(turn)
        keep(comparison.report())
        if time.monotonic() > ends:
            break
    return comparison.report()


@dataclass(frozen=True)
class WarmUp:
    """What is seen before the rounds.

    Attributes:
        tflop: of all steps of one call.
        first_call_s: wall clock; of the first arm with what the libraries need to start.
        peak: on CUDA, of the arm's weights and what else it takes at most, what it keeps from its first call on
            included; what other arms keep is left out.
        attention_ops, attention_kernels: see `AttentionWitness`.
        pictures: that were made.
    """

    tflop: float
    first_call_s: float
    peak: Memory | None
    attention_ops: dict[str, str]
    attention_kernels: list[str]
    pictures: Pictures

    def report(self, arm: Arm, reference: Pictures) -> dict[str, Any]:
        """All of it for the report; instead of pictures, the share of values that are near the reference's."""
        seen: dict[str, Any] = {
            "first_call_s": self.first_call_s,
            "peak_memory_bytes": None if self.peak is None else self.peak.allocated,
            "peak_reserved_bytes": None if self.peak is None else self.peak.reserved,
            "attention_ops": self.attention_ops,
            "attention_kernels": self.attention_kernels,
        }
        if arm.exact:
            difference = np.abs(self.pictures.astype(np.int16) - reference)
            seen["near_baseline_share"] = float(np.mean(difference <= NEAR))
        return seen


def warm_up(arm: Arm, device: torch.device) -> WarmUp:
    """Three calls: one timed, one watched, and one whose memory is looked at."""
    tflop = arm.count_tflop()
    before = settled(device)
    started = time.perf_counter()
    pictures = arm.draw(Stopwatch(device))
    first_call_s = time.perf_counter() - started
    witness = AttentionWitness(device)
    arm.draw(witness)
    settled(device)
    arm.draw(Stopwatch(device))
    peak = None if before is None else peak_of(arm.modules, before, device)
    return WarmUp(tflop, first_call_s, peak, witness.ops, witness.kernels, pictures)


def summary(
    steps: int, tflop: float, times: Sequence[Stopwatch], *, reference: Sequence[Stopwatch], floor: Floor | None
) -> dict[str, Any]:
    """The figures of one arm from the times of its rounds and of the reference's in the same rounds."""
    loop_s, whole_s = [watch.loop_s for watch in times], [watch.whole_s for watch in times]
    loop = spread([1e3 * seconds for seconds in loop_s])
    figures: dict[str, Any] = {
        "steps": steps,
        "step_tflop": tflop / steps,
        "loop_ms": asdict(loop),
        "whole_ms": asdict(spread([1e3 * seconds for seconds in whole_s])),
        "step_ms": loop.median / steps,
        "tflop_per_s": tflop / loop.median * 1e3,
        "speedup": asdict(ratio([watch.loop_s for watch in reference], loop_s)),
        "whole_speedup": asdict(ratio([watch.whole_s for watch in reference], whole_s)),
    }
    if floor is not None:
        figures["peak_share"] = figures["tflop_per_s"] / floor.tflop_per_s
    return figures


def terminal_table(report: dict[str, Any]) -> str:
    """The report of a comparison as lines for a terminal."""
    lines = [
        f"{report['config']} {report['height']}x{report['width']} (height x width), {report['dtype']}, "
        f"{report['device_name']}; {report['rounds']} rounds in rotated order, {report['clock']}, "
        f"load average {report['load_average'][0]:g} to {report['load_average'][1]:g}",
        f"{'':<31}{'steps':>6}{'loop ms (p10 to p90)':>28}{'ms/step':>9}{'TFLOP/s':>9}"
        f"{'loop, times faster':>24}{'picture':>9}{'peak MiB':>14}{'first s':>9}",
    ]
    for name, arm in report["arms"].items():
        loop = arm["loop_ms"]
        spread_text = f"{loop['median']:.1f} ({loop['p10']:.1f} to {loop['p90']:.1f})"
        lines.append(
            f"{name:<31}{arm['steps']:>6}{spread_text:>28}{arm['step_ms']:>9.2f}{arm['tflop_per_s']:>9.4g}"
            f"{ratio_text(arm['speedup'], 3):>24}{arm['whole_speedup']['median']:>9.3f}"
            f"{peak_text(arm):>14}{arm['first_call_s']:>9.1f}"
        )
    lines += ["attention, by the shape of its queries, and its kernels:"]
    for name, arm in report["arms"].items():
        ops = ", ".join(f"{shape}: {op}" for shape, op in arm["attention_ops"].items())
        lines.append(
            f"  {name}: {ops or 'not seen'}" + "".join(f"\n    {kernel}" for kernel in arm["attention_kernels"])
        )
    lines += _remarks(report)
    lines.append(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    return "\n".join(lines)


def _remarks(report: dict[str, Any]) -> list[str]:
    """What the table of a report has no column for."""
    lines = [f"did not run: {name}: {why}" for name, why in report["failed"].items()]
    floor = report["floor"]
    if floor is not None:
        step = floor["guided_step_ms"]
        of_step = "" if step is None else f", {step:g} ms per guided step at 1024x768"
        lines.append(f"floor: {floor['tflop_per_s']:g} TFLOP/s{of_step}")
    lines += [verdict.text for verdict in verdicts(report)]
    if report["gpu_states"]:
        lines += [f"GPU before: {report['gpu_states'][0]}", f"GPU after: {report['gpu_states'][-1]}"]
    return lines
