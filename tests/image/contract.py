"""What an image promises, tried on the image itself: `make image-test` builds it first and tells where it is.

The tests of the repository run elsewhere and with other packages than the image; these run nothing but the image.
"""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from engine import Image, running
from stand_in import png, usual_files, usual_request

from deploy.demo import BUCKET, container_environment, free_port, image_host, local_cloud
from model.embedded import demo_pictures

START_LIMIT_S = 290.0  # below the time limit of a test; SageMaker waits 8 minutes
STOP_LIMIT_S = 30.0  # SageMaker's, from SIGTERM to SIGKILL
ANSWER_LIMIT_S = 120.0
OTHER_USER = 12345
WEIGHTS = Path(os.environ["IMAGE_TEST_WEIGHTS"])


@pytest.fixture(scope="session")
def sagemaker() -> Image:
    return Image.named("localhost/sagemaker")


@pytest.fixture(scope="session")
def baked() -> Image:
    """Built without training, and with WEIGHTS."""
    return Image.named("localhost/baked")


@pytest.fixture(scope="session")
def compiled() -> Image:
    """With a compiler, and nothing compiled yet."""
    return Image.named("localhost/compiled")


@pytest.fixture(scope="session")
def worker() -> Image:
    """RunPod's, with WEIGHTS."""
    return Image.named("localhost/runpod")


@dataclass(frozen=True)
class World:
    """S3, SQS and a web server with pictures, and what a container must be told of them."""

    cloud: object
    images: str
    environ: dict


@pytest.fixture(scope="session")
def world():
    pictures = {f"{name}.png": png(picture) for name, picture in demo_pictures().items()}
    with local_cloud() as cloud, image_host({**usual_files(), **pictures}) as images:
        yield World(cloud, images, {**container_environment(cloud, images), "VTON_STEPS": "2"})


@contextmanager
def serving(image, environ, tmp_path, **how):
    """The container and its URL; it was 503 until it was 200."""
    port = free_port()
    environ = {**environ, "SAGEMAKER_BIND_TO_PORT": str(port)}
    with running(image, ["serve"], environ, tmp_path / "container.log", **how) as container:
        wait_until_ready(container, f"http://127.0.0.1:{port}")
        yield container, f"http://127.0.0.1:{port}"


def wait_until_ready(container, url):
    ends, statuses = time.monotonic() + START_LIMIT_S, []
    while time.monotonic() < ends and container.process.poll() is None:
        try:
            statuses.append(requests.get(f"{url}/ping", timeout=2).status_code)
        except requests.exceptions.RequestException:
            time.sleep(0.05)
            continue
        if statuses[-1] == 200:
            assert set(statuses[:-1]) == {503}
            return
        time.sleep(0.05)
    raise AssertionError(f"not ready: {container.log.read_text()[-2000:]}")


def dress(world, url, **changes):
    """The answer to a try-on of the drawn figure."""
    fields = {"person_image_url": "person", "upper_cloth_url": "upper", "lower_cloth_url": "lower"}
    urls = {field: f"http://{world.images}/{name}.png" for field, name in {**fields, "mask_image_url": "mask"}.items()}
    request = usual_request(**{**urls, **changes})
    return requests.post(f"{url}/invocations", json=request, timeout=ANSWER_LIMIT_S)


def ended(image, arguments, environ, tmp_path, **how):
    """The exit status of a container that should end by itself, and what it said."""
    with running(image, arguments, environ, tmp_path / "container.log", **how) as container:
        return container.wait(START_LIMIT_S), container.log.read_text()


def stored(world, key):
    return world.cloud.client("s3").get_object(Bucket=BUCKET, Key=key)["Body"].read()


def jobs_told_of(world):
    found = world.cloud.client("sqs").receive_message(
        QueueUrl=world.cloud.queue_url, MaxNumberOfMessages=10, WaitTimeSeconds=2
    )
    return [json.loads(message["Body"])["job_id"] for message in found["Messages"]]


EMBEDDED = {"VTON_WEIGHTS": "embedded"}
COMPILES = """
import torch
from torch._dynamo.utils import counters

torch.compile(lambda numbers: numbers.sin() + 1)(torch.ones(64))
print(counters["inductor"]["fxgraph_cache_hit"])
"""


