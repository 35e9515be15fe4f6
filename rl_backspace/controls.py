"""Does deleting help? What competes with it on the same prompts, and what each deletion was good for.

    arm            what it is                                                      actions
    allowed        the policy                                                      A
    blocked        the same weights, deletes illegal                               B
    random         deletes pressed at random times, as often as the policy does    about A
    best_of        the likeliest of n answers with the token blocked               as many as n tries take
    majority       the commonest of the same answers                               the same

n is the least number of tries that cost no fewer actions than the policy spends: the controls are never given less.
The first try is the decoding's own, the others are sampled. Finished ones come first, and of equally common ones the
likeliest: with n = 2 both are the same.

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
TRIES = 8  # tries of best-of-n that the curve shows
MOST_TRIES = 64
RESAMPLES = 9999


@dataclass(frozen=True)
class RandomDeletes(Sampling):
    """Deletes at random times: each state in which it is legal draws one with its probability, whatever is there.

    What is typed is drawn as `Sampling` does. `rates`: token ids and probabilities, which sum to no more than 1.
    """

    rates: tuple[tuple[int, float], ...] = ()

    def choose(
        self, logits: Tensor, logprobs: Tensor, rows: Sequence[Running], generator: torch.Generator | None
    ) -> Tensor:
        device = logits.device
        deletes = torch.tensor([token for token, _ in self.rates], device=device)
        typing = torch.log_softmax(logprobs.index_fill(1, deletes, -torch.inf), -1)
        can_type = typing.isfinite().any(-1)
        typed = torch.where(can_type, super().choose(logits, typing, rows, generator), -1)
        legal = logprobs[:, deletes].isfinite()
        upto = (legal * torch.tensor([rate for _, rate in self.rates], device=device)).cumsum(-1)
        drawn = torch.rand(len(rows), 1, generator=generator, device=device)
        drawn = torch.where(can_type[:, None], drawn, drawn * upto[:, -1:])  # else it must press
        pressed = deletes[(drawn >= upto).sum(-1).clamp(max=len(deletes) - 1)]
        return torch.where(legal.any(-1) & (drawn[:, 0] < upto[:, -1]), pressed, typed)


class Examination:
    """One policy on one set of rows, by one decoding; everything is paired by row.

    Args:
        how: "sampled" (at temperature 1) or "greedy".
        seed: of the sampling; each arm begins with it.
        most: tries of best-of-n that the curve shows.
    """

    def __init__(
        self, policy: Policy, task: Task, rows: list[Row], budget: Budget, how: str, seed: int, most: int = TRIES
    ):
        self.policy, self.task, self.rows, self.budget = policy, task, rows, budget
        self.sampling, self.seed, self.most = DECODINGS[how], seed, most
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
        return self.roll(self.sampling, deletes=0) if self.policy.rules.deletes else self.allowed

    @cached_property
    def others(self) -> list[list[Rollout]]:
        """For each row sampled answers with the token blocked, of other seeds than this decoding's own."""
        count = max(self.most, self.needed)
        found = self.roll(Sampling(), deletes=0, tries=count, seed=self.seed + 1)
        return [found[i * count : (i + 1) * count] for i in range(len(self.rows))]

    @property
    def needed(self) -> int:
        """Tries that should cost as many actions as the policy spends, with some to spare."""
        return min(MOST_TRIES, math.ceil(1.5 * _actions(self.allowed) / _actions(self.blocked)))

    @cached_property
    def tries(self) -> list[list[Rollout]]:
        """For each row, answers with the token blocked: this decoding's own, then sampled ones."""
        return [[first, *others] for first, others in zip(self.blocked, self.others, strict=True)]

    def spent(self, n: int) -> float:
        """Actions per row of the first n tries."""
        return sum(len(r.actions) for tries in self.tries for r in tries[:n]) / len(self.rows)

    @cached_property
    def n(self) -> int:
        """The least number of tries that cost no fewer actions than the policy spends."""
        counts = range(1, len(self.tries[0]) + 1)
        return next((n for n in counts if self.spent(n) >= _actions(self.allowed) - 1e-9), counts[-1])

    def random(self) -> list[Rollout]:
        """Deletes at random times: each token as often, per state in which it is legal, as the policy presses it."""
        legal, pressed = Counter[int](), Counter[int]()
        for rollout in self.allowed:
            machine = Machine(self.policy.rules, self.budget)
            for action in rollout.actions:
                legal.update(set(self.policy.rules.deletes).difference(machine.illegal()))
                pressed[action] += 1
                machine.step(action)
        rates = tuple((token, pressed[token] / max(1, legal[token])) for token in self.policy.rules.deletes)
        return self.roll(RandomDeletes(self.sampling.temperature, rates=rates), self.budget.deletes)

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
                out[arm] |= {"n": self.n, "actions_per_answer": self.spent(self.n)}
            if arm != "allowed":
                out[arm]["allowed_above"] = paired(ours, self.right(rollouts))
        return out

    def curve(self) -> dict[str, list[list[float]]]:
        """Accuracy against actions: of the policy and of one blocked answer, if all must finish within a actions; of
        the first n tries, n = 1, 2, ..., at what they cost. Pairs [actions, accuracy]."""

        def within(rollouts: list[Rollout]) -> list[list[float]]:
            right = self.right(rollouts)
            needed = sorted(len(r.actions) for r, good in zip(rollouts, right, strict=True) if good)
            return [[float(a), sum(n <= a for n in needed) / len(rollouts)] for a in sorted({0, *needed})]

        counts = range(1, len(self.tries[0]) + 1)
        return {
            "allowed": within(self.allowed),
            "blocked": within(self.blocked),
            **{
                name: [[self.spent(n), float(np.mean(self.right(pick(n))))] for n in counts]
                for name, pick in (("best_of", self.best_of), ("majority", self.majority))
            },
        }

    def deletions(self) -> dict[str, float | None]:
        """What deleting did, a number each; shares are None where there is nothing to take them of.

        Each going on is drawn once. So by sampled decoding `rescued` and `spoiled`, and `wrong_to_right` and
        `right_to_wrong`, hold what chance turns both ways; their difference does not.

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


def examine(
    policy: Policy, task: Task, rows: list[Row], budget: Budget, seed: int = 0, most: int = TRIES
) -> dict[str, Any]:
    """All of it, by decoding (sampled, greedy): `arms`, `deletions` and `curve` of `Examination`."""
    out: dict[str, Any] = {}
    by = {how: Examination(policy, task, rows, budget, how, seed, most) for how in DECODINGS}
    first = next(iter(by.values()))
    first.most = max(most, *(of.needed for of in by.values()))
    for how, of in by.items():
        of.others = first.others  # sampled, and so the same for both
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
