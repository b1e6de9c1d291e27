"""Published weights: how they are fetched, the proof that they are intact, and the only place that opens a pickle.

What serves reads JSON and safetensors alone: where a pickle is published, what counts is the safetensors that was made
of it. `vton-weights.json` in a directory of weights holds the hash of every file as it was fetched or first seen;
from then on that record is the authority, so that own weights are as good as published ones. The manifest decides only
what a download may bring.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Callable, Literal

from pydantic import TypeAdapter

from model.manifest import Commit, Inside, Repository, Sha256, Size, Strict, WeightFile
from model.manifest import WeightsError as WeightsError  # what this module raises, too
from model.manifest import files_for as files_for
from model.manifest import manifest as manifest

RECORD = "vton-weights.json"
TWINS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")  # either one will do
CHUNK_BYTES = 4 * 1024 * 1024
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
HASH_THREADS = 2  # hashlib releases the GIL; more would only fight over one disk
HUB_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Entry(Strict):
    """What the record says of a file."""

    bytes: Size
    sha256: Sha256


@dataclass(frozen=True)
class _Source(Strict):
    repo_id: str
    revision: Commit


@dataclass(frozen=True)
class Record(Strict):
    """What `vton-weights.json` holds: files by their path below the directory, and where their folders came from."""

    version: Literal[1]
    files: dict[Inside, Entry]
    repositories: dict[Inside, _Source]


@dataclass(frozen=True)
class Verification:
    """What `verify` found in `files` files of `bytes` in all.

    `recorded`: some were seen for the first time and are in the record now. `verified`: each was compared with a hash
    recorded earlier. Neither: the directory is read-only and has no record.
    """

    files: int
    bytes: int
    recorded: bool
    verified: bool


@dataclass(frozen=True)
class Listed:
    """A file of the manifest by its path below the directory of weights; `bytes` is None where no one knows yet.

    `known`: the manifest has its hash. `recorded`: the directory's record has. `present`: it is there, intact or not.
    """

    file: str
    parts: tuple[str, ...]
    bytes: int | None
    known: bool
    recorded: bool
    present: bool
    licence: str


def download(weights_dir: Path, engine: str, variant: str) -> None:
    """Fetch the files that are not there yet, compare them with the manifest and record them.

    A file that the record proves intact is not fetched again; a damaged or unrecorded one is replaced. Where what was
    made of a file is there, it stands for that file; it is deleted when that is fetched anew, for it must be made anew.

    Raises:
        WeightsError: the hub cannot be reached or refuses, it sent something else than the manifest names, or recorded
            weights of one's own are in the way.
    """
    needed = files_for(engine, variant)
    for repository in dict.fromkeys(repository for repository, _ in needed):
        record = _read_record(weights_dir)
        files = [file for owner, file in needed if owner == repository]
        stale = [file for file in files if not _is_intact(weights_dir, repository, file, record)]
        if not stale:
            continue
        commit = _fetch(weights_dir, repository, stale, record)
        entries = {f"{repository.folder}/{file.path}": _accept(weights_dir, repository, file) for file in stale}
        sources = {**record.repositories, repository.folder: _Source(repository.repo_id, commit)}
        try:
            _write_record(weights_dir, replace(record, files={**record.files, **entries}, repositories=sources))
        except OSError as exc:
            raise WeightsError(f"{weights_dir / RECORD} cannot be written: {exc.strerror}") from exc


def verify(weights_dir: Path, engine: str, variant: str) -> Verification:
    """Prove that an engine's files are the recorded ones, and record those that are seen for the first time.

    Raises:
        WeightsError: a file is missing, damaged or not the recorded one, or the record is unreadable.
    """
    record = _read_record(weights_dir)
    names = [name for repository, file in files_for(engine, variant) for name in _find(weights_dir, repository, file)]
    total = sum(_size(weights_dir / name) for name in names)
    for name, entry in _measure(weights_dir, [name for name in names if name in record.files]).items():
        _compare(weights_dir / name, record.files[name], entry, f"restore it, or delete {RECORD} if you changed it")
    fresh = [name for name in names if name not in record.files]
    for name in fresh:
        _check_structure(weights_dir / name)
    recorded = bool(fresh) and _remember(weights_dir, record, fresh)
    return Verification(len(names), total, recorded=recorded, verified=not fresh)


def record_made(weights_dir: Path, files: Sequence[Path]) -> None:
    """Put files below the directory into its record as they are, whatever it says of them so far.

    Raises:
        WeightsError: a file or the record is unreadable.
    """
    _remember(weights_dir, _read_record(weights_dir), [file.relative_to(weights_dir).as_posix() for file in files])


def record_of(weights_dir: Path, parts: Sequence[tuple[str, str]]) -> Record:
    """What the record says of the files that these parts read, or would say: what it does not know is measured.

    Args:
        weights_dir: the directory.
        parts: (engine, variant) of each.
    Raises:
        WeightsError: a file is missing, or the record is unreadable.
    """
    record = _read_record(weights_dir)
    needed = [(repository, file) for part in parts for repository, file in files_for(*part)]
    names = sorted({name for repository, file in needed for name in _find(weights_dir, repository, file)})
    known = {**record.files, **_measure(weights_dir, [name for name in names if name not in record.files])}
    folders = {repository.folder for repository, _ in needed}
    sources = {folder: source for folder, source in record.repositories.items() if folder in folders}
    return Record(1, {name: known[name] for name in names}, dict(sorted(sources.items())))


def text_of(record: Record) -> bytes:
    """The record as `vton-weights.json` has it."""
    return TypeAdapter(Record).dump_json(record, indent=2) + b"\n"


def listing(weights_dir: Path) -> list[Listed]:
    """Every file of the manifest and where it stands in a directory, which need not exist.

    Raises:
        WeightsError: the record is unreadable.
    """
    record = _read_record(weights_dir)
    lines = []
    for repository in manifest():
        for file in repository.files:
            published = f"{repository.folder}/{file.path}"
            names = [*_names(repository, file), published]
            present = [name for name in names if _exists(weights_dir / name)]
            name = present[0] if present else published
            entry = record.files.get(name)
            size, known = entry.bytes if entry else file.bytes, file.sha256 is not None
            lines.append(Listed(name, file.parts, size, known, entry is not None, bool(present), repository.licence))
    return lines


def unpickle(stream: BinaryIO, permitted: Mapping[tuple[str, str], Any], refusal: Callable[[str], Exception]) -> Any:  # noqa: ANN401 - of any type
    """What a pickle holds, where it asks for nothing but what is permitted; bytes of Python 2 are read as Latin-1.

    Args:
        stream: the pickle.
        permitted: (module, name) -> what it gets for that; nothing is imported.
        refusal: what is raised, of the name of anything else.
    """

    class Restricted(pickle.Unpickler):
        def find_class(self, module: str, name: str, /) -> Any:  # noqa: ANN401 - a class or a function
            if (module, name) not in permitted:
                raise refusal(f"{module}.{name}")
            return permitted[module, name]

    return Restricted(stream, encoding="latin1").load()


def load_checkpoint(path: Path) -> Any:  # noqa: ANN401 - of any type
    """What a torch checkpoint holds, on the CPU; torch refuses all but tensors and containers."""
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)


def _is_intact(weights_dir: Path, repository: Repository, file: WeightFile, record: Record) -> bool:
    published, made = f"{repository.folder}/{file.path}", _names(repository, file)[0]
    name = made if _exists(weights_dir / made) else published
    path, recorded = weights_dir / name, record.files.get(name)
    if recorded is None or not path.is_file() or path.stat().st_size != recorded.bytes or _entry(path) != recorded:
        return False
    if name == published:
        _compare(path, file, recorded, "move it away to have the published one")  # own weights are not overwritten
    return True


def _fetch(weights_dir: Path, repository: Repository, files: Sequence[WeightFile], record: Record) -> str:
    """Bring files from the hub into the repository's folder; returns the commit they came from."""
    import huggingface_hub
    from huggingface_hub import errors

    folder, earlier = weights_dir / repository.folder, record.repositories.get(repository.folder)
    revision = repository.revision or (earlier.revision if earlier else None)
    try:
        # Asked first because snapshot_download, when the hub is away, passes off what is there as the answer.
        commit = huggingface_hub.HfApi().model_info(repository.repo_id, revision=revision, timeout=HUB_TIMEOUT_S).sha
        for file in files:
            if file.sha256 is None:  # nothing would tell the old content from the new
                (folder / file.path).unlink(missing_ok=True)
        huggingface_hub.snapshot_download(
            repository.repo_id,
            revision=commit,
            allow_patterns=[file.path for file in files],
            local_dir=folder,
            cache_dir=folder / ".cache" / "hub",
        )
    except (OSError, ValueError, RuntimeError, errors.HTTPError, errors.XetDownloadError) as exc:
        reason = getattr(exc, "strerror", None) or type(exc).__name__
        raise WeightsError(f"{repository.repo_id} could not be downloaded: {reason}") from exc
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # kept after a failure: the next attempt may resume from it
    return str(commit)


