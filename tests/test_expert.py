from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from typing import get_args

import pytest
from naive import Naive
from teachers import BUDGET, EOS, TASKS, UNITS, gold, played_by_chance, rules, teacher, text

from rl_backspace.corrections import relabel
from rl_backspace.expert import Expert, Teacher
from rl_backspace.semantics import Budget, Machine, Retry, Rules, replay
from rl_backspace.tasks import Row, Task, signs

RULES = list(itertools.product(UNITS, get_args(Retry)))
TINY = signs(count=3, high=3, train=12, test=1)  # few numbers, so that most targets are reached in several ways


def experts(task: Task, units: str, retry: Retry, budget: Budget = BUDGET) -> Iterator[tuple[Expert, random.Random]]:
    its = teacher(task, rules(units, retry=retry), budget)
    for i, row in enumerate(task.train):
        yield its.expert(row), random.Random(i)


def is_right(its: Teacher, row: Row, slow: Naive, token: int) -> bool:
    """Whether typing this token is legal and right here, by the task's own word."""
    if token in slow.forbidden() or token in its.rules.deletes:
        return False
    here = text(slow.cells)
    return its.task.correct(row, here) if token == EOS else its.task.alive(row, here + chr(token))


def places_to_go_back_to(slow: Naive) -> set[int]:
    """Every depth that one or more deletes can lead to."""
    found, waiting = set[int](), [len(slow.cells)]
    while waiting:
        before = Naive(slow.rules, slow.budget)
        before.cells = slow.cells[: waiting.pop()]
        for unit in slow.rules.deletes.values() if before.cells else ():
            depth = before.where(unit)
            if depth not in found:
                found.add(depth)
                waiting.append(depth)
    return found


def something_helps(its: Teacher, row: Row, slow: Naive) -> bool:
    """Whether something right can be typed here, or after deletes, of which the budget is thought to hold enough."""
    letters = [*its.alphabet, EOS]
    if its.task.alive(row, text(slow.cells)) and any(is_right(its, row, slow, token) for token in letters):
        return True
    if set(its.rules.deletes) <= slow.forbidden():
        return False
    for depth in places_to_go_back_to(slow):
        there = Naive(its.rules, its.budget)
        there.cells = slow.cells[:depth]
        there.gone = {depth: [*slow.gone.get(depth, []), slow.cells[depth]]}
        if its.task.alive(row, text(there.cells)) and any(is_right(its, row, there, token) for token in letters):
            return True
    return False


def took_back_right(its: Teacher, row: Row, slow: Naive) -> bool:
    """Whether something right was deleted here, which a policy that forgets it and is banned from it cannot know."""
    here = text(slow.cells)
    return any(its.task.alive(row, here) and its.task.alive(row, here + chr(t)) for t in slow.gone.get(len(here), []))


def naively(machine: Machine) -> Naive:
    slow = Naive(machine.rules, machine.budget)
    for action in machine.trace:
        slow.press(action)
    return slow


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(("units", "retry"), RULES)
def test_what_is_learned_of_a_rollout_is_legal_and_helps(task: Task, units: str, retry: Retry) -> None:
    taught = {"own": 0, "typed": 0, "deleted": 0}
    for expert, rng in experts(task, units, retry, Budget(answer=20, actions=30, deletes=12)):
        its, row = expert.teacher, expert.row
        trace = played_by_chance(expert, rng, 30).trace
        made = relabel(expert, trace, rng)
        assert (made.actions, made.source, made.mistakes) == (trace, "rollouts", [])
        slow = Naive(its.rules, its.budget)
        for action, target, learn in zip(made.actions, made.targets, made.learn, strict=True):
            alive = task.alive(row, text(slow.cells))
            rights = [token for token in (*its.alphabet, EOS) if is_right(its, row, slow, token)] if alive else []
            assert learn == (
                something_helps(its, row, slow) and not (retry == "ban" and took_back_right(its, row, slow))
            )
            assert target not in slow.forbidden()
            if not learn or action in rights:
                assert target == action  # what is right stands, and what is not learned is left as it was
            elif rights:
                assert target in rights  # so no delete where something right can be typed
            else:
                assert target in its.rules.deletes
            taught["own"] += learn and target == action
            taught["typed"] += target != action and target not in its.rules.deletes
            taught["deleted"] += learn and target in its.rules.deletes
            slow.press(action)
    assert min(taught.values()) > 20, taught


def follow(expert: Expert, machine: Machine, rng: random.Random) -> bool:
    """Do as the expert says from here on, whatever the policy would have done; whether the answer is right."""
    its = expert.teacher
    while machine.end is None:
        own = rng.choice([*its.alphabet, ord("x"), EOS, *its.rules.deletes])
        action = expert.act(machine, own, rng)
        if action is None:
            return False
        machine.step(action)
    return machine.end == "eos" and its.task.correct(expert.row, text(machine.answer))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(("units", "retry"), RULES)
