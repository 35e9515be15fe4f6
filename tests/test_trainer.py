from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from checkpoints import checkpoint
from conftest import VOCAB, tiny
from trl import GRPOConfig, GRPOTrainer

from rl_backspace.backbone import Backbone
from rl_backspace.config import Delete, Lora
from rl_backspace.engine import Engine, Rollout, Sampling
from rl_backspace.policy import Policy, create
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Rules
from rl_backspace.tasks import Task
from rl_backspace.tasks.arithmetic import arithmetic
from rl_backspace.trainer import BackspaceGRPOTrainer

ANSWER = 6
BF16_GAP = 0.2  # of log-probs: over eight seeds up to 0.08 on one CPU and 0.13 on one with bf16 products of its own


def task() -> Task:
    return arithmetic("+", digits=1, train=40, test=4)


def dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"prompt": [r["prompt"] for r in rows], "row": list(range(len(rows)))})


def config(folder: Path, **fields: Any) -> GRPOConfig:
    defaults: dict[str, Any] = {
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": ANSWER,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return GRPOConfig(output_dir=str(folder), **{**defaults, **fields})


def digits(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward with a spread: how many of the visible ids are low."""
    return [sum(token < VOCAB // 2 for token in ids) / (1 + len(ids)) for ids in completion_ids]


def policy(rules: Rules | None = None) -> Policy:
    tokenizer = character_tokenizer()
    model = tiny(vocab_size=128, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return Policy(model, tokenizer, rules or Rules({}, frozenset([tokenizer.eos_token_id])))


def stock_rollouts(rules: Rules, seed: int) -> Any:
    """A stock trainer's rollout function that samples as our trainer does, without any of its overrides."""
    generator = torch.Generator().manual_seed(seed)

    def rollout_func(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = trainer.processing_class(text=prompts)["input_ids"]
        rollouts = Engine(trainer.model, rules).run(ids, Budget(ANSWER), Sampling(trainer.temperature), generator)
        return {
            "prompt_ids": ids,
            "completion_ids": [r.actions for r in rollouts],
            "logprobs": [r.logprobs for r in rollouts],
        }

    return rollout_func


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"loss_type": "grpo", "temperature": 0.7, "gradient_accumulation_steps": 2},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "num_iterations": 2, "max_steps": 4},
        {"beta": 0.1, "importance_sampling_level": "sequence"},
    ],
)
def test_without_deletes_a_step_equals_stock_trl(tmp_path: Path, fields: dict[str, Any]) -> None:
    results = {}
    for kind in ("stock", "ours"):
        made, rows = policy(), task()
        args = config(tmp_path / kind, optim="sgd", learning_rate=0.1, **fields)  # Adam would blow up rounding
        if args.beta:  # a reference made from the same weights, on disk as TRL wants it
            made.model.save_pretrained(tmp_path / "base")
            made.model.config._name_or_path = str(tmp_path / "base")
        if kind == "ours":
            trainer: GRPOTrainer = BackspaceGRPOTrainer(made, rows, Budget(ANSWER), [digits], args, dataset(rows.train))
        else:
            trainer = GRPOTrainer(
                model=made.model,
                reward_funcs=digits,
                args=args,
                train_dataset=dataset(rows.train).remove_columns("row"),
                processing_class=made.tokenizer,
                rollout_func=stock_rollouts(made.rules, args.seed),
            )
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        results[kind] = (losses, {n: p.detach().clone() for n, p in made.model.named_parameters()})
    assert results["ours"][0] == pytest.approx(results["stock"][0], abs=1e-6)
    for name, parameter in results["stock"][1].items():
        torch.testing.assert_close(results["ours"][1][name], parameter, atol=2e-5, rtol=1e-4, msg=name)


@pytest.fixture
def deleter(tmp_path: Path) -> Policy:
    """A LoRA policy whose delete token is likely, as after a warm-up."""
    plain = policy()
    plain.model.save_pretrained(tmp_path / "model")
    plain.tokenizer.save_pretrained(tmp_path / "model")
    made = create(str(tmp_path / "model"), Delete(retry="ban"), Lora(r=4, alpha=8), seed=0)
    ids = torch.tensor(made.encode([row["prompt"] for row in task().train if len(row["prompt"]) == 4]))
    with torch.no_grad():
        hidden = made.model.get_base_model().base_model(input_ids=ids).last_hidden_state.mean((0, 1))
        for name, parameter in made.model.named_parameters():
            if "lm_head" in name and "trainable_tokens_delta" in name:
                parameter.copy_(4 * hidden / hidden.square().sum())  # a logit of 4 on average
            elif "lora_B" in name:
                parameter.normal_(std=0.02)
    return made


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_scores_what_it_sampled_and_rewards_see_what_is_visible(deleter: Policy, tmp_path: Path, memory: Any) -> None:
    deleter.rules = Rules(deleter.rules.deletes, deleter.rules.eos, memory, "ban")
    rows, seen = task(), []

    def look(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
        for i, actions in enumerate(columns["actions"]):
            assert columns["deletes"][i] == sum(a in deleter.rules.deletes for a in actions)
            assert not set(completion_ids[i]) & set(deleter.rules.deletes)
            assert completions[i] == deleter.text(completion_ids[i])
            assert columns["rows"][i]["prompt"] == prompts[i]
            assert columns["answer"][i] == columns["rows"][i]["answer"]
        seen.extend(columns["deletes"])
        return digits(completion_ids)

    batches: list[tuple[list[Rollout], torch.Tensor]] = []
    trainer = BackspaceGRPOTrainer(
        deleter,
        rows,
        Budget(ANSWER, 20),
        [look],
        config(tmp_path, temperature=0.9, gradient_accumulation_steps=2, max_steps=3),
        dataset(rows.train),
        on_rollouts=lambda rollouts, _, rewards: batches.append((rollouts, rewards)),
    )
    before = {n: p.detach().clone() for n, p in deleter.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert sum(seen) > 20
    assert 0 < trainer.logp_gap_max < 1e-4
    assert len(batches) == 3 and all(len(rollouts) == len(rewards) == 16 for rollouts, rewards in batches)
    assert trainer.actions == sum(len(r.actions) for rollouts, _ in batches for r in rollouts)
    if memory == "erase":
        assert trainer.forward_passes == trainer.actions - trainer.deletes
    moved = [n for n, p in deleter.model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    assert any("trainable_tokens" in name for name in moved) and any("lora" in name for name in moved)
    logged = trainer.state.log_history[0]
    for key in ("accuracy", "deletes_per_answer", "reward", "rewards/look/mean", "rewards/look/std", "logp_gap_max"):
        assert isinstance(logged[key], float)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 2, "max_steps": 4},
        {"bf16": True, "use_cpu": True, "max_steps": 4},
        {"mask_truncated_completions": True},
        {"top_k": 3, "temperature": 0.8},
        {"gradient_checkpointing": True},
    ],
)
def test_the_gap_stays_at_rounding(deleter: Policy, tmp_path: Path, fields: dict[str, Any]) -> None:
    rows = task()
    trainer = BackspaceGRPOTrainer(
        deleter, rows, Budget(ANSWER, 20), [digits], config(tmp_path, **fields), dataset(rows.train)
    )
    trainer.train()
    assert trainer.deletes > 10
    assert trainer.logp_gap_max < (BF16_GAP if fields.get("bf16") else 1e-4)


