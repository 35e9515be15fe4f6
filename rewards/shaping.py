"""Potential-based shaping (Ng, Harada & Russell 1999, "Policy invariance under reward transformations").

What is paid for a better state is taken back when it is lost, so that which policies are best stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from rl_backspace.rewards._walk import liveness, visibles
from rl_backspace.semantics import Rules


def progress(
    actions: Sequence[Sequence[int]],
    rules: Rules,
    rows: Sequence[dict[str, Any]],
    task: Any,
    decode: Callable[[list[int]], str],
    scale: float = 0.1,
    gamma: float = 1.0,
    **_: Any,
) -> list[list[float]]:
    """F(s, a, s') = gamma * Phi(s') - Phi(s) at each action, with Phi(s) = `scale` where what is visible can still
    come right (`task.alive`), else 0, and Phi = 0 after the last action, however the rollout ended.

    With `gamma` 1 an error costs `scale` where it is made, and the delete that leads back out of it pays that back.
    Discounted by `gamma`, the actions sum to -Phi(start), the same for all rollouts of a prompt: nothing can be earned.

    For PPO, which it tells the wrong action at once. GRPO gains nothing from it: over a group the sum is constant.
    Where the task knows only its reference, another right answer looks like an error until it ends; that is noise
    and changes no best policy either. Range: -scale to gamma * scale an action.

    Abuse: none where `gamma` is that of the trainer: `ppo.gamma`, and 1 for GRPO, which takes the sum. A larger one
    pays for each further action while the answer can come right, so for stalling; a smaller one charges for it.
    """
    alive = liveness(task, decode)
    out = []
    for trace, row in zip(actions, rows, strict=True):
        potentials = [scale * alive(row, visible) for visible in visibles(trace, rules)[:-1]]
        out.append([gamma * after - before for before, after in pairwise([*potentials, 0.0])])
    return out
