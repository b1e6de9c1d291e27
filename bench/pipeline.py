"""Time the CatVTON pipeline stage by stage, on random weights: `python -m bench.pipeline --help`."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import date, datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from bench.arms import as_served, run
from bench.compare import FEWEST_ROUNDS, terminal_table
from bench.files import json_option, unwritten, write_json, write_report
from bench.recipes import FULL_STEPS, GUIDANCE, MOST_STEPS
from bench.record import record
from bench.sizes import LATENT_PX, SIZES, Job, random_modules
from bench.surroundings import device_name, versions
from bench.verdicts import broken
from model.catvton import published
from model.catvton.attention import TryOnUNet
from model.catvton.pipeline import CatVTONPipeline
from model.device import DEVICES, DTYPES, choose_device, choose_dtype

KIB = 1024  # ru_maxrss is in KiB on Linux


@dataclass(frozen=True)
class Report:
    """What was measured; the unit is in each name.

    Attributes:
        steps: timed steps per run; `denoise_step_s` is the time of all of them divided by their number.
        encode_s, denoise_step_s, decode_s, rest_s: medians over the runs; rest is what one call does besides.
        full_picture_s: the estimate for a picture of 50 steps from these medians.
        step_tflop: of one guided step, two per multiply-accumulate.
        peak_memory_kind: "cuda_allocated", or "process_rss", which includes what building the model took.
    """

    config: str
    device: str
    device_name: str
    dtype: str
    height: int
    width: int
    steps: int
    repeats: int
    encode_s: float
    denoise_step_s: float
    decode_s: float
    rest_s: float
    full_picture_s: float
    step_tflop: float
    achieved_tflop_per_s: float
    peak_memory_bytes: int
    peak_memory_kind: str
    versions: dict[str, str]


class TimedPipeline(CatVTONPipeline):
    """Keeps how long each stage of its last call took, in seconds, with the device idle at both ends of a stage."""

    stage_s: dict[str, float]

    def encode_condition(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - handed on
        """Timed as "encode"."""
        with self.timed("encode"):
            return super().encode_condition(*args, **kwargs)

    def denoise(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - handed on
        """Timed as "denoise"."""
        with self.timed("denoise"):
            return super().denoise(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401 - handed on
        """Timed as "decode"."""
        with self.timed("decode"):
            return super().decode(*args, **kwargs)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Keep the seconds that the block took."""
        self.wait()
        started = time.perf_counter()
        yield
        self.wait()
        self.stage_s[stage] = time.perf_counter() - started

    def wait(self) -> None:
        """Until the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def build_pipeline(job: Job) -> TimedPipeline:
    """A pipeline with random weights on the device, laid out as the engine has them."""
    vae, unet = (as_served(module, job.device) for module in random_modules(job))
    pipeline = TimedPipeline(vae, unet, DDIMScheduler(**published.SCHEDULER_CONFIG))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_once(pipeline: TimedPipeline, job: Job, steps: int) -> dict[str, float]:
    """Seconds of one call, by stage: encode, denoise, decode, rest."""
    pipeline.stage_s = {}
    rng = np.random.default_rng(0)
    person, garment = rng.integers(0, 256, (2, job.height, job.width, 3), np.uint8)
    mask = np.zeros((job.height, job.width), np.uint8)
    mask[job.height // 4 : job.height // 2] = 255
    with pipeline.timed("total"):
        pipeline(
            person,
            garment,
            mask,
            height=job.height,
            width=job.width,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            generator=torch.Generator("cpu").manual_seed(0),
        )
    stages = dict(pipeline.stage_s)
    total = stages.pop("total")
    return {**stages, "rest": total - sum(stages.values())}


def step_flops(job: Job) -> int:
    """Floating-point operations of one guided step, two per multiply-accumulate; counted on shapes alone."""
    with torch.device("meta"):
        unet = TryOnUNet(**SIZES[job.config].unet)
        rows, columns = 2 * job.height // LATENT_PX, job.width // LATENT_PX
        unet_input = torch.empty(2, unet.config.in_channels, rows, columns)
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            unet(unet_input, torch.zeros(1), encoder_hidden_states=None)
    return int(counter.get_total_flops())


def measure(job: Job) -> Report:
    """Build, warm up with one step, run as often as the job says."""
    pipeline = build_pipeline(job)
    run_once(pipeline, job, steps=1)
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(job.device)
    runs = [run_once(pipeline, job, job.steps) for _ in range(job.repeats)]
    return summarise(job, runs)


def summarise(job: Job, runs: list[dict[str, float]]) -> Report:
    """The report on some runs that have just ended."""
    encode_s, denoise_s, decode_s, rest_s = (
        statistics.median(run[stage] for run in runs) for stage in ("encode", "denoise", "decode", "rest")
    )
    step_s = denoise_s / job.steps
    peak_bytes, peak_kind = peak_memory(job.device)
    step_tflop = step_flops(job) / 1e12
    return Report(
        config=job.config,
        device=job.device.type,
        device_name=device_name(job.device),
        dtype=str(job.dtype).replace("torch.", ""),
        height=job.height,
        width=job.width,
        steps=job.steps,
        repeats=len(runs),
        encode_s=encode_s,
        denoise_step_s=step_s,
        decode_s=decode_s,
        rest_s=rest_s,
        full_picture_s=encode_s + FULL_STEPS * step_s + decode_s + rest_s,
        step_tflop=step_tflop,
        achieved_tflop_per_s=step_tflop / step_s,
        peak_memory_bytes=peak_bytes,
        peak_memory_kind=peak_kind,
        versions=versions(),
    )


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most bytes in use so far, and of what kind they are."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda_allocated"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB, "process_rss"


def table(report: Report) -> str:
    """The report as lines for a terminal."""
    return "\n".join(
        [
            f"{report.config} {report.height}x{report.width} (height x width), {report.dtype}, {report.device_name}",
            f"medians of {report.repeats} runs of {report.steps} guided steps, after one run of warm-up",
            f"  encode            {report.encode_s * 1e3:12.2f} ms",
            f"  denoise, one step {report.denoise_step_s * 1e3:12.2f} ms",
            f"  decode            {report.decode_s * 1e3:12.2f} ms",
            f"  rest              {report.rest_s * 1e3:12.2f} ms",
            f"  {FULL_STEPS} steps, estimate {report.full_picture_s:12.2f} s",
            f"one step: {report.step_tflop:.6g} TFLOP, {report.achieved_tflop_per_s:.4g} TFLOP/s",
            f"peak memory: {report.peak_memory_bytes / 2**20:.0f} MiB ({report.peak_memory_kind})",
            ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        ]
    )


def keep(figures: dict[str, Any], json_path: Path | None, day: date | None) -> tuple[Path | None, list[str]]:
    """Write a comparison where it was asked for; what cannot be written costs neither the other nor the rounds to come.

    Args:
        figures: of the rounds so far.
        json_path: None for nowhere.
        day: to record it under, once there are rounds enough; None not to.
    Returns:
        The file in bench/results, and a sentence for each that was not written.
    """
    path, wrong = None, []
    if day is not None and figures["rounds"] < FEWEST_ROUNDS:
        wrong.append(f"not recorded: {figures['rounds']} rounds give no interval, {FEWEST_ROUNDS} do")
    elif day is not None:
        try:
            path = record(figures, day)
        except (OSError, ValueError) as exc:
            wrong.append(f"not recorded: {exc}")
    if json_path is not None:
        try:
            write_json(json_path, figures)
        except OSError as exc:
            wrong.append(unwritten(json_path, exc))
    return path, wrong


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU: where several wait for each other, that is processor time too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def complaints(figures: dict[str, Any]) -> list[str]:
    """What fails a comparison, a sentence each."""
    failed = figures["failed"]
    return [*([f"did not run: {', '.join(failed)}"] if failed else []), *broken(figures)]


def whole_latents(_context: click.Context, _option: click.Parameter, pixels: int | None) -> int | None:
    """The height or width of a picture that the autoencoder can make."""
    if pixels is not None and pixels % LATENT_PX:
        raise click.BadParameter(f"{pixels} is not a multiple of {LATENT_PX}.")
    return pixels


@click.command()
@click.option(
    "--config",
    type=click.Choice(sorted(SIZES)),
    help="sd15 has the published size and is what a GPU is timed with if nothing is said, small what a CPU is.",
)
@click.option("--device", type=click.Choice(["auto", *DEVICES]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True)
@click.option("--height", type=click.IntRange(8), callback=whole_latents, help="Pixels, a multiple of 8.")
@click.option("--width", type=click.IntRange(8), callback=whole_latents, help="Pixels, a multiple of 8.")
@click.option("--steps", type=click.IntRange(1, MOST_STEPS), help="Timed steps per run.")
@click.option("--repeats", type=click.IntRange(1), help="Timed runs.")
@click.option("--compare", "comparing", is_flag=True, help="Time baseline, exact mode and fast recipes side by side.")
@click.option("--compile", "compiled", is_flag=True, help="Compare what torch.compile makes of them as well.")
@click.option("--rounds", type=click.IntRange(1), default=10, show_default=True, help="Of a comparison.")
@click.option(
    "--limit-s", type=click.FloatRange(1), default=360, show_default=True, help="After the warm-ups; none begins later."
)
@click.option(
    "--record",
    "recording",
    is_flag=True,
    help="Keep the comparison in bench/results, and that of the promises in bench/README.md.",
)
@json_option()
def main(
    config: str | None,
    device: str,
    dtype: str,
    json_path: Path | None,
    comparing: bool,
    compiled: bool,
    rounds: int,
    limit_s: float,
    recording: bool,
    **amounts: int | None,
) -> None:
    """Time encode, denoise and decode of the CatVTON pipeline on random weights."""
    if not comparing and (compiled or recording):
        raise click.UsageError("--compile and --record go with --compare")
    try:
        chosen = choose_device(device)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    config = config or ("sd15" if chosen.type == "cuda" else "small")
    wanted = {name: amount or getattr(SIZES[config], name) for name, amount in amounts.items()}
    job = Job(config, chosen, choose_dtype(dtype, chosen), **wanted)
    if not comparing:
        report = measure(job)
        click.echo(table(report))
        write_report(json_path, asdict(report))
        return
    day = datetime.now(timezone.utc).date() if recording else None
    kept = partial(keep, json_path=json_path, day=day)
    with one_thread(chosen):
        figures = run(job, rounds=rounds, limit_s=limit_s, compiled=compiled, keep=kept)
    click.echo(terminal_table(figures))
    path, unkept = kept(figures)
    if path is not None:
        click.echo(f"kept in {path}")
    wrong = [*complaints(figures), *unkept]
    if wrong:
        raise click.ClickException("; ".join(wrong))


if __name__ == "__main__":
    main()
