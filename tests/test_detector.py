from __future__ import annotations

import itertools
import random
import warnings
from dataclasses import replace
from typing import Any, get_args

import naive
import pytest
import torch
from teachers import BUDGET, EOS, TASKS, UNITS, bigrams, played_by_chance, rules, teacher, text, tiny_policy, typed

from rl_backspace import pool
from rl_backspace.config import Warmup
from rl_backspace.corrections import SOURCES, Corrector
from rl_backspace.detector import State, ages, diagnose, observe, summarise
from rl_backspace.engine import Engine
from rl_backspace.policy import Policy
from rl_backspace.pool import Asker, Entry
from rl_backspace.semantics import Budget, Memory, Retry
from rl_backspace.tasks import Task, signs
from rl_backspace.warmup import make_corrector

ROWS = [{"prompt": "?", "answer": "aaaa"}, {"prompt": "!", "answer": "abba"}]
LETTERS = Task(ROWS, ROWS[:1])  # the first row's right answer has one letter, what answers are made of is two
SHORT = Budget(answer=6, actions=18)


def examiner(policy: Policy, task: Task, budget: Budget = SHORT, **config: Any) -> tuple[Asker, Corrector]:
    made = Warmup(**config)
    corrector = make_corrector(policy, task, budget, made)
    engine = Engine(policy.model, policy.rules)
    return Asker(policy, corrector.teacher, engine, made, 2, torch.Generator()), corrector


# the age of an error


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize(("units", "retry"), itertools.product(UNITS, get_args(Retry)))
def test_an_error_ages_with_each_token_that_is_typed_after_it(task: Task, units: str, retry: Retry) -> None:
    its = teacher(task, rules(units, retry=retry), Budget(answer=16, actions=24, deletes=10))
    seen = set()
    for seed, row in enumerate(task.train[:20]):
        expert = its.expert(row)
        trace = played_by_chance(expert, random.Random(seed), 24).trace
        slow = naive.Naive(its.rules, its.budget)
        expected: list[int | None] = []
        for action in trace:
            beginnings = [slow.cells[: n + 1] for n in range(len(slow.cells))]
            dead = sum(not task.alive(row, text(beginning)) for beginning in beginnings)
            expected.append(None if set(its.rules.deletes) <= slow.forbidden() else dead)
            slow.press(action)
        assert ages(expert, trace) == expected
        seen |= set(expected)
    assert {None, 0, 1, 2, 3} <= seen


def test_ages_by_hand() -> None:
    row = {"prompt": "", "answer": "ab"}
    expert = teacher(Task([row], [row]), rules()).expert(row)
    a, b, back = ord("a"), ord("b"), 900
    assert ages(expert, []) == []
    assert ages(expert, [a, b, EOS]) == [None, 0, 0]
    assert ages(expert, [a, a, b, back, back, b, EOS]) == [None, 0, 1, 2, 1, 0, 0]


# measures


def states(rng: random.Random, count: int) -> list[State]:
    """With few distinct probabilities, so that some are equal."""
    return [State(rng.randrange(6) / 5, rng.random() < 0.4, rng.choice([0, 0, 1, 2, 3, 5])) for _ in range(count)]


@pytest.mark.parametrize("seed", range(30))
def test_the_measures_of_made_up_states(seed: int) -> None:
    rng = random.Random(seed)
    found = states(rng, rng.randint(1, 60))
    wrong, right = [s for s in found if s.age > 0], [s for s in found if s.age == 0]
    measures = summarise(found)
    assert (measures["wrong"], measures["right"]) == (len(wrong), len(right))
    for some, key in ((wrong, "p_delete_wrong"), (right, "p_delete_right")):
        total = sum(s.probability for s in some)
        assert measures[key] == (pytest.approx(total / len(some)) if some else None)
    pairs = [(w.probability, r.probability) for w in wrong for r in right]
    won = sum((w > r) + 0.5 * (w == r) for w, r in pairs)
    assert measures["auc"] == (pytest.approx(won / len(pairs)) if pairs else None)
    both = [s for s in wrong if s.pressed]
    pressed = [s for s in found if s.pressed]
    assert measures["precision"] == (pytest.approx(len(both) / len(pressed)) if pressed else None)
    assert measures["recall"] == (pytest.approx(len(both) / len(wrong)) if wrong else None)
    kinds = {"1": [1], "2": [2], "3+": [3, 5]}
    of = {age: [s.probability for s in wrong if s.age in counted] for age, counted in kinds.items()}
    assert measures["by_age"] == {age: pytest.approx(sum(some) / len(some)) for age, some in of.items() if some}
    assert list(measures["by_age"]) == sorted(measures["by_age"])


