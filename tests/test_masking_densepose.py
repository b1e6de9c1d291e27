from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import torch
from masking_recipe import GOLDENS, densepose_state_dict

from model.interface import BadPicture
from model.maskers import densepose, detection
from model.maskers.densepose import DensePose
from model.maskers.densepose_backbone import Convolution
from model.maskers.densepose_network import BOX_BINS, BOX_WEIGHTS, SURFACE_BINS, DensePoseNetwork
from model.weights import WeightsError

REPOSITORY = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
LEVELS = ("p2", "p3", "p4", "p5", "p6")
SMALL_HW = (96, 131)
END_TO_END = [("300x400", 1024), ("64x48", 1024), ("640x360", 512)]
RUNNING_VAR = "backbone.bottom_up.res3.1.conv2.norm.running_var"
WEIGHT = "roi_heads.box_predictor.cls_score.weight"


def golden(name):
    """Numbers of the reference implementation."""
    arrays = np.load(GOLDENS / "densepose" / f"{name}.npz")
    return {key: arrays[key] for key in arrays.files}


def picture(path):
    return np.array(PIL.Image.open(GOLDENS / path))


def sizes():
    return json.loads((GOLDENS / "densepose" / "resize_table.json").read_text())


def near(values, expected, atol=2e-3):
    np.testing.assert_allclose(np.asarray(values), expected, rtol=0, atol=atol)


def thin_picture():
    """The network sees 12x1333 of it, which takes a tenth of the time of a photo."""
    return np.random.default_rng(1).integers(0, 256, (9, 1024, 3), np.uint8)


@pytest.fixture(scope="module")
def weights():
    return densepose_state_dict()


@pytest.fixture(scope="module")
def dense_pose(weights):
    return DensePose.from_state_dict(weights)


@pytest.fixture
def network(dense_pose):
    with torch.inference_mode():
        yield dense_pose.network


@pytest.fixture(scope="module")
def small():
    return golden("small_a")


@pytest.fixture(scope="module")
def pyramid(dense_pose, small):
    image = np.ascontiguousarray(small["image_bgr"][:, :, ::-1])
    with torch.inference_mode():
        return dense_pose.network.pyramid(densepose.network_input(image, CPU))


@pytest.fixture
def seen(dense_pose, monkeypatch):
    """What the steps of the network gave last, by name."""
    results = {}

    def watch(name):
        step = getattr(dense_pose.network, name)

        def watched(*args):
            results[name] = step(*args)
            return results[name]

        monkeypatch.setattr(dense_pose.network, name, watched)

    for name in ("people", "surface_features"):
        watch(name)
    return results


def test_it_imports_without_the_libraries_of_the_reference():
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torchvision', 'detectron2', 'fvcore', 'densepose')))"
    code = f"{blocked}; import model.maskers.densepose"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_the_network_has_exactly_the_published_names_and_shapes():
    with torch.device("meta"):
        state = DensePoseNetwork().state_dict()
    published = json.loads((GOLDENS / "densepose" / "keys_densepose.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in state.items()} == dict(published)


def test_a_folded_norm_changes_no_result():
    rng = torch.Generator().manual_seed(2)
    convolution = Convolution(3, 5, 3, stride=2, normed=True).requires_grad_(False)
    for tensor in convolution.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape, generator=rng) + 0.1)
    pixels = torch.rand(1, 3, 9, 8, generator=rng)
    before = convolution(pixels)
    convolution.fold_norm()
    assert set(convolution.state_dict()) == {"weight", "bias"}
    torch.testing.assert_close(convolution(pixels), before)


# Before the network


@pytest.mark.parametrize("row", sizes(), ids=lambda row: f"{row['w']}x{row['h']}_{row['limit']}")
def test_sizes_are_those_of_the_reference(row):
    picture_of_size = np.zeros((row["h"], row["w"], 3), np.uint8)
    small = densepose.shrunk(picture_of_size, row["limit"])
    assert small.shape == (row["pre_h"], row["pre_w"], 3)
    size_hw = densepose.network_size(small.shape[:2])
    assert size_hw == (row["net_h"], row["net_w"])
    padded = densepose.network_input(np.zeros((*size_hw, 3), np.uint8), CPU)
    assert padded.shape == (1, 3, row["pad_h"], row["pad_w"])


