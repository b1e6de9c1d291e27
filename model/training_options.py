"""What a training of the try-on model is told; outside of model.catvton, whose import loads torch."""

from __future__ import annotations

import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIGURES = "figures"
FROM_SCRATCH = "from-scratch"
ATTENTION_ONLY = "attention-only"
ALL_WEIGHTS = "all-weights"
METHODS = (FROM_SCRATCH, ATTENTION_ONLY, ALL_WEIGHTS)
ADAMW, MUON = "adamw", "muon"
OPTIMIZERS = (ADAMW, MUON)
DTYPES = ("float32", "bfloat16")  # of the forward pass
PREDICTION_TYPES = ("epsilon", "v_prediction")
DEVICES = ("auto", "cpu", "cuda")
PAPERS = {  # for weights that know the task already; CatVTON and, for dream, DREAM (arXiv 2312.00210)
    "learning_rate": 1e-5,
    "beta2": 0.999,
    "decay_share": 0.0,
    "ema_decay": 0.9999,
    "noisy_share": 0.0,
    "mask_weight": 1.0,
    "garment_weight": 1.0,
    "dream": 10.0,
}


class TrainingError(Exception):
    """A training cannot start or go on; the text names the option or the file."""


@dataclass(frozen=True)
class TrainingOptions:
    """All that a result depends on; a resumed run must be given the same.

    The defaults train a small model from nothing; `of_method` has those for each method.

    Attributes:
        data: "figures", or the path of a manifest: CSV, or JSON Lines where its name ends in .jsonl.
        pairs: of figures to draw; a manifest is taken whole.
        width: of the pictures, px.
        height: of the pictures, px.
        method: "from-scratch" trains every weight of a new UNet, "attention-only" the self-attention of a published
            one, "all-weights" all of a published one.
        weights: directory in the published layout, for the methods that start from one.
        variant: which of their self-attentions to start from.
        vae: folder of an `AutoencoderKL` (config.json and safetensors), for "from-scratch".
        unet: JSON file with the configuration of the UNet, for "from-scratch"; "" takes the small one.
        prediction_type: "epsilon" or "v_prediction", for "from-scratch"; published weights say theirs.
        steps: of the optimiser.
        batch: pairs in a step.
        optimizer: "adamw", or "muon": matrices by Muon, the rest by AdamW.
        learning_rate: of AdamW, after the warm-up.
        muon_learning_rate: of Muon, likewise.
        warmup_steps: of linear rise.
        decay_share: last part of the steps, in which the learning rate falls linearly.
        beta2: of AdamW.
        weight_decay: of either.
        clip_norm: largest norm of the gradient.
        ema_decay: of the moving average of the weights, which is what is exported; smaller in the first steps.
        condition_dropout: share of the pairs whose garment is hidden, for guidance.
        noisy_share: of the timesteps, drawn as the root of a uniform number: more noise.
        mask_weight: of the loss where cloth is repainted; the rest of the person has 1.
        garment_weight: of the loss in the garment's half.
        dream: power of DREAM's scale, larger is weaker; negative turns it off, on it costs a second forward pass.
        dtype: of the forward pass, "float32" or "bfloat16"; the weights are float32.
        seed: of the first weights, the order of the pairs and all noise.
    """

    data: str = FIGURES
    pairs: int = 12_000
    width: int = 192
    height: int = 256
    method: str = FROM_SCRATCH
    weights: str = ""
    variant: str = "mix"
    vae: str = ""
    unet: str = ""
    prediction_type: str = "v_prediction"
    steps: int = 10_000
    batch: int = 16
    optimizer: str = ADAMW
    learning_rate: float = 1e-3
    muon_learning_rate: float = 0.02
    warmup_steps: int = 100
    decay_share: float = 0.4
    beta2: float = 0.99
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    ema_decay: float = 0.998
    condition_dropout: float = 0.1
    noisy_share: float = 0.3
    mask_weight: float = 2.0
    garment_weight: float = 0.3
    dream: float = -1.0
    dtype: str = "bfloat16"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise TrainingError, naming the option, for a value that no training can have."""
        for name, choices in _CHOICES.items():
            _refuse_unless(getattr(self, name) in choices, f"{name} must be one of {', '.join(choices)}")
        for name in ("pairs", "width", "height", "steps", "batch"):
            _refuse_unless(getattr(self, name) >= 1, f"{name} must be at least 1")
        for name in ("decay_share", "ema_decay", "condition_dropout", "noisy_share"):
            _refuse_unless(0 <= getattr(self, name) <= 1, f"{name} must be from 0 to 1")
        for name in ("learning_rate", "muon_learning_rate"):
            _refuse_unless(getattr(self, name) > 0, f"{name} must be above 0")
        _refuse_unless(self.warmup_steps >= 0, "warmup_steps must be at least 0")
        if self.method == FROM_SCRATCH:
            _refuse_unless(self.vae, "training from scratch needs vae, the folder of an autoencoder")
        else:
            _refuse_unless(self.weights, f"{self.method} training needs weights, a directory of published weights")

    @classmethod
    def of_method(cls, method: str, **given: Any) -> TrainingOptions:  # noqa: ANN401 - each field has its own type
        """The defaults of a method, with what was given in their place.

        Raises:
            TrainingError: an unknown method, or a value that no training can have.
        """
        defaults = PAPERS if method == ATTENTION_ONLY else {}
        return cls(**{**defaults, **given, "method": method})


@dataclass(frozen=True)
class Course:
    """How a training runs, without an effect on what it comes to.

    Attributes:
        output: folder of the run.
        resume: go on from its newest checkpoint.
        save_every: steps between two checkpoints.
        sample_every: steps between two sheets; 0 for none.
        device: "auto", "cpu" or "cuda"; "auto" takes CUDA where there is one.
        readers: processes that draw or read the pictures, 1 or 2.
        latents: folder of the encoded pairs; None is `latents` in output.
    """

    output: Path
    resume: bool = False
    save_every: int = 500
    sample_every: int = 1000
    device: str = "auto"
    readers: int = 2
    latents: Path | None = None


def parse(texts: Mapping[str, str]) -> dict[str, Any]:
    """Options from their names and texts, e.g. of hyperparameters: {"steps": "100"} is {"steps": 100}.

    Raises:
        TrainingError: an unknown name, or a text that is not of the option's type.
    """
    types = typing.get_type_hints(TrainingOptions)
    values: dict[str, Any] = {}
    for name, text in texts.items():
        if name not in types:
            raise TrainingError(f"{name} is no option of the training; there are: {', '.join(types)}")
        try:
            values[name] = types[name](text)
        except ValueError as exc:
            raise TrainingError(f"{name} must be {_CALLED[types[name]]}, not {text!r}") from exc
    return values


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) in px of a text such as 192x256.

    Raises:
        TrainingError: it is of another form.
    """
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text)
    if not found:
        raise TrainingError(f"size must be WIDTHxHEIGHT in pixels, e.g. 192x256, not {text!r}")
    return int(found.group(1)), int(found.group(2))


_CHOICES = {"method": METHODS, "optimizer": OPTIMIZERS, "dtype": DTYPES, "prediction_type": PREDICTION_TYPES}
_CALLED = {int: "a whole number", float: "a number", str: "text"}


def _refuse_unless(fits: object, sentence: str) -> None:
    if not fits:
        raise TrainingError(sentence)
