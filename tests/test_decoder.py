"""Real processes. `PROBE` runs what a test hands it where a file would be decoded, in the very same sandbox."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from icc import display_p3, inks_that_print_white
from PIL import Image as Pillow
from structlog.testing import capture_logs

import container.decoder
from container import images
from container.decoder import ProcessDecoder
from container.errors import (
    DeadlineExceeded,
    Draining,
    ImageFormatNotPermitted,
    ImageNotDecodable,
    ImageTooManyPixels,
    ImageTooSmall,
)
from container.sandbox import ANSWER, CPU_S, MEMORY_BYTES, NOBODY, PICTURE, REFUSALS, REFUSED

ROOT = Path(__file__).resolve().parent.parent
SAID_BYTES = 64 * 64 * 3
PROBE = f"""
import sys; sys.path.insert(0, sys.argv[1])
import ctypes, json, os, resource, signal, socket, struct, time
import container.sandbox as sandbox

def answer(kind, code):
    found = {{}}
    try:
        exec(code, globals(), found)
        said = found.get("said")
    except OSError as exc:
        said = [type(exc).__name__, exc.errno]
    except (ValueError, MemoryError) as exc:
        said = [type(exc).__name__]
    said = json.dumps(said).encode().ljust({SAID_BYTES})
    return found.get("answer", (sandbox.ANSWER.pack(sandbox.PICTURE, 64, 64), said))
"""
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel has it on Linux only")
FROM_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs to begin as root")


def soon(seconds=30.0):
    return time.monotonic() + seconds


def file_of(pixels, file_format="PNG", **options):
    file = io.BytesIO()
    picture = pixels if isinstance(pixels, Pillow.Image) else Pillow.fromarray(pixels)
    picture.save(file, file_format, **options)
    return file.getvalue()


def plain(level, size=64):
    return np.full((size, size, 3), level, np.uint8)


def python(code):
    return [sys.executable, "-I", "-B", "-W", "ignore", "-c", code, str(ROOT)]


class Probe(ProcessDecoder):
    """Runs code inside instead of decoding; `before` may change what is inside, before the sandbox is closed."""

    def __init__(self, processes=1, before="", then="sandbox.run(answer)"):
        super().__init__(processes)
        self.code = f"{PROBE}\n{before}\n{then}"

    def command(self):
        return python(self.code)


@contextmanager
def running(decoder):
    decoder.start()
    try:
        yield decoder
    finally:
        decoder.stop(10)


@pytest.fixture(scope="module")
def decoder():
    with running(ProcessDecoder(2)) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def probe():
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        monkeypatch.setenv("VTON_BUCKET", "bucket")
        with running(Probe()) as probe:
            probe.decode(b"", soon())
            yield probe


@pytest.fixture
def sandbox(probe):
    """Runs code inside; its `said` comes back through JSON, an OSError as its name and number."""
    return lambda code: inside(probe, code)


def inside(decoder, code):
    return json.loads(decoder.decode(code.encode(), soon()).tobytes())


def processes_of(decoder):
    """The decoder's own processes, without their forks."""
    return [psutil.Process(child._process.pid) for child in decoder._children]


def wait_until(happened, seconds=60.0):
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        found = happened()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("it did not happen")


# --- the same pictures as without a process


def corpus():
    noise = np.random.default_rng(0).integers(0, 256, (96, 80, 3), dtype=np.uint8)
    upright = Pillow.fromarray(noise)
    turned = Pillow.Exif()
    turned[0x0112] = 6
    clear = upright.convert("RGBA")
    clear.putalpha(Pillow.linear_gradient("L").resize(upright.size))
    damaged = b"Exif\x00\x00II*\x00\xff\xff\xff\xff"
    yield "JPEG", file_of(upright, "JPEG", exif=turned, comment=b"a comment", icc_profile=b"a profile")
    yield "progressive JPEG", file_of(upright, "JPEG", progressive=True, exif=damaged)
    yield "CMYK JPEG", file_of(upright.convert("CMYK"), "JPEG")
    yield "JPEG of a phone's colours", file_of(upright, "JPEG", icc_profile=display_p3(), exif=turned)
    yield "JPEG of a printer's inks", file_of(upright.convert("CMYK"), "JPEG", icc_profile=inks_that_print_white())
    yield "grey JPEG", file_of(upright.convert("L"), "JPEG")
    yield "a phone's JPEG", file_of(upright, "MPO", save_all=True, append_images=[upright])
    yield "PNG", file_of(upright, exif=turned)
    yield "palette PNG", file_of(upright.convert("P"), transparency=3)
    yield "RGBA PNG", file_of(clear)
    yield "LA PNG", file_of(clear.convert("LA"))
    yield "1-bit PNG", file_of(upright.convert("1"))
    yield "16-bit PNG", file_of(noise[..., 0].astype(np.uint16) * 250)
    yield "WebP", file_of(upright, "WEBP", exif=turned)
    yield "lossless WebP", file_of(clear, "WEBP", lossless=True)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "content"), list(corpus()), ids=[name for name, _ in corpus()])
