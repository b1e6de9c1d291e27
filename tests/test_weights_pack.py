"""Weights on their way to SageMaker: packed, pushed to S3 over HTTP, fetched as SageMaker fetches them."""

from __future__ import annotations

import hashlib
import json
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests
import torch
from catvton_recipe import write_published_layout
from click.testing import CliRunner
from faulty_aws import faulty_aws
from safetensors.torch import load_file, save_file

from container.weights_cli import EXIT_OUTPUT, EXIT_RETRY, EXIT_SETTINGS, EXIT_USAGE, weights_group
from container.weights_push import Destination, PushFailed, PushRefused, push
from container.wiring import s3_client
from deploy.demo import BUCKET, FAKE_KEYS, local_cloud, serving
from model import weights
from model.artifact import MASKER_PART, Artifact, merge
from model.maskers.published import PUBLISHED, twin_of
from model.weights import RECORD, WeightsError

ATTENTION = "CatVTON/mix-48k-1024/attention/model.safetensors"
UNET = "stable-diffusion-inpainting/unet/diffusion_pytorch_model.safetensors"
FILES = [
    ATTENTION,
    "sd-vae-ft-mse/config.json",
    "sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
    "stable-diffusion-inpainting/scheduler/scheduler_config.json",
    "stable-diffusion-inpainting/unet/config.json",
    UNET,
]
URI = f"s3://{BUCKET}/weights/v1/"
PREFIX = "weights/v1/"


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """The tiny model in the published layout, and what is no part of it; not to be changed."""
    folder = write_published_layout(tmp_path_factory.mktemp("published"), "quick")
    (folder / "notes.txt").write_text("mine")
    (folder / "CatVTON" / ".cache").mkdir()
    (folder / "CatVTON" / ".cache" / "lock").write_text("")
    return folder


@pytest.fixture
def source(published, tmp_path) -> Path:
    """Links to all of it, with no record; a file may be replaced."""
    for path in published.rglob("*"):
        if path.is_file() and path.name != RECORD:
            link = tmp_path / "weights" / path.relative_to(published)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return tmp_path / "weights"


def run(*arguments: object) -> tuple[int, str]:
    """The exit status and all that was said."""
    done = CliRunner().invoke(weights_group, [str(each) for each in arguments], catch_exceptions=False)
    return done.exit_code, done.output


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)


def without_a_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    path.unlink()
    save_file(tensors, path)


# Pack


def test_a_packed_folder_holds_what_is_read_and_its_record_and_nothing_else(source, tmp_path):
    status, said = run("pack", "--dir", source, "-o", tmp_path / "out" / "model")
    assert status == 0, said
    packed = tmp_path / "out" / "model"
    assert files_in(packed) == sorted([*FILES, RECORD])
    assert files_in(tmp_path / "out") == [f"model/{name}" for name in files_in(packed)]
    assert not any(path.is_symlink() for path in packed.rglob("*"))
    assert all((packed / name).read_bytes() == (source / name).read_bytes() for name in FILES)
    assert weights.verify(packed, "catvton", "mix").verified
    assert all(stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444 for path in [packed, *packed.rglob("*")])


def test_a_packed_file_is_unpacked_to_the_same_and_its_bytes_follow_from_the_weights_alone(source, tmp_path):
    first, second = tmp_path / "model.tar.gz", tmp_path / "again" / "model.tar.gz"
    assert run("pack", "--dir", source, "-o", first)[0] == 0
    assert run("pack", "--dir", source, "-o", second)[0] == 0
    assert first.read_bytes() == second.read_bytes()
    with tarfile.open(first) as tar:
        members = tar.getmembers()
        tar.extractall(tmp_path / "opt")  # noqa: S202 - it was packed here
    assert all(member.isreg() and (member.mtime, member.uid, member.gid) == (0, 0, 0) for member in members)
    assert [member.name for member in members] == [RECORD, *FILES]
    assert weights.verify(tmp_path / "opt", "catvton", "mix").verified
    assert run("pack", "--dir", tmp_path / "opt", "-o", tmp_path / "third.tar.gz")[0] == 0
    assert (tmp_path / "third.tar.gz").read_bytes() == first.read_bytes()


