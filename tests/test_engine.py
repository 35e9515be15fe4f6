from __future__ import annotations

import functools
import math
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import naive
import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from conftest import DELETE, EOS, VOCAB, tiny
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from rl_backspace import backbone, policy
from rl_backspace.backbone import Backbone, _rounds_products
from rl_backspace.controls import RandomDeletes
from rl_backspace.engine import GREEDY, LARGE, Ahead, Engine, Sampling, _invert, draw
from rl_backspace.errors import UserError
from rl_backspace.keyboard import Keyboard
from rl_backspace.semantics import Budget, Rules, replay

WORDS = {DELETE: "token", DELETE - 1: 3, DELETE - 2: "answer"}


def some_prompts(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB - 3, (length,), generator=generator).tolist() for length in lengths]


def rules(memory: str = "erase", retry: str = "free") -> Rules:
    return Rules(WORDS, frozenset([EOS]), memory, retry)  # type: ignore[arg-type]


def eager_to_delete(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Make deletes as likely as typing, so that rows delete at different times."""
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[DELETE - 2 :] *= 2
    return model


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
@pytest.mark.parametrize("retry", ["free", "ban"])
def test_equals_recomputation_from_scratch(memory: str, retry: str) -> None:
    model = eager_to_delete(tiny())
    played, budget = rules(memory, retry), Budget(answer=10, actions=30, deletes=12)
    prompts = some_prompts(24)
    rollouts = Engine(model, played, rows=7).run(prompts, budget, Sampling(0.8), torch.Generator().manual_seed(1))
    assert sum(rollout.deletes for rollout in rollouts) > 40
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        slow = naive.Naive(played, budget)
        for action, logprob in zip(rollout.actions, rollout.logprobs, strict=True):
            expected = naive.logprobs(model, [*prompt, *slow.context()], slow.forbidden(), 0.8)[action]
            assert logprob == pytest.approx(expected.item(), abs=2e-4)
            slow.press(action)
        assert slow.over() and rollout.visible == slow.cells and rollout.prompt == prompt


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_greedy_equals_one_action_at_a_time_on_every_family(family: str, attention: str, memory: str) -> None:
    if family == "Gemma2" and attention == "sdpa":
        pytest.skip("transformers has no sdpa for Gemma 2")
    model = eager_to_delete(tiny(family, attn_implementation=attention))
    played, budget = rules(memory, "ban"), Budget(answer=8, actions=20)
    prompts = some_prompts(6)
    rollouts = Engine(model, played, rows=4).run(prompts, budget, GREEDY)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        assert rollout.actions == naive.greedy(model, prompt, played, budget).history


@pytest.mark.parametrize("family", ["Llama", "GPTNeoX", "Gemma3Text"])
def test_blocked_greedy_equals_generate(family: str) -> None:
    model = tiny(family)
    model.generation_config.pad_token_id = 0
    prompts = some_prompts(5)
    rollouts = Engine(model, rules()).run(prompts, Budget(answer=12, deletes=0), GREEDY)
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, suppress_tokens=sorted(WORDS), eos_token_id=EOS
        )
        assert rollout.visible == rollout.actions == out[0, len(prompt) :].tolist()
        assert rollout.end == ("eos" if rollout.visible[-1] == EOS else "length")


def test_forward_passes_are_the_non_delete_actions() -> None:
    model = eager_to_delete(tiny())
    passes = []
    body = model.base_model
    original = body.forward

    def counting(*args: object, **kwargs: object) -> object:
        ids = kwargs["input_ids"]
        passes.append(len(ids) if ids.shape[1] == 1 else 0)  # type: ignore[attr-defined, index]
        return original(*args, **kwargs)

    engine = Engine(model, rules(), rows=5)
    body.forward = counting
    prompts = [[*prompt, 3, 4] for prompt in some_prompts(20)]  # longer than one token, so that prefills differ
    rollouts = engine.run(prompts, Budget(answer=10, actions=30))
    typed = [len(rollout.actions) - rollout.deletes for rollout in rollouts]
    assert [rollout.forward_passes for rollout in rollouts] == typed
    assert sum(rollout.deletes for rollout in rollouts) > 20
    # the network fed each typed token once, but for each rollout's last, after which nothing is chosen
    assert sum(passes) == sum(typed) - len(rollouts)


@pytest.mark.parametrize("memory", ["keep", "hint"])
def test_forward_passes_of_other_memories_are_the_tokens_that_entered(memory: str) -> None:
    rollouts = Engine(eager_to_delete(tiny()), rules(memory)).run(some_prompts(8), Budget(answer=10, actions=30))
    for rollout in rollouts:
        machine_passes = len(rollout.actions) if memory == "keep" else len(rollout.actions) - rollout.deletes
        assert rollout.forward_passes >= machine_passes
        if memory == "keep":
            assert rollout.forward_passes == machine_passes


def test_rows_change_nothing_but_memory() -> None:
    """Slot refill, compaction and the batch's size leave greedy results alone, and their order."""
    model = eager_to_delete(tiny())
    prompts = some_prompts(17) + some_prompts(3)  # repeated prompts are computed once
    results = [
        [r.actions for r in Engine(model, rules(retry="ban"), rows=rows).run(prompts, Budget(9, 25), GREEDY)]
        for rows in (1, 3, 8, 64)
    ]
    assert all(result == results[0] for result in results[1:])


def test_sampling_follows_the_distribution() -> None:
    """Frequencies of the first two actions against probabilities, illegal ones left out."""
    model = eager_to_delete(tiny())
    played, budget, count = rules(retry="ban"), Budget(answer=3, actions=3), 4000
    rollouts = Engine(model, played).run([[5, 6]] * count, budget, Sampling(), torch.Generator().manual_seed(0))
    first = naive.logprobs(model, [5, 6], naive.Naive(played, budget).forbidden()).exp()
    seen = torch.bincount(torch.tensor([r.actions[0] for r in rollouts]), minlength=VOCAB) / count
    assert seen[sorted(WORDS)].sum() == 0
    assert (seen - first).abs().max() < 4 * (0.25 / count) ** 0.5


def test_truncated_sampling_keeps_to_the_likely_actions() -> None:
    model = tiny()
    budget = Budget(answer=1, deletes=0)
    ranked = naive.logprobs(model, [5, 6], set(WORDS)).argsort(descending=True).tolist()

    def firsts(**truncation: float) -> set[int]:
        engine = Engine(model, rules())
        rollouts = engine.run([[5, 6]] * 500, budget, Sampling(**truncation), torch.Generator().manual_seed(0))
        return {rollout.actions[0] for rollout in rollouts}

    assert firsts(top_k=3) == set(ranked[:3])
    probabilities = naive.logprobs(model, [5, 6], set(WORDS)).exp()
    nucleus, mass = set(), 0.0
    for token in ranked:
        if mass >= 0.5:
            break
        nucleus.add(token)
        mass += probabilities[token].item()
    assert firsts(top_p=0.5) == nucleus
    likely = {t for t in range(VOCAB) if probabilities[t] >= 0.5 * probabilities.max() and t not in WORDS}
    assert firsts(min_p=0.5) == likely


def test_bf16_stays_close_to_fp32() -> None:
    model = eager_to_delete(tiny())
    played, budget = rules(), Budget(answer=8, actions=16)
    half = tiny().to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    for rollout in Engine(half, played).run(some_prompts(6), budget):
        slow = naive.Naive(played, budget)
        for action, logprob in zip(rollout.actions, rollout.logprobs, strict=True):
            expected = naive.logprobs(model, [*rollout.prompt, *slow.context()], slow.forbidden())[action].item()
            assert logprob == pytest.approx(expected, abs=0.35)
            slow.press(action)


def test_stuck_when_nothing_is_legal() -> None:
    played = Rules({token: "token" for token in range(VOCAB)}, frozenset([EOS]))
    rollout = Engine(tiny(), played).run([[3]], Budget(5))[0]
    assert (rollout.end, rollout.actions) == ("stuck", [])


def with_bias(token: int, value: float) -> transformers.PreTrainedModel:
    """A model whose head adds a value to one token's logit."""
    model = tiny()
    model.get_output_embeddings().bias = torch.nn.Parameter(torch.zeros(VOCAB))
    with torch.no_grad():
        model.get_output_embeddings().bias[token] = value
    return model


@pytest.mark.parametrize("sampling", [Sampling(), GREEDY, Sampling(top_k=3), Sampling(delete_bias=1.0)])
def test_a_diverged_policy_is_named_not_called_stuck(sampling: Sampling) -> None:
    model = tiny()
    engine = Engine(model, rules())
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(UserError, match="diverged"):
        engine.run([[3, 4]], Budget(5), sampling)
    model = with_bias(5, 0.0)
    engine = Engine(model, rules())
    with torch.no_grad():
        model.get_output_embeddings().bias[5] = torch.inf
    with pytest.raises(UserError, match="overflow"):
        engine.run([[3, 4]], Budget(5), sampling)
    with pytest.raises(UserError, match="overflow"):
        Engine(with_bias(5, torch.inf), rules())
    nothing = with_bias(5, 0.0)
    with torch.no_grad():
        nothing.get_output_embeddings().bias.fill_(-torch.inf)
    with pytest.raises(UserError, match="not numbers"):
        Engine(nothing, rules())


def test_a_model_may_ban_a_token() -> None:
    rollouts = Engine(with_bias(5, -torch.inf), rules()).run(some_prompts(40), Budget(20))
    assert all(rollout.end != "stuck" and 5 not in rollout.actions for rollout in rollouts)


@pytest.mark.parametrize("vocabulary", [LARGE, LARGE + 1, 5 * LARGE, 5 * LARGE + 77])
def test_a_large_vocabulary_is_drawn_from_as_a_small_one(vocabulary: int) -> None:
    """The same tokens for the same random numbers, those at the ends included; -inf is never drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, vocabulary, generator=generator)
    logits[:, 300:900] = logits[1, : vocabulary // 2] = logits[2, -vocabulary // 3 :] = -torch.inf
    logprobs = logits.log_softmax(-1)
    uniform = torch.rand(3, 500, dtype=torch.double, generator=generator)
    uniform[:, 0], uniform[:, 1] = 0.0, 1 - 2**-53
    cumulative = logprobs.double().exp().cumsum(-1)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp(max=vocabulary - 1)
    found = _invert(logprobs, uniform)
    assert logprobs.gather(1, found)[:, 2:].isfinite().all()
    assert (found != expected).sum() <= 3  # where a number is within rounding of a boundary
    assert (cumulative.gather(1, found) - cumulative.gather(1, expected)).abs().max() < 1e-6


def test_draws_never_have_mass_zero() -> None:
    """Most of a large vocabulary illegal, the last token among it, many draws."""
    logprobs = torch.full((20_000, 64), -torch.inf)
    logprobs[:, 10:13] = torch.tensor([0.2, 0.3, 0.5]).log()
    drawn = draw(logprobs, Sampling(), torch.Generator().manual_seed(0))[:, 0]
    assert set(drawn.tolist()) == {10, 11, 12}
    assert (drawn == 12).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_training_mode_and_traces_are_left_alone() -> None:
    model = tiny().train()
    told: list[tuple[int, int]] = []
    rollouts = Engine(model, rules()).run(some_prompts(3), Budget(6, 12), on_action=lambda *action: told.append(action))
    assert model.training
    for index, rollout in enumerate(rollouts):
        assert [action for i, action in told if i == index] == rollout.actions
        assert replay(rollout.actions, rules(), Budget(6, 12)).visible == rollout.visible


def test_threads_share_a_model_with_each_other_and_with_stock_calls() -> None:
    """One model in training mode, parts of it not; stock `generate` must never see the engine's attention."""
    model = eager_to_delete(tiny(attention_dropout=0.5)).train()
    model.generation_config.pad_token_id = 0
    model.base_model.layers[1].eval()
    modes = [part.training for part in model.modules()]
    prompts, budget = some_prompts(6), Budget(10, 30)
    engines = [Engine(model, rules(retry="ban")) for _ in range(2)]
    expected = [rollout.actions for rollout in engines[0].run(prompts, budget, GREEDY)]
    seen: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.add(model.config._attn_implementation)

    def roll(engine: Engine) -> bool:
        return all([r.actions for r in engine.run(prompts, budget, GREEDY)] == expected for _ in range(5))

    with ThreadPoolExecutor(3) as pool:
        watching = pool.submit(watch)
        try:
            same = list(pool.map(roll, engines))
        finally:
            over.set()
        watching.result()
    assert same == [True, True] and seen == {"sdpa"}
    assert [part.training for part in model.modules()] == modes

    other, ids = tiny(seed=1), torch.tensor([[5, 6, 7]])
    engine, stock = Engine(other, rules()), {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}
    told = other.generate(ids, **stock)
    within: list[torch.Tensor] = []

    def beside(index: int, action: int) -> None:  # a stock call in another thread, in the middle of a rollout
        with ThreadPoolExecutor(1) as pool:
            within.append(pool.submit(lambda: other.generate(ids, **stock)).result())

    engine.run([[5, 6, 7]], Budget(4), GREEDY, on_action=beside)
    assert within and all(torch.equal(out, told) for out in within)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": 1e-45}, "temperature: got 1e-45"),
        ({"temperature": math.nan}, "temperature: got nan"),
        ({"temperature": math.inf}, "temperature: got inf"),
        ({"top_k": -1}, "top_k: got -1"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"min_p": 2.0}, "min_p: got 2.0; expected 0 to 1"),
        ({"delete_bias": math.nan}, "delete_bias: got nan"),
        ({"delete_bias": math.inf}, "delete_bias: got inf"),
    ],
)
def test_sampling_out_of_range_is_refused(given: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Sampling(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [{"top_p": 0.0}, {"min_p": 1.0}, {"top_k": 1}])
def test_the_likeliest_is_never_truncated(given: dict[str, float]) -> None:
    model, prompts = tiny(), some_prompts(4)
    engine, budget = Engine(model, rules()), Budget(6, deletes=0)
    drawn = [r.actions for r in engine.run(prompts, budget, Sampling(**given))]  # type: ignore[arg-type]
    assert drawn == [r.actions for r in engine.run(prompts, budget, GREEDY)]


def test_a_bias_of_minus_infinity_blocks_deletes() -> None:
    model, prompts = eager_to_delete(tiny()), some_prompts(4)
    biased = Engine(model, rules()).run(prompts, Budget(6, 18), Sampling(0.0, delete_bias=-math.inf))
    blocked = Engine(model, rules()).run(prompts, Budget(6, 18, deletes=0), GREEDY)
    assert [r.actions for r in biased] == [r.actions for r in blocked]


def test_the_bias_moves_what_is_sampled_and_not_what_is_recorded() -> None:
    model, played, budget = eager_to_delete(tiny()), rules(), Budget(8, 24)
    rollouts = Engine(model, played).run(some_prompts(16), budget, Sampling(delete_bias=3.0))
    plain = Engine(model, played).run(some_prompts(16), budget, Sampling())
    assert sum(r.deletes for r in rollouts) > 1.5 * sum(r.deletes for r in plain)
    slow = naive.Naive(played, budget)
    for action, logprob in zip(rollouts[0].actions, rollouts[0].logprobs, strict=True):
        expected = naive.logprobs(model, [*rollouts[0].prompt, *slow.context()], slow.forbidden())[action]
        assert logprob == pytest.approx(expected.item(), abs=2e-4)
        slow.press(action)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: _random("Mamba", hidden_size=32, num_hidden_layers=2, state_size=4), "linear_attention"),
        (lambda: _random("Bloom", hidden_size=32, n_layer=2, n_head=4), "cannot be driven"),
        (lambda: _random("Mpt", d_model=32, n_layers=2, n_heads=4), "MptForCausalLM"),
        (lambda: gpt_neo("global", "local"), "type local are not full attention"),
        (lambda: tiny("Mistral", attn_implementation="flex_attention"), "attn_implementation"),
        (lambda: torch.nn.Linear(2, 2), "Linear"),
    ],
)
def test_refuses_what_it_cannot_rewind_with_the_reason(make: object, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Engine(make(), rules())  # type: ignore[operator]


def gpt_neo(*kinds: str) -> transformers.PreTrainedModel:
    sizes: Any = {"hidden_size": 32, "num_layers": len(kinds), "num_heads": 4, "attention_types": [[list(kinds), 1]]}
    return _random("GPTNeo", **sizes).eval()


def _random(family: str, **sizes: int) -> transformers.PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(vocab_size=VOCAB, **sizes)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def test_refuses_a_window_shorter_than_the_sequence() -> None:
    engine = Engine(tiny("Mistral", sliding_window=8), rules())
    assert engine.run([[3, 4]], Budget(answer=6, actions=30))
    with pytest.raises(UserError, match="limit is 8"):
        engine.run([[3, 4]], Budget(answer=7, actions=30))


def twice(*called: Any) -> Any:
    called[-1].logits = 2 * called[-1].logits
    return called[-1]


def hooked(model: Any) -> Any:
    model.register_forward_hook(twice)
    return model


def patched(model: Any) -> Any:
    forward = model.forward
    model.forward = lambda *args, **kwargs: twice(forward(*args, **kwargs))
    return model


@pytest.mark.parametrize("change", [hooked, patched])
@pytest.mark.parametrize("adapted", [False, True])
def test_refuses_a_change_of_logits_that_only_scoring_would_hear_of(change: Any, adapted: bool) -> None:
    model: Any = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"])) if adapted else tiny()
    Engine(model, rules())
    with pytest.raises(UserError, match="when it is called, gives other logits"):
        Engine(change(model), rules())


def test_what_changes_no_logits_is_no_reason_to_refuse() -> None:
    harmless = tiny()
    harmless.register_forward_hook(lambda *called: None)
    Engine(harmless, rules())
    Engine(gpt_neo("global", "global"), rules())
    deep = tiny(num_hidden_layers=12, hidden_size=64)  # bfloat16 is off by a tenth at its end
    deep.forward = torch.autocast("cpu", torch.bfloat16)(deep.forward)
    Engine(deep, rules())


def test_asking_compiles_nothing() -> None:
    def backend(*graph: Any) -> Any:
        raise AssertionError("compiled")

    adapted = get_peft_model(tiny(), LoraConfig(target_modules=["q_proj"]))
    Engine(torch.compile(adapted, backend=backend), rules())
    model = tiny()
    model.forward = torch.compile(model.forward, backend=backend)
    Engine(model, rules())


def test_rounding_by_autocast_is_no_wrong_model() -> None:
    """Nor slower ever after."""
    model = policy.load_base("countdown-1m")[0].float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        Engine(model, rules())
    assert not isinstance(Engine(model, rules()).backbone.fastest(8), Backbone)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")
@pytest.mark.parametrize(("asked", "rounds"), [("tf32", True), ("ieee", False), ("none", False)])
def test_whether_a_gpu_rounds_products_can_be_asked(asked: str, rounds: bool) -> None:
    """Where torch's own question raises, since this was set and not everything else with it."""
    products = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, asked
    try:
        assert _rounds_products(torch.device("cuda")) == rounds
    finally:
        products.fp32_precision = before
    assert not _rounds_products(torch.device("cpu"))


def test_a_model_that_is_refused_is_not_slow_ever_after(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "one_query_attention", lambda module, query, *rest, **more: (0 * query, None))
        patch.setattr(backbone, "fuse", lambda *rest: None)
        with pytest.raises(UserError, match="cannot rewind"):
            Engine(model, rules())
    assert not isinstance(Engine(model, rules()).backbone.fastest(8), Backbone)


def test_refuses_frequencies_that_depend_on_the_batch() -> None:
    """Long rope changes its frequencies with the longest row, so a row would depend on its neighbours."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    model = tiny("Phi3", rope_parameters=rope, original_max_position_embeddings=16)
    engine = Engine(model, rules())
    with pytest.raises(UserError, match="limit is 16"):
        engine.run([[3] * 10], Budget(answer=10))


def test_refuses_prompts_that_do_not_fit() -> None:
    engine = Engine(tiny(), rules())
    with pytest.raises(UserError, match="128"):
        engine.run([[3] * 120], Budget(answer=20))
    with pytest.raises(UserError, match="no tokens"):
        engine.run([[3], []], Budget(answer=20))
    assert engine.run([], Budget(answer=20)) == []


def test_refuses_tokens_that_the_model_does_not_have_and_no_rows() -> None:
    engine = Engine(tiny(), rules())
    for wrong in (-1, VOCAB):
        with pytest.raises(UserError, match=f"a prompt: got token {wrong}; the model has tokens 0 to {VOCAB - 1}"):
            engine.run([[3], [4, wrong]], Budget(answer=20))
        with pytest.raises(UserError, match=f"begun: got token {wrong}"):
            engine.run([[3], [4]], Budget(answer=20), begun=[[3, wrong], []])
    with pytest.raises(UserError, match=f"a delete token: got token {VOCAB}"):
        Engine(tiny(), Rules({VOCAB: "token"}, frozenset([EOS])))
    with pytest.raises(UserError, match="rows: got 0"):
        Engine(tiny(), rules(), rows=0)


PLAIN = """phi3 smollm3 olmo olmo2 olmo3 granite cohere cohere2 stablelm starcoder2 falcon opt glm glm4 nemotron exaone4
    arcee bitnet ernie4_5"""
OTHERS: dict[str, dict[str, int]] = {
    **{name: {} for name in PLAIN.split()},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4},
    "deepseek_v3": {
        **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "moe_intermediate_size"), 16),
        **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4},
    },
}  # model types of transformers that the README's table says pass, and what their small configs need


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_that_are_said_to_pass_do_what_the_naive_loop_does(name: str) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    options = (*sizes, "vocab_size", "max_position_embeddings", "initializer_range", "pad_token_id", "eos_token_id")
    like = {key: getattr(tiny().config, key) for key in options}
    config = transformers.AutoConfig.for_model(name, **{**like, **OTHERS[name]})
    torch.manual_seed(0)
    model = eager_to_delete(transformers.AutoModelForCausalLM.from_config(config).eval())
    played, budget, prompts = rules("erase", "ban"), Budget(answer=6, actions=15), some_prompts(4)
    for prompt, rollout in zip(prompts, Engine(model, played).run(prompts, budget, GREEDY), strict=True):
        assert rollout.actions == naive.greedy(model, prompt, played, budget).history


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
@pytest.mark.parametrize("retry", ["free", "ban"])
def test_it_goes_on_from_where_a_rollout_was_cut(memory: str, retry: str) -> None:
    model, played, budget = eager_to_delete(tiny()), rules(memory, retry), Budget(answer=10, actions=30)
    prompts = some_prompts(20)
    engine = Engine(model, played, rows=7)
    whole = engine.run(prompts, budget, GREEDY)
    cuts = [len(rollout.actions) * (i % 5) // 4 for i, rollout in enumerate(whole)]  # from nothing to all of it
    again = engine.run(prompts, budget, GREEDY, begun=[r.actions[:cut] for r, cut in zip(whole, cuts, strict=True)])
    assert sum(rollout.deletes for rollout in whole) > 20
    with pytest.raises(UserError, match="begun: got actions of 1 rollouts for 20 prompts"):
        engine.run(prompts, budget, GREEDY, begun=[[]])
    for first, second, cut in zip(whole, again, cuts, strict=True):
        assert (first.actions, first.visible, first.end) == (second.actions, second.visible, second.end)
        assert all(math.isnan(logprob) for logprob in second.logprobs[:cut])
        assert second.logprobs[cut:] == pytest.approx(first.logprobs[cut:], abs=1e-4)


def test_a_keyboard_is_not_told_of_choices_that_were_none() -> None:
    class Never(Sampling):
        def choose(self, logits: torch.Tensor, *rest: object) -> torch.Tensor:
            return torch.full((len(logits),), -1)

    played = Keyboard(0.5, (5, 6), frozenset([EOS]))
    assert Engine(tiny(), rules(), keyboard=played).run([[3]], Budget(5), Never())[0].end == "stuck"


@pytest.mark.parametrize("memory", ["erase", "hint", "keep"])
@pytest.mark.parametrize("retry", ["free", "ban"])
def test_drawing_ahead_changes_no_greedy_answer(retry: str, memory: str) -> None:
    model, played, budget = eager_to_delete(tiny()), rules(memory, retry), Budget(answer=10, actions=40, deletes=15)
    once, ahead = (Engine(model, played, rows=7, ahead=count).run(some_prompts(24), budget, GREEDY) for count in (1, 3))
    assert sum(rollout.deletes for rollout in once) > 40
    for a, b in zip(once, ahead, strict=True):
        assert (a.actions, a.end, a.forward_passes) == (b.actions, b.end, b.forward_passes)
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_a_learned_prompt_is_refused() -> None:
    """Its virtual tokens would be left out in silence."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"a learned prompt.*use LoRA"):
        Engine(get_peft_model(tiny(), config), rules("erase", "free"))


@pytest.mark.parametrize("retry", ["free", "ban"])
def test_drawing_ahead_takes_equally_likely_actions_in_the_same_order(retry: str) -> None:
    """bf16 has many of them."""
    model, played, budget = eager_to_delete(tiny()).to(torch.bfloat16), rules("erase", retry), Budget(10, 40)
    once, ahead = (Engine(model, played, rows=7, ahead=count).run(some_prompts(24), budget, GREEDY) for count in (1, 8))
    assert [rollout.actions for rollout in once] == [rollout.actions for rollout in ahead]
    ties = torch.zeros(2, 2000).log_softmax(-1)
    assert draw(ties, GREEDY, count=5).tolist() == [[0, 1, 2, 3, 4]] * 2
    assert draw(ties.bfloat16().float(), GREEDY).tolist() == [[0]] * 2


@pytest.mark.parametrize("retry", ["free", "ban"])
def test_what_is_drawn_ahead_is_drawn_from_what_is_legal(retry: str) -> None:
    """Short traces are as frequent as the naive decoder says they are likely, those that came back here too."""
    vocab, words = 8, {7: "token"}
    model = tiny(vocab_size=vocab)
    with torch.no_grad():
        model.lm_head.bias = torch.nn.Parameter(2.0 * (torch.arange(vocab) == 7))
    played, budget, prompt = Rules(words, frozenset([EOS]), "erase", retry), Budget(answer=3, actions=5), [4, 3]  # type: ignore[arg-type]
    count = 20_000
    engine = Engine(model, played, rows=512)
    rollouts = engine.run([prompt] * count, budget, Sampling(1.5), torch.Generator().manual_seed(0))
    counts = Counter(tuple(rollout.actions) for rollout in rollouts)
    found, expected = [], []

    @functools.cache
    def likely(context: tuple[int, ...], forbidden: frozenset[int]) -> list[float]:
        return naive.logprobs(model, context, set(forbidden), 1.5).tolist()

    for trace, often in counts.items():
        slow, chance = naive.Naive(played, budget), 0.0
        for action in trace:
            chance += likely((*prompt, *slow.context()), frozenset(slow.forbidden()))[action]
            slow.press(action)
        if count * math.exp(chance) >= 20:
            found.append(often)
            expected.append(count * math.exp(chance))
    came_back = sum(often for trace, often in counts.items() if 7 in trace[:-1])
    assert came_back > count / 5 and sum(found) > 0.7 * count
    found, expected = [*found, count - sum(found)], [*expected, count - sum(expected)]
    assert scipy.stats.chisquare(found, expected).pvalue > 1e-3


def test_what_is_left_too_little_of_is_drawn_anew() -> None:
    def drawn(*chances: float, illegal: Sequence[int] = ()) -> Ahead:
        """3, 4, 5, ... with these probabilities, then the delete token 9, which has 0.04."""
        tokens, logprobs = [*range(3, 3 + len(chances)), 9], [math.log(p) for p in (*chances, 0.04)]
        return Ahead(np.array([tokens]), np.array([logprobs]), [list(illegal)], len(chances), greedy=False, values=[])

    some = drawn(0.5, 0.3, 0.1)
    assert some.next(0, 1, []) == (1, pytest.approx(math.log(0.3)))
    assert some.next(0, 1, [3]) == (1, pytest.approx(math.log(0.6)))
    assert some.next(0, 2, [3, 2]) is None  # nobody knows how likely 2 was
    assert some.next(0, 2, [3, 4]) == (2, pytest.approx(math.log(0.5)))
    assert some.next(0, 3, [3, 4]) is None  # no more
    assert drawn(0.5, 0.3).next(0, 1, [3, 9]) == (1, pytest.approx(math.log(0.3 / 0.46)))
    assert drawn(0.97, 0.01).next(0, 1, [3]) is None
    assert drawn(0.5, 0.3, illegal=[7]).next(0, 1, []) is None  # more is legal than was


class RuledOut(torch.nn.Linear):
    """A head by which the first two tokens never come."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat((super().forward(hidden)[..., :2] - torch.inf, super().forward(hidden)[..., 2:]), -1)


@pytest.mark.parametrize(
    "sampling", [Sampling(delete_bias=-math.inf), Sampling(0, delete_bias=-math.inf), RandomDeletes(rates=((3, 0.0),))]
)
def test_where_only_a_blocked_delete_is_left_the_rollout_is_stuck(sampling: Sampling) -> None:
    model, played = tiny(vocab_size=4), Rules({3: "token"}, frozenset([1]), "erase", "ban")
    engine = Engine(model, played)
    head = RuledOut(32, 4, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    (rollout,) = engine.run([[2]], Budget(6, 30), sampling, begun=[[2, 2, 3]])  # 2 is banned
    assert (rollout.actions, rollout.end) == ([2, 2, 3], "stuck")
