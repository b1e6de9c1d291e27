"""privacy_and_logs: signatures stay on the wire, users out of the log, and errors say nothing of the inside."""

from __future__ import annotations

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from container.errors import Outage, Refusal

from ..aws import s3_says, sqs_says
from ..files import foreign_formats, png_header
from ..image_host import drips, resets_in_the_body, says
from ..pictures import file_of, ramp
from ..registry import row
from ..services import Answer, Service
from ..stage import FIELD_OF, SIGNATURE, Stage, presigned
from ..synthesis import of_type, synthesis_in

SECRETS = (SIGNATURE, "X-Amz-Signature", "X-Amz-Credential", "X-Amz-Algorithm", "AKIASECRET", "5ecret")
AT_ONCE = 6  # below the places that there are
MEMBERS = {"code": str, "message": str, "retryable": bool, "request_id": str}
OPTIONAL_MEMBERS = {"retry_after_s": int, "field": str, "object_key": str}
SENTENCES = {kind.code: (kind.status, kind.public) for base in (Refusal, Outage) for kind in base.__subclasses__()}
INSIDE = re.compile(
    r"0x[0-9a-f]{6,}|/app/|site-packages|Traceback|\.py\b|[A-Z][a-z]+(Error|Exception|Timeout)\b|"
    r"\b(?:10|127|169\.254|172\.(?:1[6-9]|2\d|3[01])|192\.168)(?:\.\d+){2,3}\b"
)


def failing_urls(stage: Stage) -> dict[str, str]:
    """Code -> a presigned URL of a person's photo that ends in it."""
    put, behave = stage.host.put, stage.host.behave
    row_name = stage.row
    urls = {
        "url_not_permitted": "http://images.example/a.png",
        "address_not_permitted": "https://private.example/a.png",
        "too_many_redirects": behave(f"{row_name}/round.png", says(302, location="round.png?X-Amz-Signature=5ecret")),
        "image_too_large": behave(f"{row_name}/large.png", says(200, content_length=str(2**30))),
        "image_not_found": behave(f"{row_name}/gone.png", says(404)),
        "image_not_decodable": put(f"{row_name}/page.png", b"<html></html>"),
        "image_format_not_permitted": put(f"{row_name}/gif.png", foreign_formats()["GIF"]),
        "image_too_small": put(f"{row_name}/small.png", file_of(ramp(8, 8))),
        "image_too_many_pixels": put(f"{row_name}/bomb.png", png_header(50_000, 50_000)),
        "image_source_failed": behave(f"{row_name}/broken.png", resets_in_the_body),
        "image_source_timeout": behave(f"{row_name}/drip.png", drips(b"x", 0.5, content_length="9999")),
    }
    return {code: presigned(url) for code, url in urls.items()}


def fail_in_every_way(stage: Stage, service: Service) -> dict[str, Answer]:
    """Code -> the answer of a request that ended in it, all of whose URLs were presigned."""
    good = {field: presigned(f"{stage.host.base}/good/{role}.png") for role, field in FIELD_OF.items()}
    urls = failing_urls(stage)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        asked = {
            code: pool.submit(stage.ask, service, **{**good, "person_image_url": url}) for code, url in urls.items()
        }
    answers = {code: future.result() for code, future in asked.items()}
    answers["mask_invalid"] = stage.ask(
        service, **{**good, "mask_image_url": presigned(stage.host.put("P/black.png", file_of(ramp() * 0)))}
    )
    answers["invalid_request"] = stage.ask(service, **good, width=7)
    answers["invalid_json"] = stage.send(service, json.dumps(stage.fields(**good)).encode()[:-1])
    answers["unsupported_content_type"] = stage.post(service, stage.fields(**good), {"Content-Type": "text/plain"})
    answers["request_too_large"] = stage.send(service, json.dumps({**good, "x": "x" * 70_000}).encode())
    path = "/nothing?" + good["person_image_url"].partition("?")[2]
    answers["not_found"] = stage.keep(service.call("GET", path))
    answers["method_not_allowed"] = stage.keep(service.call("GET", path.replace("nothing", "invocations")))
    taken = stage.fields(**good)
    stage.post(service, taken).done()
    answers["job_conflict"] = stage.post(service, {**taken, "seed": 7})
    for code, kind in (("gpu_failed", "oom"), ("generation_failed", "bad"), ("internal", "unforeseen")):
        service.fail_next(kind, times=3 if kind == "oom" else 1)
        answers[code] = stage.ask(service, **good)
        (service.folder / "fault").unlink(missing_ok=True)
    answers.update(_fail_behind(stage, service, good))
    return answers


def _fail_behind(stage: Stage, service: Service, good: dict[str, str]) -> dict[str, Answer]:
    """The failures of what comes before and after the engine."""
    answers = {}
    with ExitStack() as faults:
        faults.enter_context(stage.front.failing("PUT", "users/p-s3/", s3_says(403, "AccessDenied"), forever=True))
        answers["storage_failed"] = stage.ask(service, **good, userId="p-s3")
    with stage.front.failing("POST", "", sqs_says(403, "AccessDenied"), forever=True):
        answers["notify_failed"] = stage.ask(service, **good)
    with ThreadPoolExecutor(8) as pool, service.held():
        held = [pool.submit(stage.ask, service, **good) for _ in range(8)]
        service.wait_for("vton_in_flight", 8)
        answers["overloaded"] = stage.ask(service, **good)
    for future in held:
        future.result().done()
    return answers