def _accept(weights_dir: Path, repository: Repository, file: WeightFile) -> Entry:
    path = weights_dir / repository.folder / file.path
    if not _exists(path):
        raise WeightsError(f"{path} was not downloaded: {repository.repo_id} has no {file.path}")
    try:
        _check_structure(path)
        entry = _entry(path)
        _compare(path, file, entry, f"{repository.repo_id} sent something else and it was deleted")
    except WeightsError:
        path.unlink()  # or the next start would record it as own weights
        raise
    if file.converted:
        (weights_dir / _names(repository, file)[0]).unlink(missing_ok=True)
    return entry


def _remember(weights_dir: Path, record: Record, names: Sequence[str]) -> bool:
    if not os.access(weights_dir, os.W_OK):  # before the hashing, which takes seconds
        return False
    files = {**record.files, **_measure(weights_dir, names)}
    try:
        _write_record(weights_dir, replace(record, files=files))
    except OSError:  # a full or read-only volume is no reason not to serve
        return False
    return True


def _names(repository: Repository, file: WeightFile) -> list[str]:
    """Where a file that is read may lie; the first is its own place."""
    name = f"{repository.folder}/{file.path}"
    if file.converted:
        return [PurePosixPath(name).with_suffix(".safetensors").as_posix()]
    head, _, tail = name.rpartition("/")
    return [name, *(f"{head}/{twin}" for twin in TWINS if tail in TWINS and twin != tail)]


