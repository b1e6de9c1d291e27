"""Trains the figure parser on drawings: `vton train --part parser`.

Every step draws its own pictures from numbers that follow from the step, so that a run that was killed and resumed
sees what an uninterrupted one sees.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from model.embedded.augmentation import Sample, augmented, without_person
from model.embedded.body import sample_figure
from model.embedded.figures import TRAIN_SEEDS, Drawing, draw_person, masks
from model.embedded.parser import MASKS, FigureParser, output_names, to_tensor
from model.embedded.people import LABELS
from model.embedded.wardrobe import sample_outfit
from model.weights import WeightsError

BATCH = 16
PEAK_RATE = 5e-3
WARM_UP_SHARE = 0.06  # of all steps
WEIGHT_DECAY = 1e-2
AVERAGE_DECAY = 0.98  # of the weights that are kept; they follow the last 50 steps
EMPTY_SHARE = 0.06  # of the pictures show nobody
MASK_WEIGHT = 2.0  # of the masks' loss against the labels'
SAVE_EVERY = 50  # steps
LOG_EVERY = 10  # steps

WEIGHTS_NAME = "parser.safetensors"
STATE_NAME = "parser_state.safetensors"

_LOG = logging.getLogger("vton.train")
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Training:
    """What one run changes from step to step; all of it is kept in the state file."""

    network: FigureParser
    average: FigureParser
    optimizer: torch.optim.AdamW


def run(output: Path, steps: int, seed: int, resume: bool) -> None:
    """Train the parser and write its weights.

    Args:
        output: directory for `parser.safetensors` (float16) and, while it runs, `parser_state.safetensors`.
        steps: of 16 pictures each; the learning rate falls to 0 at the last one, so it cannot be raised on resuming.
        seed: of the first weights and of which pictures are drawn.
        resume: go on from the state in `output`.
    Raises:
        ValueError: the state is of another run.
        WeightsError: there is no state that could be read.
    """
    output.mkdir(parents=True, exist_ok=True)
    state = output / STATE_NAME
    training = start(seed)
    first = restore(training, state, steps=steps, seed=seed) if resume else 0
    began = time.monotonic()
    for step in range(first, steps):
        loss = advance(training, step, steps=steps, seed=seed)
        if step % LOG_EVERY == 0 or step == steps - 1:
            elapsed = round(time.monotonic() - began, 1)
            _LOG.info("train_step", extra={"part": "parser", "step": step, "loss": loss, "elapsed_s": elapsed})
        if (step + 1) % SAVE_EVERY == 0:
            save_state(training, state, done=step + 1, steps=steps, seed=seed)
    save_weights(training.average, output / WEIGHTS_NAME, steps=steps, seed=seed)
    state.unlink(missing_ok=True)


def start(seed: int) -> Training:
    """Fresh weights; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FigureParser()
    average = FigureParser()
    average.load_state_dict(network.state_dict())
    network.train()
    for weight in network.parameters():
        if weight.ndim == 4:  # a third faster on a CPU
            weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK_RATE, weight_decay=WEIGHT_DECAY)
    return Training(network, average.requires_grad_(False), optimizer)


def advance(training: Training, step: int, *, steps: int, seed: int) -> float:
    """Take one step; the loss before it."""
    pictures, labels, wanted = draw_batch(step, seed=seed)
    for group in training.optimizer.param_groups:
        group["lr"] = PEAK_RATE * rate(step, steps)
    with torch.autocast("cpu", torch.bfloat16):
        logits = training.network(pictures.contiguous(memory_format=torch.channels_last))
    loss = parsing_loss(logits.float(), labels, wanted)
    training.optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(training.network.parameters(), 1.0)
    training.optimizer.step()
    decay = min(AVERAGE_DECAY, (1 + step) / (10 + step))
    current = training.network.state_dict()
    for name, kept in training.average.state_dict().items():
        if kept.is_floating_point():
            kept.lerp_(current[name].contiguous(), 1 - decay)
    return float(loss.detach())


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate: a short linear rise, then half a cosine down to 0."""
    rise = max(1.0, WARM_UP_SHARE * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    return float(0.5 + 0.5 * np.cos(np.pi * (step - rise) / max(1.0, steps - rise)))


def parsing_loss(logits: torch.Tensor, labels: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the labels, plus that of each mask and the share of it that is missed (Dice).

    Args:
        logits: (B, 15, H, W).
        labels: (B, H, W) int64.
        wanted: (B, 4, H, W) in [0, 1].
    """
    named = functional.cross_entropy(logits[:, : len(LABELS)], labels)
    masked = logits[:, len(LABELS) :]
    certain = masked.sigmoid()
    # Over the batch, not per picture: a picture without a person has nothing to overlap with.
    overlap = 2 * (certain * wanted).sum((0, 2, 3)) / (certain + wanted).sum((0, 2, 3)).clamp_min(1)
    return named + MASK_WEIGHT * (functional.binary_cross_entropy_with_logits(masked, wanted) + 1 - overlap.mean())


