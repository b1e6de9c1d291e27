from __future__ import annotations

import numpy as np
import pytest
import torch
from masking_recipe import GOLDENS

from model.maskers import detection
from model.maskers.densepose_network import ANCHORS_PX, BOX_WEIGHTS, PROPOSAL_WEIGHTS, STRIDES_PX
from model.maskers.detection import Detections

CPU = torch.device("cpu")


def golden(name):
    """Numbers of the reference implementation."""
    arrays = np.load(GOLDENS / "densepose" / f"{name}.npz")
    return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def boxes_of(rng, count, size_px=200.0):
    corners = rng.uniform(0, size_px, (count, 2))
    return torch.from_numpy(np.hstack([corners, corners + rng.uniform(0, size_px / 2, (count, 2))])).float()


def naive_nms(boxes, scores, threshold):
    waiting = sorted(range(len(boxes)), key=lambda row: (-float(scores[row]), row))
    kept = []
    while waiting:
        best, *waiting = waiting
        kept.append(best)
        waiting = [
            row for row in waiting if not detection.iou(boxes[best : best + 1], boxes[row : row + 1]) > threshold
        ]
    return kept


def naive_sample(plane, y, x):
    """One bilinear sample of an (H, W) map, pixel by pixel."""
    height, width = plane.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    value = 0.0
    y, x = min(max(y, 0.0), height - 1), min(max(x, 0.0), width - 1)
    for row in {int(y), min(int(y) + 1, height - 1)}:
        for column in {int(x), min(int(x) + 1, width - 1)}:
            value += float(plane[row, column]) * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def test_boxes_are_decoded_as_by_the_reference():
    expected = golden("box_decode_a")
    for name, weights in (("rpn_w1", PROPOSAL_WEIGHTS), ("roi_w10_10_5_5", BOX_WEIGHTS)):
        decoded = detection.decode(expected["boxes"], expected["deltas"], weights)
        torch.testing.assert_close(decoded, expected[name], rtol=1e-5, atol=1e-4)


def test_boxes_go_to_the_level_of_the_reference():
    expected = golden("level_assign")
    assert torch.equal(detection.assign_levels(expected["boxes"]), expected["levels"])


@pytest.mark.parametrize("level", range(5))
def test_anchors_are_those_of_the_reference(level):
    expected = golden("small_a")
    _, _, height, width = expected[f"p{level + 2}_shape"].tolist()
    anchors = detection.anchors(ANCHORS_PX[level], STRIDES_PX[level], (height, width), CPU)
    assert anchors.dtype == torch.float32
    assert len(anchors) == expected[f"anchors_p{level + 2}_n"]
    torch.testing.assert_close(anchors[:6], expected[f"anchors_p{level + 2}_first6"], rtol=0, atol=1e-4)
    torch.testing.assert_close(anchors[-6:], expected[f"anchors_p{level + 2}_last6"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "threshold"), [("5", 0.5), ("7", 0.7)])
@pytest.mark.parametrize("batched", [False, True])
def test_suppression_keeps_the_boxes_of_the_reference(name, threshold, batched):
    expected = golden("nms_a")
    boxes, scores, groups = expected["boxes"], expected["scores"], expected["idxs"]
    if batched:
        kept, wanted = detection.batched_nms(boxes, scores, groups, threshold), expected[f"batched_nms_{name}"]
    else:
        kept, wanted = detection.nms(boxes, scores, threshold), expected[f"nms_{name}"]
    assert sorted(kept.tolist()) == sorted(wanted.tolist())
    assert torch.equal(scores[kept], scores[wanted])


