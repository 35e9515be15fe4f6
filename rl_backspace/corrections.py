"""Correction synthesis: right answers with errors injected, deleted and mended.

A trace types a wrong continuation, presses delete until only what was right is left, and goes on. The loss
is on the deletes and on what is right, never on the wrong tokens: a model trained on those learns to err
(Physics of Language Models 2.2, Ye et al. 2024, arXiv:2408.16293, masks them for the same reason).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rl_backspace.semantics import Budget, Machine, Rules
from rl_backspace.tasks import Row, Task


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
class Mistake:
    """A wrong continuation, and the deletes that take it back."""

    tokens: list[int]
    presses: list[int]
    cost: int  # actions: the tokens, the deletes and what they took that has to be typed again


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
        late: most tokens typed after a wrong one before it is noticed; more where a delete takes more at once.
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
        """One example from a row; clean where there is no error to make or no budget for it."""
        gold = self.gold(row)
        mistakes = {} if rng.random() < self.clean or not self.rules.deletes else self._plan(row, gold, rng)
        machine, learn = Machine(self.rules, self.budget), []
        while machine.end is None:
            depth = len(machine.visible)
            mistake = mistakes[depth].pop() if mistakes.get(depth) else Mistake([], [], 0)
            right = [] if mistake.tokens else [gold[depth]]
            for action in (*mistake.tokens, *mistake.presses, *right):
                machine.step(action)
            learn += [False] * len(mistake.tokens) + [True] * len(mistake.presses + right)
        return Correction(machine.trace, learn)

    def _plan(self, row: Row, gold: list[int], rng: random.Random) -> dict[int, list[Mistake]]:
        """Depth -> the mistakes to make there; together they fit the budget."""
        planned: dict[int, list[Mistake]] = {}
        depths = list(range(len(gold)))
        actions = self.budget.most_actions - len(gold)
        deletes = actions if self.budget.deletes is None else self.budget.deletes
        for _ in range(rng.randint(1, self.errors)):
            mistake = None
            while mistake is None and depths:
                depth = rng.choice(depths)
                mistake = self._mistake(row, gold, depth, planned.get(depth, []), (actions, deletes), rng)
                if mistake is None:
                    depths.remove(depth)
                else:
                    planned.setdefault(depth, []).append(mistake)
                    actions -= mistake.cost
                    deletes -= len(mistake.presses)
        return planned

    def _mistake(
        self,
        row: Row,
        gold: list[int],
        depth: int,
        made: list[Mistake],
        room: tuple[int, int],
        rng: random.Random,
    ) -> Mistake | None:
        """A wrong token and perhaps some more, that can be taken back within `room`: actions and deletes."""
        at_once = max((unit for unit in self.rules.deletes.values() if isinstance(unit, int)), default=1)
        fits = self.budget.answer - 1 - depth
        usual = 1 + min(self.late, len(gold) - 1 - depth)
        lengths = list(range(1, min(max(usual, at_once), fits) + 1))
        rng.shuffle(lengths)
        lengths.sort(key=lambda length: length > usual)
        wrong = self._wrong(row, gold[:depth], {mistake.tokens[0] for mistake in made}, rng) if lengths else None
        if wrong is None:
            return None
        tail = [rng.choice(self.alphabet) for _ in lengths]
        for length in lengths:
            tokens = [wrong, *tail[: length - 1]]
            presses, left = self._take_back(gold[:depth], tokens)
            mistake = Mistake(tokens, presses, length + len(presses) + depth - left)
            again = left < depth and self.rules.retry == "ban"  # what was right would be banned
            if not again and mistake.cost <= room[0] and len(presses) <= room[1]:
                return mistake
        return None

    def _wrong(self, row: Row, right: list[int], taken: set[int], rng: random.Random) -> int | None:
        """A token after which the answer can no longer come right, or None if there is none to type."""
        for token in self._candidates(rng):
            if token not in taken and not self.task.alive(row, self.text([*right, token])):
                return token
        return None

    def _candidates(self, rng: random.Random) -> Iterator[int]:
        """Every token of the alphabet in random order; of a large one, a few draws first: one will do, mostly."""
        for _ in range(8 if len(self.alphabet) > 64 else 0):
            yield rng.choice(self.alphabet)
        yield from rng.sample(self.alphabet, len(self.alphabet))

    def _take_back(self, right: list[int], wrong: list[int]) -> tuple[list[int], int]:
        """The deletes that take back all that is wrong, and how many tokens they leave."""
        machine = Machine(self.rules, self.budget, visible=[*right, *wrong])
        presses = []
        while len(machine.visible) > len(right):
            presses.append(self._press(machine, len(right)))
            del machine.visible[machine.target(self.rules.deletes[presses[-1]]) :]
        return presses, len(machine.visible)

    def _press(self, machine: Machine, depth: int) -> int:
        """The delete that takes most without going behind `depth`; failing that, the one that takes least."""
        targets = {token: machine.target(unit) for token, unit in self.rules.deletes.items()}
        within = {token: target for token, target in targets.items() if target >= depth}
        return min(within, key=within.__getitem__) if within else max(targets, key=targets.__getitem__)
