"""Published weights: how they are fetched, the proof that they are intact, and the only place that opens a pickle.

What serves reads JSON and safetensors alone: where a pickle is published, what counts is the safetensors that was made
of it. `vton-weights.json` in a directory of weights holds the hash of every file as it was fetched or first seen;
from then on that record is the authority, so that own weights are as good as published ones. The manifest decides only
what a download may bring.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Callable

from model.manifest import Repository, WeightFile, merged_name
from model.manifest import WeightsError as WeightsError  # what this module raises, too
from model.manifest import files_for as files_for
from model.manifest import manifest as manifest
from model.record import RECORD as RECORD
from model.record import Entry as Entry
from model.record import Measuring, Source, check_structure, compare, entry_of, read_record, size_of, write_record
from model.record import Record as Record
from model.record import text_of as text_of

TWINS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")  # either one will do
CHUNK_BYTES = 4 * 1024 * 1024
HUB_TIMEOUT_S = 30.0


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
    So it is with the merged file, which stands for all tensors of its variant.

    Raises:
        WeightsError: the hub cannot be reached or refuses, it sent something else than the manifest names, or recorded
            weights of one's own are in the way.
    """
    needed, merged = files_for(engine, variant), merged_name(engine, variant)
    if merged is not None and _is_recorded(weights_dir, merged, read_record(weights_dir)):
        needed = [(repository, file) for repository, file in needed if not file.is_merged]
    for repository in dict.fromkeys(repository for repository, _ in needed):
        record = read_record(weights_dir)
        files = [file for owner, file in needed if owner == repository]
        stale = [file for file in files if not _is_intact(weights_dir, repository, file, record)]
        if not stale:
            continue
        commit = _fetch(weights_dir, repository, stale, record)
        entries = {f"{repository.folder}/{file.path}": _accept(weights_dir, repository, file) for file in stale}
        if merged is not None and any(file.is_merged for file in stale):
            (weights_dir / merged).unlink(missing_ok=True)
        sources = {**record.repositories, repository.folder: Source(repository.repo_id, commit)}
        try:
            write_record(weights_dir, replace(record, files={**record.files, **entries}, repositories=sources))
        except OSError as exc:
            raise WeightsError(f"{weights_dir / RECORD} cannot be written: {exc.strerror}") from exc


def verify(weights_dir: Path, engine: str, variant: str) -> Verification:
    """Prove that an engine's files are the recorded ones, and record those that are seen for the first time.

    Raises:
        WeightsError: a file is missing, damaged or not the recorded one, or the record is unreadable.
    """
    return _Proof(weights_dir, engine, variant).verification()


@contextmanager
def verified(weights_dir: Path, engine: str, variant: str) -> Iterator[None]:
    """Proves as `verify` does, on threads, while the block reads the same files; the block's end waits for the proof.

    What the block made of the files is to be used after the block only: then it came of the recorded ones. Where files
    are damaged, that is what is raised, and not what the block made of the damage.

    Raises:
        WeightsError: as `verify`.
    """
    proof = _Proof(weights_dir, engine, variant)
    try:
        try:
            yield
        except WeightsError:
            proof.compare()
            raise
        verification = proof.verification()
    finally:
        proof.give_up()
    _log(verification, proof.elapsed_s)


class _Proof:
    """An engine's files, being hashed from the construction on."""

    def __init__(self, weights_dir: Path, engine: str, variant: str) -> None:
        self._dir = weights_dir
        self._record = read_record(weights_dir)
        self._names = names_read(weights_dir, engine, variant)
        self._bytes = sum(size_of(weights_dir / name) for name in self._names)
        self._fresh = [name for name in self._names if name not in self._record.files]
        for name in self._fresh:
            check_structure(weights_dir / name)
        known = [name for name in self._names if name in self._record.files]
        self._measuring = Measuring(weights_dir, self._names if os.access(weights_dir, os.W_OK) else known)

    @property
    def elapsed_s(self) -> float:
        """What the hashing took."""
        return self._measuring.elapsed_s

    def compare(self) -> dict[str, Entry]:
        """The files that were measured; WeightsError if a recorded one has changed."""
        entries = self._measuring.entries()
        for name, entry in entries.items():
            if name in self._record.files:
                remedy = f"restore it, or delete {RECORD} if you changed it"
                compare(self._dir / name, self._record.files[name], entry, remedy)
        return entries

    def verification(self) -> Verification:
        """What was found, with the new files in the record; WeightsError as of `verify`."""
        entries = self.compare()
        fresh = {name: entries[name] for name in self._fresh if name in entries}
        recorded = bool(fresh) and _put(self._dir, self._record, fresh)
        return Verification(len(self._names), self._bytes, recorded=recorded, verified=not self._fresh)

    def give_up(self) -> None:
        """Ends the hashing if it still goes on."""
        self._measuring.give_up()


