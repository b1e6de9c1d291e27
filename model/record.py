"""`vton-weights.json`: size and hash of every file in a directory of weights, and how a file is compared with them."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Literal

from pydantic import TypeAdapter

from model.manifest import Commit, Inside, Sha256, Size, Strict, WeightFile, WeightsError

RECORD = "vton-weights.json"
MAX_HEADER_BYTES = 100_000_000  # the safetensors format's own limit
HASH_THREADS = 2  # hashlib releases the GIL; more would only fight over one disk
HASH_BUFFER_BYTES = 16 * 1024 * 1024  # each takes the GIL twice, which can cost 5 ms where modules are being imported


@dataclass(frozen=True)
class Entry(Strict):
    """What the record says of a file."""

    bytes: Size
    sha256: Sha256


@dataclass(frozen=True)
class Source(Strict):
    """Where a folder came from."""

    repo_id: str
    revision: Commit


@dataclass(frozen=True)
class Record(Strict):
    """What `vton-weights.json` holds: files by their path below the directory, and where their folders came from."""

    version: Literal[1]
    files: dict[Inside, Entry]
    repositories: dict[Inside, Source]


def read_record(weights_dir: Path) -> Record:
    """The directory's record, an empty one where it has none; WeightsError if it is unreadable."""
    try:
        return TypeAdapter(Record).validate_json((weights_dir / RECORD).read_bytes())
    except FileNotFoundError:
        return Record(1, {}, {})
    except (OSError, ValueError) as exc:
        raise WeightsError(f"{weights_dir / RECORD} is unreadable; restore it, or delete it to record anew") from exc


def write_record(weights_dir: Path, record: Record) -> None:
    """Replace the directory's record at once; OSError if it cannot be written, and then it is as it was."""
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


def text_of(record: Record) -> bytes:
    """The record as `vton-weights.json` has it."""
    return TypeAdapter(Record).dump_json(record, indent=2) + b"\n"


class Measuring:
    """Files that are being hashed, beside whatever else goes on, from the construction on.

    Args:
        weights_dir: the directory.
        names: of files, by their path below it.
    """

    def __init__(self, weights_dir: Path, names: Sequence[str]) -> None:
        self._wanted = True
        self._began = self._ended = time.monotonic()
        pool = ThreadPoolExecutor(HASH_THREADS, "hash")
        self._entries = {name: pool.submit(entry_of, weights_dir / name, lambda: self._wanted) for name in names}
        for entry in self._entries.values():
            entry.add_done_callback(self._note_the_time)
        pool.shutdown(wait=False)  # its threads end with the last file

    @property
    def elapsed_s(self) -> float:
        """From the construction to the end of the last file that has ended."""
        return self._ended - self._began

    def entries(self) -> dict[str, Entry]:
        """What the files are, when all have been read; WeightsError if one cannot be."""
        return {name: entry.result() for name, entry in self._entries.items()}

    def give_up(self) -> None:
        """Ends it within moments; nobody asks for `entries` any more."""
        self._wanted = False

    def _note_the_time(self, _ended: Future[Entry]) -> None:
        self._ended = time.monotonic()


def size_of(path: Path) -> int:
    """Bytes of a file; WeightsError if it is empty or no regular file."""
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file")
    size = path.stat().st_size
    if size == 0:
        raise WeightsError(f"{path} is empty; delete it and run `vton weights download`")
    return size


def entry_of(path: Path, is_wanted: Callable[[], bool] = lambda: True) -> Entry:
    """What a file is.

    Args:
        path: the file.
        is_wanted: asked from time to time; False ends it.
    Raises:
        WeightsError: it cannot be read, is empty, or is not wanted any more.
    """
    size, digest = size_of(path), hashlib.sha256()
    buffer = memoryview(bytearray(min(size, HASH_BUFFER_BYTES)))
    try:
        with path.open("rb", buffering=0) as stream:
            for count in iter(lambda: stream.readinto(buffer), 0):
                if not is_wanted():
                    raise WeightsError(f"{path} was not read to its end")
                digest.update(buffer[:count])
    except OSError as exc:
        raise WeightsError(f"{path} cannot be read: {exc.strerror}") from exc
    return Entry(size, digest.hexdigest())


def compare(path: Path, expected: WeightFile | Entry, actual: Entry, remedy: str) -> None:
    """WeightsError, which ends in the remedy, unless the file is the expected one as far as that is known."""
    if expected.sha256 not in (None, actual.sha256) or expected.bytes not in (None, actual.bytes):
        wanted = f"{(expected.sha256 or 'unknown')[:12]} ({expected.bytes} bytes)"
        found = f"{actual.sha256[:12]} ({actual.bytes} bytes)"
        raise WeightsError(f"{path} has changed or is damaged: sha256 {found} instead of {wanted}; {remedy}")


def check_structure(path: Path) -> None:
    """A truncated safetensors is found without a hash: its header says where the last tensor ends.

    Raises:
        WeightsError: it ends elsewhere.
    """
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
