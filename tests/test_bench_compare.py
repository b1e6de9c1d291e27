from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import arms as making
from bench import compare, pipeline, record, surroundings
from bench.arms import TIMED, make_arms, random_conditions
from bench.baseline import Baseline, stock_unet
from bench.compare import BASELINE, Arm, floor_of, ratio, rotated, spread
from bench.memory import verdict
from bench.pipeline import main
from bench.record import COMPARISON, DRIFT, HERE, held, put, tables
from bench.sizes import LATENT_PX, SIZES, Job, random_modules
from bench.stopwatch import AttentionWitness, Stopwatch
from model.catvton.pipeline import CatVTONPipeline

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
JOB = Job("tiny", CPU, torch.float32, height=64, width=48, steps=2, repeats=1)
OPTIONS = ["--compare", "--config", "tiny", "--device", "cpu", "--height", "64", "--width", "48", "--steps", "2"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One comparison of two rounds with every arm that is not compiled."""
    path = tmp_path_factory.mktemp("compare") / "report.json"
    done = CliRunner().invoke(main, [*OPTIONS, "--rounds", "2", "--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    found = json.loads(path.read_text())
    assert all(f"\n{name} " in done.output for name in found["arms"])
    return found


@pytest.fixture
def root(tmp_path):
    """A copy of what the writer writes into."""
    (tmp_path / "results").mkdir()
    shutil.copy(HERE / "README.md", tmp_path)
    return tmp_path


def test_every_arm_is_compared_with_the_baseline(report):
    assert list(report["arms"]) == [BASELINE, "exact", f"{BASELINE}, our attention", *TIMED_IN_ORDER]
    for arm in report["arms"].values():
        assert 0 < arm["loop_ms"]["p10"] <= arm["loop_ms"]["median"] <= arm["loop_ms"]["p90"]
        assert arm["step_ms"] == pytest.approx(arm["loop_ms"]["median"] / arm["steps"])
        assert arm["tflop_per_s"] == pytest.approx(arm["step_tflop"] / arm["step_ms"] * 1e3)
        for speedup in (arm["speedup"], arm["whole_speedup"]):
            assert 0 < speedup["low"] <= speedup["median"] <= speedup["high"]
        assert arm["first_call_s"] > 0
        assert arm["peak_memory_bytes"] is arm["peak_reserved_bytes"] is None
    assert report["arms"][BASELINE]["speedup"] == {"median": 1.0, "low": 1.0, "high": 1.0}


TIMED_IN_ORDER = [
    "no guidance",
    "guided share 0.5",
    "person-only unconditional",
    "garment interval 2",
    "deep interval 2",
    "guided share 0.5, person-only",
    "balanced",
    "fast",
]


def test_the_circumstances_are_told(report):
    assert set(TIMED_IN_ORDER) == set(TIMED)
    assert (report["config"], report["device"], report["rounds"], report["warm_ups"]) == ("tiny", "cpu", 2, 3)
    assert report["clock"] == "processor time"
    assert len(report["load_average"]) == 2
    assert report["floor"] is None
    assert report["failed"] == {}
    assert report["gpu_states"] == []
    assert {"python", "torch", "diffusers"} <= set(report["versions"])


def test_the_attention_that_ran_is_told_by_its_shape(report):
    for arm in report["arms"].values():
        assert arm["attention_ops"]
        assert all(op.startswith("_scaled_dot_product_") for op in arm["attention_ops"].values())
    assert "2 x 4 x 96 x 8" in report["arms"][BASELINE]["attention_ops"]  # both branches, 2 * 8 rows of 6 tokens
    assert "1 x 4 x 96 x 8" in report["arms"]["no guidance"]["attention_ops"]


def test_the_exact_arms_make_the_baselines_picture(report):
    for name in (BASELINE, f"{BASELINE}, our attention", "exact"):
        assert report["arms"][name]["near_baseline_share"] >= 0.99
    assert "near_baseline_share" not in report["arms"]["no guidance"]


def test_in_the_small_size_fast_takes_4_of_10_steps_of_a_canvas_of_48x24_latents():
    small = SIZES["small"]
    assert (2 * small.height // LATENT_PX, small.width // LATENT_PX) == (48, 24)
    job = Job("tiny", CPU, torch.float32, 64, 48, small.steps, 1)
    steps = {arm.name: arm.steps for arm in make_arms(job, compiled=False)}
    assert steps.pop("fast") == 4
    assert set(steps.values()) == {10}


def test_the_operations_of_an_arm_are_those_of_its_recipe(report):
    flop = {name: arm["step_tflop"] for name, arm in report["arms"].items()}
    assert flop["exact"] == flop[BASELINE] == pytest.approx(2 * flop["no guidance"], rel=1e-2)
    assert flop["guided share 0.5"] == pytest.approx(0.75 * flop["exact"], rel=1e-2)


def test_the_stock_unet_shares_every_weight():
    _, unet = random_modules(JOB)
    stock = stock_unet(unet)
    mine = dict(unet.named_parameters())
    shared = {name: parameter for name, parameter in stock.named_parameters() if ".attn2." not in name}
    assert set(shared) == set(mine)
    assert all(parameter.data_ptr() == mine[name].data_ptr() for name, parameter in shared.items())


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled: the keywords of each call."""
    wrapped = []
    monkeypatch.setattr(torch, "compile", lambda module: wrapped.append({}) or module)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda _module, **options: wrapped.append(options))
    return wrapped


