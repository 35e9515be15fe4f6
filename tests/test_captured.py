"""Replayed decode steps are those that were captured; on a GPU, and as far as that goes without one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import DELETE, EOS, FAMILIES, VOCAB, tiny
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rl_backspace import backbone, captured, fused, policy
from rl_backspace.backbone import Backbone, PointerCache, causal_lm
from rl_backspace.captured import FEWER, Captured, can_capture
from rl_backspace.config import Lora
from rl_backspace.engine import Engine, Rollout, Sampling
from rl_backspace.fused import Fused
from rl_backspace.scoring import batched, pack, score
from rl_backspace.semantics import Budget, Rules

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
RULES, BUDGET = Rules({DELETE: "token"}, eos=frozenset({EOS}), retry="ban"), Budget(answer=20, actions=40)
PROMPTS = [[3 + i % 5, 9, *range(5, 5 + i % 7)] for i in range(24)]


def rollouts(model: Any, sampling: Sampling = Sampling(), rows: int = 8) -> list[Rollout]:
    """Of more prompts than rows, so that rows come and go, and at the end few are left."""
    generator = torch.Generator(model.device).manual_seed(0)
    return Engine(model, RULES, rows=rows).run(PROMPTS, BUDGET, sampling, generator)


class Replayed:
    """A graph that runs on the CPU: what was captured, run again into the same result."""

    def __init__(self, captured: Captured, rows: int, cache: Any):
        self.step = lambda: captured.network.decode(captured.ids[:rows], captured.pointers[:rows], cache)
        self.hidden = torch.empty(0)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        hidden = self.step()
        self.hidden.resize_as_(hidden).copy_(hidden)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Replayed]]:
    """Rows, length and graph of all that was captured, on the CPU and without streams."""
    made: list[tuple[int, int, Replayed]] = []

    def capture(self: Captured, rows: int, cache: Any) -> tuple[Any, torch.Tensor]:
        graph = Replayed(self, rows, cache)
        made.append((rows, cache.length, graph))
        return graph, graph.hidden

    def feed(self: Captured, rows: int, cache: Any) -> torch.Tensor:
        return self.network.decode(self.ids[:rows], self.pointers[:rows], cache)

    monkeypatch.setattr(Captured, "_capture", capture)
    monkeypatch.setattr(Captured, "_feed", feed)
    monkeypatch.setattr(backbone, "can_capture", lambda causal, settled: True)
    return made


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX"])  # written out, and by its own forward
def test_rollouts_are_the_same(family: str, request: pytest.FixtureRequest) -> None:
    model = tiny(family)
    plain = rollouts(model)
    made = request.getfixturevalue("graphs")
    replayed = rollouts(model)
    assert [r.actions for r in replayed] == [r.actions for r in plain]
    for ours, theirs in zip(replayed, plain, strict=True):
        assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-4)
    assert sum(r.deletes for r in plain) > 5
    assert {rows for rows, _, _ in made} == {8, 8 // FEWER}  # few rows are not fed as many
    assert len(made) == len({(rows, length) for rows, length, _ in made})  # each shape once
    assert sum(graph.replays for _, _, graph in made) > 50


def test_a_free_row_is_fed_where_it_does_no_harm(graphs: list[Any]) -> None:
    """Rows that have gone are fed too; a prompt that moves in later finds nothing of it."""
    model = tiny()
    few = Engine(model, RULES, rows=16).run(PROMPTS, BUDGET, Sampling(temperature=0))
    alone = [Engine(model, RULES, rows=1).run([p], BUDGET, Sampling(temperature=0))[0] for p in PROMPTS]
    assert [r.actions for r in few] == [r.actions for r in alone]


class Waits(TorchDispatchMode):
    """Notes the operations for which the CPU would wait for a GPU, and copies from one to the other."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        out = func(*args, **(kwargs or {}))
        devices = {part.device for part in tree_leaves((args, kwargs, out)) if isinstance(part, torch.Tensor)}
        waits = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2")
        if name in waits or (len(devices) > 1 and name in ("copy_", "_to_copy")):
            self.found.append(name)
        return out


