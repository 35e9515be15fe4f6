"""What a flawless typist would do in any state of a rollout: the teacher of corrections.

Where the task can tell whether a prefix can still come right (`Task.alive`), that decides; where only the
reference answer is known, the first deviation from it is the error. Asking the expert in states that the policy
itself got into is DAgger (Ross et al. 2011, arXiv:1011.0686). Pure Python, no torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rl_backspace.errors import UserError
from rl_backspace.semantics import Budget, Machine, Rules
from rl_backspace.tasks import Row, Task

TRIES = 4  # answers that a task is asked to complete, where the first tokens of some are illegal


@dataclass(frozen=True)
class Teacher:
    """What the experts of all rows share.

    Args:
        task: its `alive` and `correct` tell an error from another right way.
        tokens: text -> token ids.
        text: visible token ids -> text.
        alphabet: token ids that answers are made of, without the one that ends them.
        eos: the token id that ends an answer.
    """

    task: Task
    rules: Rules
    budget: Budget
    tokens: Callable[[str], Sequence[int]]
    text: Callable[[list[int]], str]
    alphabet: Sequence[int]
    eos: int

    def expert(self, row: Row) -> Expert:
        return Expert(self, row)


class Expert:
    """Knows one row. What it finds out it remembers: the same few states are asked about again and again.

    Attributes:
        gold: the reference answer, the end-of-sequence token included.
    """

    def __init__(self, teacher: Teacher, row: Row):
        self.teacher, self.row = teacher, row
        self.gold = [*teacher.tokens(row["answer"]), teacher.eos]
        self._alive: dict[tuple[int, ...], bool] = {}
        self._shown: dict[int, bool] = {}

    def alive(self, visible: Sequence[int]) -> bool:
        """Whether an answer that starts like this can still come right."""
        key = tuple(visible)
        if list(key) == self.gold[: len(key)]:
            return True
        if key not in self._alive:
            text = self.teacher.text(list(key))
            self._alive[key] = self._all_shown(list(key)) and bool(self.teacher.task.alive(self.row, text))
        return self._alive[key]

    def _all_shown(self, visible: list[int]) -> bool:
        """Whether each token can be read or is the reference's; one that texts leave out would be right anywhere."""
        text = self.teacher.text
        for token in set(visible).difference(self._shown, self.gold):
            self._shown[token] = bool(text([token]))
        silent = (i for i, token in enumerate(visible) if not self._shown.get(token, True))
        return all(text(visible[: i + 1]) != text(visible[:i]) for i in silent)  # a space may show after a word only

    def right(self, visible: Sequence[int], token: int) -> bool:
        """Whether typing this token after an alive prefix keeps it alive or ends it well."""
        if token in self.teacher.rules.eos:
            return self.teacher.task.correct(self.row, self.teacher.text(list(visible)))
        return token not in self.teacher.rules.deletes and self.alive([*visible, token])

    def first_error(self, attempt: Sequence[int]) -> int | None:
        """Index of the first token that leaves nothing alive, None if there is none before the answer ends."""
        for index, token in enumerate(attempt):
            if token in self.teacher.rules.eos or token in self.teacher.rules.deletes:
                return None
            if not self.alive(attempt[: index + 1]):
                return index
        return None

    def next(self, visible: Sequence[int], rng: random.Random, illegal: Collection[int] = ()) -> int | None:
        """A right token to type after an alive prefix: the reference's if it fits, else any; None if there is none."""
        for _ in range(TRIES if illegal else 1):
            known = self._known(visible, rng)
            if known and known[0] not in illegal:
                return known[0]
        here, alphabet = list(visible), self.teacher.alphabet
        if self.right(here, self.teacher.eos):
            return self.teacher.eos
        for token in rng.sample(alphabet, len(alphabet)):
            if token not in illegal and self.alive([*here, token]):
                return token
        return None

    def complete(self, visible: Sequence[int], rng: random.Random) -> list[int] | None:
        """Right tokens up to the end of the answer, None where the task leads nowhere or the budget ends before."""
        out = list(visible)
        while len(out) < self.teacher.budget.answer:
            rest = self._known(out, rng)
            if rest is None:
                token = self.next(out, rng)
                rest = None if token is None else [token]
            if rest is None:
                return None
            out += rest
            if out[-1] == self.teacher.eos:
                return out[len(visible) :] if len(out) <= self.teacher.budget.answer else None
        return None

    def _known(self, visible: Sequence[int], rng: random.Random) -> list[int] | None:
        """The rest of the reference, or of an answer that the task completes; None where neither starts like this."""
        here = list(visible)
        if here == self.gold[: len(here)] and len(here) < len(self.gold):
            return self.gold[len(here) :]
        task, text = self.teacher.task, self.teacher.text(here)
        whole: Any = self.row["answer"].strip()
        if task.complete:
            whole = task.complete(self.row, text, rng)
            if not isinstance(whole, str | None):
                raise UserError(f"task: its complete returned {whole!r}; expected a whole answer as text, or None")
        elif task.correct(self.row, text):
            whole = text
        else:
            text = text.lstrip()  # white space in front is no error
        if whole is None or not whole.startswith(text):
            return None
        rest = [*self.teacher.tokens(whole[len(text) :]), self.teacher.eos]
        # what it says is not trusted, and tokens of a rest may make another text than the rest of the tokens
        right = self.right(here, rest[0]) and self.right([*here, *rest[:-1]], self.teacher.eos)
        return rest if right else None

    def act(self, machine: Machine, own: int, rng: random.Random) -> int | None:
        """What to do in this state, None where nothing helps.

        Args:
            own: what the policy did; it stands where it is as good as any.
        """
        illegal, ban = set(machine.illegal()), self.teacher.rules.retry == "ban"
        if self.alive(machine.visible):
            if own not in illegal and self.right(machine.visible, own):
                return own
            token = self.next(machine.visible, rng, illegal)
            if token is not None:
                return token
        if illegal.issuperset(self.teacher.rules.deletes):
            return None
        for depth, presses in self._ways_back(machine.visible):
            gone = {*machine.tried[depth], machine.visible[depth]} if ban else ()
            if self.alive(machine.visible[:depth]) and self.next(machine.visible[:depth], rng, gone) is not None:
                return presses[0]
        return None

    def misled(self, machine: Machine) -> bool:
        """Whether something right is banned here and the policy cannot know: under `erase` it does not see that it
        was here before, so the second best would be learned for the very context in which the best one was right."""
        rules = self.teacher.rules
        return (
            rules.retry == "ban"
            and rules.memory == "erase"
            and any(self.right(machine.visible, token) for token in machine.tried[-1])
        )

    def take_back(self, right: Sequence[int], wrong: Sequence[int]) -> tuple[list[int], int]:
        """The deletes that take back all that is wrong, and how many tokens they leave."""
        ways = self._ways_back([*right, *wrong])
        return next((presses, depth) for depth, presses in ways if depth <= len(right))

    def _ways_back(self, visible: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
        """Every depth that deletes can go back to, the deepest first, and the fewest of them that do."""
        machine = Machine(self.teacher.rules, self.teacher.budget, visible=list(visible))
        ways: dict[int, list[int]] = {len(visible): []}
        for length in range(len(visible), 0, -1):
            if length in ways:
                del machine.visible[length:]
                for token, unit in self.teacher.rules.deletes.items():
                    way, target = [*ways[length], token], machine.target(unit)
                    ways[target] = min(ways.get(target, way), way, key=len)
            if length - 1 in ways:
                yield length - 1, ways[length - 1]
