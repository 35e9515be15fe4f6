"""What length costs. Range: minus infinity to 0.

Abuse: answers that are cut short, or none at all; keep the cost of a usual answer well below what a right one pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_backspace.rewards._walk import without_end
from rl_backspace.semantics import Rules


def over(
    completion_ids: Sequence[Sequence[int]], rules: Rules, limit: int = 64, cost: float = 0.01, **_: Any
) -> list[float]:
    """`-cost` for each visible token beyond `limit`; the end-of-sequence token does not count.

    Abuse: what was deleted is free; `actions` counts it.
    """
    return [-cost * max(0, len(without_end(visible, rules)) - limit) for visible in completion_ids]


def actions(actions: Sequence[Sequence[int]], cost: float = 0.001, **_: Any) -> list[list[float]]:
    """`-cost` for each action, deletes and the end-of-sequence token included: a price of compute.

    Abuse: a token that is taken back costs twice, so too high a cost teaches never to delete, as `delete_cost` does.
    """
    return [[-cost] * len(trace) for trace in actions]
