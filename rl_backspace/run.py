"""`train` from top to bottom: base model, correction warm-up, GRPO, and what changed."""

from __future__ import annotations

import asyncio
import inspect
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from rl_backspace.callbacks import Progress, StopOnInterrupt
from rl_backspace.config import Config
from rl_backspace.display import console, results_table, strike
from rl_backspace.engine import Engine, Rollout
from rl_backspace.errors import UserError
from rl_backspace.evaluate import evaluate
from rl_backspace.folder import RunFolder, refuse_existing
from rl_backspace.plugins import load_task
from rl_backspace.policy import Policy, create
from rl_backspace.semantics import Budget
from rl_backspace.tasks import Row, Task
from rl_backspace.terms import Term, load_terms
from rl_backspace.trainer import BackspaceGRPOTrainer, reward_inputs, visible_completions
from rl_backspace.warmup import warm_up

GRPO_DEFAULTS: dict[str, Any] = {
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
TRACES_PER_STEP = 8
ACTIONS_PER_TOKEN = 3  # the default action budget, in answers


@dataclass
class Experiment:
    """A config with everything it names loaded and checked, ready to train."""

    config: Config
    task: Task
    policy: Policy
    terms: list[Term]
    budget: Budget
    args: GRPOConfig


def prepare(config: Config, out: Path) -> Experiment:
    """Load and check all that can be checked without training; writes nothing.

    Raises:
        UserError: whatever the user has to mend, every independent problem on a line of its own.
    """
    problems: list[str] = []

    def attempt(function: Any, *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except UserError as error:
            problems.append(str(error))

    attempt(refuse_existing, out)
    transformers.set_seed(config.seed)
    args = attempt(grpo_config, config, out)
    task = attempt(load_task, config.task.model_dump(), config.seed)
    policy = attempt(create, config.model, config.delete, config.lora, config.seed)
    if policy is not None:
        attempt(Engine, policy.model, policy.rules)
    terms = attempt(load_terms, config.rewards, task, policy.rules if policy else None)
    if problems:
        raise UserError("\n".join(problems))
    args.reward_weights = terms[1]
    experiment = Experiment(config, task, policy, terms[0], action_budget(config), args)
    _check_lengths(experiment)
    _check_prompts(experiment)
    _check_terms(experiment)
    return experiment


def action_budget(config: Config) -> Budget:
    """How far one rollout may go: `trainer.max_completion_length` visible tokens, `delete.budget` actions."""
    answer = config.trainer.get("max_completion_length") or GRPOConfig.max_completion_length
    return Budget(answer, config.delete.budget or ACTIONS_PER_TOKEN * answer)


def grpo_config(config: Config, out: Path) -> GRPOConfig:
    """TRL's config; its own refusals become one line.

    Raises:
        UserError: TRL refuses a combination of fields.
    """
    fields = {**GRPO_DEFAULTS, **config.trainer}
    try:
        return GRPOConfig(output_dir=str(out / "checkpoints"), seed=config.seed, **fields)
    except (ValueError, TypeError, ImportError, NotImplementedError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _check_lengths(experiment: Experiment) -> None:
    """Every prompt and answer fits; raises UserError naming the first that does not."""
    policy, task, budget = experiment.policy, experiment.task, experiment.budget
    rows = task.train + task.test
    prompts = policy.encode([row["prompt"] for row in rows])
    Engine(policy.model, policy.rules).capacity([max(prompts, key=len), min(prompts, key=len)], budget)
    for row in rows:
        length = len(policy.tokenizer(row["answer"], add_special_tokens=False).input_ids) + 1
        if length > budget.answer:
            raise UserError(
                f"task: the answer {row['answer'][:40]!r} takes {length} tokens with its end, but "
                f"trainer.max_completion_length is {budget.answer}; raise it"
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


def _check_terms(experiment: Experiment) -> None:
    """Call every reward once, on reference answers, so that a broken one shows before anything is trained."""
    policy, rows = experiment.policy, experiment.task.train[:4]
    rollouts = []
    for row, prompt in zip(rows, policy.encode([row["prompt"] for row in rows]), strict=True):
        ids = [*policy.tokenizer(row["answer"], add_special_tokens=False).input_ids, policy.tokenizer.eos_token_id]
        rollouts.append(Rollout(prompt, ids, ids, [0.0] * len(ids), "eos", 0, len(ids)))
    prompts = [row["prompt"] for row in rows]
    inputs = {
        "prompts": prompts,
        "completions": visible_completions(rollouts, prompts, policy),
        "completion_ids": [rollout.visible for rollout in rollouts],
        "trainer_state": transformers.TrainerState(max_steps=max(1, experiment.args.max_steps)),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    entries = reward_inputs(rollouts, rows)
    columns = {key: [entry[key] for entry in entries] for key in entries[0] if key not in ("prompt", "completion")}
    for term in experiment.terms:
        result = term(**inputs, **columns)
        if inspect.isawaitable(result):
            asyncio.run(_finish(result))


async def _finish(awaitable: Any) -> Any:
    return await awaitable


def train(experiment: Experiment, out: Path) -> Path:
    """Run the experiment; the run folder.

    Whatever ends it early, the adapter is kept. Ctrl-C lets the current step end and raises KeyboardInterrupt.
    """
    started = time.time()
    config, policy = experiment.config, experiment.policy
    folder = RunFolder.create(out, config)
    rows = experiment.task.test[: config.evaluation.rows]
    stages: dict[str, Any] = {}

    def measure(stage: str, **options: Any) -> None:
        stages[stage] = evaluate(policy, experiment.task, rows, experiment.budget, config.seed, **options)
        folder.metrics("evaluation", len(stages), {"stage": stage, **stages[stage]})

    with folder.mirrored(config), StopOnInterrupt() as stop:
        try:
            measure("base", tokens=("blocked",))
            if config.warmup.steps:
                callbacks: list[TrainerCallback] = [Progress("warm-up", folder), stop]
                warm_up(policy, experiment.task, experiment.budget, config, out / "checkpoints", callbacks)
                policy.save(folder.adapter)
                _raise_if(stop.asked)
            measure("before")
            trainer = _grpo(experiment, folder, stop)
            trainer.train()
            policy.save(folder.adapter)
            _raise_if(stop.asked)
            measure("after")
        except BaseException:  # an interrupt, a reward that raises, a full disk: what was learned is kept
            policy.save(folder.adapter)
            raise
        summary = summarise(stages, trainer, time.time() - started)
        folder.summarise(summary)
    report(experiment, stages, summary, folder)
    return out


def _raise_if(interrupted: bool) -> None:
    if interrupted:
        raise KeyboardInterrupt


def _grpo(experiment: Experiment, folder: RunFolder, stop: StopOnInterrupt) -> BackspaceGRPOTrainer:
    names = list(experiment.config.rewards)

    def keep_traces(rollouts: list[Rollout], rows: list[Row], rewards: Tensor) -> None:
        every = max(1, len(rollouts) // TRACES_PER_STEP)
        for i in range(0, len(rollouts), every):
            rollout = rollouts[i]
            record = {
                "step": trainer.state.global_step,
                "prompt": rows[i]["prompt"],
                "actions": rollout.actions,
                "visible": experiment.policy.text(rollout.visible),
                "end": rollout.end,
                "deletes": rollout.deletes,
                "rewards": dict(zip(names, [None if r != r else r for r in rewards[i].tolist()], strict=True)),
            }
            folder.trace(record)

    prompts = [row["prompt"] for row in experiment.task.train]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
    trainer = BackspaceGRPOTrainer(
        experiment.policy,
        experiment.task,
        experiment.budget,
        experiment.terms,
        experiment.args,
        dataset,
        on_rollouts=keep_traces,
        callbacks=[Progress("grpo", folder), stop],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def summarise(stages: dict[str, Any], trainer: BackspaceGRPOTrainer, seconds: float) -> dict[str, Any]:
    """`summary.json`: each measure nested by stage, token and decoding, then the run's counts."""

    def nested(key: str) -> dict[str, Any]:
        return {
            stage: {token: {how: cell[key] for how, cell in row.items()} for token, row in result.items()}
            for stage, result in stages.items()
        }

    return {
        "accuracy": nested("accuracy"),
        "interval": nested("interval"),
        "deletes_per_answer": nested("deletes_per_answer"),
        "actions_per_answer": nested("actions_per_answer"),
        "finished": nested("finished"),
        "logp_gap_max": trainer.logp_gap_max,
        "forward_passes": trainer.forward_passes,
        "actions": trainer.actions,
        "deletes": trainer.deletes,
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
    }


def report(experiment: Experiment, stages: dict[str, Any], summary: dict[str, Any], folder: RunFolder) -> None:
    """The table, a few traces with deletes, and where everything is."""
    policy = experiment.policy
    console.print()
    console.print(results_table(stages))
    console.print("base: before any training; before: after the correction warm-up; after: after GRPO", style="dim")
    rows = experiment.task.test[:64]
    torch.manual_seed(experiment.config.seed)
    prompts = policy.encode([row["prompt"] for row in rows])
    rollouts = Engine(policy.model, policy.rules).run(prompts, experiment.budget)
    shown = sorted(zip(rows, rollouts, strict=True), key=lambda pair: not 0 < pair[1].deletes < 4)[:5]
    console.print("\nsampled traces, deleted text struck through")
    for row, rollout in shown:
        line = strike(rollout.actions, policy.tokenizer, policy.rules)
        right = experiment.task.correct(row, policy.text(rollout.visible))
        console.print(f"  {row['prompt']} ", line, "  right" if right else "  wrong", sep="")
    console.print(
        f"\n{summary['actions']} actions in {summary['forward_passes']} forward passes; largest gap between sampled "
        f"and recomputed log-probs {summary['logp_gap_max']:.1e}; {summary['seconds']:.0f} s"
    )
    console.print(f"written to {folder.path}: adapter/, summary.json, metrics.jsonl, traces.jsonl, config.yaml")
