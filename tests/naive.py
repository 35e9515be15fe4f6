"""Slow and obvious versions, written apart from the package, that the fast ones must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rl_backspace.semantics import Budget, Rules


class Naive:
    """The semantics as a person would tell them: the answer is a list of cells, each a token and the tokens
    that were deleted where it stands; everything is recomputed from the history."""

    def __init__(self, rules: Rules, budget: Budget):
        self.rules, self.budget = rules, budget
        self.history: list[int] = []
        self.cells: list[int] = []
        self.gone: dict[int, list[int]] = {}  # depth -> deleted there; forgotten when an earlier token goes
        self.furthest = 0  # most cells there ever were
        self.markers: dict[int, int] = {}  # depth -> the delete token that first went back there

    def press(self, action: int) -> None:
        self.history.append(action)
        if action not in self.rules.deletes:
            self.cells.append(action)
            self.furthest = max(self.furthest, len(self.cells))
            return
        back_to = self.where(self.rules.deletes[action])
        self.gone.setdefault(back_to, []).append(self.cells[back_to])
        self.markers.setdefault(back_to, action)
        self.cells = self.cells[:back_to]
        self.gone = {depth: tokens for depth, tokens in self.gone.items() if depth <= back_to}
        self.markers = {depth: token for depth, token in self.markers.items() if depth <= back_to}

    def where(self, unit: Any) -> int:
        n = len(self.cells)
        if unit == "answer":
            return 0
        if unit == "line":
            starts = [0] + [i + 1 for i, token in enumerate(self.cells) if token in self.rules.boundaries]
            return max(start for start in starts if start < n)
        return max(n - (1 if unit == "token" else unit), 0)

    def context(self) -> list[int]:
        if self.rules.memory == "keep":
            return list(self.history)
        out = []
        for depth in range(len(self.cells) + 1):
            if self.rules.memory == "hint" and depth in self.markers:
                out.append(self.markers[depth])
            out += self.cells[depth : depth + 1]
        return out

    def forbidden(self) -> set[int]:
        out = set(self.gone.get(len(self.cells), [])) if self.rules.retry == "ban" else set()
        presses = sum(action in self.rules.deletes for action in self.history)
        last_chance = len(self.history) == self.budget.most_actions - 1
        spent = self.budget.deletes is not None and presses >= self.budget.deletes
        if not self.cells or last_chance or spent:
            return out | set(self.rules.deletes)
        final = 0 if self.budget.window is None else self.furthest - self.budget.window
        return out | {token for token, unit in self.rules.deletes.items() if self.where(unit) < final}

    def over(self) -> bool:
        if not self.history:
            return False
        typed = self.history[-1] not in self.rules.deletes
        return (
            (typed and self.history[-1] in self.rules.eos)
            or len(self.cells) >= self.budget.answer
            or len(self.history) >= self.budget.most_actions
        )


@torch.no_grad()
def logprobs(model: Any, context: Sequence[int], forbidden: set[int], temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities (V,) of the next action, by the model's own forward on its context alone."""
    logits = model(input_ids=torch.tensor([list(context)])).logits[0, -1].float() / temperature
    logits[sorted(forbidden)] = -torch.inf
    return logits.log_softmax(-1)


def greedy(model: Any, prompt: Sequence[int], rules: Rules, budget: Budget) -> Naive:
    """Greedy decoding one action at a time, the whole context recomputed for each."""
    naive = Naive(rules, budget)
    while not naive.over():
        naive.press(int(logprobs(model, [*prompt, *naive.context()], naive.forbidden()).argmax()))
    return naive
