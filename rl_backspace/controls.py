"""Does deleting help? What competes with it on the same prompts, and what each deletion was good for.

    arm            what it is                                                      actions
    allowed        the policy                                                      A
    blocked        the same weights, deletes illegal                               B
    random         deletes pressed at random times, as often as the policy does    about A
    best_of        the likeliest of n answers with the token blocked               n B, where n B >= A
    majority       the commonest of the same answers                               n B

n is the least whole number of tries that costs no fewer actions than the policy spends: the controls are never given
less. Among tries, finished ones come first.

What a deletion was good for is measured by going on without the token from just before it and from just after it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rl_backspace.detector import ages
from rl_backspace.engine import Engine, Rollout, Running, Sampling
from rl_backspace.evaluate import DECODINGS, is_right, measure
from rl_backspace.keyboard import keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.semantics import Budget, Machine
from rl_backspace.tasks import Row, Task
from rl_backspace.warmup import make_teacher

MOST_RUNS = 8  # runs of deletes that are looked at in one answer, the first ones
TRIES = 8  # most tries of best-of-n that the curve shows
RESAMPLES = 9999


@dataclass(frozen=True)
class RandomDeletes(Sampling):
    """Deletes at random times: each state in which one is legal draws one with probability `rate`, whatever it is.

    What is typed is drawn as `Sampling` does. `deletes`: token ids, the first legal one is pressed.
    """

    rate: float = 0.0
    deletes: tuple[int, ...] = ()

    def choose(
        self, logits: Tensor, logprobs: Tensor, rows: Sequence[Running], generator: torch.Generator | None
    ) -> Tensor:
        here = list(self.deletes)
        typing = torch.log_softmax(logprobs.index_fill(1, torch.tensor(here, device=logits.device), -torch.inf), -1)
        typed = super().choose(logits, typing, rows, generator)
        nothing = ~typing.isfinite().any(-1)
        legal = logprobs[:, here].isfinite()
        chance = torch.rand(len(rows), generator=generator, device=logits.device)
        pressed = torch.tensor(here, device=logits.device)[legal.int().argmax(-1)]
        return torch.where(legal.any(-1) & ((chance < self.rate) | nothing), pressed, typed)


class Examination:
    """One policy on one set of rows, by one decoding; everything is paired by row.

    Args:
        how: "sampled" (at temperature 1) or "greedy".
        seed: of the sampling; each arm begins with it.
    """

    def __init__(self, policy: Policy, task: Task, rows: list[Row], budget: Budget, how: str, seed: int):
        self.policy, self.task, self.rows, self.budget = policy, task, rows, budget
        self.sampling, self.seed = DECODINGS[how], seed
        self.engine = Engine(policy.model, policy.rules, keyboard=keyboard_of(task, policy))
        self.prompts = policy.encode([row["prompt"] for row in rows])

    def roll(
        self, sampling: Sampling, deletes: int | None = None, tries: int = 1, seed: int | None = None
    ) -> list[Rollout]:
        generator = torch.Generator(self.engine.backbone.device)
        generator.manual_seed(self.seed if seed is None else seed)
        prompts = [prompt for prompt in self.prompts for _ in range(tries)]
        return self.engine.run(prompts, replace(self.budget, deletes=deletes), sampling, generator)

    def right(self, rollouts: Sequence[Rollout], places: Sequence[int] | None = None) -> list[bool]:
        """Whether each rollout, of the row at its place, finished with a right answer."""
        rows = self.rows if places is None else [self.rows[place] for place in places]
        return [is_right(self.policy, self.task, row, rollout) for row, rollout in zip(rows, rollouts, strict=True)]

    @cached_property
    def allowed(self) -> list[Rollout]:
        return self.roll(self.sampling, self.budget.deletes)

    @cached_property
    def blocked(self) -> list[Rollout]:
        return self.roll(self.sampling, deletes=0)

    @cached_property
    def tries(self) -> list[list[Rollout]]:
        """For each row, answers with the token blocked: this decoding's own, then sampled ones."""
        others = self.roll(Sampling(), deletes=0, tries=max(self.n, TRIES) - 1, seed=self.seed + 1)
        more = len(others) // len(self.rows)
        return [[first, *others[i * more : (i + 1) * more]] for i, first in enumerate(self.blocked)]

    @cached_property
    def n(self) -> int:
        """Tries that cost no fewer actions than the policy spends."""
        return max(1, math.ceil(_actions(self.allowed) / _actions(self.blocked) - 1e-9))

    def random(self) -> list[Rollout]:
        """Deletes at random times, as many per legal state as the policy presses."""
        legal = 0
        for rollout in self.allowed:
            machine = Machine(self.policy.rules, self.budget)
            for action in rollout.actions:
                legal += not set(self.policy.rules.deletes) <= set(machine.illegal())
                machine.step(action)
        rate = sum(rollout.deletes for rollout in self.allowed) / max(1, legal)
        options = {"rate": rate, "deletes": tuple(self.policy.rules.deletes)}
        return self.roll(RandomDeletes(self.sampling.temperature, **options), self.budget.deletes)  # type: ignore[arg-type]

    def best_of(self, n: int) -> list[Rollout]:
        """The likeliest of the first n tries."""
        return [max(tries[:n], key=_merit) for tries in self.tries]

    def majority(self, n: int) -> list[Rollout]:
        """The commonest text among the first n tries that finished; of equally common ones the likeliest."""
        out = []
        for tries in self.tries:
            texts = {id(rollout): self.policy.text(rollout.visible) for rollout in tries[:n]}
            votes = Counter(texts[id(rollout)] for rollout in tries[:n] if rollout.end == "eos")
            out.append(max(tries[:n], key=lambda r, v=votes, t=texts: (v[t[id(r)]] * (r.end == "eos"), _merit(r))))  # type: ignore[misc]
        return out

    def arms(self) -> dict[str, dict[str, Any]]:
        """Accuracy, actions and deletes of each arm, and how far the policy is above it, prompt by prompt."""
        if not self.policy.rules.deletes:  # a twin
            return {"allowed": measure(self.policy, self.task, self.rows, self.allowed)}
        found = {
            "allowed": self.allowed,
            "blocked": self.blocked,
            "random": self.random(),
            "best_of": self.best_of(self.n),
            "majority": self.majority(self.n),
        }
        ours = self.right(self.allowed)
        out = {}
        for arm, rollouts in found.items():
            out[arm] = measure(self.policy, self.task, self.rows, rollouts)
            if arm in ("best_of", "majority"):
                spent = [tries[: self.n] for tries in self.tries]
                actions = sum(len(r.actions) for tries in spent for r in tries) / len(self.rows)
                out[arm] |= {"n": self.n, "actions_per_answer": actions}
            if arm != "allowed":
                out[arm]["allowed_above"] = paired(ours, self.right(rollouts))
        return out

    def curve(self) -> dict[str, list[list[float]]]:
        """Accuracy against actions: of the policy and of one blocked answer, if all must finish within a actions; of
        n tries, n = 1, 2, ..., at their mean cost. Pairs [actions, accuracy]."""

        def within(rollouts: list[Rollout]) -> list[list[float]]:
            right = self.right(rollouts)
            needed = sorted(len(r.actions) for r, good in zip(rollouts, right, strict=True) if good)
            return [[float(a), sum(n <= a for n in needed) / len(rollouts)] for a in sorted(set(needed))]

        cost = _actions(self.blocked)
        return {
            "allowed": within(self.allowed),
            "blocked": within(self.blocked),
            **{
                name: [[n * cost, float(np.mean(self.right(pick(n))))] for n in range(1, TRIES + 1)]
                for name, pick in (("best_of", self.best_of), ("majority", self.majority))
            },
        }

    def deletions(self) -> dict[str, float | None]:
        """What deleting did, a number each; shares are None where there is nothing to take them of.

        first_attempt       accuracy had the token been blocked from each answer's first delete on
        rescued, spoiled    of all answers: wrong at first and right in the end; the other way round
        wrong_to_right,     of the runs of deletes: going on without the token would have ended wrong from before
        right_to_wrong      the run, and right from after it; the other way round
        repeats             of the runs: followed by a token that the run had just deleted there
        thrown_away         of all actions: deletes and what they deleted
        out_of_actions      of all answers: the budget ended them
        precision, recall   where prefixes can be checked: of the presses, those where something was wrong; of the
                            states where something was wrong, those with a press
        """
        rules, right = self.policy.rules, self.right(self.allowed)
        cuts: list[tuple[int, int]] = []  # (row, actions up to there)
        repeats: list[bool] = []
        for place, rollout in enumerate(self.allowed):
            for start, end in _runs(rollout.actions, rules.deletes)[:MOST_RUNS]:
                cuts += [(place, start), (place, end)]
                repeats.append(self._repeats(rollout.actions, start, end))
        good = dict(zip(cuts, self._without_token(cuts), strict=True))
        runs = [(good[before], good[after]) for before, after in zip(cuts[::2], cuts[1::2], strict=True)]
        first = list(right)
        for place, start in reversed(cuts[::2]):
            first[place] = good[place, start]
        actions = sum(len(rollout.actions) for rollout in self.allowed)
        kept = sum(len(rollout.visible) for rollout in self.allowed)
        return {
            "first_attempt": float(np.mean(first)),
            "rescued": _share(after and not before for before, after in zip(first, right, strict=True)),
            "spoiled": _share(before and not after for before, after in zip(first, right, strict=True)),
            "runs_per_answer": len(runs) / len(self.rows),
            "wrong_to_right": _share(after and not before for before, after in runs),
            "right_to_wrong": _share(before and not after for before, after in runs),
            "repeats": _share(repeats),
            "thrown_away": 1 - kept / max(1, actions),
            "out_of_actions": _share(rollout.end == "budget" for rollout in self.allowed),
            **self._detection(),
        }

    def _without_token(self, cuts: Sequence[tuple[int, int]]) -> list[bool]:
        """Whether each answer comes right if it goes on from there without the token."""
        generator = torch.Generator(self.engine.backbone.device)
        generator.manual_seed(self.seed)
        rollouts = self.engine.run(
            [self.prompts[place] for place, _ in cuts],
            self.budget,
            replace(self.sampling, delete_bias=-math.inf),
            generator,
            begun=[self.allowed[place].actions[:cut] for place, cut in cuts],
        )
        return self.right(rollouts, [place for place, _ in cuts])

    def _repeats(self, actions: Sequence[int], start: int, end: int) -> bool:
        """Whether what is typed after the deletes actions[start:end] had just been deleted there."""
        machine = Machine(self.policy.rules, self.budget)
        before: list[int] = []
        for step, action in enumerate(actions[:end]):
            if step == start:
                before = list(machine.visible)
            machine.step(action)
        return end < len(actions) and actions[end] == before[len(machine.visible)]

    def _detection(self) -> dict[str, float | None]:
        if not self.task.tells_errors:
            return {"precision": None, "recall": None}
        teacher = make_teacher(self.policy, self.task, self.budget)
        states = [
            (bool(age), action in self.policy.rules.deletes)
            for row, rollout in zip(self.rows, self.allowed, strict=True)
            for action, age in zip(rollout.actions, ages(teacher.expert(row), rollout.actions), strict=True)
            if age is not None
        ]
        return {
            "precision": _share(wrong for wrong, pressed in states if pressed),
            "recall": _share(pressed for wrong, pressed in states if wrong),
        }