@pytest.mark.parametrize(("size_wh", "name"), [((40, 28), "40x28"), ((26, 18), "26x18"), ((33, 31), "33x31")])
def test_shrinking_is_exactly_that_of_the_reference(size_wh, name):
    """The arithmetic of OpenCV, which its versions share."""
    arrays = np.load(GOLDENS / "ops" / "ops_a.npz")
    source, expected = arrays["warp_src_u8"], arrays[f"resize_{name}"]
    if name == "33x31":  # no longest side gives this size
        result = cv2.resize(source, size_wh, interpolation=cv2.INTER_LINEAR)
    else:
        result = densepose.shrunk(source, max(size_wh))
    assert np.array_equal(result, expected)


def test_the_picture_that_the_network_sees_is_exactly_that_of_the_reference():
    expected = golden("preprocess")
    image = picture("schp/img_300x400.png")
    result = densepose.resized(image, densepose.network_size(image.shape[:2]))[:, :, ::-1]
    assert list(result.shape) == expected["resized_300x400_shape"].tolist()
    assert np.array_equal(result[::13, ::13], expected["resized_300x400_sub13"])
    assert np.array_equal(result.sum(axis=(1, 2), dtype=np.int64), expected["rowsum_300x400"])


# The network, piece by piece, on a picture of 131x96


def test_the_input_is_that_of_the_reference(small):
    image = np.ascontiguousarray(small["image_bgr"][:, :, ::-1])
    result = densepose.network_input(image, CPU)
    assert list(result.shape) == small["net_in_shape"].tolist()
    near(result[0, :, ::7, ::7], small["net_in_sub"], 1e-4)


def test_the_backbone_is_that_of_the_reference(network, small):
    image = np.ascontiguousarray(small["image_bgr"][:, :, ::-1])
    for level, features in enumerate(network.backbone.bottom_up(densepose.network_input(image, CPU)), start=2):
        expected = small[f"res{level}_slice"]
        channels, height, width = expected.shape
        near(features[0, :channels, :height, :width], expected)
        near(features.mean(dim=(0, 2, 3)), small[f"res{level}_chmean"])


@pytest.mark.parametrize("level", range(5))
def test_the_pyramid_is_that_of_the_reference(pyramid, small, level):
    name, features = LEVELS[level], pyramid[level]
    assert list(features.shape) == small[f"{name}_shape"].tolist()
    channels, height, width = small[f"{name}_slice"].shape
    near(features[0, :channels, :height, :width], small[f"{name}_slice"])
    near(features.mean(dim=(0, 2, 3)), small[f"{name}_chmean"])
    near(features.std(dim=(0, 2, 3)), small[f"{name}_chstd"])


def test_the_proposal_head_is_that_of_the_reference(network, pyramid, small):
    for name, features in zip(LEVELS, pyramid):
        logits, deltas = network.proposal_generator["rpn_head"](features)
        near(logits[0], small[f"rpn_logits_{name}"])
        near(deltas[0, :, ::2, ::2], small[f"rpn_deltas_{name}"])


def test_the_proposals_are_those_of_the_reference(network, pyramid, small):
    found = detection.select_proposals(network.proposals(pyramid), SMALL_HW)
    assert len(found.boxes) == small["prop_count"]
    near(found.boxes[:150], small["prop_boxes_top150"], 1e-2)
    near(found.scores[:150], small["prop_logits_top150"])


def test_the_box_head_is_that_of_the_reference(network, pyramid, small):
    boxes = torch.from_numpy(small["boxes_in"])
    assert detection.assign_levels(boxes).tolist() == small["box_levels"].tolist()
    pooled = detection.pool_levels(pyramid[:4], boxes, BOX_BINS)
    near(pooled[:, :3], small["box_pooled_slice"])
    near(pooled.mean(dim=(1, 2, 3)), small["box_pooled_mean"])
    features = network.roi_heads.box_head(pooled)
    near(features[:, :64], small["box_head_slice"])
    near(features.mean(dim=1), small["box_head_mean"])
    logits, deltas = network.roi_heads.box_predictor(features)
    near(logits, small["cls_logits"])
    near(deltas, small["bbox_deltas"])
    near(detection.decode(boxes, deltas, BOX_WEIGHTS), small["decoded_boxes"], 1e-2)
    near(logits.softmax(dim=1), small["probs"], 1e-4)
    people = network.people(pyramid, boxes)
    near(people.boxes, small["decoded_boxes"], 1e-2)
    near(people.scores, small["probs"][:, 0], 1e-4)


