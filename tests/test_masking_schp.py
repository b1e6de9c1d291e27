from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from masking_recipe import GOLDENS, densepose_state_dict, recipe_array, schp_state_dict
from numpy.typing import NDArray
from PIL import Image

from model.interface import BadPicture
from model.maskers.affine import Letterbox, warp_plane
from model.maskers.schp import RESAVED, SCHP, UNUSED, published_shapes
from model.maskers.schp_network import enlarge
from model.weights import WeightsError

State = dict[str, Any]
Seen = dict[str, torch.Tensor]
CLASSES = {"atr": 18, "lip": 20}
STAGES = ("maxpool", "layer1", "layer2", "layer3", "layer4", "context_encoding", "decoder", "edge")
NAMES = {classes: name for name, classes in CLASSES.items()}
both = pytest.mark.parametrize("state", CLASSES, indirect=True)
atr = pytest.mark.parametrize("state", ["atr"], indirect=True)


@pytest.fixture(scope="module")
def state(request: pytest.FixtureRequest) -> State:
    return schp_state_dict(request.param)


@pytest.fixture(scope="module")
def parser(state: State) -> SCHP:
    return SCHP.from_state_dict(state)


@pytest.fixture
def seen(parser: SCHP) -> Iterator[Seen]:
    """What went into the network, and what came out of it and of its stages, by the stage's name."""
    tensors: Seen = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
            tensors.update({f"{name}_input": inputs[0], name: output.clone()})  # what follows may work in place

        return hook

    stages = {"network": parser.network, **{name: parser.network.get_submodule(name) for name in STAGES}}
    handles = [module.register_forward_hook(keep(name)) for name, module in stages.items()]
    yield tensors
    for handle in handles:
        handle.remove()


def golden_image(name: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(GOLDENS / "schp" / f"{name}.png"))


def digest(arrays: dict[str, NDArray[Any]]) -> str:
    sha256 = hashlib.sha256()
    for key in sorted(arrays):
        sha256.update(arrays[key].tobytes())
    return sha256.hexdigest()


@both
def test_the_recipe_gives_the_weights_of_the_goldens(state: State) -> None:
    checks = json.loads((GOLDENS / "schp" / "recipe_check.json").read_text())
    bias = "module.fushion.3.bias"
    drawn = {key: tensor.numpy() for key, tensor in state.items()} | {bias: recipe_array(bias, state[bias].shape)}
    assert digest(drawn) == checks[NAMES[len(state[bias])]]["sha256_sorted_concat"]


def test_the_recipe_gives_the_dense_pose_weights_of_the_goldens() -> None:
    folder = GOLDENS / "densepose"
    arrays = densepose_state_dict()
    for key, values in json.loads((folder / "overrides.json").read_text()).items():
        np.testing.assert_array_equal(arrays[key], np.array(values, np.float32))
        arrays[key] = recipe_array(key, arrays[key].shape)
    assert digest(arrays) == json.loads((folder / "recipe_check.json").read_text())["sha256_sorted_concat"]


@pytest.mark.parametrize("dataset", CLASSES)
def test_the_needed_tensors_are_the_published_ones_without_the_unused(dataset: str) -> None:
    published = json.loads((GOLDENS / "schp" / f"keys_{dataset}.json").read_text())
    expected = {key.removeprefix("module."): tuple(shape) for key, shape in published}
    assert published_shapes(CLASSES[dataset]) == {key: shape for key, shape in expected.items() if key not in UNUSED}
    assert all(key in expected for key in UNUSED)


@both
def test_every_stage_has_the_numbers_of_the_reference(parser: SCHP, seen: Seen) -> None:
    golden = np.load(GOLDENS / "schp" / f"net_small_{NAMES[parser.classes]}_a.npz")
    picture = np.random.default_rng(20240501).standard_normal((1, 3, 97, 129)).astype(np.float32)
    with torch.inference_mode():
        logits = parser.network(torch.from_numpy(picture))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=2e-4)
    for name in STAGES:
        features = seen[name].numpy()
        assert list(features.shape) == list(golden[f"{name}_shape"])
        np.testing.assert_allclose(features[:, :3, :4, :5], golden[f"{name}_slice"], rtol=0, atol=2e-4)
        np.testing.assert_allclose(features.mean((0, 2, 3)), golden[f"{name}_chmean"], rtol=0, atol=2e-4)
        np.testing.assert_allclose(features.std((0, 2, 3)), golden[f"{name}_chstd"], rtol=0, atol=2e-4)


