"""Downloads go through the real huggingface_hub to a server on loopback that speaks its protocol."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from model import record, weights
from model.weights import RECORD, WeightsError, files_for, listing, manifest, verify

ROOT = Path(__file__).parents[1]
COMMIT = "c" * 40
UNET = "base/unet/diffusion_pytorch_model.fp16.safetensors"
CONFIG = "base/unet/config.json"
ATTENTION = "own/mix/attention/model.safetensors"
FILES = (CONFIG, UNET, ATTENTION)
PICKLE = "own/SCHP/parser.pth"
TWIN = "own/SCHP/parser.safetensors"
MASKER = ("masker", "schp")


def tensors(fill: int, size: int = 64) -> bytes:
    header = json.dumps({"__metadata__": {"k": "v"}, "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return len(header).to_bytes(8, "little") + header.encode() + bytes([fill]) * size


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


CONTENT = {CONFIG: b'{"in_channels": 9}', UNET: tensors(1), ATTENTION: tensors(2)}


def tiny_manifest() -> dict:
    """Two repositories: one pinned with a known and an unknown hash, one not pinned and with no known hash at all."""
    terms = {"licence": "MIT", "notice": "Any use is allowed."}
    unet = {"bytes": len(CONTENT[UNET]), "sha256": sha256(CONTENT[UNET])}
    unknown = {"bytes": None, "sha256": None}
    base = [
        {"path": "unet/config.json", **unknown, "parts": ["catvton/mix"]},
        {"path": "unet/diffusion_pytorch_model.fp16.safetensors", **unet, "parts": ["catvton/mix", "catvton/other"]},
    ]
    own = [
        {"path": "mix/attention/model.safetensors", **unknown, "parts": ["catvton/mix"]},
        {"path": "SCHP/parser.pth", **unknown, "parts": ["masker/schp"], "converted": True},
    ]
    return {
        "version": 1,
        "repositories": [
            {"folder": "base", "repo_id": "some/base", "revision": COMMIT, **terms, "files": base},
            {"folder": "own", "repo_id": "some/own", "revision": None, **terms, "files": own},
        ],
    }


@dataclass
class Hub:
    """What the server has, at which commit its branch is, how it refuses, and what was asked of it."""

    files: dict[str, dict[str, bytes]]
    head: str = COMMIT
    status: int = 200
    file_status: int = 200
    error: str = ""
    asked: list[str] = field(default_factory=list)

    def bodies_sent(self) -> list[str]:
        return [line.split("/", 2)[2] for line in self.asked if line.startswith("GET ") and "/resolve/" in line]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        if self.hub.status != 200:
            return self.reply(self.hub.status, b"", {"X-Error-Code": self.hub.error, "X-Error-Message": "no"})
        if path.startswith("/api/models/"):
            return self.api(path[len("/api/models/") :])
        if self.hub.file_status != 200:
            return self.reply(self.hub.file_status, b"", {})
        repo, _, rest = path[1:].partition("/resolve/")
        content = self.hub.files.get(repo, {}).get(rest.partition("/")[2])
        if content is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        large = path.endswith(".safetensors")
        etag = sha256(content) if large else hashlib.sha1(content).hexdigest()  # noqa: S324 - as git names small files
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        start = int(self.headers.get("Range", "bytes=0-").split("=")[1].split("-")[0])
        return self.reply(206 if start else 200, content[start:], headers)

    def api(self, path: str) -> None:
        repo = "/".join(path.split("/")[:2])
        if repo not in self.hub.files:
            return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})
        names = self.hub.files[repo]
        if "/tree/" in path:
            tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in names.items()]
            return self.reply(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        commit = path.partition("/revision/")[2] or self.hub.head
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return self.reply(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def hub() -> Hub:
    """A hub whose repositories also hold what inference does not need."""
    base = {"unet/config.json": CONTENT[CONFIG], "text_encoder/model.safetensors": tensors(9)}
    base["unet/diffusion_pytorch_model.fp16.safetensors"] = CONTENT[UNET]
    base["unet/diffusion_pytorch_model.bin"] = b"pickle"
    own = {"mix/attention/model.safetensors": CONTENT[ATTENTION], "SCHP/parser.pth": b"pickle"}
    return Hub({"some/base": base, "some/own": own})


@pytest.fixture
def endpoint(hub: Hub) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of a tiny manifest, which is in force."""
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(tiny_manifest()))
    monkeypatch.setattr("model.manifest.MANIFEST", path)
    return path


