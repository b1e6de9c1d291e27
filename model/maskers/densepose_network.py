"""The network of DensePose: a ResNet-50 with a feature pyramid, a two-stage detector and a dense pose head.

Every module bears the name that the published weights give it (densepose_rcnn_R_50_FPN_s1x), so that they load
strictly. Maps are BCHW; boxes are (N, 4) float32 px of the network's input. The fully connected layers, and all that is
computed of boxes, are float32 whatever the dtype of the convolutions.

Source: DensePose (arXiv 1802.00434), its decoder Panoptic FPN (arXiv 1901.02446), FPN (arXiv 1612.03144).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from model.maskers.densepose_backbone import WIDTH, Convolution, FeaturePyramid, RectifiedConvolution
from model.maskers.detection import Detections, anchors, decode, pool_levels, roi_align

STRIDES_PX = (4, 8, 16, 32, 64)  # of p2 to p6
ANCHORS_PX = (32, 64, 128, 256, 512)  # one size a level
ANCHORS_PER_CELL = 3
PROPOSAL_WEIGHTS = (1.0, 1.0, 1.0, 1.0)  # of the four deltas, here and below
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
BOX_BINS = 7
SURFACE_BINS = 28
HEAD_WIDTH = 512
SURFACE_CHANNELS = {"ann_index": 2, "index_uv": 25, "u": 25, "v": 25}  # inside or out, part, and where on the part


class DensePoseNetwork(nn.Module):
    """All modules of the published file; its methods are the steps from pixels to the body's surface."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = FeaturePyramid()
        self.proposal_generator = nn.ModuleDict({"rpn_head": _ProposalHead()})
        self.roi_heads = _RoiHeads()

    def fold_norms(self) -> None:
        """Merge every frozen norm into its convolution, which then gives the same at less work."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.fold_norm()

    def pyramid(self, pixels: Tensor) -> list[Tensor]:
        """p2 to p6.

        Args:
            pixels: (1, 3, H, W) BGR less its mean, sides multiples of 32, in the dtype of the convolutions.
        Returns:
            Five maps (1, 256, H/4, W/4) to (1, 256, H/64, W/64), rounded up.
        """
        maps: list[Tensor] = self.backbone(pixels)
        return maps

    def proposals(self, pyramid: Sequence[Tensor]) -> list[Detections]:
        """For each level its (H W 3, 4) boxes and their logits, before any selection."""
        head = self.proposal_generator["rpn_head"]
        levels = []
        for features, size_px, stride_px in zip(pyramid, ANCHORS_PX, STRIDES_PX):
            logits, deltas = head(features)
            _, _, height, width = features.shape
            boxes = decode(
                anchors(size_px, stride_px, (height, width), features.device),
                deltas[0].reshape(ANCHORS_PER_CELL, 4, -1).permute(2, 0, 1).reshape(-1, 4),
                PROPOSAL_WEIGHTS,
            )
            levels.append(Detections(boxes, logits[0].permute(1, 2, 0).reshape(-1)))
        return levels

    def people(self, pyramid: Sequence[Tensor], proposals: Tensor) -> Detections:
        """(N, 4) boxes moved onto the people in them, and (N,) probabilities that each shows one; same order."""
        heads = self.roi_heads
        pooled = pool_levels(pyramid[:4], proposals, BOX_BINS)
        logits, deltas = heads.box_predictor(heads.box_head(pooled))
        return Detections(decode(proposals, deltas, BOX_WEIGHTS), logits.softmax(dim=1)[:, 0])

    def surface_features(self, pyramid: Sequence[Tensor], boxes: Tensor) -> Tensor:
        """What `surface` reads: (N, 512, 28, 28), a map for each box."""
        heads = self.roi_heads
        pooled = roi_align(heads.decoder(pyramid[:4]), boxes, SURFACE_BINS, 1 / STRIDES_PX[0])
        features: Tensor = heads.densepose_head(pooled.to(pyramid[0].dtype))
        return features

    def surface(self, features: Tensor, name: str) -> Tensor:
        """One of SURFACE_CHANNELS for each box: (N, C, 112, 112) float32, logits or coordinates."""
        values: Tensor = self.roi_heads.densepose_predictor(features, name)
        return values


class _ProposalHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = Convolution(WIDTH, WIDTH, 3)
        self.objectness_logits = Convolution(WIDTH, ANCHORS_PER_CELL, 1)
        self.anchor_deltas = Convolution(WIDTH, 4 * ANCHORS_PER_CELL, 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(1, 256, H, W) to float32 logits (1, 3, H, W) and deltas (1, 12, H, W), four for each anchor."""
        shared = self.conv(features).relu_()
        return self.objectness_logits(shared).float(), self.anchor_deltas(shared).float()


class _RoiHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.box_head = _BoxHead()
        self.box_predictor = _BoxPredictor()
        self.decoder = _Decoder()
        self.densepose_head = _SurfaceHead()
        self.densepose_predictor = _SurfacePredictor()


class _BoxHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(WIDTH * BOX_BINS**2, 1024)
        self.fc2 = nn.Linear(1024, 1024)

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, 256, 7, 7) to (N, 1024)."""
        return functional.relu_(self.fc2(functional.relu_(self.fc1(pooled.flatten(1)))))


class _BoxPredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_score = nn.Linear(1024, 2)
        self.bbox_pred = nn.Linear(1024, 4)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 1024) to logits (N, 2) of person and background, and deltas (N, 4)."""
        return self.cls_score(features), self.bbox_pred(features)


class _Decoder(nn.Module):
    """p2 to p5 summed at the size of p2."""

    def __init__(self) -> None:
        super().__init__()
        for level, convolutions in (("p2", 1), ("p3", 1), ("p4", 2), ("p5", 3)):
            steps: list[nn.Module] = []
            for _ in range(convolutions):
                steps += [RectifiedConvolution(WIDTH, WIDTH, 3), nn.Upsample(scale_factor=2.0, mode="bilinear")]
            self.add_module(level, nn.Sequential(*(steps[:1] if level == "p2" else steps)))
        self.predictor = Convolution(WIDTH, WIDTH, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps (1, 256, H/4, W/4) to (1, 256, H/32, W/32) to one (1, 256, H/4, W/4)."""
        summed = self.scaled("p2", maps[0])
        for level, features in zip(("p3", "p4", "p5"), maps[1:]):
            summed += self.scaled(level, features)
        result: Tensor = self.predictor(summed)
        return result

    def scaled(self, level: str, features: Tensor) -> Tensor:
        """One level at the size of p2."""
        result: Tensor = self.get_submodule(level)(features)
        return result


class _SurfaceHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for number in range(1, 9):
            taken = WIDTH if number == 1 else HEAD_WIDTH
            self.add_module(f"body_conv_fcn{number}", RectifiedConvolution(taken, HEAD_WIDTH, 3))

    def forward(self, pooled: Tensor) -> Tensor:
        """(N, 256, 28, 28) to (N, 512, 28, 28)."""
        for step in self.children():
            pooled = step(pooled)
        return pooled


class _SurfacePredictor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, channels in SURFACE_CHANNELS.items():
            self.add_module(f"{name}_lowres", nn.ConvTranspose2d(HEAD_WIDTH, channels, 4, stride=2, padding=1))

    def forward(self, features: Tensor, name: str) -> Tensor:
        """(N, 512, 28, 28) to (N, C, 112, 112) float32."""
        coarse = self.get_submodule(f"{name}_lowres")(features).float()  # (N, C, 56, 56)
        fine: Tensor = functional.interpolate(coarse, scale_factor=2.0, mode="bilinear")
        return fine
