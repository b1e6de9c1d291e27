from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_aws import client_of, faulty_aws
from moto.server import ThreadedMotoServer
from structlog.testing import capture_logs

from container.errors import JobConflict, StorageFailed
from container.images import FILE_OF
from container.request import parse
from container.storage import (
    LocalStorage,
    S3Storage,
    StoredObject,
    all_keys_for,
    key_for,
    same_job,
    wait_until_reachable,
)

BUCKET = "results"
KEY = "users/7/vton_result/241108-230001/result.jpg"
FACTS = {
    "job_id": "a" * 64,
    "seed": "42",
    "width": "768",
    "height": "1024",
    "engine": "catvton/mix",
    "mask_source": "g",
}
OTHER_JOB = {**FACTS, "job_id": "b" * 64}
ETAG = hashlib.md5(b"picture", usedforsecurity=False).hexdigest()
STORED = (200, {"ETag": f'"{ETAG}"'}, b"")


def request(**changes):
    fields = {
        "userId": "7",
        "timestamp": "241108-230001",
        "person_image_url": "https://images.example/p.jpg",
        "overall_cloth_url": "https://images.example/c.jpg",
    }
    return parse({**fields, **changes})


def fault(status, code):
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>arn:aws:s3:::policy</Message></Error>"
    return status, {"Content-Type": "application/xml"}, body.encode()


@pytest.fixture(scope="module")
def moto():
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    client = client_of("s3", f"http://{host}:{port}")
    yield client
    client.close()
    server.stop()


@pytest.fixture
def s3(moto):
    """A bucket with nothing in it."""
    moto.create_bucket(Bucket=BUCKET)
    yield S3Storage(moto, BUCKET)
    for found in moto.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        moto.delete_object(Bucket=BUCKET, Key=found["Key"])
    moto.delete_bucket(Bucket=BUCKET)


@pytest.fixture(params=["s3", "local"])
def storage(request, tmp_path):
    return request.getfixturevalue("s3") if request.param == "s3" else LocalStorage(tmp_path / "results")


