"""`model.generate(**inputs, custom_generate=rl_backspace.generate)`: Hugging Face's `generate`, with deletes.

transformers prepares prompts, logits processors and stopping criteria as for its own sampling; this takes their
place in the engine. Processors and criteria are given what a rollout shows, deletes applied, behind the prompt
as it came, and have to be functions of that. With the token blocked, what comes out is what `generate` gives:
greedy the same tokens, and sampled too, for it draws the same random numbers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, cached_file

from rl_backspace.engine import Engine, Rollout, Running, Sampling
from rl_backspace.errors import UserError, first_line
from rl_backspace.semantics import ACTIONS_PER_TOKEN, SEMANTICS_FILE, Budget, Machine, Rules

IN_CONFIG = "backspace"  # what a generation config calls the content of SEMANTICS_FILE
REFUSED = {
    "num_beams": (1, "beams cannot delete"),
    "output_scores": (False, "`rollouts` has the log-probability of each action"),
    "output_logits": (False, "`rollouts` has the log-probability of each action"),
    "output_attentions": (False, "they are not kept"),
    "output_hidden_states": (False, "they are not kept"),
}  # options of GenerationConfig that are not what they are without deletes: the value to leave them at, and why
WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # look at scores alone
IGNORED = {"attention_mask", "position_ids", "token_type_ids", "use_cache", "past_key_values", "logits_to_keep"}


@dataclass
class BackspaceOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: (B, P + T) the prompts as they came and what is visible behind them, padded on the right.
        rollouts: of each row, its actions with deletes and log-probabilities, and why it ended.
    """

    sequences: Tensor | None = None
    rollouts: list[Rollout] | None = None


class ActionStreamer(Protocol):
    """A streamer that can take back what it showed."""

    def begin(self, rules: Rules) -> None: ...

    def put_action(self, action: int) -> None: ...

    def end(self) -> None: ...


def generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    delete: Rules | str | Path | None = None,
    max_actions: int | None = None,
    max_deletes: int | None = None,
    delete_bias: float = 0.0,
    window: int | None = None,
    stream: BaseStreamer | ActionStreamer | None = None,
    **model_kwargs: Any,
) -> BackspaceOutput | Tensor:
    """What `model.generate(..., custom_generate=generate)` calls; its arguments are given to `model.generate`.

    Prompts (B, P) may be padded on either side. `max_new_tokens` counts visible tokens, and nearly all else that
    `generate` takes means what it means there; `streamer`, which transformers keeps to itself, is `stream` here.

    Args:
        delete: what the model's delete tokens do: `Rules`, or the folder or hub id of an adapter or model that was
            saved with them; None where the model's own generation config says it, as an exported one's does.
        max_actions: most actions per answer, deletes included; default: three times the visible tokens.
        max_deletes: most deletes per answer; 0 turns deleting off.
        delete_bias: is added to the logits of delete tokens: above 0 the model deletes more readily.
        window: how many tokens back a delete can reach; what lies further back is final, so a stream can show it.
        stream: for one prompt at a time: transformers' streamers are given text once it is final, with `window=None`
            in the end; an `ActionStreamer` is told of each action.

    Returns:
        As `generate` does, (B, P + T) token ids, padded on the right; or `BackspaceOutput`.

    Raises:
        UserError: an option that has no meaning with deletes, no room for the answer in the model's context, or
            nothing known of the delete tokens.
    """
    _check_options(generation_config, logits_processor, model_kwargs)
    rules = rules_of(model, delete)
    if generation_config._eos_token_tensor is not None:  # as in `generate`, what this call ends with
        rules = replace(rules, eos=frozenset(generation_config._eos_token_tensor.tolist()))
    budget = _budget(generation_config.max_length - input_ids.shape[1], max_actions, max_deletes, window)
    prompts, padded = _prompts(input_ids, model_kwargs.get("attention_mask"))
    sampling = HuggingFace(
        delete_bias=delete_bias,
        do_sample=generation_config.do_sample,
        processors=logits_processor,
        criteria=StoppingCriteriaList(
            c for c in stopping_criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))
        ),
        prompts=padded,
    )
    engine = Engine(model, rules, rows=len(prompts))
    if stream is None:
        rollouts = engine.run(prompts, budget, sampling)
    elif len(prompts) > 1:
        raise UserError(f"stream: got {len(prompts)} prompts; expected one, since a stream shows one answer")
    else:
        feed = Feed(stream, rules, budget, input_ids)
        try:
            rollouts = engine.run(prompts, budget, sampling, on_action=feed)
        finally:
            feed.end()  # whoever waits for it is not left waiting
    pad = generation_config._pad_token_tensor
    sequences = _sequences(input_ids, rollouts, 0 if pad is None else int(pad))
    return BackspaceOutput(sequences, rollouts) if generation_config.return_dict_in_generate else sequences


@dataclass(frozen=True)
class HuggingFace(Sampling):
    """Actions drawn as transformers' `generate` draws tokens: the same processors, the same random numbers.

    Args:
        do_sample: False: greedy.
        processors, criteria: given visible ids, each row behind its prompt; rows of equal length together.
        prompts: as the caller gave them, padding in front.
    """

    do_sample: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    prompts: list[list[int]] = field(default_factory=list)

    def choose(
        self, logits: Tensor, logprobs: Tensor, rows: Sequence[Running], generator: torch.Generator | None
    ) -> Tensor:
        scores = logits
        if self.processors:
            scores = self._process(logits, rows).masked_fill(logits == -torch.inf, -torch.inf)
        impossible = scores.amax(-1) == -torch.inf
        if not self.do_sample:
            return scores.argmax(-1).masked_fill(impossible, -1)
        indices = [row.index for row in rows]
        probabilities = scores.new_ones(len(self.prompts), scores.shape[-1])  # `generate` draws for ended rows too
        probabilities[indices] = scores.masked_fill(impossible[:, None], 0.0).softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)[indices, 0]
        return drawn.masked_fill(impossible, -1)

    def stopped(self, rows: Sequence[Running]) -> Sequence[bool]:
        ended = [False] * len(rows)
        for places, ids in self._ids(rows, None) if self.criteria else ():
            for place, stop in zip(places, self.criteria(ids, None).tolist(), strict=True):
                ended[place] = stop
        return ended

    def _ids(self, rows: Sequence[Running], device: torch.device | None) -> Iterator[tuple[list[int], Tensor]]:
        """The ids (n, L) of the rows of each length, in the prompts' order, and their places among all."""
        by_length: dict[int, list[int]] = {}
        for place in sorted(range(len(rows)), key=lambda place: rows[place].index):
            by_length.setdefault(len(rows[place].machine.visible), []).append(place)
        for places in by_length.values():
            ids = [[*self.prompts[rows[place].index], *rows[place].machine.visible] for place in places]
            yield places, torch.tensor(ids, device=device)

    def _process(self, logits: Tensor, rows: Sequence[Running]) -> Tensor:
        """Scores (n, V). Processors may count rows, so each stands at its own place in a batch of all."""
        if all(isinstance(processor, WARPERS) for processor in self.processors):
            return self.processors(None, logits)
        scores = logits.clone()
        for places, ids in self._ids(rows, logits.device):
            place_of = {rows[place].index: n for n, place in enumerate(places)}
            everyone = [place_of.get(index, 0) for index in range(len(self.prompts))]
            processed = self.processors(ids[everyone], logits[places][everyone])
            scores[places] = processed[list(place_of)]
        return scores


class Feed:
    """Tells a stream of one rollout's actions, as `Engine.run` tells of them; `prompt`: (1, P) token ids."""

    def __init__(self, stream: Any, rules: Rules, budget: Budget, prompt: Tensor):
        self.stream = stream
        self.machine = Machine(rules, budget)
        self.shown = 0
        self.is_told_all = hasattr(stream, "put_action")
        if self.is_told_all:
            stream.begin(rules)
        else:
            stream.put(prompt.cpu())

    def __call__(self, index: int, action: int) -> None:
        self.machine.step(action)
        if self.is_told_all:
            self.stream.put_action(action)
        else:
            self._show(self.machine.final)

    def end(self) -> None:
        if not self.is_told_all:
            self._show(len(self.machine.visible))
        self.stream.end()

    def _show(self, final: int) -> None:
        for token in self.machine.visible[self.shown : final]:
            self.stream.put(torch.tensor([token]))
        self.shown = max(self.shown, final)


def rules_of(model: Any, delete: Rules | str | Path | None) -> Rules:
    """What a model's delete tokens do, from `delete` of `generate`.

    Raises:
        UserError: nothing says it, or it is said of ids that the model does not have.
    """
    if isinstance(delete, Rules):
        rules = delete
    elif delete is None:
        saved = getattr(model.generation_config, IN_CONFIG, None)
        if saved is None:
            raise UserError(
                "delete: got None, and the model's generation config does not say what its delete tokens do; "
                "give the folder or hub id of the adapter, such as delete='runs/arith/adapter'"
            )
        rules = Rules.of(saved)
    else:
        rules = _read_rules(delete)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(rules.deletes, default=0) >= rows:
        raise UserError(
            f"delete: token {max(rules.deletes)} is not among the model's {rows}; load the adapter into the base it "
            "was trained on, or resize the embedding first"
        )
    return rules


def _read_rules(source: str | Path) -> Rules:
    try:
        return Rules.of(json.loads(Path(cached_file(str(source), SEMANTICS_FILE)).read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"delete: no {SEMANTICS_FILE} of a policy at {str(source)!r} ({first_line(error).rstrip('.')}); "
            "give the folder or hub id of an adapter or model that was trained to delete"
        ) from error


def _check_options(config: GenerationConfig, processors: LogitsProcessorList, model_kwargs: dict[str, Any]) -> None:
    for name, (expected, why) in REFUSED.items():
        if getattr(config, name, None) not in (expected, None):
            raise UserError(f"{name}: got {getattr(config, name)}, but {why}; leave it at {expected}")
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"generate: {config.get_generation_mode().value} cannot delete; expected greedy or sampling")
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
        raise UserError("guidance_scale: guidance keeps a cache that cannot take tokens back; leave it at None")
    unknown = sorted(name for name, value in model_kwargs.items() if name not in IGNORED and value is not None)
    if unknown:
        raise UserError(f"generate: the engine has no use for {', '.join(unknown)}; it takes text prompts alone")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError("past_key_values: got a cache with tokens in it; give all of the prompt as input_ids")


def _budget(answer: int, actions: int | None, deletes: int | None, window: int | None) -> Budget:
    for name, value, least in (
        ("max_new_tokens", answer, 1),
        ("max_actions", actions, 1),
        ("max_deletes", deletes, 0),
        ("window", window, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name}: got {value}; expected {least} or more")
    return Budget(answer, ACTIONS_PER_TOKEN * answer if actions is None else actions, deletes, window)


def _prompts(input_ids: Tensor, mask: Tensor | None) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts without padding, and as processors are given them: with all of it in front."""
    if mask is None:
        return input_ids.tolist(), input_ids.tolist()
    rows = list(zip(input_ids.tolist(), mask.bool().tolist(), strict=True))
    prompts = [[token for token, real in zip(ids, kept, strict=True) if real] for ids, kept in rows]
    pads = [[token for token, real in zip(ids, kept, strict=True) if not real] for ids, kept in rows]
    return prompts, [[*before, *prompt] for before, prompt in zip(pads, prompts, strict=True)]


def _sequences(input_ids: Tensor, rollouts: list[Rollout], pad: int) -> Tensor:
    longest = max(len(rollout.visible) for rollout in rollouts)
    answers = [[*rollout.visible, *[pad] * (longest - len(rollout.visible))] for rollout in rollouts]
    return torch.cat([input_ids, torch.tensor(answers, dtype=torch.long, device=input_ids.device)], dim=1)
