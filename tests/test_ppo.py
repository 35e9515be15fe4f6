from __future__ import annotations

import inspect
import math
import random
from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from test_trainer import ANSWER, BF16_GAP, config, dataset, deleter, task
from trl import GRPOTrainer

from rl_backspace.backbone import causal_lm
from rl_backspace.config import PPO, Reward
from rl_backspace.engine import GREEDY, Engine, Rollout
from rl_backspace.policy import Critic, Policy, load
from rl_backspace.ppo import BackspacePPOTrainer, action_rewards, explained_variance, gae, value_loss
from rl_backspace.semantics import Budget, contexts
from rl_backspace.terms import make_term

__all__ = ["deleter"]  # a fixture
BUDGET = Budget(ANSWER, 20)
PRICE = 0.3


def low(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token < 64 for token in ids) / (1 + len(ids)) for ids in completion_ids]


def price(actions: list[list[int]], rules: Any, **_: Any) -> list[list[float]]:
    return [[-PRICE * (action in rules.deletes) for action in trace] for trace in actions]


def trainer_of(
    policy: Policy, folder: Path, ppo: PPO = PPO(), functions: tuple[Any, ...] = (low, price), **fields: Any
) -> BackspacePPOTrainer:
    """One whose first term weighs 1 and whose second 0.5."""
    rows = task()
    terms = [make_term(f.__name__, f, Reward(fn=f.__name__), {"rules": policy.rules}) for f in functions]
    args = config(folder, **{"loss_type": "bnpo", "reward_weights": [1.0, 0.5][: len(terms)], **fields})
    return BackspacePPOTrainer(policy, rows, BUDGET, terms, args, dataset(rows.train), ppo=ppo)


def every_other(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [value if i % 2 else None for i, value in enumerate(low(completion_ids))]


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.1] * len(completions)


def opinionated(policy: Policy) -> Critic:
    """A critic that says something."""
    policy.critic = Critic.like(policy.model)
    with torch.no_grad():
        policy.critic.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        policy.critic.bias.fill_(0.3)
    return policy.critic


def rewards_of(rollout: Rollout, policy: Policy) -> list[float]:
    """What `low` and `price` give, action by action, told once more."""
    given = [-0.5 * PRICE if action in policy.rules.deletes else 0.0 for action in rollout.actions]
    given[-1] += sum(token < 64 for token in rollout.visible) / (1 + len(rollout.visible))
    return given


