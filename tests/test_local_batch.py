"""Batch Transform over S3 and folders, with a small container behind it."""

from __future__ import annotations

import asyncio
import json
import re
import time

import pytest
from fastapi import FastAPI, Request, Response
from starlette.responses import StreamingResponse

from deploy.demo import free_port, http_server
from deploy.local_batch import LocalFolder, S3Folder, TransformError, TransformOptions, prepare, transform
from deploy.local_cloud import BUCKET, local_cloud

PARAMETERS = {"MaxConcurrentTransforms": 3, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 1}


class Container:
    """Answers a record with itself, later the smaller its number is; fails as told."""

    def __init__(self):
        self.app = FastAPI()
        self.parameters = PARAMETERS
        self.calls = []
        self.at_once = self.most_at_once = 0
        self.failures = {}  # number of a record -> statuses of its first answers
        self.answer_bytes = 0
        self.drips = False

        async def dripped():
            for _ in range(80):
                await asyncio.sleep(0.1)
                yield b" "

        @self.app.get("/execution-parameters")
        async def parameters() -> Response:
            if self.drips:
                return StreamingResponse(dripped())
            return Response(json.dumps(self.parameters), 404 if self.parameters is None else 200)

        @self.app.post("/invocations")
        async def invocations(request: Request) -> Response:
            record = json.loads(await request.body())
            self.calls.append((record["number"], request.headers["content-type"]))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            await asyncio.sleep(0.2 / (1 + record["number"]))
            self.at_once -= 1
            statuses = self.failures.get(record["number"])
            content = json.dumps({"was": record["number"]}).ljust(self.answer_bytes)
            return Response(content, statuses.pop(0) if statuses else 200)


@pytest.fixture
def container():
    return Container()


@pytest.fixture
def url(container):
    with http_server(container.app) as behind:
        yield behind


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch):
    monkeypatch.setattr("deploy.local_batch.RETRY_EVERY_S", 0.01)


def lines(count, first=0):
    return "".join(json.dumps({"number": first + number}) + "\n" for number in range(count)).encode()


def run(url, folder, **options):
    source, target = folder / "in", folder / "out"
    return transform(lambda: url, prepare(LocalFolder(source), LocalFolder(target), TransformOptions(**options)))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    return tmp_path


def test_each_line_gets_its_answer_in_order_within_what_the_container_offers(url, container, folder):
    (folder / "in" / "a.jsonl").write_bytes(lines(7))
    result = run(url, folder)
    assert (result.status, result.records) == ("Completed", 7)
    output = (folder / "out" / "a.jsonl.out").read_text().splitlines()
    assert [json.loads(line)["was"] for line in output] == list(range(7))
    assert container.most_at_once == PARAMETERS["MaxConcurrentTransforms"]
    assert {kind for _, kind in container.calls} == {"application/json"}


def test_blank_lines_are_no_records(url, container, folder):
    (folder / "in" / "a.jsonl").write_bytes(b'\n{"number": 0}\n \t\r\n{"number": 1}\n\n')
    (folder / "in" / "b.jsonl").write_bytes(b'\n{"number": 2}\n')
    container.failures = {2: [422]}
    result = run(url, folder)
    assert (folder / "out" / "a.jsonl.out").read_bytes() == b'{"was": 0}\n{"was": 1}\n'
    assert result.failed["b.jsonl"].startswith("record 2: 422")  # by its line, where it can be looked up


@pytest.mark.parametrize(
    ("asked", "offered", "expected"), [(2, PARAMETERS, 2), (0, PARAMETERS, 3), (None, {}, 1), (None, None, 1)]
)
def test_the_job_comes_before_the_container_and_the_container_before_the_platform(
    url, container, folder, asked, offered, expected
):
    container.parameters = offered
    (folder / "in" / "a.jsonl").write_bytes(lines(4))
    assert run(url, folder, max_concurrent_transforms=asked).status == "Completed"
    assert container.most_at_once == expected


def test_a_file_with_a_failed_record_has_no_output_and_the_other_files_have_theirs(url, container, folder):
    (folder / "in" / "a.jsonl").write_bytes(lines(3))
    (folder / "in" / "sub").mkdir()
    (folder / "in" / "sub" / "b.jsonl").write_bytes(lines(2, first=10))
    container.failures = {1: [422] * 4}
    result = run(url, folder)
    assert (result.status, list(result.failed)) == ("Failed", ["a.jsonl"])
    assert re.match(r'record 2: 422 \{"was": 1\}', result.failed["a.jsonl"])
    assert not (folder / "out" / "a.jsonl.out").exists()
    assert (folder / "out" / "sub" / "b.jsonl.out").read_text().count("\n") == 2
    assert [number for number, _ in container.calls].count(1) == 1  # the same request fails again


@pytest.mark.parametrize(("statuses", "status"), [([503, 429, 500], "Completed"), ([503] * 4, "Failed")])
def test_an_outage_is_tried_again_as_often_as_permitted(url, container, folder, statuses, status):
    container.failures = {0: list(statuses)}
    (folder / "in" / "a.jsonl").write_bytes(lines(1))
    assert run(url, folder, max_retries=3).status == status
    assert len(container.calls) == 4


def test_an_answer_that_does_not_come_is_tried_again(folder):
    (folder / "in" / "a.jsonl").write_bytes(lines(1))
    gone = f"http://127.0.0.1:{free_port()}"
    result = run(gone, folder, max_retries=1)
    assert "no container primary in service" in result.failed["a.jsonl"]


def test_an_answer_above_the_payload_limit_is_not_asked_for_again(url, container, folder):
    container.answer_bytes = 2**20 + 1
    (folder / "in" / "a.jsonl").write_bytes(lines(1))
    assert "larger than 1048576 bytes" in run(url, folder).failed["a.jsonl"]
    assert len(container.calls) == 1


