"""runpod_cli_rest_parity: the other ways in give the same, and fail as clearly."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from structlog.testing import capture_logs
from urllib3.filepost import encode_multipart_formdata

from container.runpod_handler import Handler

from ..job_plane import STAND_IN, JobPlane, job_plane, worker_process
from ..pictures import good_files, pixels_of
from ..registry import row
from ..stage import FIELD_OF, ROLES, Stage

COMMAND = Path(sys.executable).with_name("vton")
FORM = {"person_image": "person", "cloth_image": "upper", "mask_image": "mask"}
UNREADABLE = "/proc/self/mem"  # of which not even root can read the beginning
UNWRITABLE = "/proc"  # where not even root can make a file


@row("R01", lane="models")
def same_by_every_door(stage: Stage) -> str:
    """The same job, the same key, the same pixels."""
    service = stage.embedded
    fields = stage.fields_from(stage.plain, output_format="png", cloth_type="upper", lower_cloth_url=None)
    by_http = stage.post(service, fields).done()
    output = stage.new_folder("cli") / "result.png"
    options = [f"--{role}={fields[FIELD_OF[role]]}" for role in ROLES if role != "lower"]
    named = [
        f"--user-id={fields['userId']}",
        f"--timestamp={fields['timestamp']}",
        "--cloth-type=upper",
        "--format=png",
    ]
    environ = {"VTON_TRUSTED_HOSTS": f"127.0.0.1:{stage.plain.port}", "VTON_STEPS": "2"}
    status, said = stage.ground.zygote.run(COMMAND, "run", *options, *named, f"--output={output}", **environ)
    assert status == 0, said
    by_command = json.loads(said[said.index("{") : said.rindex("}") + 1])
    for name in ("job_id", "object_key", "etag"):
        assert by_command[name] == by_http[name], f"{name}: {by_command[name]} and {by_http[name]}"
    one, other = pixels_of(output.read_bytes()), pixels_of(stage.stored(by_http["object_key"]))
    assert (one == other).all(), "the pixels differ"
    _same_by_rest(stage, fields, by_http)
    _same_by_runpod(stage, fields, by_http)
    _same_by_files(stage)
    return "RunPod by the SDK's own worker loop"


def _form(fields: dict[str, object]) -> dict[str, str]:
    """The same request by the names of a form."""
    form = {name: str(fields[FIELD_OF[role]]) for name, role in FORM.items()}
    return {**form, **{name: str(fields[name]) for name in ("userId", "timestamp", "cloth_type", "output_format")}}


def _same_by_rest(stage: Stage, fields: dict[str, object], by_http: dict[str, Any]) -> None:
    """The REST door answers with the bytes that the other one stored."""
    form = _form(fields)
    body, content_type = encode_multipart_formdata({**form, "num_inference_steps": "2"})
    answer = stage.keep(stage.embedded.call("POST", "/api/try-on", body, {"Content-Type": content_type}))
    assert answer.status == 200, answer.content[:300]
    assert answer.headers["x-job-id"] == by_http["job_id"]
    assert base64.b64decode(answer.json()["imageBase64"]) == stage.stored(by_http["object_key"]), "the bytes differ"


def _same_by_runpod(stage: Stage, fields: dict[str, object], by_http: dict[str, Any]) -> None:
    """A RunPod job finds what is stored, and one that wants the picture gets its bytes."""
    folder = stage.new_folder("runpod")
    with job_plane() as plane, worker_process(folder, {**stage.environment(), **plane.environment()}):
        by_key = _output(plane, "key", fields)
        by_picture = _output(plane, "picture", _form(fields))
    for name in ("job_id", "object_key", "etag"):
        assert by_key[name] == by_http[name], f"{name}: {by_key[name]} and {by_http[name]}"
    assert by_picture["job_id"] == by_http["job_id"]
    assert base64.b64decode(by_picture["result_image"]) == stage.stored(by_http["object_key"]), "the bytes differ"


def _same_by_files(stage: Stage) -> None:
    """Files make the same job and the same bytes on the command line and in a form, whatever they are called."""
    folder, files = stage.new_folder("files"), good_files()
    named = {"userId": "7", "timestamp": "files", "cloth_type": "upper", "num_inference_steps": "2", "seed": "5"}
    pictures = {name: ("any.png", files[role], "image/png") for name, role in FORM.items()}
    body, content_type = encode_multipart_formdata({**named, **pictures, "guidance_scale": "1.5"})
    answer = stage.keep(stage.embedded.call("POST", "/api/try-on", body, {"Content-Type": content_type}))
    assert answer.status == 200, answer.content[:300]
    for role in FORM.values():
        (folder / f"{role}.png").write_bytes(files[role])
    given = [f"--{role}={folder}/./{role}.png" for role in FORM.values()]
    numbers = ["--cloth-type=upper", "--steps=2", "--guidance=1.5", "--seed=5", "--user-id=7", "--timestamp=files"]
    status, said = stage.ground.zygote.run(COMMAND, "run", *given, *numbers, f"--output={folder / 'result.jpg'}")
    assert status == 0, said
    told = json.loads(said[said.index("{") : said.rindex("}") + 1])
    assert told["job_id"] == answer.headers["x-job-id"]
    assert (folder / "result.jpg").read_bytes() == base64.b64decode(answer.json()["imageBase64"]), "the bytes differ"


def _output(plane: JobPlane, job_id: str, asked: object) -> dict[str, Any]:
    plane.put({"id": job_id, "input": asked})
    result = plane.result(job_id)
    assert "error" not in result, result
    output: dict[str, Any] = result["output"]
    return output


@row("R03")
def jobs_without_an_input(stage: Stage) -> str:
    """An error result for each, a good job after them, and nothing else; what has no id never leaves the SDK's loop."""
    jobs: list[dict[str, Any]] = [
        {"id": "without"},
        {"id": "null", "input": None},
        {"id": "list", "input": [1]},
        {"id": "text", "input": "text"},
        {"id": "empty", "input": {}},
    ]
    environ = {**stage.environment(), "VTON_ENGINE": "stand-in", "VTON_MASKER": "off"}
    before = (stage.keys(), len(stage.messages()))
    with job_plane() as plane:
        environ.update(plane.environment())
        with worker_process(stage.new_folder("runpod"), environ, what=(str(STAND_IN),)) as process:
            plane.put(*jobs)
            for job in jobs:
                _refused(plane.result(job["id"]))
            assert (stage.keys(), len(stage.messages())) == before, "something was stored or told"
            done = _output(plane, "good", stage.fields_from(stage.plain))
            assert done["object_key"] in stage.keys(done["object_key"]), "a good job left no object"
            process.terminate()
            assert process.wait(60) == 0
    app: Any = SimpleNamespace(worker=SimpleNamespace(device_failed=False))  # which nobody asks for anything else
    for nameless in ({"input": {}}, {"id": None, "input": {}}, {}, None, []):
        with capture_logs():
            answered = asyncio.run(Handler(app)(nameless))
        _refused({"error": answered.pop("error"), "output": answered})
    return "a job without an id by the handler alone"


