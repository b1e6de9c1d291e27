"""How far each trade for speed departs from the exact picture of the same seed: `python -m bench.drift --help`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from bench.cases import Case, draw_cases
from bench.counters import TERA, Shapes
from bench.files import json_option, write_report
from bench.metrics import ciede2000, lab, median_colour, psnr, squared_error, ssim
from bench.quality import load, to_pictures
from bench.recipes import COMBINED, EXACTLY, FULL_STEPS, GUIDANCE, MOST_STEPS, NAMED, SINGLE, Recipe
from bench.record import DRIFT, HERE, put
from bench.surroundings import versions
from model.catvton.knobs import Knobs
from model.catvton.pipeline import CatVTONPipeline
from model.catvton.published import ATTENTION_FOLDERS
from model.device import DEVICES, choose_device
from model.embedded.canvas import UNITS_WH
from model.embedded.figures import TEST_SEEDS
from model.interface import EMBEDDED, FAST, Image
from model.weights import WeightsError

FRESH, DETERMINISTIC = 1.0, 0.0  # shares of fresh noise in each of DDIM's steps
SOLVER_STEPS = (8, 10, 15, 20, 25, 30)
WANTED_DB = 35.0
WANTED_SPEEDUP = 1.69


@dataclass(frozen=True)
class Trial:
    """A recipe, and the exact picture that it is compared with.

    Attributes:
        recipe: with its number of steps.
        eta: share of fresh noise, of the recipe and of the exact picture; 1 as in the service.
    """

    recipe: Recipe
    eta: float


@dataclass(frozen=True)
class Drift:
    """What a trial departs from the exact pictures by; means over the pictures unless it says otherwise.

    Attributes:
        psnr_db, psnr_least_db, ssim: of whole pictures, before compositing.
        psnr_in_mask_db, ssim_in_mask: inside the masks.
        ciede2000: between the median colours of every garment that shows.
        picture_s: of processor or wall clock, on this machine.
        speedup: of floating-point operations of a whole picture at 1024x768, with the published UNet.
    """

    psnr_db: float
    psnr_least_db: float
    ssim: float
    psnr_in_mask_db: float
    ssim_in_mask: float
    ciede2000: float
    picture_s: float
    speedup: float


def trials() -> list[Trial]:
    """Every recipe as the service draws, and the solvers and recipes that draw no noise against a picture without."""
    solvers = [
        Trial(Recipe(f"{solver}, {steps} steps", Knobs(solver=solver), steps=steps), DETERMINISTIC)
        for solver in ("ddim", "dpm++", "unipc")
        for steps in SOLVER_STEPS
    ]
    named = [Trial(recipe, FRESH) for recipe in NAMED if recipe.knobs.solver == "ddim"]
    without_noise = [Trial(replace(recipe, name=f"{recipe.name}, no fresh noise"), DETERMINISTIC) for recipe in NAMED]
    fast = next(recipe for recipe in NAMED if recipe.name == FAST)
    against_noise = [] if fast.knobs.solver == "ddim" else [Trial(fast, FRESH)]
    recipes = [Trial(recipe, FRESH) for recipe in (*SINGLE, *COMBINED)]
    return [*named, *against_noise, *without_noise, *recipes, *solvers]


def draw(
    pipeline: CatVTONPipeline, cases: Sequence[Case], recipe: Recipe, eta: float, batch: int
) -> tuple[list[Image], float]:
    """The picture of each case's other garment, HWC uint8 RGB, and the mean seconds of one."""
    made: list[Image] = []
    exercises = [case.swapped for case in cases]
    height, width = exercises[0].mask.shape
    cuda = pipeline.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    started = clock()
    for start in range(0, len(exercises), batch):
        part = exercises[start : start + batch]
        output: Any = pipeline(
            [one.person for one in part],
            [one.garment for one in part],
            [one.mask for one in part],
            height=height,
            width=width,
            num_inference_steps=recipe.steps,
            guidance_scale=recipe.guidance,
            eta=eta,
            generator=[torch.Generator().manual_seed(start + place) for place in range(len(part))],
            output_type="np",
            knobs=recipe.knobs,
        )
        made += to_pictures(output.images)
    return made, (clock() - started) / len(made)