def examine(policy: Policy, task: Task, rows: list[Row], budget: Budget, seed: int = 0) -> dict[str, Any]:
    """All of it, by decoding (sampled, greedy): `arms`, `deletions` and `curve` of `Examination`."""
    out: dict[str, Any] = {}
    for how in DECODINGS:
        of = Examination(policy, task, rows, budget, how, seed)
        out[how] = {"arms": of.arms(), "curve": of.curve()}
        if policy.rules.deletes:
            out[how]["deletions"] = of.deletions()
    return out


def paired(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """Mean of the differences row by row, and its 95 % bootstrap interval over rows."""
    from scipy.stats import bootstrap

    differences = np.asarray(ours, float) - np.asarray(theirs, float)
    if len(set(differences)) == 1:  # nothing to resample
        return {"difference": float(differences[0]), "interval": [float(differences[0])] * 2}
    interval = bootstrap(
        (differences,), np.mean, n_resamples=RESAMPLES, batch=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    return {"difference": float(differences.mean()), "interval": [float(interval.low), float(interval.high)]}


def _actions(rollouts: Sequence[Rollout]) -> float:
    return sum(len(rollout.actions) for rollout in rollouts) / len(rollouts)


def _merit(rollout: Rollout) -> tuple[bool, float]:
    return rollout.end == "eos", sum(rollout.logprobs)


def _runs(actions: Sequence[int], deletes: Any) -> list[tuple[int, int]]:
    """Where each run of deletes starts and ends."""
    pressed = [action in deletes for action in actions] + [False]
    starts = [i for i, now in enumerate(pressed) if now and not (i and pressed[i - 1])]
    return [(start, pressed.index(False, start)) for start in starts]


def _share(flags: Any) -> float | None:
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None
