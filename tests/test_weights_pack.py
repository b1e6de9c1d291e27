"""Weights on their way to SageMaker: packed, pushed to S3 over HTTP, fetched as SageMaker fetches them."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path

import pytest
import requests
import torch
from botocore.config import Config
from catvton_recipe import write_published_layout
from click.testing import CliRunner
from faulty_aws import faulty_aws
from safetensors.torch import load_file, save_file

from container.weights_cli import EXIT_OUTPUT, EXIT_RETRY, EXIT_SETTINGS, EXIT_USAGE, weights_group
from container.weights_push import CONNECTIONS, Destination, PushFailed, PushRefused, push
from container.wiring import s3_client
from deploy.demo import BUCKET, FAKE_KEYS, local_cloud, serving
from model import weights
from model.artifact import MASKER_PART, Artifact, merge, pack_folder, pack_tar
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
ENGINE_PART = ("catvton", "mix")
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
    put_in_place(path, content)


def put_in_place(path: Path, content: bytes) -> None:
    path.unlink()  # it may be a link
    path.write_bytes(content)


def artifact_of(source: Path, *parts: tuple[str, str]) -> Artifact:
    """As `prove` makes it, of what was not loaded."""
    record = weights.record_of(source, parts)
    return Artifact(source, parts, record.files, weights.text_of(record))


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


@pytest.mark.parametrize("options", [[], ["--merged"]])
def test_others_can_read_what_was_packed_whatever_the_umask(source, tmp_path, options):
    before = os.umask(0o077)
    try:
        for output in ("model", "model.tar.gz"):
            assert run("pack", *options, "--dir", source, "-o", tmp_path / output)[0] == 0
    finally:
        os.umask(before)
    packed = [tmp_path / "model", *(tmp_path / "model").rglob("*")]
    assert {stat.S_IMODE(path.stat().st_mode) for path in packed if path.is_dir()} == {0o755}
    assert {stat.S_IMODE(path.stat().st_mode) for path in packed if path.is_file()} == {0o644}
    assert stat.S_IMODE((tmp_path / "model.tar.gz").stat().st_mode) == 0o644


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


CHANGES = {
    "another byte at the end": flip_last_byte,
    "longer": lambda path: put_in_place(path, path.read_bytes() + b"x"),
    "shorter": lambda path: put_in_place(path, path.read_bytes()[:-1]),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("pack", [pack_folder, pack_tar])
@pytest.mark.parametrize("change", [change for change in CHANGES if change != "longer"])  # a tar takes what it was
def test_a_file_that_changes_before_it_is_packed_is_refused_and_nothing_is_left(source, tmp_path, pack, change):
    artifact = artifact_of(source, ENGINE_PART)
    CHANGES[change](source / UNET)
    with pytest.raises(WeightsError, match="cannot be read" if change == "gone" else "changed while it was packed"):
        pack(artifact, tmp_path / "out" / "model", int)
    assert list((tmp_path / "out").iterdir()) == []


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


@pytest.mark.parametrize("name", ["model.tgz", "model.tar", "model.zip", "model.tar.xz", "model.TAR.GZ", "model.gz"])
def test_an_archive_that_sagemaker_does_not_take_is_refused_and_no_folder_gets_its_name(source, tmp_path, name):
    status, said = run("pack", "--dir", source, "-o", tmp_path / name)
    assert (status, len(said.splitlines())) == (EXIT_USAGE, 1)
    assert f"{name} is neither the name of a folder nor one that ends in .tar.gz" in said
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["v1.2", "mix.tar.gz.parts", "weights-gz"])
def test_a_folder_may_have_dots_in_its_name(source, tmp_path, name):
    assert run("pack", "--dir", source, "-o", tmp_path / name)[0] == 0
    assert (tmp_path / name).is_dir()


@pytest.mark.parametrize("command", [["push", URI], ["pack", "-o", "packed"], ["verify"]])
def test_a_file_in_the_place_of_the_folder_of_weights_is_called_that(tmp_path, command):
    packed = tmp_path / "out.tar.gz"
    packed.write_bytes(b"x")
    assert run(*command, "--dir", packed) == (EXIT_SETTINGS, f"{packed} is no folder\n")


# Push


@pytest.fixture
def no_pauses(monkeypatch):
    """Between the attempts, which take a minute otherwise."""
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0)


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
def between(url: str, refuse: str = "nothing at all", times: float = inf) -> Iterator[tuple[str, list[str]]]:
    """A way to S3 on which so many uploads of keys that contain `refuse` end in 503; and the keys put, in order."""
    put: list[str] = []
    refusals: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            if self.headers.get("Expect"):
                self.send_response_only(100)
                self.end_headers()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.command in ("PUT", "POST") and refuse in self.path and len(refusals) < times:
                refusals.append(self.path)
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
        assert requests.get(f"{url}/ping", timeout=30).status_code == 200


@pytest.mark.usefixtures("no_pauses")
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


@pytest.mark.usefixtures("no_pauses")
def test_a_line_that_fails_eight_times_does_not_end_a_push(cloud, s3, source, monkeypatch):
    with between(cloud.url, refuse=UNET, times=8) as (way, _):
        at(way, monkeypatch)
        status, said = run("push", URI, "--dir", source)
    assert status == 0, said
    assert PREFIX + UNET in keys(s3)


@pytest.mark.usefixtures("s3")
def test_a_push_waits_for_a_slow_line_as_long_as_boto3_would_by_itself():
    own, default = s3_client(CONNECTIONS).meta.config, Config()
    assert own.connect_timeout >= default.connect_timeout
    assert own.read_timeout >= default.read_timeout


class Watched:
    """A client whose uploads wait for a second one, and that knows how many of them, and of their parts, there were."""

    def __init__(self, s3) -> None:
        self._s3 = s3
        self._under_way: list[object] = []
        self._two = threading.Event()
        self.files = self.parts = 0

    def __getattr__(self, name: str):
        return getattr(self._s3, name)

    def upload_fileobj(self, stream, *args, **options) -> None:
        self._under_way.append(stream)
        self.files = max(self.files, len(self._under_way))
        self.parts = max(self.parts, len(self._under_way) * options["Config"].max_concurrency)
        if len(self._under_way) > 1:
            self._two.set()
        assert self._two.wait(30)
        self._s3.upload_fileobj(stream, *args, **options)
        self._under_way.remove(stream)


def test_files_go_side_by_side_and_few_parts_share_the_line(s3, source):
    watched = Watched(s3_client(CONNECTIONS))
    assert push(watched, artifact_of(source, ENGINE_PART), Destination.parse(URI), int).sent == len(FILES)
    assert 2 <= watched.files <= 4
    assert watched.parts <= CONNECTIONS == watched.meta.config.max_pool_connections


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


@pytest.mark.parametrize("size", [100, 16 * 2**20])  # sent in one piece, and in two parts
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_before_it_is_pushed_never_arrives_and_a_repeat_sends_the_right_one(
    s3, source, size, change
):
    content = bytes(size)
    put_in_place(source / UNET, content)
    artifact = artifact_of(source, ENGINE_PART)
    CHANGES[change](source / UNET)
    with pytest.raises(WeightsError, match="cannot be read" if change == "gone" else "changed while it was pushed"):
        push(s3_client(CONNECTIONS), artifact, Destination.parse(URI), int)
    assert not {PREFIX + UNET, PREFIX + RECORD} & set(keys(s3))
    assert "Uploads" not in s3.list_multipart_uploads(Bucket=BUCKET)
    (source / UNET).write_bytes(content)
    push(s3_client(CONNECTIONS), artifact, Destination.parse(URI), int)
    where = s3.generate_presigned_url("get_object", {"Bucket": BUCKET, "Key": PREFIX + UNET})
    assert requests.get(where, timeout=20).content == content  # boto3 takes the stand-in's checksum of parts for wrong
    assert PREFIX + RECORD in keys(s3)


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
    return artifact_of(source, ENGINE_PART, MASKER_PART)


def test_the_files_of_the_masker_go_first_so_that_a_half_push_lacks_what_the_service_needs(
    cloud, s3, source, monkeypatch
):
    artifact = artifact_with_masker(source)
    told: list[int] = []
    with between(cloud.url) as (way, put):
        at(way, monkeypatch)
        pushed = push(s3_client(CONNECTIONS), artifact, Destination.parse(URI), told.append)
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


@pytest.mark.usefixtures("no_pauses")
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
    artifact = artifact_of(source, ENGINE_PART)
    with faulty_aws((status, {}, ERROR % code)) as server:
        at(server.url, monkeypatch)
        with pytest.raises(kind, match=code.decode()):
            push(s3_client(CONNECTIONS), artifact, Destination.parse(URI), int)


@pytest.mark.usefixtures("no_pauses")
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
