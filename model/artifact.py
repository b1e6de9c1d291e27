"""Weights as SageMaker gets them: the files that are read, their record, and nothing else; proved to load.

SageMaker fills /opt/ml/model from a prefix in S3, or unpacks a model.tar.gz there that may hold no links.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Callable, cast

from model import SCHP, load_engine, load_masker, weights
from model.interface import EngineOptions, MaskerOptions
from model.manifest import TENSORS, merged_name
from model.weights import CHUNK_BYTES, RECORD, Entry, WeightsError

ENGINE = "catvton"
MASKER_PART = ("masker", SCHP)
STORED = 0  # gzip's level: weights shrink by a few percent, and each start would pay for that
PERMISSIONS = 0o644
FOLDER_PERMISSIONS = 0o755

Progress = Callable[[int], object]


@dataclass(frozen=True)
class Artifact:
    """Weights in `directory` that loaded.

    `files` are by their path below the directory, in the order of their names. `parts` are the (engine, variant) that
    read them. `record` is the text of their record.
    """

    directory: Path
    parts: tuple[tuple[str, str], ...]
    files: dict[str, Entry]
    record: bytes

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(entry.bytes for entry in self.files.values())


def prove(weights_dir: Path, variant: str, *, masker: bool) -> Artifact:
    """The weights of a directory, loaded once as the service loads them, on the CPU.

    Args:
        weights_dir: in the published layout; files may be links.
        variant: of the engine.
        masker: with the networks of the masker.
    Raises:
        WeightsError: a file is missing, damaged, not the recorded one, or does not fit.
    """
    parts = ((ENGINE, variant), *((MASKER_PART,) if masker else ()))
    weights.files_for(*parts[0])  # names the variants that there are
    load_engine(ENGINE, EngineOptions(weights_dir, variant, "cpu", "float16"))
    if masker:
        load_masker(SCHP, MaskerOptions(weights_dir, "cpu"))
    record = weights.record_of(weights_dir, parts)
    return Artifact(weights_dir, parts, record.files, weights.text_of(record))


def merge(artifact: Artifact, folder: Path) -> Artifact:
    """The same weights with all tensors of the engine in one file, in float16, and without those that it replaces.

    Args:
        artifact: the weights.
        folder: is empty; gets the merged file, and links to the files beside it.
    Returns:
        The merged weights, loaded once as the service loads them.
    Raises:
        WeightsError: a file does not fit, or holds a number that float16 does not.
        OSError: the folder cannot be written.
    """
    from model.catvton.checkpoint import write_merged  # loads torch

    variant = artifact.parts[0][1]
    replaced = {name for name in weights.names_read(artifact.directory, ENGINE, variant) if name.endswith(TENSORS)}
    for name in artifact.files.keys() - replaced:
        link = folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to((artifact.directory / name).resolve())
    target = folder / str(merged_name(ENGINE, variant))
    target.parent.mkdir(parents=True, exist_ok=True)
    write_merged(artifact.directory, variant, target)
    (folder / RECORD).write_bytes(artifact.record)  # of the other files, and where they came from
    return prove(folder, variant, masker=MASKER_PART in artifact.parts)


def pack_folder(artifact: Artifact, output: Path, progress: Progress) -> None:
    """Copy the files and their record into a new folder; it is there when it is whole and was verified, or not at all.

    Args:
        artifact: the weights.
        output: does not exist.
        progress: is told the bytes of each step.
    Raises:
        WeightsError: a file changed, or cannot be read.
        OSError: the folder cannot be written.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        for name, entry in artifact.files.items():
            target = fresh / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with measured(artifact.directory / name, entry, progress, "packed") as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK_BYTES)
        (fresh / RECORD).write_bytes(artifact.record)
        for part in artifact.parts:
            weights.verify(fresh, *part)
        for path in (*fresh.rglob("*"), fresh):  # others read it, whatever the umask
            path.chmod(FOLDER_PERMISSIONS if path.is_dir() else PERMISSIONS)
        fresh.rename(output)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def pack_tar(artifact: Artifact, output: Path, progress: Progress) -> None:
    """As `pack_folder`, but as a model.tar.gz, whose bytes follow from those of the files alone."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix=f".{output.name}.", dir=output.parent, delete=False) as file:
        fresh = Path(file.name)
    try:
        with fresh.open("wb") as stream, _new_tar(stream) as tar:
            tar.addfile(_member(RECORD, len(artifact.record)), BytesIO(artifact.record))
            for name, entry in artifact.files.items():
                with measured(artifact.directory / name, entry, progress, "packed") as source:
                    tar.addfile(_member(name, entry.bytes), source)
        _compare_tar(fresh, artifact)
        fresh.chmod(PERMISSIONS)
        fresh.rename(output)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


@contextmanager
def _new_tar(stream: IO[bytes]) -> Iterator[tarfile.TarFile]:
    packed = gzip.GzipFile("", "wb", STORED, stream, mtime=0)
    with packed, tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
        yield tar


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, PERMISSIONS  # its times and owners are 0
    return member


def _compare_tar(path: Path, artifact: Artifact) -> None:
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            content = tar.extractfile(member)
            found[member.name] = _digest(content) if content else ""
    wanted = {name: entry.sha256 for name, entry in artifact.files.items()}
    if found != {RECORD: hashlib.sha256(artifact.record).hexdigest(), **wanted}:
        raise WeightsError(f"{path} does not hold what was packed; is the disk sound?")


def _digest(stream: IO[bytes]) -> str:
    digest = hashlib.sha256()
    for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""):
        digest.update(chunk)
    return digest.hexdigest()


class _Hashing:
    """A file that hashes what is read of it, and gives its last bytes as the expected one's or not at all."""

    def __init__(self, path: Path, stream: IO[bytes], expected: Entry, progress: Progress, step: str) -> None:
        self._path = path
        self._stream = stream
        self._expected = expected
        self._progress = progress
        self._step = step
        self._digest = hashlib.sha256()
        self._bytes = 0

    def read(self, size: int = -1) -> bytes:
        """As a file's.

        Raises:
            WeightsError: it cannot be read, or ended as another one.
        """
        try:
            chunk = self._stream.read(size)
        except OSError as exc:
            raise WeightsError(f"{self._path} cannot be read: {exc.strerror}") from exc
        self._digest.update(chunk)
        self._bytes += len(chunk)
        self._progress(len(chunk))
        if len(chunk) != size or self._bytes >= self._expected.bytes:
            self.close()
        return chunk

    def close(self) -> None:
        """Raises WeightsError if what was read is not the expected file."""
        if Entry(self._bytes, self._digest.hexdigest()) != self._expected:
            raise WeightsError(f"{self._path} changed while it was {self._step}")


@contextmanager
def measured(path: Path, expected: Entry, progress: Progress, step: str) -> Iterator[IO[bytes]]:
    """A file, which can be read but not sought in: once, from its beginning, and to its end only as the expected one.

    Args:
        path: the file.
        expected: what it was.
        progress: is told the bytes that were read.
        step: what it is read for, as a participle.
    Raises:
        WeightsError: it changed, or cannot be read; in the block with its last bytes, or at the block's end.
    """
    try:
        opened = path.open("rb")
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read: {exc.strerror}") from exc
    with opened as stream:
        hashing = _Hashing(path, stream, expected, progress, step)
        yield cast(IO[bytes], hashing)  # whoever takes a file only reads it
        hashing.close()
