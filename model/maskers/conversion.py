"""The masker's published pickles to safetensors, once, so that what serves reads no pickle.

A pickle names the functions that are called to build what it holds. Here none is called that is not listed, and of
NumPy none at all: what stands in for its arrays keeps the bytes, of which arrays are made when they have been checked.
"""

from __future__ import annotations

import hashlib
import math
import os
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.maskers.densepose import DensePose
from model.maskers.published import ATR, DENSEPOSE, LIP, PUBLISHED, exists, twin_of
from model.maskers.schp import SCHP
from model.weights import CHUNK_BYTES, WeightsError, load_checkpoint, unpickle

CLASSES = {LIP: 20, ATR: 18}
SOURCE = "source_sha256"  # in the metadata of a converted file
MAX_BYTES = 2 * 2**30  # of a published file and of its tensors; they have 0.26 GB
MAX_OPCODES = 50_000  # of a pickle; as many arrays take 13,000. To hash tuples 200,000 deep overflows the stack
FLOATS = tuple(order + kind for order in "<>" for kind in ("f2", "f4", "f8"))  # by NumPy's names

_IGNORED = re.compile(r"(^|\.)(pixel_mean|pixel_std|cell_anchors\.\d+|num_batches_tracked)$")
_REFUSED_BY_TORCH = re.compile(r"GLOBAL (\S+)")


def convert(weights_dir: Path) -> list[Path]:
    """Put a safetensors file beside each of the three published ones, unless it is there.

    Args:
        weights_dir: holds the published layout. A published file need not be there if the converted one is.
    Returns:
        The files that were written now. An error leaves those that were written before it, all of them whole.
    Raises:
        WeightsError: a file is missing, asks for code to be run, is damaged, does not fit its network or is another
            network's; or a file of the same name, made otherwise, is in the way; or it cannot be written.
    """
    for source in (weights_dir / name for name in PUBLISHED):
        if not exists(source) and not exists(twin_of(source)):
            raise WeightsError(f"{source} is missing; get it with `vton weights download`")
    return [twin_of(weights_dir / name) for name in PUBLISHED if _convert(weights_dir / name, name)]


def _convert(source: Path, name: str) -> bool:
    """Write the twin of a published file; False where it is there."""
    twin = twin_of(source)
    if not exists(source):
        return False
    try:
        digest = _sha256(source)
        if exists(twin) and _source_of(twin) == digest:
            return False
        tensors = _read(source)
        _check(name, tensors)
    except WeightsError as exc:
        raise WeightsError(f"{source} cannot be converted: {exc}") from exc
    _write(twin, tensors, digest)
    return True


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        if path.stat().st_size > MAX_BYTES:
            raise WeightsError(f"it has more than {MAX_BYTES} bytes")
        with path.open("rb") as stream:
            for chunk in iter(lambda: stream.read(CHUNK_BYTES), b""):
                digest.update(chunk)
    except OSError as exc:
        raise WeightsError(f"it cannot be read: {exc.strerror}") from exc
    return digest.hexdigest()


