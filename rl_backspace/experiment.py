"""An experiment: a config with everything it names loaded and checked, before anything is trained or written."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainingArguments
from trl import GRPOConfig

from rl_backspace.config import Config
from rl_backspace.corrections import FROM_MODEL
from rl_backspace.engine import Engine, Rollout
from rl_backspace.errors import UserError, one_line
from rl_backspace.folder import RunFolder, is_run, refuse_existing
from rl_backspace.keyboard import keyboard_of
from rl_backspace.plugins import load_task
from rl_backspace.policy import Policy, create, load
from rl_backspace.semantics import ACTIONS_PER_TOKEN, Budget
from rl_backspace.tasks import Task
from rl_backspace.terms import Term, call, load_terms

TRAINER_DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
GRPO_DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "disable_dropout": True,  # rollouts have none, so log-probs recomputed with it would be another policy's
}
WARMUP_DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "per_device_train_batch_size": 96,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "logging_steps": 10,
    "remove_unused_columns": False,
}
REFUSALS = (ValueError, TypeError, ImportError, NotImplementedError, RuntimeError)  # of TRL's and transformers' configs


@dataclass
class Experiment:
    """A config with everything it names loaded and checked, ready to train."""

    config: Config
    task: Task
    policy: Policy
    terms: list[Term]
    budget: Budget
    warmup_args: TrainingArguments
    args: GRPOConfig


def prepare(config: Config, out: Path | None) -> Experiment:
    """Load and check all that can be checked without training; writes nothing.

    Args:
        out: the run folder; None for an experiment that is not going to be run.

    Raises:
        UserError: whatever the user has to mend, every independent problem on a line of its own.
    """
    problems: list[str] = []

    def attempt(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            problems.append(str(error))

    if out is not None:
        attempt(refuse_existing, out)
    transformers.set_seed(config.seed)
    args = attempt(grpo_config, config, out)
    warmup_args = attempt(warmup_config, config, out)
    attempt(_check_wandb, config)
    if args is not None:
        attempt(_check_reference, config, args)
        if warmup_args is not None and config.warmup.steps:
            attempt(_check_precision, warmup_args, args)
    task = attempt(load_task, config.task.model_dump(), config.seed)
    policy = attempt(_policy, config)
    engine: Any = None
    if policy is not None:
        engine = attempt(Engine, policy.model, policy.rules)
        for name, its in (("trainer", args), ("warmup.trainer", warmup_args)):
            if its is not None:
                attempt(_check_optimizer, its, policy.model, name)
    terms = attempt(load_terms, config.rewards, task, policy)
    if problems:
        raise UserError("\n".join(problems))
    args.reward_weights = terms[1]
    policy.chat = isinstance(task.train[0]["prompt"], list)
    _one_thread_for_small_models(policy.model)
    experiment = Experiment(config, task, policy, terms[0], action_budget(config), warmup_args, args)
    _check_rows(experiment, engine)
    _check_task(task)
    _check_sources(config, task)
    keyboard_of(task, policy)  # refuses a task that no keyboard can be made for
    if args.max_steps:  # 0: no RL, and for nothing else do these matter
        _check_prompts(experiment)
        _check_terms(experiment)
    return experiment


def _policy(config: Config) -> Policy:
    """A fresh policy, or that of a run to go on from.

    Raises:
        UserError: it cannot be made, or the run's policy is not what this config describes.
    """
    model = model_of(config)
    run = Path(model)
    if not is_run(run):
        return create(model, config.delete, config.lora, config.seed)
    folder = RunFolder.open(run)
    before = folder.config()
    for key, its, ours in (
        ("delete", before.delete.model_copy(update={"budget": config.delete.budget}), config.delete),
        ("lora", before.lora, config.lora),
    ):
        if its != ours:
            raise UserError(
                f"model: the run {run} was trained with {key} {its and its.model_dump()}, but here it is "
                f"{ours and ours.model_dump()}; make them equal, or start from a base model"
            )
    policy = load(folder.policy, trainable=True)
    if config.warmup.steps or config.algorithm != "ppo":
        policy.critic = None  # it would know another policy than the one that is saved
    return policy


def model_of(config: Config) -> str:
    """The model's name, with the seed in it.

    Raises:
        UserError: a run by seed that is not there, which nothing else could be meant by.
    """
    model = config.model.replace("{seed}", str(config.seed))
    if model != config.model and not is_run(Path(model)):
        raise UserError(f"model: there is no run {model} to go on from; train it first, or give a base model")
    return model


def action_budget(config: Config) -> Budget:
    """How far one rollout may go: `trainer.max_completion_length` visible tokens, `delete.budget` actions."""
    answer = config.trainer.get("max_completion_length") or GRPOConfig.max_completion_length
    return Budget(answer, config.delete.budget or ACTIONS_PER_TOKEN * answer)


def grpo_config(config: Config, out: Path | None) -> GRPOConfig:
    """TRL's config; its own refusals become one line.

    Raises:
        UserError: TRL refuses a combination of fields.
    """
    fields = {**GRPO_DEFAULTS, **config.trainer}
    try:
        return GRPOConfig(output_dir=_checkpoints(out), seed=config.seed, **fields)
    except REFUSALS as error:
        raise UserError(f"trainer: {one_line(error)}") from error


def _checkpoints(out: Path | None) -> str | None:
    return str(out / "checkpoints") if out is not None else None


def warmup_config(config: Config, out: Path | None) -> TrainingArguments:
    """transformers' config of the warm-up; its own refusals become one line.

    Its precision is RL's: accelerate sets that once for the whole process.
    """
    precision: dict[str, Any] = {key: config.trainer[key] for key in ("bf16", "fp16") if key in config.trainer}
    fields: dict[str, Any] = {**WARMUP_DEFAULTS, **precision, **config.warmup.trainer}
    steps = max(1, config.warmup.steps)
    try:
        return TrainingArguments(output_dir=_checkpoints(out), max_steps=steps, seed=config.seed, **fields)
    except REFUSALS as error:
        raise UserError(f"warmup.trainer: {one_line(error)}") from error


def _check_precision(warmup: TrainingArguments, rl: GRPOConfig) -> None:
    for key in ("bf16", "fp16"):
        ours, theirs = getattr(warmup, key), getattr(rl, key)
        if ours != theirs and rl.max_steps:
            raise UserError(
                f"warmup.trainer.{key}: got {ours}, but trainer.{key} is {theirs}; one run has one precision: "
                "set it in trainer alone"
            )


def _check_optimizer(args: TrainingArguments, model: nn.Module, name: str) -> None:
    """Make the optimizer and the schedule for a parameter of no importance; raises UserError with the refusal."""
    try:
        cls, options = transformers.Trainer.get_optimizer_cls_and_kwargs(args, model)
        parameters = [nn.Parameter(torch.zeros(1))]
        own = {"params", "model", "optimizer_dict"} & set(options)  # it is made for the model's own parameters
        optimizer = torch.optim.SGD(parameters) if own else cls(parameters, **options)
        steps = args.max_steps if args.max_steps > 0 else 1000
        transformers.get_scheduler(
            args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps, args.lr_scheduler_kwargs
        )
    except REFUSALS as error:
        raise UserError(f"{name}: {one_line(error)}") from error


def _check_reference(config: Config, args: GRPOConfig) -> None:
    """A KL term pulls towards the policy as it was when RL began; raises UserError where TRL has another model."""
    if config.lora is None and args.beta and args.max_steps:
        raise UserError(
            f"trainer.beta: got {args.beta} with lora: null, where TRL's reference would be the base model on disk, "
            "without warm-up and delete token; set it to 0, or give a lora block"
        )


def _check_wandb(config: Config) -> None:
    if config.wandb is not None and config.wandb.mode == "online":
        import wandb

        if not wandb.api.api_key:
            raise UserError("wandb: mode online needs an account: run `wandb login`, or set wandb.mode to offline")


def _one_thread_for_small_models(model: nn.Module) -> None:
    """Below some ten million parameters a second CPU thread gains little on an idle machine and, wherever
    something else runs beside it, costs a factor of ten in waiting. OMP_NUM_THREADS overrides this."""
    small = sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    if small and not torch.cuda.is_available() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def _check_rows(experiment: Experiment, engine: Engine) -> None:
    """Every prompt fits the model and every answer can be typed; raises UserError naming the first that does not."""
    policy, task, budget = experiment.policy, experiment.task, experiment.budget
    rows = task.train + task.test
    prompts = policy.encode([row["prompt"] for row in rows])
    engine.capacity([max(prompts, key=len), min(prompts, key=len)], budget)
    answers = policy.tokenizer([row["answer"] for row in rows], add_special_tokens=False).input_ids
    for row, ids in zip(rows, answers, strict=True):
        if len(ids) + 1 > budget.answer:
            raise UserError(
                f"task: the answer {row['answer'][:40]!r} takes {len(ids) + 1} tokens with its end, but "
                f"trainer.max_completion_length is {budget.answer}; raise it"
            )
        if not policy.rules.deletes.keys().isdisjoint(ids):
            raise UserError(f"delete.tokens: the answer {row['answer'][:40]!r} contains a delete token; name another")
        if not policy.rules.eos.isdisjoint(ids):
            raise UserError(f"task: the answer {row['answer'][:40]!r} contains a token that ends answers; take it out")
        if task.ceiling is not None and task.typo_rate and len(ids) != len(row["answer"]):
            raise UserError(
                f"task: the ceiling counts a typo for each letter, but {row['answer'][:40]!r} is {len(ids)} tokens; "
                "take a model whose tokenizer knows letters only, such as puzzles-1m"
            )
        typed = policy.text(ids)
        if typed != row["answer"] and not task.correct(row, typed):
            raise UserError(
                f"task: the answer {row['answer'][:40]!r} is typed as {typed[:40]!r}, which is not right; take out "
                "what the model's tokenizer does not have"
            )


def _check_prompts(experiment: Experiment) -> None:
    """A generation batch draws distinct prompts; with fewer than that, TRL would train on nothing."""
    args, available = experiment.args, len(experiment.task.train)
    needed = args.generation_batch_size // args.num_generations
    if available < needed:
        raise UserError(
            f"task: {available} train prompts, but one generation batch takes {needed} "
            f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations}); "
            "lower trainer.per_device_train_batch_size or give more prompts"
        )


def _check_task(task: Task) -> None:
    """Call the task's own functions once, on reference answers; raises UserError where one breaks."""
    for row in task.train[:4] + task.test[:4]:
        if not task.correct(row, row["answer"]):
            raise UserError(
                f"task: `correct` calls the reference answer {row['answer'][:40]!r} wrong; mend one of them"
            )
        if not all(task.alive(row, row["answer"][:end]) for end in (0, len(row["answer"]))):
            raise UserError(f"task: `alive` calls the answer {row['answer'][:40]!r} or its beginning an error; mend it")
        if task.complete is not None:
            task.complete(row, row["answer"][:1], random.Random(0))


