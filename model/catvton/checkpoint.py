"""Published weight files to modules in memory.

Nothing is loaded loosely: every tensor of a module comes from exactly one tensor of a file, of the same shape, or
`WeightsError` names what does not fit. Only safetensors files are read, and only the tensors that are kept: not the
cross-attention, nor the self-attention of the base model that CatVTON's own replaces. A merged file holds just those
that are kept, under the modules' own names.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.catvton import published
from model.catvton.attention import TryOnUNet
from model.weights import WeightsError

CHUNK_BYTES = 96 * 2**20  # read from one mapping of a file; its pages are given back before the next
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # by safetensors' name
NAMED_AT_MOST = 5  # tensors that one error lists
MOST = {  # of what a config makes as many as it says; published models have 2, 10 and 1000
    "layers_per_block": 16,
    "transformer_layers_per_block": 16,
    "reverse_transformer_layers_per_block": 16,
    "num_train_timesteps": 100_000,
}
# What diffusers and torch raise of a wrong config: they divide by it, look into it, and make shapes of it.
MISFITS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
UNET, VAE = "unet", "vae"  # what a tensor's name begins with in a merged file

Shapes = dict[str, tuple[int, ...]]

log = logging.getLogger("vton.weights")

_SELF_ATTENTION = re.compile(r"\.attn1\.")
_CROSS_ATTENTION = re.compile(r"\.attn2\.")
_QUERY = re.compile(r"(0|[1-9]\d*)\.to_q\.weight")
_DUPLICATE = re.compile(r"\d+\.(0\.)?(weight|bias)")  # a projection of an attention, under an index of its own
_OLD_VAE_ATTENTION = re.compile(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)")
_NEW_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_attention_checkpoint(unet: torch.nn.Module, path: str | Path) -> None:
    """Replace every self-attention of a UNet by that of a CatVTON checkpoint.

    The checkpoint numbers its attentions in the order of the UNet's modules named `attn1`; which numbers it uses, and
    whether it holds the same tensors again under further numbers, does not matter.

    Args:
        unet: changed in place, keeping its dtype and device; left as it was if anything is wrong.
        path: the safetensors file, or the directory that holds it as `model.safetensors`.
    Raises:
        WeightsError: the file cannot be read, or a tensor is missing, left over or of the wrong shape.
    """
    file = Path(path) / published.ATTENTION_FILE if Path(path).is_dir() else Path(path)
    targets = unet.state_dict()
    sources = _attention_sources(unet, stored_shapes(file), file)
    read = read_tensors(file, sources, dtype=torch.float32, device=torch.device("cpu"))
    for key, tensor in read.items():
        targets[key].copy_(tensor)


def load_components(
    weights_dir: Path, variant: str, *, dtype: torch.dtype, device: torch.device
) -> tuple[AutoencoderKL, TryOnUNet, DDIMScheduler]:
    """The VAE, the UNet with the variant's self-attention, and the scheduler, from files in the published layout.

    Args:
        weights_dir: holds the three published repositories, each in the folder of its name; the merged file of the
            variant stands for their tensors where it is there.
        variant: one of `published.ATTENTION_FOLDERS`.
        dtype: of the weights in memory.
        device: where they go.
    Returns:
        Modules in evaluation mode. At most 128 MiB of files are in memory beside them at any time, the buffers of the
        hashing included.
    Raises:
        ValueError: an unknown variant.
        WeightsError: a file is missing, is no safetensors file, or does not fit.
    """
    if variant not in published.ATTENTION_FOLDERS:
        raise ValueError(f"unknown variant {variant!r}; one of: {', '.join(published.ATTENTION_FOLDERS)}")
    scheduler = _load_scheduler(weights_dir / published.SCHEDULER_FILE)
    unet: TryOnUNet = _build(TryOnUNet, weights_dir / published.UNET_FOLDER / published.CONFIG_FILE)
    vae: AutoencoderKL = _build(AutoencoderKL, weights_dir / published.VAE_FOLDER / published.CONFIG_FILE)
    began = time.monotonic()
    merged = weights_dir / published.MERGED_FILES[variant]
    if merged.exists():
        _fill_from_merged({UNET: unet, VAE: vae}, merged, dtype=dtype, device=device)
    else:
        _fill_unet(unet, weights_dir, variant, dtype=dtype, device=device)
        _fill_vae(vae, _weight_file(weights_dir / published.VAE_FOLDER), dtype=dtype, device=device)
    elapsed_ms = round(1000 * (time.monotonic() - began), 1)
    log.info("weights_read", extra={"merged": merged.exists(), "device": str(device), "elapsed_ms": elapsed_ms})
    if unet.config.in_channels != 2 * vae.config.latent_channels + 1:
        config = weights_dir / published.UNET_FOLDER / published.CONFIG_FILE
        raise WeightsError(f"{config} has {unet.config.in_channels} input channels: it is no inpainting UNet")
    return vae, unet, scheduler


def stored_shapes(path: Path) -> Shapes:
    """The shape of every tensor of a safetensors file, in the order in which they lie in it.

    Raises:
        WeightsError: the file cannot be read.
    """
    with _opened(path) as stored:
        return {key: tuple(stored.get_slice(key).get_shape()) for key in stored.offset_keys()}


def read_tensors(
    path: Path, sources: Mapping[str, str], *, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Copies of some tensors of a safetensors file.

    Args:
        path: the file.
        sources: key in the answer -> key in the file.
        dtype: of the copies.
        device: of the copies.
    Raises:
        WeightsError: the file cannot be read, or a tensor is not of a floating dtype.
    """
    tensors: dict[str, torch.Tensor] = {}
    waiting = list(sources.items())
    while waiting:
        with _opened(path) as stored:
            room = CHUNK_BYTES
            while waiting and room > 0:
                target, key = waiting.pop(0)
                room -= _stored_bytes(stored, key, path)
                tensors[target] = stored.get_tensor(key).to(device=device, dtype=dtype, copy=True)
    return tensors