def departure(made: Sequence[Image], exact: Sequence[Image], cases: Sequence[Case]) -> dict[str, float]:
    """The figures of `Drift` that come from pictures."""
    whole = [np.ones(picture.shape[:2], np.bool_) for picture in made]
    inside = [case.swapped.mask > 0 for case in cases]
    everywhere = [psnr(squared_error(*triple)) for triple in zip(made, exact, whole)]
    colours = [
        float(ciede2000(lab(median_colour(one, piece.cloth)), lab(median_colour(other, piece.cloth))))
        for one, other, case in zip(made, exact, cases)
        for piece in case.pieces
        if piece.cloth.any()
    ]
    return {
        "psnr_db": float(np.mean(everywhere)),
        "psnr_least_db": min(everywhere),
        "ssim": float(np.mean([ssim(*triple) for triple in zip(made, exact, whole)])),
        "psnr_in_mask_db": float(np.mean([psnr(squared_error(*triple)) for triple in zip(made, exact, inside)])),
        "ssim_in_mask": float(np.mean([ssim(*triple) for triple in zip(made, exact, inside)])),
        "ciede2000": float(np.mean(colours)),
    }


class Speedups:
    """How many times fewer operations a recipe's picture takes than the exact one, counted on shapes."""

    def __init__(self) -> None:
        self._shapes = Shapes()
        self._autoencoder_flop = self._shapes.autoencoder().flop
        self._step_flop: dict[tuple[Knobs, bool], float] = {}
        self._exact = self._picture_flop(EXACTLY)

    def of(self, recipe: Recipe) -> float:
        """Of a whole picture at 1024x768, all its steps and the autoencoder included."""
        return self._exact / self._picture_flop(recipe)

    def _picture_flop(self, recipe: Recipe) -> float:
        key = (replace(recipe.knobs, solver="ddim"), recipe.guided)  # what a solver itself computes is nothing
        if key not in self._step_flop:
            self._step_flop[key] = self._shapes.step_flop(replace(recipe, knobs=key[0]))
        return (recipe.steps * self._step_flop[key] + self._autoencoder_flop) / TERA


def measure(
    pipeline: CatVTONPipeline, cases: Sequence[Case], chosen: Sequence[Trial], *, exact_steps: int, batch: int
) -> list[tuple[Trial, Drift]]:
    """The drift of each trial from the exact pictures of `exact_steps` with the same share of fresh noise."""
    exactly = replace(EXACTLY, steps=exact_steps)
    exact = {eta: draw(pipeline, cases, exactly, eta, batch)[0] for eta in sorted({trial.eta for trial in chosen})}
    speedups = Speedups()
    found: list[tuple[Trial, Drift]] = []
    for trial in tqdm(chosen, unit="recipe", leave=False, disable=None):
        made, seconds = draw(pipeline, cases, trial.recipe, trial.eta, batch)
        figures = departure(made, exact[trial.eta], cases)
        found.append((trial, Drift(**figures, picture_s=seconds, speedup=speedups.of(trial.recipe))))
    return found


def markdown(report: dict[str, Any]) -> str:
    """The report as the text of bench/README.md."""
    told = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"`python -m bench.drift --pairs {report['pairs']}`: {report['pairs']} figures from seed {report['seed']}, "
        f"weights {report['weights']} at {report['width']}x{report['height']}, guidance {report['guidance']:g}, "
        f"{report['exact_steps']} exact steps; {told}. Not measured on the published weights.",
        "",
        "| recipe | steps | fresh noise | PSNR, dB (least) | SSIM | in mask: PSNR, dB | SSIM | CIEDE2000 "
        "| FLOP, times fewer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(entry) for entry in report["recipes"]]
    lines += ["", best(report)]
    return "\n".join(lines)


