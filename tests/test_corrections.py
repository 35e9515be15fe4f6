from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any, get_args

import pytest
from teachers import BUDGET, EOS, TASKS, UNITS, gold, rules, teacher, text

from rl_backspace.corrections import Correction, Corrector, Source
from rl_backspace.semantics import Budget, Memory, Retry, Rules, replay
from rl_backspace.tasks import Row, Task

RULES = list(itertools.product(UNITS, get_args(Memory), get_args(Retry)))
PLANTED: tuple[Source, ...] = ("random", "early", "samples", "uncertain")
LADDER = [(*rule, source) for rule in RULES for source in PLANTED if "erase" in rule or source == "random"]


def corrector(task: Task, played: Rules, budget: Budget = BUDGET, **options: Any) -> Corrector:
    return Corrector(teacher(task, played, budget), **options)


def attempts_at(row: Row, task: Task, source: Source, rng: random.Random, count: int = 6) -> list[list[int]]:
    """What a model might have done: the reference, other answers and ends of answers, most of them corrupted."""
    letters = sorted({token for other in task.train[:10] for token in gold(other)} - {EOS})
    made = []
    for _ in range(count):
        answer = gold(row)
        depth = rng.randrange(len(answer))
        if source == "uncertain":  # the reference, then something else
            made.append([*answer[:depth], *rng.choices(letters, k=rng.randint(1, 4))])
            continue
        begun = answer[:-1] if rng.random() < 0.7 else rng.choices(letters, k=len(answer) - 1)
        how = rng.randrange(5)
        if how == 1:
            begun[depth:] = rng.choices(letters, k=rng.randint(0, 6))
        elif how == 2:
            begun[depth : depth + 1] = [rng.choice(letters)]
        elif how == 3:
            begun.insert(depth, rng.choice(letters))
        elif how == 4:
            del begun[depth:]
        made.append(begun + [EOS] * (rng.random() < 0.8))
    return made


def examples(
    made: Corrector, count: int, source: Source = "random", seed: int = 0
) -> list[tuple[Row, Correction, list[list[int]]]]:
    """Rows, corrections made of them, and the attempts that they were made from."""
    rng, task = random.Random(seed), made.teacher.task
    found = []
    for i in range(count):
        row = task.train[i % len(task.train)]
        attempts = attempts_at(row, task, source, rng) if source in ("samples", "uncertain") else []
        found.append((row, made.make(made.teacher.expert(row), source, rng, attempts), attempts))
    return found


def is_clean(correction: Correction) -> bool:
    return all(correction.learn)


def wrong_runs(correction: Correction) -> list[int]:
    """Lengths of the wrong continuations."""
    return [len(list(run)) for learned, run in itertools.groupby(correction.learn) if not learned]


def assert_sound(made: Corrector, row: Row, correction: Correction) -> None:
    """Legal, within the budget, right in the end, and learned from exactly where nothing is wrong."""
    task, played = made.teacher.task, made.teacher.rules
    assert correction.targets == correction.actions
    assert len(correction.learn) == len(correction.actions)
    assert bool(correction.mistakes) == (correction.source is not None) == (not is_clean(correction))
    machine = replay([], played, made.teacher.budget)
    for action, learned in zip(correction.actions, correction.learn, strict=True):
        machine.step(action)  # raises where the rules or the budget forbid it
        if action in played.deletes:
            assert learned
        elif action == EOS:
            assert learned and machine.end == "eos"
        else:
            assert learned == task.alive(row, text(machine.visible))
    assert machine.end == "eos"
    assert task.correct(row, text(machine.answer))


def assert_mistakes_are_the_traces(made: Corrector, correction: Correction) -> None:
    """Each error's record, in the order of their making, against the trace, in which an error begins unlearned."""
    waiting, step = list(correction.mistakes), 0
    machine = replay([], made.teacher.rules, made.teacher.budget)
    while step < len(correction.actions):
        if correction.learn[step]:
            assert correction.actions[step] not in made.teacher.rules.deletes  # those belong to an error
            machine.step(correction.actions[step])
            step += 1
            continue
        mistake = waiting.pop(0)
        taken = [*mistake.tokens, *mistake.presses]
        assert len(machine.visible) == mistake.depth
        assert correction.actions[step : step + len(taken)] == taken
        assert correction.learn[step : step + len(taken)] == [False] * len(mistake.tokens) + [True] * len(
            mistake.presses
        )
        for action in taken:
            machine.step(action)
        assert mistake.cost == len(taken) + mistake.depth - len(machine.visible)
        step += len(taken)
    assert not waiting
    assert len(correction.actions) == len(machine.visible) + sum(mistake.cost for mistake in correction.mistakes)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(("units", "memory", "retry", "source"), LADDER)
def test_every_example_is_sound(task: Task, units: str, memory: Memory, retry: Retry, source: Source) -> None:
    made = corrector(task, rules(units, memory, retry), clean=0.2, errors=3, late=2)
    found = examples(made, 30, source)
    for row, correction, _ in found:
        assert_sound(made, row, correction)
        assert_mistakes_are_the_traces(made, correction)
        assert correction.source in (None, source)
    assert not all(is_clean(correction) for _, correction, _ in found)