def test_detections_are_those_of_the_reference():
    expected = golden("nms_a")
    boxes, probabilities = expected["frcnn_boxes_in"], expected["frcnn_probs"]
    height, width = expected["frcnn_image_hw"].tolist()
    size_hw = (height, width)
    found = detection.select_detections(boxes, probabilities[:, 0], size_hw, min_score=0.3, total=12)
    torch.testing.assert_close(found.boxes, expected["frcnn_out_boxes"], rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scores, expected["frcnn_out_scores"], rtol=0, atol=1e-4)
    finite = boxes.isfinite().all(1) & probabilities.isfinite().all(1)
    rows = expected["frcnn_kept_rows_after_dropping_nonfinite"]
    assert torch.equal(found.boxes, detection.clip(boxes[finite][rows], size_hw))
    assert not detection.is_filled(found.boxes).all()


def test_proposals_are_those_of_the_reference():
    expected = golden("nms_a")
    height, width = expected["frcnn_image_hw"].tolist()
    split = int(expected["rpn_split"])
    boxes, logits = expected["boxes"], expected["rpn_logits"].clone()
    assert len(set(logits[10:13].tolist())) == 1
    logits[10:13] += torch.tensor([0, 1e-6, 2e-6])  # the reference happened to rank these in this order
    levels = [Detections(boxes[:split], logits[:split]), Detections(boxes[split:], logits[split:])]
    pre, post = int(expected["rpn_pre"]), int(expected["rpn_post"])
    found = detection.select_proposals(levels, (height, width), per_level=pre, total=post)
    torch.testing.assert_close(found.boxes, expected["rpn_out_boxes"], rtol=0, atol=1e-2)
    torch.testing.assert_close(found.scores, expected["rpn_out_logits"], rtol=0, atol=1e-4)


def test_proposals_without_a_finite_box_or_any_area_are_dropped():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, torch.nan, 10], [50, 50, 60, 60], [20, 20, 30, torch.inf]])
    found = detection.select_proposals([Detections(boxes, torch.tensor([1.0, 2, 3, torch.nan]))], (40, 40))
    assert found.boxes.tolist() == [[0, 0, 10, 10]]


@pytest.mark.parametrize("rows", [1, 7, 1024])
def test_suppression_does_not_depend_on_its_blocks(rows, monkeypatch):
    monkeypatch.setattr(detection, "NMS_ROWS", rows)
    rng = np.random.default_rng(5)
    boxes, scores = boxes_of(rng, 60), torch.from_numpy(rng.integers(0, 9, 60) / 10).float()
    kept = detection.nms(boxes, scores, 0.3)
    assert 0 < len(kept) < 60
    assert kept.tolist() == naive_nms(boxes, scores, 0.3)


def test_a_box_exactly_at_the_threshold_stays_and_the_first_of_equals_wins():
    boxes = torch.tensor([[0.0, 0, 2, 2], [0, 0, 2, 1], [0, 0, 2, 2], [0, 0, 2, 1.5]])
    scores = torch.tensor([0.5, 0.5, 0.5, 0.5])
    assert detection.nms(boxes, scores, 0.5).tolist() == [0, 1]


def test_an_empty_box_suppresses_no_other():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [0, 0, 10, 10]])
    assert detection.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 1, 2]


def test_boxes_of_different_groups_do_not_suppress_each_other():
    boxes = torch.tensor([[0.0, 0, 10, 10]]).repeat(4, 1)
    scores, groups = torch.tensor([0.1, 0.4, 0.3, 0.2]), torch.tensor([0, 7, 0, 7])
    assert detection.batched_nms(boxes, scores, groups, 0.5).tolist() == [1, 2]


def test_nothing_comes_of_nothing():
    none, no_scores = torch.empty(0, 4), torch.empty(0)
    assert detection.nms(none, no_scores, 0.5).tolist() == []
    assert len(detection.select_proposals([Detections(none, no_scores)] * 2, (9, 9)).boxes) == 0
    assert len(detection.select_detections(none, no_scores, (9, 9)).boxes) == 0
    assert detection.pool_levels([torch.zeros(1, 3, 4, 4)] * 4, none, 7).shape == (0, 3, 7, 7)


