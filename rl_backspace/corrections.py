"""Correction synthesis: answers with errors in them, deleted and mended.

An error begins as an *attempt*: an answer that goes wrong somewhere. Its last alive prefix is kept, the wrong
continuation is typed and taken back, and the answer is completed rightly. Attempts come from a ladder of sources:

    random      wrong tokens drawn from those that answers are made of
    early       a later part of a right answer, given too early (retry data of Physics of Language Models 2.2,
                Ye et al. 2024, arXiv:2408.16293)
    samples     the model's own answers, sampled with its token blocked
    uncertain   where the model's next token has much entropy, the likeliest wrong one and how it would go on
    rollouts    whole rollouts of the current policy, deletes included, every action labelled by the expert (DAgger)

The loss is on the deletes and on what is right, never on a wrong token: a model trained on those learns to err
(the same paper masks them for that reason). In rollouts, too, the label is what should have been done instead.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from rl_backspace.expert import Expert, Teacher
from rl_backspace.semantics import Machine

Source = Literal["random", "early", "samples", "uncertain", "rollouts"]
SOURCES: tuple[Source, ...] = get_args(Source)
FROM_MODEL: tuple[Source, ...] = ("samples", "uncertain", "rollouts")
"""The sources that ask the model, and are asked again as it changes."""


LONG = 64  # of an answer or an alphabet: then a few draws do, where otherwise everything is tried


@dataclass(frozen=True)
class Mistake:
    """A wrong continuation, and the deletes that take it back.

    Attributes:
        depth: how many right tokens stand before it.
        tokens: the wrong ones.
        presses: the deletes.
        cost: actions it takes: the tokens, the deletes and what they took that has to be typed again.
    """

    depth: int
    tokens: list[int]
    presses: list[int]
    cost: int


@dataclass(frozen=True)
class Correction:
    """One training example.

    Attributes:
        actions: the trace, which makes the contexts.
        targets: per action, what is to be learned in its context: the action itself, or in `rollouts` the expert's.
        learn: per action, whether the loss counts it; False on every wrong token of a mistake.
        source: where its errors come from; None: it has none.
        mistakes: the errors that were planted, in the order of their making; none are known of rollouts.
    """

    actions: list[int]
    targets: list[int]
    learn: list[bool]
    source: Source | None = None
    mistakes: list[Mistake] = field(default_factory=list)


@dataclass(frozen=True)
class Corrector:
    """Makes corrections.

    Args:
        teacher: makes the experts of rows.
        clean: share of examples without an error.
        errors: most errors in an example.
        late: most tokens typed after a wrong one before it is noticed; more where a delete takes more at once.
    """

    teacher: Teacher
    clean: float = 0.5
    errors: int = 2
    late: int = 2

    def make(
        self, expert: Expert, source: Source, rng: random.Random, attempts: Sequence[Sequence[int]] = ()
    ) -> Correction:
        """One example; clean where there is no error to make or no budget for it.

        Args:
            attempts: what the model did with this prompt, for the sources that ask it; of rollouts, the first is taken.
        """
        if rng.random() < self.clean or not self.teacher.rules.deletes:
            return self._write(expert.gold, [], None)
        if source == "rollouts":
            return relabel(expert, attempts[0], rng) if attempts else self._write(expert.gold, [], None)
        return self.plant(expert, source, rng.randint(1, self.errors), rng, attempts)

    def plant(
        self,
        expert: Expert,
        source: Source,
        count: int,
        rng: random.Random,
        attempts: Sequence[Sequence[int]] = (),
    ) -> Correction:
        """An example with `count` errors from a source, or as many as there are to make and fit the budget."""
        path, mistakes = self._plan(expert, source, count, rng, attempts)
        return self._write(path, mistakes, source if mistakes else None)

    def _write(self, path: list[int], mistakes: list[Mistake], source: Source | None) -> Correction:
        """The trace that types `path` and makes the mistakes on the way."""
        machine, learn = Machine(self.teacher.rules, self.teacher.budget), []
        waiting: dict[int, list[Mistake]] = {}
        for mistake in mistakes:
            waiting.setdefault(mistake.depth, []).append(mistake)
        made = []
        while machine.end is None:
            depth = len(machine.visible)
            wrong = presses = []
            if waiting.get(depth):
                made.append(waiting[depth].pop())
                wrong, presses = made[-1].tokens, made[-1].presses
            right = [] if wrong else [path[depth]]
            for action in (*wrong, *presses, *right):
                machine.step(action)
            learn += [False] * len(wrong) + [True] * len([*presses, *right])
        return Correction(machine.trace, machine.trace, learn, source, made)

    def _plan(
        self, expert: Expert, source: Source, count: int, rng: random.Random, attempts: Sequence[Sequence[int]]
    ) -> tuple[list[int], list[Mistake]]:
        """A right answer and mistakes to make on the way, which together fit the budget."""
        path, mistakes = expert.gold, list[Mistake]()
        deletes = self.teacher.budget.deletes
        for _ in range(count if self.teacher.rules.deletes else 0):
            actions = self.teacher.budget.most_actions - len(path) - sum(mistake.cost for mistake in mistakes)
            presses = actions if deletes is None else deletes - sum(len(mistake.presses) for mistake in mistakes)
            for attempt in self._attempts(expert, source, path, rng, attempts):
                planned = self._mistake(expert, attempt, path, mistakes, (actions, presses), rng)
                if planned is not None:
                    path = planned[0]
                    mistakes.append(planned[1])
                    break
            else:
                break
        return path, mistakes

    def _attempts(
        self,
        expert: Expert,
        source: Source,
        path: list[int],
        rng: random.Random,
        attempts: Sequence[Sequence[int]],
    ) -> Iterator[Sequence[int]]:
        """Answers that may go wrong, in random order."""
        if source == "random":
            for depth in rng.sample(range(len(path)), len(path)):
                for token in _shuffled(self.teacher.alphabet, rng):
                    if not expert.alive([*path[:depth], token]):
                        yield [*path[:depth], token, *rng.choices(self.teacher.alphabet, k=len(path))]
                        break
        elif source == "early":
            places = range(len(path) - 1)
            if len(places) > LONG:  # too many pairs to list
                skips = [(a, b) for a, b in (sorted(rng.sample(places, 2)) for _ in range(LONG))]
            else:
                skips = rng.sample(pairs := list(itertools.combinations(places, 2)), len(pairs))
            for start, later in skips:
                yield [*path[:start], *path[later:-1]]
        else:
            yield from rng.sample(attempts, len(attempts))

    def _mistake(
        self,
        expert: Expert,
        attempt: Sequence[int],
        path: list[int],
        others: list[Mistake],
        room: tuple[int, int],
        rng: random.Random,
    ) -> tuple[list[int], Mistake] | None:
        """The attempt's error and the right answer that it is made on the way of: `path`, unless it is the first.

        Args:
            room: actions and deletes that are left.
        """
        depth = expert.first_error(attempt)
        if depth is None or any(other.depth == depth and other.tokens[0] == attempt[depth] for other in others):
            return None
        right, budget = list(attempt[:depth]), self.teacher.budget
        if right != path[:depth]:
            rest = None if others else expert.complete(right, rng)
            if rest is None:
                return None
            room = (room[0] + len(path) - depth - len(rest), room[1])
            path = [*right, *rest]
        ends = (i for i in range(depth, len(attempt)) if attempt[i] in self.teacher.rules.eos)
        wrong = list(attempt[depth : next(ends, len(attempt))])
        at_once = max((unit for unit in self.teacher.rules.deletes.values() if isinstance(unit, int)), default=1)
        usual = 1 + min(self.late, max(0, len(path) - 1 - depth))
        longest = min(max(usual, at_once), budget.answer - 1 - depth, len(wrong))
        for length in sorted(rng.sample(range(1, longest + 1), max(0, longest)), key=lambda length: length > usual):
            presses, left = expert.take_back(right, wrong[:length])
            mistake = Mistake(depth, wrong[:length], presses, length + len(presses) + depth - left)
            again = left < depth and self.teacher.rules.retry == "ban"  # what was right would be banned
            if not again and mistake.cost <= room[0] and len(presses) <= room[1]:
                return path, mistake
        return None


def relabel(expert: Expert, trace: Sequence[int], rng: random.Random) -> Correction:
    """A rollout of the policy with what the expert would have done in each of its states."""
    machine = Machine(expert.teacher.rules, expert.teacher.budget)
    targets, learn = [], []
    for action in trace:
        target = None if expert.misled(machine) else expert.act(machine, action, rng)
        targets.append(action if target is None else target)
        learn.append(target is not None)
        machine.step(action)
    return Correction(list(trace), targets, learn, "rollouts")


def _shuffled(alphabet: Sequence[int], rng: random.Random) -> Iterator[int]:
    """The alphabet's tokens in random order; of a large one, not all: where few are wrong, another place will do."""
    yield from rng.sample(alphabet, min(len(alphabet), LONG))