def test_a_picture_is_the_same_as_without_a_process(decoder, name, content):
    assert np.array_equal(decoder.decode(content, soon()), images.decode(content))
    assert np.array_equal(decoder.decode_mask(content, soon()), images.decode_mask(content))


def bomb(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    usual = file_of(plain(0))
    return usual.replace(usual[12:33], header + struct.pack(">I", zlib.crc32(header)))


@pytest.mark.parametrize(
    ("content", "refusal"),
    [
        (b"", ImageNotDecodable),
        (b"<html>", ImageNotDecodable),
        (file_of(plain(9))[:-20], ImageNotDecodable),
        (b"GIF89a", ImageFormatNotPermitted),
        (file_of(plain(9, 63)), ImageTooSmall),
        (bomb(50_000, 50_000), ImageTooManyPixels),
        (bomb(2**31 - 1, 2**31 - 1), ImageNotDecodable),
    ],
    ids=["empty", "text", "truncated", "GIF", "small", "bomb", "damaged"],
)
def test_a_refusal_arrives_as_itself_and_the_next_picture_is_decoded(decoder, content, refusal):
    with pytest.raises(refusal) as refused:
        decoder.decode(content, soon())
    assert type(refused.value) is refusal
    assert str(refused.value).isascii()
    assert decoder.decode(file_of(plain(7)), soon())[0, 0].tolist() == [7, 7, 7]


def test_a_refusal_costs_no_process(decoder):
    decoder.decode(file_of(plain(1)), soon())
    before = {child.pid for child in processes_of(decoder)}
    for _ in range(4):
        with pytest.raises(ImageNotDecodable):
            decoder.decode(b"none", soon())
    assert {child.pid for child in processes_of(decoder)} == before


def test_the_largest_picture_that_is_permitted_fits_into_the_memory(decoder, monkeypatch):
    """50 megapixels of WebP with alpha and a profile that are to be turned: what takes most."""
    monkeypatch.setattr(container.decoder, "PICTURE_S", 200.0)
    turned = Pillow.Exif()
    turned[0x0112] = 6
    large = Pillow.new("RGBA", (8160, 6120), (9, 9, 9, 128))
    content = file_of(large, "WEBP", quality=1, method=0, exif=turned, icc_profile=display_p3())
    picture = decoder.decode(content, soon(200))
    assert picture.shape == (8160, 6120, 3)
    assert np.abs(picture[::500, ::500].astype(int) - 132).max() <= 2


def test_pictures_of_many_requests_at_once_are_each_their_own(decoder):
    with ThreadPoolExecutor(8) as pool:
        levels = list(range(40))
        pictures = pool.map(lambda level: decoder.decode(file_of(plain(level)), soon()), levels)
        assert [int(picture.max()) for picture in pictures] == levels


def test_two_pictures_are_decoded_side_by_side():
    code = "time.sleep(5)"
    with running(Probe(2)) as decoder, ThreadPoolExecutor(2) as pool:
        for _ in range(2):
            inside(decoder, "said = 1")
        wait_until(lambda: len(processes_of(decoder)) == 2)
        began = time.monotonic()
        list(pool.map(lambda _: inside(decoder, code), range(2)))
        both_s = time.monotonic() - began
    assert both_s < 9


# --- what can be done inside


def test_nothing_of_our_environment_is_inside(sandbox):
    # Python says in LC_CTYPE what it chose where no locale is set.
    assert set(sandbox("said = dict(os.environ)")) - {"LD_LIBRARY_PATH", "LC_CTYPE"} == set(container.decoder.SPARING)


def test_no_descriptor_of_ours_is_inside(sandbox):
    code = """
said = []
for descriptor in range(4096):
    try:
        os.fstat(descriptor)
    except OSError:
        continue
    said.append(descriptor)
"""
    assert sandbox(code) == [0, 1]


def test_only_what_decoding_needs_is_imported(monkeypatch):
    main = container.decoder.MAIN.replace("main()", "print(sorted(sys.modules))")
    done = subprocess.run(python(main), cwd="/", env={}, capture_output=True, text=True, check=True)
    assert "'PIL.PngImagePlugin'" in done.stdout
    for package in ("torch", "boto3", "botocore", "fastapi", "pydantic", "structlog", "ssl", "cv2"):
        assert f"'{package}'" not in done.stdout


def test_the_working_folder_is_the_root(sandbox):
    assert sandbox("said = os.getcwd()") == "/"


def test_the_group_of_processes_is_its_own(sandbox):
    assert sandbox("said = os.getsid(0)") != os.getsid(0)


@FROM_ROOT
def test_root_is_given_up(sandbox):
    assert sandbox("said = [*os.getresuid(), *os.getresgid(), *os.getgroups()]") == [NOBODY] * 6
    assert sandbox("os.setuid(0)") == ["PermissionError", 1]


@LINUX
def test_no_new_privileges_are_to_be_had_and_no_other_process_looks_in(sandbox):
    assert sandbox("said = ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)") == 1
    assert sandbox("said = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)") == 0


@LINUX
def test_no_capability_is_left(sandbox):
    code = """
header, found = (ctypes.c_uint32 * 2)(sandbox.CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(*[1] * 6)
ctypes.CDLL(None).capget(header, found)
said = list(found)
"""
    assert sandbox(code) == [0] * 6


@LINUX
@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        "open('/proc/self/environ')",
        "open('/dev/null', 'w')",
        "os.listdir('/')",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "os.pipe()",
        "os.dup(0)",
        "os.memfd_create('memory')",
        "os.fork()",
        "os.write(2, b'\\x06')",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), 0) if os.getuid() == 0 else os.kill(1, 0)",
    ],
)
def test_nothing_can_be_opened_started_or_reached(sandbox, code):
    name, number = sandbox(code)
    assert name in ("OSError", "PermissionError", "BlockingIOError"), number


