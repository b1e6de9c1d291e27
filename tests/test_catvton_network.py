"""Our forward of the UNet against the stock one, and what may be reused in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from catvton_recipe import build_pipeline, configs
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend

from model.catvton import kernels
from model.catvton.attention import TryOnUNet
from model.catvton.halves import GarmentFeatures, PersonHalf, RecordedCanvas
from model.catvton.network import DeepFeatures, attentions
from model.embedded import load_pipeline

CONFIGS = ("tiny2", "tiny3", "quick", "embedded")


@pytest.fixture(scope="module", params=CONFIGS)
def unet(request: pytest.FixtureRequest) -> TryOnUNet:
    return (load_pipeline() if request.param == "embedded" else build_pipeline(request.param)).unet.eval()


def sample(unet: TryOnUNet, *, batch: int = 2, rows: int = 32, columns: int = 12, seed: int = 0) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(batch, unet.config.in_channels, rows, columns, generator=drawn)


def stock(unet: TryOnUNet, given: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return UNet2DConditionModel.forward(unet, given, timestep, None, return_dict=False)[0]


def ours(unet: TryOnUNet, given: torch.Tensor, timestep: torch.Tensor, **options: object) -> torch.Tensor:
    with torch.no_grad():
        return unet(given, timestep, return_dict=False, **options)[0]


def assert_near(actual: torch.Tensor, expected: torch.Tensor, share: float = 1e-5) -> None:
    assert float((actual - expected).abs().max() / expected.std()) < share


@pytest.mark.parametrize("size", [{}, {"rows": 34, "columns": 10}, {"batch": 1, "rows": 16, "columns": 6}])
def test_the_forward_is_the_stock_one(unet: TryOnUNet, size: dict[str, int]) -> None:
    given, timestep = sample(unet, **size), torch.tensor(481)
    assert_near(ours(unet, given, timestep), stock(unet, given, timestep))


def test_a_row_of_the_table_is_the_timesteps_own(unet: TryOnUNet) -> None:
    given, timesteps = sample(unet), torch.tensor([901, 481, 1])
    with torch.no_grad():
        table = unet.time_shifts(timesteps)
    for index, timestep in enumerate(timesteps):
        drawn = ours(unet, given, timestep, shifts=table[index : index + 1])
        assert_near(drawn, stock(unet, given, timestep))


def test_each_picture_of_a_batch_may_have_its_own_timestep(unet: TryOnUNet) -> None:
    given, timesteps = sample(unet), torch.tensor([901, 1])
    assert_near(ours(unet, given, timesteps), stock(unet, given, timesteps))


def test_the_layout_of_memory_changes_rounding_alone(unet: TryOnUNet) -> None:
    given, timestep = sample(unet), torch.tensor(481)
    drawn = ours(unet, given.to(memory_format=torch.channels_last), timestep)
    assert_near(drawn, stock(unet, given, timestep))


def test_in_half_precision_it_is_as_near_to_the_truth_as_the_stock_one() -> None:
    unet = build_pipeline("tiny3").unet.eval()
    given, timestep = sample(unet), torch.tensor(481)
    truth = stock(unet, given, timestep)
    halved = unet.to(torch.bfloat16)
    off = [(each(halved, given.bfloat16(), timestep).float() - truth).square().mean().sqrt() for each in (ours, stock)]
    assert float(off[0]) <= 1.25 * float(off[1])


def test_gradients_flow_as_through_the_stock_one(unet: TryOnUNet) -> None:
    given, timestep = sample(unet), torch.tensor([481])
    weight = unet.down_blocks[0].resnets[0].conv1.weight
    gradients = []
    for forward in (unet, lambda *args, **options: UNet2DConditionModel.forward(unet, *args, None, **options)):
        unet.zero_grad()
        forward(given, timestep, return_dict=False)[0].square().mean().backward()
        gradients.append(weight.grad.clone())
    unet.zero_grad()
    assert_near(*gradients, share=1e-4)


def test_one_graph_holds_the_whole_forward() -> None:
    unet = build_pipeline("tiny2").unet.eval()
    given, timestep = sample(unet), torch.tensor([481])
    compiled = torch.compile(unet, backend="eager", fullgraph=True)
    with torch.no_grad():
        shifts = unet.time_shifts(timestep)
        drawn = compiled(given, timestep, shifts=shifts, return_dict=False)[0]
    assert_near(drawn, stock(unet, given, timestep))


@pytest.mark.parametrize(
    "change",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"upcast_attention": True},
        {"down_block_types": ["AttnDownBlock2D", "DownBlock2D"]},
        {"act_fn": "gelu"},
    ],
    ids=str,
)
def test_a_unet_that_computes_something_else_is_refused(change: dict[str, object]) -> None:
    config = {**configs()["configs"]["tiny2"]["unet"], **change}
    with torch.device("meta"), pytest.raises(ValueError, match="of another kind"):
        TryOnUNet(**config)


def test_the_persons_half_of_a_recorded_canvas_is_that_of_the_whole(unet: TryOnUNet) -> None:
    given, timestep, kept = sample(unet), torch.tensor(481), GarmentFeatures()
    whole = ours(unet, given, timestep, canvas=RecordedCanvas(kept))
    assert_near(whole, stock(unet, given, timestep))
    person = ours(unet, given[:, :, :16], timestep, canvas=PersonHalf(kept))
    assert_near(person, whole[:, :, :16], share=1e-4)


def test_what_is_new_in_the_persons_half_shows(unet: TryOnUNet) -> None:
    given, timestep, kept = sample(unet), torch.tensor(481), GarmentFeatures()
    ours(unet, given, timestep, canvas=RecordedCanvas(kept))
    changed = given.clone()
    changed[:, :, :16] += 0.05 * sample(unet, seed=1)[:, :, :16]
    whole = stock(unet, changed, timestep)[:, :, :16]
    person = ours(unet, changed[:, :, :16], timestep, canvas=PersonHalf(kept))
    stale = stock(unet, given, timestep)[:, :, :16]
    assert float((person - whole).square().mean()) < 0.2 * float((stale - whole).square().mean())


def test_reused_deep_features_give_the_same_for_the_same_and_the_skip_stays_new(unet: TryOnUNet) -> None:
    given, timestep, deep = sample(unet), torch.tensor(481), DeepFeatures()
    whole = ours(unet, given, timestep, deep=deep)
    deep.reuse = True
    assert_near(ours(unet, given, timestep, deep=deep), whole)
    other = ours(unet, sample(unet, seed=1), timestep, deep=deep)
    assert not torch.allclose(other, whole, atol=1e-3)


def test_every_attention_has_its_level() -> None:
    levels = [level for level, _ in attentions(build_pipeline("tiny3").unet)]
    assert len(levels) == sum(name.endswith("attn1") for name, _ in build_pipeline("tiny3").unet.named_modules())
    assert levels == sorted(levels[: levels.index(max(levels)) + 1]) + levels[levels.index(max(levels)) + 1 :]
    assert levels[0] == levels[-1] == 0


FLASH, CUDNN, EFFICIENT = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({CUDNN: 1.0, FLASH: 2.0, EFFICIENT: 3.0}, CUDNN),
        ({CUDNN: 1.0, FLASH: 0.97, EFFICIENT: 3.0}, CUDNN),  # too near to switch
        ({CUDNN: 2.0, FLASH: 1.0, EFFICIENT: 0.5}, EFFICIENT),
        ({FLASH: 2.0}, FLASH),
        ({}, SDPBackend.MATH),
    ],
)
def test_the_fastest_kernel_that_runs_is_chosen(times: dict[SDPBackend, float], expected: SDPBackend) -> None:
    def time_of(kernel: SDPBackend) -> float:
        if kernel not in times:
            raise RuntimeError("No available kernel")
        return times[kernel]

    assert kernels.fastest((CUDNN, FLASH, EFFICIENT), time_of) == expected


@pytest.mark.parametrize(
    "failure",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: device-side assert"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    ],
)
def test_a_device_that_fails_says_nothing_of_a_kernel(failure: RuntimeError) -> None:
    def time_of(kernel: SDPBackend) -> float:
        raise failure

    with pytest.raises(RuntimeError) as caught:
        kernels.fastest((CUDNN, FLASH), time_of)
    assert caught.value is failure


@pytest.mark.parametrize("wrong", [None, FLASH, SDPBackend.MATH])
def test_kernels_are_timed_and_compared_before_one_is_chosen(
    wrong: SDPBackend | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [torch.randn(1, 2, 64, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    computed = kernels.scaled_dot_product_attention
    used: list[SDPBackend] = [FLASH]  # torch's own choice

    @contextmanager
    def only(kernel: SDPBackend) -> Iterator[None]:
        used.append(kernel)
        yield
        used.pop()

    def attention(*tensors: torch.Tensor) -> torch.Tensor:
        return computed(*tensors) + (len(used) > 1 and used[-1] == wrong)

    monkeypatch.setattr(kernels, "sdpa_kernel", only)
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(kernels, "CANDIDATES", (FLASH, EFFICIENT))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
    chosen = kernels._fastest_on_cuda(*drawn)
    assert chosen in ({EFFICIENT} if wrong == FLASH else {FLASH, EFFICIENT})


@pytest.mark.gpu
def test_on_cuda_a_kernel_is_chosen_once_for_a_shape() -> None:
    drawn = [torch.randn(2, 8, 256, 40, device="cuda", dtype=torch.float16) for _ in range(3)]
    expected = torch.nn.functional.scaled_dot_product_attention(*(each.float() for each in drawn))
    torch.testing.assert_close(kernels.attend(*drawn).float(), expected, atol=2e-2, rtol=0)
    assert kernels.chosen_kernels()["2x8x256x40 to 256"] in {
        kernel.name for kernel in (*kernels.CANDIDATES, SDPBackend.MATH)
    }
