"""Arms side by side in one process: rounds in rotated order, ratios paired by round, intervals by bootstrap."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Callable

import numpy as np
import torch
from numpy.typing import NDArray

from bench.memory import Memory, peak_of, peak_text, settled, verdict
from bench.stopwatch import AttentionWitness, Stopwatch
from bench.surroundings import device_name, environment, gpu_state, load_average, versions

WARM_UPS = 3  # the first of which is `first_call_s`
RESAMPLES = 2_000
NEAR = 2  # grey levels
BASELINE = "baseline"

COMPILERS_FAILURES = (RuntimeError, AssertionError)  # torch.compile fails with either

Pictures = NDArray[np.uint8]  # (B, H, W, 3)
Draw = Callable[[Stopwatch], Pictures]


@dataclass(frozen=True)
class Arm:
    """One way to make the picture.

    Attributes:
        name: in the report.
        steps: of one call.
        tflop: of all steps of one call, counted on shapes.
        exact: whether it has to make the baseline's pictures.
        modules: whose weights it needs.
        draw: makes the pictures, timed by the stopwatch that it is given.
    """

    name: str
    steps: int
    tflop: float
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
    """Median of ratios that belong together, with the 95 % bootstrap interval of that median."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Floor:
    """What a GPU could do at most.

    Attributes:
        tflop_per_s: dense float16 arithmetic; as specified, or 790 as practised on an H200, whose arithmetic an H100
            with HBM3 has too.
        guided_step_ms: of a full step at 1024x768, where more than arithmetic bounds it: attention of 40 channels is
            padded to 64, and exponentials have a rate of their own.
    """

    tflop_per_s: float
    guided_step_ms: float | None = None


FLOORS = {  # by words of what torch calls the GPU; the H100s named "PCIe" and "NVL" are slower
    "H200": Floor(790.0, guided_step_ms=27.2),
    "H100 HBM3": Floor(790.0, guided_step_ms=27.2),
    "A10G": Floor(70.0),
    "L40S": Floor(362.0),
    "L4": Floor(121.0),
}


def floor_of(device_name: str) -> Floor | None:
    """The floor of a GPU by its name, None for one that is not in the table."""
    words = set(device_name.replace("-", " ").split())
    return next((floor for name, floor in FLOORS.items() if words.issuperset(name.split())), None)


def spread(values: Sequence[float]) -> Spread:
    """Of at least one value."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return Spread(float(median), float(low), float(high))


def ratio(baseline: Sequence[float], arm: Sequence[float]) -> Ratio:
    """How many times faster the arm is, from the times of both in the same rounds."""
    ratios = np.asarray(baseline) / np.asarray(arm)
    draws = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(draws, axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def rotated(arms: Sequence[Arm], turn: int) -> list[Arm]:
    """The order of a round: begins one further each time, every second round backwards."""
    first = turn % len(arms)
    order = [*arms[first:], *arms[:first]]
    return order[::-1] if turn % 2 else order


def compare(arms: Sequence[Arm], device: torch.device, *, rounds: int, limit_s: float) -> dict[str, Any]:
    """The report on all arms; the first is what the others are compared with. Others may fail in their warm-up.

    Args:
        arms: at least one.
        device: where they run.
        rounds: of all arms, after three warm-ups of each.
        limit_s: no round but the first begins later than this after the first warm-up.
    """
    ends = time.monotonic() + limit_s
    states, load_before = [gpu_state(device)], load_average()
    warmed, failed = {arms[0].name: warm_up(arms[0], device)}, {}
    for arm in arms[1:]:
        try:
            warmed[arm.name] = warm_up(arm, device)
        except COMPILERS_FAILURES as exc:  # which must not cost the figures of the others
            failed[arm.name] = f"{type(exc).__name__}: {str(exc).strip().partition(chr(10))[0]}"
    arms = [arm for arm in arms if arm.name in warmed]
    times: dict[str, list[Stopwatch]] = {arm.name: [] for arm in arms}
    for turn in range(rounds):
        for arm in rotated(arms, turn):
            watch = Stopwatch(device)
            arm.draw(watch)
            times[arm.name].append(watch)
        states.append(gpu_state(device))
        if time.monotonic() > ends:
            break
    reference, floor = arms[0].name, floor_of(device_name(device))
    return {
        "arms": {
            arm.name: {
                **summary(arm, times[arm.name], times[reference], floor),
                **warmed[arm.name].report(arm, warmed[reference].pictures),
            }
            for arm in arms
        },
        "failed": failed,
        "floor": None if floor is None else asdict(floor),
        "rounds": len(times[reference]),
        "warm_ups": WARM_UPS,
        "clock": "CUDA events, wall clock" if device.type == "cuda" else "processor time",
        "gpu_states": [state for state in states if state is not None],
        "load_average": [load_before, load_average()],
        "environment": environment(),
        "versions": versions(),
    }


@dataclass(frozen=True)
class WarmUp:
    """What is seen before the rounds.

    Attributes:
        first_call_s: wall clock; of the first arm with what the libraries need to start.
        peak: on CUDA, of the arm's weights and what else it takes at most, what it keeps from its first call on
            included; what other arms keep is left out.
        attention_ops, attention_kernels: see `AttentionWitness`.
        pictures: that were made.
    """

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
    before = settled(device)
    started = time.perf_counter()
    pictures = arm.draw(Stopwatch(device))
    first_call_s = time.perf_counter() - started
    witness = AttentionWitness(device)
    arm.draw(witness)
    settled(device)
    arm.draw(Stopwatch(device))
    peak = None if before is None else peak_of(arm.modules, before, device)
    return WarmUp(first_call_s, peak, witness.ops, witness.kernels, pictures)


def summary(
    arm: Arm, times: Sequence[Stopwatch], reference: Sequence[Stopwatch], floor: Floor | None
) -> dict[str, Any]:
    """The figures of one arm from the times of its rounds and of the reference's in the same rounds."""
    loop_s, whole_s = [watch.loop_s for watch in times], [watch.whole_s for watch in times]
    loop = spread([1e3 * seconds for seconds in loop_s])
    figures: dict[str, Any] = {
        "steps": arm.steps,
        "step_tflop": arm.tflop / arm.steps,
        "loop_ms": asdict(loop),
        "whole_ms": asdict(spread([1e3 * seconds for seconds in whole_s])),
        "step_ms": loop.median / arm.steps,
        "tflop_per_s": arm.tflop / loop.median * 1e3,
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
        loop, faster = arm["loop_ms"], arm["speedup"]
        spread_text = f"{loop['median']:.1f} ({loop['p10']:.1f} to {loop['p90']:.1f})"
        faster_text = f"{faster['median']:.3f} ({faster['low']:.3f} to {faster['high']:.3f})"
        lines.append(
            f"{name:<31}{arm['steps']:>6}{spread_text:>28}{arm['step_ms']:>9.2f}{arm['tflop_per_s']:>9.4g}"
            f"{faster_text:>24}{arm['whole_speedup']['median']:>9.3f}"
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
    floor, memory = report["floor"], verdict(report)
    if floor is not None:
        step = floor["guided_step_ms"]
        of_step = "" if step is None else f", {step:g} ms per guided step at 1024x768"
        lines.append(f"floor: {floor['tflop_per_s']:g} TFLOP/s{of_step}")
    if memory is not None:
        lines.append(memory)
    if report["gpu_states"]:
        lines += [f"GPU before: {report['gpu_states'][0]}", f"GPU after: {report['gpu_states'][-1]}"]
    return lines