@both
@pytest.mark.parametrize("order", ["bgr", "rgb"])
def test_a_parse_in_either_order_is_that_of_the_reference(parser: SCHP, seen: Seen, order: str) -> None:
    check_parse(parser, seen, "300x400", order)


@atr
@pytest.mark.parametrize("size", ["640x360", "64x48"])
def test_a_parse_of_another_size_is_that_of_the_reference(parser: SCHP, seen: Seen, size: str) -> None:
    check_parse(parser, seen, size, "rgb")


def check_parse(parser: SCHP, seen: Seen, size: str, order: str) -> None:
    name = f"{NAMES[parser.classes]}_{size}_{order}"
    golden, picture = np.load(GOLDENS / "schp" / f"e2e_{name}.npz"), golden_image(f"img_{size}")
    labels, expected = parser.parse(picture, order), golden_image(f"labels_{name}")
    assert (labels.dtype, labels.shape) == (np.uint8, expected.shape)
    assert np.mean(labels == expected) >= 0.9995

    logits, inverse = seen["network"][0], Letterbox(picture.shape[1], picture.shape[0], parser.side).inverse
    square = enlarge(logits[None], (parser.side, parser.side))[0]
    final = torch.stack([warp_plane(plane, inverse, picture.shape[1::-1]) for plane in square])
    stride = int(golden["final_stride"])
    np.testing.assert_array_equal(seen["network_input"][0, :, ::37, ::37], golden["net_input_stride37"])
    compared = {
        "net_logits_stride5": logits[:, ::5, ::5],
        "net_logits_chmean": logits.mean((1, 2)),
        "net_logits_chstd": logits.std((1, 2)),
        "upsampled_logits_stride29": square[:, ::29, ::29],
        "final_logits_strided": final[:, ::stride, ::stride],
    }
    for key, tensor in compared.items():
        np.testing.assert_allclose(tensor, golden[key], rtol=0, atol=2e-3, err_msg=key)


def without_prefix(state: State) -> State:
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def resaved(state: State) -> State:
    names = {f"module.{old}": f"module.{new}" for old, new in RESAVED.items()}
    return {names.get(key, key): tensor for key, tensor in state.items()}


def without_unused_but_counted(state: State) -> State:
    counters = {key.replace("running_mean", "num_batches_tracked"): torch.tensor(0) for key in state if "mean" in key}
    return {key: tensor for key, tensor in state.items() if key.removeprefix("module.") not in UNUSED} | counters


@atr
def test_other_namings_of_the_same_weights_give_the_same_network(state: State, parser: SCHP) -> None:
    for change in (lambda s: without_prefix(resaved(s)), lambda s: resaved(without_unused_but_counted(s))):
        network = SCHP.from_state_dict(change(state)).network
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, parser.network.state_dict()[key]), key


@atr
def test_the_weights_are_neither_changed_nor_kept(state: State, parser: SCHP) -> None:
    memory = {tensor.data_ptr() for tensor in state.values()}
    assert not any(tensor.data_ptr() in memory for tensor in parser.network.state_dict().values())
    assert {tensor._version for tensor in state.values()} == {0}  # counts the changes in place


@atr
def test_a_network_in_half_precision_gives_logits_in_single(state: State) -> None:
    parser = SCHP.from_state_dict(state, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in parser.network.state_dict().values()} == {torch.bfloat16}
    parser.network = FakeNetwork(18, dtype=torch.bfloat16)
    assert parser.logits(np.zeros((4, 4, 3), np.uint8)).dtype == torch.float32