def _row(entry: dict[str, Any]) -> str:
    cells = (
        entry["name"],
        f"{entry['steps']}",
        "yes" if entry["eta"] else "no",
        f"{entry['psnr_db']:.1f} ({entry['psnr_least_db']:.1f})",
        f"{entry['ssim']:.4f}",
        f"{entry['psnr_in_mask_db']:.1f}",
        f"{entry['ssim_in_mask']:.3f}",
        f"{entry['ciede2000']:.2f}",
        f"{entry['speedup']:.2f}",
    )
    return f"| {' | '.join(cells)} |"


def best(report: dict[str, Any]) -> str:
    """Which recipe, drawn as the service draws, is nearest to the exact picture among those that save enough."""
    enough = [
        entry
        for entry in report["recipes"]
        if entry["eta"] and entry["psnr_db"] >= WANTED_DB and entry["speedup"] >= WANTED_SPEEDUP
    ]
    wanted = f"at least {WANTED_DB:g} dB and {WANTED_SPEEDUP} times fewer operations"
    if not enough:
        return f"No recipe with fresh noise has {wanted}."
    nearest = max(enough, key=lambda entry: float(entry["psnr_db"]))
    return f"Of those with fresh noise, {wanted}, `{nearest['name']}` is nearest to the exact picture."


@click.command()
@click.option("--pairs", type=click.IntRange(1, len(TEST_SEEDS)), default=12, show_default=True, help="Figures.")
@click.option("--seed", type=click.IntRange(TEST_SEEDS[0], TEST_SEEDS[-1]), default=TEST_SEEDS[100], show_default=True)
@click.option("--weights", default=EMBEDDED, show_default=True, help="A directory in the published layout.")
@click.option("--variant", type=click.Choice(sorted(ATTENTION_FOLDERS)), default="mix", show_default=True)
@click.option("--device", type=click.Choice(["auto", *DEVICES]), default="cpu", show_default=True)
@click.option("--batch", type=click.IntRange(1), default=4, show_default=True, help="Pictures at once.")
@click.option("--exact-steps", type=click.IntRange(1, MOST_STEPS), default=FULL_STEPS, show_default=True)
@click.option("--only", multiple=True, help="A recipe by name; all if none is named.")
@click.option("--readme", is_flag=True, help="Write the table into bench/README.md.")
@json_option()
def main(**options: Any) -> None:  # noqa: ANN401 - click's
    """Judge how far each trade for speed departs from the exact picture of the same seed."""
    chosen = [trial for trial in trials() if not options["only"] or trial.recipe.name in options["only"]]
    missing = set(options["only"]) - {trial.recipe.name for trial in chosen}
    if missing:
        raise click.UsageError(f"unknown recipes: {', '.join(sorted(missing))}")
    try:
        device = choose_device(options["device"])
        cases = draw_cases(options["pairs"], options["seed"])
        pipeline = load(options["weights"], options["variant"], device)
    except (ValueError, WeightsError) as exc:
        raise click.UsageError(str(exc)) from exc
    found = measure(pipeline, cases, chosen, exact_steps=options["exact_steps"], batch=options["batch"])
    report = {
        **{name: options[name] for name in ("pairs", "seed", "weights", "variant", "exact_steps")},
        **{"device": device.type, "width": UNITS_WH[0], "height": UNITS_WH[1], "guidance": GUIDANCE},
        "recipes": [
            {
                "name": trial.recipe.name,
                "steps": trial.recipe.steps,
                "eta": trial.eta,
                "guided": trial.recipe.guided,
                "knobs": asdict(trial.recipe.knobs),
                **asdict(drift),
            }
            for trial, drift in found
        ],
        "versions": versions(),
    }
    click.echo(markdown(report))
    if options["readme"]:
        put(HERE / "README.md", DRIFT, markdown(report))
    write_report(options["json_path"], report)


if __name__ == "__main__":
    main()
