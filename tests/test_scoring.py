from __future__ import annotations

import naive
import pytest
import torch
from conftest import DELETE, EOS, VOCAB, tiny

from rl_backspace import scoring
from rl_backspace.engine import Engine, Rollout, Sampling
from rl_backspace.errors import UserError
from rl_backspace.scoring import Packed, batched, pack, score
from rl_backspace.semantics import Budget, IllegalAction, Rules

WORDS = {DELETE: "token", DELETE - 1: 3, DELETE - 2: "answer"}
BUDGET = Budget(answer=8, actions=24, deletes=9)


def rules(memory: str, retry: str) -> Rules:
    return Rules(WORDS, frozenset([EOS]), memory, retry)  # type: ignore[arg-type]


def flat(rollouts: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """TRL's layout: prompts padded on the left, raw traces on the right."""
    before = max(len(r.prompt) for r in rollouts)
    steps = max(len(r.actions) for r in rollouts)
    ids = torch.zeros(len(rollouts), before + steps, dtype=torch.long)
    real = torch.zeros_like(ids)
    for i, r in enumerate(rollouts):
        ids[i, before - len(r.prompt) : before + len(r.actions)] = torch.tensor(r.prompt + r.actions)
        real[i, before - len(r.prompt) : before + len(r.actions)] = 1
    return ids, real, steps


def rolled(model: torch.nn.Module, played: Rules, count: int = 16, temperature: float = 0.7) -> list[Rollout]:
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, VOCAB - 3, (n,), generator=generator).tolist()
        for n in torch.randint(1, 7, (count,), generator=generator).tolist()
    ]
    with torch.no_grad():
        model.get_output_embeddings().weight[DELETE - 2 :] *= 3  # type: ignore[operator]
    rollouts = Engine(model, played).run(prompts, BUDGET, Sampling(temperature), generator)
    assert sum(r.deletes for r in rollouts) >= 8
    return rollouts


