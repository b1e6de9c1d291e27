"""What one guided step asks of a device at the published size: `python -m bench.counters --help`.

Nothing is computed and nothing is timed: the loops of the pipeline and of the plain baseline run on tensors without
contents, so that the numbers are the same on every machine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import AutoencoderKL, DDIMScheduler

from bench.baseline import Baseline, stock_unet
from bench.counting import Counter, counting
from bench.files import json_option, write_report
from bench.recipes import COMBINED, EXACTLY, GUIDANCE, NAMED, SINGLE, SOLVERS, Recipe, cycle_steps
from bench.sizes import LATENT_PX, SIZES, Size
from model.catvton import published
from model.catvton.attention import TryOnUNet
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.schedule import solver_like, steps_of

TERA = 1e12
META = torch.device("meta")
BASELINE = "baseline_"  # before its keys in the report
HOST = torch.device("cpu")  # where the baseline's timesteps lie here: without contents they could not be read


@dataclass(frozen=True)
class Counts:
    """What something asks of a device; see `Counter`."""

    flop: int
    kernels: int
    bytes: int
    host_reads: int

    @classmethod
    def of(cls, counter: Counter) -> Counts:
        """What a counter has counted so far."""
        return cls(counter.flop, counter.kernels, counter.bytes, counter.host_reads)

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(mine - its for mine, its in zip(asdict(self).values(), asdict(other).values())))


class Shapes:
    """The pipeline and the baseline of one size, without contents.

    Args:
        size: of the modules and of the picture.
        dtype: of the weights.
        layout: of the weights; the engine has channels_last on CUDA.
    """

    def __init__(
        self,
        size: Size = SIZES["sd15"],
        dtype: torch.dtype = torch.float16,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> None:
        with META:
            unet = TryOnUNet(**size.unet).to(dtype).eval()
            vae = AutoencoderKL(**size.vae).to(dtype).eval()
        for module in (unet, vae):
            module.to(memory_format=layout)
        self._size = size
        self._pipeline = CatVTONPipeline(vae, unet, DDIMScheduler(**published.SCHEDULER_CONFIG))
        self._pipeline.set_progress_bar_config(disable=True)

    @property
    def parameters(self) -> int:
        """Of the UNet."""
        return sum(parameter.numel() for parameter in self._pipeline.unet.parameters())

    def loop(self, recipe: Recipe, steps: int) -> Counts:
        """What the pipeline's denoising loop of so many steps asks for."""
        noise = self._pipeline.prepare_latents(1, self._size.height, self._size.width, None)
        scheduler = solver_like(self._pipeline.scheduler, recipe.knobs.solver, steps)
        prepared = steps_of(scheduler, noise, None, eta=1.0)
        condition = self._condition(guided=recipe.guided)
        with counting(META) as counter:
            self._pipeline.denoise(noise, condition, recipe.guidance, prepared, recipe.knobs)
        return Counts.of(counter)

    def baseline_loop(self, steps: int) -> Counts:
        """What the baseline's loop of so many guided steps asks for."""
        baseline = Baseline(stock_unet(self._pipeline.unet), self._pipeline.vae, self._pipeline.scheduler)
        condition = self._condition(guided=True)
        with counting() as counter:
            baseline.denoise(condition, steps=steps, guidance=GUIDANCE, generator=None, timesteps_on=HOST)
        return Counts.of(counter)

    def autoencoder(self) -> Counts:
        """What encoding person and garment and decoding the picture asks for."""
        pictures = torch.empty(1, 3, self._size.height, self._size.width, device=META)
        latents = torch.empty(self._latents_shape(), device=META)
        with counting() as counter:
            self._pipeline.encode(pictures)
            self._pipeline.encode(pictures)
            self._pipeline.decode(latents)
        return Counts.of(counter)

    def exact_step(self) -> Counts:
        """What one step of the exact mode asks for, without what is done once per schedule."""
        return self.loop(EXACTLY, 2) - self.loop(EXACTLY, 1)

    def step_flop(self, recipe: Recipe) -> float:
        """Floating-point operations of one step, mean over the shortest schedule with whole cycles of its knobs."""
        steps = cycle_steps(recipe.knobs)
        return self.loop(recipe, steps).flop / steps

    def _latents_shape(self) -> tuple[int, int, int, int]:
        channels = self._pipeline.vae.config.latent_channels
        return (1, channels, self._size.height // LATENT_PX, self._size.width // LATENT_PX)

    def _condition(self, *, guided: bool) -> torch.Tensor:
        _, channels, rows, columns = self._latents_shape()
        return torch.empty(1 + guided, channels + 1, 2 * rows, columns, device=META, dtype=self._pipeline.unet.dtype)


def count(shapes: Shapes, on_cuda: Shapes) -> dict[str, Any]:
    """The whole report.

    Args:
        shapes: contiguous.
        on_cuda: the same in channels_last.
    """
    exact, served = shapes.exact_step(), on_cuda.exact_step()
    baseline = shapes.baseline_loop(3) - shapes.baseline_loop(2)
    autoencoder_flop = shapes.autoencoder().flop
    exact_picture_flop = EXACTLY.steps * exact.flop + autoencoder_flop
    return {
        "tflop_per_guided_step": exact.flop / TERA,
        "tflop_per_picture": exact_picture_flop / TERA,
        "ops_per_step": exact.kernels,
        "bytes_per_step": exact.bytes,
        "host_reads_per_step": exact.host_reads,
        "channels_last": {"ops_per_step": served.kernels, "bytes_per_step": served.bytes},
        "baseline_ops_per_step": baseline.kernels,
        "baseline_bytes_per_step": baseline.bytes,
        "baseline_host_reads_per_step": baseline.host_reads,
        "parameters": shapes.parameters,
        "fast": traded(shapes, exact.flop, autoencoder_flop),
    }


def traded(shapes: Shapes, exact_flop: int, autoencoder_flop: int) -> dict[str, dict[str, Any]]:
    """What each recipe asks for, by name; of the named qualities for a whole picture.

    Args:
        shapes: of the modules.
        exact_flop: of one step of the exact mode.
        autoencoder_flop: of one picture.
    """
    exact_picture_flop = EXACTLY.steps * exact_flop + autoencoder_flop
    fast: dict[str, dict[str, Any]] = {}
    for recipe in (*SINGLE, *COMBINED):
        flop = shapes.step_flop(recipe)
        fast[recipe.name] = {**_settings(recipe), "tflop_per_step": flop / TERA, "speedup": exact_flop / flop}
    for recipe in SOLVERS:
        step = shapes.loop(recipe, 5) - shapes.loop(recipe, 4)  # beyond their first and last ones, which are simpler
        fast[recipe.name] = {
            **_settings(recipe),
            "tflop_per_step": step.flop / TERA,
            "speedup": exact_flop / step.flop,
            "ops_per_step": step.kernels,
            "host_reads_per_step": step.host_reads,
        }
    for recipe in NAMED:
        flop = shapes.step_flop(recipe)
        picture_flop = recipe.steps * flop + autoencoder_flop
        fast[recipe.name] = {
            **_settings(recipe),
            "steps": recipe.steps,
            "tflop_per_step": flop / TERA,
            "tflop_per_picture": picture_flop / TERA,
            "speedup": exact_picture_flop / picture_flop,
        }
    return fast


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {"guided": recipe.guided, "knobs": asdict(recipe.knobs)}


def table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"one guided step at 1024x768: {report['tflop_per_guided_step']:.3f} TFLOP, "
        f"{report['parameters']:,} parameters in the UNet",
        f"{'':<34}{'exact':>12}{'on CUDA':>12}{'baseline':>12}",
    ]
    baseline = {key[len(BASELINE) :]: value for key, value in report.items() if key.startswith(BASELINE)}
    columns = (report, report["channels_last"], baseline)
    for label, key, scale, form in (
        ("operations", "ops_per_step", 1, ".0f"),
        ("bytes read and written, GB", "bytes_per_step", 1e9, ".2f"),
        ("reads by the host", "host_reads_per_step", 1, ".0f"),
    ):
        cells = (format(column[key] / scale, form) if key in column else "" for column in columns)
        lines.append(f"{label:<34}" + "".join(f"{cell:>12}" for cell in cells))
    lines.append(f"{'':<34}{'TFLOP/step':>12}{'speed-up':>12}")
    for name, entry in report["fast"].items():
        of_steps = f" (pictures, {entry['steps']} steps)" if "steps" in entry else ""
        if "host_reads_per_step" in entry:
            of_steps = f" ({entry['ops_per_step']} operations, {entry['host_reads_per_step']} reads by the host)"
        lines.append(f"{name:<34}{entry['tflop_per_step']:>12.3f}{entry['speedup']:>12.2f}{of_steps}")
    return "\n".join(lines)


@click.command()
@json_option()
def main(json_path: Path | None) -> None:
    """Count operations of the exact mode, of the baseline, and of what is traded for speed."""
    report = count(Shapes(), Shapes(layout=torch.channels_last))
    click.echo(table(report))
    write_report(json_path, report)


if __name__ == "__main__":
    main()
