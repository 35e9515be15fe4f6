"""A noisy keyboard between the policy and the trace: a control whose best accuracy without deleting is known.

With probability `rate` the keyboard types another token than the policy chose. Deletes and end-of-sequence tokens
always arrive. Any other chosen token x becomes a token drawn uniformly from A \\ {x}, where A are the keyboard's
tokens that are legal in this state, so that a banned token is never typed; x stays where nothing else is in A.

What rollouts record and scoring recomputes is the distribution of what is *typed*, the choice summed out: the
policy gradient is exact, and has less variance than that of the intended token, which no one sees.

Shapes: n choices among V tokens; A is a mask (n, V).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rl_backspace.errors import UserError
from rl_backspace.tasks import Task

if TYPE_CHECKING:  # the engine and scoring use keyboards and know no policy
    from rl_backspace.policy import Policy

ALPHABET_ROWS = 2000  # train rows whose answers are looked at for the tokens that answers are made of


@dataclass(frozen=True)
class Keyboard:
    """Swaps some of the tokens that a policy chooses.

    Args:
        rate: how likely a chosen token is swapped, at least 0 and less than 1.
        tokens: ids that a swap may type; none of them fixed.
        fixed: ids that are never swapped: deletes and end-of-sequence tokens.
    """

    rate: float
    tokens: tuple[int, ...]
    fixed: frozenset[int]

    def through(self, logprobs: Tensor) -> Tensor:
        """Log-probabilities (n, V) of what is typed, from those of what is chosen; illegal ones are -inf in both.

        With p what is chosen, A of size a, and `inside` and `outside` the mass of p on A and on the tokens that
        are neither in A nor fixed: a typed y in A has (1-rate) p(y) + rate ((inside - p(y)) / (a-1) + outside / a),
        where (inside - p(y)) / (a-1) is p(y) itself for a = 1; any other token that is not fixed, (1-rate) p(y).
        Where A is empty, nothing changes.
        """
        within = self._within(logprobs)
        swappable = logprobs.isfinite() & ~self._mask(self.fixed, logprobs)
        count = within.sum(-1, keepdim=True)  # a
        # relative to the likeliest swappable token, so that no legal token underflows and each gradient is finite
        highest = logprobs.detach().masked_fill(~swappable, -torch.inf).amax(-1, keepdim=True)
        highest = highest.masked_fill(~highest.isfinite(), 0.0)
        chosen = (logprobs - highest).masked_fill(~swappable, -torch.inf).exp()
        inside = chosen.masked_fill(~within, 0.0).sum(-1, keepdim=True)
        outside = chosen.masked_fill(within, 0.0).sum(-1, keepdim=True)
        others = torch.where(count > 1, (inside - chosen) / (count - 1).clamp(min=1), chosen)
        typed = (1 - self.rate) * chosen + self.rate * (others + outside / count.clamp(min=1))
        elsewhere = torch.where(swappable & (count > 0), logprobs + math.log1p(-self.rate), logprobs)
        # the logarithm of 1 where it is not used, since that of 0 has no gradient
        return torch.where(within, highest + typed.masked_fill(~within, 1.0).log(), elsewhere)

    def swap(self, chosen: Tensor, logprobs: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """What is typed (n,) where `chosen` (n,) was, among the legal tokens: those of finite logprobs (n, V)."""
        others = self._within(logprobs).scatter(1, chosen[:, None], False)
        upto = others.cumsum(-1)
        slip, which = torch.rand(2, len(chosen), device=logprobs.device, dtype=torch.double, generator=generator)
        nth = (which * upto[:, -1]).long()
        other = torch.searchsorted(upto, nth[:, None], right=True)[:, 0]
        swaps = (slip < self.rate) & (upto[:, -1] > 0) & ~self._mask(self.fixed, logprobs)[chosen]
        return torch.where(swaps, other, chosen)

    def _within(self, logprobs: Tensor) -> Tensor:
        """A: (n, V), True for the keyboard's tokens that are legal."""
        return logprobs.isfinite() & self._mask(self.tokens, logprobs)

    @staticmethod
    def _mask(tokens: tuple[int, ...] | frozenset[int], logprobs: Tensor) -> Tensor:
        """(V,), True at these ids."""
        mask = torch.zeros(logprobs.shape[-1], dtype=torch.bool)
        mask[list(tokens)] = True
        return mask.to(logprobs.device)


def alphabet(task: Task, policy: Policy) -> list[int]:
    """The token ids that the task's reference answers are made of, without those that end or delete."""
    answers = [row["answer"] for row in task.train[:ALPHABET_ROWS]]
    tokenized = policy.tokenizer(answers, add_special_tokens=False).input_ids
    return sorted({token for ids in tokenized for token in ids} - _fixed(policy))


def keyboard_of(task: Task, policy: Policy) -> Keyboard | None:
    """The keyboard that a task is typed on; None for one that works.

    Raises:
        UserError: the rate is out of range, or the answers have too few tokens for one to become another.
    """
    if not 0 <= task.typo_rate < 1:
        raise UserError(f"task: got typo_rate={task.typo_rate}; expected 0 <= typo_rate < 1")
    if task.typo_rate == 0:
        return None
    tokens = alphabet(task, policy)
    if len(tokens) < 2:
        raise UserError(
            f"task: typo_rate is {task.typo_rate}, but the answers are made of {len(tokens)} distinct tokens; expected "
            "at least 2, for one to be typed instead of the other"
        )
    return Keyboard(task.typo_rate, tuple(tokens), _fixed(policy))


def _fixed(policy: Policy) -> frozenset[int]:
    return policy.rules.eos | policy.rules.deletes.keys()
