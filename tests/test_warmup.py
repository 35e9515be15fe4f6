from __future__ import annotations

import random
from pathlib import Path

import naive
import pytest
import torch
from conftest import tiny
from transformers import TrainingArguments

from rl_backspace.config import Warmup
from rl_backspace.engine import Rollout
from rl_backspace.evaluate import is_right
from rl_backspace.policy import Policy
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Rules
from rl_backspace.tasks import Task
from rl_backspace.tasks.signs import signs
from rl_backspace.warmup import Corrections, WarmupTrainer, make_corrector

BUDGET = Budget(answer=6, actions=24)


@pytest.fixture
def policy() -> Policy:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|delete|>"]})
    delete = tokenizer.convert_tokens_to_ids("<|delete|>")
    eos = tokenizer.eos_token_id
    model = tiny(vocab_size=128, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    return Policy(model, tokenizer, Rules({delete: "token"}, frozenset([eos]), retry="ban"))


def groups(policy: Policy, task: Task) -> Corrections:
    corrector = make_corrector(policy, task, BUDGET, Warmup(clean=0.2, errors=2, late=3))
    prompts = policy.encode([row["prompt"] for row in task.train])
    return Corrections(corrector, task.train, prompts, size=6, group=3, seed=0)


def test_the_loss_is_the_mean_over_what_is_to_be_learned(policy: Policy, tmp_path: Path) -> None:
    """Deletes and right tokens, each in its own context, computed one by one; nothing of the wrong tokens."""
    dataset = groups(policy, signs(3, train=20, test=2))
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = WarmupTrainer(policy, BUDGET, args, dataset, [])
    examples = [dataset[i] for i in range(6)]
    loss = trainer.compute_loss(policy.model, trainer.collate(examples)).item()
    losses, masked = [], 0
    for prompt, correction in (example for group in examples for example in group):
        slow = naive.Naive(policy.rules, BUDGET)
        for action, learn in zip(correction.actions, correction.learn, strict=True):
            logprob = naive.logprobs(policy.model, [*prompt, *slow.context()], slow.forbidden())[action].item()
            losses += [-logprob] * learn
            masked += not learn
            slow.press(action)
    assert masked > 5
    assert loss == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_the_same_index_gives_the_same_corrections(policy: Policy) -> None:
    task = signs(3, train=20, test=2)
    random.seed(torch.initial_seed() % 1000)  # whatever the global state is
    assert groups(policy, task)[4] == groups(policy, task)[4]
    assert groups(policy, task)[4] != groups(policy, task)[5]


def test_only_finished_answers_are_right(policy: Policy) -> None:
    task = signs(3, train=20, test=2)
    row = task.train[0]
    ids = policy.tokenizer(row["answer"]).input_ids
    eos = policy.tokenizer.eos_token_id
    assert is_right(policy, task, row, Rollout([], [*ids, eos], [*ids, eos], [], "eos", 0, 0))
    assert not is_right(policy, task, row, Rollout([], ids, ids, [], "length", 0, 0))
