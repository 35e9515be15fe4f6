from __future__ import annotations

import random
from dataclasses import replace
from typing import Any, get_args

import naive
import pytest
import torch
from teachers import bigrams, tiny_policy

from rl_backspace.config import Warmup
from rl_backspace.engine import Engine
from rl_backspace.keyboard import Keyboard, keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.pool import LIKELIEST, Asker, Entry
from rl_backspace.scoring import entropy_of
from rl_backspace.semantics import Budget, Memory, Unit, replay
from rl_backspace.tasks import Task, signs, typos
from rl_backspace.warmup import make_corrector

BUDGET = Budget(answer=6, actions=18)
TASK = signs(4, train=20, test=1)


def asker(
    policy: Policy, task: Task = TASK, budget: Budget = BUDGET, keyboard: Keyboard | None = None, **config: Any
) -> Asker:
    made = Warmup(**config)
    teacher = make_corrector(policy, task, budget, made).teacher
    engine = Engine(policy.model, policy.rules, keyboard=keyboard)
    return Asker(policy, teacher, engine, made, 3, torch.Generator().manual_seed(0))


def answering(policy: Policy, task: Task = TASK) -> Policy:
    """Make the random model type mostly what answers are made of, and delete often."""
    letters = {token for row in task.train for token in policy.tokenizer(row["answer"]).input_ids}
    head = policy.model.get_output_embeddings().weight
    with torch.no_grad():
        head[sorted(letters)] *= 3
        head[sorted(policy.rules.deletes)] *= 4
    return policy


def asked(its: Asker, source: Any, rows: list[Any]) -> list[Entry]:
    return its.ask(source, rows, its.policy.encode([row["prompt"] for row in rows]))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("memory", get_args(Memory))
def test_samples_are_answers_without_deletes_some_of_which_go_wrong(memory: Memory, noisy: bool) -> None:
    task = typos(3, 0.3, train=30, test=1) if noisy else TASK
    policy = answering(tiny_policy(memory, units=("token", "answer")), task)
    keyboard = keyboard_of(task, policy)
    assert (keyboard is not None) == noisy
    its = asker(policy, task, keyboard=keyboard)
    for entry in asked(its, "samples", task.train):
        row = entry.expert.row
        assert entry.prompt == policy.encode([row["prompt"]])[0]
        assert len(entry.attempts) == its.group
        assert any(entry.expert.first_error(attempt) is not None for attempt in entry.attempts)
        for attempt in entry.attempts:
            assert policy.rules.deletes.keys().isdisjoint(attempt)
            machine = replay(attempt, policy.rules, BUDGET)
            assert machine.end in ("eos", "length") and machine.visible == attempt


def test_samples_follow_the_policy_at_their_temperature() -> None:
    """Among what is legal with the token blocked."""
    policy = tiny_policy()
    row = TASK.train[0]
    its = asker(policy, temperature=0.5)
    firsts = [attempt[0] for entry in asked(its, "samples", [row] * 700) for attempt in entry.attempts]
    expected = naive.logprobs(policy.model, policy.encode([row["prompt"]])[0], set(policy.rules.deletes), 0.5).exp()
    assert len(firsts) > 2000
    seen = torch.bincount(torch.tensor(firsts), minlength=128) / len(firsts)
    assert (seen - expected).abs().max() < 4 * (0.25 / len(firsts)) ** 0.5


def test_prompts_that_the_policy_is_always_right_of_are_left_out() -> None:
    """Not of those of whole rollouts, which also show what is right."""
    rows = [{"prompt": f"{i}?", "answer": "ab" if i % 2 else "bb"} for i in range(10)]
    policy = bigrams({"?": {"a": 1.0}, "a": {"b": 1.0}, "b": {"$": 1.0}})
    its = asker(policy, Task(rows, rows[:1]))
    assert [entry.expert.row for entry in asked(its, "samples", rows)] == rows[::2]
    assert len(asked(its, "rollouts", rows)) == 10


def test_the_keyboard_errs_in_samples_and_is_no_uncertainty() -> None:
    """Of a policy that is sure of the right letter."""
    row = {"prompt": "?", "answer": "aaaa"}
    task = Task([row, {"prompt": "!", "answer": "bcab"}], [row], typo_rate=0.3)
    policy = bigrams({"?": {"a": 1.0}})
    its = asker(policy, task, keyboard=keyboard_of(task, policy), entropy=0.1)
    typed = policy.text([token for entry in asked(its, "samples", [row] * 200) for token in entry.attempts[0]])
    assert len(typed) > 1000
    assert [typed.count(letter) / len(typed) for letter in "abc"] == pytest.approx([0.7, 0.15, 0.15], abs=0.05)
    assert asked(its, "uncertain", [row]) == []


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("units", [("token",), ("answer", 2)])
@pytest.mark.parametrize("memory", get_args(Memory))
def test_rollouts_are_whole_traces_of_the_policy_deletes_included(
    memory: Memory, units: tuple[Unit, ...], noisy: bool
) -> None:
    task = typos(3, 0.3, train=30, test=1) if noisy else TASK
    policy = answering(tiny_policy(memory, units=units), task)
    its = asker(policy, task, keyboard=keyboard_of(task, policy))
    entries = asked(its, "rollouts", task.train)
    assert [entry.expert.row for entry in entries] == task.train
    deleted = 0
    for entry in entries:
        assert len(entry.attempts) == its.group
        for trace in entry.attempts:
            machine = replay(trace, policy.rules, BUDGET)  # raises where an action is illegal
            assert machine.end is not None
            deleted += machine.deleted
    assert deleted > 5