@pytest.fixture
def impatient(monkeypatch):
    """boto3 retries at once."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


def put(storage, content=b"picture", facts=FACTS):
    return storage.put(KEY, content, "image/jpeg", facts)


# --- keys


@pytest.mark.parametrize(("output_format", "suffix"), [("jpeg", "jpg"), ("png", "png"), ("webp", "webp")])
def test_the_key_is_the_one_that_the_deployed_consumer_builds(output_format, suffix):
    key = key_for(request(output_format=output_format), "")
    assert key == f"users/7/vton_result/241108-230001/result.{suffix}"


def test_the_prefix_comes_first():
    assert key_for(request(), "shop/") == f"shop/{KEY}"


def test_a_result_is_looked_for_under_every_format():
    keys = all_keys_for(request(), "shop/")
    assert set(keys) == {key_for(request(output_format=output_format), "shop/") for output_format in FILE_OF}


# --- what every storage promises


def test_of_a_key_without_an_object_none_is_found(storage):
    assert storage.find(KEY) is None


def test_what_was_stored_is_found_with_its_facts(storage):
    stored = put(storage)
    assert stored == StoredObject(KEY, ETAG, FACTS)
    assert storage.find(KEY) == stored


def test_the_same_job_gets_what_is_there(storage):
    first = put(storage)
    assert put(storage, b"another picture", {**FACTS, "seed": "43"}) == first


def test_another_job_does_not_get_the_key(storage):
    put(storage)
    with pytest.raises(JobConflict):
        put(storage, b"another picture", OTHER_JOB)
    assert storage.find(KEY) == StoredObject(KEY, ETAG, FACTS)


def test_other_keys_are_other_objects(storage):
    put(storage)
    assert storage.find(KEY.replace("/7/", "/8/")) is None


def test_of_two_jobs_the_object_found_is_its_owners():
    found = StoredObject(KEY, ETAG, FACTS)
    assert same_job(found, FACTS["job_id"]) is found
    with pytest.raises(JobConflict):
        same_job(found, OTHER_JOB["job_id"])


# --- S3


def test_an_object_has_its_content_type_and_its_facts_as_metadata(s3, moto):
    put(s3)
    found = moto.get_object(Bucket=BUCKET, Key=KEY)
    assert (found["ContentType"], found["Body"].read()) == ("image/jpeg", b"picture")
    assert found["Metadata"] == {name.replace("_", "-"): value for name, value in FACTS.items()}


def test_of_eight_writers_one_wins_and_the_others_see_it(s3):
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda number: put(s3, b"picture %d" % number), range(8)))
    assert {found.etag for found in stored} == {s3.find(KEY).etag}


def test_an_object_of_a_stranger_belongs_to_no_job(s3, moto):
    moto.put_object(Bucket=BUCKET, Key=KEY, Body=b"theirs")
    with pytest.raises(JobConflict):
        put(s3)


@pytest.mark.parametrize("status", [500, 503])
def test_two_failures_of_s3_are_overcome(impatient, status):
    with faulty_aws(fault(status, "X"), fault(status, "X"), STORED) as aws:
        assert put(S3Storage(client_of("s3", aws.url), BUCKET)).etag == ETAG
    assert aws.calls == ["PUT"] * 3


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable")])
def test_three_failures_of_s3_are_an_outage(impatient, status, code):
    with faulty_aws(fault(status, code)) as aws, pytest.raises(StorageFailed) as caught:
        put(S3Storage(client_of("s3", aws.url), BUCKET))
    assert (caught.value.retryable, aws.calls) == (True, ["PUT"] * 3)


NEEDS_AN_OPERATOR = [
    (403, "AccessDenied"),
    (404, "NoSuchBucket"),
    (403, "InvalidAccessKeyId"),
    (403, "SignatureDoesNotMatch"),
    (400, "ExpiredToken"),
]


@pytest.mark.parametrize(("status", "code"), NEEDS_AN_OPERATOR)
def test_a_put_that_an_operator_must_mend_is_not_to_be_repeated(status, code):
    with faulty_aws(fault(status, code)) as aws, pytest.raises(StorageFailed) as caught:
        put(S3Storage(client_of("s3", aws.url), BUCKET))
    assert (caught.value.retryable, aws.calls) == (False, ["PUT"])


@pytest.mark.parametrize(("status", "code"), [row for row in NEEDS_AN_OPERATOR if row[0] != 404])
def test_a_find_that_an_operator_must_mend_is_not_to_be_repeated(status, code):
    """The answer to a HEAD has no body, so there is no code but the status."""
    with faulty_aws(fault(status, code)) as aws, pytest.raises(StorageFailed) as caught:
        S3Storage(client_of("s3", aws.url), BUCKET).find(KEY)
    assert (caught.value.retryable, set(aws.calls)) == (False, {"HEAD"})


def test_a_find_that_fails_is_an_outage_and_not_none(impatient):
    with faulty_aws(fault(503, "SlowDown")) as aws, pytest.raises(StorageFailed) as caught:
        S3Storage(client_of("s3", aws.url), BUCKET).find(KEY)
    assert (caught.value.retryable, aws.calls) == (True, ["HEAD"] * 3)


@pytest.mark.parametrize(("status", "code"), NEEDS_AN_OPERATOR)
def test_neither_secret_nor_policy_gets_into_the_answer(status, code):
    with faulty_aws(fault(status, code)) as aws, pytest.raises(StorageFailed) as caught:
        put(S3Storage(client_of("s3", aws.url), BUCKET))
    told = f"{caught.value.body('r-1')} {caught.value}"
    assert not any(secret in told for secret in ("s3cr3t", "AKIAKEY", "arn:aws", "policy"))


@pytest.mark.parametrize("call", [put, lambda storage: storage.find(KEY)], ids=["put", "find"])
def test_an_s3_that_cannot_be_reached_is_an_outage(impatient, call):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(StorageFailed) as caught:
        call(S3Storage(client_of("s3", f"http://127.0.0.1:{port}"), BUCKET))
    assert caught.value.retryable


@pytest.mark.parametrize(("status", "code"), [(412, "PreconditionFailed"), (409, "ConditionalRequestConflict")])
def test_a_key_that_was_taken_by_the_same_job_is_its_own(status, code):
    """So it is, too, when the answer to our own first attempt was lost."""
    head = (200, {"ETag": '"e"', "x-amz-meta-job-id": FACTS["job_id"]}, b"")
    with faulty_aws(fault(status, code), head) as aws:
        assert put(S3Storage(client_of("s3", aws.url), BUCKET)).etag == "e"
    assert aws.calls == ["PUT", "HEAD"]


def test_a_key_that_was_taken_and_then_free_is_an_outage():
    with faulty_aws(fault(412, "PreconditionFailed"), fault(404, "")) as aws, pytest.raises(StorageFailed) as caught:
        put(S3Storage(client_of("s3", aws.url), BUCKET))
    assert caught.value.retryable


# --- at the start


def test_a_storage_that_answers_is_reached_at_once(storage):
    assert wait_until_reachable(storage, "", limit_s=0) is None


def test_the_start_asks_for_a_key_that_the_role_of_a_prefix_reaches():
    """S3 answers 403 to a HEAD of what lies outside."""
    with faulty_aws(fault(404, "")) as aws:
        wait_until_reachable(S3Storage(client_of("s3", aws.url), BUCKET), "shop/", limit_s=0)
    assert aws.paths == [f"/{BUCKET}/shop/users/none"]


def test_a_role_that_is_not_known_yet_is_waited_for_and_told_of(impatient):
    forbidden, absent = fault(403, "AccessDenied"), fault(404, "")
    with faulty_aws(forbidden, forbidden, absent) as aws, capture_logs() as logs:
        wait_until_reachable(S3Storage(client_of("s3", aws.url), BUCKET), "", limit_s=60)
    assert [line["reason"] for line in logs] == ["S3 answered 403"] * 2


def test_a_storage_that_stays_away_ends_the_start(impatient):
    with faulty_aws(fault(403, "AccessDenied")) as aws, pytest.raises(StorageFailed, match="S3 answered 403"):
        wait_until_reachable(S3Storage(client_of("s3", aws.url), BUCKET), "", limit_s=0.2)


# --- local


def test_a_file_lies_at_its_key(tmp_path):
    storage = LocalStorage(tmp_path)
    put(storage)
    assert (tmp_path / KEY).read_bytes() == b"picture"
    assert storage.path(KEY) == tmp_path / KEY
    assert storage.bucket is None


def test_the_directory_is_made_with_the_first_object(tmp_path):
    storage = LocalStorage(tmp_path / "results")
    assert storage.find(KEY) is None
    assert not (tmp_path / "results").exists()
    put(storage)
    assert (tmp_path / "results").is_dir()


def files_below(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_nothing_but_the_object_and_its_facts_is_left(tmp_path):
    put(LocalStorage(tmp_path))
    assert files_below(tmp_path) == ["result.jpg", "result.jpg.json"]


def test_an_object_can_be_read_by_others(tmp_path):
    put(LocalStorage(tmp_path))
    assert (tmp_path / KEY).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["write", "replace", "chmod"])
@pytest.mark.parametrize("survived", [0, 1])
def test_a_failed_write_leaves_no_object_and_no_loose_file(tmp_path, monkeypatch, step, survived):
    storage, calls = LocalStorage(tmp_path), []

    def fails_after(real):
        def attempt(*args, **kwargs):
            calls.append(args)
            if len(calls) > survived:
                raise OSError(28, "No space left on device")
            return real(*args, **kwargs)

        return attempt

    if step == "write":
        real = os.fdopen
        monkeypatch.setattr(os, "fdopen", lambda *args: Full(real(*args), fails_after(lambda content: len(content))))
    else:
        monkeypatch.setattr(Path, step, fails_after(getattr(Path, step)))
    with pytest.raises(StorageFailed) as caught:
        put(storage)
    monkeypatch.undo()
    assert caught.value.retryable is False
    assert storage.find(KEY) is None
    assert files_below(tmp_path) == ["result.jpg.json"][:survived]


class Full:
    """A file whose writes fail."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._file.close()


