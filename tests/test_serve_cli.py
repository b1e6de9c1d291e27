"""`vton serve`: the document's commands against the real process."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from catvton_recipe import write_published_layout
from click.testing import CliRunner

from container.cli import main
from container.serve_cli import chosen_weights
from deploy.demo import free_port, png
from model import weights
from model.embedded import demo_pictures

VTON = str(Path(sys.executable).with_name("vton"))
CURL = """curl -X POST "http://localhost:8000/api/try-on" \\
  -F "person_image=@person.jpg" \\
  -F "cloth_image=@cloth.jpg" \\
  -F "cloth_type=upper"
"""
REQUESTS = """
import requests

url = "http://localhost:8000/api/try-on"
files = {
    "person_image": open("person.jpg", "rb"),
    "cloth_image": open("cloth.jpg", "rb"),
}
data = {
    "cloth_type": "upper",
    "num_inference_steps": 50,
    "guidance_scale": 2.5,
}

response = requests.post(url, files=files, data=data)
result = response.json()
print(result["success"])
"""


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VTON_", "SAGEMAKER_", "AWS_"))}
    return {**kept, **more}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with the document's files, and the port of `vton serve` with the document's options."""
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    pictures = demo_pictures()
    (folder / "person.jpg").write_bytes(png(pictures["person"]))
    (folder / "cloth.jpg").write_bytes(png(pictures["upper"]))
    options = ("--host", "127.0.0.1", "--port", str(port), "--width", "768", "--height", "1024")
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [VTON, "serve", *options, "--mixed-precision", "no"],
            cwd=folder,
            env=environment(PYTHONPATH=str(Path(__file__).parents[1]), VTON_STEPS="2"),
            stderr=log,
        )
    try:
        ends = time.monotonic() + 180
        while _health(port) != "healthy":
            assert process.poll() is None and time.monotonic() < ends, (folder / "serve.log").read_text()[-2000:]
            time.sleep(0.1)
        yield folder, port
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)


def _health(port):
    try:
        return requests.get(f"http://127.0.0.1:{port}/health", timeout=30).json()["status"]
    except requests.exceptions.ConnectionError:
        return "down"


def test_the_documents_curl_command(served):
    assert CURL in (Path(__file__).parents[1] / "README.md").read_text()
    folder, port = served
    command = CURL.replace("localhost:8000", f"127.0.0.1:{port}").replace("curl ", "curl --silent --show-error ")
    said = subprocess.run(["sh", "-c", command], cwd=folder, env=environment(), capture_output=True, timeout=120)
    assert said.returncode == 0, said.stderr
    match = re.fullmatch(
        rb'{"success":true,"imageBase64":"([^"]+)","message":"Try-on completed successfully"}', said.stdout
    )
    assert match, said.stdout[:200]
    assert base64.b64decode(match[1]).startswith(b"\xff\xd8")


def test_the_documents_python_example(served):
    folder, port = served
    script = REQUESTS.replace("localhost:8000", f"127.0.0.1:{port}")
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", script]
    said = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, timeout=120)
    assert said.stdout == b"True\n", said.stderr


def test_results_of_the_other_door_are_kept_beside_the_server(served):
    _, port = served
    answer = requests.post(f"http://127.0.0.1:{port}/invocations", json={}, timeout=30)
    assert answer.json()["error"]["code"] == "invalid_request"
    assert requests.get(f"http://127.0.0.1:{port}/ping", timeout=30).status_code == 200


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_published_layout(tmp_path_factory.mktemp("published") / "weights", "quick")


def test_folders_of_ones_own_are_put_together_and_recorded(published, tmp_path):
    environ = {"VTON_WEIGHTS": str(tmp_path / "kept")}
    folders = (str(published / "stable-diffusion-inpainting"), str(published / "CatVTON"))
    chosen = chosen_weights(environ, *folders)
    assert weights.verify(chosen, "catvton", "mix").recorded
    assert chosen_weights(environ, *folders) == chosen
    assert weights.verify(chosen, "catvton", "mix").verified


def test_published_names_are_found_below_the_directory_of_weights(published):
    weights.verify(published, "catvton", "mix")
    environ = {"VTON_WEIGHTS": str(published)}
    names = ("booksforcharlie/stable-diffusion-inpainting", "zhengchong/CatVTON")
    assert chosen_weights(environ, *names) == published


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--base-model", "nobody/nothing"], "nobody/nothing is no folder"),
        (["--resume-path", "/nowhere"], "/nowhere is no folder"),
        (["--mixed-precision", "fp8"], "fp8"),
        (["--port", "0"], "--port"),
    ],
)
def test_a_wrong_option_is_refused_with_a_sentence(options, said, monkeypatch):
    for name in [name for name in os.environ if name.startswith("VTON_")]:
        monkeypatch.delenv(name)
    result = CliRunner().invoke(main, ["serve", *options])
    assert result.exit_code in (2, 78)
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_width_that_the_model_cannot_make_is_refused_with_a_sentence(tmp_path):
    command = [VTON, "serve", "--width", "700"]
    environ = environment(PYTHONPATH=str(Path(__file__).parents[1]))
    said = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, timeout=60, text=True)
    assert said.returncode == 2
    assert "VTON_WIDTH" in said.stderr
