from __future__ import annotations

import builtins
import io
import json
import marshal
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from masking_recipe import densepose_state_dict, schp_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from container.cli import EXIT_SETTINGS, main
from model import weights
from model.maskers import conversion, densepose, schp
from model.maskers.conversion import convert
from model.maskers.densepose_backbone import Convolution
from model.maskers.published import ATR, DENSEPOSE, LIP, PUBLISHED, load_state, twin_of
from model.weights import RECORD, WeightsError

ROOT = Path(__file__).parents[1]
Write = Callable[..., None]
CONSTANTS = {
    "pixel_mean": np.zeros((3, 1, 1), np.float32),
    "pixel_std": np.ones((3, 1, 1), np.float32),
    "proposal_generator.anchor_generator.cell_anchors.0": np.zeros((3, 4), np.float32),
    "conv.norm.num_batches_tracked": np.int64(7),
}


class TinyParser(nn.Module):
    """As many classes as the real network, in two convolutions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 1)
        self.fushion = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Identity(), nn.Conv2d(4, classes, 1))


class TinyPose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Convolution(3, 4, 1, normed=True)
        self.head = nn.Linear(4, 2)

    def fold_norms(self) -> None:
        self.conv.fold_norm()


def parser_state(classes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(classes)
    shapes = schp.published_shapes(classes)
    state = {f"module.{name}": torch.rand(shape) for name, shape in shapes.items()}
    return {**state, "module.edge.conv5.bias": torch.rand(2)}


def pose_state() -> dict[str, np.ndarray]:
    torch.manual_seed(0)
    state = densepose.DensePoseNetwork().state_dict()
    return {name: torch.rand_like(tensor).numpy() for name, tensor in state.items()}


def write_checkpoint(path: Path, state: Any, *, zipped: bool = True, **others: Any) -> None:
    content = {"epoch": 149, "state_dict": state, **others}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)


def write_pickle(path: Path, state: Any, *, protocol: int = 4, **others: Any) -> None:
    with path.open("wb") as stream:
        pickle.dump({"model": state, "__author__": "Detectron2 Model Zoo", **others}, stream, protocol)


class OldSpelling(pickle._Pickler):
    """Names NumPy's modules as before NumPy 2."""

    def save_global(self, obj: Any, name: object = None) -> None:
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, FunctionType: save_global}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny networks in the place of the real ones."""
    monkeypatch.setattr(schp, "SchpNetwork", TinyParser)
    monkeypatch.setattr(densepose, "DensePoseNetwork", TinyPose)


@pytest.fixture
def folder(tmp_path: Path, tiny: None) -> Path:
    """A directory with the three published files of the tiny networks."""
    for name in PUBLISHED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(tmp_path / LIP, parser_state(20))
    write_checkpoint(tmp_path / ATR, parser_state(18))
    write_pickle(tmp_path / DENSEPOSE, pose_state())
    return tmp_path


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def refusal(folder: Path, name: str) -> str:
    """The sentence with which a file is refused; nothing is left of the attempt."""
    before = files_in(folder)
    with pytest.raises(WeightsError) as caught:
        convert(folder)
    sentence = str(caught.value)
    assert str(folder / name) in sentence
    assert "\n" not in sentence
    made = {str(twin_of(Path(other))) for other in PUBLISHED[: PUBLISHED.index(name)]}
    assert set(files_in(folder)) - set(before) <= made
    return sentence


def assert_same(path: Path, state: dict[str, Any]) -> None:
    stored = load_file(path)
    assert stored.keys() == state.keys()
    for key, tensor in stored.items():
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), np.asarray(state[key], np.float32)), key


def source_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as stored:
        return stored.metadata()


# What is converted


@pytest.fixture(scope="module")
def full_size() -> Iterator[Path]:
    """A directory with files of the published size, where pytest does not keep them for three runs."""
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        for name in PUBLISHED:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(folder / LIP, schp_state_dict("lip"))
        save_file({}, twin_of(folder / ATR))  # it would only take time: of LIP's, four tensors have another shape
        write_pickle(folder / DENSEPOSE, {**densepose_state_dict(), "pixel_mean": CONSTANTS["pixel_mean"]})
        yield folder


def test_files_of_the_published_size_are_converted_without_a_change_of_any_value(full_size: Path) -> None:
    assert convert(full_size) == [twin_of(full_size / name) for name in (LIP, DENSEPOSE)]
    parser = load_state(twin_of(full_size / LIP))
    assert (len(parser), sum(tensor.numel() for tensor in parser.values())) == (603, 66_838_456)
    published = torch.load(full_size / LIP, weights_only=True, mmap=True)["state_dict"]
    assert all(torch.equal(parser[key], tensor) for key, tensor in published.items())
    del parser, published
    pose = load_state(twin_of(full_size / DENSEPOSE))
    assert (len(pose), sum(tensor.numel() for tensor in pose.values())) == (335, 63_927_330)
    with (full_size / DENSEPOSE).open("rb") as stream:
        arrays = pickle.load(stream)["model"]  # noqa: S301 - written above
    assert all(np.array_equal(tensor.numpy(), arrays[key]) for key, tensor in pose.items())


def test_the_names_are_those_of_the_manifest() -> None:
    needed = [(f"{repository.folder}/{file.path}", file) for repository, file in weights.files_for("masker", "schp")]
    assert tuple(name for name, _ in needed) == PUBLISHED
    assert all(file.converted for _, file in needed)


def test_a_converted_file_names_the_published_one_by_its_hash(folder: Path) -> None:
    convert(folder)
    for name in PUBLISHED:
        digest = sha256((folder / name).read_bytes()).hexdigest()
        assert source_of(twin_of(folder / name)) == {"source_sha256": digest}


@pytest.mark.parametrize("zipped", [True, False])
def test_both_containers_of_a_checkpoint_are_read(folder: Path, zipped: bool) -> None:
    write_checkpoint(folder / LIP, OrderedDict(parser_state(20)), zipped=zipped)
    convert(folder)
    assert_same(twin_of(folder / LIP), parser_state(20))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_other_floats_becomes_float32(folder: Path, dtype: torch.dtype) -> None:
    state = {key: nn.Parameter(tensor.to(dtype)) for key, tensor in parser_state(20).items()}
    write_checkpoint(folder / LIP, state)
    convert(folder)
    assert_same(twin_of(folder / LIP), {key: tensor.detach().float() for key, tensor in state.items()})


def test_tensors_that_share_memory_or_lie_across_it_are_stored_one_by_one(folder: Path) -> None:
    state = parser_state(20)
    state["module.bn1.weight"] = state["module.bn1.bias"]
    state["module.fushion.0.weight"] = torch.rand(4, 4).T[..., None, None]
    write_checkpoint(folder / LIP, state)
    convert(folder)
    assert_same(twin_of(folder / LIP), state)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_every_protocol_of_a_pickle_is_read(folder: Path, protocol: int) -> None:
    write_pickle(folder / DENSEPOSE, OrderedDict({**pose_state(), **CONSTANTS}), protocol=protocol)
    convert(folder)
    assert_same(twin_of(folder / DENSEPOSE), pose_state())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_the_module_names_of_the_older_numpy_are_read(folder: Path, protocol: int) -> None:
    with (folder / DENSEPOSE).open("wb") as stream:
        OldSpelling(stream, protocol).dump({"model": {**pose_state(), **CONSTANTS}})
    content = (folder / DENSEPOSE).read_bytes()
    assert b"numpy.core." in content
    assert b"numpy._core" not in content
    convert(folder)
    assert_same(twin_of(folder / DENSEPOSE), pose_state())


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("change", [np.asfortranarray, *(lambda a, d=d: a.astype(d) for d in ("f2", "<f8", ">f4"))])
def test_arrays_of_other_floats_and_orders_become_float32(
    folder: Path, change: Callable[[np.ndarray], np.ndarray], protocol: int
) -> None:
    state = {key: change(array) for key, array in pose_state().items()}
    write_pickle(folder / DENSEPOSE, state, protocol=protocol)
    convert(folder)
    assert_same(twin_of(folder / DENSEPOSE), state)


# What is refused


class Calls:
    """Has a function called by whoever unpickles it."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