@LINUX
def test_limits_are_in_force_and_cannot_be_raised(sandbox):
    expected = {
        "RLIMIT_AS": MEMORY_BYTES,
        "RLIMIT_CPU": CPU_S,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_NOFILE": 0,
    }
    for name, value in expected.items():
        assert sandbox(f"said = resource.getrlimit(resource.{name})") == [value, value]
        assert sandbox(f"resource.setrlimit(resource.{name}, ({value + 1}, {value + 1}))") == ["ValueError"]


@LINUX
def test_more_memory_than_a_picture_needs_is_not_there(sandbox):
    assert sandbox(f"bytearray({MEMORY_BYTES})") == ["MemoryError"]


def test_nothing_is_left_for_the_next_file(sandbox):
    sandbox("sandbox.left = 'a secret'")
    assert sandbox("said = hasattr(sandbox, 'left')") is False


@LINUX
def test_a_user_like_any_other_cannot_reach_the_service_either():
    """Where the service is not root, its decoders are the same user: then Landlock stands between them."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare, of util-linux")
    whoever = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*whoever, "true"], capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces")
    code = f"""
import json, os, sys, time
sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / "tests")!r})
import test_decoder as tests
with tests.running(tests.Probe()) as running:
    for code in (
        "said = [os.getuid(), ctypes.CDLL(None).syscall(444, None, ctypes.c_size_t(0), 1)]",
        # PTRACE_SEIZE
        f"said = ctypes.CDLL(None, use_errno=True).ptrace(0x4206, {{os.getpid()}}, None, None)",
        f"os.kill({{os.getpid()}}, 0)",
        "open('/proc/self/environ')",
    ):
        print(json.dumps(tests.inside(running, code)))
