"""PPO with deletes: the same rollouts, scoring and logging as GRPO; a critic in the place of the group.

Each action is one step of the decision process: its state is the context it was chosen in, its reward what the terms
give it. A term that gives a rollout one number pays it with the last action, which ends the episode; one that gives a
number per action pays each where it happens, so that a delete's price stands at the delete.

The policy's loss is TRL's, clipped (PPO: Schulman et al. 2017, arXiv:1707.06347, eq. 7), with advantages per action
from generalised advantage estimation (Schulman et al. 2016, arXiv:1506.02438, eq. 16).

Shapes: B rollouts of at most K actions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rl_backspace.backbone import causal_lm
from rl_backspace.config import PPO
from rl_backspace.policy import Critic, Policy
from rl_backspace.scoring import Packed
from rl_backspace.terms import Value, per_action
from rl_backspace.trainer import BackspaceGRPOTrainer


class BackspacePPOTrainer(BackspaceGRPOTrainer):
    """PPO over traces: `BackspaceGRPOTrainer` with a critic.

    The critic is a linear layer on the hidden state that chooses the action; it starts at zero, or as the policy was
    saved with it. It is a part of the model while that trains, so that wrappers and optimizers see it.

    Args:
        ppo: the discount, GAE's lambda and the value loss.
        **kwargs: `BackspaceGRPOTrainer`'s.
    """

    def __init__(self, policy: Policy, *args: Any, ppo: PPO, **kwargs: Any):
        if policy.critic is None:
            policy.critic = Critic.like(policy.model)
        self.ppo, self.critic = ppo, policy.critic.requires_grad_(True)
        self._values: Tensor | None = None  # (B, K) of the traces that are being scored, with gradients
        super().__init__(policy, *args, **kwargs)
        self.engine.critic = self.critic

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, with the critic as a part of the model; afterwards it is beside it again, in the policy."""
        self.policy.model.add_module("critic", self.critic)
        try:
            return super().train(*args, **kwargs)
        finally:
            del self.policy.model.critic

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's batch with advantages (B, K) in place of the group's, and what the critic is to learn."""
        batch = super()._generate_and_score_completions(inputs)
        mask = batch["completion_mask"]
        weights = self.reward_weights.tolist()
        rewards, values = mask.new_zeros((2, *mask.shape), dtype=torch.float)
        scorable = []
        for i, rollout in enumerate(self._rollouts):
            given, length = [term.latest[i] for term in self.reward_funcs], len(rollout.actions)
            rewards[i, :length] = torch.tensor(action_rewards(given, weights, length))
            values[i, :length] = torch.tensor(rollout.values)
            scorable.append(any(value is not None for value in given))
        advantages = gae(rewards, values, mask, self.ppo.gamma, self.ppo.lam)
        known = mask * torch.tensor(scorable, device=mask.device)[:, None]  # of the others nothing can be learned
        self._log("explained_variance", explained_variance(values, advantages + values, known))
        batch["known"], batch["values"], batch["returns"] = known, values, advantages + values
        batch["advantages"] = self._whiten(advantages, known) if self.ppo.whiten else advantages * known
        return batch

    def _whiten(self, advantages: Tensor, mask: Tensor) -> Tensor:
        """Mean 0 and standard deviation 1 over the masked actions of the batch, on all processes; 0 elsewhere."""
        real = mask.bool()
        total, count = self.accelerator.reduce(torch.stack([advantages[real].sum(), real.sum().float()]), "sum")
        centred = (advantages - total / count.clamp(min=1)).masked_fill(~real, 0.0)
        variance = self.accelerator.reduce(centred.square().sum(), "sum") / count.clamp(min=1)
        return centred / (variance.sqrt() + 1e-4)  # as TRL's groups: what differs by rounding alone stays small

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        policy_loss = super()._compute_loss(model, inputs)
        assert self._values is not None
        window = self.current_gradient_accumulation_steps / self.args.steps_per_generation  # of the generated batch
        count = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * window
        loss, clipped = value_loss(
            self._values, inputs["values"], inputs["returns"], inputs["known"], self.ppo.cliprange_value, count
        )
        self._values = None
        self._log("value_loss", loss.detach())
        self._log("value_clipped", clipped)
        return policy_loss + self.ppo.vf_coef * loss

    def _score(self, model: Any, packed: Packed, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """The same, and where the loss asks, the critic's values from the same forward pass."""
        if not torch.is_grad_enabled():
            return super()._score(model, packed, entropy)
        found = []

        def listen(_: nn.Module, __: Any, output: Any) -> None:
            found.append(self.critic(output.last_hidden_state))  # within the model's own forward, where DDP looks

        hook = causal_lm(model).base_model.register_forward_hook(listen)
        try:
            scored = super()._score(model, packed, entropy)
        finally:
            hook.remove()
        self._values = found[0][:, -packed.keep :].flatten()[packed.outputs][packed.choices]
        return scored

    def _log(self, name: str, value: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][name].append(self.accelerator.gather(value).mean().item())

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        self.critic.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.critic.restore(Path(resume_from_checkpoint))


def action_rewards(values: list[Value], weights: list[float], actions: int) -> list[float]:
    """The weighted total of all terms at each action of one rollout."""
    placed = (per_action(value, actions) for value in values)
    weighted = ([weight * part for part in parts] for parts, weight in zip(placed, weights, strict=True))
    return [sum(parts) for parts in zip(*weighted, strict=True)]


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Advantages (B, K): sums of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t; 0 where masked.

    Args:
        rewards, values: (B, K), 0 where masked.
        mask: (B, K), 1 for the actions of a rollout, which come first; after its last one the value is 0.
    """
    advantages = torch.zeros_like(rewards)
    following = later = rewards.new_zeros(len(rewards))
    for step in reversed(range(rewards.shape[1])):
        delta = rewards[:, step] + gamma * following - values[:, step]
        later = (delta + gamma * lam * later) * mask[:, step]
        advantages[:, step] = later
        following = values[:, step] * mask[:, step]
    return advantages


def value_loss(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, cliprange: float | None, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Half the squared error of values (B, K), summed over the real actions and divided by `count`, which may be that
    of more micro-batches than one; and the share of the real ones that was clipped.

    Clipped as in PPO's first implementation: the worse of the error and that of a value within `cliprange` of the
    old one; None: not at all.
    """
    real = mask.bool()
    error = (values - returns).square()
    if cliprange is None:
        return 0.5 * error[real].sum() / count, values.new_zeros(())
    near = (old + (values - old).clamp(-cliprange, cliprange) - returns).square()
    return 0.5 * torch.maximum(error, near)[real].sum() / count, (near > error)[real].sum() / mask.sum().clamp(min=1)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - Var(returns - values) / Var(returns) over the real actions: 1 where the critic knows, 0 where it does not,
    and where there is nothing to know because returns do not vary."""
    real = mask.bool()
    spread = returns[real].var(correction=0)
    explained = 1 - (returns - values)[real].var(correction=0) / spread.clamp(min=1e-8)
    return torch.where(spread > 1e-8, explained, 0.0)
