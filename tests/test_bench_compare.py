from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.profiler import ProfilerActivity, profile

from bench import arms as making
from bench import compare, pipeline, record, stopwatch, surroundings
from bench.arms import TIMED, make_arms, random_conditions
from bench.baseline import Baseline, stock_unet
from bench.compare import Arm, ratio, rotated, spread
from bench.counters import Shapes
from bench.pipeline import main, one_thread
from bench.record import COMPARISON, DRIFT, HERE, held, put, tables
from bench.sizes import LATENT_PX, SIZES, Job, random_modules
from bench.stopwatch import AttentionWitness, Stopwatch
from bench.verdicts import BASELINE, COMPILED_BASELINE, floor_of
from model.catvton.pipeline import CatVTONPipeline
from model.interface import BadPicture, OutOfMemory

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
JOB = Job("tiny", CPU, torch.float32, height=64, width=48, steps=2, repeats=1)
OPTIONS = ["--compare", "--config", "tiny", "--device", "cpu", "--height", "64", "--width", "48", "--steps", "2"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """One comparison of five rounds with every arm that is not compiled."""
    path = tmp_path_factory.mktemp("compare") / "report.json"
    done = CliRunner().invoke(main, [*OPTIONS, "--rounds", "5", "--json", str(path)], catch_exceptions=False)
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
    assert (report["config"], report["device"], report["rounds"], report["warm_ups"]) == ("tiny", "cpu", 5, 3)
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


def test_operations_are_counted_once_for_all_arms_of_one_recipe(monkeypatch, compilations):
    counted, loop = [], Shapes.loop
    monkeypatch.setattr(Shapes, "loop", lambda self, *what: counted.append(what) or loop(self, *what))
    arms = list(make_arms(JOB, compiled=True))
    assert (len(arms), len(counted)) == (13, 0)
    assert all(one.count_tflop() > 0 for one in arms)
    assert len(counted) == len(set(counted)) == 9  # the exact one, and those of TIMED


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
    profiled_on_cuda(monkeypatch)
    return replace(JOB, device=CUDA)


def profiled_on_cuda(monkeypatch):
    """What is asked of each profile, none of which sees the CUDA that is not there."""
    asked = []

    def on_cpu(activities, **options):
        asked.append(activities)
        return profile(activities=activities[:1], **options)

    for module in (making, stopwatch):
        monkeypatch.setattr(module, "profile", on_cpu)
    return asked


def test_all_arms_of_a_compilation_are_there(compilations):
    names = [arm.name for arm in make_arms(JOB, compiled=True)]
    plain = [BASELINE, COMPILED_BASELINE, "exact", "exact, compiled", f"{BASELINE}, our attention"]
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
    making.CudnnSearch(CPU)(arm("a", 1, [])).draw(Stopwatch(CPU))
    assert torch.backends.cudnn.benchmark is True


def test_every_profile_of_a_process_sees_what_the_first_one_was_asked_for(monkeypatch):
    asked = profiled_on_cuda(monkeypatch)
    for name in ("synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _device: None)
    making.CudnnSearch(CUDA)
    with AttentionWitness(CUDA).loop():
        pass
    assert asked == [[ProfilerActivity.CPU, ProfilerActivity.CUDA]] * 2


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

    return Arm(name, 2, lambda: 1.0, exact=True, modules=(), draw=draw)


def test_rounds_are_rotated_and_every_second_one_goes_backwards():
    arms = [arm(name, 1, []) for name in "abc"]
    assert ["".join(one.name for one in rotated(arms, turn)) for turn in range(4)] == ["abc", "acb", "cab", "cba"]


def test_each_arm_is_warmed_up_three_times_before_the_first_round():
    calls = []
    arms = [arm("a", 2, calls), arm("b", 1, calls)]
    found = compare.compare(arms, CPU, rounds=5, limit_s=60)
    assert "".join(calls) == "aaabbb" + 5 * "ab"
    assert found["arms"]["b"]["speedup"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert found["arms"]["b"]["tflop_per_s"] == 1.0


def test_no_round_but_the_first_begins_after_the_limit():
    found = compare.compare([arm("a", 1, [])], CPU, rounds=50, limit_s=1e-6)
    assert found["rounds"] == 1


def test_warm_ups_take_nothing_from_the_time_for_rounds(monkeypatch):
    calls = []  # of ten seconds each
    clock = SimpleNamespace(monotonic=lambda: 10.0 * len(calls), perf_counter=time.perf_counter)
    monkeypatch.setattr(compare, "time", clock)
    assert compare.compare([arm("a", 1, calls)], CPU, rounds=50, limit_s=25)["rounds"] == 3


def test_each_arm_is_told_of_as_soon_as_it_is_warm(capsys):
    told, second = [], arm("b", 1, [])

    def draw(watch):
        told.append(capsys.readouterr().err)
        return second.draw(watch)

    others = [failing("c", BadPicture("not finite")), replace(second, draw=draw)]
    compare.compare([arm("a", 1, []), *others], CPU, rounds=1, limit_s=60)
    assert told[0].startswith("warmed up: a, first call 0.")
    assert told[0].endswith("\nfailed: c: BadPicture: not finite\n")
    assert told[3].startswith("warmed up: b, ")


def test_the_report_of_the_rounds_so_far_is_handed_on_after_each():
    kept = []
    found = compare.compare([arm("a", 2, []), arm("b", 1, [])], CPU, rounds=6, limit_s=60, keep=kept.append)
    assert [each["rounds"] for each in kept] == [1, 2, 3, 4, 5, 6]
    assert [each["arms"]["b"]["speedup"]["median"] for each in kept] == 6 * [2]
    assert kept[-1]["arms"] == found["arms"]


def test_a_run_that_is_killed_leaves_the_rounds_that_it_had(tmp_path):
    path = tmp_path / "report.json"
    command = [sys.executable, "-m", "bench.pipeline", *OPTIONS, "--rounds", "100000", "--json", str(path)]
    with subprocess.Popen(command, cwd=HERE.parent, stderr=subprocess.DEVNULL) as running:
        ends = time.monotonic() + 200
        while not path.exists() and running.poll() is None and time.monotonic() < ends:
            time.sleep(0.05)
        running.kill()
    report = json.loads(path.read_text())
    assert report["rounds"] >= 1
    assert report["config"] == "tiny"
    assert set(TIMED) < set(report["arms"])


def test_ratios_are_of_the_same_round():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0]
    found = ratio(drifting, [each / 2 for each in drifting])
    assert (found.median, found.low, found.high) == (2, 2, 2)
    wide = ratio([1, 2, 3, 4, 5], [1] * 5)
    assert wide.low < wide.median == 3 < wide.high


@pytest.mark.parametrize("rounds", [1, 4])
def test_too_few_rounds_have_no_interval(report, rounds):
    found = ratio([4.0] * rounds, [2.0] * rounds)
    assert (found.median, found.low, found.high) == (2, None, None)
    some = compare.compare([arm("a", 2, []), arm("b", 1, [])], CPU, rounds=rounds, limit_s=60)
    assert " 2.000 (-) " in compare.terminal_table({**report, **some})
    assert "| 2.00 (-) | 2.00 (-) |" in record.table(some)


def test_where_the_baseline_was_compiled_arms_are_compared_with_that_as_well():
    arms = [arm("a", 3, []), arm(COMPILED_BASELINE, 2, []), arm("b", 1, [])]
    found = compare.compare(arms, CPU, rounds=5, limit_s=60)["arms"]
    assert found["b"]["speedup_on_compiled"] == {"median": 2.0, "low": 2.0, "high": 2.0}
    (alone,) = compare.compare(arms[:1], CPU, rounds=5, limit_s=60)["arms"].values()
    assert "speedup_on_compiled" not in alone


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


def failing(name, error, *, after=0):
    """An arm of one second that makes so many pictures first."""
    calls = []

    def draw(watch):
        if len(calls) == after:
            raise error
        return arm(name, 1, calls).draw(watch)

    return Arm(name, 2, lambda: 1.0, exact=True, modules=(), draw=draw)


FAILURES = [
    RuntimeError("no compiler\nat all"),
    AssertionError("no compiler"),
    BadPicture("no compiler"),
    OutOfMemory("no compiler"),
    MemoryError("no compiler"),
    ValueError("no compiler"),
    IndexError("no compiler"),
]


@pytest.mark.parametrize("error", FAILURES)
@pytest.mark.parametrize("after", [0, 2, 3, 4])
def test_an_arm_that_fails_costs_no_other_its_figures(report, error, after):
    arms = [arm("a", 2, []), failing("b", error, after=after), arm("c", 1, [])]
    found = compare.compare(arms, CPU, rounds=3, limit_s=60)
    assert (list(found["arms"]), found["rounds"]) == (["a", "c"], 3)
    assert found["arms"]["c"]["speedup"]["median"] == 2
    assert found["failed"] == {"b": f"{type(error).__name__}: no compiler"}
    assert f"did not run: b: {type(error).__name__}: no compiler" in compare.terminal_table({**report, **found})


def test_an_arm_whose_operations_cannot_be_counted_costs_no_other_its_figures():
    uncounted = replace(arm("b", 1, []), count_tflop=lambda: {}["b"])
    found = compare.compare([arm("a", 2, []), uncounted, arm("c", 1, [])], CPU, rounds=3, limit_s=60)
    assert (list(found["arms"]), found["rounds"]) == (["a", "c"], 3)
    assert found["failed"] == {"b": "KeyError: 'b'"}


def test_arms_that_cannot_make_a_picture_of_the_size_are_left_out_and_told_of(tmp_path):
    path = tmp_path / "report.json"
    options = [*OPTIONS, "--height", "72", "--rounds", "1", "--json", str(path)]
    done = CliRunner().invoke(main, options)
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    found = json.loads(path.read_text())
    assert list(found["failed"]) == ["garment interval 2"]
    assert set(found["arms"]) == {BASELINE, "exact", f"{BASELINE}, our attention", *TIMED} - set(found["failed"])
    assert "a height whose latents can be halved" in found["failed"]["garment interval 2"]
    assert "Error: did not run: garment interval 2\n" in done.output


def test_without_the_baseline_there_is_no_comparison():
    with pytest.raises(RuntimeError, match="no"):
        compare.compare([failing("a", RuntimeError("no")), arm("b", 1, [])], CPU, rounds=1, limit_s=60)


def test_a_baseline_that_fails_later_ends_the_comparison_with_the_rounds_before_it_kept():
    kept = []
    arms = [failing("a", BadPicture("no"), after=5), arm("b", 1, [])]
    with pytest.raises(BadPicture):
        compare.compare(arms, CPU, rounds=9, limit_s=60, keep=kept.append)
    assert [each["rounds"] for each in kept] == [1, 2]


def test_a_lost_device_costs_no_arm_the_rounds_before():
    kept = []
    arms = [arm("a", 1, []), failing("b", RuntimeError("CUDA error: unspecified launch failure"), after=5)]
    with pytest.raises(RuntimeError, match="unspecified"):
        compare.compare(arms, CPU, rounds=9, limit_s=60, keep=kept.append)
    assert [list(each["arms"]) for each in kept] == 2 * [["a", "b"]]


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

    only = Arm("exact", 2, lambda: 1.0, exact=True, modules=(weights,), draw=draw)
    figures = compare.compare([only], CUDA, rounds=1, limit_s=60)["arms"]["exact"]
    assert figures["peak_memory_bytes"] == 200 + 100 + 500
    assert figures["peak_reserved_bytes"] == 200 + 100 + 550
    assert compare.peak_text({"peak_memory_bytes": 3 * 2**20, "peak_reserved_bytes": 4 * 2**20}) == "3 / 4"


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


SMALL = {"config": "small", "height": 192, "width": 192}  # float32, as the report is
SD15 = {"config": "sd15", "height": 1024, "width": 768, "dtype": "float16"}


def as_gpu(report, name="NVIDIA Made-Up 9000", peak=2 * 2**30):
    seen = {"peak_memory_bytes": peak, "peak_reserved_bytes": peak + 2**20, "peak_share": 0.5}
    arms = {key: {**arm, **seen} for key, arm in report["arms"].items()}
    return {
        **report,
        **SD15,
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
    assert "**NVIDIA Made-Up 9000**, 2026-11-21: sd15, 1024x768" in text
    assert f"(results/{path.name})" in text
    assert text.count("| guided share 0.5, person-only | 2 |") == 1
    assert "(50%) |" in text
    assert "| 2048 / 2049 |" in text
    assert "\n\n`exact, graphs` did not run (RuntimeError).\n" in text


def test_the_newest_of_each_device_is_shown(report, root):
    record.record(as_gpu(report), date(2026, 11, 21), root)
    record.record(as_gpu(report), date(2026, 12, 1), root)
    record.record({**report, **SMALL}, date(2026, 11, 30), root)
    text = tables(root / "results")
    assert text == held(root / "README.md", COMPARISON)
    assert "2026-12-01" in text
    assert "2026-11-21" not in text
    assert "cpu-2026-11-30.json" in text


OTHERS = [
    ({"config": "tiny"}, "tiny-1024x768-float16"),
    ({"dtype": "bfloat16"}, "sd15-1024x768-bfloat16"),
    ({"height": 512, "width": 384}, "sd15-512x384-float16"),
    ({"height": 768, "width": 1024}, "sd15-768x1024-float16"),
]


@pytest.mark.parametrize(("changes", "named"), OTHERS, ids=[named for _, named in OTHERS])
def test_another_configuration_has_a_file_of_its_own_and_no_table(report, root, changes, named):
    day = date(2026, 12, 1)
    promised = record.record(as_gpu(report), day, root)
    before, shown = promised.read_text(), (root / "README.md").read_text()
    path = record.record({**as_gpu(report), **changes}, day, root)
    assert path.name == f"nvidia-made-up-9000-{named}-2026-12-01.json"
    assert (promised.read_text(), (root / "README.md").read_text()) == (before, shown)
    record.record({**as_gpu(report), **changes, "rounds": 7}, day, root)
    assert json.loads(path.read_text())["rounds"] == 7
    record.record(as_gpu(report), day, root)
    assert (root / "README.md").read_text() == shown
    assert len(list((root / "results").iterdir())) == 2


def test_on_a_cpu_the_small_size_in_float32_is_the_one_that_is_promised(report, root):
    found = [{**report, **changes} for changes in ({}, SMALL, {**SMALL, "dtype": "float16"})]
    names = [record.record(each, date(2026, 12, 1), root).name for each in found]
    assert names == [
        "cpu-tiny-64x48-float32-2026-12-01.json",
        "cpu-2026-12-01.json",
        "cpu-small-192x192-float16-2026-12-01.json",
    ]
    assert held(root / "README.md", COMPARISON).count("**, 2026-12-01: ") == 1


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


def test_rounds_are_recorded_as_they_come_once_they_are_enough(monkeypatch, report):
    written = []
    monkeypatch.setattr(pipeline, "record", lambda figures, day: written.append((figures["rounds"], day)))
    for rounds in range(1, 8):
        pipeline.keep({**report, "rounds": rounds}, None, date(2026, 11, 21))
    assert written == [(rounds, date(2026, 11, 21)) for rounds in (5, 6, 7)]


def test_a_report_that_cannot_be_written_costs_neither_table_nor_rounds_nor_recording(monkeypatch, report, tmp_path):
    folder, rounds = tmp_path / "folder", []

    def run_in_a_folder_that_goes(job, *, keep, **_):
        folder.rmdir()
        for count in range(1, 8):
            keep({**report, "rounds": count})
            rounds.append(count)
        return report

    folder.mkdir()
    monkeypatch.setattr(pipeline, "run", run_in_a_folder_that_goes)
    monkeypatch.setattr(pipeline, "record", lambda *_: Path("kept.json"))
    done = CliRunner().invoke(main, [*OPTIONS, "--record", "--json", str(folder / "report.json")])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert rounds == [1, 2, 3, 4, 5, 6, 7]
    assert "\nexact " in done.output
    assert "\nkept in kept.json\n" in done.output
    assert f"Error: {folder / 'report.json'} cannot be written: No such file or directory\n" in done.output


def test_a_recording_that_fails_costs_neither_table_nor_report(monkeypatch, report, tmp_path):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "report.json"
    monkeypatch.setattr(pipeline, "run", lambda job, **_: report)
    monkeypatch.setattr(pipeline, "record", full)
    done = CliRunner().invoke(main, [*OPTIONS, "--record", "--json", str(path)])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert "Error: not recorded: [Errno 28] No space left on device\n" in done.output
    assert json.loads(path.read_text())["rounds"] == 5


def test_too_few_rounds_are_not_recorded_but_written(monkeypatch, report, tmp_path):
    path = tmp_path / "report.json"
    monkeypatch.setattr(pipeline, "run", lambda job, **_: {**report, "rounds": 4})
    monkeypatch.setattr(pipeline, "record", lambda *_: pytest.fail("recorded"))
    done = CliRunner().invoke(main, [*OPTIONS, "--record", "--json", str(path)])
    assert done.exit_code == 1
    assert done.output.endswith("Error: not recorded: 4 rounds give no interval, 5 do\n")
    assert json.loads(path.read_text())["rounds"] == 4


@pytest.mark.parametrize("option", ["--compile", "--record"])
def test_what_goes_with_a_comparison_is_refused_without(option):
    done = CliRunner().invoke(main, ["--config", "tiny", "--device", "cpu", option])
    assert done.exit_code == 2
    assert "--compare" in done.output


def test_a_cpu_is_compared_on_one_thread_and_gets_the_others_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_thread(CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with one_thread(CUDA):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
