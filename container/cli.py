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

from container.errors import ImageNotDecodable, ImageNotFound, ImageTooLarge, TryOnError
from container.fetch import MAX_BYTES, Fetcher
from container.get_vton import Pictures, prepare
from container.images import FILE_OF, decode_mask
from container.page_cli import serve_page
from container.request import (
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


class PathsAndUrls:
    """Images from paths, and from URLs as the service fetches them. Remembers what it read.

    Args:
        urls: fetches what looks like a URL.
    """

    def __init__(self, urls: Fetcher) -> None:
        self._urls = urls
        self.seen: dict[str, bytes] = {}

    def fetch(self, ref: str, *, user_id: str, deadline: float) -> bytes:
        """The bytes behind a path or URL.

        Raises:
            ImageNotFound, ImageNotDecodable, ImageTooLarge, and what the service's fetcher raises.
        """
        if "://" in ref:
            self.seen[ref] = self._urls.fetch(ref, user_id=user_id, deadline=deadline)
        else:
            self.seen[ref] = _read(Path(ref))
        return self.seen[ref]


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
@click.option("--user-id", default="local", show_default=True, help="userId of the request.")
@click.option("--timestamp", help="timestamp of the request; by default now.")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="File; by default one in ./vton_output.")
@click.option("--force", is_flag=True, help="Overwrite the output.")
@click.option("--side-by-side", is_flag=True, help="Also write the strip person | masked | garment | result.")
def run(output: Path | None, force: bool, side_by_side: bool, timestamp: str | None, **options: object) -> None:
    """Dress a person. Settings come from VTON_ variables, as for the endpoint."""
    timestamp = timestamp or datetime.now().astimezone().strftime("%y%m%d-%H%M%S")
    with _local_service() as (app, fetcher, kept):
        request = _request(timestamp, **options)
        suffix, _ = FILE_OF[request.output_format]
        output = output or OUTPUT_DIR / f"result-{timestamp}.{suffix}"
        _refuse_to_overwrite(output, force)
        result = _run(app, lambda deadline, context: app.service.run(request, deadline, context))
        _write(output, (kept / result.object_key).read_bytes())
        click.echo(json.dumps({**answer(result), "path": str(output)}, indent=2))
        if side_by_side:
            strip = output.with_name(f"{output.stem}-side-by-side.png")
            _write_strip(strip, app, fetcher, request, output)
            click.echo(f"side by side: {strip}", err=True)


@main.command()
@click.argument("photo")
@click.option("--output", "-o", type=click.Path(path_type=Path), help="Folder; by default one in ./vton_output.")
@click.option("--force", is_flag=True, help="Write into a folder that is there.")
def mask(photo: str, output: Path | None, force: bool) -> None:
    """Write the five masks of a PHOTO (a path or URL), and a sheet that shows them on it."""
    output = output or OUTPUT_DIR / f"masks-{Path(photo.partition('?')[0]).stem}"
    if output.exists() and not (force and output.is_dir()):
        _end(EXIT_OUTPUT, f"{output} exists; --force writes into a folder")
    with _local_service() as (app, fetcher, kept):
        request = parse_masks({"userId": "local", "timestamp": "masks", "person_image_url": photo})
        result = _run(app, lambda deadline, context: app.masks.run(request, deadline, context))
        masks = {name: (kept / key).read_bytes() for name, key in result.object_keys.items()}
        person = app.decoder.decode(fetcher.seen[photo], time.monotonic() + LOAD_LIMIT_S)
    for name, content in masks.items():
        _write(output / f"{name}.png", content)
    shown = [geometry.tinted(person, decode_mask(content)) for content in masks.values()]
    _save(output / "sheet.png", geometry.side_by_side([person, *shown]))
    told = {name: str(output / f"{name}.png") for name in masks}
    click.echo(
        json.dumps({"masks": told, "sheet": str(output / "sheet.png"), "timings_ms": result.timings_ms}, indent=2)
    )


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
    same_name = ("cloth_type", "seed", "composite", "output_size", "output_format", "quality")
    return parse_try_on({**fields, **{name: options[name] for name in same_name}})


@contextmanager
def _local_service() -> Iterator[tuple[App, PathsAndUrls, Path]]:
    """A service whose results lie in a folder that goes with the block; its errors end the command."""
    try:
        with tempfile.TemporaryDirectory() as kept:
            settings = Settings.from_env(os.environ).model_copy(update={"bucket": None, "output_dir": Path(kept)})
            configure_logging("WARNING")
            fetcher = PathsAndUrls(https_fetcher(settings))
            app = build(settings, fetcher=fetcher, progress=sys.stderr.isatty())
            try:
                yield app, fetcher, Path(kept)
            finally:
                app.stop(STOP_LIMIT_S)
    except TryOnError as exc:
        code = EXIT_OF_CODE.get(exc.code, EXIT_RETRY)
        _end(code, f"{exc.code}: {exc.public}" + (f" ({exc.field})" if exc.field else ""))
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


def _read(path: Path) -> bytes:
    try:
        if path.is_dir():
            raise ImageNotDecodable(f"{path} is a directory")
        if path.stat().st_size > MAX_BYTES:
            raise ImageTooLarge(str(path))
        return path.read_bytes()
    except OSError as exc:
        raise ImageNotFound(str(path)) from exc


def _refuse_to_overwrite(output: Path, force: bool) -> None:
    if output.is_dir() or (output.exists() and not force):
        _end(EXIT_OUTPUT, f"{output} exists; --force overwrites a file")


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as exc:
        _end(EXIT_OUTPUT, f"{path} cannot be written: {exc.strerror}")


def _write_strip(path: Path, app: App, fetcher: PathsAndUrls, request: TryOnRequest, result: Path) -> None:
    photo, deadline = fetcher.seen[request.person_image_url], time.monotonic() + LOAD_LIMIT_S
    person = app.decoder.decode(photo, deadline)
    garments = [app.decoder.decode(fetcher.seen[url], deadline) for url in request.garment_urls()]
    if request.mask_image_url is not None:
        drawn = app.decoder.decode_mask(fetcher.seen[request.mask_image_url], deadline)
    else:  # remembered
        drawn = app.masker.masks(photo, person, deadline, StageTimes()).masks[request.cloth_type]
    inputs = prepare(Pictures(person, garments, drawn), "clean", app.settings.width, app.settings.height)
    shown = [inputs.person, geometry.masked_person(inputs.person, inputs.mask), inputs.garment]
    _save(path, geometry.side_by_side([*shown, np.asarray(Pillow.open(result).convert("RGB"))]))


def _save(path: Path, picture: Image) -> None:
    file = io.BytesIO()
    Pillow.fromarray(picture).save(file, "PNG")
    _write(path, file.getvalue())


def _end(status: int, sentence: str) -> NoReturn:
    click.echo(sentence, err=True)
    sys.exit(status)
