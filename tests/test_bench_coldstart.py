"""The report of the cold start, on a tiny model: its structure and its arithmetic, not its times."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from bench import coldstart
from bench.coldstart import Arm, Start, main, prepare_pages, ratios, start, table, write_merged_weights, write_weights
from bench.sizes import SIZES
from model import load_engine
from model.catvton import published
from model.interface import EngineOptions

MERGED = published.MERGED_FILES["mix"]


def one(**changes: float) -> Start:
    return Start(**{**dict.fromkeys(Start.__dataclass_fields__, 1.0), "peak_rss_bytes": 2**20, **changes})


def arms(**starts: list[Start]) -> dict:
    return {name: {"median": coldstart._medians(each)} for name, each in starts.items()}


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system drops no pages")
def test_the_three_ways_start_are_timed_by_stage_and_compared(tmp_path):
    arguments = ["--config", "tiny", "--size", "256x256", "--runs", "1", "--cold", "--device", "cpu"]
    kept, path = tmp_path / "kept", tmp_path / "report.json"
    done = CliRunner().invoke(main, [*arguments, "--keep", str(kept), "--json", str(path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    report = json.loads(path.read_text())
    assert (report["config"], report["page_cache"], report["runs"], report["size"]) == ("tiny", "cold", 1, "256x256")
    assert report["cores"] == os.cpu_count()
    assert list(report["arms"]) == ["before", "separate", "merged"]
    for arm in report["arms"].values():
        (run,) = arm["runs"]
        assert run.keys() == arm["median"].keys() == Start.__dataclass_fields__.keys()
        assert all(number > 0 for number in run.values())
        stages = [run[f"{name}_s"] for name in ("service_imports", "engine_imports", "load", "move", "warm_up")]
        assert sum(stages) <= run["ready_s"] + 0.1
        assert run["peak_rss_bytes"] > 100 * 2**20  # torch alone is that large
    assert report["before_times"].keys() == {"separate", "merged"}
    assert report["weights_bytes"]["merged"] < report["weights_bytes"]["separate"]
    assert all(f"| {name} |" in done.output for name in ("verify", "move", "warm up", "ready", "peak rss"))
    warmed = {
        name: next(
            line
            for line in map(json.loads, (kept / f"{name}-0.log").read_text().splitlines())
            if line["event"] == "warmed_up"
        )
        for name in report["arms"]
    }
    assert [(each["width"], each["steps"]) for each in warmed.values()] == [(256, 2), (64, 1), (64, 1)]


def test_the_weights_are_published_and_merged_and_make_a_picture_of_the_same_networks(tmp_path):
    separate, merged = tmp_path / "separate", tmp_path / "merged"
    write_weights(separate, SIZES["tiny"])
    write_merged_weights(separate, merged)
    assert [path.relative_to(merged).as_posix() for path in merged.rglob("*.safetensors")] == [MERGED]
    base = load_file(separate / published.UNET_FOLDER / published.WEIGHT_FILES[0])
    assert any(".attn2." in key for key in base)  # as published, with what is never read
    for folder in (separate, merged):
        assert load_engine("catvton", EngineOptions(folder, device="cpu")).name == "catvton/mix"


def test_a_process_that_does_not_come_up_is_told_with_its_log(tmp_path):
    log = tmp_path / "start.log"
    arm = Arm("merged", coldstart.SERVE, tmp_path)
    with pytest.raises(RuntimeError, match=f"exit status 2; see {log}"):
        start(arm, {"VTON_BUKET": "a typing error"}, log)
    assert "VTON_BUKET" in log.read_text()


def test_the_process_is_not_held_back_by_this_ones_variables(tmp_path, monkeypatch):
    given = []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("VTON_STEPS", "3")
    monkeypatch.setattr(coldstart.subprocess, "Popen", lambda *_, env, **__: given.append(env) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start(Arm("merged", coldstart.SERVE, tmp_path), {"VTON_WIDTH": "256"}, tmp_path / "log")
    (environ,) = given
    assert environ.keys() & {"OMP_NUM_THREADS", "VTON_STEPS"} == set()
    assert (environ["VTON_WIDTH"], environ["VTON_WEIGHTS"]) == ("256", str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system drops no pages")
@pytest.mark.parametrize("cold", [True, False])
def test_files_are_the_same_whatever_becomes_of_their_pages(tmp_path, cold):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").write_bytes(b"weights" * 1000)
    prepare_pages(tmp_path, cold=cold)
    assert (tmp_path / "a" / "file").read_bytes() == b"weights" * 1000


def test_a_ratio_is_of_medians_and_the_warm_up_is_taken_out_of_both():
    before = [one(ready_s=ready, warm_up_s=6.0, processor_s=4.0) for ready in (10.0, 30.0, 12.0)]
    now = [one(ready_s=ready, warm_up_s=1.0, processor_s=2.0) for ready in (4.0, 3.0, 20.0)]
    found = ratios(arms(before=before, merged=now))
    assert found == {"merged": {"ready": 3.0, "ready_without_warm_up": 2.0, "processor": 2.0}}


def test_a_peak_that_the_system_does_not_tell_is_none_and_shown_as_such():
    unknown = arms(before=[one(peak_rss_bytes=None)], merged=[one()])
    assert unknown["before"]["median"]["peak_rss_bytes"] is None
    shown = table(
        {"runs": 1, "arms": unknown, "before_times": ratios(arms(before=[one(warm_up_s=0)], merged=[one(warm_up_s=0)]))}
    )
    assert "| peak rss | - | 1 MiB |" in shown


@pytest.mark.parametrize("size", ["256", "256x", "x256", "wide"])
def test_a_size_of_another_form_is_refused(size):
    done = CliRunner().invoke(main, ["--config", "tiny", "--size", size])
    assert done.exit_code == 2
    assert "WIDTHxHEIGHT" in done.output