def test_logged_accuracy_counts_finished_right_answers(deleter: Policy, tmp_path: Path) -> None:
    """Against a task whose checker accepts short texts, finished or not."""
    rows, right = task(), []
    rows = Task(rows.train, rows.test, correct=lambda row, text: len(text) < 3)

    def look(rollouts: list[Rollout], _: Any, __: Any) -> None:
        right.append(sum(r.end == "eos" and len(deleter.text(r.visible)) < 3 for r in rollouts) / len(rollouts))

    args = config(tmp_path, max_steps=3, per_device_train_batch_size=64)
    trainer = BackspaceGRPOTrainer(deleter, rows, Budget(ANSWER, 20), [digits], args, dataset(rows.train), look)
    trainer.train()
    logged = [entry["accuracy"] for entry in trainer.state.log_history if "accuracy" in entry]
    assert logged == pytest.approx(right) and 0 < max(right) < 1


def test_top_k_reaches_the_sampler(deleter: Policy, tmp_path: Path) -> None:
    rows, seen = task(), []
    args = config(tmp_path, max_steps=1, top_k=1)
    look = lambda rollouts, *_: seen.extend(rollouts)  # noqa: E731
    BackspaceGRPOTrainer(deleter, rows, Budget(ANSWER, 20), [digits], args, dataset(rows.train), look).train()
    for first, second in itertools.pairwise(seen):
        if first.prompt == second.prompt:
            assert first.actions == second.actions


def test_the_gap_shows_a_wrong_context(deleter: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logged gap is a check that can fail: score as if memory were `keep`, and it jumps."""
    from rl_backspace import trainer as module

    wrong = Rules(deleter.rules.deletes, deleter.rules.eos, "keep", "ban")
    original = module.pack
    monkeypatch.setattr(module, "pack", lambda ids, mask, steps, _, budget: original(ids, mask, steps, wrong, budget))
    rows = task()
    trainer = BackspaceGRPOTrainer(
        deleter, rows, Budget(ANSWER, 20), [digits], config(tmp_path, max_steps=1), dataset(rows.train)
    )
    trainer.train()
    assert trainer.logp_gap_max > 0.01


def test_the_reference_starts_equal_to_the_policy(deleter: Policy, tmp_path: Path) -> None:
    """With a KL term, the reference has the policy's delete token too: no divergence before the first update."""
    rows = task()
    trainer = BackspaceGRPOTrainer(
        deleter, rows, Budget(ANSWER, 20), [digits], config(tmp_path, beta=0.1, max_steps=1), dataset(rows.train)
    )
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)


def test_seams_of_trl_have_not_moved() -> None:
    """Private methods that the trainer overrides or calls; when one changes, read TRL's diff before mending."""

    def parameters(method: str) -> list[str]:
        return list(inspect.signature(getattr(GRPOTrainer, method)).parameters)

    assert parameters("_calculate_rewards") == ["self", "inputs", "prompts", "completions", "completion_ids_list"]
    assert parameters("_compute_loss") == ["self", "model", "inputs"]
    assert parameters("_set_signature_columns_if_needed") == ["self"]
    assert parameters("_get_per_token_logps_and_entropies")[:8] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]
    source = inspect.getsource(GRPOTrainer)
    assert "output = self.rollout_func(prompts, self)" in source
    assert 'output["sampling_per_token_logps"] = sampling_per_token_logps' in source
    assert 'self._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}' in source


def test_rollouts_of_training_take_the_fused_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate, PEFT and TRL put around the model leaves its layers as they are."""

    def never(*_: Any) -> None:
        raise AssertionError("the stock step")

    monkeypatch.setattr(Backbone, "decode", never)
    made = create(str(checkpoint(tmp_path / "base")), Delete(), Lora(r=4), seed=0)
    trainer = BackspaceGRPOTrainer(made, task(), Budget(ANSWER), [digits], config(tmp_path), dataset(task().train))
    trainer.train()
    assert trainer.rollouts == 16 and trainer.logp_gap_max < 1e-4
