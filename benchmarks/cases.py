"""What is measured: each case sets up both sides, checks that they do the same work, and has a goal."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainingArguments

from benchmarks import models, peers
from benchmarks.measure import Side
from rl_backspace.config import Warmup
from rl_backspace.engine import Engine, Rollout, Running, Sampling, draw
from rl_backspace.errors import UserError
from rl_backspace.policy import Policy
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.scoring import pack, score
from rl_backspace.semantics import Budget, Rules, contexts
from rl_backspace.tasks import Task, countdown, signs
from rl_backspace.warmup import Example, WarmupTrainer, make_corrections

ROOT = Path(__file__).parents[1]
RULES = Rules({models.DELETE: "token"}, eos=frozenset())  # nothing ends an answer early


@dataclass(frozen=True)
class Setting:
    """The axes along which cost grows.

    Args:
        size: which model of `models.SIZES`.
        batch: rollouts side by side.
        prompt, actions: tokens and actions of each.
        deletes: probability of a delete wherever one is legal.
    """

    size: str = "1m"
    batch: int = 64
    prompt: int = 32
    actions: int = 64
    deletes: float = 0.2

    @property
    def context(self) -> int:
        return self.prompt + self.actions


@dataclass(frozen=True)
class Case:
    """Two sides to compare: `setup(setting)` makes them; `goal` is the least ratio of ours to the peer's rate, or with
    `memory` the largest one of what they need at once."""

    name: str
    peer: str
    goal: float
    setup: Callable[[Setting], tuple[Side, Side]]
    memory: bool = False


def rollouts_without_deletes(setting: Setting, adapted: bool = False) -> tuple[Side, Side]:
    """Deletes blocked, against `model.generate`: same prompts, same lengths, both sampling; with a LoRA adapter, as in
    training, or none."""
    model: Any = models.make(setting.size, 0.0, setting.context)
    model = models.adapt(model, [models.DELETE]).eval() if adapted else model
    prompts = models.prompts(setting.batch, setting.prompt)
    return typing_sides(
        model, prompts, setting.actions, lambda: peers.generate(model, prompts, setting.actions).numel()
    )


def typing_sides(model: Any, prompts: Tensor, actions: int, peer: Side) -> tuple[Side, Side]:
    """Rollouts of `actions` tokens with deletes blocked, beside a peer that is to make as many."""
    engine, listed = Engine(model, RULES, rows=len(prompts)), prompts.tolist()

    def ours() -> int:
        return sum(len(rollout.visible) for rollout in engine.run(listed, Budget(actions, deletes=0)))

    expect(ours() == peer() == len(prompts) * actions, "both sides produce as many tokens")
    return ours, peer


def continuous_batching(setting: Setting) -> tuple[Side, Side]:
    """Deletes blocked, against transformers' continuous batching."""
    model = models.make(setting.size, 0.0, setting.context)
    other = models.make(setting.size, 0.0, setting.context)  # it changes the model's attention
    prompts = models.prompts(setting.batch, setting.prompt)
    lengths = [setting.actions] * len(prompts)
    peer = partial(peers.generate_batch, other, prompts.tolist(), lengths, setting.batch)
    return typing_sides(model, prompts, setting.actions, peer)


@dataclass(frozen=True)
class Until(Sampling):
    """Ends each rollout when it has as many tokens as it is to have."""

    lengths: tuple[int, ...] = ()

    def stopped(self, rows: Sequence[Running]) -> list[bool]:
        return [len(row.machine.visible) >= self.lengths[row.index] for row in rows]