def _check_sources(config: Config, task: Task) -> None:
    """The model's own answers can only be labelled where an error can be told from another right answer."""
    asked = [source for source in FROM_MODEL if config.warmup.sources.get(source)]
    if config.warmup.labels == "answers":
        task = task.without_checks()
    if asked and config.warmup.steps and config.warmup.clean < 1 and not task.tells_errors:
        raise UserError(
            f"warmup.sources: {', '.join(asked)} cannot be labelled: task {config.task.fn!r} has its own `correct`, "
            "so several answers may be right, but no `alive` that tells which prefixes still can be, or labels: "
            "answers does not ask it; give it one, or set warmup.sources to {random: 1, early: 1}"
        )


def _check_terms(experiment: Experiment) -> None:
    """Call every reward once, on reference answers, so that a broken one shows before anything is trained."""
    policy, rows = experiment.policy, experiment.task.train[:4]
    rollouts = []
    for row, prompt in zip(rows, policy.encode([row["prompt"] for row in rows]), strict=True):
        ids = [*policy.tokenizer(row["answer"], add_special_tokens=False).input_ids, policy.tokenizer.eos_token_id]
        rollouts.append(Rollout(prompt, ids, ids, [0.0] * len(ids), "eos", 0, len(ids)))
    call(experiment.terms, rollouts, rows, policy, 0, max(1, experiment.args.max_steps))