@pytest.mark.parametrize("output", ["model", "model.tar.gz"])
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda folder: (folder / UNET).unlink(), "is missing; get it with `vton weights download`"),
        (lambda folder: flip_last_byte(folder / UNET), "has changed or is damaged"),
        (lambda folder: without_a_tensor(folder / ATTENTION), "has changed or is damaged"),
    ],
)
def test_recorded_weights_that_are_not_intact_are_refused_and_nothing_is_left(
    source, tmp_path, output, spoil, sentence
):
    assert run("verify", "--dir", source)[0] == 0
    spoil(source)
    status, said = run("pack", "--dir", source, "-o", tmp_path / "out" / output)
    assert status == EXIT_SETTINGS
    assert sentence in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_do_not_fit_are_refused_without_a_record_too(source, tmp_path):
    without_a_tensor(source / ATTENTION)
    status, said = run("pack", "--dir", source, "-o", tmp_path / "model")
    assert status == EXIT_SETTINGS
    assert "does not fit" in said
    assert not (tmp_path / "model").exists()


def test_a_variant_that_is_not_there_is_refused(source, tmp_path):
    assert run("pack", "--dir", source, "-o", tmp_path / "out", "--variant", "vitonhd")[0] == EXIT_SETTINGS
    status, said = run("pack", "--dir", source, "-o", tmp_path / "out", "--variant", "paint")
    assert status == EXIT_SETTINGS
    assert "catvton/mix" in said


def test_what_is_there_is_not_overwritten(source, tmp_path):
    (tmp_path / "mine").mkdir()
    assert run("pack", "--dir", source, "-o", tmp_path / "mine") == (EXIT_OUTPUT, f"{tmp_path / 'mine'} exists\n")
    (tmp_path / "file").write_text("mine")
    assert run("pack", "--dir", source, "-o", tmp_path / "file" / "model")[0] == EXIT_OUTPUT
    assert (tmp_path / "file").read_text() == "mine"


# Push


@pytest.fixture(scope="module")
def cloud():
    with local_cloud() as cloud:
        yield cloud


@pytest.fixture
def s3(cloud, monkeypatch):
    """The bucket, empty; the command's own client finds it, too."""
    at(cloud.url, monkeypatch)
    client = cloud.client("s3")
    for found in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=found["Key"])
    return client


def at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**FAKE_KEYS, "AWS_ENDPOINT_URL_S3": url}.items():
        monkeypatch.setenv(name, value)


