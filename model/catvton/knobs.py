"""What may be traded for speed, and the named trades."""

from __future__ import annotations

import math
from dataclasses import dataclass

from model import interface

SOLVERS = ("ddim", "dpm++", "unipc")


@dataclass(frozen=True)
class Knobs:
    """How far a call may depart from the exact computation. The defaults are the exact computation.

    Attributes:
        solver: "ddim", the published one; "dpm++" (DPM-Solver++ 2M) or "unipc" (UniPC), which are deterministic and
            want fewer steps.
        guided_share: the first share of the steps that are guided, 0-1; the others show the garment alone.
        person_only_unconditional: the unconditional branch sees the person's half alone.
        garment_interval: the garment's half is computed in every so many steps, and reused in between; above 1 it
            needs a height whose latents can be halved at every level of the UNet.
        deep_interval: all layers below the last are computed in every so many steps, and reused in between.
    Raises:
        ValueError: a value is out of range, or both halves of a step would be reused at once.
    """

    solver: str = "ddim"
    guided_share: float = 1.0
    person_only_unconditional: bool = False
    garment_interval: int = 1
    deep_interval: int = 1

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise ValueError(f"unknown solver {self.solver!r}; one of: {', '.join(SOLVERS)}")
        if not 0 <= self.guided_share <= 1:
            raise ValueError(f"guided_share must be between 0 and 1, not {self.guided_share!r}")
        if self.garment_interval < 1 or self.deep_interval < 1:
            raise ValueError("an interval must be at least 1")
        if self.garment_interval > 1 and self.deep_interval > 1:
            raise ValueError("garment_interval and deep_interval exclude each other")

    def guided_steps(self, steps: int) -> int:
        """How many of so many steps are guided."""
        return math.ceil(round(self.guided_share * steps, 9))  # 0.07 * 100 is a little more than 7


EXACT = Knobs()
QUALITIES = {
    interface.EXACT: EXACT,
    interface.BALANCED: Knobs(deep_interval=2),
    interface.FAST: Knobs(solver="dpm++", deep_interval=2),
}
