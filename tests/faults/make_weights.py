"""Writes tiny weights in the published layout to a folder: whole and recorded, or with something wrong.

Arguments: what, folder. The name of the tensor that is at fault goes to the file `key` of the folder.
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any, Callable

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from model import weights
from model.maskers.published import PUBLISHED
from tests.catvton_recipe import write_published_layout

VAE = "sd-vae-ft-mse/diffusion_pytorch_model.safetensors"
KEY, EXTRA = "decoder.conv_out.bias", "decoder.conv_extra.bias"
Tensors = dict[str, torch.Tensor]
WRONG: dict[str, tuple[str, Callable[[Tensors], object]]] = {
    "extra-key": (EXTRA, lambda tensors: tensors.update({EXTRA: torch.zeros(3)})),
    "missing-key": (KEY, lambda tensors: tensors.pop(KEY)),
    "wrong-shape": (KEY, lambda tensors: tensors.update({KEY: torch.zeros(7)})),
    "wrong-dtype": (KEY, lambda tensors: tensors.update({KEY: tensors[KEY].to(torch.int64)})),
}


class Evil:
    """Unpickled, it runs a command."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._canary}",)


def main() -> None:
    """Writes what was asked for."""
    what, folder = sys.argv[1], Path(sys.argv[2])
    write_published_layout(folder, "quick")
    if what in WRONG:
        key, change = WRONG[what]
        tensors = load_file(folder / VAE)
        change(tensors)
        save_file(tensors, folder / VAE)
        (folder / "key").write_text(key)
    elif what == "evil":
        for name in PUBLISHED:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            evil = {"state_dict": Evil(folder / "canary")}
            if file.suffix == ".pkl":
                file.write_bytes(pickle.dumps(evil))
            else:
                torch.save(evil, file)
    weights.verify(folder, "catvton", "mix")  # at first sight it writes the record


if __name__ == "__main__":
    main()
