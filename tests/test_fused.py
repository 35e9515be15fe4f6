"""The written-out step is the stock one: values, adapters, and where it may not be taken."""

from __future__ import annotations

import contextlib
import copy
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from conftest import DELETE, EOS, FAMILIES, VOCAB, tiny
from peft import LoraConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXModel
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel

from rl_backspace import backbone, fused, policy
from rl_backspace.backbone import Backbone, PointerCache
from rl_backspace.config import Lora
from rl_backspace.engine import GREEDY, Engine
from rl_backspace.errors import UserError
from rl_backspace.fused import Settled, adapters_joined, fuse
from rl_backspace.semantics import Budget, Rules

FUSED = ("Llama", "Mistral", "Qwen2", "Qwen3")
LENGTH, ROWS = 24, 5
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora(model: Any, **overrides: Any) -> Any:
    """With an adapter whose matrices are both random, so that it changes what the model says."""
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **{"target_modules": TARGETS, **overrides})).eval()
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.2)
    return adapted


@torch.inference_mode()
def walk(model: Any, written_out: bool, first: int = 0) -> torch.Tensor:
    """Hidden states of prompts, then of random tokens fed at random places of rows, rows leaving on the way."""
    backbone = Backbone(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(3, VOCAB, (ROWS, 6), generator=generator)
    network = fuse(backbone.causal, LENGTH) if written_out else backbone
    assert network is not None
    hidden, prefilled = network.prefill(prompts, first)
    assert hidden.shape[1] == 6 - first
    cache = PointerCache(prefilled, ROWS, LENGTH)
    cache.fill(0, prefilled, torch.arange(ROWS))
    lengths, out = torch.full((ROWS,), 6), [hidden.flatten(0, 1)]
    for turn in range(40):
        back = torch.randint(0, 4, (ROWS,), generator=generator)
        lengths = torch.where(torch.rand(ROWS, generator=generator) < 0.3, (lengths - back).clamp(min=3), lengths)
        rows = ROWS - (turn > 20) * 2
        tokens = torch.randint(3, VOCAB, (rows,), generator=generator)
        cache.reserve(int(lengths.max()) + 1)
        out.append(network.decode(tokens, lengths[:rows], cache))
        lengths = (lengths + 1).clamp(max=LENGTH - 1)
    return torch.cat(out)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("first", [0, 3, 5])
@pytest.mark.parametrize("family", FUSED)
def test_equals_the_stock_step(family: str, first: int, adapted: bool, attention: str) -> None:
    model = tiny(family, attn_implementation=attention)
    for name, weight in model.named_parameters():  # norms and biases that do something
        if "norm" in name or "bias" in name:
            nn.init.normal_(weight, mean=1.0, std=0.3)
    model = lora(model) if adapted else model
    stock, ours = (walk(model, written_out, first) for written_out in (False, True))
    assert (stock - ours).abs().max() < 1e-5 * max(1.0, stock.abs().max().item())


@pytest.mark.parametrize("first", [0, 4])
def test_prompts_in_parts_are_the_same(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(tiny("Qwen3"))
    whole = walk(model, True, first)
    monkeypatch.setitem(fused.PART, "cpu", 13)  # two of the five rows at once
    assert (walk(model, True, first) - whole).abs().max() < 1e-5


def test_biases_beside_layers_without_them_are_kept() -> None:
    model = tiny("Llama", attention_bias=True, mlp_bias=True)
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
        nn.init.normal_(layer.mlp.down_proj.bias)
        layer.self_attn.v_proj.bias = None
    assert (walk(model, written_out=False) - walk(model, written_out=True)).abs().max() < 1e-5


def test_an_adapter_counts_as_it_is_now() -> None:
    model = lora(tiny())
    with_adapter = walk(model, written_out=True)
    with model.disable_adapter():
        without = walk(model, written_out=True)
        assert (without - walk(model, written_out=False)).abs().max() < 1e-5
    assert (with_adapter - without).abs().max() > 0.1
    torch.manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.2)
    assert (walk(model, written_out=True) - walk(model, written_out=False)).abs().max() < 1e-5
    assert (walk(model, written_out=True) - with_adapter).abs().max() > 0.1
    model.merge_adapter()
    assert (walk(model, written_out=True) - walk(model, written_out=False)).abs().max() < 1e-5


def test_what_is_not_stock_runs_its_own_forward() -> None:
    assert fuse(tiny(), 8) is not None
    assert [family for family in FAMILIES if fuse(tiny(family), 8) is not None] == list(
        family for family in FAMILIES if family in FUSED
    )
    assert fuse(tiny().to(torch.bfloat16), 8) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fuse(tiny(), 8) is None
    assert fuse(lora(tiny(), use_dora=True).get_base_model(), 8) is None
    assert fuse(lora(tiny(), lora_bias=True).get_base_model(), 8) is None
    biased = lora(tiny()).get_base_model()
    biased.model.layers[1].mlp.up_proj.lora_B["default"].bias = nn.Parameter(torch.ones(1))
    assert fuse(biased, 8) is None
    hook = nn.modules.module.register_module_forward_hook(lambda module, inputs, output: output)
    assert fuse(tiny(), 8) is None
    hook.remove()
    hooked, patched, replaced = tiny(), tiny(), tiny()
    hooked.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    patched.model.layers[0].self_attn.forward = patched.model.layers[0].self_attn.forward
    replaced.model.layers[0].mlp.up_proj = nn.Sequential(replaced.model.layers[0].mlp.up_proj)
    assert [fuse(model, 8) for model in (hooked, patched, replaced)] == [None] * 3


def test_a_patched_class_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    assert fuse(model, 8) is not None
    forward = LlamaModel.forward
    monkeypatch.setattr(LlamaModel, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))
    assert fuse(model, 8) is None


