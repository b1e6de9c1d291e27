from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from catvton_recipe import build_pipeline, write_published_layout
from PIL import Image

from model import embedded, load_engine, weights
from model.catvton.compiling import compile_unet
from model.catvton.engine import MEMORIES, CatVTONEngine, load, to_picture
from model.catvton.inputs import person_tensor
from model.device import choose_device, choose_dtype
from model.geometry import crop_resize, fit_pad
from model.interface import (
    EMBEDDED,
    BadPicture,
    DeviceFailed,
    EngineError,
    EngineOptions,
    GenerationSettings,
    OutOfMemory,
    TryOnInputs,
)

SETTINGS = GenerationSettings(steps=2, guidance=2.5, seed=11, width=48, height=64)
TILING_TOLERANCE = 0.25  # of the picture's own deviation; the tiny VAE normalises over so few pixels that tiles show


def inputs() -> TryOnInputs:
    rng = np.random.default_rng(3)
    mask = np.zeros((90, 70), np.uint8)
    mask[30:60, 20:50] = 255
    return TryOnInputs(rng.integers(0, 256, (90, 70, 3), np.uint8), rng.integers(0, 256, (40, 50, 3), np.uint8), mask)


class FakePipeline:
    """Answers each call with a tensor or fails with an exception; the last of its answers stays."""

    def __init__(self, *answers: torch.Tensor | Exception) -> None:
        self.answers = list(answers)

    def __call__(self, *_args: object, **_kwargs: object) -> SimpleNamespace:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(images=answer)


def generate(*answers: torch.Tensor | Exception) -> np.ndarray:
    return CatVTONEngine(FakePipeline(*answers), "catvton/fake").generate(inputs(), SETTINGS)


def test_each_step_is_told() -> None:
    told: list[tuple[int, int]] = []
    CatVTONEngine(build_pipeline(), "catvton/mix").generate(
        inputs(), replace(SETTINGS, on_step=lambda *step: told.append(step))
    )
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize("quality", ["balanced", "fast"])
def test_another_quality_is_another_picture_near_the_exact_one(quality: str) -> None:
    engine = CatVTONEngine(build_pipeline(), "catvton/mix")
    settings = replace(SETTINGS, steps=20)
    exact, other = engine.generate(inputs(), settings), engine.generate(inputs(), replace(settings, quality=quality))
    assert not np.array_equal(exact, other)
    assert np.abs(exact.astype(int) - other).mean() < 60


def test_a_garment_is_encoded_once_for_an_engine(tmp_path: Path) -> None:
    write_published_layout(tmp_path)
    engine = load(EngineOptions(weights=tmp_path, device="cpu", dtype="float32"))
    encoded: list[object] = []
    engine._pipeline.vae.encoder.register_forward_hook(lambda *_: encoded.append(1))
    for seed in (1, 2):
        engine.generate(inputs(), replace(SETTINGS, seed=seed))
    assert len(encoded) == 2  # the person and the garment


def test_an_unknown_compilation_is_refused(tmp_path: Path) -> None:
    write_published_layout(tmp_path)
    with pytest.raises(ValueError, match="unknown compilation"):
        load(EngineOptions(weights=tmp_path, device="cpu", compilation="max"))


def test_small_memory_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="excludes compilation"):
        load(EngineOptions(weights=tmp_path, device="cpu", memory="small", compilation="inductor"))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch, as it imports its own compiler
def test_a_compiled_engine_makes_the_same_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = build_pipeline()
    expected = CatVTONEngine(pipeline, "catvton/mix").generate(inputs(), SETTINGS)
    compiled = pipeline.unet.compile
    monkeypatch.setattr(pipeline.unet, "compile", lambda **_options: compiled(backend="eager", fullgraph=True))
    compile_unet(pipeline.unet, "inductor")
    np.testing.assert_array_equal(CatVTONEngine(pipeline, "catvton/mix").generate(inputs(), SETTINGS), expected)
    balanced = replace(SETTINGS, quality="balanced")
    np.testing.assert_array_equal(
        CatVTONEngine(pipeline, "catvton/mix").generate(inputs(), balanced),
        CatVTONEngine(build_pipeline(), "catvton/mix").generate(inputs(), balanced),
    )


