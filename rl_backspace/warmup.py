"""Correction warm-up: supervised training on packed corrections, before any RL.

RL never explores a fresh delete token (its probability is near zero), so the model first learns from
corrections. Every action is scored by `scoring` in the very context that a rollout would choose it in.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rl_backspace.config import Warmup
from rl_backspace.corrections import Correction, Corrector
from rl_backspace.policy import Policy
from rl_backspace.scoring import pack, score
from rl_backspace.semantics import Budget
from rl_backspace.tasks import Row, Task


class Corrections(Dataset):
    """`size` prompts with a group of corrections each, made from a seed of their own: the same index, the same
    corrections. A group shares its prompt's slots (`scoring`), so more corrections of a prompt cost little."""

    def __init__(
        self, corrector: Corrector, rows: list[Row], prompts: list[list[int]], size: int, group: int, seed: int
    ):
        self.corrector, self.rows, self.prompts = corrector, rows, prompts
        self.size, self.group, self.seed = size, group, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[tuple[list[int], Correction]]:
        rng = random.Random(f"{self.seed}/{index}")
        chosen = rng.randrange(len(self.rows))
        return [(self.prompts[chosen], self.corrector.make(self.rows[chosen], rng)) for _ in range(self.group)]


class WarmupTrainer(Trainer):
    """transformers' Trainer with the loss of corrections: the mean over the actions that are learned from."""

    def __init__(
        self,
        policy: Policy,
        budget: Budget,
        args: TrainingArguments,
        dataset: Dataset,
        callbacks: list[TrainerCallback],
    ):
        self.rules, self.budget, self.pad = policy.rules, budget, policy.tokenizer.pad_token_id
        super().__init__(policy.model, args, data_collator=self.collate, train_dataset=dataset, callbacks=callbacks)
        self.model_accepts_loss_kwargs = False

    def collate(self, groups: list[list[tuple[list[int], Correction]]]) -> dict[str, Tensor]:
        """TRL's shapes: prompts padded on the left, traces on the right."""
        examples = [example for group in groups for example in group]
        before = max(len(prompt) for prompt, _ in examples)
        after = max(len(correction.actions) for _, correction in examples)
        ids = torch.full((len(examples), before + after), self.pad, dtype=torch.long)
        real = torch.zeros_like(ids)
        learn = torch.zeros(len(examples), after)
        for i, (prompt, correction) in enumerate(examples):
            columns = slice(before - len(prompt), before + len(correction.actions))
            ids[i, columns] = torch.tensor(prompt + correction.actions)
            real[i, columns] = 1
            learn[i, : len(correction.actions)] = torch.tensor(correction.learn, dtype=torch.float)
        return {"input_ids": ids, "attention_mask": real, "learn": learn}

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        learn = inputs["learn"]
        packed = pack(inputs["input_ids"], inputs["attention_mask"], learn.shape[1], self.rules, self.budget)
        logprobs = score(model, packed)[0]
        loss = -logprobs[learn.bool()].mean()
        return (loss, {}) if return_outputs else loss


def make_corrector(policy: Policy, task: Task, budget: Budget, config: Warmup) -> Corrector:
    """A corrector whose wrong tokens are those that the task's own answers are made of."""
    eos = policy.tokenizer.eos_token_id

    @functools.lru_cache(maxsize=100_000)  # a group asks for the same answer again and again
    def tokens(answer: str) -> list[int]:
        return [*policy.tokenizer(answer, add_special_tokens=False).input_ids, eos]

    def gold(row: Row) -> list[int]:
        return tokens(row["answer"])

    alphabet = sorted({token for row in task.train[:2000] for token in gold(row)} - {eos})
    return Corrector(task, policy.rules, budget, gold, policy.text, alphabet, config.clean, config.errors, config.late)


def warm_up(
    policy: Policy,
    task: Task,
    budget: Budget,
    config: Warmup,
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
) -> None:
    """Train `policy.model` in place for `args.max_steps` steps."""
    size = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    prompts = policy.encode([row["prompt"] for row in task.train])
    corrector = make_corrector(policy, task, budget, config)
    dataset = Corrections(corrector, task.train, prompts, size, config.group, args.seed)
    trainer = WarmupTrainer(policy, budget, args, dataset, callbacks)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