@pytest.mark.parametrize("clean", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("task", ["sums", "poems"])
@pytest.mark.parametrize(("units", "memory", "retry"), RULES)
def test_the_share_of_clean_examples_is_as_asked(
    task: str, units: str, memory: Memory, retry: Retry, clean: float
) -> None:
    """Where an error is possible everywhere, whatever the deletes can take back."""
    made = corrector(TASKS[task], rules(units, memory, retry), clean=clean)
    share = sum(is_clean(correction) for _, correction, _ in examples(made, 200)) / 200
    assert share == clean if clean in (0, 1) else abs(share - clean) < 0.1


@pytest.mark.parametrize("clean", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("source", PLANTED)
def test_the_share_of_clean_examples_is_as_asked_of_every_source(source: Source, clean: float) -> None:
    """Poems have two lines at least, so that there is always something to give too early."""
    made = corrector(TASKS["poems"], rules(), clean=clean)
    found = [
        correction
        for row, correction, attempts in examples(made, 300, source)
        if not attempts or any(goes_wrong(row, attempt) for attempt in attempts)
    ]
    assert len(found) > 250
    share = sum(is_clean(correction) for correction in found) / len(found)
    assert share == clean if clean in (0, 1) else abs(share - clean) < 0.1


def goes_wrong(row: Row, attempt: list[int]) -> bool:
    """Whether an attempt leaves the reference before it ends."""
    typed = attempt[: attempt.index(EOS)] if EOS in attempt else attempt
    return not row["answer"].startswith(text(typed))


def test_every_place_is_erred_at() -> None:
    made = corrector(TASKS["poems"], rules(), clean=0.0, errors=1)
    row = max(made.teacher.task.train, key=lambda row: len(row["answer"]))
    rng = random.Random(0)
    places = {made.make(made.teacher.expert(row), "random", rng).learn.index(False) for _ in range(400)}
    assert places == set(range(len(gold(row))))  # the last one: a token more where the answer should end


def test_an_early_error_is_a_later_part_of_the_answer() -> None:
    made = corrector(TASKS["poems"], rules(), clean=0.0, errors=1, late=3)
    skipped = set()
    for row, correction, _ in examples(made, 400, "early"):
        (mistake,) = correction.mistakes
        later = row["answer"][mistake.depth :]
        assert text(mistake.tokens) in later[1:]
        skipped.add(later.index(text(mistake.tokens), 1))
    assert len(skipped) > 5


@pytest.mark.parametrize("source", ["samples", "uncertain"])
@pytest.mark.parametrize("task", TASKS)
def test_an_error_of_the_models_is_where_an_attempt_went_wrong(task: str, source: Source) -> None:
    """As it went wrong, after its right tokens, which are kept even where they are not the reference's."""
    made = corrector(TASKS[task], rules(), clean=0.0, errors=3)
    alive = made.teacher.task.alive
    others = 0
    for row, correction, attempts in examples(made, 200, source):
        answer = replay(correction.actions, made.teacher.rules, made.teacher.budget).visible
        others += text(answer).strip() != text(gold(row)).strip()  # white space around an answer is no error
        for mistake in correction.mistakes:
            wrong = [*answer[: mistake.depth], *mistake.tokens]
            assert any(attempt[: len(wrong)] == wrong for attempt in attempts)
            assert alive(row, text(wrong[: mistake.depth])) and not alive(row, text(wrong[: mistake.depth + 1]))
        first = [(mistake.depth, mistake.tokens[0]) for mistake in correction.mistakes]
        assert len(set(first)) == len(first)
    if source == "samples":
        assert others > 5 if task in ("signs", "countdown") else others == 0


@pytest.mark.parametrize("source", ["samples", "uncertain"])
def test_attempts_without_an_error_give_clean_examples(source: Source) -> None:
    """Right ones, ones that only end too early, and none at all."""
    made = corrector(TASKS["signs"], rules(), clean=0.0)
    for row in TASKS["signs"].train:
        answers = ["".join(signs) for signs in itertools.product("+-", repeat=5)]
        right = [[*map(ord, answer), EOS] for answer in answers if TASKS["signs"].correct(row, answer)]
        short = [[*answer[:3], EOS, ord("x")] for answer in right]
        for attempts in (right, short, []):
            correction = made.make(made.teacher.expert(row), source, random.Random(0), attempts)
            assert (correction.actions, correction.source, correction.mistakes) == (gold(row), None, [])


@pytest.mark.parametrize("errors", [1, 2, 4])
@pytest.mark.parametrize("late", [0, 1, 3])
def test_no_more_errors_than_asked_and_none_noticed_later(errors: int, late: int) -> None:
    made = corrector(TASKS["poems"], rules(), clean=0.0, errors=errors, late=late)
    runs = [wrong_runs(correction) for _, correction, _ in examples(made, 300)]
    assert {len(run) for run in runs} == set(range(1, errors + 1))
    assert {length for run in runs for length in run} == set(range(1, late + 2))


@pytest.mark.parametrize("source", PLANTED)
def test_a_token_banned_here_is_not_typed_again(source: Source) -> None:
    made = corrector(TASKS["signs"], rules(retry="ban"), clean=0.0, errors=4)
    for row, correction, _ in examples(made, 100, source):
        assert_sound(made, row, correction)  # stepping raises on a banned token


def test_one_press_is_used_where_one_will_do() -> None:
    """The fewest deletes that leave what was right."""
    made = corrector(TASKS["poems"], rules("token and answer"), clean=0.0, errors=1, late=2)
    presses: dict[int, set[tuple[int, ...]]] = {0: set(), 1: set()}
    for _, correction, _ in examples(made, 400):
        deletes = tuple(action for action in correction.actions if action in made.teacher.rules.deletes)
        presses[min(1, correction.learn.index(False))].add(deletes)
    assert presses[0] == {(900,), (901,)}  # for a single token either will do
    assert presses[1] == {(900,), (900, 900), (900, 900, 900)}


def test_deletes_of_two_sizes_take_back_what_is_wrong_and_no_more() -> None:
    """Two and two are four, where three and two would take what was right."""
    expert = teacher(TASKS["poems"], rules("2 and 3")).expert(TASKS["poems"].train[0])
    right = expert.gold[:3]
    taken = [expert.take_back(right, [ord("x")] * length) for length in range(1, 8)]
    assert taken[0] == ([900], 2)  # no way to take one alone: the least
    assert [left for _, left in taken[1:]] == [3] * 6
    assert [sorted(presses) for presses, _ in taken[1:]] == [
        [900],
        [901],
        [900, 900],
        [900, 901],
        [901, 901],
        [900, 900, 901],
    ]


@pytest.mark.parametrize(("units", "memory", "retry", "source"), LADDER)
def test_a_tight_budget_is_kept(units: str, memory: Memory, retry: Retry, source: Source) -> None:
    task = TASKS["sums"]
    longest = max(len(gold(row)) for row in task.train)
    erred = []
    for spare in range(10):
        made = corrector(task, rules(units, memory, retry), Budget(longest, longest + spare), clean=0.0)
        found = examples(made, 30, source)
        for row, correction, _ in found:
            assert_sound(made, row, correction)
        erred.append(sum(not is_clean(correction) for _, correction, _ in found))
    assert erred[-1] > 0


def test_another_right_answer_fits_the_budget_too() -> None:
    """Countdown's answers are of several lengths; what an attempt began is not finished where there is no room."""
    task = TASKS["countdown"]
    ends: dict[bool, set[int]] = {False: set(), True: set()}
    for row in task.train:
        budget = Budget(len(gold(row)), len(gold(row)) + 3)
        made = corrector(replace(task, train=[row]), rules(), budget, clean=0.0)
        for _, correction, _ in examples(made, 20, "samples"):
            assert_sound(made, row, correction)
            answer = replay(correction.actions, made.teacher.rules, budget).visible
            ends[answer != gold(row)].add(len(answer) - len(gold(row)))
    assert max(ends[True]) == 0 and min(ends[True]) < 0


def test_without_room_for_one_there_is_no_error() -> None:
    row = TASKS["sums"].train[0]
    for actions in (None, len(gold(row)), len(gold(row)) + 1):  # an error takes itself and a delete
        made = corrector(TASKS["sums"], rules(), Budget(len(gold(row)), actions), clean=0.0)
        for source in PLANTED:
            correction = made.make(made.teacher.expert(row), source, random.Random(0), [[ord("x"), EOS]])
            assert correction.actions == gold(row) and correction.source is None


@pytest.mark.parametrize("source", PLANTED)
@pytest.mark.parametrize("deletes", [0, 1, 2])
def test_a_budget_of_deletes_is_kept(deletes: int, source: Source) -> None:
    made = corrector(TASKS["poems"], rules(), Budget(24, 96, deletes), clean=0.0, errors=3)
    counts = set()
    for row, correction, _ in examples(made, 100, source):
        assert_sound(made, row, correction)
        counts.add(replay(correction.actions, made.teacher.rules, made.teacher.budget).deleted)
    assert counts <= set(range(deletes + 1)) and max(counts) == deletes


@pytest.mark.parametrize("source", get_args(Source))
def test_without_delete_tokens_there_is_only_the_reference(source: Source) -> None:
    made = corrector(TASKS["poems"], Rules({}, frozenset([EOS])), clean=0.0)
    assert all(correction.actions == gold(row) for row, correction, _ in examples(made, 20, source))


@pytest.mark.parametrize("source", PLANTED)
def test_a_task_in_which_nothing_is_wrong_gives_clean_examples(source: Source) -> None:
    anything = Task(TASKS["poems"].train, TASKS["poems"].test, alive=lambda row, text: True)
    made = corrector(anything, rules(), clean=0.0)
    assert all(is_clean(correction) for _, correction, _ in examples(made, 20, source))


@pytest.mark.parametrize("source", PLANTED)
def test_the_same_seed_gives_the_same_example(source: Source) -> None:
    made = corrector(TASKS["signs"], rules(), clean=0.2)
    assert examples(made, 30, source, 1) == examples(made, 30, source, 1) != examples(made, 30, source, 2)