FORMATS: dict[str, tuple[str, Write]] = {
    "zip": (LIP, write_checkpoint),
    "legacy": (LIP, partial(write_checkpoint, zipped=False)),
    **{f"pickle {number}": (DENSEPOSE, partial(write_pickle, protocol=number)) for number in (0, 2, 4, 5)},
}


@pytest.mark.parametrize("where", ["as the state", "in the state", "beside the state"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_file_that_asks_for_a_command_is_refused_and_the_command_not_run(folder: Path, form: str, where: str) -> None:
    name, write = FORMATS[form]
    evil = Calls(os.system, f"touch {folder / 'ran'}")
    state: Any = parser_state(20) if name == LIP else pose_state()
    if where == "as the state":
        write(folder / name, evil)
    elif where == "in the state":
        write(folder / name, {**state, "module.x": evil})
    else:
        write(folder / name, state, optimizer=evil)
    assert "posix.system" in refusal(folder, name)
    assert not (folder / "ran").exists()
    assert not twin_of(folder / name).exists()


def test_the_commands_of_these_tests_do_run_where_nothing_refuses_them(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Calls(os.system, f"touch {tmp_path / 'ran'}")))  # noqa: S301 - that is the point
    assert (tmp_path / "ran").exists()


GLOBALS: dict[str, Calls] = {
    "eval": Calls(eval, "1"),
    "exec": Calls(builtins.exec, "1"),
    "__import__": Calls(__import__, "antigravity"),
    "getattr": Calls(getattr, "a", "upper"),
    "numpy.load": Calls(np.load, "x.npy", None, True),
    "shutil.rmtree": Calls(shutil.rmtree, "x"),
    "torch.hub.load": Calls(torch.hub.load, "a/b"),
    "torch.serialization.load": Calls(torch.load, "x.pth"),
    "marshal.loads": Calls(marshal.loads, b"N"),
}


@pytest.mark.parametrize("wanted", GLOBALS)
@pytest.mark.parametrize("form", FORMATS)
def test_any_other_function_is_refused_by_name(folder: Path, form: str, wanted: str) -> None:
    name, write = FORMATS[form]
    write(folder / name, {"module.x": GLOBALS[wanted]})
    assert f"{wanted}," in refusal(folder, name)


@pytest.mark.parametrize("wanted", [torch._utils._rebuild_tensor_v2, torch.FloatTensor, np.frombuffer, np.float32])
def test_a_pickle_of_arrays_may_not_ask_for_torch_or_the_rest_of_numpy(
    folder: Path, wanted: Callable[..., Any]
) -> None:
    write_pickle(folder / DENSEPOSE, {"x": Calls(wanted, b"1234")})
    assert wanted.__name__ in refusal(folder, DENSEPOSE)


def test_a_name_with_control_characters_is_shown_escaped(folder: Path) -> None:
    module = "os\x1b[2J\u202e\n"
    content = pickle.PROTO + b"\x04" + b"".join(pickle.dumps(text, 4)[11:-2] for text in (module, "system"))
    (folder / DENSEPOSE).write_bytes(content + pickle.STACK_GLOBAL + b".")
    assert "os\\x1b[2J\\u202e\\n.system" in refusal(folder, DENSEPOSE)


@pytest.mark.parametrize("shape", [(10**12,), (3 * 10**9,)])
def test_an_array_that_is_only_announced_takes_no_memory(folder: Path, shape: tuple[int, ...]) -> None:
    reconstruct, *_ = np.zeros(1).__reduce__()
    for call in (Calls(reconstruct, np.ndarray, shape, "O"), Calls(np.ndarray, shape, "O")):
        write_pickle(folder / DENSEPOSE, {**pose_state(), "head.bias": call})
        assert "damaged" in refusal(folder, DENSEPOSE)


def nested(depth: int) -> bytes:
    return pickle.EMPTY_TUPLE + depth * pickle.TUPLE1


BOMBS = {
    "a memo of 64 GB": b"\x80\x02]r\xff\xff\xff\xff.",
    "a memo of 64 GB in text": b"]p4294967295\n.",
    "a million tuples as a key": b"\x80\x02}" + nested(10**6) + b"Ns.",
    "a million tuples": b"\x80\x02" + nested(10**6) + b".",
    "a million lists": b"\x80\x02" + 10**6 * b"]" + 10**6 * b"a" + b".",
    "bytes of an exabyte": b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
    "writable bytes of 64 GB": b"\x80\x05\x96" + (2**36).to_bytes(8, "little") + b".",
    "a frame of an exabyte": b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"N.",
    "a number of a million digits": b"I" + 10**6 * b"9" + b"\n.",
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS.keys())
def test_a_pickle_that_is_a_bomb_is_refused(folder: Path, content: bytes) -> None:
    (folder / DENSEPOSE).write_bytes(content)
    assert any(text in refusal(folder, DENSEPOSE) for text in ("damaged", "more intricate"))


DAMAGED = {
    "text": b"<html>not found</html>",
    "a text pointer to a large file": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "JSON": b'{"model": {}}',
    "zeros": bytes(1000),
    "no pickle's opcodes": b"\x80\x04\xff\xff\xff.",
    "a stop alone": b".",
    "a persistent name": b"\x80\x02X\x01\x00\x00\x00aQ.",
    "an extension": b"\x80\x02\x82\x01.",
    "a pickle of None": pickle.dumps(None),
    "a pickle of no dictionary": pickle.dumps([1]),
    "a pickle without the state": pickle.dumps({"weights": {}}),
    "a state of no dictionary": pickle.dumps({"model": [1], "state_dict": [1]}),
    "a state with numbers as keys": pickle.dumps({"model": {1: 2}, "state_dict": {1: 2}}),
    "a state with a function": b"\x80\x02}(U\x05modelX\x01\x00\x00\x00k}c_codecs\nencode\nsu.",
    "a class with a new state": b"\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00kK\x01sb.",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
@pytest.mark.parametrize("name", [LIP, DENSEPOSE])
def test_what_is_no_file_of_weights_is_refused(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    refusal(folder, name)


def test_a_zip_that_is_no_checkpoint_is_refused(folder: Path) -> None:
    with zipfile.ZipFile(folder / LIP, "w") as archive:
        archive.writestr("x", b"")
    assert "damaged" in refusal(folder, LIP)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(folder: Path, form: str, share: float) -> None:
    name, write = FORMATS[form]
    write(folder / name, parser_state(20) if name == LIP else pose_state())
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    assert "damaged" in refusal(folder, name)


def test_a_directory_in_place_of_a_file_is_refused(folder: Path) -> None:
    (folder / LIP).unlink()
    (folder / LIP).mkdir()
    assert "cannot be read" in refusal(folder, LIP)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_of_more_bytes_than_weights_have_is_not_read(
    folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (folder / name).open("r+b") as stream:
        stream.truncate(conversion.MAX_BYTES + 1)
    monkeypatch.setattr(conversion, "CHUNK_BYTES", None)
    for other in set(PUBLISHED) - {name}:
        save_file({}, twin_of(folder / other))
        (folder / other).unlink()
    assert f"more than {conversion.MAX_BYTES} bytes" in refusal(folder, name)


def test_an_archive_that_unpacks_to_more_than_weights_have_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = io.BytesIO()
    torch.save({"state_dict": {"module.x": torch.zeros(10**6)}}, packed)
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(folder / LIP, "w", zipfile.ZIP_DEFLATED) as target:
        for member in source.namelist():
            target.writestr(member, source.read(member))
    monkeypatch.setattr(conversion, "MAX_BYTES", 10**6)
    assert (folder / LIP).stat().st_size < 10**5
    assert "more than 1000000 bytes" in refusal(folder, LIP)


def test_a_tensor_that_claims_more_values_than_its_file_holds_is_refused(folder: Path) -> None:
    write_checkpoint(folder / LIP, {**parser_state(20), "module.edge.conv4.bias": torch.zeros(1).expand(2**40)})
    assert f"more than {conversion.MAX_BYTES} bytes" in refusal(folder, LIP)


WRONG_CHECKPOINTS: dict[str, tuple[dict[str, Any], str]] = {
    "a tensor missing": ({"module.bn1.bias": None}, "module.bn1.bias is missing"),
    "a tensor too many": ({"module.bn9.bias": torch.zeros(1)}, "module.bn9.bias is unexpected"),
    "another shape": ({"module.bn1.bias": torch.zeros(5)}, r"module.bn1.bias is [5], not [4]"),
    "NaN": ({"module.bn1.bias": torch.full((4,), np.nan)}, "module.bn1.bias is not finite"),
    "more than float32 holds": ({"module.bn1.bias": torch.full((4,), 1e300, dtype=torch.float64)}, "is not finite"),
    "whole numbers": ({"module.bn1.bias": torch.zeros(4, dtype=torch.int64)}, "'module.bn1.bias' is no array"),
    "a number": ({"module.bn1.bias": 1.0}, "'module.bn1.bias' is no array of floats"),
    "a sparse tensor": ({"module.bn1.bias": torch.zeros(4).to_sparse()}, "'module.bn1.bias' is no array of floats"),
    "a tensor without content": ({"module.bn1.bias": torch.zeros(4, device="meta")}, "'module.bn1.bias' is no array"),
    "another head": ({"module.fushion.3.weight": torch.zeros(7, 4, 1, 1)}, "not of 18 or 20 classes"),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(folder: Path, case: str) -> None:
    change, text = WRONG_CHECKPOINTS[case]
    state = {**parser_state(20), **change}
    write_checkpoint(folder / LIP, {key: tensor for key, tensor in state.items() if tensor is not None})
    assert text in refusal(folder, LIP)


WRONG_PICKLES: dict[str, tuple[dict[str, Any], str]] = {
    "an array missing": ({"head.bias": None}, "head.bias is missing"),
    "an array too many": ({"foot.bias": np.zeros(2, np.float32)}, "foot.bias is unexpected"),
    "another shape": ({"head.bias": np.zeros(3, np.float32)}, "head.bias is [3], not [2]"),
    "infinity": ({"head.bias": np.full(2, np.inf, np.float32)}, "head.bias is not finite"),
    "more than float32 holds": ({"head.bias": np.full(2, 1e300)}, "head.bias is not finite"),
    "whole numbers": ({"head.bias": np.zeros(2, np.int64)}, "'head.bias' is an array of 'i8'"),
    "objects": ({"head.bias": np.array([1.0, None], object)}, "'head.bias' is an array of 'O8'"),
    "a structure": ({"head.bias": np.zeros(2, [("a", "f4")])}, "'head.bias' is an array of 'V4'"),
    "a list": ({"head.bias": [0.0, 0.0]}, "'head.bias' is no array of floats"),
    "a scalar": ({"head.bias": np.float32(1)}, "'head.bias' is no array of floats"),
}


@pytest.mark.parametrize("case", WRONG_PICKLES)
@pytest.mark.parametrize("protocol", [2, 5])
def test_a_pickle_that_does_not_fit_is_refused_by_name(folder: Path, case: str, protocol: int) -> None:
    change, text = WRONG_PICKLES[case]
    state = {**pose_state(), **change}
    write_pickle(
        folder / DENSEPOSE, {key: array for key, array in state.items() if array is not None}, protocol=protocol
    )
    assert text in refusal(folder, DENSEPOSE)


class Reduced:
    """Pickled as what it is given."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize("content", [b"\x00\x00\x80?" * 2, "\x00\x00\x80?" * 2])
@pytest.mark.parametrize("flags", [0, 63])
def test_an_array_is_its_shape_the_name_of_its_dtype_and_its_bytes(
    folder: Path, content: bytes | str, flags: int
) -> None:
    """NumPy would believe the flags and follow numbers as addresses of objects; Python 2 wrote text for bytes."""
    reconstruct, arguments, _ = np.zeros(1, np.float32).__reduce__()
    dtype = Reduced(np.dtype, ("f4", False, True), (3, "<", None, None, None, 4, 4, flags))
    array = Reduced(reconstruct, arguments, (1, (2,), dtype, False, content))
    write_pickle(folder / DENSEPOSE, {**pose_state(), "head.bias": array})
    convert(folder)
    assert_same(twin_of(folder / DENSEPOSE), {**pose_state(), "head.bias": [1.0, 1.0]})


def test_swapped_files_are_refused_in_words(folder: Path) -> None:
    (folder / LIP).rename(folder / "kept")
    (folder / ATR).rename(folder / LIP)
    (folder / "kept").rename(folder / ATR)
    assert refusal(folder, LIP).endswith("it has 18 classes, not 20; the files of LIP and ATR may be swapped")
    (folder / LIP).unlink()
    save_file({}, twin_of(folder / LIP))
    assert refusal(folder, ATR).endswith("it has 20 classes, not 18; the files of LIP and ATR may be swapped")


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_file_is_named_with_the_command_that_brings_it_before_anything_is_done(
    folder: Path, name: str
) -> None:
    (folder / name).unlink()
    assert "vton weights download" in refusal(folder, name)
    assert files_in(folder) == sorted(set(PUBLISHED) - {name})


# What is there already


def test_what_is_converted_is_not_converted_again(folder: Path) -> None:
    convert(folder)
    before = {twin_of(folder / name): twin_of(folder / name).stat() for name in PUBLISHED}
    assert convert(folder) == []
    assert all(path.stat() == stat for path, stat in before.items())


def test_the_published_files_may_go_after_the_conversion(folder: Path) -> None:
    convert(folder)
    for name in PUBLISHED:
        (folder / name).unlink()
    assert convert(folder) == []


def test_another_published_file_is_converted_anew(folder: Path) -> None:
    convert(folder)
    state = {**parser_state(20), "module.bn1.bias": torch.zeros(4)}
    write_checkpoint(folder / LIP, state)
    assert convert(folder) == [twin_of(folder / LIP)]
    assert_same(twin_of(folder / LIP), state)


@pytest.mark.parametrize("content", [b"", b"\x10", b"not safetensors"])
def test_a_damaged_file_in_the_place_of_the_converted_one_is_replaced(folder: Path, content: bytes) -> None:
    twin_of(folder / LIP).write_bytes(content)
    convert(folder)
    assert_same(twin_of(folder / LIP), parser_state(20))


def test_weights_of_ones_own_are_not_overwritten(folder: Path) -> None:
    own = twin_of(folder / ATR)
    save_file({"x": torch.zeros(1)}, own)
    before = own.read_bytes()
    assert own.name in refusal(folder, ATR)
    assert own.read_bytes() == before


def read_only(*_: object, **__: object) -> None:
    raise OSError(30, "Read-only file system")


def refused_by_writer(*_: object, **__: object) -> None:
    raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


@pytest.mark.parametrize(
    ("place", "failure", "text"),
    [
        ("save_file", read_only, "Read-only file system"),
        ("save_file", refused_by_writer, "Permission denied"),
        ("os.fsync", read_only, "Read-only file system"),
    ],
)
def test_a_directory_that_cannot_be_written_is_named_and_nothing_left_in_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, failure: Callable[..., None], text: str
) -> None:
    monkeypatch.setattr(f"model.maskers.conversion.{place}", failure)
    before = files_in(folder)
    with pytest.raises(WeightsError, match=f"{twin_of(folder / LIP)} cannot be written: .*{text}"):
        convert(folder)
    assert files_in(folder) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_named(folder: Path) -> None:
    (folder / LIP).parent.chmod(0o555)
    try:
        with pytest.raises(WeightsError, match=f"{twin_of(folder / LIP)} cannot be written"):
            convert(folder)
    finally:
        (folder / LIP).parent.chmod(0o755)


# What serves


def test_the_state_is_what_was_published(folder: Path) -> None:
    convert(folder)
    state = load_state(twin_of(folder / ATR))
    assert state.keys() == parser_state(18).keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in parser_state(18).items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_that_waits_for_its_conversion_is_named_with_the_command(folder: Path, name: str) -> None:
    with pytest.raises(WeightsError, match=r"safetensors is missing; .*`vton weights convert`"):
        load_state(twin_of(folder / name))


def test_a_file_that_is_not_there_at_all_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing; .*`vton weights download`"):
        load_state(tmp_path / "model.safetensors")


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_serves_reads_no_pickle(folder: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_state(folder / name)


# The command


def vton(*arguments: str) -> tuple[int, list[str]]:
    done = CliRunner().invoke(main, ["weights", *arguments])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output.splitlines()


def test_the_command_converts_records_and_says_so_in_a_line_for_each_file(folder: Path) -> None:
    twins = [twin_of(folder / name) for name in PUBLISHED]
    assert vton("convert", f"--dir={folder}") == (0, [f"{twin}: written" for twin in twins])
    record = json.loads((folder / RECORD).read_text())["files"]
    assert {name: entry["sha256"] for name, entry in record.items()} == {
        str(twin.relative_to(folder)): sha256(twin.read_bytes()).hexdigest() for twin in twins
    }
    assert vton("convert", f"--dir={folder}") == (0, [f"{twin}: was there" for twin in twins])
    assert weights.verify(folder, "masker", "schp").verified


def test_the_command_records_anew_what_it_makes_anew(folder: Path) -> None:
    vton("convert", f"--dir={folder}")
    write_checkpoint(folder / LIP, {**parser_state(20), "module.bn1.bias": torch.zeros(4)})
    assert vton("convert", f"--dir={folder}")[0] == 0
    assert weights.verify(folder, "masker", "schp").verified


def test_the_command_refuses_in_one_line(folder: Path) -> None:
    write_pickle(folder / DENSEPOSE, Calls(os.system, f"touch {folder / 'ran'}"))
    status, lines = vton("convert", f"--dir={folder}")
    assert status == EXIT_SETTINGS
    assert len(lines) == 1
    assert "posix.system" in lines[0]
    assert not (folder / "ran").exists()


def test_the_command_names_a_missing_directory(tmp_path: Path) -> None:
    status, lines = vton("convert", f"--dir={tmp_path / 'nowhere'}")
    assert status == EXIT_SETTINGS
    assert len(lines) == 1


@pytest.mark.parametrize("module", ["container.cli", "model.maskers.published"])
def test_the_unpickler_is_loaded_by_the_conversion_only(module: str) -> None:
    code = f"import sys, {module}; print('model.maskers.conversion' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "False"
