from __future__ import annotations

import json
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import structlog
from catvton_recipe import write_published_layout
from PIL import Image as Pillow
from stand_in import box_mask, noise, usual_files

from container.cli import EXIT_OF_CODE, EXIT_OUTPUT, EXIT_RETRY, EXIT_SETTINGS, main
from container.errors import Outage, Refusal
from model import geometry

REST_DOOR_ONLY = {"unauthorized", "forbidden", "not_found", "method_not_allowed", "job_conflict"}
HTTP_ONLY = {"invalid_json", "request_too_large", "unsupported_content_type", "request_timeout"}


@pytest.fixture
def pictures(tmp_path):
    for name, content in usual_files().items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def arguments(folder, *more):
    given = [f"--{role}={folder / role}.png" for role in ("person", "upper", "lower", "mask")]
    return ["run", *given, "--steps=1", *more]


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the command in this process, with logging as it was afterwards."""
    root = logging.getLogger()
    handlers, level, configuration = root.handlers[:], root.level, structlog.get_config()

    def run(*arguments, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as ended:
            main(args=list(arguments), prog_name="vton")
        told = capsys.readouterr()
        return Done(int(ended.value.code or 0), told.out, told.err)

    yield run
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)
    structlog.configure(**configuration)


def only_line(result):
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_paths_in_picture_out(run, pictures):
    output = pictures / "out" / "dressed.png"
    result = run(*arguments(pictures, f"--output={output}", "--format=png", "--side-by-side", "--timestamp=t1"))
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["path"] == str(output)
    assert told["object_key"] == "users/local/vton_result/t1/result.png"
    with Pillow.open(output) as opened:
        picture = np.asarray(opened)
    outside = np.asarray(Pillow.fromarray(box_mask()).resize((768, 1024), Pillow.Resampling.NEAREST)) == 0
    person = np.asarray(geometry.crop_resize(Pillow.fromarray(noise(seed=1)), 768, 1024))
    assert np.array_equal(picture[outside], person[outside])
    with Pillow.open(pictures / "out" / "dressed-side-by-side.png") as strip:
        assert strip.width > 3 * strip.height / 2


def test_the_output_is_not_overwritten_without_force(run, pictures):
    output = pictures / "there.jpg"
    output.write_bytes(b"mine")
    result = run(*arguments(pictures, f"--output={output}"))
    assert result.exit_code == EXIT_OUTPUT
    assert "--force" in only_line(result)
    assert output.read_bytes() == b"mine"
    assert run(*arguments(pictures, f"--output={output}", "--force")).exit_code == 0
    assert output.read_bytes() != b"mine"


def test_an_output_that_cannot_be_written_is_one_line(run, pictures):
    (pictures / "file").write_bytes(b"")
    result = run(*arguments(pictures, f"--output={pictures / 'file' / 'x.jpg'}"))
    assert result.exit_code == EXIT_OUTPUT
    only_line(result)


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ("--person=gone.jpg", 66, "image_not_found"),
        ("--person=.", 65, "image_not_decodable"),
        ("--person=https://127.0.0.1/x.jpg", 77, "url_not_permitted"),
        ("--person=file:///etc/hostname", 77, "url_not_permitted"),
        ("--cloth-type=hat", 64, "invalid_request"),
        ("--steps=0", 64, "invalid_request"),
    ],
)
def test_what_is_refused_has_its_exit_code_and_one_line(run, pictures, change, status, code):
    result = run(*arguments(pictures, change, f"--output={pictures / 'x.jpg'}"))
    assert result.exit_code == status
    assert only_line(result).startswith(code)
    assert not (pictures / "x.jpg").exists()


def test_a_wrong_setting_is_one_line(run, pictures):
    result = run(*arguments(pictures), VTON_STEP="3")
    assert result.exit_code == EXIT_SETTINGS
    assert only_line(result) == "unknown setting VTON_STEP"


def test_weights_that_are_missing_are_one_line(run, pictures):
    result = run(*arguments(pictures), VTON_WEIGHTS=str(pictures / "nowhere"))
    assert result.exit_code == EXIT_SETTINGS
    assert "nowhere" in only_line(result)


def test_every_refusal_has_an_exit_code_and_outages_say_retry():
    refusals = {cls.code for cls in Refusal.__subclasses__()} - REST_DOOR_ONLY - HTTP_ONLY
    assert refusals <= set(EXIT_OF_CODE)
    outages = {cls.code for cls in Outage.__subclasses__()}
    assert {EXIT_OF_CODE.get(code, EXIT_RETRY) for code in outages} == {EXIT_RETRY, 70}


def test_published_weights_dress_a_person(pictures, tmp_path):
    write_published_layout(tmp_path / "weights", "quick")
    output = tmp_path / "real.png"
    environ = {"VTON_WEIGHTS": str(tmp_path / "weights")}
    code = "import sys; from container.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments(pictures, f"--output={output}", "--format=png")],
        env={"PATH": "", **environ, "HOME": str(tmp_path)},
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["engine"] == "catvton/mix"
    assert output.exists()


def test_weights_are_verified_and_a_flipped_byte_is_named(run, tmp_path):
    write_published_layout(tmp_path)
    assert run("weights", "verify", f"--dir={tmp_path}").exit_code == 0
    file = tmp_path / "CatVTON/mix-48k-1024/attention/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    result = run("weights", "verify", f"--dir={tmp_path}")
    assert result.exit_code == EXIT_SETTINGS
    assert "mix-48k-1024/attention/model.safetensors" in only_line(result)


def test_weights_are_listed_with_their_licence(run, tmp_path):
    result = run("weights", "list", f"--dir={tmp_path}")
    assert result.exit_code == 0
    assert "CC BY-NC-SA 4.0" in result.stdout
    assert "mix-48k-1024/attention/model.safetensors" in result.stdout


def test_weights_that_cannot_be_downloaded_are_one_sentence(tmp_path):
    environ = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HOME": str(tmp_path), "PATH": ""}
    code = "from container.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "weights", "download", f"--dir={tmp_path}"],
        env=environ,
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == EXIT_SETTINGS
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [[], ["run"], ["serve"], ["demo"], ["weights"], ["weights", "download"]])
def test_every_command_explains_itself(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout
