from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image as Pillow

VTON = Path(sys.executable).parent / "vton"
DETOURS = {
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
}


def demo(folder, **environ):
    command = [str(VTON), "demo", "-o", str(folder)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """What the demo printed where neither a proxy nor boto3 would let it call itself, and the folder it left."""
    folder = tmp_path_factory.mktemp("demo")
    done = demo(folder, **DETOURS)
    assert done.returncode == 0, done.stderr
    return done.stdout, folder


def pixels(path):
    with Pillow.open(path) as picture:
        return np.asarray(picture)


def test_it_prints_the_key_the_message_the_times_and_what_the_model_is(shown):
    printed, _ = shown
    assert "users/7/vton_result/" in printed
    assert '"initial_timestamp"' in printed
    assert "generate" in printed
    assert "trained on drawn figures" in printed


def test_it_leaves_pictures_to_look_at(shown):
    _, folder = shown
    names = {path.name for path in folder.glob("*.png")}
    inputs = {"person.png", "upper.png", "lower.png", "dress.png", "mask.png"}
    masks = {f"mask_{name}.png" for name in ("upper", "lower", "overall", "inner", "outer")}
    assert names == inputs | masks | {"result.png", "result_dress.png", "result_no_mask.png", "sheet.png"}


def test_a_person_whose_masks_were_made_is_dressed_without_a_mask(shown):
    printed, _ = shown
    assert "users/7/masking/" in printed
    assert '"username": "7"' in printed
    assert "mask         auto, mask cache hit" in printed


@pytest.mark.parametrize(
    ("name", "mask"), [("result", "mask"), ("result_dress", "mask"), ("result_no_mask", "mask_overall")]
)
def test_the_result_differs_from_the_person_only_inside_the_mask(shown, name, mask):
    _, folder = shown
    person, mask, result = (pixels(folder / f"{each}.png") for each in ("person", mask, name))
    changed = (person != result).any(axis=2)
    assert not changed[mask < 128].any()
    assert changed[mask >= 128].mean() > 0.9


@pytest.mark.parametrize(
    ("output", "environ", "said"),
    [
        ("taken", {}, "taken"),
        ("out", {"VTON_DEVICE": "abacus"}, "serve.log"),
        ("out", {"AWS_PROFILE": "nobody"}, "nobody"),
    ],
)
def test_what_stops_it_is_told_with_a_sentence(tmp_path, output, environ, said):
    (tmp_path / "taken").touch()
    done = demo(tmp_path / output, **environ)
    assert done.returncode == 78
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_ends_it_with_its_container(tmp_path):
    log = tmp_path / "demo" / "serve.log"
    with subprocess.Popen([str(VTON), "demo", "-o", str(log.parent)], stdout=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None and time.monotonic() < ends
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert psutil.wait_procs(children, timeout=30)[1] == []