@pytest.fixture
def folder(tmp_path: Path, small: Path) -> Path:
    """A directory that holds every file of the tiny manifest and no record."""
    for name, content in CONTENT.items():
        path = tmp_path / "weights" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "weights"


PROGRAM = """
import sys
from pathlib import Path
import model.manifest
from model import weights
model.manifest.MANIFEST = Path(sys.argv[1])
try:
    weights.download(Path(sys.argv[2]), *sys.argv[3:])
except weights.WeightsError as exc:
    print(exc)
    sys.exit(3)
"""


def fetch(endpoint: str, small: Path, folder: Path, *part: str, **environ: str) -> str:
    """Download in a process of its own, where HF_ENDPOINT is read; returns the error's text, "" where it succeeded."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    kept.update(HF_ENDPOINT=endpoint, HF_HOME=str(small.parent / "home"), PYTHONPATH=str(ROOT), **environ)
    part = part or ("catvton", "mix")
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(small), str(folder), *part]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode in (0, 3), done.stderr
    return done.stdout.strip()


def record_of(folder: Path) -> dict:
    return json.loads((folder / RECORD).read_text())


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


# Download


def test_a_download_brings_the_needed_files_and_their_record_and_nothing_else(endpoint, small, tmp_path):
    folder = tmp_path / "weights"
    assert fetch(endpoint, small, folder) == ""
    assert files_in(folder) == sorted([*FILES, RECORD])
    assert not any(path.is_symlink() or path.name == ".cache" for path in folder.rglob("*"))
    record = record_of(folder)
    assert record["files"] == {name: {"bytes": len(c), "sha256": sha256(c)} for name, c in CONTENT.items()}
    assert verify(folder, "catvton", "mix").verified


def test_the_first_download_of_an_unpinned_repository_pins_its_commit(endpoint, small, tmp_path, hub):
    pinned = {"repo_id": "some/own", "revision": COMMIT}
    fetch(endpoint, small, tmp_path / "weights")
    assert record_of(tmp_path / "weights")["repositories"]["own"] == pinned
    (tmp_path / "weights" / ATTENTION).unlink()
    hub.head = "d" * 40
    assert fetch(endpoint, small, tmp_path / "weights") == ""
    assert record_of(tmp_path / "weights")["repositories"]["own"] == pinned
    assert not any(hub.head in line for line in hub.asked)


def test_a_second_download_asks_the_hub_nothing(endpoint, small, tmp_path, hub):
    fetch(endpoint, small, tmp_path / "weights")
    hub.asked.clear()
    assert fetch(endpoint, small, tmp_path / "weights") == ""
    assert hub.asked == []


def test_a_download_replaces_only_the_damaged_file(endpoint, small, folder, hub):
    verify(folder, "catvton", "mix")
    (folder / CONFIG).write_bytes(CONTENT[CONFIG].replace(b"9", b"4"))
    assert fetch(endpoint, small, folder) == ""
    assert hub.bodies_sent() == [f"base/resolve/{COMMIT}/unet/config.json"]
    assert (folder / CONFIG).read_bytes() == CONTENT[CONFIG]


def test_a_download_does_not_overwrite_recorded_weights_of_ones_own(endpoint, small, folder):
    (folder / UNET).write_bytes(tensors(7))
    verify(folder, "catvton", "mix")
    assert str(folder / UNET) in fetch(endpoint, small, folder)
    assert (folder / UNET).read_bytes() == tensors(7)


def test_a_file_with_another_hash_than_the_manifest_is_refused_deleted_and_not_recorded(endpoint, small, tmp_path, hub):
    folder = tmp_path / "weights"
    hub.files["some/base"]["unet/diffusion_pytorch_model.fp16.safetensors"] = tensors(3)
    error = fetch(endpoint, small, folder)
    assert str(folder / UNET) in error
    assert sha256(tensors(3))[:12] in error
    assert sha256(CONTENT[UNET])[:12] in error
    assert not (folder / UNET).exists()
    assert not (folder / RECORD).exists()


def test_a_truncated_upload_of_unknown_hash_is_refused(endpoint, small, tmp_path, hub):
    hub.files["some/own"]["mix/attention/model.safetensors"] = tensors(2)[:-1]
    assert ATTENTION in fetch(endpoint, small, tmp_path / "weights")
    assert ATTENTION not in record_of(tmp_path / "weights")["files"]


def test_a_file_that_the_repository_lacks_is_named(endpoint, small, tmp_path, hub):
    del hub.files["some/base"]["unet/config.json"]
    error = fetch(endpoint, small, tmp_path / "weights")
    assert CONFIG in error
    assert "some/base" in error


@pytest.mark.parametrize(("status", "code"), [(404, "RepoNotFound"), (404, "RevisionNotFound"), (403, "GatedRepo")])
def test_a_refusal_of_the_hub_names_the_repository(endpoint, small, tmp_path, hub, status, code):
    hub.status, hub.error = status, code
    assert "some/base could not be downloaded" in fetch(endpoint, small, tmp_path / "weights")


def test_an_unreachable_hub_names_the_repository_and_leaves_the_files_alone(small, folder):
    error = fetch("http://127.0.0.1:9", small, folder)
    assert "some/base could not be downloaded" in error
    assert files_in(folder) == sorted(FILES)


def test_a_damaged_file_is_not_taken_for_fetched_when_the_hub_refuses_half_way(endpoint, small, folder, hub):
    verify(folder, "catvton", "mix")
    (folder / CONFIG).write_bytes(b"{}")
    hub.file_status = 403  # a 5xx would be tried again for 20 s
    assert fetch(endpoint, small, folder) != ""
    assert record_of(folder)["files"][CONFIG]["sha256"] == sha256(CONTENT[CONFIG])


def test_offline_mode_names_the_repository(endpoint, small, folder):
    assert "some/base could not be downloaded" in fetch(endpoint, small, folder, HF_HUB_OFFLINE="1")
    assert files_in(folder) == sorted(FILES)


# Verify


def test_files_seen_for_the_first_time_are_recorded_and_verified_from_then_on(folder):
    first = verify(folder, "catvton", "mix")
    second = verify(folder, "catvton", "mix")
    size = sum(len(content) for content in CONTENT.values())
    assert first == weights.Verification(3, size, recorded=True, verified=False)
    assert second == weights.Verification(3, size, recorded=False, verified=True)
    assert files_in(folder) == sorted([*FILES, RECORD])


def test_weights_of_ones_own_are_recorded_whatever_the_manifest_says(folder):
    (folder / UNET).write_bytes(tensors(7))
    verify(folder, "catvton", "mix")
    assert record_of(folder)["files"][UNET]["sha256"] == sha256(tensors(7))


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_found_and_both_hashes_named(folder, name):
    verify(folder, "catvton", "mix")
    changed = CONTENT[name][:-1] + bytes([CONTENT[name][-1] ^ 1])
    (folder / name).write_bytes(changed)
    with pytest.raises(WeightsError) as caught:
        verify(folder, "catvton", "mix")
    assert str(folder / name) in str(caught.value)
    assert sha256(changed)[:12] in str(caught.value)
    assert sha256(CONTENT[name])[:12] in str(caught.value)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kept", [1, 7, 8, 20, len(CONTENT[UNET]) - 1])
def test_a_truncated_file_is_named_with_and_without_a_record(folder, kept, recorded):
    if recorded:
        verify(folder, "catvton", "mix")
    (folder / UNET).write_bytes(CONTENT[UNET][:kept])
    with pytest.raises(WeightsError, match=UNET):
        verify(folder, "catvton", "mix")
    assert (folder / RECORD).exists() == recorded


def test_a_lengthened_file_is_named_without_a_record(folder):
    (folder / UNET).write_bytes(CONTENT[UNET] + b"\0")
    with pytest.raises(WeightsError, match=UNET):
        verify(folder, "catvton", "mix")


HEADERS = [b"[]", b"null", b'{"w": 1}', b'{"w": {}}', b'{"w": {"data_offsets": [0]}}', b'{"w": {"data_offsets": "ab"}}']


@pytest.mark.parametrize("header", [*HEADERS, b"\xff\xfe", b"[" * 100_000])
def test_a_header_that_is_no_safetensors_header_is_named(folder, header):
    (folder / UNET).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(WeightsError, match=UNET):
        verify(folder, "catvton", "mix")


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named_with_the_command_that_brings_it(folder, name, recorded):
    if recorded:
        verify(folder, "catvton", "mix")
    (folder / name).unlink()
    with pytest.raises(WeightsError, match="vton weights download") as caught:
        verify(folder, "catvton", "mix")
    assert str(folder / name) in str(caught.value)


def test_a_missing_directory_names_the_first_file(tmp_path, small):
    with pytest.raises(WeightsError, match=CONFIG):
        verify(tmp_path / "nowhere", "catvton", "mix")


def test_an_empty_file_is_named(folder):
    (folder / CONFIG).write_bytes(b"")
    with pytest.raises(WeightsError, match=f"{CONFIG} is empty"):
        verify(folder, "catvton", "mix")


def test_a_directory_in_place_of_a_file_is_named(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    with pytest.raises(WeightsError, match=f"{CONFIG} is not a regular file"):
        verify(folder, "catvton", "mix")


def test_the_twin_name_is_accepted_instead_and_both_are_verified_where_both_are_there(folder):
    plain = folder / UNET.replace(".fp16", "")
    (folder / UNET).rename(plain)
    assert verify(folder, "catvton", "mix").files == 3
    shutil.copy(plain, folder / UNET)
    assert verify(folder, "catvton", "mix").files == 4
    plain.write_bytes(tensors(5))
    with pytest.raises(WeightsError, match=plain.name):
        verify(folder, "catvton", "mix")


def test_a_variant_added_later_is_recorded_beside_the_first(folder):
    verify(folder, "catvton", "other")
    assert list(record_of(folder)["files"]) == [UNET]
    assert verify(folder, "catvton", "mix") == weights.Verification(
        3, sum(map(len, CONTENT.values())), recorded=True, verified=False
    )
    assert sorted(record_of(folder)["files"]) == sorted(FILES)


# Verify while the files are read


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """The hashing goes on when it is set, and not before."""
    event = threading.Event()
    hashed = record.entry_of

    def entry_of(*arguments):
        assert event.wait(20)
        return hashed(*arguments)

    monkeypatch.setattr(record, "entry_of", entry_of)
    yield event
    event.set()


def test_the_files_are_hashed_while_the_block_runs_and_its_end_waits_for_that(folder, gate):
    with weights.verified(folder, "catvton", "mix"):
        assert not (folder / RECORD).exists()
        gate.set()
    assert verify(folder, "catvton", "mix").verified


def test_the_end_of_the_block_is_not_passed_before_the_last_file_was_compared(folder, gate):
    passed = threading.Event()

    def read() -> None:
        with weights.verified(folder, "catvton", "mix"):
            pass
        passed.set()

    thread = threading.Thread(target=read)
    thread.start()
    assert not passed.wait(0.3)
    gate.set()
    assert passed.wait(20)
    thread.join()


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_not_the_recorded_one_is_told_when_the_block_ends(folder, name):
    verify(folder, "catvton", "mix")
    (folder / name).write_bytes(CONTENT[name][:-1] + b"?")
    reached = False
    damaged = pytest.raises(WeightsError, match="has changed or is damaged")
    with damaged as caught, weights.verified(folder, "catvton", "mix"):
        reached = True
    assert reached
    assert name in str(caught.value)


def test_a_damaged_file_is_told_rather_than_what_the_block_made_of_it(folder):
    verify(folder, "catvton", "mix")
    (folder / UNET).write_bytes(CONTENT[UNET][:-1] + b"?")
    with pytest.raises(WeightsError, match="has changed or is damaged"), weights.verified(folder, "catvton", "mix"):
        raise WeightsError("it does not fit")


def test_intact_files_that_do_not_fit_are_told_so_and_not_recorded(folder):
    with pytest.raises(WeightsError, match="does not fit"), weights.verified(folder, "catvton", "mix"):
        raise WeightsError("it does not fit")
    assert not (folder / RECORD).exists()


def test_another_failure_of_the_block_waits_for_no_hash_and_ends_the_hashing(folder, gate):
    with pytest.raises(ValueError, match="no such device"), weights.verified(folder, "catvton", "mix"):
        raise ValueError("no such device")
    assert not gate.is_set()
    gate.set()
    assert not (folder / RECORD).exists()


def test_a_hash_that_nobody_wants_is_not_made_to_the_end(folder, monkeypatch):
    monkeypatch.setattr(record, "HASH_BUFFER_BYTES", 1)
    asked = []
    with pytest.raises(WeightsError, match="was not read to its end"):
        record.entry_of(folder / UNET, lambda: asked.append(True) or len(asked) < 3)
    assert len(asked) == 3


def test_a_missing_file_is_told_before_the_block_begins(folder):
    (folder / UNET).unlink()
    with pytest.raises(WeightsError, match="is missing"), weights.verified(folder, "catvton", "mix"):
        raise AssertionError("the block ran")


@pytest.mark.parametrize("size", [1, 7, 64, 100, 128])
def test_a_hash_does_not_depend_on_the_size_of_the_buffer(folder, monkeypatch, size):
    monkeypatch.setattr(record, "HASH_BUFFER_BYTES", size)
    assert record.entry_of(folder / UNET).sha256 == sha256(CONTENT[UNET])


def test_what_was_found_is_logged_with_its_time(folder, caplog):
    caplog.set_level("INFO")
    for event in ("weights_recorded", "weights_verified"):
        caplog.clear()
        with weights.verified(folder, "catvton", "mix"):
            pass
        (line,) = caplog.records
        assert (line.msg, line.files) == (event, 3)
        assert line.elapsed_ms >= 0


def test_a_read_only_directory_without_a_record_is_served_unverified_and_unhashed(folder, monkeypatch):
    monkeypatch.setattr(weights.os, "access", lambda path, mode: False)
    monkeypatch.setattr("model.record.entry_of", None)  # hashing what cannot be recorded would only cost time
    assert verify(folder, "catvton", "mix") == weights.Verification(
        3, sum(map(len, CONTENT.values())), recorded=False, verified=False
    )
    assert files_in(folder) == sorted(FILES)


def test_a_read_only_directory_with_a_record_is_verified(folder, monkeypatch):
    verify(folder, "catvton", "mix")
    monkeypatch.setattr(weights.os, "access", lambda path, mode: False)
    assert verify(folder, "catvton", "mix").verified


def test_a_record_that_cannot_be_written_leaves_the_files_unverified_and_no_trace(folder, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights.os, "fsync", full)
    found = verify(folder, "catvton", "mix")
    assert (found.recorded, found.verified) == (False, False)
    assert files_in(folder) == sorted(FILES)


ENTRY = {"bytes": 1, "sha256": "0" * 64}
GARBLED = {
    "not JSON": b"{",
    "not text": b"\xff\xfe\x00",
    "empty": b"",
    "another version": json.dumps({"version": 2, "files": {}, "repositories": {}}).encode(),
    "an unknown field": json.dumps({"version": 1, "files": {}, "repositories": {}, "more": 1}).encode(),
    "a short hash": json.dumps({"version": 1, "files": {"a": {**ENTRY, "sha256": "0"}}, "repositories": {}}).encode(),
    "a text as size": json.dumps({"version": 1, "files": {"a": {**ENTRY, "bytes": "1"}}, "repositories": {}}).encode(),
    "a branch as revision": json.dumps(
        {"version": 1, "files": {}, "repositories": {"a": {"repo_id": "a/b", "revision": "main"}}}
    ).encode(),
    **{
        f"the path {path!r}": json.dumps({"version": 1, "files": {path: ENTRY}, "repositories": {}}).encode()
        for path in ("../a", "/etc/passwd", "a/../../b", "a//b", "./a", "a\\..\\b", "", "a\n")
    },
}


@pytest.mark.parametrize("content", GARBLED.values(), ids=GARBLED.keys())
def test_a_garbled_record_is_named_and_never_replaced(folder, content):
    (folder / RECORD).write_bytes(content)
    for use in (lambda: verify(folder, "catvton", "mix"), lambda: listing(folder)):
        with pytest.raises(WeightsError, match=RECORD):
            use()
    assert (folder / RECORD).read_bytes() == content


def test_a_directory_in_place_of_the_record_is_named(folder):
    (folder / RECORD).mkdir()
    with pytest.raises(WeightsError, match=RECORD):
        verify(folder, "catvton", "mix")


def test_verify_imports_no_hub_client(folder, small):
    program = PROGRAM.replace("weights.download(", "weights.verify(") + "assert 'huggingface_hub' not in sys.modules\n"
    command = [sys.executable, "-W", "error", "-c", program, str(small), str(folder), "catvton", "mix"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


# What is published as a pickle


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


def test_a_pickle_is_downloaded_once_for_its_conversion(endpoint, small, tmp_path, hub):
    assert fetch(endpoint, small, tmp_path, *MASKER) == ""
    assert (tmp_path / PICKLE).read_bytes() == b"pickle"
    hub.asked.clear()
    assert fetch(endpoint, small, tmp_path, *MASKER) == ""
    assert hub.asked == []


def test_what_was_made_of_a_pickle_stands_for_it(endpoint, small, tmp_path, hub):
    write(tmp_path, TWIN, tensors(4))
    verify(tmp_path, *MASKER)
    assert fetch(endpoint, small, tmp_path, *MASKER) == ""
    assert hub.asked == []
    assert files_in(tmp_path / "own") == ["SCHP/parser.safetensors"]


@pytest.mark.parametrize("recorded", [True, False])
def test_what_is_not_known_to_be_made_of_a_pickle_gives_way_to_it(endpoint, small, tmp_path, recorded):
    fetch(endpoint, small, tmp_path, *MASKER)
    write(tmp_path, TWIN, tensors(4))
    if recorded:
        verify(tmp_path, *MASKER)
        write(tmp_path, TWIN, tensors(5))
    assert fetch(endpoint, small, tmp_path, *MASKER) == ""
    assert files_in(tmp_path / "own") == ["SCHP/parser.pth"]


def test_what_was_made_of_a_pickle_stays_while_the_hub_is_away(small, tmp_path):
    write(tmp_path, TWIN, tensors(4))
    assert "could not be downloaded" in fetch("http://127.0.0.1:9", small, tmp_path, *MASKER)
    assert (tmp_path / TWIN).read_bytes() == tensors(4)


def test_what_was_made_of_a_pickle_is_verified_without_it(small, tmp_path):
    write(tmp_path, TWIN, tensors(4))
    assert verify(tmp_path, *MASKER).recorded
    assert verify(tmp_path, *MASKER) == weights.Verification(1, len(tensors(4)), recorded=False, verified=True)
    write(tmp_path, TWIN, tensors(5))
    with pytest.raises(WeightsError, match=TWIN):
        verify(tmp_path, *MASKER)


def test_a_pickle_alone_is_not_verified_and_the_command_named_that_converts_it(small, tmp_path):
    with pytest.raises(WeightsError, match=f"{TWIN} is missing; .*`vton weights download`"):
        verify(tmp_path, *MASKER)
    write(tmp_path, PICKLE, b"pickle")
    with pytest.raises(WeightsError, match=f"{TWIN} is missing; .*`vton weights convert`"):
        verify(tmp_path, *MASKER)


def test_a_pickle_is_listed_until_there_is_what_was_made_of_it(small, tmp_path):
    def listed() -> tuple[str, bool, bool]:
        (line,) = [line for line in listing(tmp_path) if "masker/schp" in line.parts]
        return line.file, line.present, line.recorded

    assert listed() == (PICKLE, False, False)
    write(tmp_path, PICKLE, b"pickle")
    assert listed() == (PICKLE, True, False)
    write(tmp_path, TWIN, tensors(4))
    verify(tmp_path, *MASKER)
    assert listed() == (TWIN, True, True)


def test_what_is_made_anew_is_recorded_anew(small, tmp_path):
    write(tmp_path, TWIN, tensors(4))
    verify(tmp_path, *MASKER)
    write(tmp_path, TWIN, tensors(5))
    weights.record_made(tmp_path, [tmp_path / TWIN])
    assert verify(tmp_path, *MASKER).verified


# Listing and manifest


def test_the_listing_tells_known_recorded_and_present_apart(folder):
    verify(folder, "catvton", "other")
    (folder / ATTENTION).unlink()
    lines = {line.file: line for line in listing(folder)}
    assert [(lines[n].known, lines[n].recorded, lines[n].present) for n in FILES] == [
        (False, False, True),
        (True, True, True),
        (False, False, False),
    ]
    assert lines[UNET].bytes == len(CONTENT[UNET])
    assert lines[UNET].licence == "MIT"


def test_a_directory_that_does_not_exist_can_be_listed(tmp_path):
    assert not any(line.present or line.recorded for line in listing(tmp_path / "nowhere"))


def test_an_unknown_variant_is_refused_with_the_known_ones():
    with pytest.raises(WeightsError, match=r"catvton/nothing; it has .*catvton/mix"):
        files_for("catvton", "nothing")


@pytest.mark.parametrize("change", ["../up", "/abs", "a/../b"])
def test_a_manifest_whose_paths_leave_the_directory_is_refused(small, change):
    content = tiny_manifest()
    content["repositories"][0]["files"][0]["path"] = change
    small.write_text(json.dumps(content))
    with pytest.raises(WeightsError, match=r"manifest\.json"):
        manifest()


@pytest.mark.parametrize("variant", ["mix", "vitonhd", "dresscode"])
def test_every_variant_of_catvton_has_its_attention_and_the_shared_parts(variant):
    names = [f"{repository.folder}/{file.path}" for repository, file in files_for("catvton", variant)]
    assert [name for name in names if name.startswith("CatVTON/")] == [
        name
        for name in names
        if name.startswith(f"CatVTON/{variant}-") and name.endswith("/attention/model.safetensors")
    ]
    assert len([name for name in names if name.startswith("CatVTON/")]) == 1
    assert {name.split("/")[0] for name in names} == {"stable-diffusion-inpainting", "sd-vae-ft-mse", "CatVTON"}


def test_no_variant_needs_a_text_encoder_a_safety_checker_or_a_pickle():
    for variant in ("mix", "vitonhd", "dresscode"):
        for _, file in files_for("catvton", variant):
            assert not file.path.startswith(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
            assert not file.converted
    suffixes = {(Path(file.path).suffix, file.converted) for repository in manifest() for file in repository.files}
    assert suffixes == {(".json", False), (".safetensors", False), (".pth", True), (".pkl", True)}


def test_the_safety_checker_is_a_part_of_its_own():
    assert {file.path.split("/")[0] for _, file in files_for("catvton", "safety")} == {
        "safety_checker",
        "feature_extractor",
    }


def test_no_file_is_published_twice_under_one_name():
    names = [line.file for line in listing(Path("nowhere"))]
    assert len(names) == len(set(names))


def test_every_large_file_with_a_known_hash_has_a_known_size():
    assert all((file.bytes is None) == (file.sha256 is None) for repo in manifest() for file in repo.files)


def test_revisions_are_commits_or_left_to_the_first_download():
    for repository in manifest():
        assert repository.revision is None or set(repository.revision) <= set("0123456789abcdef")
        assert repository.revision is None or len(repository.revision) == 40


def test_the_licence_of_catvton_says_non_commercial():
    (catvton,) = (repository for repository in manifest() if repository.folder == "CatVTON")
    assert catvton.licence == "CC BY-NC-SA 4.0"
    assert "Non-commercial" in catvton.notice