def test_a_thousand_boxes_a_level_are_selected_without_a_matrix_of_all_pairs():
    """5,000 boxes of which most stay: the slowest case."""
    rng = np.random.default_rng(8)
    boxes = boxes_of(rng, 5000, 4000.0)
    scores = torch.from_numpy(rng.standard_normal(5000)).float()
    levels = [Detections(boxes[start : start + 1000], scores[start : start + 1000]) for start in range(0, 5000, 1000)]
    found = detection.select_proposals(levels, (4000, 4000))
    assert found.boxes.shape == (1000, 4)
    assert (found.scores.diff() <= 0).all()


@pytest.mark.parametrize("bins", [7, 28])
def test_pooling_is_that_of_the_reference(bins):
    expected = golden("roi_align_a")
    shape = tuple(expected["feat_shape"].tolist())
    features = torch.from_numpy(np.random.default_rng(int(expected["seed"])).standard_normal(shape)).float()
    rois, scale = expected["rois"], float(expected["spatial_scale"])
    pooled = torch.cat([detection.roi_align(features[int(roi[0])][None], roi[None, 1:], bins, scale) for roi in rois])
    torch.testing.assert_close(pooled, expected[f"out{bins}_sr2_unaligned"], rtol=0, atol=1e-5)
    if bins == 7:
        wrong = expected["out7_sr2_aligned_WRONG_for_this_model"]
        assert (pooled - wrong).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(1, 2, 5, 6), (1, 2, 1, 1), (1, 2, 1, 9)])
def test_pooling_reads_every_sample_where_it_should(shape):
    rng = np.random.default_rng(3)
    features = torch.from_numpy(rng.standard_normal(shape)).float()
    boxes = torch.tensor([[-9.0, -5, 30, 40], [0, 0, 0, 0], [3, 7, 90, 9], [23.5, 19, 24, 20], [200, 0, 210, 9]])
    pooled = detection.roi_align(features, boxes, 3, 0.25)
    for box, values in zip((boxes * 0.25).tolist(), pooled):
        height, width = max(box[3] - box[1], 1), max(box[2] - box[0], 1)
        for row, column in np.ndindex(3, 3):
            samples = [
                naive_sample(features[0, 1], box[1] + (row + dy) * height / 3, box[0] + (column + dx) * width / 3)
                for dy in (0.25, 0.75)
                for dx in (0.25, 0.75)
            ]
            assert float(values[1, row, column]) == pytest.approx(np.mean(samples), abs=1e-5)


def test_pooling_is_float32_whatever_the_dtype_and_layout_of_the_map():
    rng = np.random.default_rng(4)
    features = torch.from_numpy(rng.standard_normal((1, 8, 12, 10))).half()
    boxes = boxes_of(rng, 5, 40.0)
    pooled = detection.roi_align(features, boxes, 7, 0.25)
    assert pooled.dtype == torch.float32
    last = features.float().contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(pooled, detection.roi_align(last, boxes, 7, 0.25), rtol=0, atol=1e-6)


def test_each_box_is_pooled_from_its_own_level():
    maps = [torch.full((1, 2, 64 >> level, 64 >> level), float(level)) for level in range(4)]
    boxes = torch.tensor([[0.0, 0, 200, 250], [0, 0, 20, 30], [0, 0, 255, 255], [0, 0, 120, 130]])
    pooled = detection.pool_levels(maps, boxes, 7)
    assert pooled.mean(dim=(1, 2, 3)).tolist() == detection.assign_levels(boxes).tolist() == [1, 0, 2, 1]


def test_nothing_given_is_changed():
    rng = np.random.default_rng(6)
    boxes, scores = boxes_of(rng, 20), torch.from_numpy(rng.uniform(0.5, 1, 20)).float()
    deltas, features = torch.ones(20, 4), torch.ones(1, 2, 8, 8)
    given = [boxes, scores, deltas, features]
    before = [tensor.clone() for tensor in given]
    detection.decode(boxes, deltas, BOX_WEIGHTS)
    detection.select_proposals([Detections(boxes, scores)], (50, 50))
    detection.select_detections(boxes, scores, (50, 50))
    detection.roi_align(features, boxes, 7, 0.25)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before))
