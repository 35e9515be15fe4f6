"""Correction synthesis: right answers with errors injected, deleted and mended.

A trace types a wrong continuation, presses delete until only what was right is left, and goes on. The loss
is on the deletes and on what is right, never on the wrong tokens: a model trained on those learns to err
(Physics of Language Models 2.2, Ye et al. 2024, arXiv:2408.16293, masks them for the same reason).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rl_backspace.semantics import Budget, Machine, Rules
from rl_backspace.tasks import Row, Task


class Tokenizer(Protocol):
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Correction:
    """One training example.

    Attributes:
        actions: the trace.
        learn: per action, whether the loss counts it; False on every wrong token.
    """

    actions: list[int]
    learn: list[bool]


@dataclass(frozen=True)
class Corrector:
    """Turns rows of a task into corrections.

    Args:
        task: whose `alive` tells an error from another right way.
        gold: row -> token ids of its reference answer, the end-of-sequence token included.
        text: visible token ids -> text, to ask the task.
        alphabet: token ids that wrong continuations are drawn from.
        clean: share of examples without an error.
        errors: most errors in an example.
        late: most tokens typed after a wrong one before it is noticed.
    """

    task: Task
    rules: Rules
    budget: Budget
    gold: Callable[[Row], list[int]]
    text: Callable[[list[int]], str]
    alphabet: Sequence[int]
    clean: float = 0.5
    errors: int = 2
    late: int = 2

    def make(self, row: Row, rng: random.Random) -> Correction:
        """One example from a row; clean where the budget leaves no room for an error."""
        gold = self.gold(row)
        writer = _Writer(Machine(self.rules, self.budget))
        planned = 0 if rng.random() < self.clean else rng.randint(1, self.errors)
        places = [rng.randrange(len(gold)) for _ in range(planned)] if self.rules.deletes else []
        while writer.machine.end is None:
            depth = len(writer.machine.visible)
            if depth in places:
                places.remove(depth)
                self._err(writer, row, gold, rng)
            else:
                writer.type(gold[depth], learn=True)
        return Correction(writer.machine.trace, writer.learn)

    def _err(self, writer: _Writer, row: Row, gold: list[int], rng: random.Random) -> None:
        """Type a wrong token and perhaps some more, then delete back to what was right."""
        machine = writer.machine
        depth = len(machine.visible)
        length = 1 + rng.randint(0, min(self.late, max(0, len(gold) - 1 - depth)))
        length = min(length, self.budget.answer - 1 - depth)
        # each wrong token costs itself and at most one delete; then the answer must still fit
        room = self.budget.most_actions - len(machine.trace) - len(gold) + depth
        if length < 1 or room < 2 * length + depth:
            return
        wrong = self._wrong(machine, row, rng)
        if wrong is None:
            return
        writer.type(wrong, learn=False)
        for _ in range(length - 1):
            writer.type(rng.choice(self.alphabet), learn=False)
        while len(machine.visible) > depth:
            writer.type(self._press(machine, depth), learn=True)

    def _wrong(self, machine: Machine, row: Row, rng: random.Random) -> int | None:
        """A token after which the answer can no longer come right, or None if there is none to type."""
        banned = set(machine.illegal())
        for token in rng.sample(list(self.alphabet), len(self.alphabet)):
            if token not in banned and not self.task.alive(row, self.text([*machine.visible, token])):
                return token
        return None

    def _press(self, machine: Machine, depth: int) -> int:
        """The delete that takes most without going behind `depth`; failing that, the one that takes least."""
        targets = {token: machine.target(unit) for token, unit in self.rules.deletes.items()}
        within = {token: target for token, target in targets.items() if target >= depth}
        return min(within, key=within.__getitem__) if within else max(targets, key=targets.__getitem__)


class _Writer:
    def __init__(self, machine: Machine):
        self.machine = machine
        self.learn: list[bool] = []

    def type(self, token: int, learn: bool) -> None:
        self.machine.step(token)
        self.learn.append(learn)
