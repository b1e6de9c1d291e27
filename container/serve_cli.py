"""`vton serve`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from model import weights
from model.interface import EMBEDDED

BASE_MODELS = ("booksforcharlie/stable-diffusion-inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting")
CHECKPOINTS = ("zhengchong/CatVTON",)
BASE_FOLDER, CHECKPOINT_FOLDER, VAE_FOLDER = "stable-diffusion-inpainting", "CatVTON", "sd-vae-ft-mse"
DTYPES = {"no": "float32", "fp16": "float16", "bf16": "bfloat16"}
PORT = "8000"
EXIT_SETTINGS = 78  # sysexits: configuration


@click.command()
@click.option("--host", help="Address to listen on; by default all.")
@click.option("--port", type=click.IntRange(1, 65535), help=f"By default VTON_PORT, else {PORT}.")
@click.option("--base-model", help=f"Folder of the inpainting model, or {BASE_MODELS[0]}.")
@click.option("--resume-path", help=f"Folder of CatVTON's checkpoints, or {CHECKPOINTS[0]}.")
@click.option("--width", type=int, help="px of what the model makes; 768.")
@click.option("--height", type=int, help="px of what the model makes; 1024.")
@click.option("--mixed-precision", type=click.Choice(sorted(DTYPES)), help="By default what the device can do.")
def serve(base_model: str | None, resume_path: str | None, mixed_precision: str | None, **options: object) -> None:
    """Serve the REST door and the SageMaker door. Settings come from VTON_ variables; options go before them.

    Results of /invocations are kept in ./vton_output where neither VTON_BUCKET nor VTON_OUTPUT_DIR is set. A published
    name is looked for below VTON_WEIGHTS, or else ./weights, and downloaded where it is missing.
    """
    from container.server import main as serve_main

    environ = {"VTON_REST": "1", **os.environ}
    if not {"VTON_PORT", "SAGEMAKER_BIND_TO_PORT"} & environ.keys():
        environ["VTON_PORT"] = PORT
    if not {"VTON_BUCKET", "VTON_OUTPUT_DIR"} & environ.keys():
        environ["VTON_OUTPUT_DIR"] = "vton_output"
    environ.update({f"VTON_{name.upper()}": str(value) for name, value in options.items() if value is not None})
    if mixed_precision is not None:
        environ["VTON_DTYPE"] = DTYPES[mixed_precision]
    try:
        if base_model is not None or resume_path is not None:
            environ["VTON_WEIGHTS"] = str(chosen_weights(environ, base_model, resume_path))
    except (weights.WeightsError, OSError) as exc:
        click.echo(str(exc), err=True)
        sys.exit(EXIT_SETTINGS)
    sys.exit(serve_main(environ))


def chosen_weights(environ: Mapping[str, str], base_model: str | None, resume_path: str | None) -> Path:
    """The directory of weights that a base model and a checkpoint make.

    Folders of one's own are linked together in one below the directory of weights, where their hashes are recorded at
    the first start and compared from then on.

    Args:
        environ: VTON_WEIGHTS and VTON_VARIANT count.
        base_model, resume_path: a folder of one's own, a published name, or None for the published one.
    Raises:
        WeightsError: a name is neither a folder nor published, the download failed, or there is no autoencoder.
    """
    kept = environ.get("VTON_WEIGHTS", EMBEDDED)
    directory = Path("weights" if kept == EMBEDDED else kept).resolve()
    base, checkpoint = _folder(base_model, BASE_MODELS), _folder(resume_path, CHECKPOINTS)
    part = f"catvton/{environ.get('VTON_VARIANT', 'mix')}"
    if (base is None or checkpoint is None) and not _is_here(directory, part):
        weights.download(directory, *part.split("/"))
    if base is None and checkpoint is None:
        return directory
    base, checkpoint = base or directory / BASE_FOLDER, checkpoint or directory / CHECKPOINT_FOLDER
    vae = next(
        (found for found in (base / "vae", base.parent / VAE_FOLDER, directory / VAE_FOLDER) if found.is_dir()), None
    )
    if vae is None:
        raise weights.WeightsError(f"there is no autoencoder in {base}, beside it, or in {directory}")
    return _linked(directory, {BASE_FOLDER: base, CHECKPOINT_FOLDER: checkpoint, VAE_FOLDER: vae})


def _is_here(directory: Path, part: str) -> bool:
    return all(line.present for line in weights.listing(directory) if part in line.parts)


def _linked(directory: Path, places: Mapping[str, Path]) -> Path:
    """A folder with links to these places by these names, the same one for the same places."""
    digest = hashlib.sha256("\n".join(map(str, places.values())).encode()).hexdigest()
    folder = directory / f"linked-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, place in places.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(place, target_is_directory=True)
    return folder


def _folder(name: str | None, published: tuple[str, ...]) -> Path | None:
    """The folder that a name says, or None for what is published."""
    if name is None or name in published:
        return None
    if not Path(name).is_dir():
        raise weights.WeightsError(f"{name} is no folder; published is {published[0]}")
    return Path(name).resolve()