def keys(s3) -> list[str]:
    return [found["Key"] for found in s3.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def fetch_as_sagemaker(s3, folder: Path) -> Path:
    """What is under the prefix, below a folder by the rest of its key, which must not end in a slash."""
    for key in keys(s3):
        assert key.startswith(PREFIX)
        assert not key.endswith("/")
        path = folder / key[len(PREFIX) :]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(s3.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    return folder


@contextmanager
def between(url: str, refuse: str = "nothing at all") -> Iterator[tuple[str, list[str]]]:
    """A way to S3 on which uploads of keys that contain `refuse` end in 503; and the keys that were put, in order."""
    put: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            if self.headers.get("Expect"):
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command in ("PUT", "POST") and refuse in self.path:
                return self.reply(503, {}, b"")
            if self.command == "PUT":
                put.append(self.path.partition("?")[0].partition(PREFIX)[2])
            skipped = {"host", "connection", "expect"}
            headers = {name: value for name, value in self.headers.items() if name.lower() not in skipped}
            answer = requests.request(self.command, url + self.path, data=body, headers=headers, timeout=20)
            kept = {n: v for n, v in answer.headers.items() if n.lower() not in ("content-length", "connection")}
            length = answer.headers.get("Content-Length") if self.command == "HEAD" else None
            return self.reply(answer.status_code, kept, answer.content, length)

        def reply(self, status: int, headers: dict, body: bytes, length: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in {**headers, "Content-Length": length or str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

        def log_message(self, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", put
        finally:
            server.shutdown()
            thread.join(5)


def test_pushed_weights_are_served_after_sagemaker_fetched_them(s3, source, tmp_path):
    status, said = run("push", URI, "--dir", source)
    assert status == 0, said
    assert keys(s3) == [PREFIX + name for name in sorted([*FILES, RECORD])]
    fetched = fetch_as_sagemaker(s3, tmp_path / "opt")
    assert weights.verify(fetched, "catvton", "mix").verified
    small = {"VTON_WIDTH": "256", "VTON_HEIGHT": "256"}  # the picture with which it warms up
    environ = {"VTON_WEIGHTS": str(fetched), "VTON_OUTPUT_DIR": str(tmp_path), **small}
    with serving(environ, tmp_path / "serve.log") as url:
        assert requests.get(f"{url}/ping", timeout=5).status_code == 200


def test_a_push_that_broke_off_is_not_taken_for_whole_and_a_repeat_sends_the_rest(
    cloud, s3, source, tmp_path, monkeypatch
):
    with between(cloud.url, refuse=UNET) as (way, _):
        at(way, monkeypatch)
        status, said = run("push", URI, "--dir", source)
    assert status == EXIT_RETRY
    assert "repeat the push" in said
    assert len(said.splitlines()) == 1
    arrived = keys(s3)
    assert PREFIX + RECORD not in arrived
    with pytest.raises(WeightsError, match="is missing"):
        weights.verify(fetch_as_sagemaker(s3, tmp_path / "half"), "catvton", "mix")
    with between(cloud.url) as (way, put):
        at(way, monkeypatch)
        status, said = run("push", URI, "--dir", source)
    assert status == 0, said
    assert sorted(put) == sorted({*FILES, RECORD} - {key[len(PREFIX) :] for key in arrived})
    assert put[-1] == RECORD
    assert weights.verify(fetch_as_sagemaker(s3, tmp_path / "whole"), "catvton", "mix").verified


def test_a_repeat_sends_nothing_and_a_change_sends_what_changed_and_the_record_last(
    cloud, s3, source, tmp_path, monkeypatch
):
    assert run("push", URI, "--dir", source)[0] == 0
    with between(cloud.url) as (way, put):
        at(way, monkeypatch)
        assert run("push", URI, "--dir", source)[0] == 0
        assert put == []
        assert run("pack", "--dir", source, "-o", tmp_path / "packed")[0] == 0
        assert run("push", URI, "--dir", tmp_path / "packed")[0] == 0
        assert put == []
        flip_last_byte(source / ATTENTION)
        (source / RECORD).unlink()
        assert run("push", URI, "--dir", source)[0] == 0
        assert put == [ATTENTION, RECORD]
    assert weights.verify(fetch_as_sagemaker(s3, tmp_path / "opt"), "catvton", "mix").verified


def test_a_file_of_the_same_size_that_somebody_else_put_there_is_replaced(s3, source):
    s3.put_object(Bucket=BUCKET, Key=PREFIX + ATTENTION, Body=bytes((source / ATTENTION).stat().st_size))
    assert run("push", URI, "--dir", source)[0] == 0
    stored = s3.get_object(Bucket=BUCKET, Key=PREFIX + ATTENTION)["Body"].read()
    assert stored == (source / ATTENTION).read_bytes()


def test_a_merged_pack_is_pushed_without_the_files_that_it_replaces(s3, source, tmp_path):
    assert run("pack", "--merged", "--dir", source, "-o", tmp_path / "packed")[0] == 0
    assert run("push", URI, "--dir", tmp_path / "packed")[0] == 0
    wanted = [name for name in FILES if name.endswith(".json")] + ["CatVTON/mix.safetensors", RECORD]
    assert keys(s3) == [PREFIX + name for name in sorted(wanted)]
    assert weights.verify(fetch_as_sagemaker(s3, tmp_path / "opt"), "catvton", "mix").verified


def test_the_files_of_the_masker_are_not_merged(source, tmp_path, monkeypatch):
    monkeypatch.setattr("model.artifact.load_masker", lambda *_: None)  # the real parsers are too large for here
    masked = artifact_with_masker(source)
    merged = merge(masked, tmp_path)
    masker = {twin_of(Path(name)).as_posix() for name in PUBLISHED}
    assert masker < merged.files.keys()
    assert {name: merged.files[name] for name in masker} == {name: masked.files[name] for name in masker}
    assert merged.files.keys() - masker == {"CatVTON/mix.safetensors", *(f for f in FILES if f.endswith(".json"))}


def artifact_with_masker(source: Path) -> Artifact:
    """As `prove` makes it; the real parsers are too large to be loaded here."""
    for name in PUBLISHED:
        twin = twin_of(source / name)
        twin.parent.mkdir(exist_ok=True)
        save_file({"x": torch.zeros(4)}, twin)
    parts = (("catvton", "mix"), MASKER_PART)
    record = weights.record_of(source, parts)
    return Artifact(source, parts, record.files, weights.text_of(record))


def test_the_files_of_the_masker_go_first_so_that_a_half_push_lacks_what_the_service_needs(
    cloud, s3, source, monkeypatch
):
    artifact = artifact_with_masker(source)
    told: list[int] = []
    with between(cloud.url) as (way, put):
        at(way, monkeypatch)
        pushed = push(s3_client(40), artifact, Destination.parse(URI), told.append)
    assert (pushed.sent, pushed.there) == (9, 0)
    masker = {twin_of(Path(name)).as_posix() for name in PUBLISHED}
    assert set(put[:3]) == masker
    assert set(put[3:9]) == set(FILES)
    assert put[9:] == [RECORD]
    assert sum(told) == artifact.bytes


@pytest.mark.parametrize("name", ["old.bin", "", "CatVTON/"])
def test_a_prefix_that_holds_something_else_is_refused_and_nothing_sent(s3, source, name):
    s3.put_object(Bucket=BUCKET, Key=PREFIX + name, Body=b"")
    status, said = run("push", URI, "--dir", source)
    assert status == EXIT_SETTINGS
    assert f"{PREFIX}{name} is no part of these weights" in said
    assert keys(s3) == [PREFIX + name]


WRONG = ["", "s3://bucket", "s3://bucket/", "s3://bucket/prefix", "s3://bucket//", "s3://bucket/a//", "s3:///a/"]
WRONG += ["https://bucket/a/", "S3://bucket/a/", "s3://Bucket/a/", "s3://bucket/../", "s3://bucket/a b/", "weights/"]


@pytest.mark.parametrize("uri", WRONG)
def test_a_destination_of_another_form_is_refused_before_anything_is_read(uri, tmp_path):
    status, said = run("push", uri, "--dir", tmp_path / "nowhere")
    assert status == EXIT_USAGE
    assert "s3://bucket/prefix/" in said


def test_weights_that_would_not_load_are_not_pushed(s3, source):
    without_a_tensor(source / ATTENTION)
    assert run("push", URI, "--dir", source)[0] == EXIT_SETTINGS
    assert keys(s3) == []


def test_a_bucket_that_is_not_there_is_refused(s3, source):
    status, said = run("push", "s3://no-such-bucket/a/", "--dir", source)
    assert status == EXIT_SETTINGS
    assert "NoSuchBucket" in said


ERROR = b"<Error><Code>%s</Code><Message>no</Message></Error>"


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (403, b"AccessDenied", PushRefused),
        (403, b"InvalidAccessKeyId", PushRefused),
        (400, b"RequestTimeout", PushFailed),
        (503, b"SlowDown", PushFailed),
        (500, b"InternalError", PushFailed),
    ],
)
def test_refusals_and_outages_of_s3_are_told_apart(source, monkeypatch, status, code, kind):
    record = weights.record_of(source, (("catvton", "mix"),))
    artifact = Artifact(source, (("catvton", "mix"),), record.files, weights.text_of(record))
    with faulty_aws((status, {}, ERROR % code)) as server:
        at(server.url, monkeypatch)
        with pytest.raises(kind, match=code.decode()):
            push(s3_client(40), artifact, Destination.parse(URI), int)


def test_a_store_that_is_away_and_keys_that_are_missing_are_sentences(source, tmp_path, monkeypatch):
    at("http://127.0.0.1:9", monkeypatch)
    status, said = run("push", URI, "--dir", source)
    assert (status, "was not reached" in said) == (EXIT_RETRY, True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    status, said = run("push", URI, "--dir", source)
    assert (status, "without credentials" in said) == (EXIT_SETTINGS, True)


def test_a_record_names_only_what_is_packed(source):
    (source / "CatVTON/vitonhd-16k-512/attention").mkdir(parents=True)
    (source / "CatVTON/vitonhd-16k-512/attention/model.safetensors").write_bytes((source / ATTENTION).read_bytes())
    assert run("verify", "--dir", source, "--variant", "vitonhd")[0] == 0
    record = weights.record_of(source, (("catvton", "mix"),))
    assert list(record.files) == FILES
    assert record.files[ATTENTION].sha256 == hashlib.sha256((source / ATTENTION).read_bytes()).hexdigest()
    assert list(json.loads(weights.text_of(record))["files"]) == FILES
