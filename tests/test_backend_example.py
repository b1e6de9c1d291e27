"""The example of a backend, before the runtime and the real serving process, whose engine only waits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import requests
from botocore.exceptions import ClientError
from prometheus_client.parser import text_string_to_metric_families
from stand_in import usual_files, usual_request

from bench.waiting_service import NAME, PICTURE_S
from deploy.async_job import AsyncConfig
from deploy.demo import BUCKET, FAKE_KEYS, REPOSITORY, container_environment, http_server, image_host, local_cloud
from deploy.local_async import AsyncEndpoint
from deploy.local_container import ContainerLimits, Launch, running
from deploy.local_runtime import RuntimeLimits, create_runtime
from examples import backend

SECONDS = 0.8  # that a picture takes
PLACES = 2
LIMIT_S = 0.4  # stands for the platform's 60 s, as SECONDS stands for 61
PATIENCE_S = 60.0


class Stage:
    def __init__(self, stack, folder):
        self.cloud = stack.enter_context(local_cloud())
        self.images = stack.enter_context(image_host(usual_files()))
        environ = {
            **container_environment(self.cloud, self.images),
            "VTON_ENGINE": NAME,
            "VTON_MASKER": "off",
            "VTON_MAX_IN_FLIGHT": str(PLACES),
            PICTURE_S: str(SECONDS),
        }
        launch = Launch(folder / "serve.log", environ, (sys.executable, "-m", "bench.waiting_service"))
        watched = ContainerLimits(start_s=120, ping_every_s=5, ping_timeout_s=5, stop_s=10)
        self.container = stack.enter_context(running(launch, watched))
        self.s3, self.sqs = self.cloud.client("s3"), self.cloud.client("sqs")

        def where():
            return self.container.url

        self.url = stack.enter_context(http_server(create_runtime(where, name="vton")))
        strict = create_runtime(where, name="vton", limits=RuntimeLimits(model_s=LIMIT_S))
        self.strict_url = stack.enter_context(http_server(strict))
        self.queue_url, config = self._outcomes()
        endpoint = AsyncEndpoint(config, self.s3, self.cloud.client("sns"))
        self.async_url = stack.enter_context(http_server(create_runtime(where, name="vton", asynchronous=endpoint)))
        short = AsyncConfig(**{**config.__dict__, "ttl_s": 0.2})
        expiring = AsyncEndpoint(short, self.s3, self.cloud.client("sns"))
        self.expiring_url = stack.enter_context(http_server(create_runtime(where, asynchronous=expiring)))

    def _outcomes(self):
        sns = self.cloud.client("sns")
        queue_url = self.sqs.create_queue(QueueName="backend-outcomes")["QueueUrl"]
        arn = self.sqs.get_queue_attributes(QueueUrl=queue_url, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
        success, error = (sns.create_topic(Name=name)["TopicArn"] for name in ("backend-success", "backend-error"))
        sns.subscribe(TopicArn=success, Protocol="sqs", Endpoint=arn, Attributes={"RawMessageDelivery": "true"})
        sns.subscribe(TopicArn=error, Protocol="sqs", Endpoint=arn)  # in the envelope of SNS
        return queue_url, AsyncConfig(f"s3://{BUCKET}/async-out", f"s3://{BUCKET}/async-fail", success, error)

    def request(self, timestamp, **changes):
        urls = {
            name: f"http://{self.images}/{name.split('_')[0]}.png"
            for name in ("person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url")
        }
        return usual_request(timestamp=timestamp, **{**urls, **changes})

    def runtime(self, url=None, **options):
        return backend.runtime_client(endpoint_url=url or self.url, **options)

    def samples(self):
        text = requests.get(f"{self.container.url}/metrics", timeout=30).text
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def counted(self, name, **labels):
        found = [each for each in self.samples() if each.name == name and labels.items() <= each.labels.items()]
        return int(sum(each.value for each in found))

    def generations(self):
        return self.counted("vton_generations_total")

    def requests(self, code):
        return self.counted("vton_requests_total", code=code)

    def until_full(self):
        self.until(lambda: self.counted("vton_in_flight") == PLACES)

    def until(self, condition):
        ends = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < ends
            time.sleep(0.05)

    def is_stored(self, timestamp):
        try:
            self.s3.head_object(Bucket=BUCKET, Key=f"users/7/vton_result/{timestamp}/result.png")
        except ClientError:
            return False
        return True


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in FAKE_KEYS.items():
            patch.setenv(name, value)
        yield Stage(stack, tmp_path_factory.mktemp("backend"))


def test_one_call_is_one_picture(stage):
    before = stage.generations()
    answer = backend.try_on(stage.runtime(), "vton", stage.request("one"))
    assert answer["object_key"] == "users/7/vton_result/one/result.png"
    assert stage.is_stored("one")
    assert stage.generations() == before + 1


@pytest.mark.parametrize("ends_it", ["the platform", "the client"])
def test_a_picture_that_takes_too_long_is_made_once_and_found_by_the_same_request(stage, ends_it):
    before = stage.generations()
    timestamp = f"late-{ends_it.split()[1]}"
    # 70 s of patience to 60 s of the platform's; or a client that hangs up first
    late = stage.runtime(stage.strict_url) if ends_it == "the platform" else stage.runtime(read_timeout_s=LIMIT_S)
    with pytest.raises(backend.TryOnFailed) as raised:
        backend.try_on(late, "vton", stage.request(timestamp))
    assert (raised.value.code, raised.value.retryable) == (backend.UNKNOWN, False)
    stage.until(lambda: stage.is_stored(timestamp))
    answer = backend.try_on(stage.runtime(), "vton", stage.request(timestamp))
    assert answer["object_key"].startswith(f"users/7/vton_result/{timestamp}/")
    assert stage.generations() == before + 1


def test_the_default_client_would_pay_again_for_what_this_one_asks_once(stage):
    calls = []
    runtime = stage.runtime(read_timeout_s=LIMIT_S)
    runtime.meta.events.register("before-send.sagemaker-runtime.*", lambda **_: calls.append(1))
    with pytest.raises(backend.TryOnFailed):
        backend.try_on(runtime, "vton", stage.request("once"))
    assert len(calls) == 1
    stage.until(lambda: stage.is_stored("once"))


def test_without_a_region_the_command_ends_with_a_sentence():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environ.update(AWS_CONFIG_FILE=os.devnull, AWS_EC2_METADATA_DISABLED="true")
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(REPOSITORY / "examples" / "backend.py"), "one", "--person", "https://a/b"],
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 1
    assert "region" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_what_is_refused_for_the_moment_is_asked_again_until_there_is_a_place(stage):
    refused = stage.requests("overloaded")
    with ThreadPoolExecutor(PLACES) as pool:
        busy = [
            pool.submit(backend.try_on, stage.runtime(), "vton", stage.request(f"busy-{number}"))
            for number in range(PLACES)
        ]
        stage.until_full()
        answer = backend.try_on(stage.runtime(), "vton", stage.request("patient"))
        assert answer["object_key"].endswith("patient/result.png")
        assert all(each.result()["object_key"] for each in busy)
    assert stage.requests("overloaded") > refused


def test_a_refusal_says_how_long_to_wait(stage):
    with ThreadPoolExecutor(PLACES) as pool:
        for number in range(PLACES):
            pool.submit(backend.try_on, stage.runtime(), "vton", stage.request(f"full-{number}"))
        stage.until_full()
        with pytest.raises(backend.TryOnFailed) as raised:
            backend.try_on(stage.runtime(), "vton", stage.request("hasty"), retry_for_s=0)
    assert (raised.value.code, raised.value.retryable) == ("overloaded", True)
    assert raised.value.retry_after_s >= 1


def test_what_a_repeat_would_not_mend_is_asked_once(stage):
    refused = stage.requests("image_not_found")
    with pytest.raises(backend.TryOnFailed) as raised:
        backend.try_on(
            stage.runtime(), "vton", stage.request("gone", person_image_url=f"http://{stage.images}/gone.png")
        )
    assert (raised.value.code, raised.value.retryable) == ("image_not_found", False)
    assert stage.requests("image_not_found") == refused + 1


def test_a_request_that_is_refused_says_for_which_field(stage):
    with pytest.raises(backend.TryOnFailed, match="field: seed") as raised:
        backend.try_on(stage.runtime(), "vton", stage.request("wrong", seed="7"))
    assert (raised.value.code, raised.value.field) == ("invalid_request", "seed")


def test_an_endpoint_that_is_not_there_is_no_reason_to_ask_again(stage):
    with pytest.raises(backend.TryOnFailed) as raised:
        backend.try_on(stage.runtime(), "other", stage.request("other"))
    assert (raised.value.code, raised.value.retryable) == ("ValidationError", False)


def test_many_at_once_keep_to_the_places_of_the_endpoint(stage):
    refused, before = stage.requests("overloaded"), stage.generations()
    asked = [stage.request(f"many-{number}") for number in range(4)]
    asked.append(stage.request("many-bad", person_image_url=f"http://{stage.images}/gone.png"))
    made = backend.try_on_many(stage.runtime(places=PLACES), "vton", asked, places=PLACES)
    outcomes = {request["timestamp"]: outcome for request, outcome in made}
    failed = outcomes.pop("many-bad")
    assert isinstance(failed, backend.TryOnFailed)
    assert failed.code == "image_not_found"
    assert all(answer["object_key"].endswith(f"{name}/result.png") for name, answer in outcomes.items())
    assert stage.generations() == before + 4
    assert stage.requests("overloaded") == refused


def submit(stage, timestamp, url=None, **changes):
    runtime = stage.runtime(url or stage.async_url)
    return backend.submit(runtime, stage.s3, "vton", stage.request(timestamp, **changes), bucket=BUCKET)


def test_an_asynchronous_picture_is_polled_for(stage):
    answer = backend.wait_by_polling(stage.s3, submit(stage, "polled"), limit_s=PATIENCE_S, poll_s=0.1)
    assert answer["object_key"].endswith("polled/result.png")


def test_an_asynchronous_failure_is_polled_for(stage):
    bad = submit(stage, "polled-bad", person_image_url=f"http://{stage.images}/gone.png")
    with pytest.raises(backend.TryOnFailed) as raised:
        backend.wait_by_polling(stage.s3, bad, limit_s=PATIENCE_S, poll_s=0.1)
    assert (raised.value.code, raised.value.retryable) == ("image_not_found", False)


def test_messages_tell_of_what_is_made_and_of_what_failed(stage):
    good = submit(stage, "told")
    bad = submit(stage, "told-bad", person_image_url=f"http://{stage.images}/gone.png")
    outcomes = dict(backend.wait_by_message(stage.sqs, stage.s3, stage.queue_url, [good, bad], limit_s=PATIENCE_S))
    assert outcomes[good]["object_key"].endswith("told/result.png")
    assert outcomes[bad].code == "image_not_found"


def message_about(stage, submitted):
    ((_, outcome),) = backend.wait_by_message(stage.sqs, stage.s3, stage.queue_url, [submitted], limit_s=PATIENCE_S)
    return outcome


def test_a_job_that_expires_is_told_of_and_makes_no_picture(stage):
    before = stage.generations()
    ahead = submit_without_ttl(stage, "ahead")
    late = submit_without_ttl(stage, "expired")
    outcome = message_about(stage, late)
    assert isinstance(outcome, backend.TryOnFailed)
    assert "RequestTTLSeconds" in str(outcome)
    assert message_about(stage, ahead)["object_key"].endswith("ahead/result.png")
    assert not stage.is_stored("expired")
    assert stage.generations() == before + 1


def submit_without_ttl(stage, timestamp):
    """The shortest RequestTTLSeconds that a call can name is 60 s; the endpoint's own is shorter here."""
    key = f"asynchronous/inputs/{timestamp}.json"
    stage.s3.put_object(Bucket=BUCKET, Key=key, Body=json.dumps(stage.request(timestamp)))
    accepted = stage.runtime(stage.expiring_url).invoke_endpoint_async(
        EndpointName="vton", ContentType="application/json", InputLocation=f"s3://{BUCKET}/{key}"
    )
    return backend.Submitted(accepted["InferenceId"], accepted["OutputLocation"], accepted["FailureLocation"])