def per_prefix(model: torch.nn.Module, rollout: Rollout, played: Rules, temperature: float) -> torch.Tensor:
    """Each action scored alone, in its own context, with gradients."""
    slow, out = naive.Naive(played, BUDGET), []
    for action in rollout.actions:
        context = torch.tensor([[*rollout.prompt, *slow.context()]])
        logits = model(input_ids=context).logits[0, -1] / temperature
        forbidden = torch.zeros(VOCAB, dtype=torch.bool)
        forbidden[sorted(slow.forbidden())] = True
        out.append(logits.masked_fill(forbidden, -torch.inf).log_softmax(-1)[action])
        slow.press(action)
    return torch.stack(out)


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
@pytest.mark.parametrize("retry", ["free", "ban"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_logprobs_and_gradients_equal_per_prefix_ones(memory: str, retry: str, attention: str) -> None:
    model, played = tiny(attn_implementation=attention), rules(memory, retry)
    rollouts = rolled(model, played)
    weights = torch.rand(sum(len(r.actions) for r in rollouts), generator=torch.Generator().manual_seed(1))

    slow = torch.cat([per_prefix(model, r, played, 0.7) for r in rollouts])
    (slow * weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    ids, real, steps = flat(rollouts)
    logps, entropy = score(model, pack(ids, real, steps, played, BUDGET), 0.7, entropy=True)
    mask = real[:, -steps:].bool()
    torch.testing.assert_close(logps[mask], slow, atol=5e-5, rtol=1e-4)
    (logps[mask] * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=2e-3, rtol=1e-3, msg=name)
    assert entropy is not None and (entropy[mask] >= 0).all() and entropy.isfinite().all()


def test_families_score_as_they_sample(family: str) -> None:
    model = tiny(family, attn_implementation="eager")
    played = rules("erase", "ban")
    rollouts = rolled(model, played, temperature=1.0)
    ids, real, steps = flat(rollouts)
    logps, _ = score(model, pack(ids, real, steps, played, BUDGET))
    sampled = torch.cat([torch.tensor(r.logprobs) for r in rollouts])
    torch.testing.assert_close(logps[real[:, -steps:].bool()], sampled, atol=1e-4, rtol=1e-4)


def test_entropy_is_over_the_legal_actions() -> None:
    model, played = tiny(), rules("erase", "ban")
    rollouts = rolled(model, played, temperature=1.0)
    ids, real, steps = flat(rollouts)
    _, entropy = score(model, pack(ids, real, steps, played, BUDGET), entropy=True)
    assert entropy is not None
    slow = naive.Naive(played, BUDGET)
    for step, action in enumerate(rollouts[0].actions):
        legal = naive.logprobs(model, [*rollouts[0].prompt, *slow.context()], slow.forbidden())
        legal = legal[legal.isfinite()]
        assert entropy[0, step].item() == pytest.approx(-(legal.exp() * legal).sum().item(), abs=1e-4)
        slow.press(action)


def test_without_deletes_it_is_the_ordinary_causal_layout() -> None:
    """Same input, same positions, causal mask: a stock model would be fed the very same."""
    played = rules("erase", "free")
    ids = torch.tensor([[0, 0, 5, 6, 7, 8, 9, EOS], [4, 5, 6, 7, 8, EOS, 0, 0]])
    real = (ids != 0).long()
    packed = pack(ids, real, 4, played)
    fed = torch.tensor([[0, 0, 5, 6, 7, 8, 9], [4, 5, 6, 7, 8, 0, 0]])  # from an answer's last token nothing is chosen
    assert torch.equal(packed.input_ids, fed)
    causal = torch.ones(7, 7).tril().bool() & (fed != 0)[:, None, :]
    for row in range(2):
        keep = fed[row] != 0
        assert torch.equal(packed.allowed[row, 0][keep], causal[row][keep])
        assert packed.position_ids[row][keep].tolist() == list(range(int(keep.sum())))


def test_padding_changes_nothing() -> None:
    model, played = tiny(), rules("erase", "ban")
    rollouts = rolled(model, played)
    together = flat(rollouts)
    logps, _ = score(model, pack(*together, played, BUDGET))
    for i, rollout in enumerate(rollouts):
        alone, _ = score(model, pack(*flat([rollout]), played, BUDGET))
        torch.testing.assert_close(logps[i, : len(rollout.actions)], alone[0], atol=2e-5, rtol=1e-4)


def test_traces_of_a_prompt_share_it_and_do_not_see_each_other() -> None:
    """Sixteen samples of three prompts, in any order: three rows, the same numbers as each alone."""
    model, played = tiny(), rules("erase", "ban")
    with torch.no_grad():
        model.get_output_embeddings().weight[DELETE - 2 :] *= 2
    prompts = [[5, 6, 7], [8], [5, 6, 7, 9]] * 5 + [[8]]
    rollouts = Engine(model, played).run(prompts, BUDGET, generator=torch.Generator().manual_seed(0))
    ids, real, steps = flat(rollouts)
    packed = pack(ids, real, steps, played, BUDGET)
    assert len(packed.input_ids) == 3
    assert packed.input_ids.numel() < ids.numel()
    logps, _ = score(model, packed)
    sampled = torch.cat([torch.tensor(r.logprobs) for r in rollouts])
    torch.testing.assert_close(logps[real[:, -steps:].bool()], sampled, atol=5e-5, rtol=1e-4)


def test_a_row_is_full_at_some_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SHARED_SLOTS", 8)
    model, played = tiny(), rules("keep", "free")
    rollouts = Engine(model, played).run([[5, 6]] * 9, BUDGET, generator=torch.Generator().manual_seed(0))
    ids, real, steps = flat(rollouts)
    packed = pack(ids, real, steps, played, BUDGET)
    assert 1 < len(packed.input_ids) <= 9
    logps, _ = score(model, packed)
    sampled = torch.cat([torch.tensor(r.logprobs) for r in rollouts])
    torch.testing.assert_close(logps[real[:, -steps:].bool()], sampled, atol=5e-5, rtol=1e-4)


def test_a_delete_takes_no_slot_and_no_context_is_fed_twice() -> None:
    played = rules("erase", "free")
    ids = torch.tensor([[5, 6, 7, DELETE, 8, DELETE, 9, EOS], [5, 6, 7, 3, 4, 4, 4, EOS]])
    packed: Packed = pack(ids, torch.ones_like(ids), 6, played)
    # the prompt, then 7 8 9 of the first trace and 3 4 4 4 of the second, which shares the 7
    assert packed.input_ids.tolist() == [[5, 6, 7, 8, 9, 3, 4, 4, 4]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 2, 2, 3, 4, 5, 6]]
    assert packed.allowed[0, 0, 4].tolist() == [True, True, False, False, True] + [False] * 4
    assert packed.allowed[0, 0, 6].tolist() == [True, True, True, False, False, True, True, False, False]


def test_never_more_slots_than_one_row_a_trace() -> None:
    """One prompt with many traces among many with one: rows stay as short as the longest trace."""
    played = rules("erase", "free")
    generator = torch.Generator().manual_seed(0)
    prompts = [[3, 4, 5]] * 6 + [[6, 7, 3 + i] for i in range(20)]
    traces = torch.randint(3, 20, (26, 40), generator=generator)
    ids = torch.cat([torch.tensor(prompts), traces], dim=1)
    packed = pack(ids, torch.ones_like(ids), 40, played)
    assert packed.input_ids.numel() <= ids.numel()


def test_masked_out_traces_are_left_out() -> None:
    """As TRL's mask_truncated_completions does it: the mask of a whole trace is zero."""
    played = rules("erase", "free")
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 9, 9]])
    real = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    logps, entropy = score(tiny(), pack(ids, real, 2, played), entropy=True)
    assert logps.shape == (2, 2) and logps.isfinite().all() and entropy is not None


