"""Penalties for going round in circles, each where it happens. Range: minus infinity to 0, `-penalty` or 0 an action.

Let v_0 be the empty answer and v_t what is visible after action t = 1, 2, ...; a delete token of any unit is one
action. The penalty is on action t

    repeats        if it is typed, and v_t = v_s for some 0 <= s < t
    oscillations   if it is a delete and the one before is not, and more than `free` of the actions 1..t are so
    states         if v_t = v_s for at least `free` of 0 <= s < t

Only what is visible counts, so the same trace pays the same for each memory and retry. Under `erase` a sequence that
stands again is the very context that the model had before; under `hint` and `keep` it can see that it has been there,
and pays as well.

How they relate, in penalties of one rollout:
- repeats <= the tokens that deletes took away. With `retry: ban` it is 0 always: a deleted sequence cannot be typed
  again, since its first token that went is banned for as long as those before it stand, and so on down to the first.
- oscillations <= presses of a delete token, less `free`.
- states <= repeats + presses, and equal with `free: 1`. With `free: 2` and `ban` it is the presses that come back to
  where an earlier one came back to: the third try at a place.
- None is at most another. With `free: 2` and ⌫ for the delete token, `5⌫5` pays repeats alone, `5⌫6⌫7` states alone,
  and `5 6⌫7 8⌫9 5⌫` oscillations alone.

Abuse: whoever never deletes pays nothing, so too high a penalty teaches that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from rl_backspace.rewards._walk import walk
from rl_backspace.semantics import Rules


def repeats(actions: Sequence[Sequence[int]], rules: Rules, penalty: float = 0.05, **_: Any) -> list[list[float]]:
    """`-penalty` each time that a visible sequence is typed that stood before and was deleted.

    A correction types something new after its deletes and pays nothing; typing the same again pays once for each
    token typed again, also for right ones that a delete of several tokens took along.

    Abuse: going round by way of ever new wrong tokens pays nothing; `states` sees it.
    """
    return [
        [
            _pay(penalty, before > 0 and action not in rules.deletes)
            for action, before in zip(trace, _stood(trace, rules), strict=True)
        ]
        for trace in actions
    ]


def oscillations(
    actions: Sequence[Sequence[int]], rules: Rules, penalty: float = 0.05, free: int = 2, **_: Any
) -> list[list[float]]:
    """`-penalty` at the first delete of each run of deletes beyond the first `free`: typing and deleting in turns.

    Abuse: one run that takes back far more than it must counts once. Under `ban` a search is typing and deleting in
    turns, and right ones pay too: raise `free`.
    """
    return [[_pay(penalty, run > free) for run in _runs(trace, rules)] for trace in actions]


def states(
    actions: Sequence[Sequence[int]], rules: Rules, penalty: float = 0.05, free: int = 2, **_: Any
) -> list[list[float]]:
    """`-penalty` for each action after which that is visible which stood `free` times before, or more.

    Once it is typed, once deleting comes back to it: a correction. More is a loop. The empty answer stands once
    before the first action.

    Abuse: a delete of several tokens steps over what lies between, which then does not stand again. A search that
    tries a third token at a place pays too: `free` says how many tries are fair.
    """
    return [[_pay(penalty, before >= free) for before in _stood(trace, rules)] for trace in actions]


def _pay(penalty: float, due: bool) -> float:
    return -penalty if due else 0.0


def _stood(trace: Sequence[int], rules: Rules) -> list[int]:
    """How often what is visible after each action has stood before."""
    numbers: dict[tuple[int, int], int] = {}  # (number of a sequence, next token) -> number of the longer one
    path = [0]  # the numbers of all that the visible sequence starts with, from the empty one to itself
    visits = Counter(path)
    out = []
    machines = walk(trace, rules)
    next(machines)
    for action, machine in zip(trace, machines, strict=True):
        del path[len(machine.visible) + 1 :]
        if action not in rules.deletes:
            path.append(numbers.setdefault((path[-1], action), len(numbers) + 1))
        out.append(visits[path[-1]])
        visits[path[-1]] += 1
    return out


def _runs(trace: Sequence[int], rules: Rules) -> list[int]:
    """At the first delete of each run of deletes, its number, from 1; 0 elsewhere."""
    deletes = [action in rules.deletes for action in trace]
    starts = [now and not before for before, now in pairwise([False, *deletes])]
    return [number * start for number, start in zip(accumulate(starts), starts, strict=True)]
