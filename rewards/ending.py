"""How a rollout ended. Range: `-penalty` or 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rl_backspace.rewards._walk import without_end
from rl_backspace.semantics import Rules


def unfinished(ends: Sequence[str], penalty: float = 0.1, **_: Any) -> list[float]:
    """`-penalty` where the rollout did not end itself: it ran out of length or actions, or nothing was legal.

    Abuse: any wrong answer ends too, and at once; large beside what a right one pays, it teaches to stop searching.
    """
    return [-penalty if end != "eos" else 0.0 for end in ends]


def empty(completion_ids: Sequence[Sequence[int]], rules: Rules, penalty: float = 0.1, **_: Any) -> list[float]:
    """`-penalty` where nothing is visible in the end but perhaps the end-of-sequence token.

    Abuse: one token of anything escapes it, even one that texts leave out.
    """
    return [0.0 if without_end(visible, rules) else -penalty for visible in completion_ids]