@pytest.fixture
def on_cuda(monkeypatch):
    """A job for CUDA whose tensors lie on the CPU."""
    conditions = random_conditions(JOB)
    monkeypatch.setattr(making, "random_modules", lambda _job: random_modules(JOB))
    monkeypatch.setattr(making, "random_conditions", lambda _job: conditions)
    return replace(JOB, device=CUDA)


def test_all_arms_of_a_compilation_are_there(compilations):
    names = [arm.name for arm in make_arms(JOB, compiled=True)]
    plain = [BASELINE, f"{BASELINE}, compiled", "exact", "exact, compiled", f"{BASELINE}, our attention"]
    assert names == [*plain, *TIMED_IN_ORDER]
    assert len(compilations) == 2


def test_on_cuda_layout_search_and_graphs_are_arms_of_their_own(compilations, on_cuda):
    names = [arm.name for arm in make_arms(on_cuda, compiled=True)]
    assert names[:9] == [
        BASELINE,
        f"{BASELINE}, compiled",
        "exact",
        f"{BASELINE}, no cuDNN search",
        "exact, cuDNN search",
        "exact, contiguous",
        "exact, compiled",
        "exact, graphs",
        f"{BASELINE}, our attention",
    ]
    assert [options.get("mode") for options in compilations] == [None, None, "reduce-overhead"]


def test_every_arm_on_cuda_has_its_layout_and_only_the_searching_ones_search(monkeypatch, on_cuda):
    seen = []

    def watched(denoise):
        def watching(self, *args, **options):
            weight = self.unet.conv_in.weight
            last = weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
            seen.append((torch.backends.cudnn.benchmark, last, threading.get_ident()))
            return denoise(self, *args, **options)

        return watching

    arms = [arm for arm in make_arms(on_cuda, compiled=False) if arm.name not in TIMED]
    for one in (Baseline, CatVTONPipeline):
        monkeypatch.setattr(one, "denoise", watched(one.denoise))
    for arm in arms:
        arm.draw(Stopwatch(CPU))
        assert torch.backends.cudnn.benchmark is False
    found = {arm.name: each for arm, each in zip(arms, seen)}
    assert {name: (searching, last) for name, (searching, last, _) in found.items()} == {
        BASELINE: (True, False),
        f"{BASELINE}, no cuDNN search": (False, False),
        f"{BASELINE}, our attention": (True, False),
        "exact": (False, True),
        "exact, cuDNN search": (True, True),
        "exact, contiguous": (False, False),
    }
    # torch keeps cuDNN's algorithms by thread, however they were found
    assert len({(searching, thread) for searching, _, thread in seen}) == len({thread for *_, thread in seen}) == 2