@pytest.mark.parametrize("user", [0, OTHER_USER])
def test_it_serves_from_a_read_only_root_as_root_and_as_anybody_and_ends_with_0(sagemaker, world, tmp_path, user):
    with serving(sagemaker, {**world.environ, **EMBEDDED}, tmp_path, user=user) as (container, url):
        answer = dress(world, url, timestamp=f"image-{user}", output_format="png")
        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["engine"] == "catvton/embedded"
        assert stored(world, told["object_key"]).startswith(b"\x89PNG")
        assert told["job_id"] in jobs_told_of(world)
        masked = dress(world, url, timestamp=f"image-auto-{user}", mask_image_url=None)
        assert masked.json().get("mask_source") == "auto", masked.text
        for body, status in ((b"{", 400), (b"{}", 422), (b" " * 70_000, 413)):
            headers = {"Content-Type": "application/json"}
            refused = requests.post(f"{url}/invocations", data=body, headers=headers, timeout=10)
            assert refused.status_code == status
        assert dress(world, url, person_image_url="http://169.254.169.254/x").status_code == 422
        assert "vton_" in requests.get(f"{url}/metrics", timeout=5).text
        assert requests.get(f"{url}/execution-parameters", timeout=5).json()["BatchStrategy"] == "SINGLE_RECORD"
        assert b"/opt/app/container/serve" in Path(f"/proc/{container.first_process()}/cmdline").read_bytes()
        container.stop()
        assert container.wait(STOP_LIMIT_S) == 0
    events = [json.loads(line)["event"] for line in container.log.read_text().splitlines() if line.startswith("{")]
    assert "models_loaded" in events
    assert events[-1] == "stopped"
    if user == 0:
        assert "decoder_is_root" not in events


def test_weights_in_opt_ml_model_are_served_and_nothing_else_is_taken_for_them(sagemaker, world, tmp_path):
    with serving(sagemaker, world.environ, tmp_path, mounts={"/opt/ml/model": WEIGHTS}) as (container, url):
        answer = dress(world, url, timestamp="image-weights", num_inference_steps=1)
        assert answer.json().get("engine") == "catvton/mix", answer.text
        container.stop()
        assert container.wait(STOP_LIMIT_S) == 0
    assert "weights_verified" in container.log.read_text()


def test_without_weights_in_opt_ml_model_it_ends_with_a_sentence(sagemaker, world, tmp_path):
    (tmp_path / "empty").mkdir()
    environ = {**world.environ, "VTON_PORT": str(free_port())}
    for mounts in ({}, {"/opt/ml/model": tmp_path / "empty"}):
        status, said = ended(sagemaker, ["serve"], environ, tmp_path, mounts=mounts)
        assert status == 1
        assert "/opt/ml/model" in said
        assert "is missing" in said
        assert "Traceback" not in said


def test_the_baked_image_serves_its_own_weights(baked, world, tmp_path):
    with serving(baked, world.environ, tmp_path, user=OTHER_USER) as (container, url):
        answer = dress(world, url, timestamp="image-baked", num_inference_steps=1)
        assert answer.json().get("engine") == "catvton/mix", answer.text
        container.stop()
        assert container.wait(STOP_LIMIT_S) == 0
    assert "weights_verified" in container.log.read_text()


def test_the_worker_image_does_a_job_with_its_own_weights(worker, world, tmp_path):
    pictures = {"person_image": "person", "cloth_image": "upper", "mask_image": "mask"}
    asked = {field: f"http://{world.images}/{name}.png" for field, name in pictures.items()}
    asked.update(output="s3", userId="7", timestamp="image-runpod", num_inference_steps=1)
    job = ["runpod", "--test_input", json.dumps({"input": asked})]
    status, said = ended(worker, job, world.environ, tmp_path, user=OTHER_USER)
    assert status == 0, said
    assert stored(world, "users/7/vton_result/image-runpod/result.jpg").startswith(b"\xff\xd8")
    status, said = ended(worker, ["runpod", "--test_input", '{"input": {}}'], world.environ, tmp_path)
    assert (status, "invalid_request" in said, "Traceback" in said) == (1, True, False), said
    assert worker.config["Cmd"] == ["runpod"]


def test_sigterm_ends_it_while_it_starts(sagemaker, world, tmp_path):
    environ = {**world.environ, **EMBEDDED, "VTON_PORT": str(free_port())}
    with running(sagemaker, [], environ, tmp_path / "container.log") as container:  # the image's CMD: serve
        ends = time.monotonic() + START_LIMIT_S
        while '"starting"' not in container.log.read_text() and time.monotonic() < ends:
            time.sleep(0.05)
        container.stop()
        assert container.wait(STOP_LIMIT_S) == 0


