"""Prints what an image consists of, in MB on disk; its own size is what is neither base nor torch."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from engine import Image

TORCH = ("torch", "torch-", "torchgen", "functorch", "nvidia", "triton")  # how its packages' folders begin
PARTS = {"opt/python": "Python", "opt/venv": "libraries", "opt/app": "service", "opt/weights": "weights"}
FOREIGN = ("base", "torch")


def part_of(path: str) -> str:
    """Which part of the image a file belongs to, by its path below the root."""
    _, packages, inside = path.partition("/site-packages/")
    if path.startswith("opt/venv/") and packages and inside.startswith(TORCH):
        return "torch"
    return next((part for folder, part in PARTS.items() if path.startswith(f"{folder}/")), "base")


def sizes(root: Path) -> Counter[str]:
    """Bytes on disk by part."""
    found: Counter[str] = Counter()
    for path in root.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            found[part_of(path.relative_to(root).as_posix())] += path.lstat().st_blocks * 512
    return found


if __name__ == "__main__":
    for name in sys.argv[1:]:
        found = sizes(Image.named(name).root)
        own = sum(size for part, size in found.items() if part not in FOREIGN)
        told = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in found.most_common())
        sys.stdout.write(f"{name}: {own / 1e6:,.0f} MB without base and torch ({told})\n")