def shaded() -> torch.Tensor:
    return torch.linspace(0, 1, 3 * 64 * 48).reshape(1, 3, 64, 48)


def test_the_picture_is_the_pipelines_for_that_seed() -> None:
    pipeline = build_pipeline()
    picture = CatVTONEngine(pipeline, "catvton/mix").generate(inputs(), SETTINGS)
    given = inputs()
    expected = pipeline(
        given.person,
        given.garment,
        given.mask,
        height=64,
        width=48,
        num_inference_steps=2,
        guidance_scale=2.5,
        generator=torch.Generator("cpu").manual_seed(11),
    ).images[0]
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, np.asarray(expected))


def test_the_largest_seed_is_taken() -> None:
    settings = GenerationSettings(steps=1, guidance=1.0, seed=2**63 - 1, width=48, height=64)
    assert CatVTONEngine(build_pipeline(), "catvton/mix").generate(inputs(), settings).shape == (64, 48, 3)


def test_a_picture_drawn_at_the_work_size_is_enlarged_with_lanczos() -> None:
    engine = CatVTONEngine(FakePipeline(shaded()), "catvton/embedded", work_size_wh=(48, 64))
    settings = GenerationSettings(steps=1, guidance=1.0, seed=0, width=96, height=128)
    picture = engine.generate(inputs(), settings)
    small = Image.fromarray(to_picture(shaded()[0]))
    np.testing.assert_array_equal(picture, np.asarray(small.resize((96, 128), Image.Resampling.LANCZOS)))


def test_the_work_size_itself_is_not_resized() -> None:
    engine = CatVTONEngine(FakePipeline(shaded()), "catvton/embedded", work_size_wh=(48, 64))
    np.testing.assert_array_equal(engine.generate(inputs(), SETTINGS), to_picture(shaded()[0]))


class EchoPipeline:
    """Answers with the people as a pipeline crops them, and keeps what it was given."""

    def __call__(self, people: list, garments: list, masks: list, *, width: int, height: int, **_: object) -> object:
        self.person, self.garment, self.mask = people[0], garments[0], masks[0]
        return SimpleNamespace(
            images=person_tensor([Image.fromarray(each) for each in people], width, height) / 2 + 0.5
        )


def echo(given: TryOnInputs, size_wh: tuple[int, int]) -> tuple[EchoPipeline, np.ndarray]:
    """What an engine that draws at 48x64 hands over, and its picture of that size."""
    pipeline = EchoPipeline()
    engine = CatVTONEngine(pipeline, "catvton/embedded", work_size_wh=(48, 64))
    return pipeline, engine.generate(given, replace(SETTINGS, width=size_wh[0], height=size_wh[1]))


def slopes(size_wh: tuple[int, int]) -> TryOnInputs:
    """Colours that tell the place, and a mask of the left half."""
    x, y = np.meshgrid(np.linspace(0, 255, size_wh[0]), np.linspace(0, 255, size_wh[1]))
    person = np.stack([x, y, 255 - x], axis=-1).astype(np.uint8)
    return TryOnInputs(person, person, np.where(x < 128, 255, 0).astype(np.uint8))


@pytest.mark.parametrize("size_wh", [(96, 128), (128, 128), (256, 128), (80, 256), (88, 128), (512, 64), (64, 512)])
def test_the_person_is_in_place_whatever_aspect_is_asked_for(size_wh: tuple[int, int]) -> None:
    given = slopes(size_wh)
    pipeline, picture = echo(given, size_wh)
    assert picture.shape == given.person.shape
    assert np.abs(picture.astype(int) - given.person).mean() < 4
    assert pipeline.mask.shape == pipeline.person.shape[:2]


