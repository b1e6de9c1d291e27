"""How long the masks of one photo take, network by network: `python -m bench.masker --help`."""

from __future__ import annotations

import platform
import resource
import statistics
import time
from pathlib import Path
from typing import Any, Callable

import click
import numpy as np
import torch
from PIL import Image as Pillow

from bench.files import json_option, write_report
from container.person_masks import LONGEST_SIDE
from container.request import CLOTH_TYPES
from model import geometry
from model.device import DEVICES, DTYPES, choose_device, choose_dtype
from model.interface import Image, MaskerOptions
from model.maskers.agnostic import cloth_agnostic_mask
from model.maskers.auto import AutoMasker, load
from model.maskers.densepose import DensePose
from model.maskers.densepose_network import DensePoseNetwork
from model.maskers.schp import SCHP
from model.maskers.schp_network import SchpNetwork
from model.weights import WeightsError

SIZE_WH = (768, 1024)


@click.command()
@click.option(
    "--weights",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of weights; without one they are random.",
)
@click.option(
    "--photo", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Without one it is noise of 768x1024."
)
@click.option("--device", type=click.Choice(["auto", *DEVICES]), default="auto", show_default=True)
@click.option("--dtype", type=click.Choice(["auto", *DTYPES]), default="auto", show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@json_option()
def main(weights: Path | None, photo: Path | None, json_path: Path | None, repeats: int, **options: str) -> None:
    """Mask one photo for all five types; print the median seconds of each stage."""
    try:
        device = choose_device(options["device"])
        dtype = choose_dtype(options["dtype"], device)
        picture = _noise() if photo is None else np.asarray(Pillow.open(photo).convert("RGB"))
        masker = _random(device, dtype) if weights is None else load(MaskerOptions(weights, **options))
    except (OSError, ValueError, WeightsError) as exc:
        raise click.UsageError(str(exc)) from exc
    picture = geometry.fit_within(picture, LONGEST_SIDE)
    _measure(masker, picture, device)  # warm-up
    runs = [_measure(masker, picture, device) for _ in range(repeats)]
    figures: dict[str, Any] = {f"{stage}_s": statistics.median(run[stage] for run in runs) for stage in runs[0]}
    about = {
        "weights": str(weights or "random"),
        "width": picture.shape[1],
        "height": picture.shape[0],
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "dtype": str(dtype),
        "repeats": repeats,
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    click.echo("  ".join(f"{name} {value}" for name, value in about.items()))
    for stage, seconds in figures.items():
        click.echo(f"{stage.removesuffix('_s'):<12}{seconds:8.3f} s")
    write_report(json_path, {**about, **figures})


def _measure(masker: AutoMasker, picture: Image, device: torch.device) -> dict[str, float]:
    """Seconds of each stage of one photo."""
    seconds: dict[str, float] = {}

    def timed(stage: str, work: Callable[[], Any]) -> Any:  # noqa: ANN401 - whatever the stage gives
        began = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds[stage] = time.perf_counter() - began
        return result

    densepose = timed("DensePose", lambda: masker.densepose.labels(picture))
    lip = timed("SCHP LIP", lambda: masker.lip.parse(picture))
    atr = timed("SCHP ATR", lambda: masker.atr.parse(picture))
    timed("five masks", lambda: [cloth_agnostic_mask(densepose, lip, atr, name) for name in CLOTH_TYPES])
    return {**seconds, "all": sum(seconds.values())}


def _random(device: torch.device, dtype: torch.dtype) -> AutoMasker:
    """A masker whose networks have the published shapes; every box holds a person, so that no stage is left out."""
    torch.manual_seed(0)
    body = DensePoseNetwork().state_dict()
    body["roi_heads.box_predictor.cls_score.bias"] = torch.tensor([10.0, -10.0])
    lip, atr = (SCHP(_laid_out(SchpNetwork(count), device, dtype), count) for count in (20, 18))
    return AutoMasker(DensePose.from_state_dict(body, device, dtype), lip, atr)


def _laid_out(network: SchpNetwork, device: torch.device, dtype: torch.dtype) -> SchpNetwork:
    laid_out: SchpNetwork = network.eval().requires_grad_(requires_grad=False).to(device, dtype)
    return laid_out.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def _noise() -> Image:
    """Coarse noise: the parsers see regions, as in a photo."""
    small = np.random.default_rng(0).integers(0, 256, (32, 24, 3), np.uint8)
    return np.asarray(Pillow.fromarray(small).resize(SIZE_WH, Pillow.Resampling.BICUBIC))


if __name__ == "__main__":
    main()
