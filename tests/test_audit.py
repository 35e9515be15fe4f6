from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from checkpoints import checkpoint
from commands import call
from test_cli import Replace, assert_refused, experiment, here

from rl_backspace.audit import (
    AGAIN,
    CUT,
    EMPTIED,
    EMPTY,
    FARM,
    LATE,
    LOOP,
    MANY,
    MOST,
    ONE,
    ORDERINGS,
    RIGHT,
    SOME,
    SORRY,
    SPOILED,
    TRACES,
    WRONG,
    Audit,
    Violation,
    audit,
    traces,
)
from rl_backspace.config import Reward, parse, read_yaml
from rl_backspace.experiment import Experiment, prepare
from rl_backspace.semantics import Machine, Memory, Retry, replay
from rl_backspace.terms import load_terms
from rl_backspace.warmup import make_corrector

__all__ = ["here"]  # a fixture
TASKS: dict[str, dict[str, Any]] = {
    "signs": {"fn": "signs", "count": 3, "train": 30, "test": 4},
    "one digit": {"fn": "arithmetic", "operations": "+", "digits": 1, "train": 40, "test": 4},
    "sudoku": {"fn": "sudoku", "train": 12, "test": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def prepared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("experiment")
    trainer = {"max_steps": 100, "max_completion_length": 6}
    path = experiment(folder, base, task={**TASKS["signs"]}, delete={"budget": 24}, trainer=trainer)
    return prepare(parse(read_yaml(path)), None)


def audited(prepared: Experiment, folder: Path | None = None, **rewards: dict[str, Any]) -> Audit:
    """The audit of other rewards than the file's."""
    named = {name: Reward(**reward) for name, reward in rewards.items()}
    terms, weights = load_terms(named, prepared.task, prepared.policy)
    prepared.args.reward_weights = weights
    config = prepared.config.model_copy(update={"rewards": named})
    return audit(replace(prepared, config=config, terms=terms), rows=6)


def broken(found: Audit) -> set[tuple[str, str]]:
    return {(violation.ordering.above, violation.ordering.below) for violation in found.violations}


def free(violation: Violation) -> bool:
    """A correction that costs nothing wants other advice than one that pays."""
    return violation.ordering.below in (ONE, LATE)


CORRECT = {"fn": "correctness:checked"}
FLAT = {"fn": "delete_cost:flat", "kwargs": {"cost": 0.01}}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("retry", get_args(Retry))
@pytest.mark.parametrize("memory", get_args(Memory))
@pytest.mark.parametrize("units", [{"<b>": "token"}, {"<b>": 2}, {"<b>": "answer"}, {"<b>": "token", "<c>": 3}])
def test_each_trace_is_what_its_name_says(
    task: str, retry: Retry, memory: Memory, units: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    trainer = {"max_completion_length": 24 if task == "sudoku" else 6}
    delete = {"tokens": Replace(units), "memory": memory, "retry": retry, "budget": 60 if task == "sudoku" else 24}
    path = experiment(tmp_path, base, task=Replace(TASKS[task]), delete=delete, trainer=trainer)
    made = prepare(parse(read_yaml(path)), None)
    corrector = make_corrector(made.policy, made.task, made.budget, made.config.warmup)
    eos = made.policy.tokenizer.eos_token_id
    for row in made.task.train[:3]:
        found = traces(corrector, corrector.teacher.expert(row), random.Random(0), len(made.policy.tokenizer))

        def right(machine: Machine, row: dict[str, Any] = row) -> bool:
            return machine.end == "eos" and made.task.correct(row, made.policy.text(machine.visible))

        for name, machine in found.items():
            again = replay(machine.trace, made.policy.rules, made.budget)  # legal, action by action
            assert (again.visible, again.end) == (machine.visible, machine.end), name
        assert {RIGHT, ONE, WRONG, SORRY, EMPTY, EMPTIED, CUT} <= found.keys()
        assert {name: right(machine) for name, machine in found.items()} == {
            name: name in (RIGHT, ONE, LATE, SOME, MOST, AGAIN) for name in found
        }
        deletes = {name: machine.deleted for name, machine in found.items()}
        assert deletes[RIGHT] == deletes[WRONG] == deletes[EMPTY] == deletes[CUT] == 0
        assert deletes[ONE] >= 1 and deletes[SORRY] >= 1
        assert found[SORRY].visible == found[WRONG].visible == found.get(SPOILED, found[WRONG]).visible
        assert deletes.get(SOME, MANY) >= MANY and deletes.get(MOST, MANY + 1) > MANY
        assert found[WRONG].end == found[SORRY].end == "eos"
        assert len(found[WRONG].visible) > 1 and deletes.get(SPOILED, 1) >= 1
        assert (AGAIN in found) == (retry == "free")
        assert deletes.get(FARM, 2) > 1 and (FARM not in found or found[FARM].end in ("budget", "length"))
        assert found[EMPTY].visible == found[EMPTIED].visible == [eos]
        assert deletes[EMPTIED] > 0 and found[CUT].end == "length"
        if LOOP in found:
            assert found[LOOP].end in ("budget", "length") and len(found[LOOP].trace) == made.budget.most_actions
            assert found[LOOP].deleted > 1
        if retry == "free" or (units == {"<b>": "token"} and task != "one digit"):
            assert LOOP in found


def test_a_reward_that_teaches_what_is_wanted_passes(prepared: Experiment) -> None:
    found = audited(
        prepared,
        correct=CORRECT,
        cost=FLAT,
        circles={"fn": "loop_penalty:states"},
        unfinished={"fn": "ending:unfinished"},
        empty={"fn": "ending:empty"},
        compute={"fn": "length:actions"},
        shaping={"fn": "shaping:progress"},
    )
    assert not found.violations
    assert set(found.earned) == set(TRACES) - {AGAIN}
    assert [(o.above, o.below) for o in found.unchecked] == [(RIGHT, AGAIN)]  # with a ban
    right = [sum(terms) for points in found.earned[RIGHT].values() for terms in points]
    assert min(right) > 0.8


@pytest.mark.parametrize(
    ("rewards", "expected", "blamed"),
    [
        ({"correct": CORRECT}, {(RIGHT, ONE)}, None),  # a correction that was not needed costs nothing
        ({"cost": FLAT}, {(RIGHT, WRONG), (ONE, WRONG), (SOME, WRONG)}, "cost"),
        ({"correct": CORRECT, "cost": {**FLAT, "weight": 50.0}}, {(SOME, WRONG)}, "cost"),
        ({"correct": CORRECT, "cost": {**FLAT, "weight": 150.0}}, {(ONE, WRONG), (SOME, WRONG)}, "cost"),
        ({"correct": CORRECT, "cost": {**FLAT, "weight": 0.0}}, {(RIGHT, ONE)}, None),
        (
            {"correct": CORRECT, "cost": {**FLAT, "weight": -1.0}},
            {
                (RIGHT, ONE),
                (ONE, SOME),
                (SOME, MOST),
                (WRONG, SORRY),
                (WRONG, SPOILED),
                (WRONG, LOOP),
                (WRONG, EMPTIED),
            },
            "cost",
        ),
        (
            {"correct": CORRECT, "cost": FLAT, "mending": {"fn": "improvement:bonus"}},
            {(RIGHT, ONE), (ONE, SOME), (SOME, MOST), (WRONG, SORRY)},
            "mending",
        ),
        (
            {"correct": CORRECT, "cost": FLAT, "short": {"fn": "length:over", "kwargs": {"limit": 1, "cost": 0.1}}},
            {(WRONG, EMPTY), (WRONG, EMPTIED)},
            "short",
        ),
        (
            {"correct": CORRECT, "cost": FLAT, "lazy": {"fn": "ending:unfinished", "weight": -1.0}},
            {(WRONG, CUT)},
            "lazy",
        ),
    ],
)
def test_each_way_to_be_farmed_is_found_and_the_term_named(
    rewards: dict[str, Any], expected: set[tuple[str, str]], blamed: str | None, prepared: Experiment
) -> None:
    found = audited(prepared, **rewards)
    assert expected <= broken(found)
    assert broken(found) - expected <= {
        (WRONG, LOOP),
        (WRONG, FARM),
        (WRONG, CUT),
        (RIGHT, LATE),
    }  # which may come with them
    for violation in found.violations:
        assert (violation.blame and violation.blame[0]) in (blamed, None)
        for said in (violation.ordering.above, violation.ordering.below):
            assert said in str(violation)
        assert (violation.ordering.mend in str(violation)) == (bool(violation.blame) or not free(violation))
        assert violation.of == 6 and bool(violation.blame) == (violation.margin > 0)


def test_a_schedule_is_looked_at_all_the_way(prepared: Experiment, tmp_path: Path) -> None:
    """A reward that pays for deleting between 40 and 60 % of training alone."""
    (tmp_path / "mine.py").write_text(
        "def phase(deletes, trainer_state):\n"
        "    share = trainer_state.global_step / trainer_state.max_steps\n"
        "    return [count * (0.4 <= share <= 0.6) for count in deletes]\n"
    )
    found = audited(prepared, correct=CORRECT, cost=FLAT, mine={"fn": f"{tmp_path / 'mine.py'}:phase"})
    assert (RIGHT, ONE) in broken(found)
    assert all(violation.shares == (0.4, 0.6) for violation in found.violations)
    assert "from 40 to 60 % of training" in str(found.violations[0])


def test_a_cost_that_rises_from_nothing_is_no_violation(prepared: Experiment) -> None:
    """Right at once and right after a correction are equal at first, and not in the end."""
    found = audited(prepared, correct=CORRECT, cost=FLAT)
    assert not found.violations
    gaps = [sum(found.mean(RIGHT, point)) - sum(found.mean(ONE, point)) for point in range(len(found.shares))]
    assert gaps[0] == 0 and gaps[-1] > 0 and gaps == sorted(gaps)


def test_every_ordering_is_of_traces_that_there_are() -> None:
    assert all({ordering.above, ordering.below} <= set(TRACES) for ordering in ORDERINGS)


# the command line

FARMED = {
    "correct": CORRECT,
    "cost": FLAT,
    "mending": {"fn": "improvement:bonus", "kwargs": {"bonus": 0.3}},
}


def test_the_audit_prints_what_traces_earn_and_what_is_wrong(here: Path, base: Path) -> None:
    path = experiment(here, base, rewards=FARMED, trainer={"max_completion_length": 6}, delete={"budget": 24})
    result = call("rewards", "audit", path)
    assert result.code == 1 and "Traceback" not in result.err
    for trace in (RIGHT, WRONG, EMPTY):
        assert trace in result.out
    assert "violated: 'right, 1 correction' earns up to 0.3 more than 'right'" in result.out
    assert "'mending' makes 0.3 of the difference" in result.out
    result = call("rewards", "audit", path, "rewards.mending.weight=0")
    assert result.code == 0 and "violated" not in result.out


def test_train_warns_refuses_or_says_nothing(here: Path, base: Path) -> None:
    path = experiment(here, base, rewards=FARMED, evaluation={"rows": 1})
    refused = assert_refused(here, "train", path, "audit=strict")
    assert any("'right, 1 correction' earns" in line and "'mending'" in line for line in refused)
    result = call("train", path, "--dry-run")
    assert result.code == 0 and "warning: rewards: 'right, 1 correction' earns" in result.err
    for quiet in ("audit=skip", "rewards.mending.weight=0"):
        result = call("train", path, "--dry-run", quiet)
        assert result.code == 0 and "warning" not in result.err


def test_an_async_reward_is_audited_too(here: Path, base: Path) -> None:
    (here / "mine.py").write_text("async def paid(deletes):\n    return [float(count) for count in deletes]\n")
    path = experiment(here, base, rewards={"correct": CORRECT, "mine": {"fn": "mine.py:paid"}})
    result = call("rewards", "audit", path)
    assert result.code == 1 and "'mine' makes" in result.out