def test_whoever_does_as_the_expert_says_ends_right(task: Task, units: str, retry: Retry) -> None:
    """From wherever chance had led; with `ban` there may be nowhere to go back to."""
    ended = {True: 0, False: 0}
    for expert, rng in experts(task, units, retry):
        for _ in range(2):
            machine = played_by_chance(expert, rng, rng.randint(0, 15))
            if machine.end is None:
                helps = something_helps(expert.teacher, expert.row, naively(machine))
                assert follow(expert, machine, rng) == helps
                ended[helps] += 1
    assert ended[True] > 10 and (retry == "ban" or ended[False] == 0)


class Search:
    """Every legal way on from a state, by trying them all; or every one that types nothing wrong."""

    def __init__(self, its: Teacher, row: Row, errs: bool = True):
        self.its, self.row, self.errs = its, row, errs
        self.known: dict[object, bool] = {}

    def succeeds(self, slow: Naive) -> bool:
        if slow.over():
            ended = slow.history and slow.history[-1] == EOS
            return bool(ended) and self.its.task.correct(self.row, text(slow.cells))
        gone = (
            {depth: frozenset(tokens) for depth, tokens in slow.gone.items()} if self.its.rules.retry == "ban" else {}
        )
        deletes = sum(action in self.its.rules.deletes for action in slow.history)
        key = (tuple(slow.cells), frozenset(gone.items()), len(slow.history), deletes)
        if key not in self.known:
            typed = [t for t in (*self.its.alphabet, EOS) if self.errs or is_right(self.its, self.row, slow, t)]
            legal = {*typed, *self.its.rules.deletes} - slow.forbidden()
            self.known[key] = any(self.succeeds(self.after(slow, action)) for action in legal)
        return self.known[key]

    def after(self, slow: Naive, action: int) -> Naive:
        then = Naive(slow.rules, slow.budget)
        then.history, then.cells = list(slow.history), list(slow.cells)
        then.gone = {depth: list(tokens) for depth, tokens in slow.gone.items()}
        then.press(action)
        return then


@pytest.mark.parametrize(("units", "retry"), RULES)
def test_where_any_way_leads_to_a_right_answer_the_experts_does(units: str, retry: Retry) -> None:
    """But for one: with deletes of n tokens, typing something wrong could make them end where they should."""
    counted = any(isinstance(unit, int) for unit in UNITS[units].values())
    ended = {True: 0, False: 0}
    for expert, rng in experts(TINY, units, retry, Budget(answer=5, actions=22)):
        search = Search(expert.teacher, expert.row, errs=retry == "free" or not counted)
        for _ in range(8):
            machine = played_by_chance(expert, rng, rng.randint(0, 8))
            if machine.end is None:
                possible = search.succeeds(naively(machine))
                assert follow(expert, machine, rng) == possible
                ended[possible] += 1
    assert ended[True] > 20 and (ended[False] > 0) == (retry == "ban")


@pytest.mark.parametrize("deletes", [None, 3])
@pytest.mark.parametrize("retry", get_args(Retry))
def test_the_experts_way_is_the_shortest(retry: Retry, deletes: int | None) -> None:
    """With one token a press: where the budget holds any way to a right answer, it holds the expert's."""
    ended = {True: 0, False: 0}
    for actions in range(4, 14):
        for expert, rng in experts(TINY, "token", retry, Budget(4, actions, deletes)):
            search = Search(expert.teacher, expert.row)
            for _ in range(4):
                machine = played_by_chance(expert, rng, rng.randint(0, 8))
                if machine.end is None:
                    possible = search.succeeds(naively(machine))
                    assert follow(expert, machine, rng) == possible
                    ended[possible] += 1
    assert min(ended.values()) > 20, ended


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_errors_are_where_the_task_says(task: Task) -> None:
    for expert, rng in experts(task, "token", "ban"):
        for _ in range(4):
            typed = [*gold(expert.row)[: rng.randint(0, 4)], *rng.choices([*expert.teacher.alphabet, EOS], k=4)]
            ends = typed.index(EOS) if EOS in typed else len(typed)
            dead = [i for i in range(ends) if not task.alive(expert.row, text(typed[: i + 1]))]
            assert expert.first_error(typed) == (dead[0] if dead else None)
            assert expert.first_error([*typed[: dead[0]], 900, *typed] if dead else [900]) is None  # a delete ends it


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_an_answer_is_completed_rightly_from_all_of_its_right_beginnings(task: Task) -> None:
    others = 0
    for expert, rng in experts(task, "token", "ban"):
        begun: list[int] = []
        while True:
            rest = expert.complete(begun, rng)
            assert rest is not None and rest[-1] == EOS and EOS not in rest[:-1]
            assert task.correct(expert.row, text([*begun, *rest]))
            short = teacher(task, rules(), Budget(len(begun) + len(rest) - 1)).expert(expert.row)
            assert begun != gold(expert.row)[: len(begun)] or short.complete(begun, rng) is None
            others += [*begun, *rest] != expert.gold
            right = [token for token in expert.teacher.alphabet if task.alive(expert.row, text([*begun, token]))]
            # white space around an answer is no error, but leads nowhere
            right = [t for t in right if t != ord("\n") or [*begun, t] == expert.gold[: len(begun) + 1]]
            if not right:
                break
            begun.append(rng.choice(right))
    assert others > 5 if task in (TASKS["signs"], TASKS["countdown"]) else others == 0


