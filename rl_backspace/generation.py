"""`model.generate(**inputs, custom_generate=rl_backspace.generate)`: Hugging Face's `generate`, with deletes.

transformers prepares prompts, logits processors and stopping criteria as for its own sampling; this takes their
place in the engine. Processors and criteria are given what a rollout shows, deletes applied, behind the prompt
as it came, and have to be functions of that. With the token blocked, what comes out is what `generate` gives:
greedy the same tokens, and sampled too, for it draws the same random numbers; that is in float32, since in less
precision padding alone changes roundings, there as here.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import EosTokenCriteria, GenerationMixin, GenerationMode, MaxLengthCriteria
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput, cached_file

from rl_backspace.backbone import are_numbers
from rl_backspace.engine import Engine, Rollout, Running, Sampling
from rl_backspace.errors import UserError, first_line
from rl_backspace.semantics import ACTIONS_PER_TOKEN, SEMANTICS_FILE, Budget, Machine, Rules

IN_CONFIG = "backspace"  # what a generation config calls the content of SEMANTICS_FILE
SUPPRESSED = "suppressed"  # in there: ids in `suppress_tokens` for loaders that know nothing of deletes
REFUSED = {
    "num_beams": (1, "beams cannot delete"),
    "output_scores": (False, "`rollouts` has the log-probability of each action"),
    "output_logits": (False, "`rollouts` has the log-probability of each action"),
    "output_attentions": (False, "they are not kept"),
    "output_hidden_states": (False, "they are not kept"),
}  # options of GenerationConfig that are not what they are without deletes: the value to leave them at, and why
WARPERS = {
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
}  # look at scores alone
BY_ROW = WARPERS | {
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
}  # look at each row by itself, wherever it stands; others are shown a batch of all
STOCK_GENERATE = inspect.unwrap(GenerationMixin.generate).__code__
IGNORED = {"attention_mask", "position_ids", "token_type_ids", "use_cache", "past_key_values", "logits_to_keep"}


@dataclass
class BackspaceOutput(ModelOutput):
    """What `generate` returns with `return_dict_in_generate=True`.

    Attributes:
        sequences: (B, P + T) the prompts as they came and what is visible behind them, padded on the right.
        rollouts: of each row, its actions with deletes, why it ended, and log-probabilities: the policy's own, at
            temperature 1, before bias, processors and truncation.
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
    delete: Rules | Mapping[str, Any] | str | Path | None = None,
    max_actions: int | None = None,
    max_deletes: int | None = None,
    delete_bias: float = 0.0,
    window: int | None = None,
    stream: BaseStreamer | ActionStreamer | None = None,
    **model_kwargs: Any,
) -> BackspaceOutput | Tensor:
    """What `model.generate(..., custom_generate=generate)` calls; its arguments are given to `model.generate`.

    Prompts (B, P) may be padded on either side. `max_new_tokens` counts visible tokens, as many as the model's context
    has room for; nearly all else that `generate` takes means what it means there. transformers keeps `tokenizer` to
    itself, so that `stop_strings` needs `stopping_criteria=[StopStringCriteria(tokenizer, ["\\n"])]` in its place.

    Args:
        delete: what the model's delete tokens do: `Rules`, the content of a delete.json, or a run, or the folder or
            hub id of an adapter or model that was saved with them; None where the model's own generation config says
            it, as an exported one's does.
        max_actions: most actions per answer, deletes included; default: three times the visible tokens.
        max_deletes: most deletes per answer; 0 turns deleting off.
        delete_bias: is added to the logits of delete tokens: above 0 the model deletes more readily.
        window: how many tokens back a delete can reach; what lies further back is final, so a stream can show it.
        stream: for one prompt at a time: transformers' streamers are given text once it is final, with `window=None`
            in the end; an `ActionStreamer` is told of each action. `streamer` is the same.

    Returns:
        As `generate` does, (B, P + T) token ids, padded on the right; or `BackspaceOutput`.

    Raises:
        UserError: an option that has no meaning with deletes, no room for the answer in the model's context, or
            nothing known of the delete tokens.
    """
    streamer = _streamer_given(model)
    feed = Feed(streamer if stream is None else stream)
    try:
        if stream is not None and streamer is not None:
            streamer.end()
            raise UserError("streamer: got one, and a stream; expected one of them")
        rules = rules_of(model, delete)
        _check_options(generation_config, logits_processor, model_kwargs, may_delete=rules.deletes and max_deletes != 0)
        _check_positions(input_ids, model_kwargs)
        ends = [c.eos_token_id.tolist() for c in stopping_criteria if type(c) is EosTokenCriteria]
        if ends:  # as in `generate`, what this call ends with
            rules = replace(rules, eos=frozenset(token for ids in ends for token in ids))
        lengths = [c.max_length for c in stopping_criteria if type(c) is MaxLengthCriteria]
        answer = min(lengths, default=generation_config.max_length) - input_ids.shape[1]
        prompts, padded = _prompts(input_ids, model_kwargs.get("attention_mask"))
        engine = Engine(model, rules, rows=len(prompts))
        room = engine.room(prompts)
        if max_actions is None and 0 < room < answer:  # pipelines ask for 256 tokens of any model
            answer = room
        budget = _budget(answer, max_actions, max_deletes, window)
        sampling = HuggingFace(
            delete_bias=delete_bias,
            do_sample=generation_config.do_sample,
            processors=_unsuppressed(model, generation_config, logits_processor),
            criteria=StoppingCriteriaList(
                c for c in stopping_criteria if type(c) not in (EosTokenCriteria, MaxLengthCriteria)
            ),
            prompts=padded,
            device=input_ids.device,
            draw_all=not rules.deletes or max_deletes == 0,
        )
        if feed.stream is not None:
            if len(prompts) > 1:
                raise UserError(f"stream: got {len(prompts)} prompts; expected one, since a stream shows one answer")
            engine.capacity(prompts, budget)
            feed.begin(rules, budget, input_ids if stream is not None else None)
        rollouts = engine.run(prompts, budget, sampling, on_action=None if feed.stream is None else feed)
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
        device: of what processors and criteria are given: the caller's ids'.
        draw_all: draw for ended rows too, as `generate` does, without which its random numbers are others.
    """

    by_logits: ClassVar[bool] = True
    do_sample: bool = False
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    criteria: StoppingCriteriaList = field(default_factory=StoppingCriteriaList)
    prompts: list[list[int]] = field(default_factory=list)
    device: str | torch.device = "cpu"
    draw_all: bool = True

    def choose(
        self, logits: Tensor, logprobs: Tensor, rows: Sequence[Running], generator: torch.Generator | None
    ) -> Tensor:
        scores = logits.to(self.device)
        if self.processors:
            scores = self._process(scores, rows).masked_fill(scores == -torch.inf, -torch.inf)
        top = scores.amax(-1)
        numbers = top < torch.inf if self.do_sample else ~top.isnan()  # of logits that are none the engine tells
        possible = numbers & (top > -torch.inf)
        if self.processors and not numbers.all() and are_numbers(logits):
            raise UserError("logits_processor: got scores that are not numbers; expected numbers or -inf")
        chosen = self._draw(scores, possible, rows, generator) if self.do_sample else scores.argmax(-1)
        return chosen.masked_fill(~possible, -1).to(logits.device)

    def stopped(self, rows: Sequence[Running]) -> Sequence[bool]:
        ended = [False] * len(rows)
        for places, _, ids, kept in self._groups(rows, self.criteria) if self.criteria else ():
            for place, stop in zip(places, self.criteria(ids, None)[kept].tolist(), strict=True):
                ended[place] = stop
        return ended

    def _draw(
        self, scores: Tensor, possible: Tensor, rows: Sequence[Running], generator: torch.Generator | None
    ) -> Tensor:
        probabilities = scores.masked_fill(~possible[:, None], 0.0).softmax(-1)
        if not self.draw_all:
            return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        indices = [row.index for row in rows]
        everyone = scores.new_ones(len(self.prompts), scores.shape[-1])
        everyone[indices] = probabilities
        return torch.multinomial(everyone, 1, generator=generator)[indices, 0]

    def _process(self, scores: Tensor, rows: Sequence[Running]) -> Tensor:
        """Scores (n, V)."""
        if all(type(processor) in WARPERS for processor in self.processors):
            return self.processors(None, scores)
        out = scores.clone()
        for places, shown, ids, kept in self._groups(rows, self.processors):
            out[places] = self.processors(ids, scores[places][shown])[kept].to(out.dtype)
        return out

    def _groups(
        self, rows: Sequence[Running], for_whom: Sequence[Any]
    ) -> Iterator[tuple[list[int], list[int], Tensor, list[int]]]:
        """The rows of each length: their places among `rows`, which of them are shown, the ids (m, L) of those, and
        each one's place among these.

        Processors and criteria may count rows, so each stands at its own place in a batch of all, unless they are
        known not to; any other row of the length fills the places of those that are not of it.
        """
        by_length: dict[int, list[int]] = {}
        for place in sorted(range(len(rows)), key=lambda place: rows[place].index):
            by_length.setdefault(len(rows[place].machine.visible), []).append(place)
        for places in by_length.values():
            ids = [[*self.prompts[rows[place].index], *rows[place].machine.visible] for place in places]
            shown = kept = list(range(len(places)))
            if not all(type(one) in BY_ROW for one in for_whom):
                kept = [rows[place].index for place in places]
                at = {index: n for n, index in enumerate(kept)}
                shown = [at.get(index, 0) for index in range(len(self.prompts))]
            yield places, shown, torch.tensor(ids, device=self.device)[shown], kept


class Feed:
    """Tells a stream, if there is one, of one rollout's actions, as `Engine.run` tells of them; it has to be ended."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.is_told_all = hasattr(stream, "put_action")
        self.machine: Machine | None = None
        self.shown = 0

    def begin(self, rules: Rules, budget: Budget, prompt: Tensor | None) -> None:
        """`prompt`: (1, P) token ids; None if the stream had it already."""
        self.machine = Machine(rules, budget)
        if self.is_told_all:
            self.stream.begin(rules)
        elif prompt is not None:
            self.stream.put(prompt.cpu())

    def __call__(self, index: int, action: int) -> None:
        assert self.machine is not None
        self.machine.step(action)
        if self.is_told_all:
            self.stream.put_action(action)
        else:
            self._show(self.machine.final)

    def end(self) -> None:
        if self.stream is None:
            return
        try:
            if self.machine is not None and not self.is_told_all:
                self._show(len(self.machine.visible))
        finally:
            self.stream.end()

    def _show(self, final: int) -> None:
        assert self.machine is not None
        for token in self.machine.visible[self.shown : final]:
            self.stream.put(torch.tensor([token]))
        self.shown = max(self.shown, final)


