"""Runs the production server on the test's network, with the stand-in engine in the registry of engines.

With `FAULTS_INJECT` set, the real engine fails as the folder `FAULTS_CONTROL` says, at the call into its pipeline.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.faults import network

INJECT = "FAULTS_INJECT"


def main() -> int:
    """What `container/serve` does, on another network."""
    network.install(network.World(**json.loads(os.environ[network.WORLD])))
    from container.server import main as serve
    from model import ENGINES

    ENGINES["stand-in"] = "tests.faults.painter"
    if INJECT in os.environ:
        from tests.faults import injection

        injection.install(Path(os.environ["FAULTS_CONTROL"]))
    return serve()


if __name__ == "__main__":
    sys.exit(main())
