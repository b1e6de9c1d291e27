"""Checkpoints of a training: everything that the next step depends on, as safetensors and JSON."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from model.catvton.optimizer import moments_of
from model.training_options import TrainingError, TrainingOptions

TENSOR_FILE = "state.safetensors"
FACTS_FILE = "state.json"
LOG_FILE = "loss.jsonl"

_FOLDER = "checkpoints"
_PREFIX = "step-"


@dataclass
class TrainingState:
    """What changes from step to step.

    Attributes:
        step: how many steps are done.
        weights: name -> trained parameter, float32.
        average: name -> moving average of that parameter, float32, same device.
        optimizer: of `build_optimizer`, or accelerate's wrapper of one.
    """

    step: int
    weights: dict[str, torch.nn.Parameter]
    average: dict[str, torch.Tensor]
    optimizer: Any


def save_state(output: Path, state: TrainingState, options: TrainingOptions) -> None:
    """Write a checkpoint; it appears whole, and then the older ones go."""
    target = output / _FOLDER / f"{_PREFIX}{state.step:08d}"
    if target.is_dir():
        return
    fresh = output / _FOLDER / "unfinished"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(_tensors(state, options), fresh / TENSOR_FILE)
    facts = {"step": state.step, "options": dataclasses.asdict(options)}
    (fresh / FACTS_FILE).write_text(json.dumps(facts, indent=2), encoding="utf-8")
    fresh.rename(target)
    for older in _checkpoints(output)[:-1]:
        shutil.rmtree(older)


def has_state(output: Path) -> bool:
    """Whether a folder holds a checkpoint."""
    return bool(_checkpoints(output))


def load_state(output: Path, state: TrainingState, options: TrainingOptions) -> None:
    """Put the newest checkpoint of a folder into a state that was just built.

    Raises:
        TrainingError: there is none, it cannot be read, or it is of other options; the text names them.
    """
    found = _checkpoints(output)
    if not found:
        raise TrainingError(f"{output} holds no checkpoint to resume from")
    try:
        facts = json.loads((found[-1] / FACTS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(found[-1] / TENSOR_FILE)
    except (OSError, ValueError, SafetensorError) as exc:
        raise TrainingError(f"{found[-1]} cannot be read: {exc}") from exc
    _refuse_other_options(found[-1], facts["options"], dataclasses.asdict(options))
    wanted = {key: tensor.shape for key, tensor in _places(state).items()}
    for name, parameter in state.weights.items():
        wanted.update({f"{moment}.{name}": parameter.shape for moment in moments_of(name, parameter, options)})
    if {key: tensor.shape for key, tensor in tensors.items()} != wanted:
        raise TrainingError(f"{found[-1]} is of another UNet")
    _restore(state, tensors, facts["step"], options)


def log_step(output: Path, line: Mapping[str, float]) -> None:
    """Append a line to the log of the losses."""
    with (output / LOG_FILE).open("a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def cut_log(output: Path, step: int) -> float:
    """Drop what the log says of later steps, which will be done again; returns the seconds up to that step."""
    log = output / LOG_FILE
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    fresh = output / f"{LOG_FILE}.new"
    fresh.write_text("".join(kept), encoding="utf-8")
    fresh.replace(log)
    return float(json.loads(kept[-1])["seconds"]) if kept else 0.0


def _checkpoints(output: Path) -> list[Path]:
    return sorted((output / _FOLDER).glob(f"{_PREFIX}*"))


def _places(state: TrainingState) -> dict[str, torch.Tensor]:
    """Where a checkpoint's tensors lie, except those of the optimiser, which has none before its first step."""
    places: dict[str, torch.Tensor] = {f"weights.{name}": tensor for name, tensor in state.weights.items()}
    places.update({f"average.{name}": tensor for name, tensor in state.average.items()})
    return places


def _tensors(state: TrainingState, options: TrainingOptions) -> dict[str, torch.Tensor]:
    tensors = _places(state)
    for name, parameter in state.weights.items():
        moments = state.optimizer.state[parameter]
        tensors.update({f"{moment}.{name}": moments[moment] for moment in moments_of(name, parameter, options)})
    return {key: tensor.detach().contiguous() for key, tensor in tensors.items()}


@torch.no_grad()
def _restore(state: TrainingState, tensors: Mapping[str, torch.Tensor], step: int, options: TrainingOptions) -> None:
    for key, place in _places(state).items():
        place.copy_(tensors[key])
    for name, parameter in state.weights.items():
        names = moments_of(name, parameter, options)
        moments = {moment: torch.empty_like(parameter).copy_(tensors[f"{moment}.{name}"]) for moment in names}
        state.optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    state.step = step


def _refuse_other_options(path: Path, kept: Mapping[str, object], given: Mapping[str, object]) -> None:
    differing = [f"{name} {kept.get(name)!r}, not {given[name]!r}" for name in given if kept.get(name) != given[name]]
    if differing:
        raise TrainingError(f"{path} was trained with {'; '.join(differing)}")
