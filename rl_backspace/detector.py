"""The delete token as a detector of errors: is it pressed where, and only where, something is wrong?

A state is *wrong* when its visible text can no longer become a right answer; its *age* is how many tokens were
typed since it could. What is measured is the probability of a delete in states of held-out prompts: those of
corrections from each source, and those that the policy gets into by itself.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rl_backspace.corrections import FROM_MODEL, SOURCES, Corrector, Source
from rl_backspace.expert import Expert
from rl_backspace.pool import Asker, Entry, chunks
from rl_backspace.semantics import Machine
from rl_backspace.tasks import Row

OLDEST = 3  # errors of this age and older are counted together


@dataclass(frozen=True)
class State:
    """One state in which a delete was legal.

    Attributes:
        probability: of all delete tokens together.
        pressed: whether greedy decoding would delete.
        age: tokens typed since the answer could still come right, the wrong one included; 0: it still can.
    """

    probability: float
    pressed: bool
    age: int


def diagnose(asker: Asker, corrector: Corrector, rows: Sequence[Row], seed: int) -> dict[str, Any]:
    """The detector's measures (`summarise`) for each source of errors, on held-out rows; the same ones each time.

    Empty where the task cannot tell an error from another right answer, and for a policy that cannot delete.
    """
    if not corrector.teacher.task.tells_errors or not corrector.teacher.rules.deletes:
        return {}
    prompts = asker.policy.encode([row["prompt"] for row in rows])
    asker.generator.manual_seed(seed)
    found: dict[str, Any] = {}
    for source in SOURCES:
        rng = random.Random(f"{seed}/{source}")
        entries = asker.ask(source, rows, prompts) if source in FROM_MODEL else None
        if entries is None:
            entries = [Entry(prompt, asker.teacher.expert(row)) for row, prompt in zip(rows, prompts, strict=True)]
        traces = list(_traces(corrector, source, entries, asker.group, rng))
        found[source] = summarise(observe(asker, traces))
    return found


def _traces(
    corrector: Corrector, source: Source, entries: list[Entry], group: int, rng: random.Random
) -> Iterator[tuple[Entry, list[int]]]:
    for entry in entries:
        if source == "rollouts":
            yield from ((entry, actions) for actions in entry.attempts)
        else:
            for _ in range(group):
                yield entry, corrector.make(entry.expert, source, rng, entry.attempts).actions


def observe(asker: Asker, traces: Sequence[tuple[Entry, list[int]]]) -> list[State]:
    """The states of some traces in which a delete was legal, with the policy's probability of one."""
    deletes = torch.tensor(sorted(asker.policy.rules.deletes), device=asker.engine.backbone.device)
    states = []
    for chunk in chunks(traces, asker.engine.backbone.config.vocab_size, lambda trace: len(trace[1])):
        prompts, actions = [entry.prompt for entry, _ in chunk], [trace for _, trace in chunk]
        logprobs, choices = asker.distributions(prompts, actions, asker.teacher.budget)
        probabilities = logprobs[:, deletes].exp().sum(-1)[choices].tolist()
        pressed = torch.isin(logprobs.argmax(-1), deletes)[choices].tolist()
        for i, (entry, trace) in enumerate(chunk):
            for step, age in enumerate(ages(entry.expert, trace)):
                if age is not None:
                    states.append(State(probabilities[i][step], pressed[i][step], age))
    return states


def ages(expert: Expert, trace: Sequence[int]) -> list[int | None]:
    """For each action of a trace, the age of the error in the state it was chosen in; None: no delete was legal."""
    machine = Machine(expert.teacher.rules, expert.teacher.budget)
    error: int | None = None  # index of the first token that left nothing alive
    found: list[int | None] = []
    for action in trace:
        length = len(machine.visible)
        if error is not None and error >= length:
            error = None
        if error is None and not expert.alive(machine.visible):
            error = length - 1
        illegal = set(machine.illegal()).issuperset(expert.teacher.rules.deletes)
        found.append(None if illegal else 0 if error is None else length - error)
        machine.step(action)
    return found


def summarise(states: Sequence[State]) -> dict[str, Any]:
    """How well delete tells wrong states from right ones; None where there are no states to tell it by.

    `p_delete_wrong`, `p_delete_right`: mean probability of a delete. `precision`, `recall`: of greedy decoding's
    deletes. `auc`: chance that a wrong state has a higher probability of a delete than a right one. `by_age`:
    `p_delete_wrong` by how many tokens ago the error happened. `wrong`, `right`: how many states.
    """
    wrong, right = [s for s in states if s.age], [s for s in states if not s.age]
    caught = sum(state.pressed for state in wrong)
    pressed = caught + sum(state.pressed for state in right)
    by_age: dict[str, list[float]] = {}
    for state in sorted(wrong, key=lambda state: state.age):
        by_age.setdefault(f"{state.age}" if state.age < OLDEST else f"{OLDEST}+", []).append(state.probability)
    return {
        "p_delete_wrong": _mean([state.probability for state in wrong]),
        "p_delete_right": _mean([state.probability for state in right]),
        "precision": caught / pressed if pressed else None,
        "recall": caught / len(wrong) if wrong else None,
        "auc": _auc([state.probability for state in wrong], [state.probability for state in right]),
        "by_age": {age: _mean(probabilities) for age, probabilities in by_age.items()},
        "wrong": len(wrong),
        "right": len(right),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _auc(wrong: Sequence[float], right: Sequence[float]) -> float | None:
    """Area under the curve of true against false alarms: the Mann-Whitney statistic, as a share."""
    from scipy.stats import mannwhitneyu

    if not wrong or not right:
        return None
    return float(mannwhitneyu(wrong, right, method="asymptotic").statistic) / (len(wrong) * len(right))
