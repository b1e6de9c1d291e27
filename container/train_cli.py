"""`vton train`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import click

from model.training_options import (
    ALL_WEIGHTS,
    ATTENTION_ONLY,
    DEVICES,
    DTYPES,
    FIGURES,
    FROM_SCRATCH,
    OPTIMIZERS,
    PREDICTION_TYPES,
    Course,
    TrainingError,
    TrainingOptions,
    parse,
    parse_size,
)
from model.weights import WeightsError

TRYON = "tryon"
PARTS = {  # part -> module with its `run`
    TRYON: "model.catvton.training",  # takes TrainingOptions and Course
    "autoencoder": "model.embedded.autoencoder",  # these two take output, steps, seed and resume
    "parser": "model.embedded.parser_training",
}
EXIT_REFUSED = 64  # sysexits: usage
EXIT_STOPPED = 75  # sysexits: temporary failure; --resume goes on

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.option("--part", type=click.Choice(list(PARTS)), default=TRYON, show_default=True, help="What is trained.")
@click.option("--output", "-o", type=_FOLDER, required=True, help="Folder of the run.")
@click.option("--data", default=FIGURES, show_default=True, metavar="figures|MANIFEST", help="CSV or .jsonl file.")
@click.option("--pairs", type=int, help="Figures to draw.")
@click.option("--size", metavar="WxH", help="Of the pictures, px.")
@click.option("--from-scratch", "method", flag_value=FROM_SCRATCH, default=True, help="Train a new UNet (default).")
@click.option("--attention-only", "method", flag_value=ATTENTION_ONLY, help="Train the self-attention of --weights.")
@click.option("--all-weights", "method", flag_value=ALL_WEIGHTS, help="Train the whole UNet of --weights.")
@click.option("--weights", help="Directory of published weights to start from.")
@click.option("--variant", help="Their self-attention to start from: mix, vitonhd or dresscode.")
@click.option("--vae", help="Folder of an autoencoder, for --from-scratch.")
@click.option("--unet", help="JSON file with the UNet's configuration, for --from-scratch.")
@click.option("--prediction-type", type=click.Choice(PREDICTION_TYPES), help="For --from-scratch.")
@click.option("--steps", type=int)
@click.option("--batch", type=int, help="Pairs in a step.")
@click.option("--optimizer", type=click.Choice(OPTIMIZERS))
@click.option("--lr", "learning_rate", type=float)
@click.option("--seed", type=int)
@click.option("--dtype", type=click.Choice(DTYPES), help="Of the forward pass.")
@click.option("--set", "others", multiple=True, metavar="NAME=VALUE", help="Any other option of the training.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint; the other options must be the same.")
@click.option("--save-every", type=click.IntRange(1), default=500, show_default=True, help="Steps.")
@click.option("--sample-every", type=click.IntRange(0), default=1000, show_default=True, help="Steps; 0 for never.")
@click.option("--device", type=click.Choice(DEVICES), default="auto", show_default=True)
@click.option("--readers", type=click.IntRange(1, 2), default=2, show_default=True, help="Processes that draw or read.")
def train(part: str, method: str, **given: Any) -> None:  # noqa: ANN401 - each option has its own type
    """Train the try-on model; SIGTERM stops it after a checkpoint.

    The parts "autoencoder" and "parser" are those of the embedded model; they take --output, --steps, --seed, --resume.

    On several processors: torchrun --nproc-per-node N --no-python vton train ...
    """
    if part != TRYON:
        _train_small(part, given)
        return
    names = ("output", "resume", "save_every", "sample_every", "device", "readers")
    course = Course(**{name: given.pop(name) for name in names})
    try:
        options = _options(method, given)
        came_to_end = importlib.import_module(PARTS[part]).run(options, course)
    except TrainingError as exc:
        click.echo(str(exc), err=True)
        sys.exit(EXIT_REFUSED)
    if not came_to_end:
        click.echo(f"stopped; --resume goes on in {course.output}", err=True)
        sys.exit(EXIT_STOPPED)
    click.echo(f"weights: {course.output / 'export'}")


def _train_small(part: str, given: dict[str, Any]) -> None:
    """Train one of the embedded model's other networks, which follow from the number of steps and the seed alone."""
    if given["steps"] is None:
        click.echo(f"--part {part} needs --steps", err=True)
        sys.exit(EXIT_REFUSED)
    seed = given["seed"] or 0
    try:
        run = importlib.import_module(PARTS[part]).run
        run(given["output"], steps=given["steps"], seed=seed, resume=given["resume"])
    except (TrainingError, ValueError, WeightsError) as exc:
        click.echo(str(exc), err=True)
        sys.exit(EXIT_REFUSED)
    click.echo(f"weights: {given['output']}")


def _options(method: str, given: dict[str, Any]) -> TrainingOptions:
    """Options from what the command line was given; None is the method's default.

    Raises:
        TrainingError: one of them is wrong.
    """
    others, size = given.pop("others"), given.pop("size")
    chosen = {name: value for name, value in given.items() if value is not None}
    if size is not None:
        chosen["width"], chosen["height"] = parse_size(size)
    pairs = [each.partition("=") for each in others]
    extra = parse({name: value for name, _, value in pairs})
    twice = sorted(set(extra) & ({*chosen, "method"}))
    if twice:
        raise TrainingError(f"--set {twice[0]} has an option of its own")
    return TrainingOptions.of_method(method, **chosen, **extra)
