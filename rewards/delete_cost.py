"""What deleting costs, each press where it happens. Range: minus infinity to 0.

All prices rise on one schedule: `rise` is the share of training over which they go from 0 to full in a straight
line; 0: full from the start. A price that is there before deleting pays teaches never to delete.

Abuse: too high a cost teaches never to delete, and none at all leaves deleting for ever unpunished; keep the
cost of a usual correction well below what a right answer pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rl_backspace.rewards._walk import walk
from rl_backspace.semantics import Rules


def flat(
    actions: Sequence[Sequence[int]],
    rules: Rules,
    trainer_state: Any = None,
    cost: float = 0.01,
    rise: float = 0.5,
    **_: Any,
) -> list[list[float]]:
    """`-cost` at each press of a delete token, however much it takes away.

    Abuse: where one token takes more than another, the one that takes the most is the cheapest way back.
    """
    price = cost * _risen(trainer_state, rise)
    return [[-price if action in rules.deletes else 0.0 for action in trace] for trace in actions]


def per_token(
    actions: Sequence[Sequence[int]],
    rules: Rules,
    trainer_state: Any = None,
    cost: float = 0.01,
    rise: float = 0.5,
    **_: Any,
) -> list[list[float]]:
    """`-cost` at each press for each token that it took away: the way back costs the same whichever token goes it.

    In all, `cost` times the tokens that were typed and are not visible in the end; as `flat` where each press takes
    one, and more elsewhere.
    """
    price = cost * _risen(trainer_state, rise)
    return [[-price * taken for taken in _taken(trace, rules)] for trace in actions]


def progressive(
    actions: Sequence[Sequence[int]],
    rules: Rules,
    trainer_state: Any = None,
    cost: float = 0.01,
    growth: float = 1.2,
    most: float = 0.1,
    rise: float = 0.5,
    **_: Any,
) -> list[list[float]]:
    """`-min(most, cost * growth**(k-1))` at the k-th press of a rollout: corrections are cheap, long searches dear.

    By default the 14th press and all that follow cost the most. With a growth of 1, and `most` no less than `cost`,
    it is `flat`.

    Abuse: whoever has pressed often is better off giving up, unless `most` times the presses of another correction
    stays well below what a right answer pays.
    """
    risen = _risen(trainer_state, rise)
    return [[-risen * price for price in _prices(trace, rules, cost, growth, most)] for trace in actions]


def _taken(trace: Sequence[int], rules: Rules) -> list[int]:
    """How many tokens each action took away; 0 for one that was typed."""
    lengths = [len(machine.visible) for machine in walk(trace, rules)]
    return [max(0, before - after) for before, after in pairwise(lengths)]


def _prices(trace: Sequence[int], rules: Rules, cost: float, growth: float, most: float) -> list[float]:
    """The price of each action, fully risen; 0 for one that was typed."""
    out = []
    for action in trace:
        if action in rules.deletes:
            out.append(min(most, cost))
            cost *= growth  # infinity in the end, where a power would be an error
        else:
            out.append(0.0)
    return out


def _risen(trainer_state: Any, rise: float) -> float:
    """How far the schedule has risen, 0 to 1; 1 outside training."""
    if trainer_state is None or rise <= 0 or not trainer_state.max_steps:
        return 1.0
    return min(1.0, trainer_state.global_step / (rise * trainer_state.max_steps))