@atr
def test_negative_scales_are_counted_and_can_be_taken_without_their_sign(
    state: State, caplog: pytest.LogCaptureFixture
) -> None:
    gamma = state["module.bn1.weight"].clone()
    gamma[:5] *= -1
    caplog.set_level(logging.INFO, "model.maskers.schp")
    signed, unsigned = (
        SCHP.from_state_dict({**state, "module.bn1.weight": gamma}, abs_gamma=abs_gamma) for abs_gamma in (False, True)
    )
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "negative_gamma=5 abs_gamma=True" in caplog.text
    scale = torch.sqrt(state["module.bn1.running_var"].double() + 1e-5)[:, None, None, None]
    weight = state["module.conv1.weight"].double()
    plain, absolute = (values.double()[:, None, None, None] for values in (gamma, gamma.abs() + 1e-5))
    torch.testing.assert_close(signed.network.conv1.weight.double(), weight * plain / scale, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(unsigned.network.conv1.weight.double(), weight * absolute / scale, rtol=1e-6, atol=1e-7)


LAYER = "module.layer3.22.conv2.weight"
NORM = "module.context_encoding.stages.2.2.running_var"
HEAD = "module.fushion.3.weight"
WRONG_STATES: dict[str, tuple[Callable[[State], Any], str]] = {
    "a convolution missing": (lambda s: without(s, LAYER), f"{LAYER} is missing"),
    "a norm missing": (lambda s: without(s, NORM), f"{NORM} is missing"),
    "a tensor of the head missing": (lambda s: without(s, "module.fushion.3.bias"), "module.fushion.3.bias is missing"),
    "the last weight missing": (lambda s: without(s, HEAD), f"{HEAD} is missing"),
    "a tensor too many": (lambda s: {**s, "module.layer5.weight": s[NORM]}, "module.layer5.weight is unexpected"),
    "a key that is no text": (lambda s: {**s, 7: s[NORM]}, "7 is unexpected"),
    "one name without the prefix": (
        lambda s: {**without(s, LAYER), LAYER[7:]: s[LAYER]},
        f"{LAYER} is missing; {LAYER[7:]} is unexpected",
    ),
    "a tensor twice": (lambda s: {**s, "bn1.bias": s["module.bn1.bias"]}, "bn1.bias is unexpected"),
    "another shape": (lambda s: {**s, NORM: s[NORM][1:]}, rf"{NORM} is \[511\], not \[512\]"),
    "another rank": (lambda s: {**s, LAYER: s[LAYER][0]}, rf"{LAYER} is \[256, 3, 3\], not \[256, 256, 3, 3\]"),
    "seven classes": (lambda s: {**s, HEAD: s[HEAD][:7]}, rf"{HEAD} is \[7, 256, 1, 1\], not of 18 or 20 classes"),
    "a bias for other classes": (
        lambda s: {**s, "module.fushion.3.bias": torch.zeros(20)},
        r"module.fushion.3.bias is \[20\], not \[18\]",
    ),
    "a head of another rank": (lambda s: {**s, HEAD: s[HEAD].flatten()}, f"{HEAD} is"),
    "a head that is no tensor": (lambda s: {**s, HEAD: None}, f"{HEAD} is"),
    "an array": (lambda s: {**s, NORM: s[NORM].numpy()}, f"{NORM} is a ndarray, not a tensor"),
    "whole numbers": (lambda s: {**s, NORM: s[NORM].int()}, f"{NORM} is torch.int32, not of floats"),
    "complex numbers": (lambda s: {**s, NORM: s[NORM].cfloat()}, f"{NORM} is torch.complex64, not of floats"),
    "NaN": (lambda s: {**s, NORM: s[NORM] * torch.nan}, f"{NORM} is not finite"),
    "infinity": (lambda s: {**s, LAYER: s[LAYER] / 0}, f"{LAYER} is not finite"),
    "a negative variance": (lambda s: {**s, NORM: -s[NORM]}, f"{NORM} is negative"),
    "the whole checkpoint": (lambda s: {"state_dict": s, "epoch": 150}, "fushion.3.weight is missing"),
    "nothing": (lambda _: {}, "fushion.3.weight is missing"),
    "a list": (list, "the SCHP weights are a list"),
    "a re-saved tensor missing": (
        lambda s: without(resaved(s), "module.decoder.conv3.4.bias"),
        "module.decoder.conv3.4.bias is missing",
    ),
    "both namings": (lambda s: {**s, "module.fushion.4.bias": s[HEAD]}, "module.fushion.4.bias is unexpected"),
}


def without(state: State, *keys: str) -> State:
    return {key: tensor for key, tensor in state.items() if key not in keys}


@atr
@pytest.mark.parametrize("case", WRONG_STATES)
def test_wrong_weights_are_refused_by_the_name_of_the_tensor(state: State, case: str) -> None:
    change, text = WRONG_STATES[case]
    with pytest.raises(WeightsError, match=text):
        SCHP.from_state_dict(change(state))


@atr
def test_a_scale_that_only_half_precision_cannot_hold_is_refused(state: State) -> None:
    variance = {"module.bn1.running_var": torch.zeros(64), "module.bn1.weight": torch.full((64,), 1e4)}
    with pytest.raises(WeightsError, match=r"conv1\.weight with its norm is too large for torch\.float16"):
        SCHP.from_state_dict({**state, **variance}, dtype=torch.float16)


def test_an_error_lists_five_tensors_and_counts_the_rest() -> None:
    with pytest.raises(WeightsError, match="and ") as caught:
        SCHP.from_state_dict({"fushion.3.weight": torch.zeros(20, 256, 1, 1)})
    assert str(caught.value).count(" is missing") == 5
    assert f"and {len(published_shapes(20)) - 6} more" in str(caught.value)


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown dtype torch\.int8; one of: torch\.float32"):
        SCHP.from_state_dict({}, dtype=torch.int8)


class FakeNetwork(torch.nn.Module):
    """Gives one logit per class: its number, or `value` for all."""

    def __init__(self, classes: int, value: float | None = None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.conv1 = SimpleNamespace(weight=torch.zeros(1, dtype=dtype))
        self.values = torch.arange(classes, dtype=dtype) if value is None else torch.full((classes,), value)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        side = -(-picture.shape[-1] // 4)
        return self.values[None, :, None, None].expand(1, -1, side, side)


@pytest.mark.parametrize("classes", CLASSES.values())
@pytest.mark.parametrize("size_hw", [(1, 5), (5, 1), (2, 2), (1, 3000), (4000, 1), (2049, 30), (473, 512)])
def test_a_picture_of_any_shape_gets_labels_at_its_size(classes: int, size_hw: tuple[int, int]) -> None:
    labels = SCHP(FakeNetwork(classes), classes).parse(np.full((*size_hw, 3), 90, np.uint8))
    assert labels.shape == size_hw
    assert (labels == classes - 1).all()


def test_a_single_pixel_is_background() -> None:
    labels = SCHP(FakeNetwork(18), 18).parse(np.full((1, 1, 3), 90, np.uint8))
    assert (labels.dtype, labels.tolist()) == (np.uint8, [[0]])


def test_a_picture_is_neither_changed_nor_asked_to_be_contiguous() -> None:
    picture = np.random.default_rng(3).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    picture.setflags(write=False)
    view, parser = picture[::-1, ::2], SCHP(FakeNetwork(20), 20)
    np.testing.assert_array_equal(parser.parse(view), parser.parse(view.copy()))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_give_no_labels(value: float) -> None:
    with pytest.raises(BadPicture, match="NaN or infinity"):
        SCHP(FakeNetwork(18, value), 18).parse(np.zeros((8, 6, 3), np.uint8))


WRONG_PICTURES: dict[str, Any] = {
    "floats": np.zeros((4, 4, 3), np.float32),
    "signed": np.zeros((4, 4, 3), np.int8),
    "grey": np.zeros((4, 4), np.uint8),
    "with alpha": np.zeros((4, 4, 4), np.uint8),
    "a batch": np.zeros((1, 4, 4, 3), np.uint8),
    "without height": np.zeros((0, 4, 3), np.uint8),
    "without width": np.zeros((4, 0, 3), np.uint8),
    "a tensor": torch.zeros(4, 4, 3, dtype=torch.uint8),
    "a list": [[[0, 0, 0]]],
    "nothing": None,
}


@pytest.mark.parametrize("case", WRONG_PICTURES)
def test_another_picture_than_rgb_bytes_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="the image must be HWC uint8 RGB, not"):
        SCHP(FakeNetwork(18), 18).parse(WRONG_PICTURES[case])


@pytest.mark.parametrize("order", ["", "BGR", "gbr", None])
def test_an_unknown_channel_order_is_refused(order: Any) -> None:
    with pytest.raises(ValueError, match="unknown channel order"):
        SCHP(FakeNetwork(18), 18).parse(np.zeros((4, 4, 3), np.uint8), order)


@pytest.mark.gpu
@atr
def test_a_gpu_gives_the_labels_of_the_cpu(state: State, parser: SCHP) -> None:
    picture = golden_image("img_300x400")
    expected = parser.parse(picture)
    for dtype in (torch.float32, torch.float16):  # on CUDA, products of the first have no more digits than the second
        labels = SCHP.from_state_dict(state, "cuda", dtype=dtype).parse(picture)
        assert np.mean(labels == expected) >= 0.98