def write_merged(weights_dir: Path, variant: str, path: Path) -> None:
    """Write what `load_components` keeps into one safetensors file in float16, which it reads in place of the others.

    Args:
        weights_dir: in the published layout.
        variant: one of `published.ATTENTION_FOLDERS`.
        path: is replaced; its folder is there.
    Raises:
        ValueError: an unknown variant.
        WeightsError: a file is missing or does not fit, or holds a number that float16 does not.
        OSError: it cannot be written.
    """
    vae, unet, _ = load_components(weights_dir, variant, dtype=torch.float16, device=torch.device("cpu"))
    modules = {UNET: unet, VAE: vae}
    tensors = {
        f"{name}.{key}": tensor for name, module in modules.items() for key, tensor in module.state_dict().items()
    }
    _refuse(weights_dir, [f"{key} is beyond float16" for key, tensor in tensors.items() if not tensor.isfinite().all()])
    try:
        save_file(tensors, path)
    except SafetensorError as exc:
        raise OSError(None, str(exc)) from exc


def _fill_from_merged(
    modules: Mapping[str, torch.nn.Module], path: Path, *, dtype: torch.dtype, device: torch.device
) -> None:
    stored = stored_shapes(path)
    _refuse(path, [f"{key} is unexpected" for key in stored if key.partition(".")[0] not in modules])
    for name, module in modules.items():
        target_of = {key: key.partition(".")[2] for key in stored if key.partition(".")[0] == name}
        sources = _same_names(module, target_of, stored, path)
        module.load_state_dict(read_tensors(path, sources, dtype=dtype, device=device), assign=True)


def _fill_unet(unet: TryOnUNet, weights_dir: Path, variant: str, *, dtype: torch.dtype, device: torch.device) -> None:
    base_file = _weight_file(weights_dir / published.UNET_FOLDER)
    stored = {key: shape for key, shape in stored_shapes(base_file).items() if not _CROSS_ATTENTION.search(key)}
    base = _same_names(unet, {key: key for key in stored}, stored, base_file)
    kept = {target: key for target, key in base.items() if not _SELF_ATTENTION.search(target)}
    attention_file = weights_dir / published.ATTENTION_FOLDERS[variant] / published.ATTENTION_FILE
    attention = _attention_sources(unet, stored_shapes(attention_file), attention_file)
    tensors = read_tensors(base_file, kept, dtype=dtype, device=device)
    tensors.update(read_tensors(attention_file, attention, dtype=dtype, device=device))
    unet.load_state_dict(tensors, assign=True)


def _fill_vae(vae: AutoencoderKL, file: Path, *, dtype: torch.dtype, device: torch.device) -> None:
    stored = stored_shapes(file)
    new_names = {key: _OLD_VAE_ATTENTION.sub(lambda old: _NEW_VAE_ATTENTION[old.group()], key) for key in stored}
    sources = _same_names(vae, new_names, stored, file)
    vae.load_state_dict(read_tensors(file, sources, dtype=dtype, device=device), assign=True)


