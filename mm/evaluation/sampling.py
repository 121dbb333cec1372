"""The numbers that all pictures of a call have in common."""

from __future__ import annotations

from dataclasses import dataclass

from mm.diffusion.guidance import EVERYWHERE
from mm.diffusion.sampler import SOLVERS, Solver
from mm.evaluation.given import real, shown, whole
from mm.fields import suggestion

MOST_STEPS = 10_000
MOST_GUIDANCE = 1_000  # either way: far above what draws anything, and float32 never overflows


@dataclass(frozen=True)
class Settings:
    """Raises ValueError where a number cannot work."""

    steps: int = 25
    guidance: float = 2.0
    solver: Solver = "euler"
    interval: tuple[float, float] = EVERYWHERE  # noise levels at which guidance acts
    strength: float = 0.7  # noise level at which a picture that begins at another one starts

    def __post_init__(self) -> None:
        if not whole(self.steps) or not 1 <= self.steps <= MOST_STEPS:
            self._refuse("steps", f"must be at least 1 and at most {MOST_STEPS:,}, a whole number")
        if not real(self.guidance) or abs(self.guidance) > MOST_GUIDANCE:
            self._refuse("guidance", f"must be a number up to {MOST_GUIDANCE:,}; 1 is no guidance")
        if not isinstance(self.solver, str) or self.solver not in SOLVERS:
            near = suggestion(str(self.solver)[:80], SOLVERS)
            self._refuse("solver", f"must be {', '.join(map(repr, SOLVERS))}{near}")
        if not real(self.strength) or not 0 < self.strength <= 1:
            self._refuse("strength", "must be above 0 and at most 1, which forgets the start")
        pair = self.interval
        if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(map(real, pair)):
            self._refuse("interval", "must be two noise levels, such as (0.2, 0.9)")
        if not 0 <= pair[0] < pair[1] <= 1:
            self._refuse("interval", "must be 0 <= low < high <= 1; (0, 1) guides everywhere")
        # numpy's numbers, and a list from JSON, as Python's own
        for name, kind in (("steps", int), ("guidance", float), ("strength", float)):
            object.__setattr__(self, name, kind(getattr(self, name)))
        object.__setattr__(self, "interval", (float(pair[0]), float(pair[1])))

    def _refuse(self, name: str, reason: str) -> None:
        raise ValueError(f"{name} = {shown(getattr(self, name))}: {reason}")
