from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from catvton_recipe import GOLDENS, attention_tensors, build_unet, write_published_layout
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from model import record
from model.catvton import checkpoint, published
from model.catvton.attention import without_cross_attention
from model.catvton.checkpoint import load_attention_checkpoint, write_merged
from model.catvton.pipeline import CatVTONPipeline
from model.weights import WeightsError

Tensors = dict[str, torch.Tensor]
UNET_FILE = f"{published.UNET_FOLDER}/{published.WEIGHT_FILES[0]}"
VAE_FILE = f"{published.VAE_FOLDER}/{published.WEIGHT_FILES[0]}"
ATTENTION_FILE = f"{published.ATTENTION_FOLDERS['mix']}/{published.ATTENTION_FILE}"


def attention_state(unet: torch.nn.Module) -> Tensors:
    return {key: tensor.clone() for key, tensor in unet.state_dict().items() if ".attn1." in key}


def saved(tmp_path: Path, tensors: Tensors) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


def assert_equal(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert torch.equal(left[key], right[key]), key


def without(tensors: Tensors, *keys: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


def edit(path: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(path)), path)


def test_the_checkpoint_of_the_recipe_has_the_keys_and_shapes_of_the_reference() -> None:
    expected = json.loads((GOLDENS / "attention_keys_tiny2.json").read_text())
    assert {key: list(tensor.shape) for key, tensor in attention_tensors(build_unet()).items()} == expected


@pytest.mark.parametrize(("stride", "duplicates"), [(8, False), (8, True), (1, False), (6, True), (11, True)])
def test_numbering_and_duplicates_do_not_matter(tmp_path: Path, stride: int, duplicates: bool) -> None:
    unet = without_cross_attention(build_unet())
    load_attention_checkpoint(unet, saved(tmp_path, attention_tensors(unet, 0, stride, duplicates)))
    expected = attention_tensors(unet)
    names = [name for name, _ in unet.named_modules() if name.endswith("attn1")]
    for order, name in enumerate(names):
        for key, tensor in unet.get_submodule(name).state_dict().items():
            assert torch.equal(tensor, expected[f"{8 * order}.{key}"])


def test_a_directory_stands_for_the_file_in_it(tmp_path: Path) -> None:
    by_file, by_folder = build_unet(), build_unet()
    path = saved(tmp_path, attention_tensors(by_file))
    load_attention_checkpoint(by_file, path)
    load_attention_checkpoint(by_folder, tmp_path)
    assert_equal(attention_state(by_file), attention_state(by_folder))


def test_a_unet_keeps_its_dtype(tmp_path: Path) -> None:
    unet = build_unet().to(torch.float16)
    load_attention_checkpoint(unet, saved(tmp_path, attention_tensors(unet)))
    assert {tensor.dtype for tensor in attention_state(unet).values()} == {torch.float16}


def test_only_the_self_attention_changes(tmp_path: Path) -> None:
    unet, before = build_unet(), build_unet().state_dict()
    load_attention_checkpoint(unet, saved(tmp_path, attention_tensors(unet)))
    for key, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[key]) != (".attn1." in key)


WRONG_CHECKPOINTS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "short": (lambda t: {k: v for k, v in t.items() if not k.startswith("24.")}, "3 attentions, the UNet has 4"),
    "long": (
        lambda t: {**t, **{k.replace("24.", "32."): v.clone() for k, v in t.items()}},
        "5 attentions, the UNet has 4",
    ),
    "empty": (lambda _: {}, "0 attentions, the UNet has 4"),
    "a bias missing": (lambda t: without(t, "8.to_out.0.bias"), r"8\.to_out\.0\.bias is missing"),
    "a query missing": (lambda t: without(t, "8.to_q.weight"), "3 attentions"),
    "a tensor of the wrong shape": (
        lambda t: {**t, "16.to_k.weight": torch.zeros(32, 31)},
        r"16\.to_k\.weight is \[32, 31\], not \[32, 32\]",
    ),
    "attentions in another order": (
        lambda t: {k.replace("24.", "0.") if k[:3] == "24." else f"1{k}": v for k, v in t.items()},
        r"is \[64, 64\], not \[32, 32\]",
    ),
    "a left-over tensor": (lambda t: {**t, "0.to_out.1.weight": torch.zeros(1)}, r"0\.to_out\.1\.weight is unexpected"),
    "a name with a leading zero": (lambda t: {**t, "00.to_q.weight": t["0.to_q.weight"].clone()}, "is unexpected"),
    "a whole UNet": (lambda _: {k: v.clone() for k, v in build_unet().state_dict().items()}, "0 attentions"),
    "whole numbers": (lambda t: {**t, "0.to_q.weight": torch.zeros(32, 32, dtype=torch.int8)}, "is I8, not one of"),
}