def _log(verification: Verification, elapsed_s: float) -> None:
    log = logging.getLogger("vton.weights")
    elapsed_ms = round(1000 * elapsed_s, 1)
    found = {"files": verification.files, "bytes": verification.bytes, "elapsed_ms": elapsed_ms}
    if verification.verified:
        log.info("weights_verified", extra=found)
    elif verification.recorded:
        log.warning("weights_recorded", extra=found)  # first sight: nothing to compare with
    else:
        log.warning("weights_unverified", extra=found)  # no record, and none can be written


def record_made(weights_dir: Path, files: Sequence[Path]) -> None:
    """Put files below the directory into its record as they are, whatever it says of them so far.

    Raises:
        WeightsError: a file or the record is unreadable.
    """
    names = [file.relative_to(weights_dir).as_posix() for file in files]
    record = read_record(weights_dir)
    if os.access(weights_dir, os.W_OK):  # before the hashing, which takes seconds
        _put(weights_dir, record, Measuring(weights_dir, names).entries())


def record_of(weights_dir: Path, parts: Sequence[tuple[str, str]]) -> Record:
    """What the record says of the files that these parts read, or would say: what it does not know is measured.

    Args:
        weights_dir: the directory.
        parts: (engine, variant) of each.
    Raises:
        WeightsError: a file is missing, or the record is unreadable.
    """
    record = read_record(weights_dir)
    names = sorted({name for part in parts for name in names_read(weights_dir, *part)})
    fresh = Measuring(weights_dir, [name for name in names if name not in record.files])
    known = {**record.files, **fresh.entries()}
    folders = {repository.folder for part in parts for repository, _ in files_for(*part)}
    sources = {folder: source for folder, source in record.repositories.items() if folder in folders}
    return Record(1, {name: known[name] for name in names}, dict(sorted(sources.items())))


def names_read(weights_dir: Path, engine: str, variant: str) -> list[str]:
    """The files that a part reads, by their path below the directory: the merged one, where it is there, for many.

    Raises:
        WeightsError: a file is missing, or nothing is published under that name.
    """
    needed, merged = files_for(engine, variant), merged_name(engine, variant)
    if merged is None or not _exists(weights_dir / merged):
        return [name for repository, file in needed for name in _find(weights_dir, repository, file)]
    kept = [(repository, file) for repository, file in needed if not file.is_merged]
    return [*(name for repository, file in kept for name in _find(weights_dir, repository, file)), merged]


def listing(weights_dir: Path) -> list[Listed]:
    """Every file of the manifest and where it stands in a directory, which need not exist.

    Raises:
        WeightsError: the record is unreadable.
    """
    record = read_record(weights_dir)
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
    return [*lines, *_listed_merged(weights_dir, record)]


def _listed_merged(weights_dir: Path, record: Record) -> Iterator[Listed]:
    """The merged files that are there; they hold tensors of several repositories, so that all their licences apply."""
    for part in sorted({part for repository in manifest() for file in repository.files for part in file.parts}):
        engine, variant = part.split("/")
        name = merged_name(engine, variant)
        if name is not None and _exists(weights_dir / name):
            entry = record.files.get(name)
            licences = " and ".join(dict.fromkeys(owner.licence for owner, _ in files_for(engine, variant)))
            size = entry.bytes if entry else size_of(weights_dir / name)
            yield Listed(name, (part,), size, known=False, recorded=entry is not None, present=True, licence=licences)


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
    if not _is_recorded(weights_dir, name, record):
        return False
    if name == published:  # own weights are not overwritten
        compare(weights_dir / name, file, record.files[name], "move it away to have the published one")
    return True


def _is_recorded(weights_dir: Path, name: str, record: Record) -> bool:
    path, recorded = weights_dir / name, record.files.get(name)
    if recorded is None or not path.is_file() or path.stat().st_size != recorded.bytes:
        return False
    return entry_of(path) == recorded


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
        check_structure(path)
        entry = entry_of(path)
        compare(path, file, entry, f"{repository.repo_id} sent something else and it was deleted")
    except WeightsError:
        path.unlink()  # or the next start would record it as own weights
        raise
    if file.converted:
        (weights_dir / _names(repository, file)[0]).unlink(missing_ok=True)
    return entry


def _put(weights_dir: Path, record: Record, entries: Mapping[str, Entry]) -> bool:
    """Whether the entries are in the directory's record now."""
    try:
        write_record(weights_dir, replace(record, files={**record.files, **entries}))
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
