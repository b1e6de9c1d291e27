from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from catvton_recipe import write_published_layout
from PIL import Image as Pillow
from safetensors.torch import save_file
from stand_in import box_mask, noise, png, usual_files

from container.cli import EXIT_OF_CODE, EXIT_OUTPUT, EXIT_RETRY, EXIT_SETTINGS, main
from container.errors import Outage, Refusal
from container.form import try_on_of, with_uploads
from container.request import CLOTH_TYPES
from model import geometry, load_masker, weights
from model.embedded import demo_pictures
from model.interface import MaskerOptions
from model.maskers.published import LIP, PUBLISHED, twin_of

REST_DOOR_ONLY = {"unauthorized", "forbidden", "not_found", "method_not_allowed", "job_conflict"}
FORM = {"person_image": "person", "cloth_image": "upper", "lower_cloth_image": "lower", "mask_image": "mask"}
NO_MODEL = {"VTON_WEIGHTS": "/nowhere"}  # with which no picture is begun
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


def test_the_variables_of_an_endpoint_send_no_message_of_a_local_picture(run, pictures):
    nobody = "http://127.0.0.1:9/123456789012/queue"
    output = pictures / "dressed.jpg"
    result = run(
        *arguments(pictures, f"--output={output}"),
        VTON_BUCKET="results",
        VTON_QUEUE_URL=nobody,
        VTON_MASK_QUEUE_URL=nobody,
    )
    assert (result.exit_code, output.exists()) == (0, True), result.stderr


def test_the_output_is_not_overwritten_without_force(run, pictures):
    output = pictures / "there.jpg"
    output.write_bytes(b"mine")
    result = run(*arguments(pictures, f"--output={output}"))
    assert result.exit_code == EXIT_OUTPUT
    assert "--force" in only_line(result)
    assert output.read_bytes() == b"mine"
    assert run(*arguments(pictures, f"--output={output}", "--force")).exit_code == 0
    assert output.read_bytes() != b"mine"


def test_the_strip_is_not_overwritten_without_force(run, pictures):
    output, strip = pictures / "new.jpg", pictures / "new-side-by-side.png"
    strip.write_bytes(b"mine")
    result = run(*arguments(pictures, f"--output={output}", "--side-by-side"), **NO_MODEL)
    assert result.exit_code == EXIT_OUTPUT
    assert str(strip) in only_line(result)
    assert strip.read_bytes() == b"mine"
    assert not output.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["-o", "person.png/x.jpg"],
        ["-o", "x" * 300],
        ["-o", "/proc/x.jpg"],  # where not even root can make one
        ["-o", "."],
        ["-o", "x" * 240, "--side-by-side"],
    ],
)
def test_an_output_that_cannot_be_written_is_one_line_before_the_picture(run, pictures, monkeypatch, options):
    monkeypatch.chdir(pictures)
    result = run(*arguments(pictures, *options), **NO_MODEL)
    assert result.exit_code == EXIT_OUTPUT
    only_line(result)


def test_an_output_that_is_taken_meanwhile_is_one_line(run, pictures, monkeypatch):
    monkeypatch.setattr("container.cli.try_outputs", lambda paths, force: None)
    output = pictures / "there.jpg"
    output.write_bytes(b"mine")
    result = run(*arguments(pictures, f"--output={output}"))
    assert result.exit_code == EXIT_OUTPUT
    assert "cannot be written" in only_line(result)
    assert output.read_bytes() == b"mine"


def test_files_make_the_job_and_the_picture_that_they_make_at_the_other_doors(run, pictures, monkeypatch):
    monkeypatch.chdir(pictures)
    numbers = {"num_inference_steps": 1, "guidance_scale": 1.5, "output_quality": 10}
    encoded = {name: base64.b64encode(Path(f"{role}.png").read_bytes()).decode() for name, role in FORM.items()}
    fields, _ = with_uploads({**encoded, **numbers, "cloth_type": "overall", "userId": "7", "timestamp": "t1"})
    paths = ["--person=./person.png", "--upper=upper.png", f"--lower={pictures / 'lower.png'}", "--mask=mask.png"]
    named = ["--steps=1", "--guidance=1.5", "--output-quality=10", "--user-id=7", "--timestamp=t1", "-o", "o.jpg"]
    result = run("run", *paths, *named)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["job_id"] == try_on_of(fields).with_defaults(steps=1, guidance=1.5).job_id()
    with Pillow.open("o.jpg") as picture:
        assert picture.quantization[0][0] == 80  # 16 by the standard's table, five times as coarse at 10


def test_a_pipe_that_nobody_writes_ends_the_command(run, pictures, monkeypatch):
    monkeypatch.setattr("container.cli_files.PIPE_S", 0.1)
    os.mkfifo(pictures / "pipe")
    for command in (arguments(pictures, f"--person={pictures / 'pipe'}"), ["mask", str(pictures / "pipe")]):
        result = run(*command, **NO_MODEL)
        assert result.exit_code == EXIT_RETRY
        assert only_line(result).startswith("image_source_timeout")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ("--person=gone.jpg", 66, "image_not_found"),
        ("--person=.", 65, "image_not_decodable"),
        ("--person=/dev/zero", 65, "image_not_decodable"),
        ("--person=https://127.0.0.1/x.jpg", 77, "url_not_permitted"),
        ("--person=file:///etc/hostname", 77, "url_not_permitted"),
        ("--cloth-type=hat", 64, "invalid_request"),
        ("--steps=0", 64, "invalid_request"),
        ("--output-quality=0", 64, "invalid_request"),
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