def test_after_a_failed_write_another_job_may_have_the_key(tmp_path, monkeypatch):
    storage, real = LocalStorage(tmp_path), Path.replace

    def fails_for_the_object(path, target):
        if target.suffix == ".jpg":
            raise OSError(28, "No space left on device")
        return real(path, target)

    monkeypatch.setattr(Path, "replace", fails_for_the_object)
    with pytest.raises(StorageFailed):
        put(storage)
    monkeypatch.undo()
    assert put(storage, facts=OTHER_JOB).facts == OTHER_JOB


def test_a_file_of_a_stranger_belongs_to_no_job(tmp_path):
    (tmp_path / KEY).parent.mkdir(parents=True)
    (tmp_path / KEY).write_bytes(b"theirs")
    with pytest.raises(JobConflict):
        put(LocalStorage(tmp_path))
    assert (tmp_path / KEY).read_bytes() == b"theirs"


@pytest.mark.parametrize("facts", ["{", "[]", '"x"', "null"])
def test_facts_that_cannot_be_read_are_a_failure(tmp_path, facts):
    put(LocalStorage(tmp_path))
    (tmp_path / f"{KEY}.json").write_text(facts)
    with pytest.raises(StorageFailed) as caught:
        put(LocalStorage(tmp_path))
    assert caught.value.retryable is False


def test_a_directory_that_is_a_file_is_a_failure(tmp_path):
    (tmp_path / "results").write_text("")
    with pytest.raises(StorageFailed) as caught:
        put(LocalStorage(tmp_path / "results"))
    assert caught.value.retryable is False


def test_a_failure_does_not_tell_whose_picture_it_was(tmp_path):
    (tmp_path / "users").write_text("")
    with pytest.raises(StorageFailed) as caught:
        put(LocalStorage(tmp_path))
    assert "users" not in str(caught.value)


def test_the_facts_of_a_file_are_json(tmp_path):
    put(LocalStorage(tmp_path))
    assert json.loads((tmp_path / f"{KEY}.json").read_text()) == FACTS
