from __future__ import annotations

import os
import subprocess
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from stand_in import FakeFetcher, usual_files, usual_request

from container.cli_files import FilesAndUrls, OutputRefused, read_picture, try_outputs, write_output
from container.errors import ImageNotDecodable, ImageNotFound, ImageSourceTimeout, ImageTooLarge
from container.fetch import MAX_BYTES
from container.request import parse_try_on, upload_reference

NOBODY = 65534
ROLES = ("person_image_url", "upper_cloth_url", "lower_cloth_url", "mask_image_url")


def in_time():
    return time.monotonic() + 60


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, content in usual_files().items():
        (tmp_path / name).write_bytes(content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@contextmanager
def only_permitted(folder, mode):
    """The folder has that mode in the block, and not even root may do more with it."""
    was_root = os.geteuid() == 0
    folder.chmod(mode)
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        folder.chmod(0o700)


def asked(**changes):
    paths = {name: f"{name.partition('_')[0]}.png" for name in ROLES}
    return parse_try_on(usual_request(**{**paths, **changes}))


def test_a_file_is_the_same_job_by_whatever_path(folder):
    plain = FilesAndUrls(FakeFetcher()).with_references(asked())
    other = {"person_image_url": "./person.png", "mask_image_url": str(folder / "mask.png")}
    assert FilesAndUrls(FakeFetcher()).with_references(asked(**other)) == plain
    assert plain.person_image_url == upload_reference(usual_files()["person.png"])


def test_a_path_is_read_once_and_an_url_stays_what_it_is(folder):
    urls = FakeFetcher()
    images = FilesAndUrls(urls)
    request = images.with_references(asked(upper_cloth_url="https://images.example/upper.png"))
    assert request.upper_cloth_url == "https://images.example/upper.png"
    (folder / "person.png").unlink()
    for ref in (request.person_image_url, request.upper_cloth_url):
        images.fetch(ref, user_id="7", deadline=in_time())
    assert images.seen[request.person_image_url] == usual_files()["person.png"]
    assert urls.asked == ["https://images.example/upper.png"]


def test_what_the_cloth_type_does_not_use_is_not_read(folder):
    images = FilesAndUrls(FakeFetcher())
    images.with_references(asked(cloth_type="upper", lower_cloth_url="gone.png"))
    with pytest.raises(ImageNotFound):
        images.with_references(asked(lower_cloth_url="gone.png"))


@pytest.mark.parametrize("path", [".", "/dev/zero", "/dev/null"])
def test_what_is_neither_a_file_nor_a_pipe_is_refused(path):
    with pytest.raises(ImageNotDecodable):
        read_picture(Path(path), in_time())


@pytest.mark.parametrize("path", ["gone.png", "x" * 300, "/proc/self/mem"])
def test_what_cannot_be_opened_or_read_is_not_found(path):
    with pytest.raises(ImageNotFound):
        read_picture(Path(path), in_time())


def test_a_file_may_have_as_many_bytes_as_a_fetched_one(tmp_path):
    file = tmp_path / "file"
    file.touch()
    os.truncate(file, MAX_BYTES)
    assert len(read_picture(file, in_time())) == MAX_BYTES
    os.truncate(file, MAX_BYTES + 1)
    with pytest.raises(ImageTooLarge):
        read_picture(file, in_time())


def test_a_file_that_tells_no_size_is_read():
    assert Path("/proc/self/status").stat().st_size == 0
    assert read_picture(Path("/proc/self/status"), in_time()).startswith(b"Name:")


def test_a_pipe_is_read_until_its_writer_closes_it():
    with subprocess.Popen(["sh", "-c", "echo one; sleep 0.1; echo two"], stdout=subprocess.PIPE) as writer:
        assert read_picture(Path(f"/dev/fd/{writer.stdout.fileno()}"), in_time()) == b"one\ntwo\n"


def test_a_pipe_without_end_is_read_up_to_the_limit():
    with subprocess.Popen(["cat", "/dev/zero"], stdout=subprocess.PIPE) as writer:
        with pytest.raises(ImageTooLarge):
            read_picture(Path(f"/dev/fd/{writer.stdout.fileno()}"), in_time())
        writer.kill()


def test_a_pipe_that_nobody_writes_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageSourceTimeout):
        read_picture(tmp_path / "pipe", time.monotonic() + 0.1)


def test_a_pipe_that_nobody_closes_is_given_up():
    reading, writing = os.pipe()
    os.write(writing, b"a picture's beginning")
    with pytest.raises(ImageSourceTimeout):
        read_picture(Path(f"/dev/fd/{reading}"), time.monotonic() + 0.1)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    "name",
    ["x" * 300, f"new/{'x' * 300}/x.jpg", "file/x.jpg", "file/new/x.jpg", "link/x.jpg", "loop/x.jpg", "/proc/x.jpg"],
)
def test_what_cannot_be_written_is_found_before_the_work(tmp_path, monkeypatch, name, force):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    with pytest.raises(OutputRefused, match="cannot be written"):
        try_outputs([Path(name)], force=force)
    with pytest.raises(OutputRefused, match="cannot be written"):
        write_output(Path(name), b"", force=force)


@pytest.mark.parametrize(("mode", "name"), [(0o555, "x.jpg"), (0o555, "new/x.jpg"), (0o000, "x.jpg")])
def test_a_folder_without_the_right_to_write_is_found_before_the_work(mode, name):
    refused = pytest.raises(OutputRefused, match="Permission denied")
    # Not in pytest's own folder, where others see nothing.
    with tempfile.TemporaryDirectory() as folder, only_permitted(Path(folder), mode), refused:
        try_outputs([Path(folder, name)], force=False)


@pytest.mark.parametrize("name", ["file", "folder", "link", "pipe"])
def test_what_is_there_is_refused_without_force(tmp_path, name):
    (tmp_path / "file").write_bytes(b"precious")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputRefused, match="--force"):
        try_outputs([tmp_path / "new", tmp_path / name], force=False)
    with pytest.raises(OutputRefused):
        write_output(tmp_path / name, b"", force=False)
    assert (tmp_path / "file").read_bytes() == b"precious"


def test_trying_leaves_nothing_behind(tmp_path):
    (tmp_path / "file").write_bytes(b"precious")
    os.mkfifo(tmp_path / "pipe")
    try_outputs([tmp_path / name for name in ("file", "pipe", "new", "other/new")], force=True)
    assert (tmp_path / "file").read_bytes() == b"precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "pipe"]
    with pytest.raises(OutputRefused, match="Is a directory"):
        try_outputs([tmp_path], force=True)
