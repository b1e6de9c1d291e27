"""`vton local` as its user starts it: real processes, real signals, the embedded model."""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import requests
from botocore.exceptions import ClientError
from stand_in import usual_files, usual_request

from bench.waiting_service import NAME, PICTURE_S
from deploy.demo import client
from deploy.local_cli import SAME_SIGNAL_S
from deploy.local_cloud import folder_host, moto_server
from deploy.local_container import ContainerLimits

VTON = str(Path(sys.executable).parent / "vton")
PATIENCE_S = 150
WAITING = ("--command", f"{sys.executable} -m bench.waiting_service")  # the real service; its engine only waits
QUICK = {"VTON_ENGINE": NAME, "VTON_MASKER": "off", PICTURE_S: "0.1"}


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VTON_", "AWS_"))}
    return {**kept, "VTON_STEPS": "1", "OMP_NUM_THREADS": "1", **changes}


@contextmanager
def serving(folder, *arguments, **changes):
    """A running `vton local`, and what it printed before it served."""
    command = [VTON, "local", "--port", "0", *arguments]
    with (folder / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(**changes), stdout=subprocess.PIPE, stderr=err, text=True
        )
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith("serving"):
                break
        assert printed and printed[-1].startswith("serving"), (folder / "err").read_text()
        yield process, "".join(printed)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        process.stdout.close()


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, content in usual_files().items():
        (folder / name).write_bytes(content)
    return folder


def request_to(host, **changes):
    urls = {
        name: f"{host}{name.split('_')[0]}.png"
        for name in ("person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url")
    }
    return usual_request(**{**urls, **changes})


def exported(printed):
    return dict(re.findall(r"^export (\w+)=(\S+)$", printed, re.MULTILINE))


def test_what_it_prints_is_enough_to_call_it_and_sigterm_ends_all_of_it(tmp_path, images):
    with serving(tmp_path, "--images", str(images), "--endpoint-name", "mine") as (process, printed):
        children = psutil.Process(process.pid).children(recursive=True)
        given = exported(printed)
        host = re.search(r"are at (http://\S+)", printed)[1]
        runtime = client("sagemaker-runtime", given["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"])
        body = json.dumps(request_to(host))
        answer = json.loads(
            runtime.invoke_endpoint(EndpointName="mine", ContentType="application/json", Body=body)["Body"].read()
        )
        bucket = re.search(r"^bucket +(\S+)", printed, re.MULTILINE)[1]
        assert client("s3", given["AWS_ENDPOINT_URL_S3"]).head_object(Bucket=bucket, Key=answer["object_key"])
        queue_url = re.search(r"^results +(\S+)", printed, re.MULTILINE)[1]
        sqs = client("sqs", given["AWS_ENDPOINT_URL_SQS"])
        assert sqs.receive_message(QueueUrl=queue_url, WaitTimeSeconds=5)["Messages"]
        with pytest.raises(ClientError, match="ValidationError"):
            runtime.invoke_endpoint(EndpointName="vton", ContentType="application/json", Body=body)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
        assert psutil.wait_procs(children, timeout=30)[1] == []
    assert "Traceback" not in (tmp_path / "err").read_text()


DETOURS = {
    **dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9"),
    "NO_PROXY": "shop.example",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
}
CALL = """
import sys, boto3
print(boto3.client("sagemaker-runtime").invoke_endpoint(
    EndpointName="vton", ContentType="application/json", Body=sys.argv[1])["Body"].read().decode())
"""


def test_neither_a_proxy_nor_a_setting_of_boto3_is_in_the_way_of_calls_on_this_machine(tmp_path, images):
    with serving(tmp_path, "--images", str(images), *WAITING, **QUICK, **DETOURS) as (_, printed):
        given = exported(printed)
        assert given["NO_PROXY"].startswith("shop.example,")
        host = re.search(r"are at (http://\S+)", printed)[1]
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", CALL, json.dumps(request_to(host))],
            env=environment(**{**DETOURS, **given}),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stderr
        bucket = re.search(r"^bucket +(\S+)", printed, re.MULTILINE)[1]
        key = json.loads(done.stdout)["object_key"]
        assert client("s3", given["AWS_ENDPOINT_URL_S3"]).head_object(Bucket=bucket, Key=key)


ASYNC = ("--mode", "async", "--concurrency", "2", *WAITING)


def outcomes(given, queue_url, count):
    """Inference id -> status, of so many messages."""
    sqs = client("sqs", given["AWS_ENDPOINT_URL_SQS"])
    statuses, ends = {}, time.monotonic() + PATIENCE_S
    while len(statuses) < count and time.monotonic() < ends:
        received = sqs.receive_message(QueueUrl=queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=5)
        for each in received.get("Messages", []):
            event = json.loads(each["Body"])
            statuses[event["inferenceId"]] = event["invocationStatus"]
            sqs.delete_message(QueueUrl=queue_url, ReceiptHandle=each["ReceiptHandle"])
    return statuses


