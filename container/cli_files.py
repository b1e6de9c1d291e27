"""The files of the command line: pictures that are read within bounds, and outputs that are tried before the work."""

from __future__ import annotations

import os
import select
import stat
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from container.errors import ImageNotDecodable, ImageNotFound, ImageSourceTimeout, ImageTooLarge
from container.fetch import CHUNK_BYTES, MAX_BYTES, Fetcher
from container.request import TryOnRequest, upload_reference

PIPE_S = 30.0  # until a pipe has been written and closed; a form may take as long
PICTURES = sorted(name for name in TryOnRequest.model_fields if name.endswith("_url"))


class OutputRefused(Exception):
    """An output is there already, or cannot be written; the text is for the one who asked."""


class FilesAndUrls:
    """Images from files, which are read when the request is made, and from URLs as the service fetches them.

    Args:
        urls: fetches what looks like a URL.
    Attributes:
        seen: the bytes behind each reference and URL so far.
    """

    def __init__(self, urls: Fetcher) -> None:
        self._urls = urls
        self.seen: dict[str, bytes] = {}

    def reference(self, ref: str) -> str:
        """What stands in a request for a path or URL: a URL for itself, for a path the reference of its bytes.

        Raises:
            What `read_picture` raises.
        """
        if "://" in ref:
            return ref
        content = read_picture(Path(ref), time.monotonic() + PIPE_S)
        self.seen[upload_reference(content)] = content
        return upload_reference(content)

    def with_references(self, request: TryOnRequest) -> TryOnRequest:
        """The request with a reference in the place of each path that its cloth type uses; no other is read.

        Raises:
            What `read_picture` raises.
        """
        used = {request.person_image_url, request.mask_image_url, *request.garment_urls()} - {None}
        given = {name: getattr(request, name) for name in PICTURES}
        references = {ref: self.reference(ref) for ref in given.values() if ref in used}
        return request.model_copy(update={name: references[ref] for name, ref in given.items() if ref in references})

    def fetch(self, ref: str, *, user_id: str, deadline: float) -> bytes:
        """The bytes behind a reference or URL.

        Raises:
            What the service's fetcher raises.
        """
        if ref not in self.seen:
            self.seen[ref] = self._urls.fetch(ref, user_id=user_id, deadline=deadline)
        return self.seen[ref]


def read_picture(path: Path, deadline: float) -> bytes:
    """The bytes of a file, or of a pipe until its writer closes it.

    Args:
        path: of at most `MAX_BYTES`.
        deadline: time.monotonic() value; a pipe that is still open then is given up.
    Raises:
        ImageNotFound: it is not there, or may not be read.
        ImageNotDecodable: it is neither a file nor a pipe.
        ImageTooLarge, ImageSourceTimeout.
    """
    try:
        # A pipe without a writer would hold up the opening itself.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        try:
            kind = os.fstat(descriptor).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
                raise ImageNotDecodable(f"{path} is neither a file nor a pipe")
            return _read(descriptor, deadline)
        finally:
            os.close(descriptor)
    except OSError as exc:
        raise ImageNotFound(str(path)) from exc


def _read(descriptor: int, deadline: float) -> bytes:
    content = bytearray()
    while len(content) <= MAX_BYTES:
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise ImageSourceTimeout("the pipe was not closed in time")
        chunk = os.read(descriptor, min(CHUNK_BYTES, MAX_BYTES + 1 - len(content)))
        if not chunk:
            return bytes(content)
        content += chunk
    raise ImageTooLarge("counted")


def try_outputs(paths: Iterable[Path], *, force: bool) -> None:
    """Returns if these files could be written now; nothing is changed and nothing left behind.

    Args:
        paths: of files; folders that are missing above them will be made.
        force: files that are there may be overwritten.
    Raises:
        OutputRefused: for the first that is there, or could not be written.
    """
    for path in paths:
        try:
            if not _is_there(path):
                _try_to_make(path)
            elif not force:
                raise OutputRefused(f"{path} exists; --force overwrites a file")
            elif not path.is_fifo():  # whose reader would take the closing for its end
                path.open("ab").close()
        except OSError as exc:
            raise _cannot_be_written(path, exc) from exc


def try_folder(folder: Path, paths: Iterable[Path], *, force: bool) -> None:
    """As `try_outputs` for files in a folder, which is there only with `force`.

    Raises:
        OutputRefused: as `try_outputs`, and for a folder that is there.
    """
    try:
        if _is_there(folder) and not force:
            raise OutputRefused(f"{folder} exists; --force writes into a folder")
    except OSError as exc:
        raise _cannot_be_written(folder, exc) from exc
    try_outputs(paths, force=force)


def write_output(path: Path, content: bytes, *, force: bool) -> None:
    """Writes a file, in folders that are made where they are missing.

    Raises:
        OutputRefused: it cannot be written, or is there and `force` is not given.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb" if force else "xb") as file:
            file.write(content)
    except OSError as exc:
        raise _cannot_be_written(path, exc) from exc


def _is_there(path: Path) -> bool:
    """Whether the name is taken, be it by a link that leads nowhere; an OSError says that it cannot be told."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _try_to_make(path: Path) -> None:
    """Makes a file without a name in the nearest folder that is there, where each missing name would be possible."""
    folder = next(parent for parent in path.parents if _is_there(parent))
    with tempfile.TemporaryFile(dir=folder):
        for name in path.relative_to(folder).parts:
            _is_there(folder / name)  # not if the name is too long


def _cannot_be_written(path: Path, exc: OSError) -> OutputRefused:
    return OutputRefused(f"{path} cannot be written: {exc.strerror}")
