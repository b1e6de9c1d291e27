"""What the UNet of CatVTON computes, without what a stock forward does for other models.

The same numbers but for rounding: no division by one, no dropout, no reading of time embeddings in every step, and each
1x1 convolution of a picture as the product of a matrix with its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from model.catvton.halves import WHOLE, WholeCanvas
from model.catvton.kernels import attend

DOWN_BLOCKS = {"CrossAttnDownBlock2D", "DownBlock2D"}
UP_BLOCKS = {"CrossAttnUpBlock2D", "UpBlock2D"}
EXPECTED: dict[str, Any] = {  # of a config, where other values mean another computation
    "act_fn": "silu",
    "attention_type": "default",
    "addition_embed_type": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": False,
}


@dataclass
class DeepFeatures:
    """What the last layer was given from below, kept for the steps that reuse it.

    Attributes:
        kept: (B, C, rows, columns), or None before the first forward.
        reuse: whether the next forward computes the last layer alone, from what is kept.
    """

    kept: torch.Tensor | None = None
    reuse: bool = False


def check_architecture(config: Mapping[str, Any]) -> None:
    """Raise ValueError for the config of a UNet that computes something else than CatVTON's."""
    others = [name for name, value in EXPECTED.items() if config.get(name, value) != value]
    if set(config["down_block_types"]) - DOWN_BLOCKS:
        others.append("down_block_types")
    if set(config["up_block_types"]) - UP_BLOCKS:
        others.append("up_block_types")
    if config.get("mid_block_scale_factor", 1) != 1:
        others.append("mid_block_scale_factor")
    if others:
        raise ValueError(f"the unet is of another kind than CatVTON's: {', '.join(others)}")


