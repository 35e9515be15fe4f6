from __future__ import annotations

import itertools
import random
from typing import Any, get_args

import pytest

from rl_backspace.corrections import Correction, Corrector
from rl_backspace.semantics import Budget, Machine, Memory, Retry, Rules, Unit, replay
from rl_backspace.tasks import Row, Task, arithmetic, signs

EOS = 1
UNITS: dict[str, dict[int, Unit]] = {
    "token": {900: "token"},
    "2": {900: 2},
    "4": {900: 4},
    "line": {900: "line"},
    "answer": {900: "answer"},
    "token and answer": {900: "token", 901: "answer"},
    "line and 3": {900: "line", 901: 3},
}
RULES = list(itertools.product(UNITS, get_args(Memory), get_args(Retry)))
BUDGET = Budget(answer=24, actions=96)


def gold(row: Row) -> list[int]:
    """One token per character, its code point."""
    return [*map(ord, row["answer"]), EOS]


def text(visible: list[int]) -> str:
    return "".join(map(chr, visible))


def poems(count: int = 40) -> Task:
    """Answers of three lines; only the reference is right."""
    rng = random.Random(0)
    lines = ["".join(rng.choice("abcd") for _ in range(rng.randint(1, 4))) for _ in range(3 * count)]
    rows = [{"prompt": str(i), "answer": "\n".join(lines[3 * i : 3 * i + 3])} for i in range(count)]
    return Task(rows[1:], rows[:1])


TASKS = {"signs": signs(count=5, train=40, test=1), "sums": arithmetic("*", train=40, test=1), "poems": poems()}


def corrector(task: Task, rules: Rules, budget: Budget = BUDGET, **options: Any) -> Corrector:
    alphabet = sorted({token for row in task.train for token in gold(row)} - {EOS})
    return Corrector(task, rules, budget, gold, text, alphabet, **options)


def rules(units: str = "token", memory: Memory = "erase", retry: Retry = "ban") -> Rules:
    return Rules(UNITS[units], frozenset([EOS]), memory, retry, frozenset([ord("\n")]))


def examples(made: Corrector, count: int, seed: int = 0) -> list[tuple[Row, Correction]]:
    rng = random.Random(seed)
    rows = [made.task.train[i % len(made.task.train)] for i in range(count)]
    return [(row, made.make(row, rng)) for row in rows]


def is_clean(correction: Correction) -> bool:
    return all(correction.learn)


def wrong_runs(correction: Correction) -> list[int]:
    """Lengths of the wrong continuations."""
    return [len(list(run)) for learned, run in itertools.groupby(correction.learn) if not learned]


def assert_sound(made: Corrector, row: Row, correction: Correction) -> None:
    """Legal, within the budget, right in the end, and learned from exactly where nothing is wrong."""
    machine = Machine(made.rules, made.budget)
    assert len(correction.learn) == len(correction.actions)
    for action, learned in zip(correction.actions, correction.learn, strict=True):
        machine.step(action)  # raises where the rules or the budget forbid it
        if action in made.rules.deletes:
            assert learned
        elif action == EOS:
            assert learned and machine.end == "eos"
        else:
            assert learned == made.task.alive(row, text(machine.visible))
    assert machine.end == "eos"
    assert made.task.correct(row, text(machine.answer))


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(("units", "memory", "retry"), RULES)
def test_every_example_is_sound(task: Task, units: str, memory: Memory, retry: Retry) -> None:
    made = corrector(task, rules(units, memory, retry), clean=0.2, errors=3, late=2)
    found = examples(made, 60)
    for row, correction in found:
        assert_sound(made, row, correction)
    assert not all(is_clean(correction) for _, correction in found)