def test_a_container_that_is_killed_in_the_middle_is_replaced_and_the_next_jobs_are_made(stage):
    pid, starts = stage.container.pid, stage.container.starts
    job = submit(stage, "killed-job")
    waiting = submit(stage, "after-the-kill")
    outcome = []

    def ask():
        try:
            backend.try_on(stage.runtime(), "vton", stage.request("killed"))
        except backend.TryOnFailed as failed:
            outcome.append(failed)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(SECONDS / 2)
    os.kill(pid, signal.SIGKILL)
    asking.join(PATIENCE_S)
    assert outcome[0].code == backend.UNKNOWN
    told = dict(backend.wait_by_message(stage.sqs, stage.s3, stage.queue_url, [job, waiting], limit_s=PATIENCE_S))
    assert isinstance(told[job], backend.TryOnFailed)
    assert told[waiting]["object_key"].endswith("after-the-kill/result.png")
    assert (stage.container.starts, stage.container.pid != pid) == (starts + 1, True)
    answer = backend.try_on(stage.runtime(), "vton", stage.request("killed"))
    assert answer["object_key"].endswith("killed/result.png")
    assert backend.try_on(stage.runtime(), "vton", stage.request("killed-job"))["object_key"]


def script(stage, *arguments, url=None, **options):
    environ = {
        **os.environ,
        "AWS_ENDPOINT_URL_SAGEMAKER_RUNTIME": url or stage.url,
        "AWS_ENDPOINT_URL_S3": stage.cloud.url,
        "AWS_ENDPOINT_URL_SQS": stage.cloud.url,
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "backend.py"), *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def urls(stage):
    for role in ("person", "upper", "lower", "mask"):
        yield from (f"--{role}", f"http://{stage.images}/{role}.png")