def test_the_maskers_weights_are_verified_where_they_are_there(run, tmp_path):
    write_published_layout(tmp_path)
    assert run("weights", "verify", f"--dir={tmp_path}").stdout.splitlines()[-1] == "masker: not here"
    for name in PUBLISHED:
        twin = twin_of(tmp_path / name)
        twin.parent.mkdir(exist_ok=True)
        save_file({"x": torch.zeros(1)}, twin)
    assert run("weights", "verify", f"--dir={tmp_path}").stdout.splitlines()[-1].endswith("all are recorded now")
    assert run("weights", "verify", f"--dir={tmp_path}").stdout.splitlines()[-1].endswith("all match their record")
    save_file({"x": torch.ones(1)}, twin)
    result = run("weights", "verify", f"--dir={tmp_path}")
    assert result.exit_code == EXIT_SETTINGS
    assert str(twin) in only_line(result)


def test_maskers_weights_that_wait_for_their_conversion_are_one_line(run, tmp_path):
    write_published_layout(tmp_path)
    pickle = tmp_path / LIP
    pickle.parent.mkdir()
    pickle.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    result = run("weights", "verify", f"--dir={tmp_path}")
    assert result.exit_code == EXIT_SETTINGS
    assert only_line(result).endswith("get it with `vton weights convert`")


@pytest.mark.parametrize(
    ("options", "parts"),
    [((), [("catvton", "mix"), ("masker", "schp")]), (("--without-masker",), [("catvton", "mix")])],
)
def test_a_download_brings_the_engines_files_and_then_converts_the_maskers(run, tmp_path, monkeypatch, options, parts):
    brought = []
    monkeypatch.setattr(weights, "download", lambda directory, *part: brought.append(part))
    for name in PUBLISHED:
        twin = twin_of(tmp_path / name)
        twin.parent.mkdir(parents=True, exist_ok=True)
        save_file({"x": torch.zeros(1)}, twin)
    result = run("weights", "download", f"--dir={tmp_path}", *options)
    assert result.exit_code == 0
    assert brought == parts
    assert len(result.stdout.splitlines()) == (0 if options else 3)


def test_weights_are_listed_with_their_licence(run, tmp_path):
    result = run("weights", "list", f"--dir={tmp_path}")
    assert result.exit_code == 0
    assert "CC BY-NC-SA 4.0" in result.stdout
    assert "mix-48k-1024/attention/model.safetensors" in result.stdout
    assert sum("[masker/schp]" in line for line in result.stdout.splitlines()) == 3


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


WEIGHTS = [["weights"], *(["weights", name] for name in ("list", "download", "convert", "verify"))]


@pytest.mark.parametrize("command", [[], ["run"], ["serve"], ["demo"], *WEIGHTS])
def test_every_command_explains_itself(run, command):
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_mask_writes_five_masks_and_a_sheet(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photo = demo_pictures(size_wh=(192, 256))["person"]
    Path("me.png").write_bytes(png(photo))
    done = run("mask", "me.png", "-o", "out")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert list(told["masks"]) == list(CLOTH_TYPES)
    expected = load_masker("embedded", MaskerOptions()).masks(photo, CLOTH_TYPES)
    for name, path in told["masks"].items():
        assert np.array_equal(np.asarray(Pillow.open(path)), expected[name])
    assert Pillow.open(told["sheet"]).height > 0
    assert run("mask", "me.png", "-o", "out").exit_code == 73
    assert run("mask", "me.png", "-o", "out", "--force").exit_code == 0


@pytest.mark.parametrize("output", ["x" * 300, "me.png", "/proc/new", "taken"])
def test_masks_that_cannot_be_written_are_one_line_before_they_are_made(run, tmp_path, monkeypatch, output):
    monkeypatch.chdir(tmp_path)
    Path("me.png").write_bytes(png(noise()))
    Path("taken/sheet.png").mkdir(parents=True)
    result = run("mask", "me.png", "--force", "-o", output, **NO_MODEL)
    assert result.exit_code == EXIT_OUTPUT
    only_line(result)


def test_mask_ends_with_the_code_of_what_is_wrong(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("nobody.png").write_bytes(png(np.full((256, 192, 3), 128, np.uint8)))
    for photo, code, exit_code in (("nobody.png", "person_not_found", 65), ("gone.png", "image_not_found", 66)):
        done = run("mask", photo)
        assert (done.exit_code, done.stderr.partition(":")[0]) == (exit_code, code)
    assert not Path("vton_output").exists()
    monkeypatch.setenv("VTON_MASKER", "off")
    assert run("mask", "nobody.png").exit_code == 64


def test_run_without_a_mask_makes_one(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, picture in demo_pictures(size_wh=(192, 256)).items():
        Path(f"{name}.png").write_bytes(png(picture))
    paths = [f"--{role}={role}.png" for role in ("person", "upper", "lower")]
    done = run("run", *paths, "--steps=1", "--side-by-side")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["mask_source"] == "auto"
    assert len(list(Path("vton_output").iterdir())) == 2
