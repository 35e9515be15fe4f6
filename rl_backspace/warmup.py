"""Correction warm-up: supervised training on packed corrections, before any RL.

RL never explores a fresh delete token (its probability is near zero), so the model first learns from
corrections. Every action is scored by `scoring` in the very context that a rollout would choose it in, and all
corrections of a prompt in one pass.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from rl_backspace.config import Warmup
from rl_backspace.corrections import FROM_MODEL, Correction, Corrector, Source
from rl_backspace.detector import diagnose
from rl_backspace.engine import Engine
from rl_backspace.expert import Teacher
from rl_backspace.keyboard import alphabet, keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.pool import Asker, Entry
from rl_backspace.scoring import Packed, action_logprobs, batched, pack, packed_logits, typing_divergence
from rl_backspace.semantics import Budget
from rl_backspace.tasks import Row, Task

POOL = 2048  # answers that each source asks the model for at a refresh, at most: `group` of each prompt
HELD_OUT = 128  # test prompts that the detector is measured on
Example = tuple[Entry, Correction]


class Corrections(Dataset):
    """`size` prompts with a group of corrections each, made from a seed of their own: the same index and the same
    pool, the same corrections. A group shares its prompt's slots (`scoring`), so more corrections of a prompt cost
    little; its errors come from one source.

    Args:
        sources: source -> weight.
    """

    def __init__(
        self,
        corrector: Corrector,
        rows: list[Row],
        prompts: list[list[int]],
        sources: dict[Source, float],
        size: int,
        group: int,
        seed: int,
    ):
        self.corrector, self.rows, self.prompts = corrector, rows, prompts
        self.sources = {source: weight for source, weight in sources.items() if weight}
        self.size, self.group, self.seed = size, group, seed
        self.pool: dict[Source, list[Entry]] = {}

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> list[Example]:
        rng = random.Random(f"{self.seed}/{index}")
        (source,) = rng.choices(list(self.sources), list(self.sources.values()))
        if self.pool.get(source):
            entry = rng.choice(self.pool[source])
        else:
            chosen = rng.randrange(len(self.rows))
            entry = Entry(self.prompts[chosen], self.corrector.teacher.expert(self.rows[chosen]))
        attempts = rng.sample(entry.attempts, len(entry.attempts))
        turns = [attempts[turn % len(attempts) :] if attempts else [] for turn in range(self.group)]
        return [(entry, self.corrector.make(entry.expert, source, rng, turn)) for turn in turns]

    def refresh(self, asker: Asker, step: int) -> None:
        """Ask the model as it is now about other prompts than before, for the sources that need it."""
        for source in self.sources:
            if source in FROM_MODEL and self.corrector.clean < 1:
                rng = random.Random(f"{self.seed}/{source}/{step}")
                chosen = rng.sample(range(len(self.rows)), min(-(-POOL // self.group), len(self.rows)))
                self.pool[source] = asker.ask(source, [self.rows[i] for i in chosen], [self.prompts[i] for i in chosen])


class WarmupTrainer(Trainer):
    """transformers' Trainer with the loss of corrections: the mean over what an example teaches, then over examples.

    So a long search weighs no more than a clean answer, and the share of clean examples is their share of the loss.
    A state that teaches only to delete says nothing of what else to type there; left to itself that becomes noise,
    and with it what the policy types when its token is blocked. `beta` keeps it near what the base model types.
    """

    def __init__(
        self,
        policy: Policy,
        budget: Budget,
        args: TrainingArguments,
        dataset: Dataset,
        callbacks: list[TrainerCallback],
        beta: float = 0.0,
    ):
        self.rules, self.budget, self.pad, self.beta = policy.rules, budget, policy.tokenizer.pad_token_id, beta
        self.base = copy.deepcopy(policy.model).requires_grad_(False).eval() if beta and policy.whole else None
        super().__init__(policy.model, args, data_collator=self.collate, train_dataset=dataset, callbacks=callbacks)
        self.model_accepts_loss_kwargs = False
        self.actions = 0  # that were trained on

    def collate(self, groups: list[list[Example]]) -> dict[str, Tensor]:
        """TRL's shapes: prompts padded on the left, traces on the right; targets and what to learn (B, K)."""
        examples = [example for group in groups for example in group]
        corrections = [correction for _, correction in examples]
        ids, real = batched([entry.prompt for entry, _ in examples], [c.actions for c in corrections], self.pad)
        steps = max(len(correction.actions) for correction in corrections)
        targets, learn = ids[:, -steps:].clone(), torch.zeros(len(examples), steps)
        for i, correction in enumerate(corrections):
            targets[i, : len(correction.targets)] = torch.tensor(correction.targets)
            learn[i, : len(correction.learn)] = torch.tensor(correction.learn, dtype=torch.float)
        return {"input_ids": ids, "attention_mask": real, "targets": targets, "learn": learn}

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        learn = inputs["learn"]
        self.actions += int(inputs["attention_mask"][:, -learn.shape[1] :].sum())
        packed = pack(inputs["input_ids"], inputs["attention_mask"], learn.shape[1], self.rules, self.budget)
        logits = packed_logits(model, packed)
        logprobs = action_logprobs(logits, replace(packed, actions=inputs["targets"]))[0]
        counted = learn.sum(1)
        per_example = -logprobs.masked_fill(~learn.bool(), 0.0).sum(1) / counted.clamp(min=1)
        loss = per_example.sum() / counted.count_nonzero().clamp(min=1)
        if self.beta:
            reference = self._reference(model, packed)
            loss = loss + self.beta * typing_divergence(logits, reference, packed, sorted(self.rules.deletes))
        return (loss, {}) if return_outputs else loss

    @torch.no_grad()
    def _reference(self, model: Any, packed: Packed) -> Tensor:
        """The base model's logits (R, keep, V)."""
        with self.accelerator.autocast():  # in the precision of the policy's own forward
            if self.base is not None:
                return packed_logits(self.base, packed)
            adapted = self.accelerator.unwrap_model(model)
            adapted.eval()
            with adapted.disable_adapter():
                logits = packed_logits(adapted, packed)
            adapted.train()
            return logits