@pytest.mark.parametrize("clean", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", ["sums", "poems"])
@pytest.mark.parametrize(("units", "memory", "retry"), RULES)
def test_the_share_of_clean_examples_is_as_asked(
    task: str, units: str, memory: Memory, retry: Retry, clean: float
) -> None:
    """Where an error is possible everywhere, whatever the deletes can take back."""
    made = corrector(TASKS[task], rules(units, memory, retry), clean=clean)
    share = sum(is_clean(correction) for _, correction in examples(made, 300)) / 300
    assert share == clean if clean in (0, 1) else abs(share - clean) < 0.08


def test_every_place_is_erred_at() -> None:
    made = corrector(TASKS["poems"], rules(), clean=0.0, errors=1)
    row = max(made.task.train, key=lambda row: len(row["answer"]))
    rng = random.Random(0)
    places = {made.make(row, rng).learn.index(False) for _ in range(400)}
    assert places == set(range(len(gold(row))))  # the last one: a token more where the answer should end


@pytest.mark.parametrize("errors", [1, 2, 4])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_no_more_errors_than_asked_and_none_noticed_later(errors: int, late: int) -> None:
    made = corrector(TASKS["poems"], rules(), clean=0.0, errors=errors, late=late)
    runs = [wrong_runs(correction) for _, correction in examples(made, 300)]
    assert {len(run) for run in runs} == set(range(1, errors + 1))
    assert {length for run in runs for length in run} == set(range(1, late + 2))


def test_a_token_banned_here_is_not_typed_again() -> None:
    made = corrector(TASKS["signs"], rules(retry="ban"), clean=0.0, errors=4)
    for row, correction in examples(made, 100):
        assert_sound(made, row, correction)  # stepping raises on a banned token


def test_one_press_is_used_where_one_will_do() -> None:
    """The delete that takes most without taking what was right."""
    made = corrector(TASKS["poems"], rules("token and answer"), clean=0.0, errors=1, late=2)
    presses: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    for _, correction in examples(made, 400):
        deletes = tuple(action for action in correction.actions if action in made.rules.deletes)
        presses[min(1, correction.learn.index(False))].add(deletes)
    assert presses[0] == {(900,), (901,)}  # for a single token either will do
    assert presses[1] == {(900,), (900, 900), (900, 900, 900)}


@pytest.mark.parametrize(("units", "memory", "retry"), RULES)
def test_a_tight_budget_is_kept(units: str, memory: Memory, retry: Retry) -> None:
    task = TASKS["sums"]
    longest = max(len(gold(row)) for row in task.train)
    erred = []
    for spare in range(10):
        made = corrector(task, rules(units, memory, retry), Budget(longest, longest + spare), clean=0.0)
        found = examples(made, 30)
        for row, correction in found:
            assert_sound(made, row, correction)
        erred.append(sum(not is_clean(correction) for _, correction in found))
    assert erred[-1] > 0


def test_without_room_for_one_there_is_no_error() -> None:
    row = TASKS["sums"].train[0]
    for actions in (None, len(gold(row)), len(gold(row)) + 1):  # an error takes itself and a delete
        made = corrector(TASKS["sums"], rules(), Budget(len(gold(row)), actions), clean=0.0)
        assert made.make(row, random.Random(0)).actions == gold(row)


@pytest.mark.parametrize("deletes", [0, 1, 2])
def test_a_budget_of_deletes_is_kept(deletes: int) -> None:
    made = corrector(TASKS["poems"], rules(), Budget(24, 96, deletes), clean=0.0, errors=3)
    counts = set()
    for row, correction in examples(made, 100):
        assert_sound(made, row, correction)
        counts.add(replay(correction.actions, made.rules, made.budget).deleted)
    assert counts <= set(range(deletes + 1)) and max(counts) == deletes


def test_without_delete_tokens_there_is_only_the_reference() -> None:
    made = corrector(TASKS["poems"], Rules({}, frozenset([EOS])), clean=0.0)
    assert all(correction.actions == gold(row) for row, correction in examples(made, 20))


def test_a_task_in_which_nothing_is_wrong_gives_clean_examples() -> None:
    anything = Task(TASKS["poems"].train, TASKS["poems"].test, alive=lambda row, text: True)
    assert all(is_clean(correction) for _, correction in examples(corrector(anything, rules(), clean=0.0), 20))


def test_the_same_seed_gives_the_same_example() -> None:
    made = corrector(TASKS["signs"], rules(), clean=0.2)
    assert examples(made, 30, seed=1) == examples(made, 30, seed=1) != examples(made, 30, seed=2)
