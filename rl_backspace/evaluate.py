"""Accuracy of a policy with its token allowed and blocked, sampled and greedy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from rl_backspace.engine import GREEDY, Engine, Rollout, Sampling
from rl_backspace.keyboard import keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.semantics import Budget
from rl_backspace.tasks import Row, Task

DECODINGS = {"sampled": Sampling(), "greedy": GREEDY}


def evaluate(
    policy: Policy,
    task: Task,
    rows: list[Row],
    budget: Budget,
    seed: int = 0,
    tokens: tuple[str, ...] = ("allowed", "blocked"),
) -> dict[str, dict[str, dict[str, Any]]]:
    """Results by token (allowed, blocked) and decoding (sampled at temperature 1, greedy).

    Blocked means that the delete tokens are illegal and the rest is renormalised: the same weights, unable
    to delete. Sampling uses the same seed for both, and so does the task's keyboard, which swaps what greedy decoding
    chooses too.
    """
    engine = Engine(policy.model, policy.rules, keyboard=keyboard_of(task, policy))
    prompts = policy.encode([row["prompt"] for row in rows])
    budgets = {"allowed": budget, "blocked": replace(budget, deletes=0)}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for token in tokens:
        results[token] = {}
        for decoding, sampling in DECODINGS.items():
            generator = torch.Generator(engine.backbone.device)
            generator.manual_seed(seed)
            rollouts = engine.run(prompts, budgets[token], sampling, generator)
            results[token][decoding] = measure(policy, task, rows, rollouts)
    return results


def is_right(policy: Policy, task: Task, row: Row, rollout: Rollout) -> bool:
    """Whether a rollout finished with a right answer."""
    return rollout.end == "eos" and task.correct(row, policy.text(rollout.visible))


def measure(policy: Policy, task: Task, rows: list[Row], rollouts: list[Rollout]) -> dict[str, Any]:
    """Accuracy with its 95 % Wilson interval, and means per answer."""
    from scipy.stats import binomtest

    count = len(rollouts)
    right = sum(is_right(policy, task, row, rollout) for row, rollout in zip(rows, rollouts, strict=True))
    interval = binomtest(right, count).proportion_ci(method="wilson")
    return {
        "accuracy": right / count,
        "interval": [float(interval.low), float(interval.high)],
        "deletes_per_answer": sum(r.deletes for r in rollouts) / count,
        "actions_per_answer": sum(len(r.actions) for r in rollouts) / count,
        "finished": sum(r.end == "eos" for r in rollouts) / count,
        "answers": count,
    }