def by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Advantages as the paper sums them (GAE, eq. 16), with no recursion."""
    n = len(rewards)
    delta = [rewards[t] + gamma * (values[t + 1] if t + 1 < n else 0.0) - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (u - t) * delta[u] for u in range(t, n)) for t in range(n)]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (0.99, 0.0), (0.0, 1.0)])
def test_gae_is_the_papers_sum(gamma: float, lam: float) -> None:
    rng = random.Random(0)
    lengths = [1, 7, 3, 5]
    rows = [([rng.gauss(0, 1) for _ in range(n)], [rng.gauss(0, 1) for _ in range(n)]) for n in lengths]

    def pad(values: list[float]) -> list[float]:
        return values + [0.0] * (7 - len(values))

    rewards, values = (torch.tensor([pad(row[i]) for row in rows], dtype=torch.double) for i in (0, 1))
    mask = torch.tensor([pad([1.0] * n) for n in lengths])
    expected = [pad(by_definition(*row, gamma, lam)) for row in rows]
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam), torch.tensor(expected, dtype=torch.double))


def test_with_lambda_1_an_advantage_is_what_is_still_to_come_less_the_value() -> None:
    rewards, values = torch.tensor([[0.0, -1.0, 0.0, 2.0]]), torch.tensor([[0.5, 0.1, 7.0, -3.0]])
    got = gae(rewards, values, torch.ones(1, 4), 1.0, 1.0)
    torch.testing.assert_close(got, torch.tensor([[1.0, 1.0, 2.0, 2.0]]) - values)


def test_a_number_stands_at_the_last_action_and_a_list_where_it_says() -> None:
    assert action_rewards([2.0, [0.0, -1.0, 0.0], None], [1.0, 0.5, 9.0], 3) == [0.0, -0.5, 2.0]
    assert action_rewards([None], [1.0], 2) == [0.0, 0.0]


@pytest.mark.parametrize("cliprange", [None, 0.2])
def test_the_value_loss_action_by_action(cliprange: float | None) -> None:
    rng = random.Random(1)
    values, old, returns = (torch.tensor([[rng.gauss(0, 1) for _ in range(4)] for _ in range(3)]) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    total, clipped = 0.0, 0
    for v, o, r, m in zip(values.flatten(), old.flatten(), returns.flatten(), mask.flatten(), strict=True):
        if not m:
            continue
        errors = [float(v - r) ** 2]
        if cliprange is not None:
            errors.append(float(min(max(v, o - cliprange), o + cliprange) - r) ** 2)
            clipped += errors[1] > errors[0]
        total += max(errors)
    loss, share = value_loss(values, old, returns, mask, cliprange, torch.tensor(10.0))
    assert loss.item() == pytest.approx(0.5 * total / 10)
    assert share.item() == pytest.approx(clipped / 7)


def parameters(policy: Policy) -> dict[str, torch.Tensor]:
    return {n: p for n, p in policy.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_with_lambda_1_and_no_values_the_gradient_is_that_of_reinforce(
    deleter: Policy, tmp_path: Path, memory: Any
) -> None:
    """One step of SGD against the sum of (reward still to come) x grad log pi, each context recomputed alone."""
    deleter.rules = type(deleter.rules)(deleter.rules.deletes, deleter.rules.eos, memory, "ban")
    seen: list[Rollout] = []
    fields = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_steps": 1, "max_grad_norm": 0}
    fields["per_device_train_batch_size"] = 16
    ppo = PPO(lam=1.0, vf_coef=0.0, whiten=False)
    trainer = trainer_of(deleter, tmp_path, ppo, **fields)
    trainer.on_rollouts = lambda rollouts, *_: seen.extend(rollouts)
    before = {name: p.detach().clone() for name, p in parameters(deleter).items()}
    trainer.train()
    after = {name: p.detach().clone() for name, p in parameters(deleter).items()}
    assert sum(rollout.deletes for rollout in seen) > 5

    with torch.no_grad():
        for name, p in parameters(deleter).items():
            p.copy_(before[name])
    deleter.model.zero_grad()
    objective: Any = 0.0
    for rollout in seen:
        to_come = by_definition(rewards_of(rollout, deleter), [0.0] * len(rollout.actions), 1.0, 1.0)
        press = naive.Naive(deleter.rules, BUDGET)
        for action, weight in zip(rollout.actions, to_come, strict=True):
            ids = torch.tensor([[*rollout.prompt, *press.context()]])
            logits = deleter.model(input_ids=ids).logits[0, -1].float()
            forbidden = torch.zeros_like(logits).index_fill(0, torch.tensor(sorted(press.forbidden()), dtype=int), -1e9)
            objective = objective + weight * (logits + forbidden).log_softmax(-1)[action]
            press.press(action)
    (-objective / sum(len(rollout.actions) for rollout in seen)).backward()
    for name, p in parameters(deleter).items():
        assert p.grad is not None
        torch.testing.assert_close(before[name] - after[name], p.grad, atol=2e-5, rtol=1e-3, msg=name)


def test_the_loss_is_the_papers_action_by_action(deleter: Policy, tmp_path: Path) -> None:
    """A later pass over old rollouts: ratios are clipped, values are clipped, nothing comes from the package."""
    critic = opinionated(deleter)
    ppo = PPO(gamma=0.9, lam=0.7, vf_coef=0.3, cliprange_value=0.05)
    trainer = trainer_of(deleter, tmp_path, ppo, max_steps=1)
    seen: list[Rollout] = []
    trainer.on_rollouts = lambda rollouts, *_: seen.extend(rollouts)
    inputs = [{"prompt": row["prompt"], "row": i} for i, row in enumerate(task().train[:4]) for _ in range(2)]
    trainer.model.train()
    batch = trainer._generate_and_score_completions(inputs)
    noise = torch.Generator().manual_seed(0)
    old = batch["sampling_per_token_logps"] + 0.3 * torch.randn(batch["completion_ids"].shape, generator=noise)
    batch["old_per_token_logps"] = old
    batch["values"] = batch["values"] + 0.1 * torch.randn(old.shape, generator=noise)  # of an older critic
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, batch)

    body = causal_lm(deleter.model).base_model
    rows, advantages = [], []
    for i, rollout in enumerate(seen):
        values = rollout.values
        hidden = [
            body(input_ids=torch.tensor([[*rollout.prompt, *context]])).last_hidden_state[0, -1]
            for context in contexts(rollout.actions, deleter.rules, BUDGET)
        ]
        now = [(critic.weight[0] @ h + critic.bias[0]).item() for h in hidden]
        assert values == pytest.approx(now, abs=1e-5)  # what the engine recorded on its way
        advantage = by_definition(rewards_of(rollout, deleter), values, 0.9, 0.7)
        returns = [a + v for a, v in zip(advantage, values, strict=True)]
        advantages += advantage
        for t in range(len(rollout.actions)):
            rows.append((rollout.logprobs[t] - float(old[i, t]), now[t], float(batch["values"][i, t]), returns[t]))
    mean = sum(advantages) / len(advantages)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in advantages) / len(advantages))
    policy_loss = value = 0.0
    clipped = [0, 0]
    for (log_ratio, now_, old_, return_), advantage_ in zip(rows, advantages, strict=True):
        ratio, scaled = math.exp(log_ratio), (advantage_ - mean) / (deviation + 1e-4)
        bounded = min(max(ratio, 0.8), 1.2)
        policy_loss -= min(ratio * scaled, bounded * scaled)
        near = min(max(now_, old_ - 0.05), old_ + 0.05)
        value += 0.5 * max((now_ - return_) ** 2, (near - return_) ** 2)
        clipped = [clipped[0] + (bounded != ratio), clipped[1] + (near != now_)]
    assert min(clipped) > 3
    assert loss.item() == pytest.approx((policy_loss + 0.3 * value) / len(rows), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("whiten", [True, False])
def test_an_unscorable_rollout_teaches_nothing(deleter: Policy, tmp_path: Path, whiten: bool) -> None:
    """Neither the policy nor the critic, nor what the others are compared with."""
    opinionated(deleter)
    trainer = trainer_of(deleter, tmp_path, PPO(whiten=whiten), (every_other,), max_steps=1)
    batch = generated(trainer)
    silent, heard = batch["advantages"][::2], batch["advantages"][1::2]
    assert not silent.any() and heard.any(1).all() and not batch["known"][::2].any()
    mask = batch["completion_mask"][1::2].bool()
    assert torch.equal(batch["known"][1::2].bool(), mask)
    if whiten:
        assert heard[mask].mean().item() == pytest.approx(0, abs=1e-5)
        assert heard[mask].std(correction=0).item() == pytest.approx(1, abs=1e-2)


def generated(trainer: BackspacePPOTrainer) -> dict[str, Any]:
    inputs = [{"prompt": row["prompt"], "row": i} for i, row in enumerate(task().train[:4]) for _ in range(2)]
    trainer.model.train()
    return trainer._generate_and_score_completions(inputs)


def test_advantages_that_are_all_the_same_stay_small(deleter: Policy, tmp_path: Path) -> None:
    """Rounding is not blown up to a deviation of 1."""
    trainer = trainer_of(deleter, tmp_path, PPO(lam=1.0), (constant,), max_steps=1)
    assert generated(trainer)["advantages"].abs().max() < 0.1


def test_micro_batches_teach_the_critic_what_one_batch_does(deleter: Policy, tmp_path: Path) -> None:
    ends = []
    weights = {name: p.detach().clone() for name, p in deleter.model.state_dict().items()}
    for size, accumulated in ((16, 1), (4, 4)):
        deleter.model.load_state_dict(weights)
        deleter.critic = None
        fields = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, "max_steps": 1}
        fields |= {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "loss_type": "dapo"}
        trainer_of(deleter, tmp_path, PPO(vf_coef=1.0), **fields).train()
        ends.append(deleter.critic.weight.detach().clone())  # type: ignore[attr-defined]
    assert ends[0].any()
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-3, atol=1e-7)


def test_explained_variance() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 0.0, 9.0]]), torch.tensor([[1, 1, 0], [1, 1, 0]])
    assert explained_variance(returns, returns, mask).item() == 1
    assert explained_variance(torch.zeros(2, 3), returns, mask).item() == 0
    off = torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    assert explained_variance(returns + off, returns, mask).item() == pytest.approx(1 - 1 / 1.25)
    assert explained_variance(returns, torch.ones(2, 3), mask).item() == 0  # nothing to know


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gradient_accumulation_steps": 2, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 8},
        {"bf16": True, "use_cpu": True},
        {"gradient_checkpointing": True},
        {"beta": 0.1},
    ],
)
def test_it_trains_policy_and_critic_and_scores_what_it_sampled(
    deleter: Policy, tmp_path: Path, fields: dict[str, Any]
) -> None:
    trainer = trainer_of(deleter, tmp_path, **{"max_steps": 3, **fields})
    before = {name: p.detach().clone() for name, p in parameters(deleter).items()}
    trainer.train()
    after = parameters(deleter)
    assert not any("critic" in name for name in after)  # it is beside the model again
    assert deleter.critic is not None and deleter.critic.weight.any()
    for kind in ("lora", "trainable_tokens"):
        assert any(not torch.equal(p, before[name]) for name, p in after.items() if kind in name)
    assert trainer.deletes > 10 and trainer.logp_gap_max < (BF16_GAP if fields.get("bf16") else 1e-4)
    logged = trainer.state.log_history[0]
    for key in ("value_loss", "value_clipped", "explained_variance", "rewards/price/mean", "reward", "logp_gap_max"):
        assert isinstance(logged[key], float)


def test_the_critic_is_saved_and_resumed_with_the_policy(deleter: Policy, tmp_path: Path) -> None:
    opinionated(deleter)
    deleter.save(tmp_path / "adapter")
    again = load(tmp_path / "adapter", trainable=True)
    assert again.critic is not None and deleter.critic is not None
    assert torch.equal(again.critic.weight, deleter.critic.weight)
    prompts = again.encode([row["prompt"] for row in task().train[:3]])
    both = (
        [r.values for r in Engine(p.model, p.rules, critic=p.critic).run(prompts, BUDGET, GREEDY)]
        for p in (deleter, again)
    )
    for ours, theirs in zip(*both, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5) and any(ours)


def test_a_checkpoint_holds_the_critic(deleter: Policy, tmp_path: Path) -> None:
    """Trainer checkpoints have it too, and give it back."""
    trainer = trainer_of(deleter, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    trainer.train()
    saved = Critic.like(deleter.model)
    saved.restore(tmp_path / "checkpoint-1")
    assert deleter.critic is not None
    assert saved.weight.any() and not torch.equal(saved.weight, deleter.critic.weight)
    trainer = trainer_of(deleter, tmp_path, max_steps=2)
    trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))
    assert torch.equal(deleter.critic.weight, saved.weight)


def test_seams_of_trl_that_only_ppo_uses() -> None:
    assert list(inspect.signature(GRPOTrainer._generate_and_score_completions).parameters) == ["self", "inputs"]
    assert "subclasses that" in inspect.getsource(GRPOTrainer._compute_loss)  # takes advantages (B, T)
    assert list(inspect.signature(GRPOTrainer._save).parameters) == ["self", "output_dir", "state_dict"]
    assert list(inspect.signature(GRPOTrainer._load_from_checkpoint).parameters) == [
        "self",
        "resume_from_checkpoint",
        "model",
    ]
