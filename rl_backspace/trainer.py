"""GRPO with deletes: TRL's GRPOTrainer with three seams replaced.

1. Rollouts come from our engine, through TRL's `rollout_func`; `completion_ids` are the raw traces.
2. Log-probabilities come from `scoring`: every action in the context it was chosen in, among the legal ones.
3. Rewards see the visible text and ids, and by name what happened on the way.

The loss, the advantages, the schedules and the logging are TRL's (GRPO: Shao et al. 2024, arXiv:2402.03300).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from rl_backspace.engine import Engine, Rollout, Sampling
from rl_backspace.errors import UserError
from rl_backspace.evaluate import is_right
from rl_backspace.keyboard import keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.scoring import Packed, pack, score
from rl_backspace.semantics import Budget
from rl_backspace.tasks import Row, Task
from rl_backspace.terms import Term, reward_inputs, visible_completions

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is experimental; the version is pinned

COLUMNS = ("prompt", "row")  # of the training set: what TRL reads, and the index of the task's row


class BackspaceGRPOTrainer(GRPOTrainer):
    """GRPO over traces.

    Args:
        policy: model, tokenizer and delete semantics.
        task: its rows, which reach the rewards, and the keyboard it is typed on.
        budget: how far one rollout may go.
        terms: reward functions in TRL's signature.
        args: TRL's config. `temperature`, `top_k`, `top_p` and `min_p` are the sampler's; the log-probs are of
            the distribution before truncation, as everywhere in TRL.
        on_rollouts: told of each generated batch: the rollouts, their rows and the rewards (n, terms).
    """

    _tag_names: ClassVar = ["trl", "grpo", "rl-backspace"]

    def __init__(
        self,
        policy: Policy,
        task: Task,
        budget: Budget,
        terms: list[Term],
        args: GRPOConfig,
        train_dataset: Any,
        on_rollouts: Callable[[list[Rollout], list[Row], Tensor], None] | None = None,
        **kwargs: Any,
    ):
        self.policy, self.task, self.budget, self.on_rollouts = policy, task, budget, on_rollouts
        self.keyboard = keyboard_of(task, policy)
        self.sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p or 0.0)
        self.logp_gap_max = 0.0
        self.rollouts = self.forward_passes = self.actions = self.deletes = 0
        self._rollouts: list[Rollout] = []
        self._rollout_step = -1
        self._sampled: Tensor | None = None  # (B, K) log-probs of the rollouts that are being scored
        super().__init__(
            model=policy.model,
            reward_funcs=terms,
            args=args,
            train_dataset=train_dataset,
            processing_class=policy.tokenizer,
            rollout_func=self._roll_out,
            **kwargs,
        )
        _copy_token_rows_to_reference(self.model)
        rows = args.per_device_train_batch_size * args.steps_per_generation  # a generation batch at once, as TRL does
        self.engine = Engine(self.model, policy.rules, rows, self.keyboard)
        self._generator = torch.Generator(self.accelerator.device)
        self._generator.manual_seed(args.seed + self.accelerator.process_index)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _roll_out(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: prompts arrive once per generation."""
        with self.accelerator.autocast():  # as scoring does
            rollouts = self.engine.run(self.policy.encode(prompts), self.budget, self.sampling, self._generator)
        self._rollouts, self._rollout_step = rollouts, self.state.global_step
        self.rollouts += len(rollouts)
        self.forward_passes += sum(rollout.forward_passes for rollout in rollouts)
        self.actions += sum(len(rollout.actions) for rollout in rollouts)
        self.deletes += sum(rollout.deletes for rollout in rollouts)
        return {
            "prompt_ids": [rollout.prompt for rollout in rollouts],
            "completion_ids": [rollout.actions for rollout in rollouts],
            "logprobs": [rollout.logprobs for rollout in rollouts],
        }

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        rows = [self.task.train[entry["row"]] for entry in inputs]
        rewards = super()._calculate_rewards(
            reward_inputs(self._rollouts, rows),
            prompts,
            visible_completions(self._rollouts, prompts, self.policy),
            [rollout.visible for rollout in self._rollouts],
        )
        self._log_rollouts(rows)
        if self.on_rollouts is not None:
            first = self.accelerator.process_index * len(rows)
            self.on_rollouts(self._rollouts, rows, rewards[first : first + len(rows)])
        return rewards

    def _log_rollouts(self, rows: list[Row]) -> None:
        mode = "train" if self.model.training else "eval"
        count = len(self._rollouts)
        right = sum(is_right(self.policy, self.task, row, r) for r, row in zip(self._rollouts, rows, strict=True))
        means = {
            "accuracy": right / count,
            "deletes_per_answer": sum(r.deletes for r in self._rollouts) / count,
            "actions_per_answer": sum(len(r.actions) for r in self._rollouts) / count,
            "finished": sum(r.end == "eos" for r in self._rollouts) / count,
        }
        for name, value in means.items():
            gathered = self.accelerator.gather(torch.tensor(value, device=self.accelerator.device))
            self._metrics[mode][name].append(gathered.mean().item())

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        fresh = self.state.global_step == self._rollout_step  # the weights that sampled are the weights that score
        self._sampled = inputs.get("sampling_per_token_logps") if fresh else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._sampled = None

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        """Exact log-probs (B, K) in TRL's shapes; see `scoring`."""
        if compute_aux_loss:
            raise UserError(
                "the router's auxiliary loss is not supported; set router_aux_loss_coef to 0 in the model's config"
            )
        logps, entropies = [], []
        size = batch_size or len(input_ids)
        for first in range(0, len(input_ids), size):
            chunk = slice(first, first + size)
            packed = pack(input_ids[chunk], attention_mask[chunk], logits_to_keep, self.policy.rules, self.budget)
            chunk_logps, chunk_entropies = self._score(model, packed, compute_entropy)
            real = attention_mask[chunk, -logits_to_keep:].bool()
            logps.append(chunk_logps.masked_fill(~real, 0.0))
            if chunk_entropies is not None:
                entropies.append(chunk_entropies.masked_fill(~real, 0.0))
        result = torch.cat(logps)
        if self._sampled is not None and result.requires_grad:
            self._log_gap(result.detach(), attention_mask[:, -logits_to_keep:].bool())
        return result, torch.cat(entropies) if entropies else None, None

    def _score(self, model: Any, packed: Packed, entropy: bool) -> tuple[Tensor, Tensor | None]:
        with self.accelerator.autocast():
            return score(model, packed, self.temperature, entropy, self.keyboard)

    def _log_gap(self, recomputed: Tensor, real: Tensor) -> None:
        """Largest distance between a log-prob as sampled and as recomputed: rounding, or a bug."""
        assert self._sampled is not None
        gap = (recomputed - self._sampled)[real].abs().max() if real.any() else recomputed.new_zeros(())
        gap = self.accelerator.gather(gap).max().item()
        self._metrics["train"]["logp_gap_max"].append(gap)
        self.logp_gap_max = max(self.logp_gap_max, gap)


def _copy_token_rows_to_reference(model: Any) -> None:
    """TRL copies an adapter's weights to the reference adapter by the infix `.default.`, which the trained
    token rows, named `….default`, do not have; without them the KL term pulls towards a fresh delete token."""
    if "ref" not in getattr(model, "peft_config", {}):
        return
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if name.endswith(".default"):
            parameters[name.removesuffix("default") + "ref"].data.copy_(parameter.data)
