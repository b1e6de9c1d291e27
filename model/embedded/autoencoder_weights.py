"""A stock AutoencoderKL whose encoder is the projection, exactly, and whose decoder starts as its best linear inverse.

The encoder's residual branches are zero, so a picture passes through shortcuts and stride-2 convolutions alone, each of
which is one stage. The decoder's upsampling convolutions are fitted by least squares to undo a stage each; ordinary
residual branches beside them learn what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from model.embedded.projection import KEPT, LATENT_CHANNELS, Floats, Stage, encode, views

if TYPE_CHECKING:
    from diffusers.models.autoencoders.vae import Decoder, Encoder
    from torch.nn import Conv2d

CHANNELS = (16, 24, 48, 64, 96)  # at 1, 2, 4, 8 and 16 px; each holds what the projection keeps there
_GROUPS = 4
_LOG_VARIANCE = -10.0  # of the posterior: deviation 0.007, below what half precision leaves
# The encoder's last norm must not touch the latents. Each of its groups of 24 holds 8 latents, their negatives, and 8
# constants of +-724, which alone decide the deviation of the group: 724 / sqrt(3) = 418.0016.
_STEADY = 724.0
_STEADY_DEVIATION = 418.0
_LINEAR = 32.0  # SiLU is the identity to 1e-6 above 18; latents lie within +-14
# The same for colours at the decoder's end: per group of 4, a colour, its negative and two constants.
_COLOUR_STEADY = 8.0
_COLOUR_LINEAR = 6.0
_BRANCH = 0.2  # how much of the usual spread the decoder's residual branches begin with
_RIDGE = 1e-4  # of the mean variance; keeps the least squares solvable for few pictures


def build(stages: Sequence[Stage], *, seed: int, inverse_seeds: Sequence[int]) -> AutoencoderKL:
    """The autoencoder before training, float32, in evaluation mode.

    Args:
        stages: from `projection.fit`.
        seed: of the decoder's residual branches.
        inverse_seeds: drawings that the decoder's linear part is fitted on; a few dozen.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
            up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
            block_out_channels=CHANNELS,
            layers_per_block=1,
            norm_num_groups=_GROUPS,
            latent_channels=LATENT_CHANNELS,
            sample_size=256,
            scaling_factor=1.0,
            mid_block_add_attention=False,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    with torch.no_grad():
        _set_encoder(vae.encoder, stages)
        _set_decoder(vae.decoder, stages, inverse_seeds)
    return vae.eval()


def stages_of(vae: AutoencoderKL) -> tuple[Stage, ...]:
    """The stages that `build` put into an autoencoder, bit by bit."""
    stages, before = [], 3
    for block, after in zip(vae.encoder.down_blocks, KEPT):
        conv = block.downsamplers[0].conv
        kernel = conv.weight.detach()[:after, :before, :2, :2]
        matrix = kernel.permute(2, 3, 1, 0).reshape(4 * before, after)
        stages.append(Stage(matrix.contiguous().numpy(), conv.bias.detach()[:after].numpy()))
        before = after
    return tuple(stages)


