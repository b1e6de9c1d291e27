"""What runs in a decoder's process: it gives away all it can before the first byte of a stranger's file arrives.

The process that starts here never reads a file. For each one it forks, waits for the fork's end, and says READY: so no
file meets what another one left behind, and the limits are those of one file. It can open and connect to nothing, for
it may have no descriptors but those it has; what it could do to other processes of its user, Landlock forbids where
the kernel has it. A message is a header and as many bytes as the header says:

    kind, length | file   ->   PICTURE, height, width | rows of pixels
                               REFUSED, place in REFUSALS, length | reason

Nothing is ever unpickled, and the other side believes no number that it has not checked.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Callable, NoReturn, Union

import numpy as np
from PIL import Image, JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

from container.errors import ImageFormatNotPermitted, ImageNotDecodable, ImageTooManyPixels, ImageTooSmall
from container.images import decode, decode_mask

FILES, STATE = 0, 2  # descriptors: files come in and answers go out; the process speaks of itself
READY, READY_AS_ROOT = b"\x06", b"\x07"
REQUEST = struct.Struct("!BI")
ANSWER = struct.Struct("!BII")
PHOTO, MASK = 0, 1
PICTURE, REFUSED = 0, 1
REFUSALS = (ImageNotDecodable, ImageFormatNotPermitted, ImageTooSmall, ImageTooManyPixels)
MAX_REASON = 200  # characters

MEMORY_BYTES = 1280 * 2**20  # of addresses; the largest picture, a WebP of 50 MP, needs 1,040 MiB (measured)
CPU_S = 10  # the largest picture needs 2.5
NOBODY = 65534
NO_MORE_FILES = 3  # exit status of a fork
# Imported here because later no file can be opened, and Pillow imports a parser when it meets its format.
PARSERS = (JpegImagePlugin, MpoImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38  # linux/prctl.h
LANDLOCK_CREATE_RULESET, LANDLOCK_RESTRICT_SELF = 444, 446  # the same on every processor
LANDLOCK_VERSION = 1  # flag: tell the version
LANDLOCK_FILES = 2**13 - 1  # everything that version 1 knows to be done with files
LANDLOCK_SCOPES = 3  # from version 6: abstract sockets and signals end at the sandbox
CAPABILITY_VERSION = 0x20080522  # linux/capability.h

Bytes = Union[bytes, memoryview]
Answer = Callable[[int, bytes], tuple[bytes, Bytes]]


def main() -> None:
    """Decodes files, one fork for each, until there are no more."""
    run(decoded)


def run(answer: Answer) -> None:
    """Confines this process and lets forks of it answer files, until there are no more or one of them fails.

    Args:
        answer: takes a kind and a file, and returns a header and what follows it.
    """
    Image.preinit()
    _confine()
    state = READY_AS_ROOT if os.geteuid() == 0 else READY
    parent = os.getpid()
    files = socket.socket(fileno=FILES)
    while not _is_left_over(files):
        fork = os.fork()
        if fork == 0:
            _answer_one(answer, files, parent)
        os.write(STATE, state)
        status = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        if status != 0:
            if status != NO_MORE_FILES:
                os.write(STATE, b"a fork ended with %d" % status)
            return


def decoded(kind: int, content: bytes) -> tuple[bytes, Bytes]:
    """The header and the pixels of a file, or why it has none."""
    try:
        pixels = decode_mask(content) if kind == MASK else decode(content)
    except REFUSALS as refusal:
        reason = str(refusal).encode("ascii", "replace")[:MAX_REASON]
        return ANSWER.pack(REFUSED, REFUSALS.index(type(refusal)), len(reason)), reason
    except MemoryError:
        reason = b"more memory than a picture may take"
        return ANSWER.pack(REFUSED, REFUSALS.index(ImageNotDecodable), len(reason)), reason
    height, width = pixels.shape[:2]
    return ANSWER.pack(PICTURE, height, width), np.ascontiguousarray(pixels).data.cast("B")


def _is_left_over(files: socket.socket) -> bool:
    """Whether a fork left bytes unread, which the next one would take for the next file."""
    try:
        return len(files.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)) > 0
    except BlockingIOError:
        return False


def _answer_one(answer: Answer, files: socket.socket, parent: int) -> NoReturn:
    try:
        os.close(STATE)  # whatever a file does here, it cannot say READY
        _end_with_parent()
        if os.getppid() != parent:
            os._exit(NO_MORE_FILES)
        _limit(resource.RLIMIT_CPU, CPU_S)
        _limit(resource.RLIMIT_NPROC, 0)
        received = files.makefile("rb")
        request = received.read(REQUEST.size)
        if len(request) < REQUEST.size:
            os._exit(NO_MORE_FILES)
        kind, length = REQUEST.unpack(request)
        for part in answer(kind, received.read(length)):
            files.sendall(part)
        os._exit(0)
    finally:
        os._exit(1)


def _confine() -> None:
    """Gives away, for good: root, every other file, the network, new programs, and more memory than a picture takes."""
    with suppress(OSError):  # where memory runs out, this process goes and not the service
        Path("/proc/self/oom_score_adj").write_text("1000")
    if os.geteuid() == 0:
        with suppress(OSError):  # a root without the right to become somebody else; READY_AS_ROOT tells
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
    if sys.platform == "linux":
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _drop_capabilities()
        _enter_landlock()
        _prctl(PR_SET_DUMPABLE, 0)  # no other process of this user reads or writes its memory
    _end_with_parent()
    _limit(resource.RLIMIT_AS, MEMORY_BYTES)
    _limit(resource.RLIMIT_FSIZE, 0)
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, 0)


def _end_with_parent() -> None:
    """The end of the thread that started this process is its own; elsewhere than on Linux it ends with its input."""
    if sys.platform == "linux":
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(kind: int, value: int) -> None:
    """Lowers a limit for good; one that is lower already stays."""
    _, hard = resource.getrlimit(kind)
    lowered = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (lowered, lowered))
    except (ValueError, OSError):
        if sys.platform == "linux":  # macOS has no limit of addresses
            raise


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, *(ctypes.c_ulong(argument) for argument in (value, 0, 0, 0)))


def _drop_capabilities() -> None:
    header, none = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    ctypes.CDLL(None).capset(header, none)


def _enter_landlock() -> None:
    """Forbids all files, and to trace, or where the kernel can, signal, a process outside."""
    system = ctypes.CDLL(None).syscall
    version = system(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    if version < 1:
        return
    rules = (ctypes.c_uint64 * 3)(LANDLOCK_FILES, 0, LANDLOCK_SCOPES)  # files, network, scopes
    size = ctypes.sizeof(rules) if version >= 6 else ctypes.sizeof(ctypes.c_uint64)
    ruleset = system(LANDLOCK_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    if ruleset >= 0:
        system(LANDLOCK_RESTRICT_SELF, ruleset, 0)
        os.close(ruleset)
