"""The controls on policies whose answer is known: an oracle that deletes, one that never does, one at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from torch import Tensor

from rl_backspace.config import Delete
from rl_backspace.controls import Examination, examine, paired
from rl_backspace.engine import Engine, Rollout, Running, Sampling
from rl_backspace.evaluate import evaluate
from rl_backspace.policy import Policy, create
from rl_backspace.semantics import Budget, Rules
from rl_backspace.tasks import signs

TASK = signs(count=3, train=50, test=400)
BUDGET = Budget(answer=5, actions=60)
Script = Callable[[dict[str, Any], str, Running], dict[str, float]]
"""(row, visible text, the rollout) -> odds of `+`, `-`, `.` (the end) and `<` (a delete); the rest has none."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    return create(str(checkpoint(tmp_path_factory.mktemp("model"))), Delete(), None, seed=0)


class Scripted(Engine):
    """An engine whose policy is a script."""

    def __init__(self, policy: Policy, script: Script):
        super().__init__(policy.model, policy.rules, ahead=1)  # what the script says may change behind a context
        self.policy, self.script = policy, script
        prompts = policy.encode([row["prompt"] for row in TASK.test])
        self.rows_by_prompt = {tuple(ids): row for ids, row in zip(prompts, TASK.test, strict=True)}
        signs = (policy.tokenizer.convert_tokens_to_ids(sign) for sign in "+-")
        delete = min(policy.rules.deletes)
        self.ids = dict(zip("+-.<", (*signs, policy.tokenizer.eos_token_id, delete), strict=True))

    def _sample(self, logits: Tensor, rows: list[Running], *rest: Any) -> Any:
        logits = torch.full((len(rows), max(self.ids.values()) + 1), -1e4)
        for n, row in enumerate(rows):
            text = self.policy.text(row.machine.visible)
            for key, odds in self.script(self.rows_by_prompt[tuple(row.prompt)], text, row).items():
                logits[n, self.ids[key]] = math.log(odds) if odds else -1e4
        return super()._sample(logits, rows, *rest)


def examination(made: Policy, script: Script, how: str = "sampled", budget: Budget = BUDGET) -> Examination:
    of = Examination(made, TASK, TASK.test, budget, how, seed=0)
    of.engine = Scripted(made, script)
    return of


def typing(text: str) -> dict[str, float]:
    """Any sign, `+` a little likelier; then the end."""
    return {"+": 0.6, "-": 0.4} if len(text) < 3 else {".": 1.0}


