"""What deleting costs. Range: minus infinity to 0.

Abuse: too high a cost teaches never to delete, and none at all leaves deleting for ever unpunished; keep the
cost of a usual correction well below what a right answer pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def flat(
    deletes: Sequence[int], trainer_state: Any = None, cost: float = 0.01, rise: float = 0.5, **_: Any
) -> list[float]:
    """`-cost` for each press of a delete token.

    Args:
        cost: price of one press, in units of reward.
        rise: share of training over which the price rises from 0 in a straight line; 0: full from the start.
            A price that is there before deleting pays teaches never to delete.
    """
    price = cost * progress(trainer_state, rise)
    return [-price * count for count in deletes]


def progress(trainer_state: Any, rise: float) -> float:
    """How far a schedule has risen, 0 to 1; 1 outside training."""
    if trainer_state is None or rise <= 0 or not trainer_state.max_steps:
        return 1.0
    return min(1.0, trainer_state.global_step / (rise * trainer_state.max_steps))
