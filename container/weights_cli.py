"""`vton weights`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import click
from tqdm import tqdm

from container.settings import SettingsError
from container.weights_push import CONNECTIONS, Destination, DestinationInvalid, PushFailed, PushRefused, push
from model import weights
from model.artifact import MASKER_PART, Artifact, Progress, merge, pack_folder, pack_tar, prove

EXIT_USAGE = 64  # sysexits: command line
EXIT_OUTPUT = 73  # sysexits: cannot create the output
EXIT_RETRY = 75  # sysexits: temporary failure
EXIT_SETTINGS = 78  # sysexits: configuration
TAR = ".tar.gz"
ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".zip", ".7z", ".gz", ".bz2", ".xz", ".zst")  # what SageMaker never takes


@click.group("weights")
def weights_group() -> None:
    """The published weights: list, download, convert, verify, pack, push."""


def _folder(_context: click.Context, _option: click.Parameter, directory: Path) -> Path:
    if directory.exists() and not directory.is_dir():
        _end(EXIT_SETTINGS, f"{directory} is no folder")
    return directory


_DIRECTORY = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path),
    default=Path("weights"),
    show_default=True,
    callback=_folder,
)
_VARIANT = click.option("--variant", default="mix", show_default=True, help="mix, vitonhd or dresscode.")
_WITHOUT_MASKER = click.option("--without-masker", is_flag=True, help="Leave out the masker's files.")


@weights_group.command("list")
@_DIRECTORY
def weights_list(directory: Path) -> None:
    """Every file that an engine or the masker needs, and what of it is here."""
    for line in weights.listing(directory):
        here = "here" if line.present else "-"
        size = "?" if line.bytes is None else f"{line.bytes:,}"
        click.echo(f"{here:5} {size:>15}  {line.file}  [{', '.join(line.parts)}]  {line.licence}")


@weights_group.command("download")
@_DIRECTORY
@_VARIANT
@_WITHOUT_MASKER
def weights_download(directory: Path, variant: str, without_masker: bool) -> None:
    """Fetch the published files, convert the masker's pickles, and record the hashes."""
    for repository in weights.manifest():
        click.echo(f"{repository.repo_id}: {repository.licence}. {repository.notice}", err=True)
    with _sentences():
        weights.download(directory, "catvton", variant)
        if not without_masker:
            weights.download(directory, *MASKER_PART)
            _convert(directory)


@weights_group.command("convert")
@_DIRECTORY
def weights_convert(directory: Path) -> None:
    """Make safetensors of the masker's published pickles, running no code of theirs."""
    with _sentences():
        _convert(directory)


@weights_group.command("verify")
@_DIRECTORY
@_VARIANT
def weights_verify(directory: Path, variant: str) -> None:
    """Compare the files with their recorded hashes."""
    with _sentences():
        click.echo(_found(weights.verify(directory, "catvton", variant)))
        found = _found(weights.verify(directory, *MASKER_PART)) if _has_masker(directory) else "not here"
        click.echo(f"masker: {found}")


@weights_group.command("pack")
@_DIRECTORY
@_VARIANT
@_WITHOUT_MASKER
@click.option(
    "--merged", is_flag=True, help="All tensors of the model in one file, in float16, and none that it skips."
)
@click.option("--output", "-o", type=click.Path(path_type=Path), required=True, help="Folder, or file model.tar.gz.")
def weights_pack(directory: Path, variant: str, without_masker: bool, merged: bool, output: Path) -> None:
    """Make what SageMaker puts into /opt/ml/model: a folder to push, or a model.tar.gz.

    Nothing but the files that are read, with their record. They are loaded first, as the service loads them.
    """
    if output.name.lower().endswith(ARCHIVES) and not output.name.endswith(TAR):
        _end(EXIT_USAGE, f"{output} is neither the name of a folder nor one that ends in {TAR}")
    if os.path.lexists(output):
        _end(EXIT_OUTPUT, f"{output} exists")
    pack = pack_tar if output.name.endswith(TAR) else pack_folder
    with _sentences(), ExitStack() as stack:
        artifact = prove(directory, variant, masker=not without_masker and _has_masker(directory))
        try:
            if merged:
                output.parent.mkdir(parents=True, exist_ok=True)
                folder = stack.enter_context(TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent))
                artifact = merge(artifact, Path(folder))
            with _bar(artifact) as progress:
                pack(artifact, output, progress)
        except OSError as exc:
            _end(EXIT_OUTPUT, f"{output} cannot be written: {exc.strerror}")
    click.echo(f"{output}: {len(artifact.files)} files, {artifact.bytes:,} bytes, and their record")


@weights_group.command("push")
@click.argument("uri", metavar="s3://BUCKET/PREFIX/")
@_DIRECTORY
@_VARIANT
@_WITHOUT_MASKER
def weights_push(uri: str, directory: Path, variant: str, without_masker: bool) -> None:
    """Upload weights, packed or not, as an uncompressed prefix for SageMaker's ModelDataSource.

    What is there already is not sent again, and the record goes last: a push that broke off is taken up by repeating
    it, and is not taken for whole before. Keys and region are boto3's.
    """
    from container.wiring import s3_client

    with _sentences():
        destination = Destination.parse(uri)
        artifact = prove(directory, variant, masker=not without_masker and _has_masker(directory))
        with _bar(artifact) as progress:
            pushed = push(s3_client(CONNECTIONS), artifact, destination, progress)
    click.echo(f"{uri}: {pushed.sent} files sent, {pushed.there} were there; ModelDataSource takes this URI")


def _convert(directory: Path) -> None:
    from model.maskers.conversion import convert  # loads torch
    from model.maskers.published import PUBLISHED, twin_of

    written = convert(directory)
    weights.record_made(directory, written)
    for twin in (twin_of(directory / name) for name in PUBLISHED):
        click.echo(f"{twin}: {'written' if twin in written else 'was there'}")


def _has_masker(directory: Path) -> bool:
    return any(line.present for line in weights.listing(directory) if "/".join(MASKER_PART) in line.parts)


def _found(verification: weights.Verification) -> str:
    how = (
        "match their record" if verification.verified else "are recorded now" if verification.recorded else "are there"
    )
    return f"{verification.files} files, {verification.bytes:,} bytes: all {how}"


@contextmanager
def _bar(artifact: Artifact) -> Iterator[Progress]:
    """A bar of bytes, where someone looks."""
    with tqdm(total=artifact.bytes, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


@contextmanager
def _sentences() -> Iterator[None]:
    """What goes wrong inside the block ends the command with one sentence."""
    try:
        yield
    except DestinationInvalid as exc:
        _end(EXIT_USAGE, str(exc))
    except PushFailed as exc:
        _end(EXIT_RETRY, str(exc))
    except (weights.WeightsError, ValueError, PushRefused, SettingsError) as exc:
        _end(EXIT_SETTINGS, str(exc))


def _end(status: int, sentence: str) -> NoReturn:
    click.echo(sentence, err=True)
    sys.exit(status)


if __name__ == "__main__":
    weights_group()