def test_a_wrong_setting_is_a_sentence_and_2(sagemaker, tmp_path):
    status, said = ended(sagemaker, ["serve"], {"VTON_STEP": "1", "VTON_BUCKET": BUCKET}, tmp_path)
    assert (status, said) == (2, "start refused: unknown setting VTON_STEP\n")


@pytest.mark.parametrize("arguments", [["bash"], ["serve", "--port=1"], [""], ["../../bin/sh"], ["-c", "id"]])
def test_any_other_argument_is_refused_with_a_sentence_and_64(sagemaker, tmp_path, arguments):
    status, said = ended(sagemaker, arguments, {}, tmp_path)
    assert status == 64
    assert "serve or train" in said
    assert len(said.splitlines()) == 1


def test_train_runs_the_training_job(sagemaker, tmp_path):
    base = tmp_path / "ml"
    (base / "input" / "config").mkdir(parents=True)
    (base / "input" / "config" / "hyperparameters.json").write_text('{"stpes": "1"}')
    environ = {"SAGEMAKER_BASE_DIR": "/tmp/ml"}
    status, said = ended(sagemaker, ["train"], environ, tmp_path)
    assert status == 1
    assert "there is no channel model" in said
    status, said = ended(sagemaker, ["train"], {}, tmp_path, writable=True, mounts={"/opt/ml/input": base / "input"})
    assert status == 1
    assert "stpes" in said
    assert "stpes" in (sagemaker.root / "opt/ml/output/failure").read_text()


def test_train_is_refused_with_a_sentence_by_an_image_without_it(baked, tmp_path):
    status, said = ended(baked, ["train"], {}, tmp_path)
    assert status == 64
    assert "built without training" in said


def test_the_health_check_of_the_image_follows_ping(sagemaker, world, tmp_path):
    check = sagemaker.config["Healthcheck"]["Test"]
    assert check[0] == "CMD"
    probe = Image({**sagemaker.config, "Entrypoint": check[1:]}, sagemaker.root)
    nobody = {"VTON_PORT": str(free_port())}
    assert ended(probe, [""], nobody, tmp_path)[0] != 0
    with serving(sagemaker, {**world.environ, **EMBEDDED}, tmp_path) as (_, url):
        told = {"SAGEMAKER_BIND_TO_PORT": url.rpartition(":")[2]}
        with running(probe, [""], told, tmp_path / "probe.log") as container:
            assert container.wait(START_LIMIT_S) == 0


def test_the_image_says_what_sagemaker_asks_of_it(sagemaker, baked):
    for image in (sagemaker, baked):
        assert image.config["Labels"]["com.amazonaws.sagemaker.capabilities.accept-bind-to-port"] == "true"
        assert image.config["Entrypoint"] == ["/opt/app/container/entrypoint"]
        assert image.config["Cmd"] == ["serve"]
        assert "8080/tcp" in image.config["ExposedPorts"]
        assert not image.config.get("User")
    assert sagemaker.environment()["VTON_WEIGHTS"] == "/opt/ml/model"


def test_no_build_tools_no_caches_and_nothing_but_the_service_are_in_the_image(sagemaker, baked):
    assert sorted(path.name for path in (sagemaker.root / "opt/app").iterdir()) == [
        "LICENSE",
        "NOTICE",
        "container",
        "model",
    ]
    for image in (sagemaker, baked):
        tools = ("uv", "pip", "gcc", "cc", "make", "git", "curl")
        folders = [image.root / "usr/local/bin", image.root / "usr/bin", image.root / "opt/venv/bin"]
        assert not [folder / tool for tool in tools for folder in folders if (folder / tool).exists()]
        for folder in ("cache", "tmp", "root/.cache"):
            assert not list((image.root / folder).glob("*"))


def test_what_is_compiled_is_kept_where_the_image_for_it_says_and_found_again(compiled, tmp_path):
    probe = Image({**compiled.config, "Entrypoint": ["python", "-c", COMPILES]}, compiled.root)
    found = [ended(probe, [""], {}, tmp_path, writable=True) for _ in range(2)]
    assert [(status, said.split()[-1]) for status, said in found] == [(0, "0"), (0, "1")], "\n".join(found[0][1:])
    assert list((compiled.root / "opt/compilations/inductor").iterdir())
    assert compiled.environment()["VTON_COMPILE"] == "inductor"


def test_everything_is_readable_by_anybody_and_nothing_writable(baked):
    for path in [*(baked.root / "opt/app").rglob("*"), *(baked.root / "opt/weights").rglob("*")]:
        mode = path.lstat().st_mode
        assert mode & 0o004, path
        assert not mode & 0o022, path