def test_the_decoder_is_that_of_the_reference(network, pyramid, small):
    decoder = network.roi_heads.decoder
    for name, features in zip(LEVELS[:4], pyramid):
        near(decoder.scaled(name, features)[0, :4, :6, :7], small[f"decoder_scale_{name}_slice"])
    decoded = decoder(pyramid[:4])
    assert list(decoded.shape) == small["decoder_shape"].tolist()
    near(decoded[0, :6, :8, :9], small["decoder_slice"])
    near(decoded.mean(dim=(0, 2, 3)), small["decoder_chmean"])


def test_the_surface_is_that_of_the_reference(network, pyramid, small):
    boxes = torch.from_numpy(small["boxes_in"][:3])
    pooled = detection.roi_align(network.roi_heads.decoder(pyramid[:4]), boxes, SURFACE_BINS, 0.25)
    near(pooled[:, :4], small["dp_pooled_slice"])
    near(pooled.mean(dim=(1, 2, 3)), small["dp_pooled_mean"])
    features = network.surface_features(pyramid, boxes)
    near(features[:, :8, ::3, ::3], small["dp_head_slice"])
    near(features.mean(dim=(2, 3)), small["dp_head_chmean"])
    lowres = network.roi_heads.densepose_predictor.get_submodule("index_uv_lowres")(features)
    assert list(lowres.shape) == small["dp_lowres_shape"].tolist()
    near(lowres[:, :, ::4, ::4], small["dp_fine_lowres_sub"])
    surfaces = {"coarse_segm": "ann_index", "fine_segm": "index_uv", "u": "u", "v": "v"}
    for golden_name, name in surfaces.items():
        values = network.surface(features, name)
        assert list(values.shape) == small[f"dp_{golden_name}_shape"].tolist()
        near(values[:, :, 1::9, 2::9], small[f"dp_{golden_name}_sub"])
        near(values.mean(dim=(2, 3)), small[f"dp_{golden_name}_chmean"])


def test_the_labels_of_a_box_are_those_of_the_reference(network, pyramid, small):
    boxes = torch.from_numpy(small["boxes_in"][:3])
    features = network.surface_features(pyramid, boxes)
    parts, inside = (network.surface(features, name) for name in ("index_uv", "ann_index"))
    for number, box in enumerate(boxes):
        labels = densepose.painted(parts[number, None], inside[number, None], box, (200, 200))
        expected = small[f"dp_labels_{number}"]
        assert (cropped(labels, box, expected) == expected).mean() >= 0.999


def cropped(labels, box, expected):
    """The part of the picture that a person's labels were put into; the rest is empty."""
    x, y = int(box[0]), int(box[1])
    height, width = expected.shape
    assert np.count_nonzero(labels) == np.count_nonzero(labels[y : y + height, x : x + width])
    return labels[y : y + height, x : x + width]


@pytest.mark.parametrize("case", ["a", "c"])
def test_painted_labels_are_exactly_those_of_the_reference(case):
    expected = golden(f"compose_{case}")
    boxes = torch.from_numpy(expected["boxes"])
    rng = np.random.default_rng(int(expected["seed"]))
    parts, inside = (
        torch.from_numpy(np.kron(rng.standard_normal((len(boxes), channels, 7, 7)), np.ones((16, 16)))).float()
        for channels in (25, 2)
    )
    height, width = expected["image_hw"].tolist()
    canvases = [
        densepose.painted(parts[number, None], inside[number, None], box, (height, width))
        for number, box in enumerate(boxes)
    ]
    for number, canvas in enumerate(canvases):
        labels = expected[f"labels_{number}"] if case == "a" else np.zeros((36, 0), np.uint8)  # "c": no pixel wide
        assert np.array_equal(cropped(canvas, boxes[number], labels), labels)
    assert np.array_equal(canvases[0], picture(f"densepose/compose_{case}_label.png"))
    larger = densepose.at_size(canvases[0], (int(1.37 * height), int(1.37 * width)))
    assert np.array_equal(larger, picture(f"densepose/compose_{case}_label_resized.png"))


