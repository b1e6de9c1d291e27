"""Starts processes that need torch without importing it anew for each: this process has it, and forks.

One JSON object a line on stdin, {"script", "arguments", "environ", "log", "user"}, starts a process that runs the
script as Python would; a line {"started": pid} or {"ended": pid, "status": exit status} on stdout answers.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import sys
import traceback
import warnings
from importlib import import_module
from typing import Any

POLL_S = 0.05


def main() -> None:
    """Reads orders until stdin ends."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore", "User provided device_type of 'cuda'", UserWarning)
    for needed in ("container.server", "model.catvton.engine", "model.embedded.parser"):
        import_module(needed)

    unread = b""
    _say({"ready": os.getpid()})
    while True:
        _report_ends()
        if not select.select([0], [], [], POLL_S)[0]:
            continue
        received = os.read(0, 65536)
        if not received:
            return
        *orders, unread = (unread + received).split(b"\n")
        for order in orders:
            _say({"started": _start(json.loads(order))})


def _start(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = _run(order)
    finally:
        os._exit(status)
    return 0


def _run(order: dict[str, Any]) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDWR)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(order["environ"])
    sys.argv = [order["script"], *order["arguments"]]
    try:
        runpy.run_path(order["script"], run_name="__main__")
    except SystemExit as exc:
        if isinstance(exc.code, int) or exc.code is None:
            return exc.code or 0
        sys.stderr.write(f"{exc.code}\n")
    except BaseException:
        traceback.print_exc()
    else:
        return 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 1


def _report_ends() -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else -os.WTERMSIG(status)
        _say({"ended": pid, "status": code})


def _say(what: dict[str, int]) -> None:
    os.write(1, (json.dumps(what) + "\n").encode())


if __name__ == "__main__":
    main()