@pytest.mark.parametrize("size_wh", [(128, 128), (80, 256)])
def test_a_person_of_another_size_is_cropped_to_the_aspect_asked_for(size_wh: tuple[int, int]) -> None:
    given = slopes((300, 200))
    cropped = crop_resize(Image.fromarray(given.person), *size_wh)
    assert np.abs(echo(given, size_wh)[1].astype(int) - np.asarray(cropped)).mean() < 4


def test_what_the_mask_hides_does_not_show_beside_the_person() -> None:
    pipeline, _ = echo(slopes((256, 128)), (256, 128))
    assert pipeline.person.shape == (64, 48, 3)
    np.testing.assert_array_equal(pipeline.mask >= 128, np.tile(np.arange(48) < 24, (64, 1)))


@pytest.mark.parametrize("work_size_wh", [None, (48, 64), (24, 32)])
def test_where_the_aspect_is_that_of_the_work_the_pictures_are_handed_over_as_they_came(
    work_size_wh: tuple[int, int] | None,
) -> None:
    given, pipeline = inputs(), EchoPipeline()
    CatVTONEngine(pipeline, "catvton/fake", work_size_wh=work_size_wh).generate(given, SETTINGS)
    assert (pipeline.person is given.person, pipeline.garment is given.garment, pipeline.mask is given.mask) == (
        True,
    ) * 3


@pytest.mark.parametrize(("size_wh", "of_work_wh"), [((256, 128), (96, 128)), ((80, 256), (80, 106))])
def test_white_around_a_garment_does_not_make_it_smaller_twice(
    size_wh: tuple[int, int], of_work_wh: tuple[int, int]
) -> None:
    garment = np.asarray(fit_pad(Image.new("RGB", (66, 88)), *size_wh))
    pipeline, _ = echo(replace(slopes(size_wh), garment=garment), size_wh)
    assert pipeline.garment.shape[1::-1] == of_work_wh
    assert (pipeline.garment == 0).sum() == (garment == 0).sum()


@pytest.mark.parametrize("grey", [0, 254, 255])
def test_no_more_of_a_garment_is_cut_than_white_on_both_sides(grey: int) -> None:
    garment = np.full((128, 256, 3), 255, np.uint8)
    garment[:, 10:200] = grey
    pipeline, _ = echo(replace(slopes((256, 128)), garment=garment), (256, 128))
    assert pipeline.garment.shape == ((128, 256, 3) if grey == 255 else (128, 236, 3))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_one_value_that_is_not_finite_makes_a_bad_picture(poison: float) -> None:
    pixels = shaded()
    pixels[0, 1, 5, 7] = poison
    with pytest.raises(BadPicture, match="not finite"):
        generate(pixels)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_a_picture_of_one_value_is_a_bad_picture(level: float) -> None:
    with pytest.raises(BadPicture, match="every value of the picture"):
        generate(torch.full((1, 3, 64, 48), level))


def test_nan_in_the_weights_makes_a_bad_picture() -> None:
    pipeline = build_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_out.bias[0] = torch.nan
    with pytest.raises(BadPicture, match="not finite"):
        CatVTONEngine(pipeline, "catvton/mix").generate(inputs(), SETTINGS)


def test_out_of_memory_empties_the_cache_and_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    cause = torch.cuda.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory) as caught:
        generate(cause)
    assert caught.value.__cause__ is cause
    assert emptied == [True, True]


def test_a_picture_for_which_memory_lacked_once_is_made_with_an_empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    assert generate(torch.cuda.OutOfMemoryError("CUDA out of memory"), shaded()).shape == (64, 48, 3)
    assert emptied == [True]


