"""Judge what a model paints, on drawn figures that it never saw: `python -m bench.quality --help`."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import click
import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from bench.cases import Case, draw_cases
from bench.contact_sheet import write_sheet
from bench.files import FILE, json_option, place, unwritten, write_report
from bench.judge import (
    class_accuracy,
    colour_differences,
    likeness,
    texture_accuracy,
    texture_table,
    unmasked_difference,
)
from bench.metrics import TEXTURES, psnr, squared_error
from bench.recipes import MOST_STEPS
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.published import ATTENTION_FOLDERS
from model.device import DEVICES, choose_device
from model.embedded import load_pipeline
from model.embedded.canvas import UNITS_WH
from model.embedded.figures import TEST_SEEDS, Example
from model.interface import EMBEDDED, Image
from model.weights import WeightsError

FEW_STEPS, MANY_STEPS = 20, 200  # the deterministic pictures that are compared
NOISE_SEEDS = 3  # pictures of one figure, for the variation from seed to seed
NOISE_FIGURES = 8


@dataclass(frozen=True)
class Job:
    """How pictures are made.

    Attributes:
        steps: of denoising.
        guidance: scale; 1 turns it off.
        eta: share of fresh noise in each step; the engine uses 1, 0 is deterministic.
        batch: pictures at once.
    """

    steps: int
    guidance: float
    eta: float
    batch: int


def dress(
    pipeline: CatVTONPipeline, exercises: Sequence[Example], job: Job, *, seed: int = 0, blank: bool = False
) -> list[Image]:
    """The pipeline's picture of each exercise, HWC uint8 RGB, at the size of the exercises.

    Args:
        pipeline: on its device.
        exercises: all of one size.
        job: how.
        seed: of the first picture's noise; the others count up, so that a picture does not depend on the batch.
        blank: show a white picture in place of the garment.
    """
    made: list[Image] = []
    height, width = exercises[0].mask.shape
    for start in tqdm(range(0, len(exercises), job.batch), unit="batch", leave=False, disable=None):
        part = exercises[start : start + job.batch]
        garments = [np.full_like(one.garment, 255) if blank else one.garment for one in part]
        output: Any = pipeline(
            [one.person for one in part],
            garments,
            [one.mask for one in part],
            height=height,
            width=width,
            num_inference_steps=job.steps,
            guidance_scale=job.guidance,
            eta=job.eta,
            generator=[torch.Generator().manual_seed(seed + start + place) for place in range(len(part))],
            output_type="np",
        )
        made += to_pictures(output.images)
    return made


def to_pictures(pixels: NDArray[np.float32]) -> list[Image]:
    """(B, H, W, 3) in [0, 1] as HWC uint8 RGB."""
    return list(np.rint(pixels * 255).astype(np.uint8))


def reconstruct(pipeline: CatVTONPipeline, pictures: Sequence[Image], batch: int) -> list[Image]:
    """What the autoencoder alone makes of pictures: no try-on with it can be nearer to its truth."""
    made: list[Image] = []
    for start in range(0, len(pictures), batch):
        stacked = torch.from_numpy(np.stack(pictures[start : start + batch])).permute(0, 3, 1, 2)
        with torch.no_grad():
            latents = pipeline.encode(stacked.to(pipeline.device).float() / 127.5 - 1)
            pixels = pipeline.decode(pipeline.unscale(latents))
        made += to_pictures(pixels.permute(0, 2, 3, 1).cpu().numpy())
    return made


def seed_variation(pipeline: CatVTONPipeline, exercises: Sequence[Example], job: Job) -> float:
    """Mean over masks of the standard deviation between pictures from different noise, in grey levels."""
    runs = [dress(pipeline, exercises, job, seed=1_000 * run) for run in range(NOISE_SEEDS)]
    spread = np.std(np.array(runs, np.float32), axis=0)  # (B, H, W, 3)
    return float(np.mean([part[one.mask > 0].mean() for part, one in zip(spread, exercises)]))


def few_of_many_steps(pipeline: CatVTONPipeline, exercises: Sequence[Example], job: Job) -> dict[str, float]:
    """PSNR in dB of 20 deterministic steps against 200: of whole pictures and inside the masks, means over pictures."""
    few, many = (
        dress(pipeline, exercises, Job(steps, job.guidance, 0.0, job.batch)) for steps in (FEW_STEPS, MANY_STEPS)
    )
    everywhere = [np.ones(one.mask.shape, np.bool_) for one in exercises]
    inside = [one.mask > 0 for one in exercises]
    names = ("psnr_20_of_200_steps", "psnr_20_of_200_steps_in_mask")
    return {
        name: float(np.mean([psnr(squared_error(*triple)) for triple in zip(few, many, regions)]))
        for name, regions in zip(names, (everywhere, inside))
    }


def measure(
    pipeline: CatVTONPipeline, cases: Sequence[Case], job: Job, *, many_steps_figures: int
) -> tuple[dict[str, Any], list[Image], list[Image]]:
    """All figures of the report, and the pictures of the paired and the swapped garments."""
    paired, swapped = [case.paired for case in cases], [case.swapped for case in cases]
    started = time.perf_counter()
    made = dress(pipeline, paired, job)
    seconds = (time.perf_counter() - started) / len(paired)
    other = dress(pipeline, swapped, job)
    near = likeness(made, paired)
    blank = likeness(dress(pipeline, paired, job, blank=True), paired)
    ceiling = likeness(reconstruct(pipeline, [one.target for one in paired], job.batch), paired)
    differences, table = colour_differences(other, cases), texture_table(other, cases)
    report: dict[str, Any] = {
        "psnr_in_mask": near.psnr_db,
        "psnr_in_mask_pooled": near.psnr_pooled_db,
        "ssim_in_mask": near.ssim,
        "psnr_in_mask_blank_garment": blank.psnr_db,
        "ssim_in_mask_blank_garment": blank.ssim,
        "psnr_in_mask_autoencoder": ceiling.psnr_db,
        "ciede2000_plain_median": float(np.median(differences)) if differences else None,
        "ciede2000_plain_mean": float(np.mean(differences)) if differences else None,
        "plain_garments": len(differences),
        "texture_accuracy": texture_accuracy(table),
        "texture_class_accuracy": class_accuracy(table),
        "texture_table": table,
        "unmasked_max_difference": unmasked_difference([*made, *other], [*paired, *swapped]),
        "seed_std_in_mask": seed_variation(pipeline, paired[:NOISE_FIGURES], job),
        "picture_s": seconds,
    }
    if many_steps_figures:
        report.update(few_of_many_steps(pipeline, paired[:many_steps_figures], job))
    return report, made, other


def table(report: dict[str, Any]) -> str:
    """The report as lines for a terminal."""
    lines = [
        f"{report['pairs']} figures from seed {report['seed']}, {report['width']}x{report['height']}, "
        f"weights {report['weights']}: {report['steps']} steps, guidance {report['guidance']:g}, eta {report['eta']:g}",
    ]
    for label, key, form in (
        ("PSNR in mask, mean over pictures", "psnr_in_mask", "{:9.2f} dB"),
        ("  all pixels pooled", "psnr_in_mask_pooled", "{:9.2f} dB"),
        ("  with a blank garment", "psnr_in_mask_blank_garment", "{:9.2f} dB"),
        ("  of the autoencoder alone", "psnr_in_mask_autoencoder", "{:9.2f} dB"),
        ("SSIM in mask", "ssim_in_mask", "{:9.3f}"),
        ("  with a blank garment", "ssim_in_mask_blank_garment", "{:9.3f}"),
        ("CIEDE2000 of plain garments, median", "ciede2000_plain_median", "{:9.2f}"),
        ("  mean", "ciede2000_plain_mean", "{:9.2f}"),
        ("patterned told from plain", "texture_accuracy", "{:9.1%}"),
        ("texture named right", "texture_class_accuracy", "{:9.1%}"),
        ("change outside the mask, at most", "unmasked_max_difference", "{:9d} grey levels"),
        ("std between seeds, in mask", "seed_std_in_mask", "{:9.2f} grey levels"),
        ("20 of 200 deterministic steps", "psnr_20_of_200_steps", "{:9.2f} dB"),
        ("  in mask", "psnr_20_of_200_steps_in_mask", "{:9.2f} dB"),
        ("one picture", "picture_s", "{:9.2f} s"),
    ):
        figure = report.get(key)
        lines.append(f"{label:<36}{'      none' if figure is None else ' ' + form.format(figure)}")
    lines.append(f"{'texture: is, seen as':<24}" + "".join(f"{name:>11}" for name in TEXTURES))
    for true, row in report["texture_table"].items():
        lines.append(f"  {true:<22}" + "".join(f"{row[name]:>11}" for name in TEXTURES))
    return "\n".join(lines)


def load(weights: str, variant: str, device: torch.device) -> CatVTONPipeline:
    """The pipeline of the repository, or of a directory in the published layout, float32 on the device."""
    pipeline = load_pipeline() if weights == EMBEDDED else CatVTONPipeline.from_published(weights, variant)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device)
    return pipeline


@click.command()
@click.option("--pairs", type=click.IntRange(1, len(TEST_SEEDS)), default=128, show_default=True, help="Figures.")
@click.option("--seed", type=click.IntRange(TEST_SEEDS[0], TEST_SEEDS[-1]), default=TEST_SEEDS[0], show_default=True)
@click.option("--weights", default=EMBEDDED, show_default=True, help="A directory in the published layout.")
@click.option("--variant", type=click.Choice(sorted(ATTENTION_FOLDERS)), default="mix", show_default=True)
@click.option("--device", type=click.Choice(["auto", *DEVICES]), default="cpu", show_default=True)
@click.option("--steps", type=click.IntRange(1, MOST_STEPS), default=8, show_default=True)
@click.option(
    "--guidance",
    type=click.FloatRange(1, 10),
    default=1.0,
    show_default=True,
    help="1, which is off, suits the embedded weights; CatVTON's own take 2.5.",
)
@click.option("--eta", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="1 as in the service.")
@click.option("--batch", type=click.IntRange(1), default=8, show_default=True, help="Pictures at once.")
@click.option("--many-steps-figures", type=click.IntRange(0), default=4, show_default=True, help="0: no 200 steps.")
@click.option("--sheet", "sheet_path", type=FILE, callback=place, help="Write a contact sheet (PNG) here.")
@click.option("--sheet-rows", type=click.IntRange(1), default=12, show_default=True)
@json_option()
def main(**options: Any) -> None:  # noqa: ANN401 - click's
    """Judge what a model paints, on drawn figures that it never saw."""
    try:
        device = choose_device(options["device"])
        cases = draw_cases(options["pairs"], options["seed"])
        pipeline = load(options["weights"], options["variant"], device)
    except (ValueError, WeightsError) as exc:
        raise click.UsageError(str(exc)) from exc
    job = Job(options["steps"], options["guidance"], options["eta"], options["batch"])
    figures, made, other = measure(pipeline, cases, job, many_steps_figures=options["many_steps_figures"])
    report = {
        **{name: options[name] for name in ("pairs", "seed", "weights", "variant")},
        **{"device": device.type, "width": UNITS_WH[0], "height": UNITS_WH[1]},
        **asdict(job),
        **figures,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    click.echo(table(report))
    write_report(options["json_path"], report)
    if options["sheet_path"] is not None:
        rows = options["sheet_rows"]
        try:
            write_sheet(cases[:rows], made[:rows], other[:rows], options["sheet_path"])
        except OSError as exc:
            raise click.ClickException(unwritten(options["sheet_path"], exc)) from exc


if __name__ == "__main__":
    main()