def test_the_asynchronous_mode_stores_and_tells(tmp_path, images):
    with serving(tmp_path, "--images", str(images), *ASYNC, **QUICK) as (process, printed):
        given = exported(printed)
        host = re.search(r"are at (http://\S+)", printed)[1]
        found = dict(re.findall(r"^(bucket|outcomes) +(\S+)", printed, re.MULTILINE))
        s3 = client("s3", given["AWS_ENDPOINT_URL_S3"])
        s3.put_object(Bucket=found["bucket"], Key="in.json", Body=json.dumps(request_to(host)))
        runtime = client("sagemaker-runtime", given["AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME"])
        location = f"s3://{found['bucket']}/in.json"
        runtime.invoke_endpoint_async(EndpointName="vton", ContentType="application/json", InputLocation=location)
        assert list(outcomes(given, found["outcomes"], 1).values()) == ["Completed"]
        process.send_signal(signal.SIGINT)
        assert process.wait(40) == 0


def test_the_jobs_behind_one_that_timed_out_complete(tmp_path, images):
    changes = {**QUICK, PICTURE_S: "2"}
    with serving(tmp_path, "--images", str(images), *ASYNC, **changes) as (_, printed):
        given = exported(printed)
        host = re.search(r"are at (http://\S+)", printed)[1]
        queue_url = re.search(r"^outcomes +(\S+)", printed, re.MULTILINE)[1]
        url = f"{given['AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME']}/endpoints/vton/async-invocations"

        def submit(name, **headers):
            named = {"Content-Type": "application/json", "Inference-Id": name, **headers}
            body = json.dumps(request_to(host, timestamp=name))
            sent = {f"X-Amzn-SageMaker-{key}": value for key, value in named.items()}
            assert requests.post(url, body, headers=sent, timeout=30).status_code == 202

        submit("warm")  # so that the next one is begun, and not only admitted, within its second
        assert outcomes(given, queue_url, 1) == {"warm": "Completed"}
        submit("short", InvocationTimeoutSeconds="1")
        behind = [f"behind-{number}" for number in range(5)]
        for name in behind:
            submit(name)
        assert outcomes(given, queue_url, 6) == {"short": "Failed", **dict.fromkeys(behind, "Completed")}


def told_to_the_container(folder, *arguments, **changes):
    """The environment that `vton local` gives a container, which ends as soon as it has told it."""
    (folder / "teller.py").write_text("import json, os; print(json.dumps(dict(os.environ)))")
    done = subprocess.run(
        [VTON, "local", *arguments, "--command", f"{sys.executable} {folder / 'teller.py'}"],
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 78, done.stderr
    return json.loads(log_of(folder))


@pytest.mark.parametrize(
    ("mode", "own", "expected"),
    [
        ("async", {"VTON_MAX_IN_FLIGHT": "3"}, "4"),
        ("async", {"VTON_MAX_IN_FLIGHT": "9"}, "9"),
        ("realtime", {}, "2"),
    ],
)
def test_the_container_has_places_for_what_is_sent_at_a_time(tmp_path, mode, own, expected):
    """And is not told where to listen."""
    arguments = ("--port", "0", "--mode", mode, "--concurrency", "2")
    told = told_to_the_container(tmp_path, *arguments, VTON_PORT="1", VTON_HOST="192.0.2.1", **own)
    assert told["VTON_MAX_IN_FLIGHT"] == expected
    assert {"VTON_PORT", "VTON_HOST"}.isdisjoint(told)


def test_the_container_of_a_transform_is_told_of_the_job(tmp_path):
    (tmp_path / "in.jsonl").write_text("{}")
    job = ("--input", "in.jsonl", "--output", "out", "--max-concurrent-transforms", "0", "--max-payload-mb", "7")
    told = told_to_the_container(tmp_path, "transform", *job)
    assert {name: value for name, value in told.items() if name.startswith("SAGEMAKER_") and "PORT" not in name} == {
        "SAGEMAKER_BATCH": "true",
        "SAGEMAKER_BATCH_STRATEGY": "SINGLE_RECORD",
        "SAGEMAKER_MAX_PAYLOAD_IN_MB": "7",
    }


def transform(folder, *arguments, **changes):
    command = [VTON, "local", "transform", *WAITING, *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(**QUICK, **changes), capture_output=True, text=True, timeout=PATIENCE_S
    )


def test_a_transform_leaves_answers_and_pictures_in_its_folder(tmp_path, images):
    with folder_host(images) as host:
        asked = [json.dumps(request_to(f"http://{host}/", timestamp=f"batch-{number}")) for number in range(3)]
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / "good.jsonl").write_text("\n".join(asked))
        (tmp_path / "in" / "bad.jsonl").write_text("\n".join([*asked, "not json"]))
        done = transform(tmp_path, "--input", "in", "--output", "out", VTON_TRUSTED_HOSTS=host)
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout[done.stdout.index("{") :])
    assert (told["status"], list(told["completed"])) == ("Failed", ["good.jsonl"])
    assert "record 4: 400" in told["failed"]["bad.jsonl"]
    assert "invalid_json" in told["failed"]["bad.jsonl"]
    answers = [json.loads(line) for line in (tmp_path / "out" / "good.jsonl.out").read_text().splitlines()]
    assert [each["object_key"].split("/")[3] for each in answers] == ["batch-0", "batch-1", "batch-2"]
    assert all((tmp_path / "out" / each["object_key"]).stat().st_size for each in answers)
    assert not (tmp_path / "out" / "bad.jsonl.out").exists()