# The whole way


@pytest.mark.parametrize(("name", "limit"), END_TO_END)
def test_a_picture_gets_the_labels_of_the_reference(dense_pose, seen, name, limit):
    expected = golden(f"e2e_{name}_r{limit}")
    image = picture(f"schp/img_{name}.png")
    found = dense_pose.find(image, limit)
    small = densepose.shrunk(image, limit)
    assert list(small.shape) == expected["pre_bgr_shape"].tolist()
    assert np.array_equal(small[::11, ::11, ::-1], expected["pre_bgr_sub"])

    size_hw = densepose.network_size(small.shape[:2])
    people = detection.select_detections(*seen["people"], size_hw)
    assert len(people.boxes) == expected["n"]
    near(people.scores, expected["scores"], 1e-4)
    ratio = np.tile(np.array(small.shape[1::-1]) / size_hw[::-1], 2)
    near(people.boxes.numpy() * ratio, expected["boxes"], 1e-2)

    for golden_name, surface, step in (
        ("fine", "index_uv", 8),
        ("coarse", "ann_index", 4),
        ("u", "u", 16),
        ("v", "v", 16),
    ):
        with torch.inference_mode():
            values = dense_pose.network.surface(seen["surface_features"], surface)
        near(values[0, :, ::step, ::step], expected[f"{golden_name}0_sub"])

    near(found.score, expected["scores"][0], 1e-4)
    near(found.box, expected["boxes"][0] * np.tile(np.array(image.shape[1::-1]) / small.shape[1::-1], 2), 2e-2)
    labels = picture(f"densepose/e2e_{name}_r{limit}_label.png")
    assert found.labels.dtype == np.uint8
    assert found.labels.shape == image.shape[:2]
    assert (found.labels == labels).mean() >= 0.999
    assert np.abs(np.bincount(found.labels.ravel(), minlength=25) - expected["label_hist"]).sum() <= 2e-3 * labels.size


def test_a_plain_picture_shows_nobody(dense_pose):
    assert not dense_pose.labels(np.full((160, 120, 3), 127, np.uint8)).any()
    assert dense_pose.find(np.full((2, 3000, 3), 127, np.uint8)) is None


def test_a_box_that_the_borders_leave_nothing_of_is_passed_over(dense_pose, monkeypatch):
    boxes = torch.tensor([[2000.0, 0, 2100, 9], [13.33, 4, 1333, 12], [0, 0, 9, 9]])
    people = detection.Detections(boxes, torch.tensor([0.99, 0.9, 0.85]))
    monkeypatch.setattr(dense_pose.network, "people", lambda *_: people)
    found = dense_pose.find(thin_picture())
    assert found.score == pytest.approx(0.9)
    assert found.box == pytest.approx((10.24, 3, 1024, 9), abs=1e-3)
    assert not found.labels[:3].any()
    assert not found.labels[:, :10].any()


@pytest.mark.parametrize("shape", [(2, 3000, 3), (3000, 2, 3), (1, 40_000, 3), (1, 1, 3)])
def test_a_picture_of_any_shape_gets_labels_of_its_size(dense_pose, shape):
    labels = dense_pose.labels(np.full(shape, 90, np.uint8))
    assert labels.dtype == np.uint8
    assert labels.shape == shape[:2]
    assert labels.max() < 25


@pytest.mark.parametrize("hw", [(1, 1), (1, 4000), (4000, 1), (3, 100_000), (5000, 7000)])
def test_the_network_never_sees_more_than_its_limits(hw):
    height, width = densepose.network_size(hw)
    assert 1 <= min(height, width) <= 800
    assert max(height, width) <= 1333


def test_the_same_picture_gets_the_same_labels_and_is_not_changed(dense_pose):
    image = thin_picture()
    before = image.copy()
    first = dense_pose.labels(image)
    assert np.array_equal(image, before)
    image.setflags(write=False)
    assert np.array_equal(dense_pose.labels(image), first)
    assert np.array_equal(dense_pose.labels(np.ascontiguousarray(image[:, ::-1])[:, ::-1]), first)


