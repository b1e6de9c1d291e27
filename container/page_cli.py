"""`vton demo --web`."""

from __future__ import annotations

import os
import socket
import sys
import time
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import click
import httpcore

from container.settings import ALL_INTERFACES, Settings, SettingsError
from model.interface import EMBEDDED

# Where it is nearest to the truth (`bench.quality`).
EMBEDDED_DEFAULTS = {"VTON_STEPS": "8", "VTON_GUIDANCE": "1"}
# For one person before a page, who can cancel: on a CPU the published weights take many minutes.
DEFAULTS = {"VTON_HOST": "127.0.0.1", "VTON_PORT": "8000", "VTON_DEADLINE_S": "3600"}
EXIT_SETTINGS = 78  # sysexits: configuration
SERVED_LIMIT_S, POLL_S = 60.0, 0.2


def serve_page(host: str | None, port: int | None, *, browser: bool) -> None:
    """Serves the page, the REST door and the SageMaker door until SIGTERM or Ctrl-C; ends the process.

    Args:
        host: address to listen on; by default VTON_HOST, else this machine only.
        port: by default VTON_PORT, else 8000.
        browser: open the page in one.
    """
    from container.server import main as serve_main

    environ = {**DEFAULTS, **os.environ, "VTON_REST": "1"}
    if environ.get("VTON_WEIGHTS", EMBEDDED) == EMBEDDED and "NUM_STEP" not in environ:
        environ = {**EMBEDDED_DEFAULTS, **environ}
    if not {"VTON_BUCKET", "VTON_OUTPUT_DIR"} & environ.keys():
        environ["VTON_OUTPUT_DIR"] = "vton_output"
    environ.update({f"VTON_{name}": str(value) for name, value in (("HOST", host), ("PORT", port)) if value})
    try:
        settings = Settings.from_env(environ)
        _refuse_unless_free(settings.host, settings.port)
    except (SettingsError, OSError) as exc:
        click.echo(f"start refused: {exc}", err=True)
        sys.exit(EXIT_SETTINGS)
    url = page_url(settings.host, settings.port)
    click.echo(f"the page is at {url} as soon as the process listens; Ctrl-C ends it", err=True)
    if browser:
        ThreadPoolExecutor(1, "browser").submit(_open_when_served, url)
    sys.exit(serve_main(environ, page=True))


def page_url(host: str, port: int) -> str:
    """Where a browser on this machine finds the page of a process that listens there."""
    reached = "127.0.0.1" if host in (ALL_INTERFACES, "::") else host
    return f"http://[{reached}]:{port}/" if ":" in reached else f"http://{reached}:{port}/"


def _refuse_unless_free(host: str, port: int) -> None:
    """Raises OSError where somebody else listens: the browser would open their page."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family):
        pass


def _open_when_served(url: str) -> None:
    ends = time.monotonic() + SERVED_LIMIT_S
    while time.monotonic() < ends:
        with suppress(httpcore.NetworkError, httpcore.TimeoutException):
            httpcore.request("GET", url)
            webbrowser.open(url)
            return
        time.sleep(POLL_S)
