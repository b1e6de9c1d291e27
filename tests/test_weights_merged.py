"""One file in place of many: how it is made, found, preferred, proved, and what it must hold."""

from __future__ import annotations

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from catvton_recipe import write_published_layout
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from container.weights_cli import EXIT_OUTPUT, EXIT_SETTINGS, weights_group
from model import load_engine, weights
from model.artifact import ENGINE
from model.catvton import published
from model.catvton.pipeline import CatVTONPipeline
from model.interface import EngineOptions, GenerationSettings, TryOnInputs
from model.manifest import merged_name
from model.weights import RECORD, WeightsError, listing, verify

MERGED = "CatVTON/mix.safetensors"
CONFIGS = [
    "sd-vae-ft-mse/config.json",
    "stable-diffusion-inpainting/scheduler/scheduler_config.json",
    "stable-diffusion-inpainting/unet/config.json",
]
SETTINGS = GenerationSettings(steps=2, guidance=2.0, seed=1, width=64, height=64)


@pytest.fixture(scope="module")
def separate(tmp_path_factory) -> Path:
    """The tiny model as three repositories publish it, in float32, with its record; not to be changed."""
    folder = write_published_layout(tmp_path_factory.mktemp("separate"))
    verify(folder, "catvton", "mix")
    return folder


@pytest.fixture(scope="module")
def packed(separate, tmp_path_factory) -> Path:
    """What `vton weights pack --merged` makes of it; not to be changed."""
    output = tmp_path_factory.mktemp("merged") / "model"
    status, said = run("pack", "--merged", "--dir", separate, "-o", output)
    assert status == 0, said
    return output


@pytest.fixture
def merged(packed, tmp_path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(packed, tmp_path / "weights"))


def run(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(weights_group, [str(each) for each in arguments], catch_exceptions=False)
    return done.exit_code, done.output


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def record_in(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())


def load(folder: Path, dtype: str = "float32"):
    return load_engine("catvton", EngineOptions(folder, device="cpu", dtype=dtype))


def drawn(engine) -> np.ndarray:
    rng = np.random.default_rng(3)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48] = 255
    photo, garment = rng.integers(0, 256, (2, 64, 64, 3), np.uint8)
    return engine.generate(TryOnInputs(photo, garment, mask), SETTINGS)