def _set_encoder(encoder: Encoder, stages: Sequence[Stage]) -> None:
    for weight in encoder.parameters():
        weight.zero_()
    _carry(encoder.conv_in, 3)
    for index, stage in enumerate(stages):
        block = encoder.down_blocks[index]
        if block.resnets[0].conv_shortcut is not None:
            _carry(block.resnets[0].conv_shortcut, len(stage.matrix) // 4)
        _set_downsampler(block.downsamplers[0].conv, stage)
    _set_last_norm(encoder)


def _set_downsampler(conv: Conv2d, stage: Stage) -> None:
    after = len(stage.bias)
    kernel = torch.from_numpy(stage.matrix).reshape(2, 2, -1, after).permute(3, 2, 0, 1)  # (out, in, 2, 2)
    # diffusers pads right and below only, so the upper left 2x2 of the 3x3 kernel lies on the square.
    conv.weight[:after, : kernel.shape[1], :2, :2] = kernel
    conv.get_parameter("bias")[:after] = torch.from_numpy(stage.bias)


def _set_last_norm(encoder: Encoder) -> None:
    """Split each latent into itself and its negative, shift both into SiLU's linear part, and take the difference."""
    spread = encoder.down_blocks[-1].resnets[0].conv_shortcut
    size = CHANNELS[-1] // _GROUPS
    each = LATENT_CHANNELS // _GROUPS
    for group in range(_GROUPS):
        for place in range(each):
            latent, channel = group + _GROUPS * place, group * size + 2 * place
            spread.weight[channel, latent], spread.weight[channel + 1, latent] = 1.0, -1.0
            encoder.conv_out.weight[latent, channel, 1, 1] = 0.5
            encoder.conv_out.weight[latent, channel + 1, 1, 1] = -0.5
        spread.bias[group * size + 2 * each : (group + 1) * size : 2] = _STEADY
        spread.bias[group * size + 2 * each + 1 : (group + 1) * size : 2] = -_STEADY
    encoder.conv_norm_out.weight.fill_(_STEADY_DEVIATION)
    encoder.conv_norm_out.bias.fill_(_LINEAR)
    encoder.conv_out.bias[LATENT_CHANNELS:] = _LOG_VARIANCE


def _set_decoder(decoder: Decoder, stages: Sequence[Stage], seeds: Sequence[int]) -> None:
    for block in (decoder.mid_block, *decoder.up_blocks):
        for resnet in block.resnets:
            resnet.conv2.weight.mul_(_BRANCH)
            resnet.conv2.bias.zero_()
    _carry(decoder.conv_in, LATENT_CHANNELS)
    pictures = [torch.from_numpy(views(seed)).permute(0, 3, 1, 2) for seed in seeds]
    wanted = [_codes(stages, picture) for picture in pictures]
    known = [codes[-1] for codes in wanted]
    for index, block in enumerate(decoder.up_blocks[:-1]):
        if block.resnets[0].conv_shortcut is not None:
            _carry(block.resnets[0].conv_shortcut, known[0].shape[1])
        kernel, bias = _undo(known, [codes[-2 - index] for codes in wanted])
        conv = block.upsamplers[0].conv
        conv.weight[: len(bias)], conv.bias[: len(bias)] = 0.0, bias
        conv.weight[: len(bias), : kernel.shape[1]] = kernel
        known = [functional.conv2d(_enlarge(codes), kernel, bias, padding=1) for codes in known]
    _set_colours(decoder)


def _codes(stages: Sequence[Stage], picture: torch.Tensor) -> list[torch.Tensor]:
    """A batch (N, 3, H, W) before every stage and after the last, NCHW."""
    layers: list[Floats] = [picture.permute(0, 2, 3, 1).numpy()]
    for stage in stages:
        layers.append(encode([stage], layers[-1]))
    return [torch.from_numpy(codes).permute(0, 3, 1, 2) for codes in layers]


def _undo(known: list[torch.Tensor], wanted: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The 3x3 convolution after enlarging that comes nearest to the codes before a stage.

    Returns:
        kernel (C before, C after, 3, 3) and bias (C before,).
    """
    gram, product, ones = torch.zeros(()), torch.zeros(()), torch.ones(())
    for codes, goal in zip(known, wanted):
        for one, its_goal in zip(torch.split(codes, 1), torch.split(goal, 1)):
            patches = functional.unfold(_enlarge(one), 3, padding=1)[0]  # (9 * C after, H * W)
            patches = torch.cat([patches, ones.expand(1, patches.shape[1])])
            gram = gram + (patches @ patches.T).double()
            product = product + (patches @ its_goal.flatten(2)[0].T).double()
    ridge = _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    solution = torch.linalg.solve(gram + ridge, product).float().T  # (C before, 9 * C after + 1)
    return solution[:, :-1].reshape(len(solution), -1, 3, 3), solution[:, -1]


def _set_colours(decoder: Decoder) -> None:
    """Lead red, green and blue through the last norm as the encoder's latents are; the other channels learn."""
    spread, size = decoder.up_blocks[-1].resnets[0].conv_shortcut, CHANNELS[0] // _GROUPS
    decoder.conv_out.weight.mul_(_BRANCH / 2)
    decoder.conv_out.bias.zero_()
    for colour in range(3):
        first = colour * size
        spread.weight[first : first + size] = 0.0
        spread.bias[first : first + size] = torch.tensor([0.0, 0.0, _COLOUR_STEADY, -_COLOUR_STEADY])
        spread.weight[first, colour], spread.weight[first + 1, colour] = 1.0, -1.0
        decoder.conv_norm_out.weight[first : first + size] = _COLOUR_STEADY * 0.5**0.5
        decoder.conv_norm_out.bias[first : first + size] = _COLOUR_LINEAR
        decoder.conv_out.weight[:, first : first + size] = 0.0
        decoder.conv_out.weight[colour, first, 1, 1] = 0.5
        decoder.conv_out.weight[colour, first + 1, 1, 1] = -0.5


def _carry(conv: Conv2d, channels: int) -> None:
    """Make the first channels pass a convolution unchanged."""
    middle = conv.kernel_size[0] // 2
    conv.weight[:channels] = 0.0
    conv.get_parameter("bias")[:channels] = 0.0
    for channel in range(channels):
        conv.weight[channel, channel, middle, middle] = 1.0


def _enlarge(codes: torch.Tensor) -> torch.Tensor:
    larger: torch.Tensor = functional.interpolate(codes, scale_factor=2.0, mode="nearest")
    return larger
