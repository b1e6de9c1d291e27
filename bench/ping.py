"""How long /ping takes while the real process makes pictures on every core."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import click
import requests

from bench.files import end_of, json_option, write_report
from deploy.demo import image_host, png, serving
from deploy.local_container import ContainerFailed
from model.embedded import demo_pictures

PAUSE_S = 0.02


@click.command()
@click.option("--seconds", type=click.FloatRange(1), default=10.0, show_default=True, help="How long to ping.")
@click.option(
    "--steps", type=click.IntRange(1, 100), default=20, show_default=True, help="Denoising steps of each picture."
)
@json_option()
def main(seconds: float, steps: int, json_path: Path | None) -> None:
    """Pings a container process with the embedded model that is never idle; prints percentiles in milliseconds."""
    files = {f"{name}.png": png(picture) for name, picture in demo_pictures().items()}
    with tempfile.TemporaryDirectory() as kept, image_host(files) as host:
        environ = {"VTON_OUTPUT_DIR": kept, "VTON_TRUSTED_HOSTS": host, "VTON_STEPS": str(steps)}
        log = Path(kept) / "serve.log"
        try:
            with serving(environ, log) as url:
                figures = _measure(url, host, seconds)
        except ContainerFailed as exc:
            raise click.ClickException(f"the service did not become ready; its log ends with\n{end_of(log)}") from exc
    print(json.dumps(figures, indent=2))
    write_report(json_path, figures)


def _measure(url: str, host: str, seconds: float) -> dict[str, float]:
    ends = time.monotonic() + seconds
    made: list[int] = []

    def keep_busy() -> None:
        while time.monotonic() < ends:
            request = {
                **{f"{role}_image_url": f"http://{host}/{role}.png" for role in ("person", "mask")},
                **{f"{role}_cloth_url": f"http://{host}/{role}.png" for role in ("upper", "lower")},
                "userId": "bench",
                "timestamp": f"t{len(made)}",
            }
            made.append(requests.post(f"{url}/invocations", json=request, timeout=120).status_code)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    times_ms = []
    with requests.Session() as session:
        while time.monotonic() < ends:
            began = time.monotonic()
            session.get(f"{url}/ping", timeout=5).raise_for_status()
            times_ms.append(1000 * (time.monotonic() - began))
            time.sleep(PAUSE_S)
    busy.join()
    quantiles = statistics.quantiles(times_ms, n=100)
    return {
        "cores": os.cpu_count() or 0,
        "pings": len(times_ms),
        "pictures": made.count(200),
        "p50_ms": round(quantiles[49], 1),
        "p99_ms": round(quantiles[98], 1),
        "max_ms": round(max(times_ms), 1),
    }


if __name__ == "__main__":
    main()