def test_a_switch_that_was_on_stays_on(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    making.CudnnSearch()(arm("a", 1, [])).draw(Stopwatch(CPU))
    assert torch.backends.cudnn.benchmark is True


def test_the_attention_kernels_are_timed_in_the_first_call_of_the_exact_arm(monkeypatch, on_cuda):
    drawing, asked = [], []
    attend = making.attend

    def noted(*tensors):
        asked.append(drawing[-1])
        return attend(*tensors)

    arms = list(make_arms(on_cuda, compiled=False))
    monkeypatch.setattr(making, "attend", noted)
    monkeypatch.setattr("model.catvton.network.attend", noted)
    for one in arms:
        drawing.append(one.name)
        one.draw(Stopwatch(CPU))
    assert asked[0] == "exact"
    assert f"{BASELINE}, our attention" in asked


# --- how arms take turns


def arm(name, seconds, calls):
    def draw(watch):
        calls.append(name)
        with watch.whole(), watch.loop():
            pass
        if not isinstance(watch, AttentionWitness):
            watch.loop_s = watch.whole_s = seconds
        return np.zeros((1, 2, 2, 3), np.uint8)

    return Arm(name, 2, 1.0, exact=True, modules=(), draw=draw)


def test_rounds_are_rotated_and_every_second_one_goes_backwards():
    arms = [arm(name, 1, []) for name in "abc"]
    assert ["".join(one.name for one in rotated(arms, turn)) for turn in range(4)] == ["abc", "acb", "cab", "cba"]


def test_each_arm_is_warmed_up_three_times_before_the_first_round():
    calls = []
    arms = [arm("a", 2, calls), arm("b", 1, calls)]
    found = compare.compare(arms, CPU, rounds=3, limit_s=60)
    assert "".join(calls) == "aaabbb" + "ab" + "ab" + "ab"
    assert found["arms"]["b"]["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert found["arms"]["b"]["tflop_per_s"] == 1.0


def test_no_round_but_the_first_begins_after_the_limit():
    found = compare.compare([arm("a", 1, [])], CPU, rounds=50, limit_s=1e-6)
    assert found["rounds"] == 1


def test_ratios_are_of_the_same_round():
    drifting = [1.0, 2.0, 4.0, 8.0]
    found = ratio(drifting, [each / 2 for each in drifting])
    assert (found.median, found.low, found.high) == (2, 2, 2)
    wide = ratio([1, 2, 3, 4, 5], [1] * 5)
    assert wide.low < wide.median == 3 < wide.high


def test_a_spread_is_median_and_tenths():
    found = spread(range(11))
    assert (found.median, found.p10, found.p90) == (5, 1, 9)


@pytest.mark.parametrize(
    ("name", "peak", "step"),
    [
        ("NVIDIA H200", 790, ", 27.2 ms per guided step at 1024x768"),
        ("NVIDIA H100 80GB HBM3", 790, ", 27.2 ms per guided step at 1024x768"),
        ("NVIDIA H100 PCIe", None, None),
        ("NVIDIA A10G", 70, ""),
        ("NVIDIA L4", 121, ""),
        ("NVIDIA L40S", 362, ""),
        ("Tesla T4", None, None),
    ],
)
def test_the_floor_is_that_of_the_gpu_by_its_name(report, name, peak, step):
    floor = floor_of(name)
    assert (floor and floor.tflop_per_s) == peak
    shown = compare.terminal_table({**report, "floor": floor and vars(floor)}).splitlines()
    assert [line for line in shown if line.startswith("floor")] == ([f"floor: {peak} TFLOP/s{step}"] if floor else [])


def failing(name, error):
    def draw(_watch):
        raise error

    return Arm(name, 2, 1.0, exact=True, modules=(), draw=draw)


@pytest.mark.parametrize("error", [RuntimeError("no compiler\nat all"), AssertionError("no compiler")])
def test_an_arm_that_does_not_run_costs_no_other_its_figures(report, error):
    arms = [arm("a", 2, []), failing("b", error), arm("c", 1, [])]
    found = compare.compare(arms, CPU, rounds=2, limit_s=60)
    assert list(found["arms"]) == ["a", "c"]
    assert found["failed"] == {"b": f"{type(error).__name__}: no compiler"}
    assert f"did not run: b: {type(error).__name__}: no compiler" in compare.terminal_table({**report, **found})


def test_without_the_baseline_there_is_no_comparison():
    with pytest.raises(RuntimeError, match="no"):
        compare.compare([failing("a", RuntimeError("no")), arm("b", 1, [])], CPU, rounds=1, limit_s=60)


def test_what_did_not_run_is_told_by_the_exit_status_after_the_rest_was_kept(monkeypatch, report, tmp_path):
    path = tmp_path / "report.json"
    monkeypatch.setattr(pipeline, "run", lambda job, **_: {**report, "failed": {"b": "why"}})
    done = CliRunner().invoke(main, [*OPTIONS, "--json", str(path)])
    assert done.exit_code == 1
    assert "Error: did not run: b" in done.output
    assert "exact" in json.loads(path.read_text())["arms"]


class Card:
    """Counts bytes as torch does for a GPU: `held` in tensors, and the rest of what is reserved is free."""

    def __init__(self, held):
        self.held = self.reserved = held
        self.reset()

    def reset(self, _device=None):
        self.most = (self.held, self.reserved)

    def empty(self):
        self.reserved = self.held

    def take(self, count, *, keep=0):
        """So many bytes at a time, of which some stay; a reserve of a tenth comes with them."""
        self.reserved = max(self.reserved, self.held + count + count // 10)
        self.most = (max(self.most[0], self.held + count), max(self.most[1], self.reserved))
        self.held += keep


@pytest.fixture
def card(monkeypatch):
    """A GPU on which 1000 bytes are held."""
    card = Card(1000)
    answers = {
        "empty_cache": card.empty,
        "reset_peak_memory_stats": card.reset,
        "memory_allocated": lambda _device: card.held,
        "memory_reserved": lambda _device: card.reserved,
        "max_memory_allocated": lambda _device: card.most[0],
        "max_memory_reserved": lambda _device: card.most[1],
        "synchronize": lambda _device: None,
        "get_device_name": lambda _device: "NVIDIA L4",
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(compare, "gpu_state", lambda _device: None)
    return card


def test_the_peak_is_that_of_the_arm_alone_and_of_a_call_that_is_not_its_first(card):
    weights = torch.nn.Linear(10, 5, bias=False)  # 200 bytes, among the thousand
    calls = []

    def draw(watch):
        card.take(500 if calls else 9000, keep=0 if calls else 100)
        calls.append(watch)
        watch.loop_s = watch.whole_s = 1.0
        return np.zeros((1, 2, 2, 3), np.uint8)

    only = Arm("exact", 2, 1.0, exact=True, modules=(weights,), draw=draw)
    figures = compare.compare([only], CUDA, rounds=1, limit_s=60)["arms"]["exact"]
    assert figures["peak_memory_bytes"] == 200 + 100 + 500
    assert figures["peak_reserved_bytes"] == 200 + 100 + 550
    assert compare.peak_text({"peak_memory_bytes": 3 * 2**20, "peak_reserved_bytes": 4 * 2**20}) == "3 / 4"


@pytest.mark.parametrize(
    ("reserved", "changed", "said"),
    [
        (4_500_000_000, {}, "at most 4.5 GB holds"),
        (4_500_000_001, {}, "at most 4.5 GB is BROKEN"),
        (4_500_000_000, {"dtype": "float32"}, None),
        (4_500_000_000, {"height": 512}, None),
        (None, {}, None),
    ],
)
def test_whether_exact_mode_keeps_to_its_memory_is_told(report, reserved, changed, said):
    peaks = {"peak_memory_bytes": reserved and 3_000_000_000, "peak_reserved_bytes": reserved}
    published = {"config": "sd15", "dtype": "float16", "height": 1024, "width": 768}
    found = {**report, **published, **changed, "arms": {"exact": {**report["arms"]["exact"], **peaks}}}
    if said is None:
        assert verdict(found) is None
        assert "GB" not in compare.terminal_table(found)
    else:
        assert verdict(found).endswith(said)
        assert f"\n{verdict(found)}\n" in compare.terminal_table(found)


@pytest.mark.parametrize("triton", ["3.3.1", None])
def test_on_cuda_triton_is_among_the_versions_where_it_is_there(monkeypatch, triton):
    def version(name):
        if triton is None:
            raise metadata.PackageNotFoundError
        return f"{name} {triton}"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 90100)
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setattr(surroundings.metadata, "version", version)
    found = surroundings.versions()
    assert (found["cuda"], found["cudnn"], found.get("triton")) == ("12.6", "90100", triton and "triton 3.3.1")


def test_the_conditions_are_the_same_each_time():
    first, second = random_conditions(JOB), random_conditions(JOB)
    assert torch.equal(first.person, second.person)
    assert first.person.shape == (1, 3, 64, 48)
    assert not torch.equal(first.person, first.garment)


def test_a_stopwatch_takes_processor_time_on_a_cpu():
    watch = Stopwatch(CPU)
    with watch.whole(), watch.loop():
        sum(range(100_000))
    assert 0 < watch.loop_s <= watch.whole_s < 10


# --- what is kept

LINES = """GPU-1111-22, 570.1, 1980, 2619, 1980, 512.33, 700.00, 61, 99
GPU-3333-44, 570.1, [N/A], 2619, 1980, 100.00, 700.00, 33, 0
"""


def test_the_state_is_that_of_the_gpu_with_this_identity():
    state = surroundings.parsed_state(LINES, "3333-44")
    assert (state["temperature.gpu"], state["clocks.sm"], state["power.draw"]) == (33, "[N/A]", 100)
    assert surroundings.parsed_state(LINES, "5555") is None
    assert surroundings.parsed_state("No devices were found\n", "1") is None


def as_gpu(report, name="NVIDIA Made-Up 9000", peak=2 * 2**30):
    seen = {"peak_memory_bytes": peak, "peak_reserved_bytes": peak + 2**20, "peak_share": 0.5}
    arms = {key: {**arm, **seen} for key, arm in report["arms"].items()}
    return {
        **report,
        "device": "cuda",
        "device_name": name,
        "arms": arms,
        "failed": {"exact, graphs": "RuntimeError: no /usr/bin/cc"},
    }


def test_a_recorded_comparison_is_a_file_and_a_table(report, root):
    path = record.record(as_gpu(report), date(2026, 11, 21), root)
    assert path == root / "results" / "nvidia-made-up-9000-2026-11-21.json"
    assert json.loads(path.read_text())["device_name"] == "NVIDIA Made-Up 9000"
    text = (root / "README.md").read_text()
    assert "**NVIDIA Made-Up 9000**, 2026-11-21: tiny, 64x48" in text
    assert f"(results/{path.name})" in text
    assert text.count("| guided share 0.5, person-only | 2 |") == 1
    assert "(50%) |" in text
    assert "| 2048 / 2049 |" in text
    assert "\n\n`exact, graphs` did not run (RuntimeError).\n" in text


def test_the_newest_of_each_device_is_shown(report, root):
    record.record(as_gpu(report), date(2026, 11, 21), root)
    record.record(as_gpu(report), date(2026, 12, 1), root)
    record.record(report, date(2026, 11, 30), root)
    text = tables(root / "results")
    assert text == held(root / "README.md", COMPARISON)
    assert "2026-12-01" in text
    assert "2026-11-21" not in text
    assert "cpu-2026-11-30.json" in text


def test_what_is_around_the_tables_stays(report, root):
    before = (HERE / "README.md").read_text()
    record.record(as_gpu(report), date(2026, 11, 21), root)
    put(root / "README.md", COMPARISON, held(HERE / "README.md", COMPARISON))
    assert (root / "README.md").read_text() == before


@pytest.mark.parametrize("text", ["", "<!-- comparison:begin -->\n", "<!-- comparison:end -->\n"])
def test_a_readme_without_both_markers_is_left_alone(tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="comparison"):
        put(readme, COMPARISON, "table")
    assert readme.read_text() == text


def test_the_readme_shows_the_results_that_are_there():
    assert held(HERE / "README.md", COMPARISON) == tables(HERE / "results")
    assert held(HERE / "README.md", DRIFT)


def test_record_writes_beside_the_bench(monkeypatch, report, root):
    written = []
    monkeypatch.setattr(pipeline, "run", lambda job, **_: report)
    monkeypatch.setattr(pipeline, "record", lambda figures, day: written.append(figures) or Path("kept.json"))
    done = CliRunner().invoke(main, [*OPTIONS, "--record"], catch_exceptions=False)
    assert done.exit_code == 0
    assert written == [report]
    assert "kept in kept.json" in done.output


@pytest.mark.parametrize("option", ["--compile", "--record"])
def test_what_goes_with_a_comparison_is_refused_without(option):
    done = CliRunner().invoke(main, ["--config", "tiny", "--device", "cpu", option])
    assert done.exit_code == 2
    assert "--compare" in done.output
