"""Runs an image as a container engine does, on a machine that has none: its entry point, environment and file system.

As with Docker: the process is number 1 of its own processes, root has Docker's capabilities and no more, /tmp may be
small, and the root of the file system may be read-only. Other than there, the network is the machine's own, so that
what the container reaches and is reached by are ports of 127.0.0.1, and there is no filter of system calls.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Of root in a container, as Docker has them by default.
CAPABILITIES = """
chown dac_override fowner fsetid kill setgid setuid setpcap net_bind_service net_raw sys_chroot mknod audit_write
setfcap
"""
DEVICES = ("null", "zero", "full", "random", "urandom")
FOUND_S = 10.0
KILLED_S = 30.0


@dataclass(frozen=True)
class Image:
    """An image of buildah's storage: its configuration, and a copy of its file system."""

    config: dict[str, Any]
    root: Path

    @classmethod
    def named(cls, name: str) -> Image:
        """The image of that name, in the storage that the environment names."""
        inspected = _buildah("inspect", "--type", "image", name)
        container = _buildah("from", "--pull-never", name).strip()
        return cls(json.loads(inspected)["Docker"]["config"], Path(_buildah("mount", container).strip()))

    def environment(self) -> dict[str, str]:
        """What every process of a container gets."""
        return dict(variable.split("=", 1) for variable in self.config["Env"])


@dataclass(frozen=True)
class Container:
    """A container that was started. `process` ends as it does; `log` is what it says on both streams."""

    process: subprocess.Popen[bytes]
    log: Path

    def first_process(self) -> int:
        """The process that is number 1 inside, by its number outside.

        Raises:
            AssertionError: it ended, or does not start.
        """
        ends = time.monotonic() + FOUND_S
        while time.monotonic() < ends and self.process.poll() is None:
            number = self.process.pid
            children = Path(f"/proc/{number}/task/{number}/children").read_text().split()
            if children:
                return int(children[0])
            time.sleep(0.01)
        raise AssertionError(f"the container did not start: {self.log.read_text()}")

    def stop(self) -> None:
        """SIGTERM, as an engine or SageMaker sends it."""
        os.kill(self.first_process(), signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """The exit status."""
        return self.process.wait(timeout_s)


@contextmanager
def running(
    image: Image,
    arguments: Sequence[str],
    environ: Mapping[str, str],
    log: Path,
    *,
    user: int = 0,
    mounts: Mapping[str, Path] | None = None,
    writable: bool = False,
    tmp_megabytes: int = 64,
) -> Iterator[Container]:
    """A container of the image, killed at the end of the block if it still runs.

    Args:
        image: what is run.
        arguments: in place of the image's CMD, where there are any.
        environ: besides what the image says.
        log: gets what the container says.
        user: its number, and that of its group.
        mounts: path inside -> folder, read-only.
        writable: whether the root of the file system is; what is written there stays in the image's copy.
        tmp_megabytes: size of /tmp.
    """
    command = [*image.config["Entrypoint"], *(arguments or image.config["Cmd"])]
    variables = {**image.environment(), "HOSTNAME": "model.aws.local", **environ}
    inside = ["env", "-i", f"--chdir={image.config['WorkingDir']}", *(f"{k}={v}" for k, v in variables.items())]
    bounds = ",".join(["-all", *(f"+{name}" for name in CAPABILITIES.split())])
    script = [
        *_file_system(image.root, mounts or {}, writable, tmp_megabytes),
        f"exec setpriv --bounding-set={bounds} --inh-caps=-all chroot --userspec={user}:{user} --groups= "
        f"{shlex.quote(str(image.root))} {shlex.join([*inside, *command])}",
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "sh", "-euc", "\n".join(script)],
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    container = Container(process, log)
    try:
        yield container
    finally:
        if process.poll() is None:  # the first process takes all others with it
            os.kill(container.first_process(), signal.SIGKILL)
        process.wait(KILLED_S)


def _file_system(root: Path, mounts: Mapping[str, Path], writable: bool, tmp_megabytes: int) -> list[str]:
    """Lines of a shell that has mounts of its own."""
    quoted = shlex.quote(str(root))
    folders = ["proc", "dev", "tmp", *(path.lstrip("/") for path in mounts)]
    lines = [f"mkdir -p {' '.join(shlex.quote(str(root / folder)) for folder in folders)}"]
    lines += [f"mount --bind {quoted} {quoted}", f"cd {quoted}", "mount -t proc proc proc"]
    lines += ["mount -t tmpfs -o mode=755,size=1m dev dev", "mkdir -m 1777 dev/shm"]
    lines += [f"touch dev/{device}; mount --bind /dev/{device} dev/{device}" for device in DEVICES]
    lines += [f"mount -t tmpfs -o mode=1777,size={tmp_megabytes}m tmp tmp"]
    for path, folder in mounts.items():
        inside = shlex.quote(path.lstrip("/"))
        lines += [f"mount --bind {shlex.quote(str(folder))} {inside}", f"mount -o remount,bind,ro {inside}"]
    if not writable:
        lines += [f"mount -o remount,bind,ro {quoted}"]
    return lines


def _buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout
