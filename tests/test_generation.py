"""`rl_backspace.generate` through transformers: its own outputs without deletes, and with them the naive ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from conftest import DELETE, EOS, VOCAB, tiny
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    LogitsProcessor,
    StoppingCriteria,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
    TextIteratorStreamer,
)
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer

import rl_backspace
from rl_backspace.errors import UserError
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Rules, replay

SYNTHID = SynthIDTextWatermarkingConfig(keys=[1, 2, 3], ngram_len=3)
WORDS = {DELETE: "token", DELETE - 1: 3, DELETE - 2: "answer"}
PAD = 0


def rules(memory: str = "erase", retry: str = "ban") -> Rules:
    return Rules(WORDS, frozenset([EOS]), memory, retry)  # type: ignore[arg-type]


def model_of(family: str = "Llama", seed: int = 0, eager: bool = True, **options: Any) -> Any:
    """A random model; `eager`: it deletes often."""
    model = tiny(family, seed, **options)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    if eager:
        with torch.no_grad():
            model.get_output_embeddings().weight[DELETE - 2 :] *= 2
    return model


def batch(count: int = 5, seed: int = 0, right: bool = False) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Prompts of different lengths, and what a tokenizer makes of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 9, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, VOCAB - 3, (length,), generator=generator).tolist() for length in lengths]
    ids = torch.full((count, max(lengths)), PAD)
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        columns = slice(0, len(prompt)) if right else slice(ids.shape[1] - len(prompt), None)
        ids[i, columns], mask[i, columns] = torch.tensor(prompt), 1
    return prompts, {"input_ids": ids, "attention_mask": mask}


def ours(model: Any, inputs: dict[str, Tensor], delete: Rules | None = None, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": 10, "return_dict_in_generate": True, **options}
    return model.generate(**inputs, custom_generate=rl_backspace.generate, delete=delete or rules(), **options)


def both(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """Ours with the token blocked, and transformers' with it suppressed, from the same seed."""
    options = {"do_sample": False, "max_new_tokens": 10, **options}
    torch.manual_seed(3)
    here = model.generate(**inputs, custom_generate=rl_backspace.generate, delete=rules(), max_deletes=0, **options)
    torch.manual_seed(3)
    return here, model.generate(**inputs, suppress_tokens=sorted(WORDS), **options)


@pytest.mark.parametrize("do_sample", [False, True])
def test_blocked_it_is_transformers_own_on_every_family(family: str, do_sample: bool) -> None:
    _, inputs = batch()
    here, there = both(model_of(family), inputs, do_sample=do_sample)
    assert torch.equal(here, there)


OPTIONS: dict[str, dict[str, Any]] = {
    "repetition": {"repetition_penalty": 1.7},
    "ngrams": {"no_repeat_ngram_size": 2},
    "least": {"min_new_tokens": 6},
    "bias": {"sequence_bias": [[[5, 6], 4.0], [[EOS], 3.0]]},
    "words": {"bad_words_ids": [[7], [8, 9]]},
    "forced": {"forced_eos_token_id": EOS},
    "decay": {"exponential_decay_length_penalty": (2, 1.5)},
    "no eos": {"eos_token_id": []},
    "another eos": {"eos_token_id": [EOS, 9]},
    "sampled": {"do_sample": True},
    "warped": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2},
    "more warped": {"do_sample": True, "min_p": 0.05, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    "several": {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
    "long": {"max_length": 21, "max_new_tokens": None},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_transformers_options_mean_what_they_mean_there(options: dict[str, Any]) -> None:
    for seed in range(3):
        here, there = both(model_of(seed=seed), batch(7, seed)[1], **options)
        assert torch.equal(here, there)


def test_prompts_without_a_mask_and_without_padding_are_fine() -> None:
    ids = torch.randint(3, VOCAB - 3, (4, 5))
    here, there = both(model_of(), {"input_ids": ids})
    assert torch.equal(here, there)


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
@pytest.mark.parametrize("retry", ["free", "ban"])
def test_with_deletes_it_is_the_naive_one(memory: str, retry: str) -> None:
    model, played = model_of(), rules(memory, retry)
    prompts, inputs = batch(8)
    out = ours(model, inputs, played, max_actions=24)
    assert sum(rollout.deletes for rollout in out.rollouts) > 10
    longest = max(len(rollout.visible) for rollout in out.rollouts)
    for i, (prompt, rollout) in enumerate(zip(prompts, out.rollouts, strict=True)):
        slow = naive.greedy(model, prompt, played, Budget(10, 24))
        assert (rollout.actions, rollout.visible) == (slow.history, slow.cells)
        padding = [PAD] * (longest - len(slow.cells))
        assert out.sequences[i].tolist() == [*inputs["input_ids"][i].tolist(), *slow.cells, *padding]


def test_with_deletes_it_is_the_naive_one_on_every_family(family: str) -> None:
    model = model_of(family)
    prompts, inputs = batch(4)
    out = ours(model, inputs, max_new_tokens=6, max_actions=15)
    for prompt, rollout in zip(prompts, out.rollouts, strict=True):
        assert rollout.actions == naive.greedy(model, prompt, rules(), Budget(6, 15)).history


def test_padding_on_the_right_is_as_good() -> None:
    model = model_of()
    left, right = (ours(model, batch(right=side)[1], repetition_penalty=1.5) for side in (False, True))
    assert [r.actions for r in left.rollouts] == [r.actions for r in right.rollouts]
    width = batch()[1]["input_ids"].shape[1]
    assert torch.equal(left.sequences[:, width:], right.sequences[:, width:])
    assert torch.equal(right.sequences[:, :width], batch(right=True)[1]["input_ids"])


class Shy(LogitsProcessor):
    """Forbids what is visible already, and notes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen += input_ids.tolist()
        return scores.scatter(1, input_ids, -torch.inf)


def test_processors_and_criteria_see_what_is_visible() -> None:
    model = model_of()
    prompts, inputs = batch(6)

    class Four(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            seen.extend(input_ids.tolist())
            return (input_ids[:, width:] > 20).sum(-1) >= 2

    seen: list[list[int]] = []
    width = inputs["input_ids"].shape[1]
    shy = Shy()
    out = ours(model, inputs, max_actions=24, logits_processor=[shy], stopping_criteria=[Four()])
    stopped = 0
    for i, (prompt, rollout) in enumerate(zip(prompts, out.rollouts, strict=True)):
        slow, before = naive.Naive(rules(), Budget(10, 24)), inputs["input_ids"][i].tolist()
        while not slow.over():
            assert [*before, *slow.cells] in shy.seen
            forbidden = slow.forbidden() | {*before, *slow.cells}
            slow.press(int(naive.logprobs(model, [*prompt, *slow.context()], forbidden).argmax()))
            assert slow.over() or [*before, *slow.cells] in seen
            if sum(token > 20 for token in slow.cells) >= 2 and not slow.over():
                stopped += 1
                assert rollout.end == "stop"
                break
        assert rollout.actions == slow.history
    assert stopped > 0
    everything = {tuple(row[width:]) for row in (*shy.seen, *seen)}
    assert not any(set(row) & set(WORDS) for row in everything)  # nobody is shown a delete token


def test_a_prefix_function_is_told_the_right_row() -> None:
    _, inputs = batch(5)

    def only(row: int, ids: Tensor) -> list[int]:
        return [3 + 2 * row, 4 + 2 * row, EOS, *WORDS]

    out = ours(model_of(), inputs, prefix_allowed_tokens_fn=only, max_actions=25)
    assert sum(r.deletes for r in out.rollouts) > 0
    for row, rollout in enumerate(out.rollouts):
        assert set(rollout.actions) <= set(only(row, inputs["input_ids"][0]))


@pytest.mark.parametrize("do_sample", [False, True])
def test_rows_that_nothing_is_left_for_end_with_the_reason(do_sample: bool) -> None:
    _, inputs = batch(3)
    width = inputs["input_ids"].shape[1]

    class Once(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores if input_ids.shape[1] < width + 2 else torch.full_like(scores, -torch.inf)

    out = ours(model_of(eager=False), inputs, logits_processor=[Once()], do_sample=do_sample, max_deletes=0)
    assert [rollout.end for rollout in out.rollouts if len(rollout.visible) == 2] == ["stuck"] * 3


def test_sampling_is_distributed_as_the_naive_policy() -> None:
    """Two actions of one prompt, drawn often, against their exact probabilities; processors included."""
    model, played = model_of(seed=4), rules("erase", "ban")
    prompt, count = [5, 6, 7], 4000
    torch.manual_seed(0)
    ids = torch.tensor([prompt]).repeat(count, 1)
    out = ours(model, {"input_ids": ids}, played, do_sample=True, temperature=0.8, max_new_tokens=2, max_actions=3)
    budget = Budget(2, 3)
    drawn: dict[tuple[int, ...], int] = {}
    for rollout in out.rollouts:
        drawn[tuple(rollout.actions[:2])] = drawn.get(tuple(rollout.actions[:2]), 0) + 1
    slow = naive.Naive(played, budget)
    first = naive.logprobs(model, prompt, slow.forbidden(), 0.8).exp()
    common = sorted(drawn, key=lambda pair: -drawn[pair])[:5]
    for pair in common:
        slow = naive.Naive(played, budget)
        slow.press(pair[0])
        chance = float(first[pair[0]])
        if len(pair) > 1:
            chance *= float(naive.logprobs(model, [*prompt, *slow.context()], slow.forbidden(), 0.8).exp()[pair[1]])
        spread = (chance * (1 - chance) / count) ** 0.5
        assert abs(drawn[pair] / count - chance) < 5 * spread


class Kept(LogitsProcessor):
    """Multiplies by two, and brings what was forbidden back."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.clamp(min=0.0) * 2


def test_sampling_with_processors_and_deletes_is_distributed_as_it_should_be() -> None:
    """The second action of one prompt, drawn often: processors, a bias and what is illegal all tell."""
    model, played, budget = model_of(seed=4), rules("erase", "ban"), Budget(3, 5)
    prompt, count, bias = [5, 6, 7], 4000, 1.5
    torch.manual_seed(0)
    out = ours(
        model,
        {"input_ids": torch.tensor([prompt]).repeat(count, 1)},
        played,
        do_sample=True,
        max_new_tokens=3,
        max_actions=5,
        delete_bias=bias,
        logits_processor=[Kept()],
    )
    traces = [rollout.actions for rollout in out.rollouts]
    first = max({trace[0] for trace in traces}, key=lambda token: sum(trace[0] == token for trace in traces))
    slow = naive.Naive(played, budget)
    slow.press(first)
    scores = naive.logprobs(model, [*prompt, first], slow.forbidden())
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, first]])).logits[0, -1]
    logits[sorted(WORDS)] += bias
    expected = (logits.clamp(min=0.0) * 2).masked_fill(scores == -torch.inf, -torch.inf).softmax(-1)
    after = [trace[1] for trace in traces if trace[0] == first]
    assert len(after) > 300 and sum(expected[sorted(WORDS)]) > 0.1
    seen = torch.bincount(torch.tensor(after), minlength=VOCAB) / len(after)
    assert (seen - expected).abs().max() < 5 * (0.25 / len(after)) ** 0.5
    for rollout in out.rollouts:
        assert rollout.end != "stuck"  # as rows are that choose what is illegal


def test_logprobs_are_the_policys_own_whatever_warps_the_choice() -> None:
    model = model_of()
    prompts, inputs = batch(4)
    out = ours(model, inputs, do_sample=True, temperature=0.5, top_k=3, repetition_penalty=1.4, max_actions=20)
    for prompt, rollout in zip(prompts, out.rollouts, strict=True):
        slow = naive.Naive(rules(), Budget(10, 20))
        for action, logprob in zip(rollout.actions, rollout.logprobs, strict=True):
            expected = naive.logprobs(model, [*prompt, *slow.context()], slow.forbidden())[action]
            assert logprob == pytest.approx(expected.item(), abs=2e-4)
            slow.press(action)


class Deaf(StoppingCriteria):
    """Ends row i where it holds the token that it waits for; told of rows by their place."""

    def __init__(self, width: int, wanted: list[int]):
        self.width, self.wanted = width, wanted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = zip(input_ids[:, self.width :].tolist(), self.wanted, strict=True)
        return torch.tensor([token in row for row, token in rows])


def test_criteria_are_shown_each_row_at_its_own_place() -> None:
    model, (_, inputs) = model_of(seed=1, eager=False), batch(6)
    width = inputs["input_ids"].shape[1]
    wanted = both(model, inputs, max_new_tokens=10)[1][:, width + 3].tolist()
    here, there = both(model, inputs, stopping_criteria=[Deaf(width, wanted)])
    assert torch.equal(here, there) and here.shape[1] < width + 10


@pytest.mark.parametrize("more", [3, 15])
def test_length_and_end_criteria_of_ones_own_are_heard(more: int) -> None:
    model, (_, inputs) = model_of(), batch()
    width = inputs["input_ids"].shape[1]
    for own in (MaxLengthCriteria(width + more), EosTokenCriteria(list(range(9 + more, 28)))):
        here, there = both(model, inputs, stopping_criteria=[own])
        assert torch.equal(here, there)


def test_a_processor_may_return_another_dtype() -> None:
    class Half(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.half()

    _, inputs = batch(3)
    assert all(r.visible for r in ours(model_of(), inputs, logits_processor=[Half()], do_sample=True).rollouts)


def test_a_subclass_of_a_known_warper_is_shown_ids() -> None:
    class Cooling(TemperatureLogitsWarper):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores / input_ids.shape[1]

    here, there = both(model_of(), batch()[1], do_sample=True, logits_processor=[Cooling(2.0)])
    assert torch.equal(here, there)


def test_processors_that_give_no_numbers_are_named_and_not_called_stuck() -> None:
    class Broken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores * torch.nan

    _, inputs = batch()
    for do_sample in (False, True):
        said = refused(lambda: ours(model_of(), inputs, logits_processor=[Broken()], do_sample=do_sample))  # noqa: B023
        assert said.startswith("logits_processor: ")
        broken = model_of()
        ours(broken, inputs, do_sample=do_sample)  # it passes the engine's check
        with torch.no_grad():
            broken.get_output_embeddings().weight[3] = torch.nan
        said = refused(lambda: ours(broken, inputs, do_sample=do_sample))  # noqa: B023
        assert said.startswith("the model's logits are not numbers")
        with torch.no_grad():
            broken.get_output_embeddings().weight[3] = 0.0
            broken.get_output_embeddings().bias = torch.nn.Parameter(torch.full((VOCAB,), -1.0))
            broken.get_output_embeddings().bias[3] = torch.inf
        said = refused(lambda: ours(broken, inputs, do_sample=do_sample))  # noqa: B023
        assert said.startswith("the model's logits are not numbers")


def test_the_bias_moves_how_readily_it_deletes() -> None:
    _, inputs = batch(16)
    deletes = [
        sum(r.deletes for r in ours(model_of(), inputs, delete_bias=bias, max_actions=30).rollouts)
        for bias in (-100.0, 0.0, 100.0)
    ]
    assert deletes[0] == 0 < deletes[1] < deletes[2]


def test_limits_are_kept() -> None:
    _, inputs = batch(12)
    for rollout in ours(model_of(), inputs, max_actions=9, max_deletes=2, max_new_tokens=7).rollouts:
        assert len(rollout.actions) <= 9 and rollout.deletes <= 2 and len(rollout.visible) <= 7
    longest = max(len(rollout.actions) for rollout in ours(model_of(), inputs, max_new_tokens=4).rollouts)
    assert 4 < longest <= 12  # three times the visible tokens


def test_a_wrapped_model_generates_as_the_bare_one() -> None:
    model = model_of()
    _, inputs = batch()
    expected = ours(model, inputs).rollouts
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert [r.actions for r in ours(wrapped, inputs).rollouts] == [r.actions for r in expected]
    wrapped.train()
    ours(wrapped, inputs)
    assert model.training and all(part.training for part in wrapped.modules())


def test_rules_may_stand_in_the_generation_config() -> None:
    model = model_of()
    _, inputs = batch()
    expected = ours(model, inputs).sequences
    model.generation_config.backspace = {
        "tokens": {"a": "token", "b": 3, "c": "answer"},
        "ids": {"a": DELETE, "b": DELETE - 1, "c": DELETE - 2},
        "memory": "erase",
        "retry": "ban",
        "boundaries": [],
        "eos": [EOS],
    }
    out = model.generate(**inputs, custom_generate=rl_backspace.generate, do_sample=False, max_new_tokens=10)
    assert torch.equal(out, expected)
    assert torch.equal(ours(model, inputs, model.generation_config.backspace).sequences, expected)
    like = SimpleNamespace(**{its.name: getattr(rules(), its.name) for its in fields(Rules)})
    assert torch.equal(ours(model, inputs, like).sequences, expected)  # type: ignore[arg-type]


def test_what_an_export_suppresses_for_others_is_not_suppressed_here() -> None:
    model, (_, inputs) = model_of(), batch()
    expected, config = ours(model, inputs), model.generation_config
    config.suppress_tokens, config.backspace = [7, *WORDS], {"suppressed": sorted(WORDS)}
    out = ours(model, inputs)
    assert sum(rollout.deletes for rollout in out.rollouts) > 0
    assert not any(7 in rollout.actions for rollout in out.rollouts)
    assert sum(r.deletes for r in ours(model, inputs, suppress_tokens=[DELETE, DELETE - 1, DELETE - 2]).rollouts) == 0
    config.suppress_tokens = sorted(WORDS)
    assert [r.actions for r in ours(model, inputs).rollouts] == [r.actions for r in expected.rollouts]
    stock = model.generate(**inputs, do_sample=False, max_new_tokens=10)
    assert not set(stock[:, inputs["input_ids"].shape[1] :].flatten().tolist()) & set(WORDS)


def test_positions_are_the_default_ones() -> None:
    model, (_, inputs) = model_of(), batch()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert torch.equal(*(ours(model, {**inputs, **given}).sequences for given in ({}, {"position_ids": positions})))
    assert "position_ids: got others" in refused(lambda: ours(model, {**inputs, "position_ids": positions + 1}))


def test_stop_strings_are_a_criterion() -> None:
    tokenizer = character_tokenizer()
    model, played = model_of(vocab_size=len(tokenizer) + 2), Rules({len(tokenizer): "token"}, frozenset([EOS]))
    inputs = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 10]])}
    free = ours(model, inputs, played, max_new_tokens=30, max_deletes=0)
    text = tokenizer.decode(free.rollouts[0].visible[:6])
    out = ours(
        model,
        inputs,
        played,
        max_new_tokens=30,
        max_deletes=0,
        stopping_criteria=[StopStringCriteria(tokenizer, [text[-1]])],
    )
    assert out.rollouts[0].end == "stop" and tokenizer.decode(out.rollouts[0].visible).endswith(text[-1])


# streams


class Recorder(BaseStreamer):
    def __init__(self) -> None:
        self.got: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


class Watcher:
    """An action streamer."""

    def __init__(self) -> None:
        self.actions: list[int] = []
        self.rules: Rules | None = None
        self.ended = False

    def begin(self, rules: Rules) -> None:
        self.rules = rules

    def put_action(self, action: int) -> None:
        self.actions.append(action)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_is_a_stream_and_has_the_prompt_once() -> None:
    model, ids = model_of(), torch.tensor([[5, 6, 7]])
    there, here = Recorder(), Recorder()
    expected = ours(model, {"input_ids": ids}, stream=there).sequences
    assert torch.equal(ours(model, {"input_ids": ids}, streamer=here).sequences, expected)
    assert here.got == there.got and here.ended
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    again = Recorder()
    ours(wrapped, {"input_ids": ids}, streamer=again)
    assert again.got == there.got and again.ended
    assert "expected one of them" in refused(
        lambda: ours(model, {"input_ids": ids}, streamer=Recorder(), stream=Recorder())
    )


class Unready(Watcher):
    def begin(self, rules: Rules) -> None:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    "options",
    [
        {"max_actions": 0},
        {"num_beams": 2},
        {"max_new_tokens": 500, "max_actions": 500},
        {"delete_bias": float("nan")},
        {"delete": "/nowhere"},
    ],
)
@pytest.mark.parametrize("name", ["stream", "streamer"])
def test_a_stream_is_ended_whatever_is_refused(name: str, options: dict[str, Any]) -> None:
    stream = Recorder()
    if name == "streamer" and "num_beams" in options:
        pytest.skip("transformers refuses that itself")
    with pytest.raises(UserError):
        ours(model_of(), {"input_ids": torch.tensor([[5, 6, 7]])}, **{name: stream}, **options)
    assert stream.ended


def test_a_stream_that_cannot_begin_is_ended_too() -> None:
    stream = Unready()
    with pytest.raises(RuntimeError):
        ours(model_of(), {"input_ids": torch.tensor([[5, 6, 7]])}, stream=stream)
    assert stream.ended


@pytest.mark.parametrize("window", [None, 0, 1, 3])
def test_a_stream_is_given_what_no_delete_can_reach_and_in_the_end_all(window: int | None) -> None:
    deletes = 0
    for seed in range(6):
        model, stream = model_of(seed=seed), Recorder()
        ids = torch.tensor([[5, 6, 7 + seed]])
        out = ours(model, {"input_ids": ids}, stream=stream, window=window, max_actions=25)
        (rollout,) = out.rollouts
        deletes += rollout.deletes
        assert stream.got[0] == ids[0].tolist() and stream.ended
        assert [token for tokens in stream.got[1:] for token in tokens] == rollout.visible
        replay(rollout.actions, rules(), Budget(10, 25, window=window))  # no delete reached further than it may
    assert (deletes > 0) == (window != 0)


def test_a_stream_shows_final_text_while_the_rest_is_still_written() -> None:
    model, shown = model_of(eager=False), []

    class Clock(Recorder):
        def put(self, value: Tensor) -> None:
            super().put(value)
            shown.append(steps[0])

    steps = [0]
    stream = Clock()
    original = model.base_model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        return original(*args, **kwargs)

    model.base_model.forward = counting
    ours(model, {"input_ids": torch.tensor([[5, 6, 7]])}, stream=stream, window=2, max_deletes=0, eos_token_id=[])
    assert len(set(shown)) > 5  # at different times, not all at once
    assert [len(tokens) for tokens in stream.got[1:]] == [1] * 10


def test_an_action_stream_is_told_of_every_action() -> None:
    stream = Watcher()
    out = ours(model_of(), {"input_ids": torch.tensor([[5, 6, 7]])}, stream=stream, max_actions=25)
    assert stream.actions == out.rollouts[0].actions and stream.ended and stream.rules == rules()
    assert out.rollouts[0].deletes > 0


def test_transformers_own_streamer_reads_the_text() -> None:
    tokenizer = character_tokenizer()
    model = model_of(vocab_size=len(tokenizer) + 2)
    stream = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    played = Rules({len(tokenizer): "token"}, frozenset([EOS]), "erase", "ban")
    out = ours(model, {"input_ids": torch.tensor([[5, 6, 7]])}, played, stream=stream, window=2)
    assert "".join(stream) == tokenizer.decode(out.rollouts[0].visible, skip_special_tokens=True)


def test_whoever_waits_for_a_stream_is_not_left_waiting() -> None:
    stream = Recorder()

    class Broken(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        ours(model_of(), {"input_ids": torch.tensor([[5, 6]])}, stream=stream, logits_processor=[Broken()])
    assert stream.ended


# refusals


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_beams": 2}, "num_beams: got 2, but beams cannot delete"),
        ({"output_scores": True}, "output_scores: got True"),
        ({"max_actions": 0}, "max_actions: got 0; expected 1 or more"),
        ({"max_deletes": -1}, "max_deletes: got -1; expected 0 or more"),
        ({"window": -1}, "window: got -1; expected 0 or more"),
        ({"guidance_scale": 1.5}, "guidance_scale: guidance"),
        ({"max_new_tokens": 500, "max_actions": 500, "delete": rules("keep")}, "the model's limit is 128"),
        ({"prompt_lookup_num_tokens": 3}, "cannot delete; expected greedy or sampling"),
        ({"stream": Recorder()}, "stream: got 5 prompts; expected one"),
        ({"delete": Rules({VOCAB: "token"}, frozenset([EOS]))}, f"token {VOCAB} is not among the model's {VOCAB}"),
        ({"delete": "/nowhere"}, "delete: no delete.json of a policy at '/nowhere'"),
        ({"delete": {"tokens": {}}}, "rules of a delete token: ids is missing"),
        ({"delete_bias": float("inf")}, "delete_bias: got inf"),
        ({"watermarking_config": SYNTHID, "do_sample": True}, "SynthID keeps a state"),
        ({"delete": None}, "delete: got None, and the model's generation config does not say"),
    ],
)
def test_what_has_no_meaning_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    _, inputs = batch()
    options = {"delete": rules(), "max_new_tokens": 8, **options}
    assert said in refused(lambda: model_of().generate(**inputs, custom_generate=rl_backspace.generate, **options))


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_an_answer_is_no_longer_than_the_context_has_room_for(memory: str) -> None:
    """A pipeline asks for 256 tokens of any model."""
    model = model_of(eager=False)
    prompt = torch.randint(3, VOCAB - 3, (1, 100))
    (rollout,) = ours(model, {"input_ids": prompt}, rules(memory), max_new_tokens=256, eos_token_id=[30]).rollouts
    assert len(rollout.visible) <= 28 and rollout.end in ("length", "eos", "budget")
    full = torch.randint(3, VOCAB - 3, (1, 128))
    assert "the longest prompt has 128 tokens" in refused(lambda: ours(model, {"input_ids": full}, rules(memory)))


def test_a_prompt_of_padding_alone_is_refused() -> None:
    _, inputs = batch()
    inputs["attention_mask"][2] = 0
    assert "a prompt has no tokens" in refused(lambda: ours(model_of(), inputs))
