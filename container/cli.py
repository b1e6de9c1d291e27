"""The `vton` command."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Callable, NoReturn, TypeVar

import click
import numpy as np
from PIL import Image as Pillow

from container.cli_files import FilesAndUrls, OutputRefused, try_folder, try_outputs, write_output
from container.errors import TryOnError
from container.get_vton import Pictures, prepare
from container.images import FILE_OF, decode_mask
from container.page_cli import serve_page
from container.request import (
    CLOTH_TYPES,
    CallContext,
    MaskResult,
    TryOnRequest,
    TryOnResult,
    answer,
    parse_masks,
    parse_try_on,
)
from container.serve_cli import serve
from container.settings import Settings, SettingsError
from container.telemetry import StageTimes, configure_logging
from container.train_cli import train
from container.weights_cli import weights_group
from container.wiring import App, build, https_fetcher
from model import geometry, weights
from model.interface import Image

_Result = TypeVar("_Result", TryOnResult, MaskResult)

OUTPUT_DIR = Path("vton_output")
SHEET = "sheet"  # beside the masks
EXIT_SETTINGS = 78  # sysexits: configuration
EXIT_OUTPUT = 73  # sysexits: cannot create the output
EXIT_RETRY = 75  # sysexits: temporary failure
EXIT_OF_CODE = {
    "invalid_request": 64,
    "mask_invalid": 65,
    "person_not_found": 65,
    "image_not_decodable": 65,
    "image_format_not_permitted": 65,
    "image_too_small": 65,
    "image_too_many_pixels": 65,
    "image_too_large": 65,
    "image_not_found": 66,
    "internal": 70,
    "generation_failed": 70,
    "url_not_permitted": 77,
    "address_not_permitted": 77,
    "too_many_redirects": 77,
}
LOAD_LIMIT_S = 3600.0  # of the model, on the slowest disk
STOP_LIMIT_S = 1.0
POLL_S = 0.1


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vton-endpoint")
def main() -> None:
    """Virtual try-on: a person, a top and a bottom in, one picture out."""


@main.command()
@click.option("--person", required=True, help="Path or URL of the person's photo.")
@click.option("--upper", help="Path or URL of the top.")
@click.option("--lower", help="Path or URL of the bottom.")
@click.option("--overall", help="Path or URL of a dress or other full garment.")
@click.option("--mask", help="Path or URL of the mask: white is repainted. Without it one is made.")
@click.option("--cloth-type", default="overall", show_default=True, help="upper, lower, overall, inner or outer.")
@click.option("--steps", type=int, help="Denoising steps, 1-100.")
@click.option("--guidance", type=float, help="Guidance scale, 1-10.")
@click.option("--seed", type=int, default=42, show_default=True, help="-1 draws one.")
@click.option("--composite", default="repaint", show_default=True, help="repaint or none.")
@click.option("--output-size", default="model", show_default=True, help="model (768x1024) or person.")
@click.option("--quality", help="exact, balanced or fast: what is traded for speed.")
@click.option("--format", "output_format", default="jpeg", show_default=True, help="jpeg, png or webp.")
@click.option("--output-quality", type=int, default=95, show_default=True, help="Of a jpeg or webp, 1-100.")
@click.option("--user-id", default="local", show_default=True, help="userId of the request.")
@click.option("--timestamp", help="timestamp of the request; by default now.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File; by default one in ./vton_output.")
@click.option("--force", is_flag=True, help="Overwrite the output, and the strip.")
@click.option("--side-by-side", is_flag=True, help="Also write the strip person | masked | garment | result.")
def run(output: Path | None, force: bool, side_by_side: bool, timestamp: str | None, **options: object) -> None:
    """Dress a person. Settings come from VTON_ variables, as for the endpoint."""
    timestamp = timestamp or datetime.now().astimezone().strftime("%y%m%d-%H%M%S")
    with _local_service() as (app, images, kept):
        request = images.with_references(_request(timestamp, **options))
        suffix, _ = FILE_OF[request.output_format]
        output = output or OUTPUT_DIR / f"result-{timestamp}.{suffix}"
        strip = output.parent / f"{output.stem}-side-by-side.png"
        try_outputs([output, strip] if side_by_side else [output], force=force)
        result = _run(app, lambda deadline, context: app.service.run(request, deadline, context))
        content = (kept / result.object_key).read_bytes()
        write_output(output, content, force=force)
        click.echo(json.dumps({**answer(result), "path": str(output)}, indent=2))
        if side_by_side:
            write_output(strip, _png(_strip(app, images, request, content)), force=force)
            click.echo(f"side by side: {strip}", err=True)


@main.command()
@click.argument("photo")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder; by default one in ./vton_output.")
@click.option("--force", is_flag=True, help="Write into a folder that is there.")
def mask(photo: str, output: Path | None, force: bool) -> None:
    """Write the five masks of a PHOTO (a path or URL), and a sheet that shows them on it."""
    output = output or OUTPUT_DIR / f"masks-{Path(photo.partition('?')[0]).stem}"
    paths = {name: output / f"{name}.png" for name in (*CLOTH_TYPES, SHEET)}
    with _local_service() as (app, images, kept):
        request = parse_masks({"userId": "local", "timestamp": "masks", "person_image_url": photo})
        request = request.model_copy(update={"person_image_url": images.reference(photo)})
        try_folder(output, paths.values(), force=force)
        result = _run(app, lambda deadline, context: app.masks.run(request, deadline, context))
        masks = {name: (kept / key).read_bytes() for name, key in result.object_keys.items()}
        person = app.decoder.decode(images.seen[request.person_image_url], time.monotonic() + LOAD_LIMIT_S)
        shown = [geometry.tinted(person, decode_mask(content)) for content in masks.values()]
        for name, content in {**masks, SHEET: _png(geometry.side_by_side([person, *shown]))}.items():
            write_output(paths[name], content, force=force)
    told = {name: str(paths[name]) for name in masks}
    click.echo(json.dumps({"masks": told, "sheet": str(paths[SHEET]), "timings_ms": result.timings_ms}, indent=2))


@main.command()
@click.option("--output", "-o", type=click.Path(path_type=Path), default=OUTPUT_DIR / "demo", show_default=True)
@click.option("--web", is_flag=True, help="Serve a page to try it in a browser instead.")
@click.option("--host", help="With --web: address to listen on; by default this machine only.")
@click.option("--port", type=click.IntRange(1, 65535), help="With --web: by default VTON_PORT, else 8000.")
@click.option("--no-browser", is_flag=True, help="With --web: open no browser.")
def demo(output: Path, web: bool, host: str | None, port: int | None, no_browser: bool) -> None:
    """Run the whole service on this machine and call it as a backend would, through boto3."""
    if web:
        serve_page(host, port, browser=not no_browser)
    try:
        from deploy.demo import run_demo
    except ModuleNotFoundError as exc:
        _end(EXIT_SETTINGS, f"the demo needs {exc.name}: pip install 'vton-endpoint[demo]'")
    run_demo(output)


@main.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def local(arguments: tuple[str, ...]) -> None:
    """Serve behind what boto3 takes for SageMaker, on this machine; `vton local --help` says more."""
    try:
        from deploy.local_cli import local as local_group
    except ModuleNotFoundError as exc:
        _end(EXIT_SETTINGS, f"vton local needs {exc.name}: pip install 'vton-endpoint[demo]'")
    local_group.main(args=list(arguments), prog_name="vton local")


main.add_command(serve)
main.add_command(train)
main.add_command(weights_group)


def _request(timestamp: str, **options: object) -> TryOnRequest:
    fields = {
        "person_image_url": options["person"],
        "upper_cloth_url": options["upper"],
        "lower_cloth_url": options["lower"],
        "overall_cloth_url": options["overall"],
        "mask_image_url": options["mask"],
        "num_inference_steps": options["steps"],
        "guidance_scale": options["guidance"],
        "userId": options["user_id"],
        "timestamp": timestamp,
    }
    same_name = ("cloth_type", "seed", "composite", "output_size", "output_format", "output_quality", "quality")
    return parse_try_on({**fields, **{name: options[name] for name in same_name}})


@contextmanager
def _local_service() -> Iterator[tuple[App, FilesAndUrls, Path]]:
    """A service whose results lie in a folder that goes with the block; its errors end the command."""
    try:
        with tempfile.TemporaryDirectory() as kept:
            here = {"bucket": None, "queue_url": None, "mask_queue_url": None, "output_dir": Path(kept)}
            settings = Settings.from_env(os.environ).model_copy(update=here)
            configure_logging("WARNING")
            images = FilesAndUrls(https_fetcher(settings))
            app = build(settings, fetcher=images, progress=sys.stderr.isatty())
            try:
                yield app, images, Path(kept)
            finally:
                app.stop(STOP_LIMIT_S)
    except TryOnError as exc:
        code = EXIT_OF_CODE.get(exc.code, EXIT_RETRY)
        _end(code, f"{exc.code}: {exc.public}" + (f" ({exc.field})" if exc.field else ""))
    except OutputRefused as exc:
        _end(EXIT_OUTPUT, str(exc))
    except (SettingsError, weights.WeightsError) as exc:
        _end(EXIT_SETTINGS, str(exc))


def _run(app: App, work: Callable[[float, CallContext], _Result]) -> _Result:
    app.start()
    ends = time.monotonic() + LOAD_LIMIT_S
    while not app.worker.wait_until_loaded(POLL_S) and time.monotonic() < ends:
        pass
    if app.worker.failure is not None:
        raise SettingsError(str(app.worker.failure)) from app.worker.failure
    deadline = time.monotonic() + LOAD_LIMIT_S  # the one who waits here can stop by hand
    return work(deadline, CallContext(request_id="local"))


def _strip(app: App, images: FilesAndUrls, request: TryOnRequest, result: bytes) -> Image:
    photo, deadline = images.seen[request.person_image_url], time.monotonic() + LOAD_LIMIT_S
    person = app.decoder.decode(photo, deadline)
    garments = [app.decoder.decode(images.seen[url], deadline) for url in request.garment_urls()]
    if request.mask_image_url is not None:
        drawn = app.decoder.decode_mask(images.seen[request.mask_image_url], deadline)
    else:  # remembered
        drawn = app.masker.masks(photo, person, deadline, StageTimes()).masks[request.cloth_type]
    inputs = prepare(Pictures(person, garments, drawn), "clean", app.settings.width, app.settings.height)
    shown = [inputs.person, geometry.masked_person(inputs.person, inputs.mask), inputs.garment]
    return geometry.side_by_side([*shown, np.asarray(Pillow.open(io.BytesIO(result)).convert("RGB"))])


def _png(picture: Image) -> bytes:
    file = io.BytesIO()
    Pillow.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def _end(status: int, sentence: str) -> NoReturn:
    click.echo(sentence, err=True)
    sys.exit(status)