@pytest.mark.parametrize("case", WRONG_CHECKPOINTS)
def test_a_wrong_checkpoint_is_refused_by_name_and_changes_nothing(tmp_path: Path, case: str) -> None:
    change, text = WRONG_CHECKPOINTS[case]
    unet = build_unet()
    path = saved(tmp_path, change(attention_tensors(unet)))
    before = attention_state(unet)
    with pytest.raises(WeightsError, match=text) as caught:
        load_attention_checkpoint(unet, path)
    assert str(path) in str(caught.value)
    assert_equal(attention_state(unet), before)


def test_an_error_lists_five_tensors_and_counts_the_rest(tmp_path: Path) -> None:
    unet = build_unet()
    path = saved(tmp_path, {**attention_tensors(unet), **{f"extra{i}": torch.zeros(1) for i in range(7)}})
    with pytest.raises(WeightsError, match="and 2 more") as caught:
        load_attention_checkpoint(unet, path)
    assert str(caught.value).count("unexpected") == 5


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused_and_changes_nothing(tmp_path: Path, length: int) -> None:
    unet = build_unet()
    path = saved(tmp_path, attention_tensors(unet))
    path.write_bytes(path.read_bytes()[:length])
    before = attention_state(unet)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_attention_checkpoint(unet, path)
    assert_equal(attention_state(unet), before)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(attention_tensors(build_unet()), path)
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_attention_checkpoint(build_unet(), path)


def test_a_missing_file_and_an_empty_directory_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.safetensors", tmp_path):
        with pytest.raises(WeightsError, match="cannot be read as safetensors"):
            load_attention_checkpoint(build_unet(), path)


def test_a_directory_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_attention_checkpoint(build_unet(), tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_published_layout(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_weights_have_the_dtype_asked_for_whatever_the_files_have(
    tmp_path: Path, stored: torch.dtype, dtype: torch.dtype
) -> None:
    pipeline = CatVTONPipeline.from_published(write_published_layout(tmp_path, dtype=stored), dtype=dtype)
    for module in (pipeline.unet, pipeline.vae):
        assert not module.training
        tensors = [*module.parameters(), *module.buffers()]
        assert {(tensor.dtype, tensor.device.type) for tensor in tensors} == {(dtype, "cpu")}


@pytest.mark.parametrize("variant", ["mix", "vitonhd", "dresscode"])
def test_every_variant_has_a_file_of_its_own(tmp_path: Path, variant: str) -> None:
    root = write_published_layout(tmp_path, variant=variant)
    assert isinstance(CatVTONPipeline.from_published(root, variant), CatVTONPipeline)
    with pytest.raises(WeightsError, match="CatVTON/"):
        CatVTONPipeline.from_published(root, "mix" if variant != "mix" else "vitonhd")


def test_an_unknown_variant_is_refused_with_the_names(root: Path) -> None:
    with pytest.raises(ValueError, match="unknown variant 'best'; one of: mix, vitonhd, dresscode"):
        CatVTONPipeline.from_published(root, "best")


def test_the_scheduler_is_ddim_with_the_numbers_of_the_file(root: Path) -> None:
    path = root / published.SCHEDULER_FILE
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "beta_end": 0.02, "steps_offset": 0, "clip_sample": True}))
    scheduler = CatVTONPipeline.from_published(root).scheduler
    assert isinstance(scheduler, DDIMScheduler)
    assert config["_class_name"] == "PNDMScheduler"
    assert (scheduler.config.beta_end, scheduler.config.beta_start) == (0.02, 0.00085)
    assert (scheduler.config.steps_offset, scheduler.config.clip_sample) == (1, False)
    assert scheduler.config.set_alpha_to_one is False


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE])
def test_half_precision_files_are_taken_where_the_plain_name_is_absent(root: Path, file: str) -> None:
    (root / file).rename((root / file).with_name(published.WEIGHT_FILES[1]))
    assert isinstance(CatVTONPipeline.from_published(root), CatVTONPipeline)


