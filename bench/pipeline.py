"""Time the CatVTON pipeline stage by stage, on random weights: `python -m bench.pipeline --help`."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from model.catvton import published
from model.catvton.attention import TryOnUNet
from model.catvton.pipeline import CatVTONPipeline
from model.device import DEVICES, DTYPES, choose_device, choose_dtype

GUIDANCE = 2.5  # any value above 1 runs both branches
FULL_STEPS = 50  # the published default, which the estimate of a whole picture is for
KIB = 1024  # ru_maxrss is in KiB on Linux
LATENT_PX = 8  # pixels a side that one latent stands for, in both configurations

TINY_UNET: dict[str, Any] = {
    "in_channels": 9,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}
TINY_VAE: dict[str, Any] = {
    **published.VAE_CONFIG,
    "block_out_channels": [8, 16, 16, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
}


@dataclass(frozen=True)
class Size:
    """What a configuration is built of and, where the caller does not say, how much of it is run."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    height: int
    width: int
    steps: int
    repeats: int


SIZES = {
    "tiny": Size(TINY_UNET, TINY_VAE, height=128, width=96, steps=4, repeats=3),
    "sd15": Size(published.UNET_CONFIG, published.VAE_CONFIG, height=1024, width=768, steps=10, repeats=3),
}


@dataclass(frozen=True)
class Job:
    """One measurement: which model, where, and how much of it."""

    config: str
    device: torch.device
    dtype: torch.dtype
    height: int
    width: int
    steps: int
    repeats: int


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
    """A pipeline with random weights on the device."""
    torch.manual_seed(0)
    with torch.device(job.device):
        unet = TryOnUNet(**SIZES[job.config].unet).to(job.dtype).eval()
        vae = AutoencoderKL(**SIZES[job.config].vae).to(job.dtype).eval()
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
        versions={"python": platform.python_version(), "torch": torch.__version__, "diffusers": diffusers.__version__},
    )


def peak_memory(device: torch.device) -> tuple[int, str]:
    """The most bytes in use so far, and of what kind they are."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "cuda_allocated"
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB, "process_rss"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


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


@click.command()
@click.option("--config", type=click.Choice(sorted(SIZES)), required=True, help="sd15 has the published size.")
@click.option("--device", type=click.Choice(["auto", *DEVICES]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True)
@click.option("--height", type=click.IntRange(8), help="Pixels, a multiple of 8.")
@click.option("--width", type=click.IntRange(8), help="Pixels, a multiple of 8.")
@click.option("--steps", type=click.IntRange(1), help="Timed steps per run.")
@click.option("--repeats", type=click.IntRange(1), help="Timed runs.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the report here too.")
def main(config: str, device: str, dtype: str, json_path: Path | None, **amounts: int | None) -> None:
    """Time encode, denoise and decode of the CatVTON pipeline on random weights."""
    try:
        chosen = choose_device(device)
    except ValueError as exc:
        raise click.UsageError(str(exc)) from exc
    wanted = {name: amount or getattr(SIZES[config], name) for name, amount in amounts.items()}
    report = measure(Job(config, chosen, choose_dtype(dtype, chosen), **wanted))
    click.echo(table(report))
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