def test_a_transform_asks_for_no_more_at_a_time_than_the_platform_permits(tmp_path, images):
    with folder_host(images) as host:
        (tmp_path / "in.jsonl").write_text(json.dumps(request_to(f"http://{host}/")))
        changes = {"VTON_TRUSTED_HOSTS": host, "VTON_MAX_IN_FLIGHT": "200"}
        done = transform(tmp_path, "--input", "in.jsonl", "--output", "out", **changes)
    assert done.returncode == 0, done.stderr


def test_a_transform_over_s3_uses_the_services_that_the_environment_names(tmp_path):
    with moto_server() as url:
        client("s3", url).create_bucket(Bucket="shop", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        put = client("s3", url).put_object
        requests_of = []
        for name, content in usual_files().items():
            put(Bucket="shop", Key=f"users/7/{name}", Body=content)
        for number in range(2):
            requests_of.append(json.dumps(request_to("s3://shop/users/7/", timestamp=f"batch-{number}")))
        put(Bucket="shop", Key="in/all.jsonl", Body="\n".join(requests_of))
        named = {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "x",
            "AWS_SECRET_ACCESS_KEY": "x",
            "AWS_DEFAULT_REGION": "eu-central-1",
            "VTON_BUCKET": "shop",
        }
        done = transform(tmp_path, "--input", "s3://shop/in/", "--output", "s3://shop/out", **named)
        assert done.returncode == 0, done.stderr + done.stdout
        output = client("s3", url).get_object(Bucket="shop", Key="out/all.jsonl.out")["Body"].read()
        answers = [json.loads(line) for line in output.splitlines()]
        assert [each["object_key"] for each in answers] == [
            f"users/7/vton_result/batch-{number}/result.png" for number in range(2)
        ]
        for each in answers:
            assert client("s3", url).head_object(Bucket="shop", Key=each["object_key"])


TRANSFORM_OF_FILE = ("transform", "--input", "file", "--output", "out")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("transform", "--input", "s3://a/b", "--output", "out"), "AWS_ENDPOINT_URL_S3"),
        (("--endpoint-name", "not_a_name"), "letters, digits and hyphens"),
        (("--endpoint-name", "a" + "-" * 100 + "b"), "at most 63"),
        (("--command", " "), "--command names no program"),
        (("--command", ""), "--command names no program"),
        (("--command", "it's"), "No closing quotation"),
        (("transform", "--input", "in", "--output", "out", "--command", " "), "--command names no program"),
        (("transform", "--input", "nothing", "--output", "out"), "there is no input"),
        (("--command", "true", *TRANSFORM_OF_FILE), "--command would be dropped: options of transform stand after it"),
        (("--output", "logs", "--time-limit", "60", *TRANSFORM_OF_FILE), "--output, --time-limit would be dropped"),
        (("transform", "--input", "file", "--output", "file"), "'file'"),
        (("transform", "--input", "file", "--output", "out", "--max-payload-mb", "101"), "from 1 to 100"),
        (("transform", "--input", "file", "--output", "out", "--max-payload-mb", "0"), "in chunks"),
        (("--output", "file"), "'file'"),
        (("--port", "{taken}"), "port {taken} cannot be listened on: Address already in use"),
    ],
)
def test_what_cannot_be_is_refused_with_a_sentence_before_the_container_starts(tmp_path, arguments, said):
    (tmp_path / "file").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [VTON, "local", *(argument.replace("{taken}", port) for argument in arguments)],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert done.returncode == 78
    assert said.replace("{taken}", port) in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "vton_output" / "local" / "serve.log").exists()