def _refused(result: dict[str, Any]) -> None:
    assert result["error"].startswith("invalid_request: "), result
    assert (result["output"]["code"], result["output"]["retryable"]) == ("invalid_request", False), result
    assert "Traceback" not in json.dumps(result), result


@row("R05", lane="models")
def command_line_faults(stage: Stage) -> str:
    """An exit status of the table, one line on stderr, nothing overwritten."""
    folder = stage.new_folder("files")
    for role, content in good_files().items():
        (folder / f"{role}.png").write_bytes(content)
    (folder / "there.jpg").write_bytes(b"precious")
    (folder / "new-side-by-side.png").write_bytes(b"precious")
    (folder / "folder").mkdir()
    given = {role: f"--{role}={folder / role}.png" for role in ROLES}
    cases: dict[str, tuple[int, dict[str, str]]] = {
        "missing file": (66, {"person": f"--person={folder / 'gone.png'}"}),
        "directory as file": (65, {"person": f"--person={folder / 'folder'}"}),
        "unreadable file": (66, {"person": f"--person={UNREADABLE}"}),
        "file without end": (65, {"person": "--person=/dev/zero"}),
        "output exists": (73, {"output": f"--output={folder / 'there.jpg'}"}),
        "output is a folder": (73, {"output": f"--output={folder / 'folder'}"}),
        "output dir cannot be": (73, {"output": f"--output={folder / 'person.png' / 'new' / 'result.jpg'}"}),
        "output's name too long": (73, {"output": f"--output={folder / ('x' * 300)}"}),
        "folder is not writable": (73, {"output": f"--output={UNWRITABLE}/result.jpg"}),
        "strip exists": (73, {"strip": "--side-by-side"}),
    }
    for name, (wanted, changes) in cases.items():
        options = {**given, "output": f"--output={folder / 'new.jpg'}", **changes}
        status, said = _run(stage, *options.values())
        assert status == wanted, f"{name}: exit {status} instead of {wanted}: {said}"
        assert "Traceback" not in said, f"{name}: {said}"
        assert len(said.splitlines()) == 1, f"{name}: {said}"
    assert (folder / "there.jpg").read_bytes() == b"precious"
    assert (folder / "new-side-by-side.png").read_bytes() == b"precious"
    assert not (folder / "new.jpg").exists()
    status, said = _run(stage, *given.values(), f"--output={folder / 'there.jpg'}", "--force")
    assert status == 0, said
    assert pixels_of((folder / "there.jpg").read_bytes()).shape == (1024, 768, 3)
    status, said = _run(stage, *given.values(), f"--output={folder / 'made' / 'for' / 'it.jpg'}")
    assert status == 0, said
    return "a folder for the output that is missing is made"


def _run(stage: Stage, *options: str) -> tuple[int, str]:
    return stage.ground.zygote.run(COMMAND, "run", "--cloth-type=overall", *options, VTON_STEPS="1")