HINT = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA` to enable "
    "device-side assertions.\n"
)


@pytest.mark.parametrize(
    "text",
    [
        f"CUDA error: out of memory{HINT}",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
    ],
)
def test_memory_that_lacks_is_told_apart_in_whatever_words(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    for error in errors_of_cuda(text):
        assert generate(error, shaded()).shape == (64, 48, 3)
        with pytest.raises(OutOfMemory) as caught:
            generate(error)
        assert caught.value.__cause__ is error
    assert len(emptied) == 3 * len(errors_of_cuda(text))


def errors_of_cuda(text: str) -> list[RuntimeError]:
    """As this torch may raise it: later ones have a class of their own for what CUDA reports."""
    return [kind(text) for kind in (RuntimeError, getattr(torch, "AcceleratorError", None)) if kind is not None]


def test_a_failed_device_on_which_cudnn_finds_no_engine_is_told_from_one_short_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", fail)
    with pytest.raises(DeviceFailed, match=r"unable to find an engine.*illegal memory access"):
        generate(RuntimeError("GET was unable to find an engine to execute this computation"), shaded())


def test_a_batch_for_which_memory_lacks_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    pipeline = FakePipeline(torch.cuda.OutOfMemoryError("CUDA out of memory"), shaded().repeat(2, 1, 1, 1))
    with pytest.raises(OutOfMemory):
        CatVTONEngine(pipeline, "catvton/fake").generate_batch([inputs()] * 2, [SETTINGS] * 2)


def test_each_picture_of_a_batch_is_that_of_its_seed_alone() -> None:
    engine = CatVTONEngine(build_pipeline(), "catvton/mix")
    settings = [replace(SETTINGS, seed=seed) for seed in (11, 12, 13)]
    together = engine.generate_batch([inputs()] * 3, settings)
    for picture, each in zip(together, settings):
        alone = engine.generate(inputs(), each).astype(int)
        assert np.abs(picture - alone).max() <= 1
    assert not np.array_equal(together[0], together[1])


def test_a_batch_of_different_settings_is_refused() -> None:
    engine = CatVTONEngine(FakePipeline(shaded()), "catvton/fake")
    with pytest.raises(ValueError, match="differ in the seed alone"):
        engine.generate_batch([inputs()] * 2, [SETTINGS, replace(SETTINGS, steps=3)])


@pytest.mark.parametrize(
    "text",
    [
        f"CUDA error: an illegal memory access was encountered{HINT}",
        f"CUDA error: device-side assert triggered{HINT}",
        "CUDA driver error: device-side assert triggered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
    ],
)
def test_a_sticky_cuda_error_means_the_device_failed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emptied = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    cause = RuntimeError(text)
    with pytest.raises(DeviceFailed) as caught:
        generate(cause, shaded())
    assert caught.value.__cause__ is cause
    assert emptied == []


@pytest.mark.skipif(not hasattr(torch, "AcceleratorError"), reason="this torch has no AcceleratorError")
def test_an_accelerator_error_means_the_device_failed() -> None:
    with pytest.raises(DeviceFailed):
        generate(torch.AcceleratorError("unspecified launch failure"))


def test_any_other_runtime_error_is_an_engine_error() -> None:
    cause = RuntimeError("shapes do not match")
    with pytest.raises(EngineError) as caught:
        generate(cause)
    assert type(caught.value) is EngineError
    assert caught.value.__cause__ is cause


def test_published_weights_go_by_their_variant(tmp_path: Path) -> None:
    engine = load(EngineOptions(weights=write_published_layout(tmp_path, variant="vitonhd"), variant="vitonhd"))
    assert engine.name == "catvton/vitonhd"
    assert engine.generate(inputs(), SETTINGS).shape == (64, 48, 3)


def test_no_engine_of_weights_that_are_not_intact_is_handed_out(tmp_path: Path) -> None:
    options = EngineOptions(weights=write_published_layout(tmp_path), device="cpu")
    assert load_engine("catvton", options).name == "catvton/mix"
    file = tmp_path / "sd-vae-ft-mse" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    assert load(options).name == "catvton/mix"  # they would load
    with pytest.raises(weights.WeightsError, match="has changed or is damaged"):
        load_engine("catvton", options)


def memories(root: Path, device: str = "cpu", **options: object) -> list[CatVTONEngine]:
    """The engine with either memory."""
    return [load(EngineOptions(weights=root, device=device, memory=memory, **options)) for memory in MEMORIES]


def test_with_small_memory_the_vae_works_in_tiles_and_one_picture_after_the_other(tmp_path: Path) -> None:
    normal, small = (engine._pipeline.vae for engine in memories(write_published_layout(tmp_path)))
    assert (normal.use_tiling, normal.use_slicing) == (False, False)
    assert (small.use_tiling, small.use_slicing) == (True, True)


def test_a_picture_of_one_tile_does_not_depend_on_the_memory(tmp_path: Path) -> None:
    normal, small = memories(write_published_layout(tmp_path))
    np.testing.assert_array_equal(small.generate(inputs(), SETTINGS), normal.generate(inputs(), SETTINGS))


def test_a_picture_of_several_tiles_differs_by_their_edges_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    normal, small = memories(write_published_layout(tmp_path))
    tiles = []
    encode = small._pipeline.vae.encoder.forward
    monkeypatch.setattr(small._pipeline.vae.encoder, "forward", lambda x: tiles.append(x.shape[-2:]) or encode(x))
    settings = replace(SETTINGS, width=128, height=192)
    whole, tiled = (engine.generate(inputs(), settings).astype(int) for engine in (normal, small))
    assert max(max(shape) for shape in tiles) == 64
    difference = np.abs(whole - tiled)
    assert 0 < difference.mean() < TILING_TOLERANCE * whole.std()


def test_an_unknown_memory_is_refused_with_the_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown memory 'tiny'; one of: normal, small"):
        load(EngineOptions(weights=tmp_path, memory="tiny"))


@pytest.mark.gpu
def test_on_cuda_small_memory_keeps_on_the_card_only_what_works(tmp_path: Path) -> None:
    normal, small = memories(write_published_layout(tmp_path), "cuda", dtype="float32")
    assert {tensor.device.type for tensor in small._pipeline.unet.parameters()} == {"cpu"}
    pictures = [engine.generate(inputs(), SETTINGS).astype(int) for engine in (normal, small)]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2
    assert {tensor.device.type for tensor in small._pipeline.unet.parameters()} == {"cpu"}


def test_the_embedded_model_works_at_its_own_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "load_pipeline", lambda **_: build_pipeline())
    monkeypatch.setattr(embedded, "WORK_SIZE_WH", (24, 32), raising=False)
    engine = load(EngineOptions(weights=EMBEDDED, device="cpu"))
    assert engine.name == "catvton/embedded"
    assert engine.generate(inputs(), SETTINGS).shape == (64, 48, 3)


@pytest.mark.parametrize("progress", [True, False])
def test_the_progress_bar_is_shown_only_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], progress: bool
) -> None:
    root = write_published_layout(tmp_path)
    load(EngineOptions(weights=root, device="cpu", progress=progress)).generate(inputs(), SETTINGS)
    assert ("2/2" in capsys.readouterr().err) is progress


def test_devices_go_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [choose_device(name).type for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [choose_device(name).type for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(ValueError, match="device 'cuda' was asked for but no CUDA device is present"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="unknown device 'tpu'; one of: auto, cuda, cpu"):
        choose_device("tpu")


def test_dtypes_go_by_name() -> None:
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32
    assert choose_dtype("auto", torch.device("cuda")) is torch.float16
    assert choose_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
    with pytest.raises(ValueError, match="unknown dtype 'int8'; one of: auto, float16, bfloat16, float32"):
        choose_dtype("int8", torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.parametrize("tf32", [True, False])
def test_on_cuda_the_picture_is_near_that_of_the_cpu(tmp_path: Path, tf32: bool) -> None:
    root = write_published_layout(tmp_path)
    drawn = [
        load(EngineOptions(weights=root, device=device, dtype="float32", tf32=tf32)).generate(inputs(), SETTINGS)
        for device in ("cpu", "cuda")
    ]
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() < 2
