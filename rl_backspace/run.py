"""`train` from top to bottom: base model, correction warm-up, RL, and what changed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback

from rl_backspace.callbacks import Progress, StopOnInterrupt
from rl_backspace.controls import examine
from rl_backspace.display import console, detector_table, last_message, results_table, strike, trace_record
from rl_backspace.engine import Engine, Rollout
from rl_backspace.errors import UserError, one_line, words
from rl_backspace.evaluate import evaluate, is_right
from rl_backspace.experiment import REFUSALS, Experiment
from rl_backspace.export import publish, write_card
from rl_backspace.folder import RunFolder
from rl_backspace.keyboard import keyboard_of
from rl_backspace.policy import Policy
from rl_backspace.ppo import BackspacePPOTrainer
from rl_backspace.tasks import Row
from rl_backspace.trainer import BackspaceGRPOTrainer
from rl_backspace.warmup import warm_up

TRACES_PER_STEP = 8


def train(experiment: Experiment, out: Path) -> Path:
    """Run the experiment; the run folder.

    Whatever ends it early, what was learned is kept. Ctrl-C lets the current step end and raises KeyboardInterrupt,
    which says where that is, or why it could not be saved.
    """
    started = time.time()
    config, policy = experiment.config, experiment.policy
    folder = RunFolder.create(out, config)
    rows = experiment.task.test[: config.evaluation.rows]
    stages: dict[str, Any] = {}
    trainer: BackspaceGRPOTrainer | None = None
    detector: dict[str, Any] = {}
    warmup_actions = 0

    def measure(stage: str, **options: Any) -> None:
        stages[stage] = evaluate(policy, experiment.task, rows, experiment.budget, config.seed, **options)
        folder.metrics("evaluation", len(stages), {"stage": stage, **stages[stage]})

    with folder.mirrored(config), StopOnInterrupt() as stop, _keeping(policy, folder):
        measure("base", tokens=("blocked",))
        if config.warmup.steps:
            callbacks: list[TrainerCallback] = [Progress("warm-up", folder), stop]
            detector, warmup_actions = _warm_up(experiment, folder, callbacks)
            publish(policy, folder)
            _raise_if(stop.asked)
        measure("before")
        if experiment.args.max_steps:  # 0 means no RL here, and other things to transformers
            trainer = _rl(experiment, folder, stop)
            trainer.train()
            publish(policy, folder)
            _raise_if(stop.asked)
            measure("after")
        if config.evaluation.controls:
            most = config.evaluation.controls
            folder.examined(examine(policy, experiment.task, rows, experiment.budget, config.seed, most))
        summary = summarise(stages, trainer, experiment.task.ceiling, time.time() - started)
        summary |= {"detector": detector, "warmup_actions": warmup_actions}
        summary["reference_actions"] = reference_actions(experiment)
        folder.summarise(summary)
        write_card(policy, folder)  # again, with the results
    with contextlib.suppress(OSError):  # empty unless trainer.save_strategy asks for checkpoints
        (out / "checkpoints").rmdir()
    report(experiment, stages, summary, folder)
    return out


@contextlib.contextmanager
def _keeping(policy: Policy, folder: RunFolder) -> Iterator[None]:
    """Whatever ends the run inside early, save what was learned; what the user can mend becomes one line."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_keep(policy, folder)) from None
    except Exception as error:  # a reward that raises, weights that diverge, a full disk
        kept = _keep(policy, folder)
        if isinstance(error, (UserError, OSError, SafetensorError, *REFUSALS)):
            said = words(error)
            raise UserError(kept if f"({said})" in kept else f"{said}; {kept}") from error
        raise


def _keep(policy: Policy, folder: RunFolder) -> str:
    """Save what was learned so far; where it is, or why it is not there."""
    try:
        publish(policy, folder)
    except UserError as error:
        return f"the {folder.policy.name} could not be saved ({error})"
    except (OSError, SafetensorError) as error:
        said = f"the {folder.policy.name} could not be saved to {folder.policy} ({one_line(error)})"
        return f"{said}; mend that, or give --out another folder"
    return f"the {folder.policy.name} as it was is in {folder.policy}"


def _raise_if(interrupted: bool) -> None:
    if interrupted:
        raise KeyboardInterrupt


def _warm_up(experiment: Experiment, folder: RunFolder, callbacks: list[TrainerCallback]) -> tuple[dict[str, Any], int]:
    """Corrections; the delete token's measures as a detector of errors, which metrics.jsonl gets at each refresh, and
    how many actions were trained on."""
    return warm_up(
        experiment.policy,
        experiment.task,
        experiment.budget,
        experiment.config.warmup,
        experiment.warmup_args,
        callbacks,
        on_diagnosis=partial(folder.metrics, "detector"),
    )