def _find(weights_dir: Path, repository: Repository, file: WeightFile) -> list[str]:
    names = _names(repository, file)
    found = [name for name in names if _exists(weights_dir / name)]
    if not found:
        verb = "convert" if _exists(weights_dir / repository.folder / file.path) else "download"
        raise WeightsError(f"{weights_dir / names[0]} is missing; get it with `vton weights {verb}`")
    return found  # both twins where both are there: the engine may read either


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read: {exc.strerror}") from exc


def _size(path: Path) -> int:
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path} is empty; delete it and run `vton weights download`")
    return size


def _entry(path: Path) -> Entry:
    size, digest = _size(path), hashlib.sha256()
    try:
        with path.open("rb") as stream:
            for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""):
                digest.update(chunk)
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read: {exc.strerror}") from exc
    return Entry(size, digest.hexdigest())


def _measure(weights_dir: Path, names: Sequence[str]) -> dict[str, Entry]:
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: _entry(weights_dir / name), names)))


def _compare(path: Path, expected: WeightFile | Entry, actual: Entry, remedy: str) -> None:
    if expected.sha256 not in (None, actual.sha256) or expected.bytes not in (None, actual.bytes):
        wanted = f"{(expected.sha256 or 'unknown')[:12]} ({expected.bytes} bytes)"
        found = f"{actual.sha256[:12]} ({actual.bytes} bytes)"
        raise WeightsError(f"{path} has changed or is damaged: sha256 {found} instead of {wanted}; {remedy}")


def _check_structure(path: Path) -> None:
    """A truncated safetensors is found without a hash: its header says where the last tensor ends."""
    if path.suffix != ".safetensors":
        return
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, MAX_HEADER_BYTES)))
        ends = [int(tensor["data_offsets"][1]) for name, tensor in header.items() if name != "__metadata__"]
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as exc:
        raise WeightsError(f"{path} is not a safetensors file; it may be truncated") from exc
    expected = 8 + length + max(ends, default=0)
    if path.stat().st_size != expected:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes where its header announces {expected}")


def _read_record(weights_dir: Path) -> Record:
    try:
        return TypeAdapter(Record).validate_json((weights_dir / RECORD).read_bytes())
    except FileNotFoundError:
        return Record(1, {}, {})
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{weights_dir / RECORD} is unreadable; restore it, or delete it to record anew") from exc


def _write_record(weights_dir: Path, record: Record) -> None:
    temporary = weights_dir / f"{RECORD}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as stream:
            stream.write(text_of(record))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(weights_dir / RECORD)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