def skewed_rollouts(setting: Setting, batches: int = 8, longer: int = 8, continuous: bool = False) -> tuple[Side, Side]:
    """One answer in ten is `longer` times as long as the others, at random places: rows that finish make room for the
    next prompt, while a batch of `model.generate` goes on until its longest row is done. No deletes. Or against
    transformers' continuous batching, where they make room too."""
    short = max(1, setting.actions // longer)
    model = models.make(setting.size, 0.0, setting.prompt + short * longer)
    other = copy.deepcopy(model) if continuous else model  # continuous batching changes its attention
    prompts = models.prompts(batches * setting.batch, setting.prompt)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(0))
    lengths = torch.full((len(prompts),), short)
    lengths[order[: len(prompts) // 10]] = short * longer
    engine, listed = Engine(model, RULES, rows=setting.batch), prompts.tolist()
    sampling, budget = Until(lengths=tuple(lengths.tolist())), Budget(short * longer, deletes=0)

    def ours() -> int:
        return sum(len(rollout.visible) for rollout in engine.run(listed, budget, sampling))

    def peer() -> int:
        if continuous:
            return peers.generate_batch(other, listed, lengths.tolist(), setting.batch)
        return peers.generate_skewed(other, prompts, lengths, setting.batch)

    expect(ours() == peer() == int(lengths.sum()), "both sides produce as many tokens")
    return ours, peer


def scoring_side(model: Any, ids: Tensor, actions: int, rules: Rules, budget: Budget) -> Side:
    """Our forward and backward over rows (B, P + K) without padding, whose last `actions` ids are the traces."""

    def run() -> int:
        model.zero_grad()
        logprobs, _ = score(model, pack(ids, torch.ones_like(ids), actions, rules, budget))
        logprobs.sum().backward()
        return logprobs.numel()

    return run


def flat_side(model: Any, ids: Tensor, actions: int) -> Side:
    """The peer's: each row a flat sequence, as TRL scores them."""

    def run() -> int:
        model.zero_grad()
        return peers.score_flat(model, ids, actions).numel()

    return run


def memory_of_scoring(setting: Setting) -> tuple[Side, Side]:
    """Forward and backward over traces with deletes, against flat sequences of as many actions, as TRL scores them."""
    model = models.make(setting.size, setting.deletes, setting.context)
    prompts, budget = models.prompts(setting.batch, setting.prompt), Budget(setting.actions, setting.actions)
    rollouts = Engine(model, RULES, rows=setting.batch).run(prompts.tolist(), budget)
    expect_deletes(rollouts, setting.deletes)
    traces = torch.tensor([rollout.actions for rollout in rollouts], device=prompts.device)
    ids = torch.cat((prompts, traces), 1)

    ours = scoring_side(model, ids, setting.actions, RULES, budget)
    peer = flat_side(model, ids, setting.actions)

    return ours, peer


def memory_of_rollouts(setting: Setting, share: float = 0.4, longer: int = 4) -> tuple[Side, Side]:
    """Rollouts of `longer` times the actions, `share` of them deletes, against such without that type as many tokens as
    are visible at once, at most, in any of those."""
    actions = longer * setting.actions
    prompts = models.prompts(setting.batch, setting.prompt).tolist()
    budget = Budget(answer=actions, actions=actions)
    deleting = Engine(models.make(setting.size, share, setting.prompt + actions), RULES, rows=setting.batch)

    def delete() -> list[Rollout]:  # the same each time
        return deleting.run(prompts, budget, generator=torch.Generator(models.DEVICE).manual_seed(0))

    rollouts = delete()
    expect_deletes(rollouts, share)
    longest = max(len(context) for rollout in rollouts for context in contexts(rollout.actions, RULES, budget))
    typing = Engine(models.make(setting.size, 0.0, setting.prompt + actions), RULES, rows=setting.batch)
    return lambda: len(delete()), lambda: len(typing.run(prompts, Budget(longest, deletes=0)))


def cost_of_deletes(setting: Setting, share: float = 0.3, batches: int = 4) -> tuple[Side, Side]:
    """Rollouts of which `share` of the actions are deletes, against rollouts without that type as many tokens, row by
    row, none of which is taken back: non-delete actions per second. There are more prompts than places, as in
    training."""
    prompts = models.prompts(batches * setting.batch, setting.prompt).tolist()
    budget = Budget(answer=setting.actions, actions=setting.actions)
    deleting = Engine(models.make(setting.size, share, setting.context), RULES, rows=setting.batch)
    typing = Engine(models.make(setting.size, 0.0, setting.context), RULES, rows=setting.batch)

    def ours() -> int:
        return sum(len(rollout.actions) - rollout.deletes for rollout in deleting.run(prompts, budget))

    rollouts = deleting.run(prompts, budget)
    expect_deletes(rollouts, share)
    typed = Until(lengths=tuple(len(rollout.actions) - rollout.deletes for rollout in rollouts))

    def peer() -> int:
        return sum(len(rollout.visible) for rollout in typing.run(prompts, Budget(setting.actions, deletes=0), typed))

    expect(abs(ours() / peer() - 1) < 0.05, "both sides type about as much")
    return ours, peer


def grouped_prompts(setting: Setting, group: int) -> Tensor:
    """As many rows as the batch has, `group` of each prompt; the prompts are as long as the setting's actions."""
    in_groups(setting, group)
    return models.prompts(setting.batch // group, setting.actions).repeat_interleave(group, 0)


def in_groups(setting: Setting, group: int) -> None:
    if setting.batch % group:
        raise UserError(f"--batch: got {setting.batch}; expected a multiple of {group}")


def shared_prompts(setting: Setting, group: int = 8) -> tuple[Side, Side]:
    """Groups of `group` answers to one prompt, four times as long as they are, against `model.generate`, which computes
    a prompt once for each of its answers. No deletes."""
    actions = max(1, setting.actions // 4)
    model = models.make(setting.size, 0.0, setting.actions + actions)
    prompts = grouped_prompts(setting, group)
    return typing_sides(model, prompts, actions, lambda: peers.generate(model, prompts, actions).numel())


def shared_scoring(setting: Setting, group: int = 8) -> tuple[Side, Side]:
    """Forward and backward over groups of `group` answers to one prompt, four times as long as they are, against each
    prompt and answer as a sequence of its own, as TRL scores them. No deletes."""
    actions = max(1, setting.actions // 4)
    model = models.make(setting.size, 0.0, setting.actions + actions)
    prompts = grouped_prompts(setting, group)
    ids = torch.cat((prompts, models.prompts(len(prompts), actions, seed=2)), 1)
    rules, budget = Rules({}, eos=frozenset()), Budget(actions)

    ours = scoring_side(model, ids, actions, rules, budget)
    peer = flat_side(model, ids, actions)

    expect_equal_gradients(model, ours, peer)
    return ours, peer


def adapted_scoring(setting: Setting) -> tuple[Side, Side]:
    """Forward and backward of a model with a LoRA adapter, as in training, against PEFT's own layers and TRL's flat
    sequences. No deletes, all prompts different."""
    model = models.adapt(models.make(setting.size, 0.0, setting.context), [models.DELETE])
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # else it changes nothing, and has no gradients but its own
            torch.nn.init.normal_(weight, std=0.02)
    ids = models.prompts(setting.batch, setting.context)
    rules, budget = Rules({}, eos=frozenset()), Budget(setting.actions)
    ours = scoring_side(model, ids, setting.actions, rules, budget)
    peer = flat_side(model, ids, setting.actions)

    expect_equal_gradients(model, ours, peer)
    return ours, peer


def expect_equal_gradients(model: Any, ours: Side, peer: Side, within: float = 1e-3) -> None:
    """Refuse to time two sides that do more or less, or leave different gradients in their model."""
    done, found = [], []
    for run in (ours, peer):
        done.append(run())
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    expect(done[0] == done[1], f"both sides learn as many tokens (got {done[0]} and {done[1]})")
    gaps = [(a - b).abs().max() / a.abs().max().clamp(1e-6, 1.0) for a, b in zip(*found, strict=True)]
    gap = torch.stack(gaps).max().item()  # nan where one of them is
    expect(gap < within, f"both sides have the same gradients (largest gap {gap:.1g})")


def grpo_step(setting: Setting, deletes: float, prompt: int, actions: int, group: int = 8) -> tuple[Side, Side]:
    """Whole steps of GRPO with deletes, against stock TRL's without: as many actions, prompts and generations."""
    steps = 2
    in_groups(setting, group)
    with tempfile.TemporaryDirectory() as folder:
        trainers = [
            peers.grpo_trainer(setting.size, setting.batch, prompt, actions, group, steps, share, ours, folder)
            for share, ours in ((deletes, True), (0.0, False))
        ]

    def side(trainer: Any) -> Side:
        def run() -> int:
            trainer.train()
            return steps * setting.batch * actions

        return run

    ours, peer = map(side, trainers)
    for run, trainer in zip((ours, peer), trainers, strict=True):
        run()
        length = trainer.state.log_history[-1]["completions/mean_length"]
        expect(length == actions, f"each answer takes {actions} actions (got {length})")
    expect_deletes(trainers[0]._rollouts, deletes)
    return ours, peer


def rollouts_with_deletes(
    setting: Setting, peer_of: Callable[[Any, list[int], int], list[int]], alone: int
) -> tuple[Side, Side]:
    """Against a loop over single sequences, `alone` of the prompts."""
    model = models.make(setting.size, setting.deletes, setting.context)
    prompts = models.prompts(setting.batch, setting.prompt).tolist()
    engine = Engine(model, RULES, rows=setting.batch)
    budget = Budget(answer=setting.actions, actions=setting.actions)

    def ours() -> int:
        return sum(len(rollout.actions) for rollout in engine.run(prompts, budget))

    def peer() -> int:
        return sum(len(peer_of(model, prompt, setting.actions)) for prompt in prompts[:alone])

    traces = [peer_of(model, prompt, setting.actions) for prompt in prompts[:alone]]
    expect({len(trace) for trace in traces} == {setting.actions}, "the loop takes as many actions")
    share = sum(trace.count(models.DELETE) for trace in traces) / sum(map(len, traces))
    expect(abs(share - setting.deletes) < 0.15, f"it deletes about as often (got {share:.0%} in {alone} traces)")
    expect_deletes(engine.run(prompts, budget), setting.deletes)
    return ours, peer


def packed_scoring(setting: Setting, apart: int = 4, chunk: int = 16) -> tuple[Side, Side]:
    """Forward and backward over all traces, against `apart` of them with every prefix a sequence of its own.

    On CPU the peer is fastest with 16 sequences to a forward pass, of 8, 16, 32, 64, 128 and 256.
    """
    model = models.make(setting.size, setting.deletes, setting.context)
    prompts = models.prompts(setting.batch, setting.prompt).tolist()
    budget = Budget(answer=setting.actions, actions=setting.actions)
    rollouts = Engine(model, RULES, rows=setting.batch).run(prompts, budget)
    traces = [rollout.actions for rollout in rollouts]
    ids = torch.tensor([prompt + trace for prompt, trace in zip(prompts, traces, strict=True)], device=models.DEVICE)
    real = torch.ones_like(ids)

    ours = scoring_side(model, ids, setting.actions, RULES, budget)

    def peer() -> int:
        model.zero_grad()
        return peers.score_prefixes(model, prompts[:apart], traces[:apart], chunk).numel()

    with torch.no_grad():
        packed, _ = score(model, pack(ids[:apart], real[:apart], setting.actions, RULES, budget))
        gap = (packed.flatten() - peers.score_prefixes(model, prompts[:apart], traces[:apart], chunk, grad=False)).abs()
    expect(gap.max().item() < 1e-4, f"both sides give the same log-probabilities (largest gap {gap.max().item():.1g})")
    return ours, peer


# groups of corrections from the sources that need no model
WARMUP = Warmup(group=8, clean=0.2, errors=2, late=5, sources={"random": 1.0, "early": 1.0})
WARMUP_RULES = Rules({models.DELETE: "token"}, eos=frozenset({models.EOS}), retry="ban")


def packed_warmup(
    setting: Setting, task: Callable[[], Task], budget: Budget, prompts: int = 24, steps: int = 4, chunk: int = 64
) -> tuple[Side, Side]:
    """Forward and backward of the warm-up's loss, against the same corrections as separate sequences.

    The work is the targets that are learned in `steps` batches of `prompts` groups; both sides lay them out
    themselves. On CPU the peer is fastest with 64 sequences to a forward pass, of 16, 32, 64, 128, 256 and 512.
    """
    model = models.make(setting.size, 0.0, context=256)
    policy = Policy(model, character_tokenizer(), WARMUP_RULES)
    dataset, _ = make_corrections(policy, task(), budget, WARMUP, steps * prompts, seed=0)
    batches = [[dataset[at] for at in range(first, first + prompts)] for first in range(0, len(dataset), prompts)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=models.DEVICE == "cpu", report_to=[])
        trainer = WarmupTrainer(policy, budget, arguments, dataset, callbacks=[])

    def ours() -> int:
        learned = 0
        for batch in batches:
            model.zero_grad()
            inputs = on_device(trainer.collate(batch))
            trainer.compute_loss(model, inputs).backward()
            learned += int(inputs["learn"].sum())
        return learned

    def apart(batch: list[list[Example]], grad: bool = True) -> Tensor:
        examples = [example for group in batch for example in group]
        each = (peers.branches(entry.prompt, correction, budget.most_actions) for entry, correction in examples)
        return peers.score_branches(model, [branch for one in each for branch in one], chunk, grad)

    def peer() -> int:
        learned = 0
        for batch in batches:
            model.zero_grad()
            learned += apart(batch).numel()
        return learned

    with torch.no_grad():
        inputs = on_device(trainer.collate(batches[0]))
        packed = pack(inputs["input_ids"], inputs["attention_mask"], inputs["learn"].shape[1], WARMUP_RULES, budget)
        together = score(model, replace(packed, actions=inputs["targets"]))[0][inputs["learn"].bool()]
        gap = (together.double().sum() - apart(batches[0], grad=False).double().sum()).abs().item()
    expect(gap < 1e-4, f"the log-probabilities of both sides have the same sum (gap {gap:.1g})")
    expect_equal_gradients(model, ours, peer, within=1e-4)
    return ours, peer


def large_vocabulary(setting: Setting, vocabulary: int = 50_257, draws: int = 10) -> tuple[Side, Side]:
    """One token for each row of the batch from a vocabulary such as GPT-2's, as `generate` draws it."""
    logits = 3 * torch.randn(setting.batch, vocabulary, generator=torch.Generator().manual_seed(0))
    logits, sampling = logits.to(models.DEVICE), Sampling()

    def side(drawn: Callable[[], Tensor]) -> Side:
        def run() -> int:
            with torch.inference_mode():
                return sum(drawn().numel() for _ in range(draws))

        return run

    return side(lambda: draw(logits.log_softmax(-1), sampling)), side(lambda: torch.multinomial(logits.softmax(-1), 1))


def start_up(setting: Setting) -> tuple[Side, Side]:
    """`train --dry-run`, which loads and checks everything, against a process that only imports what training needs."""
    imports = "import torch, peft; from transformers import AutoModelForCausalLM, Trainer; from trl import GRPOTrainer"

    def side(*arguments: str) -> Side:
        def run() -> int:
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
            return 1

        return run

    return side("-m", "rl_backspace", "train", "experiments/arith.yaml", "--dry-run"), side("-c", imports)


def on_device(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(models.DEVICE) for name, tensor in inputs.items()}


class Unfair(RuntimeError):
    """Two sides do not do the same."""


def expect(holds: bool, what: str) -> None:
    """Refuse to time two sides that do not do the same."""
    if not holds:
        raise Unfair(f"not a fair comparison; expected that {what}")


def expect_deletes(rollouts: Sequence[Rollout], share: float) -> None:
    pressed = sum(rollout.deletes for rollout in rollouts) / sum(len(rollout.actions) for rollout in rollouts)
    expect(abs(pressed - share) < 0.05, f"{share:.0%} of the actions are deletes (got {pressed:.0%})")


CASES = {
    "generate": Case("rollouts, no deletes", "model.generate", 1.5, rollouts_without_deletes),
    "adapted": Case(
        "rollouts, no deletes, LoRA", "model.generate", 1.5, partial(rollouts_without_deletes, adapted=True)
    ),
    "continuous": Case("rollouts, no deletes", "generate_batch", 1.5, continuous_batching),
    "skewed": Case("rollouts, skewed lengths", "model.generate", 3.0, skewed_rollouts),
    "continuous-skewed": Case(
        "rollouts, skewed lengths", "generate_batch", 1.5, partial(skewed_rollouts, continuous=True)
    ),
    "shared": Case("rollouts, 8 to a longer prompt", "model.generate", 1.5, shared_prompts),
    "deletes": Case("rollouts, 30 % deletes", "the same without", 0.95, cost_of_deletes),
    "recompute": Case(
        "rollouts, 20 % deletes",
        "loop that recomputes its context",
        100.0,
        partial(rollouts_with_deletes, peer_of=peers.recompute, alone=2),
    ),
    "crop": Case(
        "rollouts, 20 % deletes",
        "loop that crops its KV cache",
        20.0,
        partial(rollouts_with_deletes, peer_of=peers.crop, alone=4),
    ),
    "backtrack-sampler": Case(
        "rollouts, 20 % deletes",
        "backtrack_sampler",
        20.0,
        partial(rollouts_with_deletes, peer_of=peers.backtrack_sampler, alone=2),
    ),
    "vocabulary": Case("draws from 50,257 tokens", "softmax, torch.multinomial", 3.0, large_vocabulary),
    "shared-scoring": Case("scoring, 8 to a longer prompt", "each apart", 1.5, shared_scoring),
    "adapted-scoring": Case("scoring, no deletes, LoRA", "PEFT's layers, flat", 1.2, adapted_scoring),
    "grpo": Case(
        "GRPO step of 64 after 32, 20 % deletes",
        "TRL's, none",
        1.0,
        partial(grpo_step, deletes=0.2, prompt=32, actions=64),
    ),
    "grpo-shared": Case(
        "GRPO step of 32 after 64, 20 % deletes",
        "TRL's, none",
        1.5,
        partial(grpo_step, deletes=0.2, prompt=64, actions=32),
    ),
    "prefixes": Case("packed scoring, 20 % deletes", "every prefix apart", 10.0, packed_scoring),
    "scoring-memory": Case("scoring, 20 % deletes", "as many actions, flat", 1.2, memory_of_scoring, memory=True),
    "cache-memory": Case(
        "rollouts, 40 % deletes", "as many visible tokens, no deletes", 1.2, memory_of_rollouts, memory=True
    ),
    "start-up": Case("train --dry-run", "its imports alone", 0.75, start_up),
    "warmup": Case(
        "packed warm-up, signs", "separate sequences", 3.0, partial(packed_warmup, task=signs, budget=Budget(8, 24))
    ),
    "warmup-long": Case(
        "packed warm-up, countdown",
        "separate sequences",
        3.0,
        partial(packed_warmup, task=countdown, budget=Budget(20, 64)),
    ),
}