def test_what_a_container_offers_is_not_waited_for_without_end(url, container, folder, monkeypatch):
    monkeypatch.setattr("deploy.local_batch.PARAMETERS_S", 0.5)
    container.drips = True
    (folder / "in" / "a.jsonl").write_bytes(lines(1))
    began = time.monotonic()
    assert run(url, folder).status == "Completed"
    assert time.monotonic() - began < 5


def test_the_time_limit_is_of_each_attempt(url, folder):
    (folder / "in" / "a.jsonl").write_bytes(b'{"number": -0.99}\n')  # 20 s
    assert "timed out" in run(url, folder, timeout_s=1, max_retries=0).failed["a.jsonl"]


def test_a_record_above_the_payload_limit_fails_its_file(url, container, folder):
    fits = b'{"number": 1, "x": "' + b"x" * (2**20 - 22) + b'"}'
    assert len(fits) == 2**20
    (folder / "in" / "fits.jsonl").write_bytes(fits + b"\n")
    (folder / "in" / "large.jsonl").write_bytes(fits + b" \n")
    result = run(url, folder)
    assert list(result.completed) == ["fits.jsonl"]
    assert "MaxPayloadInMB" in result.failed["large.jsonl"]


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"max_concurrent_transforms": 101}, PARAMETERS),
        ({"max_payload_mb": 101}, PARAMETERS),
        ({}, {**PARAMETERS, "MaxConcurrentTransforms": 101}),
        ({"max_concurrent_transforms": 20, "max_payload_mb": 6}, PARAMETERS),
        ({"max_retries": 4}, PARAMETERS),
        ({"timeout_s": 3601}, PARAMETERS),
        ({}, {**PARAMETERS, "BatchStrategy": "MULTI_RECORD"}),
        ({}, {**PARAMETERS, "MaxPayloadInMB": "many"}),
    ],
)
def test_a_job_out_of_range_does_not_begin(url, container, folder, options, parameters):
    container.parameters = parameters
    (folder / "in" / "a.jsonl").write_bytes(lines(1))
    with pytest.raises(TransformError):
        run(url, folder, **options)
    assert container.calls == []


@pytest.mark.parametrize(
    "options", [{"max_concurrent_transforms": -1}, {"max_payload_mb": 0}, {"max_payload_mb": -1}, {"timeout_s": 0}]
)
def test_what_is_out_of_range_is_refused_before_there_is_a_container(options):
    with pytest.raises(TransformError):
        TransformOptions(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, {}),
        ({"max_concurrent_transforms": 0}, {}),
        ({"max_concurrent_transforms": 4}, {"SAGEMAKER_MAX_CONCURRENT_TRANSFORMS": "4"}),
        ({"max_payload_mb": 7}, {"SAGEMAKER_MAX_PAYLOAD_IN_MB": "7"}),
    ],
)
def test_the_container_is_told_what_the_job_itself_says(options, told):
    batch = {"SAGEMAKER_BATCH": "true", "SAGEMAKER_BATCH_STRATEGY": "SINGLE_RECORD"}
    assert TransformOptions(**options).environ() == {**batch, **told}


def test_no_input_is_an_error_before_there_is_a_container(folder):
    with pytest.raises(TransformError, match="no input"):
        prepare(LocalFolder(folder / "in"), LocalFolder(folder / "out"), TransformOptions())


def test_an_output_that_cannot_be_written_is_an_error_before_there_is_a_container(folder):
    (folder / "in" / "a.jsonl").write_bytes(lines(1))
    (folder / "taken").touch()
    with pytest.raises(TransformError, match="taken"):
        prepare(LocalFolder(folder / "in"), LocalFolder(folder / "taken"), TransformOptions())
    with local_cloud() as cloud, pytest.raises(TransformError, match="404"):
        nowhere = S3Folder(cloud.client("s3"), "s3://no-such-bucket/out")
        prepare(LocalFolder(folder / "in"), nowhere, TransformOptions())


def test_a_name_that_leads_out_of_the_folder_is_refused(tmp_path):
    with (tmp_path / "x").open("w+b") as file, pytest.raises(TransformError):
        LocalFolder(tmp_path / "out").put("../escaped", file)


def test_inputs_and_outputs_lie_in_s3_as_on_the_platform(url, container):
    with local_cloud() as cloud:
        s3 = cloud.client("s3")
        for key, content in {"batch/in/a.jsonl": lines(2), "batch/in/b/c.jsonl": lines(1), "batch/in/": b""}.items():
            s3.put_object(Bucket=BUCKET, Key=key, Body=content)
        source, target = (S3Folder(s3, f"s3://{BUCKET}/batch/{name}") for name in ("in/", "out"))
        result = transform(lambda: url, prepare(source, target, TransformOptions()))
        assert result.completed == {
            "a.jsonl": f"s3://{BUCKET}/batch/out/a.jsonl.out",
            "b/c.jsonl": f"s3://{BUCKET}/batch/out/b/c.jsonl.out",
        }
        stored = s3.get_object(Bucket=BUCKET, Key="batch/out/a.jsonl.out")["Body"].read()
        assert stored == b'{"was": 0}\n{"was": 1}\n'
        one = S3Folder(s3, f"s3://{BUCKET}/batch/in/a.jsonl")
        assert list(transform(lambda: url, prepare(one, target, TransformOptions())).completed) == ["a.jsonl"]
        nowhere = S3Folder(s3, "s3://no-such-bucket/in")
        with pytest.raises(TransformError, match="NoSuchBucket"):
            prepare(nowhere, target, TransformOptions())
