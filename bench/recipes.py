"""The ways to make a picture faster that are counted, timed and judged."""

from __future__ import annotations

from dataclasses import dataclass

from model.catvton import published
from model.catvton.knobs import EXACT, QUALITIES, Knobs
from model.interface import BALANCED, FAST, FAST_STEPS

FULL_STEPS = 50  # the published default
MOST_STEPS: int = published.SCHEDULER_CONFIG["num_train_timesteps"] - published.SCHEDULER_CONFIG["steps_offset"]
GUIDANCE = 2.5  # the published default; any value above 1 runs both branches
LONGEST_CYCLE = 200  # steps


@dataclass(frozen=True)
class Recipe:
    """One way to make a picture.

    Attributes:
        name: as a report calls it.
        knobs: of the pipeline.
        guided: whether guidance is on.
        steps: where a picture takes as many as it always does.
    """

    name: str
    knobs: Knobs
    guided: bool = True
    steps: int = FULL_STEPS

    @property
    def guidance(self) -> float:
        """The scale; 1 turns it off."""
        return GUIDANCE if self.guided else 1.0


EXACTLY = Recipe("exact", EXACT)
SINGLE = (
    Recipe("no guidance", EXACT, guided=False),
    *(Recipe(f"guided share {share:g}", Knobs(guided_share=share)) for share in (0.75, 0.5, 0.3)),
    Recipe("person-only unconditional", Knobs(person_only_unconditional=True)),
    *(Recipe(f"garment interval {steps}", Knobs(garment_interval=steps)) for steps in (2, 3, 5)),
    *(Recipe(f"deep interval {steps}", Knobs(deep_interval=steps)) for steps in (2, 3, 5)),
)
SOLVERS = tuple(Recipe(solver, Knobs(solver=solver)) for solver in ("dpm++", "unipc"))  # as many steps, no fewer
COMBINED = (
    Recipe("guided share 0.5, person-only", Knobs(guided_share=0.5, person_only_unconditional=True)),
    *(
        Recipe(f"garment interval {steps}, person-only", Knobs(garment_interval=steps, person_only_unconditional=True))
        for steps in (2, 3, 5)
    ),
    *(
        Recipe(f"guided share {share:g}, deep interval {steps}", Knobs(guided_share=share, deep_interval=steps))
        for share, steps in ((0.75, 2), (0.5, 2), (0.5, 3))
    ),
)
NAMED = (
    Recipe(BALANCED, QUALITIES[BALANCED]),
    Recipe(FAST, QUALITIES[FAST], steps=FAST_STEPS),
)


def cycle_steps(knobs: Knobs) -> int:
    """The shortest schedule in which every knob goes through whole cycles, guided and not."""
    interval = max(knobs.garment_interval, knobs.deep_interval)
    for steps in range(interval, LONGEST_CYCLE, interval):
        guided = knobs.guided_share * steps
        if abs(guided - round(guided)) < 1e-9 and round(guided) % interval == 0:
            return steps
    return LONGEST_CYCLE