def draw_batch(step: int, *, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The pictures of a step: (B, 3, H, W) in [-1, 1], labels (B, H, W) int64, masks (B, 4, H, W) float32."""
    samples = [draw_sample(step * BATCH + index, seed=seed) for index in range(BATCH)]
    labels = torch.from_numpy(np.stack([sample.labels for sample in samples])).long()
    wanted = torch.from_numpy(np.stack([sample.masks for sample in samples])).permute(0, 3, 1, 2).float().div(255)
    return to_tensor(np.stack([sample.image for sample in samples])), labels, wanted


def draw_sample(number: int, *, seed: int) -> Sample:
    """The picture of that number in the run of that seed."""
    draw = np.random.default_rng((seed, number))
    person = drawn_person(TRAIN_SEEDS[int(draw.integers(len(TRAIN_SEEDS)))])
    if draw.random() < EMPTY_SHARE:
        nothing = np.zeros_like(person.labels)
        empty = without_person(draw, person.figure)
        return Sample(empty, nothing, np.stack([nothing] * len(MASKS), axis=-1))
    areas = masks(person)
    return augmented(draw, Sample(person.image, person.labels, np.stack([areas[name] for name in MASKS], axis=-1)))


def drawn_person(seed: int) -> Drawing:
    """The figure of a seed, from TRAIN_SEEDS or TEST_SEEDS, in an outfit at 192x256."""
    draw = np.random.default_rng(seed)
    return draw_person(sample_figure(draw), sample_outfit(draw))


def save_weights(network: FigureParser, path: Path, *, steps: int, seed: int) -> None:
    """Write the weights in float16 and how they were made, in one piece: a reader sees the old file or the new one."""
    tensors = {name: part.half().contiguous() for name, part in _floats(network).items()}
    _write(tensors, path, {"outputs": output_names(), "training": json.dumps({"steps": steps, "seed": seed})})


def save_state(training: Training, path: Path, *, done: int, steps: int, seed: int) -> None:
    """Write all that `restore` needs, after `done` steps."""
    tensors = {f"network.{name}": part for name, part in _floats(training.network).items()}
    tensors.update({f"average.{name}": part for name, part in _floats(training.average).items()})
    for name, weight in training.network.named_parameters():
        moments = training.optimizer.state[weight]
        tensors.update({f"{moment}.{name}": moments[moment] for moment in _MOMENTS})
    description = json.dumps({"done": done, "steps": steps, "seed": seed})
    _write({key: part.contiguous() for key, part in tensors.items()}, path, {"run": description})


def restore(training: Training, path: Path, *, steps: int, seed: int) -> int:
    """Put the training where `save_state` left it; how many steps are done.

    Raises:
        ValueError: the state is of a run of other steps or another seed.
        WeightsError: the file is missing, damaged or does not fit.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            described = json.loads((stored.metadata() or {}).get("run", "{}"))
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as exc:
        raise WeightsError(f"{path} cannot be read as the state of a training: {exc}") from exc
    if (described.get("steps"), described.get("seed")) != (steps, seed):
        raise ValueError(f"{path} is of another run: {described}")
    try:
        for part, network in (("network", training.network), ("average", training.average)):
            for name, target in _floats(network).items():
                target.copy_(tensors[f"{part}.{name}"])
        for name, weight in training.network.named_parameters():
            training.optimizer.state[weight] = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
    except (KeyError, RuntimeError) as exc:
        raise WeightsError(f"{path} does not fit: {exc}") from exc
    return int(described["done"])


def _floats(network: FigureParser) -> dict[str, torch.Tensor]:
    """Every weight and running mean; not the counters of batches."""
    return {name: part.detach() for name, part in network.state_dict().items() if part.is_floating_point()}


def _write(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    unfinished = path.with_suffix(".unfinished")
    save_file(tensors, unfinished, metadata=metadata)
    unfinished.replace(path)