"""
    done = subprocess.run([*whoever, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (uid, landlock), traced, signalled, opened = map(json.loads, done.stdout.splitlines())
    assert uid == 12345
    assert opened[0] in ("OSError", "PermissionError")
    if landlock >= 1:
        assert traced == -1
    if landlock >= 6:
        assert signalled == ["PermissionError", 1]


# --- faults


FAULTS = {
    "it ends badly": "os._exit(1)",
    "it ends well": "os._exit(0)",
    "it crashes": "os.kill(os.getpid(), signal.SIGSEGV)",
    "it is killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "it raises": "raise KeyError",
    "its master is killed": "os.kill(os.getppid(), signal.SIGKILL); time.sleep(60)",
    "a status that is none": "answer = (sandbox.ANSWER.pack(7, 64, 64), b'')",
    "a picture of nothing": "answer = (sandbox.ANSWER.pack(0, 0, 0), b'')",
    "a picture of terabytes": "answer = (sandbox.ANSWER.pack(0, 2**32 - 1, 2**32 - 1), b'')",
    "a picture that is too large": "answer = (sandbox.ANSWER.pack(0, 50_000, 1_001), b'')",
    "a refusal that is none": "answer = (sandbox.ANSWER.pack(1, 99, 0), b'')",
    "a reason without end": "answer = (sandbox.ANSWER.pack(1, 0, 201), b'x' * 201)",
    "a picture in part": "answer = (sandbox.ANSWER.pack(0, 64, 64), b'x')",
    "half a header": "os.write(0, b'123'); os._exit(0)",
    "text": "os.write(0, b'HTTP/1.1 200 OK\\r\\n\\r\\n')",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_file_that_breaks_its_process_is_not_decodable_and_the_next_one_is(probe, name, monkeypatch):
    monkeypatch.setattr(container.decoder, "PICTURE_S", 2.0)
    with pytest.raises(ImageNotDecodable):
        probe.decode(FAULTS[name].encode(), soon())
    assert inside(probe, "said = 1") == 1


def test_what_killed_the_process_is_logged(probe):
    with capture_logs() as logs, pytest.raises(ImageNotDecodable):
        probe.decode(b"os._exit(77)", soon())
    assert [(entry["event"], entry["reason"]) for entry in logs] == [("decoder_lost", "a fork ended with 77")]


@pytest.mark.parametrize(
    "code",
    [
        "os.write(0, sandbox.ANSWER.pack(0, 64, 64) + b'1' * 12288); answer = (b'more', b'')",
        "os.write(0, sandbox.ANSWER.pack(0, 64, 64) + b'1' * 12288); time.sleep(60)",
    ],
    ids=["it says more than it was asked", "it stays when it has answered"],
)
def test_a_file_cannot_answer_for_the_next_one(probe, code, monkeypatch):
    monkeypatch.setattr(container.decoder, "READY_S", 1.0)
    assert probe.decode(code.encode(), soon())[0, 0, 0] == ord("1")
    assert inside(probe, "said = 2") == 2


def test_a_file_cannot_leave_a_part_of_itself_as_the_next_one():
    """A process that was taken over could leave bytes unread, which would be a request to the one after it."""
    reads_less = """