@pytest.mark.parametrize(
    "image",
    [
        None,
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
    ],
    ids=["none", "float", "grey", "alpha", "empty", "batch"],
)
def test_what_is_no_picture_is_refused(dense_pose, image):
    with pytest.raises(ValueError, match="the picture must be"):
        dense_pose.labels(image)


def test_a_longest_side_below_one_pixel_is_refused(dense_pose):
    with pytest.raises(ValueError, match="longest_side"):
        dense_pose.labels(thin_picture(), 0)


# Weights


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (WEIGHT, np.full((2, 1024), np.nan, np.float32)),
        (WEIGHT, np.full((2, 1024), -np.inf, np.float16)),
        (WEIGHT, np.full((2, 1024), 1e300)),
        (WEIGHT, torch.full((2, 1024), torch.inf)),
        (WEIGHT, np.zeros((2, 1024), np.int64)),
        (WEIGHT, torch.zeros(2, 1024, dtype=torch.int8)),
        (WEIGHT, [[0.0] * 1024] * 2),
        (WEIGHT, np.zeros((81, 1024), np.float32)),
        (RUNNING_VAR, np.full(128, -1.0)),
        ("roi_heads.mask_head.weight", np.zeros(1, np.float32)),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_name(weights, key, value):
    with pytest.raises(WeightsError, match=key.replace(".", r"\.")):
        DensePose.from_state_dict({**weights, key: value})


@pytest.mark.parametrize("key", [WEIGHT, RUNNING_VAR])
def test_missing_weights_are_refused_by_name(weights, key):
    with pytest.raises(WeightsError, match=key.replace(".", r"\.") + " is missing"):
        DensePose.from_state_dict({name: array for name, array in weights.items() if name != key})


def test_an_error_about_weights_lists_a_few_names_only():
    with pytest.raises(WeightsError, match="and 330 more") as caught:
        DensePose.from_state_dict({})
    assert len(str(caught.value)) < 500


def test_weights_that_float16_cannot_hold_are_refused_by_name(weights):
    key = "backbone.fpn_lateral5.bias"
    with pytest.raises(WeightsError, match=r"backbone\.fpn_lateral5 .*float16"):
        DensePose.from_state_dict({**weights, key: np.full(256, 1e5)}, dtype=torch.float16)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="float64"):
        DensePose.from_state_dict({}, dtype=torch.float64)


def test_tensors_of_any_floating_dtype_and_published_constants_are_taken_and_copied(weights, dense_pose):
    image = thin_picture()
    constants = {
        "pixel_mean": np.zeros((3, 1, 1), np.float32),
        "pixel_std": np.ones((3, 1, 1), np.float32),
        "proposal_generator.anchor_generator.cell_anchors.4": np.zeros((3, 4), np.float32),
        "backbone.bottom_up.stem.conv1.norm.num_batches_tracked": np.zeros((), np.int64),
    }
    tensors = {key: torch.tensor(array) for key, array in weights.items()}
    tensors[WEIGHT] = tensors[WEIGHT].double()
    before = tensors[RUNNING_VAR].clone()
    loaded = DensePose.from_state_dict({**constants, **tensors})
    assert torch.equal(tensors[RUNNING_VAR], before)
    for tensor in tensors.values():
        tensor.zero_()
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    assert np.array_equal(loaded.labels(image), dense_pose.labels(image))


def test_half_precision_computes_boxes_in_float32(weights):
    halved = DensePose.from_state_dict(weights, dtype=torch.bfloat16)
    image = thin_picture()
    assert halved.labels(image).shape == image.shape[:2]
    with torch.inference_mode():
        pyramid = halved.network.pyramid(densepose.network_input(image[:, :64], CPU).bfloat16())
        people = halved.network.people(pyramid, torch.tensor([[0.0, 0, 30, 9]]))
        surface = halved.network.surface(halved.network.surface_features(pyramid, people.boxes), "u")
    assert {features.dtype for features in pyramid} == {torch.bfloat16}
    assert people.boxes.dtype == people.scores.dtype == surface.dtype == torch.float32


def test_numbers_beyond_the_dtype_are_an_error_and_not_an_empty_picture(weights):
    """1e38 is a number, and its sum over 256 channels is none."""
    key = "backbone.fpn_output2.bias"
    with pytest.raises(BadPicture, match="not finite"):
        DensePose.from_state_dict({**weights, key: np.full(256, 1e38)}).labels(thin_picture())
