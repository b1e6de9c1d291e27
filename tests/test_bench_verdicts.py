"""What is promised of a comparison is found in its report, told, and told by the exit status."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from bench import arms as making
from bench import compare, pipeline, record
from bench.compare import Arm
from bench.pipeline import main
from bench.sizes import SIZES, Job
from bench.verdicts import BASELINE, broken, verdicts

CPU = torch.device("cpu")
OPTIONS = ["--compare", "--config", "tiny", "--device", "cpu"]
CUDNN = "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64"
FLASH = "void pytorch_flash::flash_fwd_kernel<pytorch_flash::Flash_fwd_kernel_traits<64, 128, 128, 4> >"
SPEEDS = {"balanced": 1.9, "fast": 4.5, "person-only unconditional": 1.3, "no guidance": 1.9}


def figures(times, **changes):
    """Of an arm that is so many times faster."""
    ratio = {"median": times, "low": times - 0.1, "high": times + 0.1}
    speeds = {"speedup": ratio, "whole_speedup": ratio, "peak_memory_bytes": None, "peak_reserved_bytes": None}
    timed = {"loop_ms": {"median": 20.0, "p10": 19.0, "p90": 21.0}, "step_ms": 2.0, "tflop_per_s": 1.0, "steps": 10}
    return {**timed, **speeds, "first_call_s": 1.0, "attention_ops": {}, "attention_kernels": [], **changes}


def compared(device_name, *, exact=1.3, kernels=(CUDNN,), share=1.0, on_compiled=None, **changes):
    """A report at the published size on a GPU of that name, or at the small one on a "cpu"."""
    size = SIZES["small" if device_name == "cpu" else "sd15"]
    mine = figures(exact, near_baseline_share=share)
    if on_compiled is not None:
        mine["speedup_on_compiled"] = {"median": on_compiled, "low": on_compiled, "high": on_compiled}
    if device_name != "cpu":
        mine.update(peak_memory_bytes=3_000_000_000, peak_reserved_bytes=3_400_000_000)
    base = figures(1.0, attention_kernels=list(kernels), near_baseline_share=1.0)
    return {
        "config": "small" if device_name == "cpu" else "sd15",
        "device": "cpu" if device_name == "cpu" else "cuda",
        "device_name": device_name,
        "dtype": "float32" if device_name == "cpu" else "float16",
        "height": size.height,
        "width": size.width,
        "arms": {BASELINE: base, "exact": mine, **{name: figures(times) for name, times in SPEEDS.items()}},
        "failed": {},
        "floor": None,
        "rounds": 5,
        "clock": "processor time",
        "load_average": [0.5, 0.5],
        "gpu_states": [],
        "versions": {"python": "3.9"},
        **changes,
    }


def found(report):
    return [
        (verdict.text.partition(":")[0], verdict.found, verdict.limit, verdict.holds) for verdict in verdicts(report)
    ]


EXACTLY = ("exact", 1.0, 0.99, True)
MEMORY = ("exact", 3_400_000_000, 4_500_000_000, True)


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA H100 80GB HBM3"])
def test_on_a_hopper_every_promise_is_judged(name):
    fast = [("balanced", 1.9, 1.8, True), ("fast", 4.5, 4.2, True)]
    assert found(compared(name, on_compiled=1.2)) == [
        EXACTLY,
        ("exact", 1.3, 1.12, True),
        *fast,
        ("exact", 1.2, 1.0, True),
        MEMORY,
    ]
    assert found(compared(name)) == [EXACTLY, ("exact", 1.3, 1.12, True), *fast, MEMORY]


def test_on_a_cpu_at_the_small_size_times_are_judged_and_do_not_decide():
    report = compared("cpu", exact=0.97)
    times = [
        ("exact", 0.97, 1.0, False),
        ("person-only unconditional", 1.3, 1.25, True),
        ("no guidance", 1.9, 1.8, True),
    ]
    assert found(report) == [EXACTLY, *times]
    assert [verdict.decides for verdict in verdicts(report)] == [True, False, False, False]
    assert broken(report) == []


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("NVIDIA L4", {}),
        ("NVIDIA H100 PCIe", {}),
        ("NVIDIA H200", {"dtype": "bfloat16"}),
        ("NVIDIA H200", {"height": 512}),
        ("cpu", {"config": "tiny"}),
        ("cpu", {"width": 256}),
    ],
)
def test_where_no_times_are_promised_none_are_judged(name, changes):
    assert not [verdict for verdict in verdicts(compared(name, **changes)) if "times as fast" in verdict.text]


@pytest.mark.parametrize(("steps", "judged"), [(5, 0), (10, 3), (12, 0), (50, 3)])
def test_times_are_judged_at_steps_that_every_recipe_shares_evenly(steps, judged):
    report = compared("NVIDIA H200")
    report["arms"][BASELINE]["steps"] = steps
    assert sum("times as fast" in verdict.text for verdict in verdicts(report)) == judged


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        ([CUDNN], "; at least 1.12 holds"),
        ([FLASH], "; at least 1.4 on its FlashAttention 2 is BROKEN"),
        ([CUDNN, FLASH], "; at least 1.12 holds"),
        ([], "; at least 1.12, the baseline's attention kernels not seen, holds"),
    ],
)
def test_exact_mode_has_to_reach_more_where_the_baselines_attention_leaves_more(kernels, said):
    text = verdicts(compared("NVIDIA H200", kernels=kernels))[1].text
    assert text == f"exact: 1.30 (1.20 to 1.40) times as fast as the baseline{said}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"exact": 1.11}, "exact: 1.11 (1.01 to 1.21) times as fast as the baseline; at least 1.12 is BROKEN"),
        (
            {"on_compiled": 0.95},
            "exact: 0.95 (0.95 to 0.95) times as fast as the compiled baseline; at least 1 is BROKEN",
        ),
        ({"share": 0.985}, "exact: 98.50 % of values within 2 grey levels of the baseline's; at least 99 % is BROKEN"),
    ],
)
def test_a_broken_promise_is_told_everywhere_and_by_the_exit_status(monkeypatch, tmp_path, changes, said):
    report = compared("NVIDIA H200", **changes)
    assert broken(report) == [said]
    assert f"\n{said}\n" in compare.terminal_table(report)
    path = tmp_path / "gpu-2026-11-21.json"
    record.write_json(path, report)
    assert f"\n- {said}" in record.table_of_file(path, report)
    monkeypatch.setattr(pipeline, "run", lambda job, **_: report)
    done = CliRunner().invoke(main, OPTIONS)
    assert done.exit_code == 1
    assert done.output.endswith(f"Error: {said}\n")


def test_promises_that_hold_leave_the_exit_status_alone(monkeypatch):
    for report in (compared("NVIDIA H200"), compared("cpu"), compared("cpu", exact=0.5)):
        monkeypatch.setattr(pipeline, "run", lambda job, report=report, **_: report)
        assert CliRunner().invoke(main, OPTIONS, catch_exceptions=False).exit_code == 0


@pytest.mark.parametrize(("share", "dtype", "decides"), [(0.98, "float16", True), (0.98, "bfloat16", False)])
def test_no_two_ways_are_exact_in_bfloat16(share, dtype, decides):
    assert bool(broken(compared("NVIDIA L4", share=share, dtype=dtype))) is decides


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
def test_whether_exact_mode_keeps_to_its_memory_is_told(reserved, changed, said):
    report = compared("NVIDIA L4", **changed)
    report["arms"]["exact"].update(peak_memory_bytes=reserved and 3_000_000_000, peak_reserved_bytes=reserved)
    told = [verdict.text for verdict in verdicts(report) if "GB" in verdict.text]
    if said is None:
        assert told == []
        assert "GB" not in compare.terminal_table(report)
    else:
        assert told[0].endswith(said)
        assert told[0] in compare.terminal_table(report).splitlines()
        assert broken(report) == (told if "BROKEN" in said else [])


def test_an_arm_that_did_not_run_has_no_verdict():
    report = compared("NVIDIA H200")
    for name in ("exact", "fast"):
        del report["arms"][name]
    assert found(report) == [("balanced", 1.9, 1.8, True)]


def one(name, grey, *, exact):
    def draw(watch):
        watch.loop_s = watch.whole_s = 1.0
        return np.full((1, 4, 4, 3), grey, np.uint8)

    return Arm(name, 10, lambda: 1.0, exact=exact, modules=(), draw=draw)


def test_another_picture_is_broken_of_an_exact_arm_alone_and_is_in_the_report(monkeypatch):
    arms = [one(BASELINE, 100, exact=True), one("exact", 102, exact=True), one("exact, compiled", 97, exact=True)]
    monkeypatch.setattr(making, "make_arms", lambda *_, **__: [*arms, one("fast", 50, exact=False)])
    job = Job("tiny", CPU, torch.float32, height=64, width=48, steps=10, repeats=1)
    kept = []
    report = making.run(job, rounds=1, limit_s=60, compiled=False, keep=kept.append)
    assert broken(report) == [
        "exact, compiled: 0.00 % of values within 2 grey levels of the baseline's; at least 99 % is BROKEN"
    ]
    assert report["verdicts"] == [asdict(verdict) for verdict in verdicts(report)]
    assert json.loads(json.dumps(kept))[0]["verdicts"] == report["verdicts"]
    assert [verdict.holds for verdict in verdicts(report)] == [True, False]