def oracle(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
    return typing(text) if TASK.alive(row, text) else {**typing(text), "<": 1e9}


def never(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
    return typing(text)


def whenever(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
    return {**{key: 0.8 * odds for key, odds in typing(text).items()}, "<": 0.2} if text else typing(text)


@cache
def by_chance() -> float:
    """Accuracy of signs drawn as `typing` does."""
    chances = []
    for row in TASK.test:
        ways = ("".join(way) for way in itertools.product("+-", repeat=3))
        chances.append(sum(0.6 ** way.count("+") * 0.4 ** way.count("-") for way in ways if TASK.correct(row, way)))
    return float(np.mean(chances))


@pytest.mark.parametrize("how", ["sampled", "greedy"])
def test_an_oracle_that_deletes_what_is_wrong_is_seen_as_one(made: Policy, how: str) -> None:
    of = examination(made, oracle, how)
    arms, did = of.arms(), of.deletions()
    assert arms["allowed"]["accuracy"] == 1.0
    greedy = np.mean([TASK.correct(row, "+++") for row in TASK.test])
    base = by_chance() if how == "sampled" else greedy
    assert arms["blocked"]["accuracy"] == pytest.approx(base, abs=0 if how == "greedy" else 0.08)
    above = arms["blocked"]["allowed_above"]
    assert above["difference"] == pytest.approx(1 - arms["blocked"]["accuracy"])
    assert above["interval"][0] > 0.3
    for arm in ("random", "best_of", "majority"):
        assert arms[arm]["accuracy"] < 0.9 and arms[arm]["allowed_above"]["interval"][0] > 0
    assert did["precision"] == did["recall"] == 1.0
    assert did["spoiled"] == did["right_to_wrong"] == did["repeats"] == did["out_of_actions"] == 0
    assert did["rescued"] == pytest.approx(1 - did["first_attempt"])
    assert did["first_attempt"] == pytest.approx(base, abs=0 if how == "greedy" else 0.08)
    assert 0 < did["wrong_to_right"] < 1 and did["runs_per_answer"] > 0.5  # type: ignore[operator]
    kept = len(TASK.test) * 4 / sum(len(rollout.actions) for rollout in of.allowed)
    assert did["thrown_away"] == pytest.approx(1 - kept)


def test_one_that_never_deletes_is_its_own_control(made: Policy) -> None:
    of = examination(made, never)
    arms, did = of.arms(), of.deletions()
    assert of.n == 1 and of.best_of(1) == of.majority(1) == of.blocked == of.allowed
    for arm in ("blocked", "best_of", "majority"):
        assert arms[arm]["allowed_above"] == {"difference": 0, "interval": [0, 0]}
    assert arms["random"]["deletes_per_answer"] == 0
    assert did["first_attempt"] == arms["allowed"]["accuracy"]
    assert did["rescued"] == did["spoiled"] == did["thrown_away"] == did["runs_per_answer"] == did["recall"] == 0
    assert did["wrong_to_right"] is did["right_to_wrong"] is did["repeats"] is did["precision"] is None


def test_one_that_deletes_at_random_is_no_better_than_deleting_at_random(made: Policy) -> None:
    free = Rules(made.rules.deletes, made.rules.eos, "erase", "free")
    arms = examination(Policy(made.model, made.tokenizer, free), whenever).arms()
    low, high = arms["random"]["allowed_above"]["interval"]
    assert low < 0 < high and high - low < 0.2
    for key in ("deletes_per_answer", "actions_per_answer"):
        assert arms["random"][key] == pytest.approx(arms["allowed"][key], rel=0.15)
    assert arms["allowed"]["deletes_per_answer"] > 0.5


def test_one_that_spoils_right_answers_is_found_out(made: Policy) -> None:
    """It deletes a right answer's last sign once; banned, it cannot come back."""

    def vandal(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
        if TASK.correct(row, text) and not rollout.machine.deleted:
            return {**typing(text), "<": 1e9}
        return typing(text)

    of = examination(made, vandal)
    did, right = of.deletions(), of.arms()["blocked"]["accuracy"]
    assert did["rescued"] == did["wrong_to_right"] == did["precision"] == did["recall"] == 0
    assert did["spoiled"] == did["first_attempt"] == pytest.approx(right, abs=0.08)
    assert did["right_to_wrong"] == 1


def test_what_is_typed_again_counts_as_repeated(made: Policy) -> None:
    free = Rules(made.rules.deletes, made.rules.eos, "erase", "free")

    def stubborn(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
        presses = text == "+" and rollout.machine.deleted < 2
        return {"+": 1.0, "<": 1e9 * presses} if len(text) < 3 else {".": 1.0}

    did = examination(Policy(made.model, made.tokenizer, free), stubborn).deletions()
    assert did["repeats"] == 1 and did["runs_per_answer"] == 2 and did["thrown_away"] == pytest.approx(0.5)


def test_loops_run_out_of_actions(made: Policy) -> None:
    free = Rules(made.rules.deletes, made.rules.eos, "erase", "free")

    def looping(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
        return {"+": 1.0, "<": 1e9} if text else {"+": 1.0}

    assert examination(Policy(made.model, made.tokenizer, free), looping).deletions()["out_of_actions"] == 1


def test_the_tries_cost_no_fewer_actions_than_the_policy(made: Policy) -> None:
    of = examination(made, oracle)
    arms = of.arms()
    assert arms["best_of"]["n"] == arms["majority"]["n"] == of.n > 1
    assert arms["best_of"]["actions_per_answer"] >= arms["allowed"]["actions_per_answer"]
    assert (of.n - 1) * arms["blocked"]["actions_per_answer"] < arms["allowed"]["actions_per_answer"]
    assert [tries[0] for tries in of.tries] == of.blocked
    assert of.best_of(1) == of.majority(1) == of.blocked


def test_tries_are_chosen_by_likelihood_and_by_vote(made: Policy) -> None:
    of = examination(made, never)
    plus, minus, end = (of.engine.ids[key] for key in "+-.")  # type: ignore[attr-defined]

    def answer(signs: list[int], logprob: float, ended: str = "eos") -> Rollout:
        ids = [*signs, end] if ended == "eos" else signs
        return Rollout([1], ids, ids, [logprob], ended, 0, 1)  # type: ignore[arg-type]

    likely, rare, again = answer([plus], -1.0), answer([minus], -5.0), answer([minus], -4.0)
    unfinished = answer([plus, plus], 0.0, "length")
    of.__dict__["tries"] = [[rare, likely, unfinished, again]]
    assert of.best_of(2) == of.best_of(4) == [likely]
    assert of.majority(3) == [likely] and of.majority(4) == [again]
    of.__dict__["tries"] = [[unfinished, unfinished, rare]]
    assert of.best_of(3) == of.majority(3) == [rare]


def test_the_curve_counts_what_is_right_in_time(made: Policy) -> None:
    of = examination(made, oracle)
    curve = of.curve()
    right = of.right(of.allowed)
    for actions, accuracy in curve["allowed"]:
        finished = [len(r.actions) <= actions and good for r, good in zip(of.allowed, right, strict=True)]
        assert accuracy == pytest.approx(np.mean(finished))
    assert curve["allowed"][:2] == [[0.0, 0.0], [4.0, curve["allowed"][1][1]]] and curve["allowed"][-1][1] == 1.0
    assert curve["best_of"][0] == [of.arms()["blocked"]["actions_per_answer"], of.arms()["blocked"]["accuracy"]]
    for n, (actions, _) in enumerate(curve["majority"], 1):
        assert actions == pytest.approx(np.mean([sum(len(r.actions) for r in tries[:n]) for tries in of.tries]))


def test_tries_count_what_they_take_and_not_what_the_first_one_took(made: Policy) -> None:
    """Greedy, `+` to the end of the budget; sampled, mostly shorter answers."""

    def rambling(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
        return {"+": 0.4, ".": 0.3, "-": 0.3, "<": 0.35} if len(text) > 1 else {"+": 1.0}

    of = examination(made, rambling, "greedy")
    costs = [actions for actions, _ in of.curve()["best_of"]]
    assert costs[0] == 5 and costs[1] - costs[0] < 4.5
    allowed = sum(len(r.actions) for r in of.allowed) / len(of.rows)
    assert costs[of.n - 1] >= allowed and (of.n == 1 or costs[of.n - 2] < allowed)


def test_each_of_several_tokens_is_pressed_at_random_as_often_as_the_policy_presses_it(made: Policy) -> None:
    (delete,) = made.rules.deletes
    again = made.tokenizer.convert_tokens_to_ids("~")
    rules = Rules({delete: "token", again: "answer"}, made.rules.eos, "erase", "free")

    def rash(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
        return {**typing(text), "<": 0.05, "~": 0.2} if text else typing(text)

    of = examination(Policy(made.model, made.tokenizer, rules), rash)
    of.engine.ids |= {"<": delete, "~": again}  # type: ignore[attr-defined]
    counts = [[sum(r.actions.count(t) for r in rolls) for t in (delete, again)] for rolls in (of.allowed, of.random())]
    assert counts[0][1] > 3 * counts[0][0] > 100
    assert counts[1] == pytest.approx(counts[0], rel=0.25)


def test_each_deletion_is_judged_by_what_it_changed(made: Policy) -> None:
    """From `+` to `-` and back again, one deletion each: the two change the outcome in opposite ways."""
    free = Rules(made.rules.deletes, made.rules.eos, "erase", "free")

    def fickle(row: dict[str, Any], text: str, rollout: Running) -> dict[str, float]:
        deleted = rollout.machine.deleted
        if len(text) == 3:
            return {".": 1.0}
        if not text:
            return {"-": 1.0} if deleted == 1 else {"+": 1.0}
        return {"+": 1.0, "<": 1e9} if len(text) == 1 and deleted < 2 else {"+": 1.0}

    of = examination(Policy(made.model, made.tokenizer, free), fickle, "greedy")
    did = of.deletions()
    plus, minus = ([TASK.correct(row, text) for row in TASK.test] for text in ("+++", "-++"))
    lost = np.mean([a and not b for a, b in zip(plus, minus, strict=True)])
    won = np.mean([b and not a for a, b in zip(plus, minus, strict=True)])
    assert did["runs_per_answer"] == 2 and did["first_attempt"] == np.mean(plus) and lost + won > 0
    # before the first run it would be +++; after it, -++; before the second -++; after it, +++
    assert did["right_to_wrong"] == pytest.approx((lost + won) / 2) and did["wrong_to_right"] == did["right_to_wrong"]
    assert did["rescued"] == did["spoiled"] == 0


def test_examining_is_evaluating_and_more(made: Policy) -> None:
    rows = TASK.test[:40]
    plain, found = evaluate(made, TASK, rows, BUDGET, seed=3), examine(made, TASK, rows, BUDGET, seed=3)
    for how in ("sampled", "greedy"):
        for token in ("allowed", "blocked"):
            cell = {key: found[how]["arms"][token][key] for key in plain[token][how]}
            assert cell == plain[token][how]


def test_a_policy_without_a_token_has_one_arm(made: Policy) -> None:
    twin = Policy(made.model, made.tokenizer, Rules({}, made.rules.eos))
    found = examine(twin, TASK, TASK.test[:20], BUDGET)
    assert set(found["greedy"]) == {"arms", "curve"} and set(found["greedy"]["arms"]) == {"allowed"}


def test_intervals_cover_the_true_difference() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        ours, theirs = rng.random(300) < 0.7, rng.random(300) < 0.6
        low, high = paired(ours, theirs)["interval"]
        covered += low <= 0.1 <= high
    assert 50 <= covered <= 60


def test_random_deletes_press_only_where_they_may(made: Policy) -> None:
    of = examination(made, whenever, budget=Budget(answer=5, actions=20, deletes=2))
    for rollout in of.random():
        assert rollout.deletes <= 2
        assert rollout.end in ("eos", "length", "budget", "stuck")
    assert max(rollout.deletes for rollout in of.random()) == 2
    assert of.roll(Sampling())  # and a plain sampling is unharmed by it