def test_the_script_makes_one_picture(stage):
    done = script(stage, "one", *urls(stage), "--timestamp", "script-1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["object_key"] == "users/7/vton_result/script-1/result.jpg"
    assert "script-1" in done.stderr


def test_the_script_makes_an_asynchronous_picture(stage):
    done = script(stage, "async", "--bucket", BUCKET, "--queue-url", stage.queue_url, *urls(stage), url=stage.async_url)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["object_key"].startswith("users/7/vton_result/")


@pytest.mark.parametrize(("bucket", "code"), [(BUCKET, "ValidationError"), ("no-such-bucket", "NoSuchBucket")])
def test_an_asynchronous_call_that_is_not_taken_has_a_code(stage, bucket, code):
    with pytest.raises(backend.TryOnFailed) as raised:
        backend.submit(stage.runtime(), stage.s3, "vton", stage.request("real-time"), bucket=bucket)
    assert (raised.value.code, raised.value.retryable) == (code, False)


@pytest.mark.parametrize(("bucket", "code"), [(BUCKET, "ValidationError"), ("no-such-bucket", "NoSuchBucket")])
def test_the_script_ends_with_1_and_a_sentence_where_an_asynchronous_call_is_not_taken(stage, bucket, code):
    done = script(stage, "async", "--bucket", bucket, *urls(stage))
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == code
    assert "Traceback" not in done.stderr


def test_the_script_ends_with_1_and_a_sentence_where_one_picture_is_refused(stage):
    done = script(stage, "one", "--endpoint-name", "other", *urls(stage))
    assert done.returncode == 1
    assert json.loads(done.stdout)["error"]["code"] == "ValidationError"
    assert "Traceback" not in done.stderr


def test_the_script_gives_every_line_its_outcome_bad_ones_too(stage, tmp_path):
    gone = stage.request("file-gone", person_image_url=f"http://{stage.images}/gone.png")
    good = json.dumps(stage.request("file-good")).encode()
    lines = [b"{", json.dumps(gone).encode(), b"[]", b"", b"\xff", b"[" * 100_000, good]
    (tmp_path / "many.jsonl").write_bytes(b"\n".join(lines))
    done = script(stage, "many", "--places", "2", str(tmp_path / "many.jsonl"))
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    unread = [each["line"] for each in told if each.get("error", {}).get("code") == "invalid_json"]
    refused = [each["timestamp"] for each in told if each.get("error", {}).get("code") == "image_not_found"]
    made = [each["object_key"] for each in told if "error" not in each]
    assert (unread, refused) == ([1, 3, 5, 6], ["file-gone"])
    assert made == ["users/7/vton_result/file-good/result.png"]


def test_the_script_makes_many_and_ends_with_1_where_one_is_missing(stage, tmp_path):
    asked = [stage.request("file-1"), stage.request("file-2", person_image_url=f"http://{stage.images}/gone.png")]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    done = script(stage, "many", "--places", "2", str(tmp_path / "many.jsonl"))
    assert done.returncode == 1, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert sorted(str(each.get("error", {}).get("code")) for each in told) == ["None", "image_not_found"]