def test_old_names_of_the_vae_attention_mean_the_same(root: Path) -> None:
    new = CatVTONPipeline.from_published(root).vae.state_dict()
    old_names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}

    def rename(tensors: Tensors) -> Tensors:
        renamed = {}
        for key, tensor in tensors.items():
            for current, old in old_names.items():
                key = key.replace(current, old)
            renamed[key] = tensor
        return renamed

    edit(root / VAE_FILE, rename)
    assert "encoder.mid_block.attentions.0.proj_attn.bias" in load_file(root / VAE_FILE)
    assert_equal(CatVTONPipeline.from_published(root).vae.state_dict(), new)


def test_files_read_in_many_small_pieces_are_the_same(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = CatVTONPipeline.from_published(root).unet.state_dict()
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 20_000)
    assert_equal(CatVTONPipeline.from_published(root).unet.state_dict(), whole)


def test_the_merged_file_is_read_in_many_small_pieces_too(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_merged(root, "mix", root / published.MERGED_FILES["mix"])
    whole = CatVTONPipeline.from_published(root).unet.state_dict()
    opened = []
    real = checkpoint.safe_open
    monkeypatch.setattr(checkpoint, "safe_open", lambda *args, **kwargs: opened.append(args) or real(*args, **kwargs))
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 20_000)
    assert_equal(CatVTONPipeline.from_published(root).unet.state_dict(), whole)
    assert len(opened) > 10


def test_what_is_in_memory_beside_the_modules_stays_under_128_mib() -> None:
    hashing = record.HASH_THREADS * record.HASH_BUFFER_BYTES
    assert checkpoint.CHUNK_BYTES + hashing <= 128 * 2**20


def test_how_long_the_reading_took_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    CatVTONPipeline.from_published(root)
    write_merged(root, "mix", root / published.MERGED_FILES["mix"])
    CatVTONPipeline.from_published(root)
    lines = [line for line in caplog.records if line.msg == "weights_read"]
    assert [line.merged for line in lines] == [False, False, True]
    assert all(line.elapsed_ms > 0 and line.device == "cpu" for line in lines)


def test_what_the_checkpoint_replaces_is_never_read(root: Path) -> None:
    expected = CatVTONPipeline.from_published(root).unet.state_dict()
    edit(root / UNET_FILE, lambda t: {k: v.fill_(torch.nan) if ".attn" in k else v for k, v in t.items()})
    assert_equal(CatVTONPipeline.from_published(root).unet.state_dict(), expected)


def test_a_base_file_without_cross_attention_loads(root: Path) -> None:
    edit(root / UNET_FILE, lambda t: {k: v for k, v in t.items() if ".attn2." not in k})
    assert isinstance(CatVTONPipeline.from_published(root), CatVTONPipeline)


NORM, VAE_QUERY = "conv_norm_out.weight", "decoder.mid_block.attentions.0.to_q.bias"
WRONG_FILES: dict[str, tuple[str, Callable[[Tensors], Tensors], str]] = {
    "unet key missing": (UNET_FILE, lambda t: without(t, NORM), f"{NORM} is missing"),
    "unet key unexpected": (UNET_FILE, lambda t: {**t, "conv_extra.bias": t[NORM].clone()}, "conv_extra.bias is unexp"),
    "unet key of the wrong shape": (UNET_FILE, lambda t: {**t, NORM: torch.zeros(31)}, rf"{NORM} is \[31\], not \[32"),
    "vae key missing": (VAE_FILE, lambda t: without(t, VAE_QUERY), f"{VAE_QUERY} is missing"),
    "vae key in both namings": (
        VAE_FILE,
        lambda t: {**t, VAE_QUERY.replace("to_q", "query"): t[VAE_QUERY].clone()},
        "is there again as",
    ),
    "attention key missing": (ATTENTION_FILE, lambda t: without(t, "0.to_v.weight"), r"0\.to_v\.weight is missing"),
}


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_wrong_published_file_is_refused_by_file_and_key(root: Path, case: str) -> None:
    file, change, text = WRONG_FILES[case]
    edit(root / file, change)
    with pytest.raises(WeightsError, match=text) as caught:
        CatVTONPipeline.from_published(root)
    assert file in str(caught.value)