def turn(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, *rest: object) -> tuple[torch.Tensor, torch.Tensor]:
    return 3 * q * cos.unsqueeze(1), 3 * k


def test_a_replaced_function_is_found_by_the_engines_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn)
    model, rules = tiny(), Rules({}, frozenset([1]))
    assert fuse(model, 8) is not None
    engine = Engine(model, rules)
    assert isinstance(engine.backbone.fastest(8), Backbone)
    (ours,) = engine.run([[5, 6]], Budget(answer=8), GREEDY)
    assert ours.actions == naive.greedy(model, [5, 6], rules, Budget(answer=8)).history


def test_a_refusal_undoes_nothing_that_another_check_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turn)
    model, rules = tiny(), Rules({}, frozenset([1]))
    Engine(model, rules)
    good = model.model.norm.weight.data.clone()
    model.model.norm.weight.data.fill_(torch.nan)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(UserError, match="not numbers"):
        Engine(model, rules)
    model.model.norm.weight.data.copy_(good)
    assert isinstance(Engine(model, rules).backbone.fastest(8), Backbone)


@pytest.mark.parametrize(("name", "value"), [("scaling", 0.5), ("is_causal", False)])
def test_a_layer_unlike_the_first_runs_its_own_forward(name: str, value: object) -> None:
    model = tiny()
    setattr(model.model.layers[1].self_attn, name, value)
    assert fuse(model, 8) is None


