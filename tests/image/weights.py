"""Writes the tiny model of the tests in the published layout, recorded, for the target that carries its weights."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from catvton_recipe import write_published_layout

from model import weights

folder = Path(sys.argv[1])
if not folder.exists():
    weights.verify(write_published_layout(folder, "quick"), "catvton", "mix")