def _source_of(twin: Path) -> str | None:
    """The hash of the file that a twin was made of; None where the twin is damaged."""
    try:
        with safe_open(twin, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except (OSError, SafetensorError):
        return None
    if SOURCE not in metadata:
        raise WeightsError(f"{twin.name} is there and was not made of it; move that away")
    return str(metadata[SOURCE])


def _read(source: Path) -> dict[str, Tensor]:
    """Float32 copies of the tensors of a published file, checked for nothing but that they are some."""
    try:
        stored = _unpickled(source) if source.suffix == ".pkl" else _loaded(source)
        return _floats({key: value for key, value in stored.items() if not _IGNORED.search(key)})
    except WeightsError:
        raise
    except Exception as exc:  # whoever wrote the file chooses what its reading raises
        refused = _REFUSED_BY_TORCH.search(str(exc))
        reason = _refusal(refused[1]) if refused else "it is damaged, or no file of weights"
        raise WeightsError(reason) from exc


def _refusal(name: str) -> str:
    return f"it asks for {ascii(name[:80])[1:-1]}, which weights have no need of"


def _loaded(source: Path) -> Mapping[str, Any]:
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:  # whose members may be compressed
            _require_modest(sum(member.file_size for member in archive.infolist()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of old containers and protocols, which are of no concern to who converts
        checkpoint = load_checkpoint(source)
    state: Mapping[str, Any] = checkpoint["state_dict"]
    return state


def _unpickled(source: Path) -> Mapping[str, Any]:
    with source.open("rb") as stream:
        _survey(stream)
        stream.seek(0)
        content = unpickle(stream, _GLOBALS, lambda name: WeightsError(_refusal(name)))
    return {key: value.view(key) if isinstance(value, _Array) else value for key, value in content["model"].items()}


def _survey(stream: BinaryIO) -> None:
    """Refuse a pickle that announces more than it has, or builds what no weights need, before anything is built."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        largest = argument if opcode.name in ("PUT", "LONG_BINPUT") and argument is not None else number
        if largest > MAX_OPCODES:
            raise WeightsError("it is more intricate than weights are")


class _Dtype:
    """Stands in for numpy.dtype."""

    def __init__(self, kind: str, *_: object) -> None:
        self.kind = kind
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands in for an array: `content` is its bytes in the order "C" or "F"."""

    def __init__(self, content: object = None, dtype: object = None, shape: object = None, order: str = "C") -> None:
        self.content, self.dtype, self.shape, self.order = content, dtype, shape, order

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, self.shape, self.dtype, is_fortran, self.content = state
        self.order = "F" if is_fortran else "C"

    def view(self, key: str) -> NDArray[np.floating[Any]]:
        """The array of that key, of the same memory."""
        dtype: Any = self.dtype
        if dtype.order + dtype.kind not in FLOATS:
            raise WeightsError(f"{key!a} is an array of {dtype.kind!a}, not of floats")
        # Text is what the bytes of Python 2 are read as.
        content: Any = self.content.encode("latin-1") if isinstance(self.content, str) else self.content
        values: Any = np.frombuffer(content, dtype.order + dtype.kind)
        view: NDArray[np.floating[Any]] = values.reshape(self.shape, order=self.order)
        return view


def _reconstructed(*_: object) -> _Array:
    return _Array()  # its state follows


def _scalar(*_: object) -> None:
    """None, because no weight is a scalar."""


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise WeightsError(_refusal(f"the encoding {encoding}"))
    return text.encode("latin-1")


_GLOBALS: dict[tuple[str, str], Any] = {  # (module, name) -> what a pickle gets for it
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): None,  # only ever an argument
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encoded,  # of bytes in old protocols
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")  # before NumPy 2 and since
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstructed),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _Array),
        )
    },
}


def _floats(stored: Mapping[str, Any]) -> dict[str, Tensor]:
    for key, value in stored.items():
        if isinstance(value, Tensor):
            is_plain = value.layout == torch.strided and value.device.type == "cpu" and value.is_floating_point()
        else:
            is_plain = isinstance(value, np.ndarray)
        if not is_plain:
            raise WeightsError(f"{key!a} is no array of floats")
    _require_modest(sum(4 * math.prod(value.shape) for value in stored.values()))
    return {key: _float32(value) for key, value in stored.items()}


def _require_modest(size: int) -> None:
    if size > MAX_BYTES:
        raise WeightsError(f"its tensors are of more than {MAX_BYTES} bytes")


def _float32(value: Tensor | NDArray[np.floating[Any]]) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    with np.errstate(over="ignore"):  # the network's check refuses what is not finite
        return torch.from_numpy(np.array(value, np.float32, order="C"))


def _check(name: str, tensors: Mapping[str, Tensor]) -> None:
    if name == DENSEPOSE:
        DensePose.from_state_dict(tensors)
        return
    classes = SCHP.from_state_dict(tensors).classes
    if classes != CLASSES[name]:
        raise WeightsError(f"it has {classes} classes, not {CLASSES[name]}; the files of LIP and ATR may be swapped")


def _write(twin: Path, tensors: dict[str, Tensor], digest: str) -> None:
    temporary = twin.with_name(f"{twin.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, {SOURCE: digest})
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(twin)
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{twin} cannot be written: {getattr(exc, 'strerror', None) or exc}") from exc
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
