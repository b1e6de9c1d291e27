"""The report of the cold start, on a tiny model: its structure and its arithmetic, not its times."""

from __future__ import annotations

import json
import os
import sys

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bench import coldstart
from bench.coldstart import (
    Arm,
    Start,
    kept_weights,
    main,
    prepare_pages,
    ratios,
    start,
    table,
    write_merged_weights,
    write_weights,
)
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
            for line in map(json.loads, (kept / "tiny" / f"{name}-0.log").read_text().splitlines())
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


def test_kept_weights_are_those_of_the_configuration_that_is_asked_for(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(coldstart, "write_weights", lambda root, size: (root.mkdir(parents=True), written.append(size)))
    monkeypatch.setattr(coldstart, "write_merged_weights", lambda *_: None)
    monkeypatch.setattr(coldstart.weights, "verify", lambda *_: None)
    kept = [kept_weights(tmp_path, config) for config in ("tiny", "sd15", "tiny", "sd15")]
    assert kept == 2 * [tmp_path / "tiny", tmp_path / "sd15"]
    assert written == [SIZES["tiny"], SIZES["sd15"]]


def test_weights_whose_writing_was_cut_off_are_written_again(tmp_path, monkeypatch):
    def cut_off(_separate, merged):
        (merged / MERGED).parent.mkdir(parents=True)
        (merged / MERGED).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(coldstart, "write_merged_weights", cut_off)
        kept_weights(tmp_path, "tiny")
    kept = kept_weights(tmp_path, "tiny")
    assert load_file(kept / "merged" / MERGED)
    assert list(tmp_path.iterdir()) == [kept]


def test_a_process_that_does_not_come_up_is_told_with_the_end_of_its_log(tmp_path):
    arm = Arm("merged", coldstart.SERVE, tmp_path)
    with pytest.raises(click.ClickException, match=r"exit status 2; its log ends with\n(.*\n)*.*VTON_BUKET"):
        start(arm, {"VTON_BUKET": "a typing error"}, tmp_path / "start.log")


@pytest.mark.parametrize("damage", [None, b"damaged"])
def test_a_start_that_fails_is_an_error_without_a_traceback(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(coldstart, "SERVE", (sys.executable, "-c", "raise SystemExit('no memory')"))
    monkeypatch.setattr(coldstart, "BEFORE", coldstart.SERVE)
    if damage is not None:
        (kept_weights(tmp_path, "tiny") / "merged" / MERGED).write_bytes(damage)
    done = CliRunner().invoke(main, ["--config", "tiny", "--device", "cpu", "--keep", str(tmp_path)])
    assert (done.exit_code, type(done.exception)) == (1, SystemExit)
    assert ("ends with\nno memory" if damage is None else MERGED) in done.output


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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *((["--size", size], "WIDTHxHEIGHT") for size in ("256", "256x", "x256", "wide")),
        (["--size", "192x192"], "VTON_HEIGHT: Input should be greater than or equal to 256"),
        (["--size", "2112x256"], "VTON_WIDTH: Input should be less than or equal to 2048"),
        (["--size", "256x300"], "VTON_HEIGHT: Input should be a multiple of 64"),
        (["--device", "cuda"], "no CUDA device is present"),
        (["--device", "gpu"], "'gpu' is not one of"),
        (["--dtype", "int8"], "'int8' is not one of"),
    ],
)
def test_what_the_service_would_refuse_is_a_usage_error_before_anything_is_written(monkeypatch, options, text):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(coldstart, "write_weights", lambda *_: pytest.fail("written"))
    done = CliRunner().invoke(main, ["--config", "tiny", *options])
    assert done.exit_code == 2
    assert text in " ".join(done.output.split())