@pytest.mark.parametrize(
    ("arguments", "name", "url"),
    [
        (("--port", "0"), "AWS_ENDPOINT_URL", "127.0.0.1:18090"),
        (("--port", "0"), "AWS_ENDPOINT_URL_SQS", "http://[::1"),
        (("transform", "--input", "s3://a/in", "--output", "out"), "AWS_ENDPOINT_URL_S3", "garbage"),
    ],
)
def test_an_endpoint_url_that_is_none_is_refused_with_a_sentence(tmp_path, arguments, name, url):
    done = subprocess.run(
        [VTON, "local", *arguments],
        cwd=tmp_path,
        env=environment(**{name: url, "AWS_DEFAULT_REGION": "eu-central-1"}),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 78, done.stderr
    assert f"{name} is not a URL" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_setting_that_refuses_the_start_ends_it_and_names_the_log(tmp_path):
    done = subprocess.run(
        [VTON, "local", "--port", "0"],
        cwd=tmp_path,
        env=environment(VTON_DEVICE="abacus"),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 78
    assert "serve.log" in done.stderr
    assert "VTON_DEVICE" in (tmp_path / "vton_output" / "local" / "serve.log").read_text()


SLEEPER = """
import signal, sys, time

def ended(*_):
    print("ended in order", flush=True)
    sys.exit()

signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in sys.argv else ended)
print("begun", flush=True)
time.sleep(300)
"""


@contextmanager
def starting(folder, *arguments, sleeper="", **how):
    """A `vton local` whose container has begun and is never ready, and all the processes that it started."""
    (folder / "sleeper.py").write_text(SLEEPER)
    command = [VTON, "local", *arguments, "--command", f"{sys.executable} {folder / 'sleeper.py'} {sleeper}"]
    with (folder / "out").open("w") as out:
        how = {"stdout": out, "stderr": out, **how}
        process = subprocess.Popen(command, cwd=folder, env=environment(), **how)
    children = []
    try:
        wait_until(lambda: "begun" in log_of(folder))
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        yield process, children
    finally:
        for each in (process, *children):
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                each.kill()
        process.wait(10)


def log_of(folder):
    log = folder / "vton_output" / "local" / "serve.log"
    return log.read_text() if log.exists() else ""


def wait_until(condition, limit_s=60):
    ends = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.05)


TRANSFORM = ("transform", "--input", "sleeper.py", "--output", "out-folder")


@pytest.mark.parametrize(("arguments", "status"), [(("--port", "0"), 0), (TRANSFORM, 75)])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_while_the_container_starts_ends_all_of_it_in_order(tmp_path, arguments, status, times):
    """Twice the same signal, as `timeout` sends it, is one."""
    with starting(tmp_path, *arguments) as (process, children):
        for _ in range(times):
            process.send_signal(signal.SIGTERM)
        assert process.wait(40) == status
        assert psutil.wait_procs(children, timeout=30)[1] == []
    assert "ended in order" in log_of(tmp_path)
    assert "Traceback" not in (tmp_path / "out").read_text()


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_all_of_it_at_once(tmp_path, second):
    with starting(tmp_path, "--port", "0", sleeper="stubborn") as (process, children):
        process.send_signal(signal.SIGINT)
        wait_until(lambda: "a second signal" in (tmp_path / "out").read_text())
        time.sleep(SAME_SIGNAL_S)
        began = time.monotonic()
        process.send_signal(second)
        assert process.wait(40) == 128 + second
        assert psutil.wait_procs(children, timeout=30)[1] == []
        assert time.monotonic() - began < ContainerLimits().stop_s / 2


def test_the_end_of_the_terminal_ends_all_of_it_in_order(tmp_path):
    ours, theirs = os.openpty()

    def take_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests run below, `nohup` for one
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    terminal = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "start_new_session": True}
    with starting(tmp_path, "--port", "0", preexec_fn=take_terminal, **terminal) as (process, children):
        os.close(theirs)
        os.close(ours)
        assert process.wait(40) == 0
        assert psutil.wait_procs(children, timeout=30)[1] == []
    assert "ended in order" in log_of(tmp_path)


def test_a_hang_up_is_ignored_where_it_was_before(tmp_path):
    def ignore():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    with starting(tmp_path, "--port", "0", preexec_fn=ignore) as (process, _):
        process.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0


def test_an_s3_that_is_silent_is_named_before_it_is_waited_for(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        named = {"AWS_ENDPOINT_URL_S3": url, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x"}
        process = subprocess.Popen(
            [VTON, "local", "--port", "0"],
            cwd=tmp_path,
            env=environment(**named, AWS_DEFAULT_REGION="eu-central-1"),
            stdout=subprocess.PIPE,
            text=True,
        )
        with process.stdout as printed:
            assert url in printed.readline()
            process.send_signal(signal.SIGTERM)
            assert process.wait(40) == 0


def test_help_says_what_there_is(tmp_path):
    done = subprocess.run([VTON, "local", "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0
    for named in ("--mode", "--images", "--concurrency", "transform"):
        assert named in done.stdout