def _rl(experiment: Experiment, folder: RunFolder, stop: StopOnInterrupt) -> BackspaceGRPOTrainer:
    names, policy = list(experiment.config.rewards), experiment.policy

    def keep_traces(rollouts: list[Rollout], rows: list[Row], rewards: Tensor) -> None:
        every = max(1, len(rollouts) // TRACES_PER_STEP)
        for i in range(0, len(rollouts), every):
            rollout = rollouts[i]
            record = {
                "step": trainer.state.global_step,
                **trace_record(rows[i]["prompt"], rollout, policy),
                "rewards": dict(zip(names, [None if r != r else r for r in rewards[i].tolist()], strict=True)),
            }
            folder.trace(record)

    prompts = [row["prompt"] for row in experiment.task.train]
    dataset = datasets.Dataset.from_dict({"prompt": prompts, "row": list(range(len(prompts)))})
    trainer: BackspaceGRPOTrainer
    make: Any = BackspaceGRPOTrainer
    if experiment.config.algorithm == "ppo":
        make = partial(BackspacePPOTrainer, ppo=experiment.config.ppo)
    try:
        trainer = make(
            experiment.policy,
            experiment.task,
            experiment.budget,
            experiment.terms,
            experiment.args,
            dataset,
            on_rollouts=keep_traces,
            callbacks=[Progress("rl", folder), stop],
        )
    except REFUSALS as error:  # what TRL only finds out here
        raise UserError(f"trainer: {one_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def reference_actions(experiment: Experiment) -> float:
    """Mean length in tokens of reference answers with their end, of some thousand rows from everywhere: a task that
    draws distinct prompts has its short ones first."""
    rows = experiment.task.train
    answers = [row["answer"] for row in rows[:: max(1, len(rows) // 1000)]]
    ids = experiment.policy.tokenizer(answers, add_special_tokens=False).input_ids
    return sum(map(len, ids)) / len(ids) + 1


def summarise(
    stages: dict[str, Any], trainer: BackspaceGRPOTrainer | None, ceiling: float | None, seconds: float
) -> dict[str, Any]:
    """`summary.json`: each measure nested by stage, token and decoding, then RL's counts.

    Without RL the counts are 0, and the gap between log-probs, which nothing measured, is null. And the task's
    ceiling without deletes, where it has one.
    """

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
        "logp_gap_max": trainer.logp_gap_max if trainer else None,
        "forward_passes": trainer.forward_passes if trainer else 0,
        "actions": trainer.actions if trainer else 0,
        "deletes": trainer.deletes if trainer else 0,
        "rollouts": trainer.rollouts if trainer else 0,
        "steps": trainer.state.global_step if trainer else 0,
        "seconds": round(seconds, 1),
        **({} if ceiling is None else {"ceiling": ceiling}),
    }


def report(experiment: Experiment, stages: dict[str, Any], summary: dict[str, Any], folder: RunFolder) -> None:
    """The table, a few traces with deletes, and where everything is."""
    policy = experiment.policy
    console.print()
    console.print(results_table(stages, experiment.task.ceiling))
    legend = {"base": "to begin with", "before": "before RL", "after": "after RL"}
    console.print("; ".join(f"{stage}: {when}" for stage, when in legend.items() if stage in stages), style="dim")
    if summary["detector"]:
        console.print(detector_table(summary["detector"]))
    rows = experiment.task.test[:64]
    torch.manual_seed(experiment.config.seed)
    prompts = policy.encode([row["prompt"] for row in rows])
    engine = Engine(policy.model, policy.rules, keyboard=keyboard_of(experiment.task, policy))
    rollouts = engine.run(prompts, experiment.budget)
    shown = sorted(zip(rows, rollouts, strict=True), key=lambda pair: not 0 < pair[1].deletes < 4)[:5]
    console.print("\nsampled traces, deleted text struck through")
    for row, rollout in shown:
        line = strike(rollout.actions, policy.tokenizer, policy.rules, marks=not console.is_terminal)
        right = is_right(policy, experiment.task, row, rollout)
        console.print(f"  {last_message(row['prompt'])} ", line, "  right" if right else "  wrong", sep="")
    if summary["steps"]:
        console.print(
            f"\n{summary['actions']} actions in {summary['forward_passes']} forward passes; largest gap between "
            f"sampled and recomputed log-probs {summary['logp_gap_max']:.1e}"
        )
    files = (folder.policy.name, "summary.json", "metrics.jsonl", "traces.jsonl", "config.yaml")
    written = ", ".join(name for name in files if (folder.path / name).exists())
    console.print(f"{summary['seconds']:.0f} s; written to {folder.path}: {written}")