from types import SimpleNamespace
honest = sandbox.REQUEST
sandbox.REQUEST = SimpleNamespace(size=honest.size, unpack=lambda header: (0, min(honest.unpack(header)[1], 40)))
"""
    with running(Probe(before=reads_less)) as decoder:
        left = b"said = 'of the one before'"
        content = b"said = 1".ljust(40) + honest_request(left)
        assert json.loads(decoder.decode(content, soon()).tobytes()) == 1
        assert inside(decoder, "said = 2") == 2


def honest_request(content):
    return container.decoder.sandbox.REQUEST.pack(0, len(content)) + content


def test_a_reason_is_of_harmless_letters(probe):
    code = "answer = (sandbox.ANSWER.pack(1, 2, 8), b'\\xff\\xfe line\\n')"
    with pytest.raises(ImageTooSmall) as refused:
        probe.decode(code.encode(), soon())
    assert "\xff" not in str(refused.value)


@pytest.mark.parametrize("master", [True, False], ids=["master", "fork"])
def test_a_process_that_is_killed_with_a_picture_in_hand_costs_only_that(probe, master):
    inside(probe, "said = 1")
    (process,) = processes_of(probe)
    busy = b"while time.process_time() < 0.5: pass\ntime.sleep(60)"
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(probe.decode, busy, soon())
        fork = wait_until(lambda: busy_fork_of(process))
        (process if master else fork).kill()
        with pytest.raises(ImageNotDecodable):
            under_way.result(15)
    wait_until(lambda: has_ended(fork))
    assert inside(probe, "said = 4") == 4


def busy_fork_of(process):
    """The fork that has worked for 0.3 s; the one before it may end while it is looked at."""
    for child in process.children():
        with suppress(psutil.NoSuchProcess):
            if sum(child.cpu_times()[:2]) > 0.3:
                return child
    return None


def has_ended(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_process_that_dies_without_a_picture_is_replaced_and_nobody_notices(probe):
    inside(probe, "said = 1")
    (process,) = processes_of(probe)
    process.kill()
    wait_until(lambda: not process.is_running())
    assert inside(probe, "said = 5") == 5


def test_a_picture_that_takes_for_ever_ends_at_the_limit(probe, monkeypatch):
    monkeypatch.setattr(container.decoder, "PICTURE_S", 1.0)
    began = time.monotonic()
    with pytest.raises(ImageNotDecodable):
        probe.decode(b"time.sleep(60)", soon())
    assert 0.9 < time.monotonic() - began < 20
    monkeypatch.undo()
    assert inside(probe, "said = 6") == 6


def test_the_deadline_comes_before_the_limit(probe):
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        probe.decode(b"time.sleep(60)", soon(1))
    assert time.monotonic() - began < 20
    assert inside(probe, "said = 7") == 7


def test_a_file_that_no_process_is_free_for_is_out_of_time(probe):
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(probe.decode, b"time.sleep(3)", soon())
        time.sleep(0.3)
        with pytest.raises(DeadlineExceeded):
            probe.decode(b"said = 8", soon(0.2))
        busy.result(20)
    assert inside(probe, "said = 9") == 9


@LINUX
def test_a_picture_that_works_for_ever_ends_at_the_limit():
    with running(Probe(before="sandbox.CPU_S = 1")) as decoder:
        with capture_logs() as logs, pytest.raises(ImageNotDecodable):
            decoder.decode(b"while True: pass", soon(60))
        assert logs[0]["reason"] == "a fork ended with -9"
        assert inside(decoder, "said = 1") == 1


@LINUX
def test_a_picture_that_needs_more_memory_than_there_is_is_not_decodable():
    with running(Probe(before="sandbox.MEMORY_BYTES = 250 * 2**20", then="sandbox.main()")) as decoder:
        with pytest.raises(ImageNotDecodable, match="memory"):
            decoder.decode(file_of(Pillow.new("L", (7000, 6000)), compress_level=1), soon(60))
        assert decoder.decode(file_of(plain(3)), soon()).max() == 3


def test_nothing_accumulates():
    """200 pictures and 20 faults: no zombie, no descriptor, no process more than before."""
    me = psutil.Process()
    with running(Probe(2)) as decoder:
        for _ in range(4):
            inside(decoder, "said = 1")
        wait_until(lambda: len(processes_of(decoder)) == 2)
        before = me.num_fds(), me.num_threads(), len(me.children())
        for number in range(200):
            if number % 10 == 0:
                with pytest.raises(ImageNotDecodable):
                    decoder.decode(b"os._exit(1)", soon())
            assert inside(decoder, f"said = {number}") == number
        wait_until(lambda: len(processes_of(decoder)) == 2)
        wait_until(lambda: (me.num_fds(), me.num_threads(), len(me.children())) == before)
        wait_until(lambda: not zombies_of(me))


def zombies_of(process):
    found = []
    for child in process.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


@LINUX
def test_the_first_process_of_a_container_keeps_no_zombies(tmp_path):
    """Orphans become its children: here by PR_SET_CHILD_SUBREAPER."""
    code = f"""
