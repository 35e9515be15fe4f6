"""What several rewards share: following a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rl_backspace.semantics import Machine, Rules, unlimited


def walk(trace: Sequence[int], rules: Rules) -> Iterator[Machine]:
    """The machine before the first action, then after each; the same object, so take from it what you keep."""
    machine = Machine(rules, unlimited(trace))
    yield machine
    for action in trace:
        machine.step(action)
        yield machine


def visibles(trace: Sequence[int], rules: Rules) -> list[tuple[int, ...]]:
    """What was visible before the first action, then after each: one more than there are actions."""
    return [tuple(machine.visible) for machine in walk(trace, rules)]


def without_end(visible: Sequence[int], rules: Rules) -> Sequence[int]:
    """What is visible, without the end-of-sequence token."""
    return visible[:-1] if visible and visible[-1] in rules.eos else visible


def liveness(task: Any, decode: Callable[[list[int]], str]) -> Callable[[Mapping[str, Any], tuple[int, ...]], bool]:
    """(row, visible token ids) -> whether the task says that it can still come right; each is asked about once.

    A row is known by its identity: keep the rows for as long as the function.
    """
    known: dict[tuple[int, tuple[int, ...]], bool] = {}

    def alive(row: Mapping[str, Any], visible: tuple[int, ...]) -> bool:
        key = (id(row), visible)
        if key not in known:
            known[key] = bool(task.alive(row, decode(list(visible))))
        return known[key]

    return alive