class Refresh(TrainerCallback):
    """Every so many steps: ask the model again, and measure its delete token as a detector of errors."""

    def __init__(self, every: int, refresh: Callable[[int], None]):
        self.every, self.refresh = every, refresh

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        over = control.should_training_stop or state.global_step >= state.max_steps
        if state.global_step % self.every == 0 and not over:
            self.refresh(state.global_step)


def make_corrector(policy: Policy, task: Task, budget: Budget, config: Warmup) -> Corrector:
    """A corrector whose wrong tokens are those that the task's own answers are made of."""
    return Corrector(make_teacher(policy, task, budget), config.clean, config.errors, config.late)


def make_teacher(policy: Policy, task: Task, budget: Budget) -> Teacher:
    """The teacher of a task, in the policy's tokens."""
    eos = policy.tokenizer.eos_token_id

    @functools.lru_cache(maxsize=10_000)
    def tokens(text: str) -> tuple[int, ...]:
        return tuple(policy.tokenizer(text, add_special_tokens=False).input_ids)

    return Teacher(task, policy.rules, budget, tokens, policy.text, alphabet(task, policy), eos)


def make_corrections(
    policy: Policy, task: Task, budget: Budget, config: Warmup, size: int, seed: int
) -> tuple[Corrections, Asker]:
    """The corrections of `size` prompts, still without a pool, and what asks the model to fill it."""
    if config.labels == "answers":
        task = task.without_checks()
    prompts = policy.encode([row["prompt"] for row in task.train])
    corrector = make_corrector(policy, task, budget, config)
    engine = Engine(policy.model, policy.rules, keyboard=keyboard_of(task, policy))
    generator = torch.Generator(engine.backbone.device)
    generator.manual_seed(seed)
    dataset = Corrections(corrector, task.train, prompts, config.sources, size, config.group, seed)
    return dataset, Asker(policy, corrector.teacher, engine, config, config.group, generator)


def first_corrections(
    policy: Policy, task: Task, budget: Budget, config: Warmup, seed: int, count: int
) -> list[tuple[Row, Correction]]:
    """Corrections of `count` prompts such as a warm-up begins with, and the rows that they are made of."""
    dataset, asker = make_corrections(policy, task, budget, config, count, seed)
    dataset.refresh(asker, 0)
    examples = (example for index in range(count) for example in dataset[index])
    return [(entry.expert.row, correction) for entry, correction in examples]


def warm_up(
    policy: Policy,
    task: Task,
    budget: Budget,
    config: Warmup,
    args: TrainingArguments,
    callbacks: list[TrainerCallback],
    on_diagnosis: Callable[[int, dict[str, Any]], None] = lambda step, found: None,
) -> tuple[dict[str, Any], int]:
    """Train `policy.model` in place for `args.max_steps` steps; the delete token's measures as a detector afterwards,
    and how many actions were trained on.

    Args:
        on_diagnosis: told of the same measures (`detector.diagnose`) at each refresh, with the step. They are empty
            where the task tells no errors, and the last ones where training was interrupted.
    """
    size = args.max_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    dataset, asker = make_corrections(policy, task, budget, config, size, args.seed)
    as_sampled = config.model_copy(update={"temperature": 1.0})  # the same for every setting
    measurer = replace(asker, config=as_sampled, group=2, generator=torch.Generator(asker.generator.device))
    examiner = replace(dataset.corrector, clean=0.5)  # right states and wrong ones, whatever is trained on

    def refresh(step: int) -> None:
        dataset.refresh(asker, step)
        for source, entries in dataset.pool.items():
            if not entries:
                tqdm.write(f"warm-up, step {step}: {source} found no error to learn from; its examples are clean")
        on_diagnosis(step, diagnose(measurer, examiner, task.test[:HELD_OUT], args.seed))

    refresh(0)
    trainer = WarmupTrainer(policy, budget, args, dataset, [*callbacks, Refresh(config.refresh, refresh)], config.beta)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    if trainer.state.global_step < args.max_steps:  # interrupted: what was learned is to be saved now
        return {}, trainer.actions
    found = diagnose(measurer, examiner, task.test[: 2 * HELD_OUT], args.seed)
    on_diagnosis(trainer.state.global_step, found)
    return found, trainer.actions