@pytest.mark.parametrize("file", [UNET_FILE, VAE_FILE, ATTENTION_FILE])
@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_missing_or_truncated_weight_file_is_refused_by_name(root: Path, file: str, damage: str) -> None:
    path = root / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError) as caught:
        CatVTONPipeline.from_published(root)
    assert str(path.parent) in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "[]", '{"block_out_channels": [8, 16, 24]}'])
@pytest.mark.parametrize("folder", [published.UNET_FOLDER, published.VAE_FOLDER])
def test_a_wrong_configuration_is_refused_by_name(root: Path, folder: str, content: str | None) -> None:
    path = root / folder / published.CONFIG_FILE
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(WeightsError) as caught:
        CatVTONPipeline.from_published(root)
    assert folder in str(caught.value)


@pytest.mark.parametrize("content", [None, "{", '{"beta_schedule": "unknown"}', '{"num_train_timesteps": "many"}'])
def test_a_wrong_scheduler_file_is_refused_by_name(root: Path, content: str | None) -> None:
    path = root / published.SCHEDULER_FILE
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(WeightsError, match=r"scheduler_config\.json"):
        CatVTONPipeline.from_published(root)


UNET_CONFIG = f"{published.UNET_FOLDER}/{published.CONFIG_FILE}"
VAE_CONFIG = f"{published.VAE_FOLDER}/{published.CONFIG_FILE}"
DAMAGED_CONFIGS = [
    (UNET_CONFIG, {"norm_num_groups": 0}),
    (UNET_CONFIG, {"in_channels": -1}),
    (UNET_CONFIG, {"block_out_channels": [2_000_000_000, 2_000_000_000]}),
    (UNET_CONFIG, {"down_block_types": [0, 0]}),
    (UNET_CONFIG, {"cross_attention_dim": {}}),
    (UNET_CONFIG, {"layers_per_block": 1_000_000}),
    (UNET_CONFIG, {"layers_per_block": [1, 1_000_000]}),
    (UNET_CONFIG, {"transformer_layers_per_block": 1_000_000}),
    (UNET_CONFIG, {"transformer_layers_per_block": [[1], [1_000_000]]}),
    (VAE_CONFIG, {"norm_num_groups": 0}),
    (VAE_CONFIG, {"latent_channels": -4}),
    (VAE_CONFIG, {"latent_channels": 1.5}),
    (VAE_CONFIG, {"block_out_channels": []}),
    (VAE_CONFIG, {"layers_per_block": 10**30}),
    (VAE_CONFIG, {"sample_size": float("inf")}),
    (published.SCHEDULER_FILE, {"num_train_timesteps": -5}),
    (published.SCHEDULER_FILE, {"num_train_timesteps": 0}),
    (published.SCHEDULER_FILE, {"num_train_timesteps": 10**10}),
    (published.SCHEDULER_FILE, {"beta_start": "a", "beta_schedule": "linear"}),
    (published.SCHEDULER_FILE, {"beta_start": -1}),
    (published.SCHEDULER_FILE, {"trained_betas": 1}),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGED_CONFIGS, ids=str)
def test_a_damaged_configuration_is_refused_by_name_in_one_line_at_once(
    root: Path, file: str, damage: dict[str, object]
) -> None:
    config = {key: value for key, value in json.loads((root / file).read_text()).items() if key[0] != "_"}
    (root / file).write_text(json.dumps({**config, **damage}))
    began = time.monotonic()
    with pytest.raises(WeightsError, match="does not describe a") as caught:
        CatVTONPipeline.from_published(root)
    assert time.monotonic() - began < 20
    assert file in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("file", [UNET_CONFIG, VAE_CONFIG, published.SCHEDULER_FILE])
@pytest.mark.parametrize("depth", [950, 100_000])  # json follows the first
def test_a_configuration_that_is_nested_without_end_is_refused_by_name(root: Path, file: str, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    (root / file).write_text(f'{{"num_train_timesteps": {nested}, "layers_per_block": {nested}}}')
    with pytest.raises(WeightsError, match=file):
        CatVTONPipeline.from_published(root)


def test_a_unet_that_is_not_for_inpainting_is_refused(root: Path) -> None:
    config_file = root / published.UNET_FOLDER / published.CONFIG_FILE
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), "in_channels": 4}))
    edit(root / UNET_FILE, lambda t: {**t, "conv_in.weight": t["conv_in.weight"][:, :4].clone()})
    with pytest.raises(WeightsError, match="no inpainting UNet"):
        CatVTONPipeline.from_published(root)
