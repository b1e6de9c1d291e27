"""The README is true: its commands run, its tables are the code's."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests
from catvton_recipe import write_published_layout
from stand_in import png, usual_files, usual_request

from container.cli import EXIT_OF_CODE
from container.errors import Outage, Refusal
from container.request import CLOTH_TYPES, MaskRequest, TryOnRequest
from container.settings import PREFIX, Settings
from deploy.demo import FAKE_KEYS, REGION, free_port, image_host
from model.embedded import demo_pictures

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
PYTHON = [block for language, block in BLOCKS if language == "python"]
TARGETS = [command.split()[1] for command in COMMANDS if command.startswith("make ")]
WAITING = f" --command '{sys.executable} -m bench.waiting_service'"
QUICK = {"VTON_ENGINE": "waiting", "VTON_MASKER": "off", "BENCH_PICTURE_S": "0"}


def cells(row):
    return [cell.strip().strip("`") for cell in row.strip("|").split("|")]


def table_rows(heading):
    """The cells of each row of the first table after a line that begins with `heading`."""
    lines = README[README.index(heading) :].splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith("|---"))
    rows = []
    for line in lines[begin + 1 :]:
        if not line.startswith("|"):
            return rows
        rows.append(cells(line))
    return rows


def run(command, folder, **environ):
    bin_folder = str(Path(sys.executable).parent)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("VTON_")}
    environment = {**clean, **environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    return subprocess.run(shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True)


def test_the_two_commands_come_first():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("target", TARGETS)
def test_each_make_target_exists(target):
    assert run(f"make --dry-run {target}", REPOSITORY).returncode == 0


def test_every_other_command_is_run_below():
    others = [command for command in COMMANDS if not command.startswith("make ")]
    assert [shlex.split(command)[:3] for command in others] == [
        ["vton", "serve"],
        ["vton", "run", "--person"],
        ["vton", "mask", "person.png"],
        ["vton", "weights", "list"],
        ["vton", "weights", "download"],
        ["vton", "weights", "verify"],
        ["vton", "local", "--images"],
        ["vton", "local", "transform"],
        ["vton", "weights", "pack"],
        ["vton", "weights", "pack"],
        ["vton", "weights", "pack"],
        ["vton", "weights", "push"],
        ["vton", "train", "--help"],
    ]


def command(beginning):
    return next(line for line in COMMANDS if line.startswith(beginning))


def test_vton_run_leaves_a_picture_and_its_strip(tmp_path):
    for name, content in usual_files().items():
        (tmp_path / name).write_bytes(content)
    done = run(command("vton run"), tmp_path, VTON_STEPS="1")
    assert done.returncode == 0, done.stderr
    assert sorted(path.suffix for path in (tmp_path / "vton_output").iterdir()) == [".jpg", ".png"]
    assert len(done.stderr.splitlines()) == 1  # where the strip is, and no library's warnings


def test_vton_mask_leaves_five_masks_and_a_sheet(tmp_path):
    (tmp_path / "person.png").write_bytes(png(demo_pictures(size_wh=(192, 256))["person"]))
    done = run(command("vton mask"), tmp_path)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in (tmp_path / "vton_output" / "masks-person").iterdir()}
    assert names == {f"{name}.png" for name in (*CLOTH_TYPES, "sheet")}


def test_vton_serve_becomes_ready_and_stops(tmp_path):
    port = free_port()
    environ = {**os.environ, "VTON_OUTPUT_DIR": str(tmp_path), "SAGEMAKER_BIND_TO_PORT": str(port)}
    vton = Path(sys.executable).parent / "vton"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([str(vton), *shlex.split(command("vton serve"))[1:]], env=environ, stderr=log)
    try:
        ends, status = time.monotonic() + 180, 0
        while status != 200 and time.monotonic() < ends:
            time.sleep(0.1)
            try:
                status = requests.get(f"http://127.0.0.1:{port}/ping", timeout=30).status_code
            except requests.exceptions.ConnectionError:
                continue
        assert status == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)


def test_vton_local_serves_until_it_is_told_to_stop(tmp_path):
    (tmp_path / "pictures").mkdir()
    vton = [str(Path(sys.executable).parent / "vton"), *shlex.split(command("vton local --images") + WAITING)[1:]]
    environ = {**os.environ, **QUICK}
    with subprocess.Popen(
        [*vton, "--port", "0"], cwd=tmp_path, env=environ, stdout=subprocess.PIPE, text=True
    ) as process:
        assert any(line.startswith("serving") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0


def test_vton_local_transform_answers_each_line(tmp_path):
    (tmp_path / "in").mkdir()
    with image_host(usual_files()) as host:
        urls = {name: f"http://{host}/{name.split('_')[0]}.png" for name in usual_request() if name.endswith("_url")}
        (tmp_path / "in" / "all.jsonl").write_text(json.dumps(usual_request(**urls)))
        done = run(command("vton local transform") + WAITING, tmp_path, VTON_TRUSTED_HOSTS=host, **QUICK)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "all.jsonl.out").read_text().count("\n") == 1


def test_weights_are_listed_verified_and_not_downloaded_without_a_hub(tmp_path):
    assert "catvton" in run(command("vton weights list"), tmp_path).stdout
    write_published_layout(tmp_path / "weights")
    assert run(command("vton weights verify"), tmp_path).returncode == 0
    offline = run(command("vton weights download"), tmp_path / "weights", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 78
    assert "Traceback" not in offline.stderr


def test_weights_are_packed_both_ways_and_pushed(endpoint, tmp_path):
    write_published_layout(tmp_path / "weights", "quick")
    for packing in (line for line in COMMANDS if line.startswith("vton weights pack")):
        done = run(packing, tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "packed").is_dir()
    assert (tmp_path / "model.tar.gz").is_file()
    s3 = endpoint.cloud.client("s3")
    s3.create_bucket(Bucket="bucket", CreateBucketConfiguration={"LocationConstraint": REGION})
    done = run(command("vton weights push"), tmp_path, **FAKE_KEYS, AWS_ENDPOINT_URL_S3=endpoint.cloud.url)
    assert done.returncode == 0, done.stderr
    keys = {entry["Key"] for entry in s3.list_objects_v2(Bucket="bucket")["Contents"]}
    packed = {path.relative_to(tmp_path / "packed") for path in (tmp_path / "packed").rglob("*") if path.is_file()}
    assert keys == {f"weights/v1/{path}" for path in packed}


def test_vton_train_explains_itself(tmp_path):
    done = run(command("vton train"), tmp_path)
    assert done.returncode == 0
    for named in ("--attention-only", "--from-scratch", "--resume", "--weights", "--vae"):
        assert named in done.stdout


def test_the_boto3_example_gets_a_key(endpoint, monkeypatch, capsys):
    (example,) = [block for block in PYTHON if "invoke_endpoint" in block]
    for name in ("person.jpg", "top.jpg", "trousers.jpg", "mask.png"):
        role = {"top.jpg": "upper", "trousers.jpg": "lower"}.get(name, name.partition(".")[0])
        example = example.replace(f"https://images.example/{name}", f"http://{endpoint.images}/{role}.png")
    for name, value in {**FAKE_KEYS, "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": endpoint.runtime}.items():
        monkeypatch.setenv(name, value)
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102 - the example is the thing under test
    assert capsys.readouterr().out.strip() == "users/7/vton_result/241108-230001/result.jpg"


def test_the_python_example_saves_a_picture(tmp_path):
    (example,) = [block for block in PYTHON if "load_pipeline" in block]
    (tmp_path / "example.py").write_text(example)
    done = run(f"{sys.executable} example.py", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "dressed.png").exists()


def test_the_table_of_settings_is_the_settings():
    rows = table_rows("### Settings")
    assert [row[0] for row in rows] == [PREFIX + name.upper() for name in Settings.model_fields]
    for name, default, *_ in rows:
        value = Settings.model_fields[name[len(PREFIX) :].lower()].default
        written = "" if value in (None, ()) else str(value).lower() if isinstance(value, bool) else str(value)
        assert default == written, name


def test_the_table_of_errors_is_the_tree():
    written = {}
    for statuses, codes in table_rows("### Errors"):
        for code in re.findall(r"\w+", codes):
            written[code] = statuses
    classes = {cls.code: str(cls.status) for base in (Refusal, Outage) for cls in base.__subclasses__()}
    assert set(written) == set(classes)
    assert all(status in written[code] for code, status in classes.items())


def test_the_table_of_fields_is_the_request():
    names = {name for row in table_rows("### Request") for name in re.findall(r"\w+", row[0])}
    assert names == set(TryOnRequest.model_fields)
    names = {name for row in table_rows("### Masks") for name in re.findall(r"\w+", row[0])}
    assert names == set(MaskRequest.model_fields)


def test_the_table_of_exits_is_the_command_lines():
    written = {int(row[0]) for row in table_rows("`vton serve` and `container/serve` are")}
    assert written == {0, 73, 75, 78, *EXIT_OF_CODE.values()}


def test_the_figures_of_faster_pictures_are_those_that_were_measured():
    recipes = json.loads((REPOSITORY / "bench" / "results" / "embedded-drift.json").read_text())["recipes"]
    measured = {(recipe["name"], recipe["eta"]): recipe for recipe in recipes}
    for name, _, fewer, likeness in table_rows("### Faster pictures")[1:]:
        assert fewer == f"{measured[name, 1.0]['speedup']:.2f}"
        assert likeness.startswith(f"{measured[name, 1.0]['psnr_db']:.1f} dB")
    assert f"{measured['fast, no fresh noise', 0.0]['psnr_db']:.1f} dB from the exact picture without" in README
