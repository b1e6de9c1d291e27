from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from catvton_recipe import build_scheduler, build_unet, build_vae
from diffusers import AutoencoderKL, UNet2DConditionModel

from model.catvton import published
from model.catvton.attention import SkippedAttention, TryOnUNet, without_cross_attention
from model.catvton.pipeline import CatVTONPipeline


def parameters_of(module: torch.nn.Module, part: str = "") -> int:
    return sum(tensor.numel() for name, tensor in module.named_parameters() if part in name)


def test_published_parts_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        stock = UNet2DConditionModel(**published.UNET_CONFIG)
        vae = AutoencoderKL(**published.VAE_CONFIG)
    assert parameters_of(stock) == 859_535_364
    assert parameters_of(stock, ".attn2.") == 43_962_560
    assert parameters_of(stock, ".attn1.") == 49_574_080
    assert parameters_of(without_cross_attention(stock)) == 815_572_804
    assert parameters_of(vae) == 83_653_863


def test_the_published_modules_have_no_buffers_that_files_do_not_fill() -> None:
    with torch.device("meta"):
        modules = [TryOnUNet(**published.UNET_CONFIG), AutoencoderKL(**published.VAE_CONFIG)]
    for module in modules:
        assert {name for name, _ in module.named_buffers()} <= set(module.state_dict())


def test_every_block_loses_its_cross_attention_and_nothing_else() -> None:
    stock = build_unet("tiny3")
    stripped = without_cross_attention(stock)
    replaced = [module for name, module in stripped.named_modules() if name.endswith("attn2")]
    assert len(replaced) == sum(name.endswith("attn2") for name, _ in stock.named_modules()) > 0
    assert all(isinstance(module, SkippedAttention) for module in replaced)
    assert set(stripped.state_dict()) == {key for key in stock.state_dict() if ".attn2." not in key}


def test_the_stripped_unet_shares_its_tensors_with_the_stock_one() -> None:
    stock = build_unet()
    kept = stock.state_dict()
    for key, tensor in without_cross_attention(stock).state_dict().items():
        assert tensor.data_ptr() == kept[key].data_ptr()


def test_the_stock_unet_is_left_as_it_is() -> None:
    stock = build_unet()
    before = parameters_of(stock)
    pipeline = CatVTONPipeline(build_vae(), stock, build_scheduler())
    assert isinstance(pipeline.unet, TryOnUNet)
    assert parameters_of(stock) == before > parameters_of(pipeline.unet)


def test_a_unet_without_cross_attention_is_taken_as_it_is() -> None:
    unet = without_cross_attention(build_unet())
    assert without_cross_attention(unet) is unet


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_unet_is_kept(training: bool) -> None:
    assert without_cross_attention(build_unet().train(training)).training is training


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_files_with_and_without_cross_attention_load_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, low_cpu_mem_usage: bool
) -> None:
    stock = build_unet()
    stock.save_pretrained(tmp_path / "stock")
    without_cross_attention(stock).save_pretrained(tmp_path / "stripped")
    diffusers_log = logging.getLogger("diffusers")
    diffusers_log.addHandler(caplog.handler)
    try:
        loaded = [
            TryOnUNet.from_pretrained(tmp_path / folder, low_cpu_mem_usage=low_cpu_mem_usage)
            for folder in ("stock", "stripped")
        ]
    finally:
        diffusers_log.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    for unet in loaded:
        for key, tensor in unet.state_dict().items():
            assert torch.equal(tensor, stock.state_dict()[key])


def test_a_file_with_cross_attention_is_larger_than_one_without(tmp_path: Path) -> None:
    stock = build_unet()
    stock.save_pretrained(tmp_path / "stock")
    without_cross_attention(stock).save_pretrained(tmp_path / "stripped")
    sizes = [
        (tmp_path / folder / "diffusion_pytorch_model.safetensors").stat().st_size for folder in ("stock", "stripped")
    ]
    assert sizes[0] - sizes[1] >= 4 * parameters_of(stock, ".attn2.")
