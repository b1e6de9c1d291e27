"""Runs the RunPod worker with the painter for an engine, whose faults include one that is the device's end."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.remove(str(Path(__file__).resolve().parent))  # what lies here is not to be taken for anybody's modules

from container.runpod_handler import main
from model import ENGINES
from model.interface import DeviceFailed
from tests.faults import painter

if __name__ == "__main__":
    ENGINES["stand-in"] = painter.__name__
    painter.FAULTS["device"] = lambda: DeviceFailed("CUDA error: an illegal memory access was encountered")
    sys.exit(main())