def _streamer_given(model: Any) -> Any:
    """The `streamer` of the call of `model.generate` that this is part of, which transformers does not hand on."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not STOCK_GENERATE:
        frame = frame.f_back
    return frame.f_locals.get("streamer") if frame is not None and frame.f_locals.get("self") is model else None


def _unsuppressed(model: Any, config: GenerationConfig, processors: LogitsProcessorList) -> LogitsProcessorList:
    """Without what an exported generation config suppresses for loaders that know nothing of deletes."""
    ours = set((getattr(model.generation_config, IN_CONFIG, None) or {}).get(SUPPRESSED, ()))
    listed = config.suppress_tokens
    if not ours or listed != model.generation_config.suppress_tokens:
        return processors
    out = LogitsProcessorList()
    for processor in processors:
        if type(processor) is SuppressTokensLogitsProcessor and processor.suppress_tokens.tolist() == listed:
            left = [token for token in listed if token not in ours]
            if left:
                out.append(SuppressTokensLogitsProcessor(left, device=processor.suppress_tokens.device))
        else:
            out.append(processor)
    return out


def rules_of(model: Any, delete: Any) -> Rules:
    """What a model's delete tokens do, from `delete` of `generate`.

    Raises:
        UserError: nothing says it, or it is said of ids that the model does not have.
    """
    if all(hasattr(delete, its.name) for its in fields(Rules)):  # an exported folder has a class of its own for them
        rules = Rules(**{its.name: getattr(delete, its.name) for its in fields(Rules)})
    elif isinstance(delete, Mapping):
        rules = Rules.of(delete)
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


def _read_rules(source: Any) -> Rules:
    try:
        files = (Path(source, name, SEMANTICS_FILE) for name in ("", "model", "adapter"))  # the last two: of a run
        file = next((file for file in files if file.exists()), None)
        if file is None:
            # beside folders that exist a name is a path, so the hub is not asked: that takes half a minute without it
            beside = Path(source).is_dir() or (Path(source).parent.is_dir() and len(Path(source).parts) > 1)
            file = Path(cached_file(str(source), SEMANTICS_FILE, local_files_only=beside))
        return Rules.of(json.loads(file.read_text(encoding="utf-8")))
    except UserError as error:
        raise UserError(f"delete: {source}: {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"delete: no {SEMANTICS_FILE} of a policy at {str(source)!r} ({first_line(error).rstrip('.')}); "
            "give the folder or hub id of an adapter or model that was trained to delete"
        ) from error


def _check_options(
    config: GenerationConfig, processors: LogitsProcessorList, model_kwargs: dict[str, Any], may_delete: Any
) -> None:
    for name, (expected, why) in REFUSED.items():
        if getattr(config, name, None) not in (expected, None):
            raise UserError(f"{name}: got {getattr(config, name)}, but {why}; leave it at {expected}")
    if config.get_generation_mode() not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise UserError(f"generate: {config.get_generation_mode().value} cannot delete; expected greedy or sampling")
    if any(isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor) for processor in processors):
        raise UserError("guidance_scale: guidance keeps a cache that cannot take tokens back; leave it at None")
    if may_delete and any(isinstance(processor, SynthIDTextWatermarkLogitsProcessor) for processor in processors):
        raise UserError("watermarking_config: SynthID keeps a state that cannot take tokens back; leave it out")
    unknown = sorted(name for name, value in model_kwargs.items() if name not in IGNORED and value is not None)
    if unknown:
        raise UserError(f"generate: the engine has no use for {', '.join(unknown)}; it takes text prompts alone")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise UserError("past_key_values: got a cache with tokens in it; give all of the prompt as input_ids")


def _check_positions(input_ids: Tensor, model_kwargs: dict[str, Any]) -> None:
    positions, mask = model_kwargs.get("position_ids"), model_kwargs.get("attention_mask")
    if positions is None:
        return
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if not (positions == (real.cumsum(-1) - 1)).masked_fill(~real, True).all():
        raise UserError("position_ids: got others than 0, 1, 2, ... from each prompt's first token; leave them out")


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