def wrong_token(its: Asker, entry: Entry, depth: int) -> tuple[float, int | None]:
    """The entropy of the policy's choice after so much of the reference, and the likeliest wrong token there."""
    policy, gold = its.policy, entry.expert.gold
    blocked = set(policy.rules.deletes)
    logprobs = naive.logprobs(policy.model, [*entry.prompt, *gold[:depth]], blocked)
    nats = torch.distributions.Categorical(logits=logprobs).entropy().item()
    begun = policy.text(gold[:depth])
    for token in logprobs.argsort(descending=True)[:LIKELIEST].tolist():
        typed = policy.text([*gold[:depth], token])
        ends = token in policy.rules.eos or token in blocked
        if not ends and (typed == begun or not its.teacher.task.alive(entry.expert.row, typed)):
            return nats, token
    return nats, None


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("memory", get_args(Memory))
def test_an_uncertain_choice_is_one_of_high_entropy_along_the_reference(memory: Memory, late: int, noisy: bool) -> None:
    """All of those and no other: the reference, the likeliest wrong token, and as much as is noticed late."""
    task = typos(3, 0.3, train=35, test=1) if noisy else signs(4, train=35, test=1)
    policy = tiny_policy(memory, units=("token", "answer"))
    policy.model.train()
    its = replace(asker(policy, task, keyboard=keyboard_of(task, policy), late=late, entropy=4.3), group=10)
    found = {id(entry.expert.row): entry for entry in asked(its, "uncertain", task.train)}
    assert policy.model.training
    policy.model.eval()
    tempted, certain = 0, 0
    for row, prompt in zip(task.train, policy.encode([row["prompt"] for row in task.train]), strict=True):
        entry = found.get(id(row), Entry(prompt, its.teacher.expert(row)))
        assert entry.prompt == prompt
        expected = []
        for depth in range(len(entry.expert.gold)):
            nats, token = wrong_token(its, entry, depth)
            assert abs(nats - 4.3) > 1e-4  # else it could go either way
            if nats > 4.3 and token is not None:
                expected.append([*entry.expert.gold[:depth], token])
            certain += nats < 4.3
        begun = [attempt[: len(start)] for attempt, start in zip(entry.attempts, expected, strict=True)]
        assert begun == expected
        for attempt, start in zip(entry.attempts, expected, strict=True):
            rest = attempt[len(start) :]
            ends = bool(rest) and rest[-1] in policy.rules.eos
            assert len(rest) == late or (ends and len(rest) < late)
            assert policy.rules.deletes.keys().isdisjoint(rest) and policy.rules.eos.isdisjoint(rest[:-1])
            assert entry.expert.first_error(attempt) == len(start) - 1
        tempted += len(expected)
    assert tempted > 20 and certain > 20


def test_no_choice_is_uncertain_enough_for_a_high_threshold() -> None:
    assert asked(asker(tiny_policy(), entropy=9.0), "uncertain", TASK.train) == []


@pytest.mark.parametrize("source", ["samples", "uncertain", "rollouts"])
def test_what_is_asked_fits_the_model_where_answers_do(source: str) -> None:
    """A context that holds the prompt and the longest answer, and no token more."""
    prompt = max(len(row["prompt"]) for row in TASK.train)
    policy = tiny_policy(max_position_embeddings=prompt + 5)
    its = asker(policy, budget=Budget(answer=5, actions=15), entropy=0.0, late=4)
    assert asked(its, source, TASK.train)


@pytest.mark.parametrize("source", ["samples", "uncertain", "rollouts"])
def test_the_generator_alone_decides(source: str) -> None:
    """Asking leaves the global dice alone, and the model as it was."""
    policy = tiny_policy()
    before = random.getstate(), torch.get_rng_state()

    def ask(seed: int) -> list[list[list[int]]]:
        its = asker(policy, entropy=0.0)
        its.generator.manual_seed(seed)
        return [entry.attempts for entry in asked(its, source, TASK.train)]

    assert ask(1) == ask(1) != ask(2)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert not policy.model.training


def test_entropy_of_what_may_be_impossible() -> None:
    logits = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    logits[0, 3] = logits[1, :7] = -torch.inf
    logprobs = logits.log_softmax(-1)
    expected = [-sum(p * torch.tensor(p).log().item() for p in row if p > 0) for row in logprobs.exp().tolist()]
    assert entropy_of(logprobs).tolist() == pytest.approx(expected, abs=1e-5)