@row("P01", lane="waiting")
def signatures(stage: Stage) -> str:
    """Nowhere but on the wire, whatever fails."""
    service = stage.service
    answers = fail_in_every_way(stage, service)
    for code, answer in answers.items():
        found = answer.json()["error"]["code"]
        assert found == code, f"{found} instead of {code}"
    places = {
        "the log": service.log.read_text(),
        "the metrics": service.call("GET", "/metrics").content.decode(),
        "a message": json.dumps(stage.messages()),
        **{f"the body of {code}": answer.content.decode() for code, answer in answers.items()},
    }
    for place, text in places.items():
        for secret in SECRETS:
            assert secret not in text, f"{secret} is in {place}: ...{_around(text, secret)}..."
    return f"{len(answers)} failure classes"


def _around(text: str, secret: str) -> str:
    at = text.index(secret)
    return text[max(0, at - 150) : at + 60]


@row("P02", lane="waiting")
def users_in_the_log(stage: Stage) -> str:
    """A salted hash, the same for the same user wherever a deployment's processes run, and never the id."""
    service, since = stage.service, stage.service.log_size()
    for user in ("secret-user-one", "secret-user-one", "secret-user-two"):
        stage.ask(service, userId=user).done()
        stage.ask(service, userId=user, seed="x").refused(422, "invalid_request")
    assert "secret-user" not in service.log.read_text(), "a user id is in the log"
    done = [line for line in service.lines(since) if line.get("event") == "request_done"]
    assert len(done) == 3, f"{len(done)} lines"
    names = sorted(name for name in done[0] if "user" in name)
    assert names, f"no field of the line tells users apart: {sorted(done[0])}"
    one, again, two = (line[names[0]] for line in done)
    assert one == again != two, f"{one} {again} {two}"
    for digest in (hashlib.sha256, hashlib.sha1, hashlib.md5):
        plain = digest(b"secret-user-one").hexdigest()
        assert not plain.startswith(str(one)[:12]), "the hash has no salt"
    models = of_type(synthesis_in(Path(stage.ground.folder) / "synthesis").template("two"), "SageMaker::Model").values()
    salts = [model["PrimaryContainer"]["Environment"].get("VTON_LOG_SALT") for model in models]
    assert len(salts) == 2, f"{len(salts)} models"
    assert salts[0] == salts[1] is not None, f"processes draw their own salts: {salts}"
    return f"the field is {names[0]}, the salt one secret of the deployment"


@row("P04", lane="last")
def error_bodies(stage: Stage) -> str:
    """Every one that this run has seen is of the schema, says its fixed sentence, and nothing of the inside."""
    if len(stage.ground.bodies) < 100:  # chosen rows only: the ways to fail make up for the rest
        fail_in_every_way(stage, stage.service)
    codes = set()
    for body in stage.ground.bodies:
        where = f"{body.row}: {body.content[:300]!r}"
        whole = json.loads(body.content)
        assert set(whole) == {"error"}, where
        error = whole["error"]
        allowed = {**MEMBERS, **OPTIONAL_MEMBERS}
        assert set(MEMBERS) <= set(error) <= set(allowed), where
        assert all(isinstance(value, allowed[name]) for name, value in error.items()), where
        assert SENTENCES[error["code"]] == (body.status, error["message"]), where
        told = {name: value for name, value in error.items() if name not in ("request_id", "object_key")}
        assert not INSIDE.search(json.dumps(told)), where
        codes.add(error["code"])
    missing = sorted(SENTENCES.keys() - codes)
    return f"{len(stage.ground.bodies)} bodies of {len(codes)} codes; not seen: {', '.join(missing)}"


@row("P08")
def access_log(stage: Stage) -> None:
    """No line of it, and no query."""
    service, since = stage.service, stage.service.log_size()
    service.call("GET", f"/ping?token={SIGNATURE}")
    service.call("POST", f"/invocations?token={SIGNATURE}", b"{}", {"Content-Type": "application/json"})
    lines = service.lines(since)
    text = json.dumps(lines)
    assert SIGNATURE not in text, text[:300]
    assert "HTTP/1.1" not in text, text[:300]
    assert not [line for line in lines if line.get("logger") == "uvicorn.access"]


@row("P09", lane="waiting")
def erasure(stage: Stage) -> str:
    """All of a user's objects lie under one prefix and can be removed; what jobs were asked for goes by itself."""
    service = stage.service
    done = [stage.ask(service, userId="p09-leaves").done(), stage.ask(service, userId="p09-leaves").done()]
    stage.ask(service, userId="p09-stays").done()
    keys = stage.keys("users/p09-leaves/")
    assert set(keys) == {one["object_key"] for one in done}
    stage.s3.delete_objects(Bucket=stage.bucket, Delete={"Objects": [{"Key": key} for key in keys]})
    assert not stage.keys("users/p09-leaves/")
    assert stage.keys("users/p09-stays/")
    template = synthesis_in(Path(stage.ground.folder) / "synthesis").template("two")
    (pictures,) = (one for name, one in of_type(template, "S3::Bucket").items() if name.startswith("Bucket"))
    rules = pictures["LifecycleConfiguration"]["Rules"]
    expiring = {rule.get("Prefix"): rule["ExpirationInDays"] for rule in rules if "ExpirationInDays" in rule}
    assert expiring.pop("asynchronous/inputs/") == 1, "inputs"
    assert all(prefix.startswith("asynchronous/") for prefix in expiring), f"results expire: {expiring}"
    return "inputs expire in 1 day"
