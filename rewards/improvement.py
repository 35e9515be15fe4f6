"""A bonus for mending. Farmable on purpose: it is there for `rl-backspace rewards audit` to catch, never to train on.

Err, delete, be paid, and again: a policy learns to make errors for the sake of deleting them. What to use instead:
`correctness`, which pays for mending as it is, since errors that stay are not right; and to pay where it happens,
`shaping:progress`, which takes at the error what it gives at the delete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from rl_backspace.rewards._walk import liveness, visibles
from rl_backspace.semantics import Rules


def bonus(
    actions: Sequence[Sequence[int]],
    rules: Rules,
    rows: Sequence[dict[str, Any]],
    task: Any,
    decode: Callable[[list[int]], str],
    bonus: float = 0.1,
    **_: Any,
) -> list[list[float]]:
    """`bonus` at each delete that turns what can no longer come right into what can (`task.alive`).

    Range: 0 to `bonus` times the presses. Abuse: see above; without a cost of deleting it has no end but the budget.
    """
    alive = liveness(task, decode)
    return [
        [
            bonus if len(after) < len(before) and alive(row, after) and not alive(row, before) else 0.0
            for before, after in pairwise(visibles(trace, rules))
        ]
        for trace, row in zip(actions, rows, strict=True)
    ]