def _load_scheduler(path: Path) -> DDIMScheduler:
    with _described(path, "a scheduler") as config:  # of any class; its numbers are those of DDIM
        return DDIMScheduler.from_config(config, steps_offset=1, clip_sample=False, set_alpha_to_one=False)


def _build(module_class: Any, config_file: Path) -> Any:  # noqa: ANN401 - diffusers has no types
    meta = torch.device("meta")  # shapes without memory: every tensor is assigned later
    with _described(config_file, f"a {module_class.__name__}") as config, meta:
        return module_class.from_config(config).eval()


@contextmanager
def _described(path: Path, what: str) -> Iterator[dict[str, Any]]:
    """The config in a file; WeightsError, in one sentence, if nothing can be made of it in the block."""
    config = _read_json(path)
    try:
        for name, most in MOST.items():
            if any(number > most for number in _numbers(config.get(name))):
                raise ValueError(f"{name} is above {most}")
        yield config
    except MISFITS as exc:
        reason = next(iter(str(exc).splitlines()), type(exc).__name__)  # torch lists its signatures below
        raise WeightsError(f"{path} does not describe {what}: {reason}") from exc


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, (int, float)):
        yield value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as exc:
        raise WeightsError(f"{path} cannot be read as JSON: {exc}") from exc
    if not isinstance(config, dict):
        raise WeightsError(f"{path} holds no JSON object")
    return config


def _weight_file(folder: Path) -> Path:
    for name in published.WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsError(f"{folder} holds neither {' nor '.join(published.WEIGHT_FILES)}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as stored:
            yield stored
    except (OSError, SafetensorError) as exc:
        raise WeightsError(f"{path} cannot be read as safetensors: {exc}") from exc


def _stored_bytes(stored: Any, key: str, path: Path) -> int:  # noqa: ANN401 - safetensors has no types
    view = stored.get_slice(key)
    if view.get_dtype() not in FLOAT_BYTES:
        raise WeightsError(f"{path}: {key} is {view.get_dtype()}, not one of {', '.join(FLOAT_BYTES)}")
    size: int = torch.Size(view.get_shape()).numel() * FLOAT_BYTES[view.get_dtype()]
    return size


def _module_shapes(module: torch.nn.Module) -> Shapes:
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def _same_names(module: torch.nn.Module, target_of: Mapping[str, str], stored: Shapes, path: Path) -> dict[str, str]:
    """Target -> key in the file, for a file that must hold the whole state of a module."""
    wanted = _module_shapes(module)
    sources: dict[str, str] = {}
    problems = []
    for key, target in target_of.items():
        if target not in wanted:
            problems.append(f"{key} is unexpected")
        elif target in sources:
            problems.append(f"{key} is there again as {sources[target]}")
        elif stored[key] != wanted[target]:
            problems.append(f"{key} is {list(stored[key])}, not {list(wanted[target])}")
        sources.setdefault(target, key)
    problems += [f"{target} is missing" for target in wanted if target not in sources]
    _refuse(path, problems)
    return sources


def _attention_sources(unet: torch.nn.Module, stored: Shapes, path: Path) -> dict[str, str]:
    """Target -> key in the file, for every tensor of every self-attention of the UNet."""
    attentions = [(name, module) for name, module in unet.named_modules() if name.endswith("attn1")]
    numbers = sorted(int(found.group(1)) for found in map(_QUERY.fullmatch, stored) if found)
    problems = []
    if len(numbers) != len(attentions):
        problems.append(f"it holds {len(numbers)} attentions, the UNet has {len(attentions)}")
    sources: dict[str, str] = {}
    for number, (name, module) in zip(numbers, attentions):
        for suffix, shape in _module_shapes(module).items():
            key = f"{number}.{suffix}"
            sources[f"{name}.{suffix}"] = key
            if key not in stored:
                problems.append(f"{key} is missing")
            elif stored[key] != shape:
                problems.append(f"{key} is {list(stored[key])}, not {list(shape)}")
    used = set(sources.values())
    problems += [f"{key} is unexpected" for key in stored if key not in used and not _DUPLICATE.fullmatch(key)]
    _refuse(path, problems)
    return sources


def _refuse(path: Path, problems: list[str]) -> None:
    if problems:
        more = f" and {len(problems) - NAMED_AT_MOST} more" if len(problems) > NAMED_AT_MOST else ""
        raise WeightsError(f"{path} does not fit: {'; '.join(problems[:NAMED_AT_MOST])}{more}")