def test_no_traces_too_few_columns_and_greedy_are_refused() -> None:
    ids, real = batched([[5, 6]], [[7, 8]], 0)
    rules = Rules({DELETE: "token"}, frozenset([EOS]))
    with pytest.raises(UserError, match="expected rows of at least that many columns"):
        pack(*batched([], [], 0), 0, rules)
    with pytest.raises(UserError, match=r"got ids \(1, 4\) and 5 steps"):
        pack(ids, real, 5, rules)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"temperature: got .*; expected more than 0"):
            score(tiny(), pack(ids, real, 2, rules), temperature)


def test_illegal_traces_are_refused() -> None:
    ids = torch.tensor([[5, 6, DELETE, 8]])
    with pytest.raises(IllegalAction):
        pack(ids, torch.ones_like(ids), 2, rules("erase", "free"))


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_the_divergence_of_what_is_typed_equals_one_context_at_a_time(memory: str) -> None:
    """Against two models' distributions without deletes, over each distinct context that holds none."""
    model, reference, played = tiny(), tiny(seed=1), rules(memory, "ban")
    rollouts = rolled(model, played)
    expected = {}
    for rollout in rollouts:
        slow = naive.Naive(played, BUDGET)
        for action in rollout.actions:
            context = (*rollout.prompt, *slow.context())
            if not set(slow.context()) & set(WORDS):
                ours, theirs = (naive.logprobs(m, context, set(WORDS)) for m in (model, reference))
                # as often as scoring has it: once for each set of tokens that were illegal there
                key = (*context, frozenset(slow.forbidden()))
                expected[key] = sum(b.exp() * (b - a) for a, b in zip(ours, theirs, strict=True) if b.isfinite()).item()
            slow.press(action)
    ids, real, steps = flat(rollouts)
    packed = pack(ids, real, steps, played, BUDGET)
    logits, other = (scoring.packed_logits(m, packed) for m in (model, reference))
    divergence = scoring.typing_divergence(logits, other.detach(), packed, list(WORDS))
    assert divergence.item() == pytest.approx(sum(expected.values()) / len(expected), rel=1e-3)
    divergence.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert scoring.typing_divergence(logits, logits, packed, list(WORDS)).item() == pytest.approx(0, abs=1e-6)
    nudged = logits.detach().clone()
    nudged[..., list(WORDS)] += 5  # deletes are left out
    assert scoring.typing_divergence(nudged, logits, packed, list(WORDS)).item() == pytest.approx(0, abs=1e-6)
    banned, free = logits.detach().clone(), other.detach().clone().requires_grad_()
    banned[..., 3] = -torch.inf  # in both, as a model bans a token
    divergence = scoring.typing_divergence(
        free.index_fill(-1, torch.tensor([3]), -torch.inf), banned, packed, list(WORDS)
    )
    divergence.backward()
    assert 0 < divergence.item() < torch.inf and free.grad.isfinite().all()