@torch.no_grad()
def waits(model: Any, settle: bool = True, written_out: bool = False) -> list[str]:
    """What a decode step would wait for, on a device that is not the CPU and computes nothing."""
    _, prefilled = Backbone(model).prefill(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    model = model.to("meta")
    for layer in prefilled.layers:
        layer.keys, layer.values = layer.keys.to("meta"), layer.values.to("meta")
    network: Any = Backbone(model).for_a_run() if settle else Backbone(model)
    if written_out:
        layers = network.body.layers
        laid_out = [fused._lay_out(layer, layers[0].self_attn) for layer in layers]
        put_in = [settled.put_in for settled in network.settled.values()]
        network = Fused(network.causal, laid_out, 20, next(iter(put_in), network.body.embed_tokens))
    cache = PointerCache(prefilled, 2, 20)
    cache.reserve(4)
    ids, pointers = torch.zeros(2, 2, dtype=torch.long, device="meta")
    with Waits() as found:
        network.decode(ids, pointers, cache)
    return found.found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", captured.FAMILIES)
def test_steps_that_may_be_captured_wait_for_nothing(
    family: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (family, attention) == ("Gemma2", "sdpa"):
        pytest.skip("it has no sdpa")
    monkeypatch.setattr(backbone, "FAST_ON", None)  # as on a GPU
    for adapted in (False, True):
        for written_out in (False, True)[: 1 + (fused.name_of(tiny(family).base_model) in fused.FAMILIES)]:
            model: Any = tiny(family, attn_implementation=attention)
            model = policy._adapt(model, Lora(), [DELETE]).eval() if adapted else model  # as in training
            now = Backbone(model).for_a_run()
            assert bool(now.settled) == adapted and captured.never_waits(now.causal, now.settled)
            assert waits(model, written_out=written_out) == []


def test_a_step_that_waits_is_not_captured() -> None:
    model = tiny(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
    assert not captured.never_waits(model)
    with pytest.raises(RuntimeError, match="meta"):
        waits(model)
    model = tiny("Gemma3Text")
    assert captured.never_waits(model)
    for part in model.config.rope_parameters.values():  # by layer type
        part["rope_type"] = "dynamic"
    assert not captured.never_waits(model)
    model = policy._adapt(tiny(), Lora(), [DELETE]).eval()
    assert not captured.never_waits(causal_lm(model))  # its rows come from the CPU at each step
    with model.disable_adapter():
        assert captured.never_waits(causal_lm(model))
    assert waits(model, settle=False) != []
    positions: Any = get_peft_model(tiny("GPT2"), LoraConfig(trainable_token_indices={"wpe": [3]})).eval()
    positions.get_base_model().transformer.wpe.token_adapter.forward = lambda x: x  # by somebody else
    now = Backbone(positions).for_a_run()
    assert not now.settled and not captured.never_waits(now.causal, now.settled)


def test_what_is_not_known_is_not_captured() -> None:
    assert not can_capture(tiny(), ())  # on no GPU
    model = tiny()
    model.base_model.layers[0].mlp.act_fn = type("Own", (torch.nn.Module,), {"forward": lambda self, x: x})()
    assert not captured.never_waits(model)
    assert not captured.never_waits(tiny("Cohere"))
    model = tiny("GPTNeoX")
    assert captured.never_waits(model)
    hook = model.base_model.layers[0].register_forward_hook(lambda *_: None)
    assert not captured.never_waits(model)
    hook.remove()
    assert captured.never_waits(model)
    model.base_model.layers[0].mlp.dense_h_to_4h.weight = type("Quantised", (torch.nn.Parameter,), {})(torch.ones(2, 2))
    assert not captured.never_waits(model)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_what_cannot_be_captured_is_fed(
    error: type[RuntimeError], graphs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tried = tiny(), []

    def fail(self: Captured, rows: int, cache: Any) -> Any:
        tried.append(rows)
        raise error("no")

    expected = [r.actions for r in rollouts(model, Sampling(temperature=0))]
    count = len(graphs)
    monkeypatch.setattr(Captured, "_capture", fail)
    for _ in range(2):
        assert [r.actions for r in rollouts(model, Sampling(temperature=0))] == expected
    assert count == len(graphs) > 0
    tries_again = error is torch.OutOfMemoryError  # there may be more room for the next rollouts
    assert len(tried) == 1 + tries_again and (model in captured.uncaptured) != tries_again


def test_of_rollouts_that_take_turns_one_has_graphs(graphs: list[Any]) -> None:
    model, inner = tiny(), tiny(seed=1)
    alone = [[r.actions for r in rollouts(m, Sampling(temperature=0))] for m in (model, inner)]
    calls: list[list[list[int]]] = []

    def within(index: int, action: int) -> None:
        (outer,) = [it for one in captured._last if (it := one()) is not None and it.causal is model] or [None]
        if outer is not None and outer.graphs.get(8) and len(calls) < 3:
            calls.append([r.actions for r in rollouts(inner, Sampling(temperature=0))])
            assert not outer.graphs

    engine = Engine(model, RULES, rows=8)
    done = engine.run(PROMPTS, BUDGET, Sampling(temperature=0), on_action=within)
    assert [r.actions for r in done] == alone[0] and calls == [alone[1]] * 3


@needs_gpu
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_log_probs_are_those_that_scoring_finds(family: str, adapted: bool) -> None:
    model: Any = tiny(family).cuda()
    if adapted:
        model = policy._adapt(model, Lora(), [DELETE]).eval()
    done = rollouts(model)
    assert sum(r.deletes for r in done) > 0
    ids, real = (part.cuda() for part in batched([r.prompt for r in done], [r.actions for r in done], 0))
    steps = max(len(r.actions) for r in done)
    with torch.no_grad():
        scored, _ = score(model, pack(ids, real, steps, RULES, BUDGET))
    for row, rollout in zip(scored, done, strict=True):
        found = torch.tensor(rollout.logprobs, device="cuda")
        assert torch.allclose(row[: len(found)], found, atol=1e-3), family


@needs_gpu
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_steps_are_captured(dtype: torch.dtype, adapted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, replays = tiny().to("cuda", dtype), []
    if adapted:
        model = policy._adapt(model, Lora(), [DELETE]).eval()
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    done = rollouts(model)
    assert len(replays) > 50
    held = torch.cuda.memory_reserved()
    for _ in range(20):
        rollouts(model)
    assert torch.cuda.memory_reserved() == held  # what graphs take is used again
    assert len(done) == len(PROMPTS)


@needs_gpu
def test_on_a_gpu_a_changed_model_is_not_a_stale_graph() -> None:
    model = tiny().cuda()
    before = [r.actions for r in rollouts(model, Sampling(temperature=0))]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(-0.7)
    after = [r.actions for r in rollouts(model, Sampling(temperature=0))]
    model.cpu()
    assert before != after == [r.actions for r in rollouts(model, Sampling(temperature=0))]


@needs_gpu
def test_on_a_gpu_threads_do_not_see_each_others_steps() -> None:
    models = [tiny(seed=seed).cuda() for seed in range(2)]
    alone = [[r.actions for r in rollouts(model, Sampling(temperature=0))] for model in models]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(5):
            together = list(pool.map(lambda model: rollouts(model, Sampling(temperature=0)), models))
            assert [[r.actions for r in done] for done in together] == alone


@needs_gpu
def test_on_a_gpu_a_failed_capture_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("GPTNeoX").cuda()
    expected = [r.actions for r in rollouts(model, Sampling(temperature=0))]
    other = tiny("GPTNeoX").cuda()
    layer = type(other.base_model.layers[0])
    forward = layer.forward

    def waits(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert hidden.isfinite().all().item()
        return forward(self, hidden, *args, **kwargs)

    monkeypatch.setattr(layer, "forward", waits)
    assert [r.actions for r in rollouts(other, Sampling(temperature=0))] == expected
    assert not can_capture(other, ())
    assert [r.actions for r in rollouts(other, Sampling(temperature=0))] == expected
    torch.rand(1, device="cuda")
    torch.cuda.empty_cache()
    third = tiny("GPT2").cuda()
    rollouts(third)
    assert can_capture(third, ())


@needs_gpu
def test_on_a_gpu_joined_adapters_have_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr("rl_backspace.fused.MOST_WEIGHTS", {})
        torch.manual_seed(0)
        model: Any = get_peft_model(tiny().cuda(), LoraConfig(r=4, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
        ids = torch.randint(3, VOCAB - 1, (16, 30), generator=torch.Generator().manual_seed(0)).cuda()
        rules = Rules({}, eos=frozenset())
        logprobs, _ = score(model, pack(ids, torch.ones_like(ids), 20, rules, Budget(20)))
        logprobs.sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(found[0]) == len(found[1]) > 0
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-3 * theirs.abs().max().item())


def test_a_hook_is_called_at_each_step() -> None:
    model, calls = tiny("GPTNeoX"), []
    if torch.cuda.is_available():
        model = model.cuda()
    model.base_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    done = rollouts(model, rows=len(PROMPTS))
    assert len(calls) >= max(r.forward_passes for r in done)
