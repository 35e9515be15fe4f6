"""A penalty for going round in circles. Range: minus infinity to 0.

Abuse: under `retry: ban` a deleted token cannot be typed again at once, so little is left to punish; longer
loops still are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_backspace.semantics import Machine, Rules, unlimited


def repeats(actions: Sequence[Sequence[int]], rules: Rules, penalty: float = 0.05, **_: Any) -> list[float]:
    """`-penalty` for each time a visible sequence is typed that was deleted before: the loop's own steps.

    A correction types something new after its deletes and pays nothing; typing the same again pays once for
    each token typed again.
    """
    return [-penalty * _repeats(trace, rules) for trace in actions]


def _repeats(trace: Sequence[int], rules: Rules) -> int:
    machine = Machine(rules, unlimited(trace))
    seen: set[tuple[int, ...]] = set()
    count = 0
    for action in trace:
        machine.step(action)
        if action in rules.deletes:
            continue
        state = tuple(machine.visible)
        count += state in seen
        seen.add(state)
    return count