def test_nothing_is_completed_where_the_task_leads_nowhere() -> None:
    """A task that calls dead ends alive: no letter goes on from b."""
    row = {"prompt": "?", "answer": "aa"}
    task = Task([row], [row], alive=lambda row, text: text in ("", "a", "aa", "b"))
    expert = teacher(task, rules(retry="free")).expert(row)
    assert expert.complete([ord("b")], random.Random(0)) is None
    assert expert.act(replay([ord("b")], expert.teacher.rules, BUDGET), ord("a"), random.Random(0)) == 900


def test_the_reference_may_be_typed_in_tokens_of_another_cut() -> None:
    """A tokenizer that writes ab as one token; a and b alone are as right, and what follows is cut as it comes."""
    pair = 500
    row = {"prompt": "?", "answer": "xabab"}

    def tokens(answer: str) -> list[int]:
        return [pair if part == "ab" else ord(part) for part in re.findall("ab|.", answer)]

    def read(visible: list[int]) -> str:
        return "".join("ab" if token == pair else chr(token) for token in visible if token != EOS)

    its = Teacher(Task([row], [row]), rules(), BUDGET, tokens, read, [ord("x"), pair], EOS)
    expert, rng = its.expert(row), random.Random(0)
    assert expert.gold == [ord("x"), pair, pair, EOS]
    assert expert.complete([ord("x"), ord("a")], rng) == [ord("b"), pair, EOS]
    assert expert.complete([ord("x"), pair, ord("a")], rng) == [ord("b"), EOS]
    assert expert.complete([ord("x"), ord("a"), ord("b"), pair], rng) == [EOS]
    assert expert.first_error([ord("x"), ord("a"), pair]) == 2


def test_any_token_that_ends_an_answer_ends_it_well() -> None:
    row = {"prompt": "?", "answer": "ab"}
    played = Rules({900: "token"}, frozenset([EOS, 2]))
    its = Teacher(Task([row], [row]), played, BUDGET, lambda answer: [*map(ord, answer)], text, [97, 98], EOS)
    expert, whole = its.expert(row), replay([97, 98], played, BUDGET)
    assert expert.act(whole, 2, random.Random(0)) == 2
    assert expert.act(whole, 98, random.Random(0)) == EOS
    assert not expert.right([97], 2)


def test_each_beginning_is_asked_about_once() -> None:
    asked: list[str] = []

    def alive(row: Row, text: str) -> bool:
        asked.append(text)
        return TINY.alive(row, text)

    task = Task(TINY.train, TINY.test, TINY.correct, alive)
    expert = teacher(task, rules(retry="free")).expert(TINY.train[0])
    for seed in range(20):
        relabel(expert, played_by_chance(expert, random.Random(seed), 20).trace, random.Random(seed))
    assert len(asked) == len(set(asked)) > 5


def test_what_nobody_reads_is_an_error_unless_the_reference_has_it() -> None:
    """A special token, which texts leave out: wherever it stands, the answer would read as well."""
    pad, space = 300, 301
    row = {"prompt": "?", "answer": "ab"}

    def read(visible: list[int]) -> str:
        return "".join(chr(token) for token in visible if token < 300 and token != EOS)

    def answers(row: Row, text: str) -> bool:
        return any(answer.startswith(text) for answer in ("ab", "ba"))

    its = Teacher(
        Task([row], [row], alive=answers),
        rules(),
        BUDGET,
        lambda answer: [space, *map(ord, answer)],
        read,
        [97, 98],
        EOS,
    )
    expert, rng = its.expert(row), random.Random(0)
    assert expert.first_error([space, 98, pad, 97]) == 2
    assert expert.first_error([pad, 97, 98, EOS]) == 0
    assert expert.first_error([space, 98, 97, EOS]) is None
    assert relabel(expert, [pad, 97, 900, 900, space, 97, 98, EOS], rng).targets == [
        space,
        900,
        900,
        900,
        space,
        97,
        98,
        EOS,
    ]