def test_the_measures_by_hand() -> None:
    found = [State(0.9, True, 1), State(0.3, False, 2), State(0.5, True, 0), State(0.1, False, 0)]
    measures = summarise(found)
    assert measures == {
        "p_delete_wrong": pytest.approx(0.6),
        "p_delete_right": pytest.approx(0.3),
        "precision": 0.5,
        "recall": 0.5,
        "auc": 0.75,
        "by_age": {"1": 0.9, "2": 0.3},
        "wrong": 2,
        "right": 2,
    }


def test_what_nothing_is_known_of_is_none() -> None:
    shares = ("p_delete_wrong", "p_delete_right", "precision", "recall", "auc")

    def unknown(found: list[State]) -> set[str]:
        measures = summarise(found)
        return {key for key in shares if measures[key] is None}

    assert unknown([]) == set(shares) and summarise([])["by_age"] == {}
    assert unknown([State(0.5, False, 0)]) == {"p_delete_wrong", "precision", "recall", "auc"}
    assert unknown([State(0.5, True, 0)]) == {"p_delete_wrong", "recall", "auc"}
    assert unknown([State(0.5, False, 1)]) == {"p_delete_right", "precision", "auc"}
    assert unknown([State(0.5, False, 1), State(0.5, False, 0)]) == {"precision"}


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_equal_probabilities_tell_nothing(probability: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wrong, right in ((1, 1), (1, 4), (5, 3)):
            found = [State(probability, False, 1)] * wrong + [State(probability, False, 0)] * right
            assert summarise(found)["auc"] == 0.5


# what the policy does


@pytest.mark.parametrize("retry", get_args(Retry))
@pytest.mark.parametrize("memory", get_args(Memory))
def test_what_is_observed_equals_each_state_scored_alone(
    memory: Memory, retry: Retry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CHUNK", 10 * 6 * 128)  # more than one chunk
    policy = tiny_policy(memory, retry, ("token", "answer"))
    with torch.no_grad():
        policy.model.get_output_embeddings().weight[sorted(policy.rules.deletes)] *= 3
    task = signs(3, train=20, test=1)
    asker, _ = examiner(policy, task)
    prompts = policy.encode([row["prompt"] for row in task.train])
    traces = []
    for i in range(35):
        entry = Entry(prompts[i % 5], asker.teacher.expert(task.train[i % 5]))
        traces.append((entry, played_by_chance(entry.expert, random.Random(i), 6).trace))
    policy.model.train()
    found = iter(observe(asker, traces))
    assert policy.model.training
    policy.model.eval()
    deletes, pressed = sorted(policy.rules.deletes), set()
    for entry, trace in traces:
        slow = naive.Naive(policy.rules, SHORT)
        for action, age in zip(trace, ages(entry.expert, trace), strict=True):
            if not set(deletes) <= slow.forbidden():
                logprobs = naive.logprobs(policy.model, [*entry.prompt, *slow.context()], slow.forbidden())
                state = next(found)
                assert state.probability == pytest.approx(logprobs[deletes].exp().sum().item(), abs=1e-4)
                assert state.pressed == (int(logprobs.argmax()) in deletes)
                assert state.age == age
                pressed.add(state.pressed)
            slow.press(action)
    assert next(found, None) is None and pressed == {False, True}


def test_known_probabilities_are_observed_and_summarised() -> None:
    """A policy that sees the last letter only: it takes back an error at once or not at all."""
    policy = bigrams({"?": {"a": 0.6, "b": 0.4}, "a": {"a": 0.7, "$": 0.2, "<": 0.1}, "b": {"a": 0.05, "<": 0.95}})
    asker, _ = examiner(policy, LETTERS)
    (prompt,) = policy.encode(["?"])
    entry = Entry(prompt, asker.teacher.expert(ROWS[0]))
    found = observe(asker, [(entry, typed(policy, "ab<aaa$")), (entry, typed(policy, "ba<<aa"))])
    probabilities, pressed, aged = zip(*((s.probability, s.pressed, s.age) for s in found), strict=True)
    assert probabilities == pytest.approx([0.1, 0.95, 0.1, 0.1, 0.1, 0.1, 0.95, 0.1, 0.95, 0.1], abs=1e-5)
    assert pressed == (False, True, False, False, False, False, True, False, True, False)
    assert aged == (0, 1, 0, 0, 0, 0, 1, 2, 1, 0)
    measures = summarise(found)
    assert measures["p_delete_wrong"] == pytest.approx((3 * 0.95 + 0.1) / 4, abs=1e-5)
    assert measures["p_delete_right"] == pytest.approx(0.1, abs=1e-5)
    assert (measures["precision"], measures["recall"]) == (1.0, 0.75)
    assert measures["by_age"] == {"1": pytest.approx(0.95, abs=1e-5), "2": pytest.approx(0.1, abs=1e-5)}


@pytest.mark.parametrize("delete", [0.0, 0.3, 0.999])
def test_a_policy_that_does_not_look_tells_nothing(delete: float) -> None:
    """Deleting with the same probability everywhere, from never to nearly always."""
    goes_on = {"a": 0.5 * (1 - delete), "b": 0.5 * (1 - delete), "<": delete}
    policy = bigrams({"?": goes_on})
    asker, corrector = examiner(policy, LETTERS, clean=0.5)
    found = diagnose(asker, corrector, ROWS[1:] * 8, seed=0)
    assert list(found) == list(SOURCES)
    for measures in found.values():
        assert measures["wrong"] > 0 and measures["right"] > 0
        for key in ("p_delete_wrong", "p_delete_right"):
            assert measures[key] == pytest.approx(delete, abs=1e-4)
        assert measures["recall"] == float(delete > 0.5)
        share = measures["wrong"] / (measures["wrong"] + measures["right"])
        assert measures["precision"] == (pytest.approx(share) if delete > 0.5 else None)
        assert all(p == pytest.approx(delete, abs=1e-4) for p in measures["by_age"].values())


def test_a_source_that_the_policy_gives_no_errors_of_has_no_states() -> None:
    """One that is always right, and sure of it; the errors of others it takes back."""
    policy = bigrams({"?": {"b": 1.0}, "b": {"$": 0.9, "<": 0.1}, "a": {"<": 1.0}})
    task = Task([{"prompt": "?", "answer": "b"}, {"prompt": "!", "answer": "a"}], [{"prompt": "?", "answer": "b"}])
    asker, corrector = examiner(policy, task)
    found = diagnose(asker, corrector, task.test * 10, seed=0)
    for source in ("samples", "uncertain"):
        assert (found[source]["wrong"], found[source]["right"], found[source]["auc"]) == (0, 0, None)
    assert found["rollouts"]["wrong"] == 0 and found["rollouts"]["right"] >= 20
    assert found["rollouts"]["p_delete_right"] == pytest.approx(0.1, abs=1e-4)
    assert 0 < found["random"]["recall"] < 1 and found["random"]["precision"] == 1.0


def test_a_diagnosis_is_the_same_each_time_and_moves_no_other_dice() -> None:
    policy = tiny_policy()
    task = signs(3, train=20, test=6)
    asker, corrector = examiner(policy, task, entropy=0.0)
    first = diagnose(asker, corrector, task.test, seed=1)
    before = random.getstate(), torch.get_rng_state()
    asker.generator.manual_seed(99)
    assert diagnose(asker, corrector, task.test, seed=1) == first
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    again = diagnose(asker, corrector, task.test, seed=2)
    assert all(again[source] != first[source] for source in SOURCES)


def test_half_of_the_planted_examples_are_clean_whatever_is_trained_on() -> None:
    """The caller says how much; a share of clean ones of its own would have no wrong states to tell by."""
    policy = tiny_policy()
    task = signs(3, train=20, test=6)
    asker, corrector = examiner(policy, task, clean=1.0)
    assert diagnose(asker, corrector, task.test, seed=0)["random"]["wrong"] == 0
    assert diagnose(asker, replace(corrector, clean=0.5), task.test, seed=0)["random"]["wrong"] > 0


def test_the_budget_of_the_examples_is_the_teachers() -> None:
    """At the last action no delete is legal, so that there is no state to judge."""
    row = {"prompt": "", "answer": "ab"}
    expert = teacher(Task([row], [row]), rules(), replace(BUDGET, actions=3)).expert(row)
    assert ages(expert, [ord("a"), ord("a"), ord("a")]) == [None, 0, None]
