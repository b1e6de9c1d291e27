"""runpod_cli_rest_parity: the other ways in give the same, and fail as clearly."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path
from typing import Any

from urllib3.filepost import encode_multipart_formdata

from ..pictures import good_files, pixels_of
from ..registry import not_applicable, row
from ..stage import FIELD_OF, ROLES, Stage

COMMAND = Path(sys.executable).with_name("vton")
UNREADABLE = "/proc/self/mem"  # of which not even root can read the beginning

not_applicable("R03", "there is no RunPod handler yet")


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
    return "shortened: SageMaker, REST and the command line; there is no RunPod door yet"


def _same_by_rest(stage: Stage, fields: dict[str, object], by_http: dict[str, Any]) -> None:
    """The REST door answers with the bytes that the other one stored."""
    names = {"person_image": "person", "cloth_image": "upper", "mask_image": "mask"}
    form = {name: str(fields[FIELD_OF[role]]) for name, role in names.items()}
    form.update({name: str(fields[name]) for name in ("userId", "timestamp", "cloth_type", "output_format")})
    body, content_type = encode_multipart_formdata({**form, "num_inference_steps": "2"})
    answer = stage.keep(stage.embedded.call("POST", "/api/try-on", body, {"Content-Type": content_type}))
    assert answer.status == 200, answer.content[:300]
    assert answer.headers["x-job-id"] == by_http["job_id"]
    assert base64.b64decode(answer.json()["imageBase64"]) == stage.stored(by_http["object_key"]), "the bytes differ"


@row("R05", lane="models")
def command_line_faults(stage: Stage) -> str:
    """An exit status of the table, one line on stderr, nothing overwritten."""
    folder = stage.new_folder("files")
    for role, content in good_files().items():
        (folder / f"{role}.png").write_bytes(content)
    (folder / "there.jpg").write_bytes(b"precious")
    (folder / "folder").mkdir()
    given = {role: f"--{role}={folder / role}.png" for role in ROLES}
    cases: dict[str, tuple[int, dict[str, str]]] = {
        "missing file": (66, {"person": f"--person={folder / 'gone.png'}"}),
        "directory as file": (65, {"person": f"--person={folder / 'folder'}"}),
        "unreadable file": (66, {"person": f"--person={UNREADABLE}"}),
        "output exists": (73, {"output": f"--output={folder / 'there.jpg'}"}),
        "output is a folder": (73, {"output": f"--output={folder / 'folder'}"}),
        "output dir cannot be": (73, {"output": f"--output={folder / 'person.png' / 'new' / 'result.jpg'}"}),
    }
    for name, (wanted, changes) in cases.items():
        options = {**given, "output": f"--output={folder / 'new.jpg'}", **changes}
        status, said = _run(stage, *options.values())
        assert status == wanted, f"{name}: exit {status} instead of {wanted}: {said}"
        assert "Traceback" not in said, f"{name}: {said}"
        assert len(said.splitlines()) == 1, f"{name}: {said}"
    assert (folder / "there.jpg").read_bytes() == b"precious"
    assert not (folder / "new.jpg").exists()
    status, said = _run(stage, *given.values(), f"--output={folder / 'there.jpg'}", "--force")
    assert status == 0, said
    assert pixels_of((folder / "there.jpg").read_bytes()).shape == (1024, 768, 3)
    status, said = _run(stage, *given.values(), f"--output={folder / 'made' / 'for' / 'it.jpg'}")
    assert status == 0, said
    return "a folder for the output that is missing is made"


def _run(stage: Stage, *options: str) -> tuple[int, str]:
    return stage.ground.zygote.run(COMMAND, "run", "--cloth-type=overall", *options, VTON_STEPS="1")