import ctypes, sys, time
sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / "tests")!r})
import container.decoder as decoder, test_decoder as tests, psutil
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
decoder.PICTURE_S = 0.5
with tests.capture_logs(), tests.running(tests.Probe()) as running:
    for code in (b"time.sleep(60)", b"os.kill(os.getppid(), 9); time.sleep(60)"):
        try:
            running.decode(code, tests.soon())
        except tests.ImageNotDecodable:
            assert tests.inside(running, "said = 1") == 1
    tests.wait_until(lambda: not tests.zombies_of(psutil.Process()))  # of a fork that ends there is one for a moment
tests.wait_until(lambda: not psutil.Process().children())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_processes_end_with_the_service():
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / "tests")!r})
import test_decoder as tests, psutil
decoder = tests.ProcessDecoder(2)
decoder.start()
tests.wait_until(lambda: len(psutil.Process().children(recursive=True)) == 4)
decoder.decode(tests.file_of(tests.plain(1)), tests.soon())
print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) >= 3, done.stderr
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))


# --- start and stop


def test_stop_ends_the_processes_and_answers_what_waits():
    with ThreadPoolExecutor(2) as pool, running(Probe()) as decoder:
        inside(decoder, "said = 1")
        (process,) = processes_of(decoder)
        waiting = [pool.submit(decoder.decode, b"time.sleep(60)", soon()) for _ in range(2)]
        time.sleep(0.3)
        decoder.stop(10)
        for future in waiting:
            with pytest.raises(Draining):
                future.result(10)
        assert not process.is_running()
        with pytest.raises(Draining):
            decoder.decode(b"said = 1", soon())


def test_stop_before_start_is_nothing():
    ProcessDecoder(2).stop(1)


class Starting(ProcessDecoder):
    """Starts with these commands, then as usual."""

    def __init__(self, *commands):
        super().__init__(1)
        self.commands = list(commands)

    def command(self):
        return self.commands.pop(0) if self.commands else super().command()


def test_a_process_that_cannot_start_is_logged_and_tried_again(monkeypatch, tmp_path):
    monkeypatch.setattr(container.decoder, "RETRY_S", 0.1)
    starting = Starting(python("raise SystemExit('no numpy here')"), [str(tmp_path / "no-python")])
    with capture_logs() as logs, running(starting) as decoder:
        assert decoder.decode(file_of(plain(3)), soon()).max() == 3
    first, second = [entry["reason"] for entry in logs if entry["event"] == "decoder_start_failed"]
    assert "no numpy here" in first
    assert "no-python" in second


def test_without_any_process_the_deadline_decides():
    with running(Starting(*[python("raise SystemExit(1)")] * 9)) as decoder, pytest.raises(DeadlineExceeded):
        decoder.decode(file_of(plain(3)), soon(0.5))


@LINUX
@FROM_ROOT
def test_a_root_that_may_not_become_somebody_else_says_so_and_has_no_capabilities():
    """Root of a user namespace that knows no other user."""
    if subprocess.run(["unshare", "--user", "--map-root-user", "true"], capture_output=True).returncode != 0:
        pytest.skip("needs user namespaces")
    code = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r}); sys.path.insert(0, {str(ROOT / "tests")!r})
import test_decoder as tests
with tests.capture_logs() as logs, tests.running(tests.Probe()) as running:
    said = tests.inside(running, '''
header, found = (ctypes.c_uint32 * 2)(sandbox.CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)(*[1] * 6)
ctypes.CDLL(None).capget(header, found)
said = [os.getuid(), *found]
''')
print(json.dumps([said, [entry["event"] for entry in logs]]))
"""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == [[0] * 7, ["decoder_is_root"]], done.stderr


def test_a_lower_limit_of_the_system_stays():
    """A hard limit cannot be raised; a process that is started under a lower one takes that."""
    with running(Probe(before="resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))")) as decoder:
        assert inside(decoder, "said = resource.getrlimit(resource.RLIMIT_AS)") == [2**30, 2**30]


def test_every_refusal_has_its_place():
    assert {refusal.code for refusal in REFUSALS} == {
        *("image_not_decodable", "image_format_not_permitted", "image_too_small", "image_too_many_pixels")
    }
    assert (PICTURE, REFUSED, ANSWER.size) == (0, 1, 9)