class Doubled(LlamaMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_a_part_of_ones_own_is_heard_even_after_the_check() -> None:
    model, rules = tiny(), Rules({}, frozenset([1]))
    engine = Engine(model, rules)
    model.model.layers[1].mlp.__class__ = Doubled
    (ours,) = engine.run([[5, 6]], Budget(answer=8), GREEDY)
    assert ours.actions == naive.greedy(model, [5, 6], rules, Budget(answer=8)).history


def test_a_model_cut_short_is_the_cut_model() -> None:
    model = tiny()
    model.config.num_hidden_layers = 1
    assert (walk(model, written_out=True) - walk(model, written_out=False)).abs().max() < 1e-5


def test_a_merged_adapter_that_is_disabled_is_taken_out() -> None:
    model, rules = lora(tiny()), Rules({}, frozenset([1]))
    with model.disable_adapter():
        (expected,) = Engine(model, rules).run([[5, 6]], Budget(answer=8), GREEDY)
    model.merge_adapter()
    assert Engine(model, rules).run([[5, 6]], Budget(answer=8), GREEDY)[0].actions != expected.actions
    with model.disable_adapter():
        assert Engine(model, rules).run([[5, 6]], Budget(answer=8), GREEDY)[0].actions == expected.actions


def test_another_default_dtype_changes_nothing() -> None:
    model = tiny()
    torch.set_default_dtype(torch.float64)
    try:
        assert (walk(model, written_out=True) - walk(model, written_out=False)).abs().max() < 1e-5
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_hook_is_heard_in_rollouts() -> None:
    """Somebody's change of a layer is not passed over."""
    model, rules = tiny(), Rules({}, frozenset([1]))
    before = Engine(model, rules).run([[5, 6]], Budget(answer=8), GREEDY)
    model.model.layers[1].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    after = Engine(model, rules).run([[5, 6]], Budget(answer=8), GREEDY)
    assert before[0].actions != after[0].actions


def joined(model: Any) -> int:
    """How many of a model's layers are one product with their adapter."""
    with adapters_joined(model):
        return sum("forward" in vars(module) for module in model.modules() if hasattr(module, "lora_A"))


def gradients(model: Any, inside: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of each trained weight of something made of all of them."""
    ids = torch.randint(3, VOCAB, (3, 17), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    with adapters_joined(model) if inside else contextlib.nullcontext():
        logits = model(ids).logits
    (logits * torch.linspace(-1, 1, VOCAB)).sum().backward()  # outside, as a trainer does it
    return logits.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_adapters_are_the_same_adapters(family: str) -> None:
    model = tiny(family)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight, std=0.3)
    model = lora(model, target_modules="all-linear", trainable_token_indices=[5, 6])
    plain = family != "GPT2"  # whose layers are transposed
    assert (joined(model) > 0) == plain
    stock, theirs = gradients(model, inside=False)
    ours, mine = gradients(model, inside=True)
    assert (stock - ours).abs().max() < 1e-5 * max(1.0, stock.abs().max().item())
    assert mine.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (gradient - mine[name]).abs().max() < 1e-4 * max(1.0, gradient.abs().max().item()), name
    assert not any("forward" in vars(module) for module in model.modules())


def test_an_adapter_that_does_more_is_left_to_peft() -> None:
    model = lora(tiny()).train()
    layers = 7 * len(model.get_base_model().model.layers)
    assert joined(model) == layers
    with model.disable_adapter():
        assert joined(model) == 0
    assert joined(lora(tiny(), use_dora=True)) == joined(lora(tiny(), lora_bias=True)) == 0
    dropping = lora(tiny(), lora_dropout=0.5)
    assert (joined(dropping.eval()), joined(dropping.train())) == (layers, 0)
    assert joined(lora(tiny().to(torch.bfloat16))) == 0
    again = lora(tiny()).train()
    again.get_base_model().gradient_checkpointing_enable()
    assert joined(again) == 0
    hooked = lora(tiny())
    heard = hooked.get_base_model().model.layers[0].mlp.up_proj
    heard.lora_B["default"].register_forward_hook(lambda module, inputs, output: 2 * output)
    assert joined(hooked) == layers - 1
    other = hooked.get_base_model().model.layers[0].mlp.gate_proj
    other.base_layer.weight.requires_grad_(True)  # more is trained than the adapter
    assert joined(hooked) == layers - 2
    other = hooked.get_base_model().model.layers[1].mlp.gate_proj
    other.lora_B["default"].bias = nn.Parameter(torch.ones(other.out_features))
    assert joined(hooked) == layers - 3
    compiled = lora(tiny())
    compiled.compile(backend="eager")
    assert joined(compiled) == joined(torch.compile(lora(tiny()), backend="eager")) == 0
    model.add_adapter("other", LoraConfig(r=2, target_modules=TARGETS))
    model.base_model.set_adapter(["default", "other"])
    assert joined(model) == 0
    model.base_model.set_adapter("other")
    assert joined(model) == layers
    model.merge_adapter()
    assert joined(model) == 0


def test_autocast_inside_the_model_is_left_to_peft() -> None:
    """As accelerate does it, in the model's own forward."""
    model = lora(tiny())
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    (stock, theirs), (ours, mine) = gradients(model, inside=False), gradients(model, inside=True)
    assert stock.dtype == torch.bfloat16 and torch.equal(stock, ours)
    assert all(torch.equal(gradient, mine[name]) for name, gradient in theirs.items())


class InPlace(nn.Module):
    """Changes what a layer with a bias gave it, as OLMo does, and takes its adapter off for a part."""

    def __init__(self, part: str):
        super().__init__()
        self.inner, self.part = nn.Linear(8, 8), part

    def forward(self, ids: torch.Tensor) -> Any:
        x = nn.functional.one_hot(ids % 8, 8).float()
        x = {"batch": x, "one row": x[:1, :1], "no rows": x[:0], "a vector": x[0, 0]}[self.part]
        with_adapter = self.inner(x).clamp_(min=0.1)
        self.inner.enable_adapters(False)
        without = self.inner(x).clamp_(min=0.1)
        self.inner.enable_adapters(True)
        return SimpleNamespace(logits=(with_adapter - without).sum() * torch.ones(VOCAB))


@pytest.mark.parametrize("part", ["batch", "one row", "no rows", "a vector"])
def test_a_joined_layer_is_used_as_any_other(part: str) -> None:
    model = lora(InPlace(part), target_modules=["inner"])
    (stock, theirs), (ours, mine) = gradients(model, inside=False), gradients(model, inside=True)
    assert joined(model) == 1 and mine.keys() == theirs.keys()
    assert (stock - ours).abs().max() < 1e-5
    assert all((gradient - mine[name]).abs().max() < 1e-4 for name, gradient in theirs.items())


def test_joined_adapters_are_parted_when_something_fails() -> None:
    model = lora(tiny())
    with pytest.raises(ZeroDivisionError), adapters_joined(model):
        raise ZeroDivisionError
    assert not any("forward" in vars(module) for module in model.modules())


def rows_trained(model: Any) -> Any:
    """With an adapter that trains the delete token's row too, as `policy` makes it, everything in it random."""
    adapted = policy._adapt(model, Lora(), [DELETE]).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "trainable_tokens" in name:
            nn.init.normal_(weight, std=0.2)
    return adapted


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The layers that PEFT put rows into a whole weight for."""
    made: list[Any] = []
    put_in = TrainableTokensLayer.get_merged_weights

    def counted(self: Any, active: Any) -> torch.Tensor:
        made.append(self)
        return put_in(self, active)

    monkeypatch.setattr(TrainableTokensLayer, "get_merged_weights", counted)
    return made


@pytest.mark.parametrize("tied", [False, True])
def test_trained_rows_are_put_in_once_for_a_run(family: str, tied: bool, merges: list[Any]) -> None:
    model = rows_trained(tiny(family, tie_word_embeddings=tied))
    rules, budget = Rules({DELETE: "token"}, frozenset([EOS]), retry="ban"), Budget(answer=12, actions=24)
    engine = Engine(model, rules)
    before = []
    for change in (1.0, 1.5):  # rows count as they are now
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "trainable_tokens" in name:
                    weight.mul_(change)
        merges.clear()
        (ours,) = engine.run([[5, 6, 7]], budget, GREEDY)
        assert len(merges) == 1 + (not tied)  # not once a step
        assert ours.actions == naive.greedy(model, [5, 6, 7], rules, budget).history
        before.append(ours.logprobs)
    assert before[0] != before[1]


@torch.inference_mode()
def looked_up(model: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Embeddings and logits by the model's own modules, and with what `Settled` has for them."""
    causal, ids = model.get_base_model(), torch.arange(VOCAB)
    hidden = torch.randn(3, causal.config.hidden_size, generator=torch.Generator().manual_seed(0))

    def both() -> list[torch.Tensor]:
        return [causal.get_input_embeddings()(ids).clone(), causal.get_output_embeddings()(hidden).clone()]

    own = both()
    with Settled.of(causal).instead():
        return own, both()


def test_rows_count_as_the_adapter_stands() -> None:
    for family in ("Llama", "Gemma3Text", "Phi"):  # the second scales, the third has a bias, which PEFT leaves out
        model = rows_trained(tiny(family))
        if family == "Phi":
            nn.init.normal_(model.get_base_model().lm_head.token_adapter.base_layer.bias)
        with_rows, ours = looked_up(model)
        assert all(map(torch.equal, with_rows, ours))
        with model.disable_adapter():
            without, ours = looked_up(model)
            assert all(map(torch.equal, without, ours)) and not Settled.of(model)
            assert not any(map(torch.equal, without, with_rows))
        model.merge_adapter()
        merged, ours = looked_up(model)
        assert all(map(torch.equal, merged, ours)) and not Settled.of(model)
        assert not any("forward" in vars(module) for module in model.modules())


def test_what_does_more_than_put_rows_in_stays() -> None:
    model = rows_trained(tiny())
    assert len(Settled.of(model)) == 2
    embedding = model.get_base_model().get_input_embeddings()
    embedding.token_adapter.forward = lambda x: 2 * embedding.token_adapter.base_layer(x)
    assert list(Settled.of(model)) == [model.get_base_model().lm_head.token_adapter]
    head = rows_trained(tiny()).get_base_model().lm_head
    head.token_adapter.base_layer.__class__ = type("Own", (nn.Linear,), {"forward": lambda self, x: x})
    assert not Settled.of(head)
    assert not Settled.of(tiny())


def test_another_thread_trains_as_ever() -> None:
    model = rows_trained(tiny("GPTNeoX"))
    ids = torch.tensor([[5, DELETE, 7, DELETE]])

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [weight.grad.clone() for name, weight in model.named_parameters() if "trainable_tokens" in name]

    with ThreadPoolExecutor(1) as pool:
        expected = pool.submit(gradients).result()
        with torch.inference_mode():
            settled = Settled.of(model)
            with settled.instead():
                found = pool.submit(gradients).result()
                copied = pool.submit(copy.deepcopy, model).result()
    assert all(grad.abs().sum() > 0 for grad in expected) and len(found) == len(expected) > 0
    assert all(map(torch.equal, found, expected))
    with torch.no_grad():
        before = copied(ids).logits.clone()
        for name, weight in copied.named_parameters():
            if "trainable_tokens" in name:
                weight.mul_(2)
        assert not torch.equal(copied(ids).logits, before)  # a copy that was made meanwhile is not frozen


def test_a_compiled_model_is_left_as_it_is() -> None:
    model = rows_trained(tiny())
    assert len(Settled.of(model)) == 2
    model.get_base_model().base_model.compile()
    assert not Settled.of(model)


def test_a_body_without_embeddings_of_its_own_is_driven(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise NotImplementedError

    model, rules = tiny("GPTNeoX"), Rules({}, frozenset([EOS]))
    monkeypatch.setattr(type(model.base_model), "get_input_embeddings", refuse)
    (ours,) = Engine(model, rules).run([[5, 6]], Budget(answer=8), GREEDY)
    assert ours.actions == naive.greedy(model, [5, 6], rules, Budget(answer=8)).history


def test_a_hook_on_the_embedding_is_called_at_each_step() -> None:
    model, rules, calls = rows_trained(tiny()), Rules({}, frozenset([EOS])), []
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    engine = Engine(model, rules)
    calls.clear()
    (ours,) = engine.run([[5, 6]], Budget(answer=8), GREEDY)
    assert len(calls) >= len(ours.actions)


def test_a_model_sees_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some look them up a second time, so that embeddings would not do in their place."""
    forward = GPTNeoXModel.forward

    def strange(self: Any, input_ids: torch.Tensor, inputs_embeds: None = None, **kwargs: Any) -> Any:
        return forward(self, inputs_embeds=self.embed_in(input_ids) * (1 + input_ids[..., None] % 3), **kwargs)

    monkeypatch.setattr(GPTNeoXModel, "forward", strange)
    model, rules, budget = tiny("GPTNeoX"), Rules({}, frozenset([EOS])), Budget(answer=8)
    Engine(model, rules)
    model = rows_trained(model)
    (ours,) = Engine(model, rules).run([[5, 6]], budget, GREEDY)
    assert ours.actions == naive.greedy(model, [5, 6], rules, budget).history


def test_a_model_that_got_an_adapter_is_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checks = []
    compare = backbone._compare
    monkeypatch.setattr(backbone, "_compare", lambda one, *rest: (checks.append(one), compare(one, *rest))[1])
    model, rules = tiny(), Rules({}, frozenset([EOS]))
    for _ in range(2):
        Engine(model, rules)
    assert len(checks) == 1
    model = rows_trained(model)
    for _ in range(2):
        Engine(model, rules)
    assert len(checks) == 2