def time_shifts(unet: Any, timesteps: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - diffusers has no types
    """What each timestep adds inside the residual blocks, their first convolution's bias included.

    Args:
        unet: whose time embedding it is.
        timesteps: (N,).
    Returns:
        (N, channels of all residual blocks), in the UNet's dtype.
    """
    embedded = unet.time_embedding(unet.time_proj(timesteps).to(unet.dtype))  # (N, channels)
    activated = functional.silu(embedded)
    return torch.cat([block.time_emb_proj(activated) + block.conv1.bias for block in residual_blocks(unet)], dim=1)


def predict(
    unet: Any,  # noqa: ANN401 - diffusers has no types
    sample: torch.Tensor,
    shifts: torch.Tensor,
    canvas: WholeCanvas = WHOLE,
    deep: DeepFeatures | None = None,
) -> torch.Tensor:
    """The UNet's prediction.

    Args:
        unet: a `TryOnUNet`.
        sample: (B, channels, rows, columns).
        shifts: (1 or B, channels of all residual blocks), of `time_shifts`.
        canvas: how the layers see it.
        deep: keeps, or brings, what lies below the last layer.
    """
    sizes = [block.out_channels for block in residual_blocks(unet)]
    by_block = dict(zip(residual_blocks(unet), torch.split(shifts, sizes, dim=1)))
    hidden = canvas.convolve(unet.conv_in, sample, unet.conv_in.bias)
    last = unet.up_blocks[-1]
    skips = [hidden]
    if deep is not None and deep.reuse and deep.kept is not None:
        hidden = deep.kept
    else:
        hidden = _below_the_last_layer(unet, hidden, skips, by_block, canvas)
        if deep is not None:
            deep.kept = hidden
    hidden = _layer(last, len(last.resnets) - 1, torch.cat([hidden, skips[0]], dim=1), by_block, canvas)
    hidden = functional.silu(canvas.normalise(unet.conv_norm_out, hidden))
    return canvas.convolve(unet.conv_out, hidden, unet.conv_out.bias)


def residual_blocks(unet: Any) -> Iterator[Any]:  # noqa: ANN401 - diffusers has no types
    """The residual blocks, in the order in which they are computed."""
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        yield from block.resnets


def attentions(unet: Any) -> Iterator[tuple[int, Any]]:  # noqa: ANN401 - diffusers has no types
    """Every self-attention, and how often the canvas has been halved there."""
    level = 0
    for block in unet.down_blocks:
        yield from ((level, part.attn1) for part in _transformer_blocks(block))
        level += block.downsamplers is not None
    yield from ((level, part.attn1) for part in _transformer_blocks(unet.mid_block))
    for block in unet.up_blocks:
        yield from ((level, part.attn1) for part in _transformer_blocks(block))
        level -= block.upsamplers is not None


def _transformer_blocks(block: Any) -> Iterator[Any]:  # noqa: ANN401 - diffusers has no types
    for transformer in getattr(block, "attentions", ()):
        yield from transformer.transformer_blocks


def _below_the_last_layer(
    unet: Any,  # noqa: ANN401 - diffusers has no types
    hidden: torch.Tensor,
    skips: list[torch.Tensor],
    shifts: dict[Any, torch.Tensor],
    canvas: WholeCanvas,
) -> torch.Tensor:
    """All of the U but its very end; leaves the one skip that the end takes."""
    for block in unet.down_blocks:
        for place in range(len(block.resnets)):
            hidden = _layer(block, place, hidden, shifts, canvas)
            skips.append(hidden)
        for sampler in block.downsamplers or ():
            hidden = canvas.convolve(sampler.conv, hidden, sampler.conv.bias)
            skips.append(hidden)
    first, *others = unet.mid_block.resnets
    hidden = _residual(first, hidden, shifts[first], canvas)
    for transformer, block in zip(unet.mid_block.attentions, others):
        hidden = _residual(block, _transformed(transformer, hidden, canvas), shifts[block], canvas)
    for block in unet.up_blocks:
        is_last = block is unet.up_blocks[-1]
        for place in range(len(block.resnets) - is_last):
            hidden = _layer(block, place, torch.cat([hidden, skips.pop()], dim=1), shifts, canvas)
        for sampler in block.upsamplers or ():
            enlarged = functional.interpolate(hidden, size=skips[-1].shape[-2:], mode="nearest")
            hidden = canvas.convolve(sampler.conv, enlarged, sampler.conv.bias)
    return hidden


def _layer(
    block: Any,  # noqa: ANN401 - diffusers has no types
    place: int,
    hidden: torch.Tensor,
    shifts: dict[Any, torch.Tensor],
    canvas: WholeCanvas,
) -> torch.Tensor:
    """A residual block, and the transformer behind it where the block has any."""
    resnet = block.resnets[place]
    hidden = _residual(resnet, hidden, shifts[resnet], canvas)
    transformers = getattr(block, "attentions", None)
    return hidden if transformers is None else _transformed(transformers[place], hidden, canvas)


def _residual(block: Any, hidden: torch.Tensor, shift: torch.Tensor, canvas: WholeCanvas) -> torch.Tensor:  # noqa: ANN401
    inner = functional.silu(canvas.normalise(block.norm1, hidden))
    if shift.shape[0] == 1:  # one timestep for all: it rides on the convolution's bias
        inner = canvas.convolve(block.conv1, inner, shift[0])
    else:
        inner = canvas.convolve(block.conv1, inner, None) + shift[..., None, None]
    inner = functional.silu(canvas.normalise(block.norm2, inner))
    inner = canvas.convolve(block.conv2, inner, block.conv2.bias)
    if block.conv_shortcut is not None:
        hidden = functional.conv2d(hidden, block.conv_shortcut.weight, block.conv_shortcut.bias)
    return hidden + inner


def _transformed(transformer: Any, hidden: torch.Tensor, canvas: WholeCanvas) -> torch.Tensor:  # noqa: ANN401
    batch, channels, rows, columns = hidden.shape
    tokens = canvas.normalise(transformer.norm, hidden).permute(0, 2, 3, 1).reshape(batch, rows * columns, channels)
    tokens = _product(transformer.proj_in, tokens)
    for block in transformer.transformer_blocks:
        tokens = tokens + _attention(block.attn1, block.norm1(tokens), canvas)
        tokens = tokens + block.norm2(tokens)  # what is left of the cross-attention
        tokens = tokens + block.ff(block.norm3(tokens))
    tokens = _product(transformer.proj_out, tokens)
    return hidden + tokens.reshape(batch, rows, columns, channels).permute(0, 3, 1, 2)


def _product(projection: Any, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ANN401 - a linear layer, or a 1x1 convolution
    return functional.linear(tokens, projection.weight.flatten(1), projection.bias)


def _attention(attention: Any, tokens: torch.Tensor, canvas: WholeCanvas) -> torch.Tensor:  # noqa: ANN401
    batch, count, _ = tokens.shape

    def by_head(projection: torch.nn.Module) -> torch.Tensor:  # (B, heads, tokens, channels)
        projected: torch.Tensor = projection(tokens)
        return projected.view(batch, count, attention.heads, -1).transpose(1, 2)

    queries, keys, values = by_head(attention.to_q), by_head(attention.to_k), by_head(attention.to_v)
    mixed = attend(queries, *canvas.attended(attention, keys, values))
    projected: torch.Tensor = attention.to_out[0](mixed.transpose(1, 2).reshape(batch, count, -1))
    return projected