def state(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    pipeline = CatVTONPipeline.from_published(folder, dtype=dtype)
    return {
        f"{name}.{key}": tensor
        for name in ("unet", "vae")
        for key, tensor in getattr(pipeline, name).state_dict().items()
    }


def change(folder: Path, edit) -> None:
    """Another merged file, and no record of the old one."""
    save_file(edit(load_file(folder / MERGED)), folder / MERGED)
    (folder / RECORD).unlink()


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# What is packed


def test_a_merged_pack_holds_the_configurations_one_file_and_their_record(packed):
    assert files_in(packed) == sorted([*CONFIGS, MERGED, RECORD])
    assert not any(path.is_symlink() for path in packed.rglob("*"))
    assert files_in(packed.parent) == [f"model/{name}" for name in files_in(packed)]
    recorded = record_in(packed)["files"]
    assert sorted(recorded) == sorted([*CONFIGS, MERGED])
    assert recorded[MERGED]["sha256"] == hashlib.sha256((packed / MERGED).read_bytes()).hexdigest()
    assert verify(packed, "catvton", "mix").verified


def test_the_one_file_is_float16_and_holds_what_the_networks_have_and_nothing_else(separate, packed):
    tensors = load_file(packed / MERGED)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert tensors.keys() == state(separate, torch.float32).keys()
    assert not any(".attn2." in key for key in tensors)
    base = load_file(separate / published.UNET_FOLDER / published.WEIGHT_FILES[0])
    replaced = next(key for key in base if ".attn1.to_q" in key)
    assert not torch.equal(tensors[f"unet.{replaced}"], base[replaced].half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_weights_in_memory_are_those_of_the_separate_files_rounded_to_float16(separate, packed, dtype):
    expected, found = state(separate, torch.float32), state(packed, dtype)
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert found[key].dtype is dtype
        assert torch.equal(found[key], tensor.half().to(dtype)), key


def test_the_picture_is_that_of_the_separate_files(separate, packed):
    assert np.abs(drawn(load(separate)).astype(int) - drawn(load(packed))).max() <= 2
    np.testing.assert_array_equal(drawn(load(separate, "float16")), drawn(load(packed, "float16")))


def test_a_merged_file_for_sagemaker_unpacks_to_the_same_and_packs_again(packed, separate, tmp_path):
    first, second = tmp_path / "model.tar.gz", tmp_path / "again.tar.gz"
    assert run("pack", "--merged", "--dir", separate, "-o", first)[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.tar.gz"]
    with tarfile.open(first) as tar:
        assert [member.name for member in tar.getmembers()] == [RECORD, *sorted([*CONFIGS, MERGED])]
        tar.extractall(tmp_path / "opt")  # noqa: S202 - it was packed here
    assert (tmp_path / "opt" / MERGED).read_bytes() == (packed / MERGED).read_bytes()
    for again in ([], ["--merged"]):
        assert run("pack", *again, "--dir", tmp_path / "opt", "-o", second)[0] == 0
        assert second.read_bytes() == first.read_bytes()
        second.unlink()


def test_where_the_weights_came_from_is_still_recorded(separate, tmp_path):
    source = Path(shutil.copytree(separate, tmp_path / "source"))
    record = record_in(source)
    came_from = {"repo_id": "some/base", "revision": "c" * 40}
    record["repositories"] = {"stable-diffusion-inpainting": came_from}
    (source / RECORD).write_text(json.dumps(record))
    assert run("pack", "--merged", "--dir", source, "-o", tmp_path / "out")[0] == 0
    assert record_in(tmp_path / "out")["repositories"] == {"stable-diffusion-inpainting": came_from}


def test_a_number_that_float16_does_not_hold_is_refused_by_name(separate, tmp_path):
    source = Path(shutil.copytree(separate, tmp_path / "source"))
    (source / RECORD).unlink()
    file = source / published.VAE_FOLDER / published.WEIGHT_FILES[0]
    tensors = load_file(file)
    tensors["decoder.conv_out.bias"][0] = 70_000
    save_file(tensors, file)
    status, said = run("pack", "--merged", "--dir", source, "-o", tmp_path / "out" / "model")
    assert status == EXIT_SETTINGS
    assert "vae.decoder.conv_out.bias is beyond float16" in said
    assert not list((tmp_path / "out").iterdir())


def test_a_place_that_cannot_be_written_is_a_sentence(separate, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, said = run("pack", "--merged", "--dir", separate, "-o", tmp_path / "file" / "model")
    assert (status, len(said.splitlines())) == (EXIT_OUTPUT, 1)
    assert (tmp_path / "file").read_text() == "mine"


# What is found


def test_every_variant_has_a_name_of_its_own():
    for name in published.ATTENTION_FOLDERS:
        assert published.MERGED_FILES[name] == merged_name(ENGINE, name)
    assert published.MERGED_FILES["mix"] == MERGED
    assert merged_name("masker", "schp") is None


def test_where_both_are_there_only_the_merged_file_is_read_and_hashed(packed, separate, tmp_path):
    both = Path(shutil.copytree(separate, tmp_path / "both"))
    (both / MERGED).write_bytes((packed / MERGED).read_bytes())
    for file in both.rglob("*.safetensors"):
        if file.name != "mix.safetensors":
            file.write_bytes(b"damaged")
    np.testing.assert_array_equal(drawn(load(both)), drawn(load(packed)))
    assert verify(both, "catvton", "mix").files == len(CONFIGS) + 1


def test_another_variant_does_not_read_it(merged):
    with pytest.raises(WeightsError, match="is missing"):
        load_engine("catvton", EngineOptions(merged, variant="vitonhd", device="cpu"))


def test_it_is_listed_where_it_is_there(packed, separate):
    (line,) = [line for line in listing(packed) if line.file == MERGED]
    assert (line.parts, line.present, line.recorded, line.bytes) == (
        ("catvton/mix",),
        True,
        True,
        (packed / MERGED).stat().st_size,
    )
    assert "CC BY-NC-SA 4.0" in line.licence
    assert MERGED not in [line.file for line in listing(separate)]


def test_nothing_is_downloaded_that_it_stands_for(merged, monkeypatch):
    monkeypatch.setattr(weights, "_fetch", None)  # any call of it fails
    monkeypatch.setattr(weights, "compare", lambda *_: None)  # the tiny files are not the manifest's
    weights.download(merged, "catvton", "mix")


def test_a_damaged_one_is_deleted_when_the_published_files_are_fetched(merged, separate, monkeypatch):
    def fetch(weights_dir, repository, files, _record):
        for file in files:
            name = f"{repository.folder}/{file.path}"
            (weights_dir / name).parent.mkdir(parents=True, exist_ok=True)
            found = separate / name
            shutil.copy(found if found.exists() else found.with_name(published.WEIGHT_FILES[0]), weights_dir / name)
        return "c" * 40

    monkeypatch.setattr(weights, "_fetch", fetch)
    monkeypatch.setattr(weights, "compare", lambda *_: None)  # the tiny files are not the manifest's
    flip_last_byte(merged / MERGED)
    weights.download(merged, "catvton", "mix")
    assert not (merged / MERGED).exists()
    np.testing.assert_array_equal(drawn(load(merged)), drawn(load(separate)))


# What is refused


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_one_is_refused_by_name(merged, kept, recorded):
    if not recorded:
        (merged / RECORD).unlink()
    content = (merged / MERGED).read_bytes()
    (merged / MERGED).write_bytes(content[:kept])
    with pytest.raises(WeightsError, match=MERGED):
        load(merged)


def test_a_flipped_byte_is_refused_with_both_hashes(merged):
    wanted = record_in(merged)["files"][MERGED]["sha256"]
    flip_last_byte(merged / MERGED)
    found = hashlib.sha256((merged / MERGED).read_bytes()).hexdigest()
    with pytest.raises(WeightsError, match="has changed or is damaged") as caught:
        load(merged)
    assert wanted[:12] in str(caught.value)
    assert found[:12] in str(caught.value)


def test_a_directory_in_its_place_is_refused(merged):
    (merged / MERGED).unlink()
    (merged / MERGED).mkdir()
    with pytest.raises(WeightsError, match="is not a regular file"):
        load(merged)


@pytest.mark.parametrize("name", CONFIGS)
def test_it_does_not_stand_for_the_configurations(merged, name):
    (merged / name).unlink()
    with pytest.raises(WeightsError, match="is missing"):
        load(merged)


NORM = "unet.conv_norm_out.weight"
UNFIT = {
    "a tensor missing": (lambda t: {k: v for k, v in t.items() if k != NORM}, "conv_norm_out.weight is missing"),
    "a tensor of the wrong shape": (lambda t: {**t, NORM: torch.zeros(31)}, r"is \[31\], not \[32\]"),
    "a tensor too many": (lambda t: {**t, "unet.extra": torch.zeros(1)}, "unet.extra is unexpected"),
    "a network too many": (lambda t: {**t, "text.extra": torch.zeros(1)}, "text.extra is unexpected"),
    "a name without a network": (lambda t: {**t, "extra": torch.zeros(1)}, "extra is unexpected"),
    "an unused tensor": (
        lambda t: {**t, "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.zeros(32, 32)},
        "attn2.to_q.weight is unexpected",
    ),
    "whole numbers": (lambda t: {**t, NORM: torch.zeros(32, dtype=torch.int8)}, "is I8, not one of"),
    "nothing": (lambda _: {}, "is missing"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_one_that_does_not_fit_is_refused_by_file_and_key(merged, case):
    edit, sentence = UNFIT[case]
    change(merged, edit)
    with pytest.raises(WeightsError, match=sentence) as caught:
        load(merged)
    assert MERGED in str(caught.value)
