"""What the engine needs of a stock causal LM: backbone and head apart, and a KV cache that can rewind.

A delete moves a row's write pointer back; the slots behind it are overwritten in place. That is exact for
full attention over stored keys and values, and for nothing else: `check` says why another model is refused.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl_backspace.captured import Captured, Network, can_capture, rotary, uncaptured
from rl_backspace.errors import UserError
from rl_backspace.fused import Settled, fuse, name_of, settling

MASKED_ATTENTION = ("sdpa", "eager")  # the attention implementations that take our 4D masks
NOT_NUMBERS = (
    "the model's logits are not numbers: its weights are damaged or overflow its dtype, or training diverged; "
    "load other weights, take float32 or bfloat16, or train with a lower learning rate"
)
BLOCK = 16  # the cache grows by this many positions: reading a part of longer rows is slower than copying now and then


def are_numbers(logits: Tensor) -> bool:
    """Whether all are below infinity, as no nan is; -inf is what a model bans."""
    return bool((logits < torch.inf).all())


def lengthened(states: Tensor, length: int) -> Tensor:
    """(..., L, D) as (..., length, D), with zeros behind; what `pad` does by writing everything twice."""
    longer = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    longer[..., : states.shape[-2], :] = states
    longer[..., states.shape[-2] :, :] = 0
    return longer


class PointerLayer(CacheLayerMixin):
    """One layer's keys and values, each row with a write pointer of its own.

    keys, values: (rows, heads, length, head_dim). Before each decode step `rows` and `pointers` say which
    rows are fed and where each writes; attention sees all `length` entries, masked by the caller.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.rows: Tensor | None = None
        self.pointers: Tensor | None = None

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def grow(self, length: int) -> None:
        """Make room for `length` entries per row; unused ones hold zeros, since masking does not hide a nan."""
        self.keys, self.values = lengthened(self.keys, length), lengthened(self.values, length)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.keys[self.rows, :, self.pointers] = key_states[:, :, 0].to(self.keys.dtype)  # under autocast they differ
        self.values[self.rows, :, self.pointers] = value_states[:, :, 0].to(self.values.dtype)
        rows = key_states.shape[0]
        return self.keys[:rows], self.values[:rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return self.length


class PointerCache(Cache):
    """A cache of `PointerLayer`s for `rows` sequences of up to `capacity` tokens, shaped like `like`'s layers.

    It holds as many entries as the longest row so far, rounded up.
    """

    def __init__(self, like: DynamicCache, rows: int, capacity: int):
        self.capacity = capacity

        def buffer(states: Tensor) -> Tensor:
            return states.new_zeros(rows, states.shape[1], 0, states.shape[3])

        super().__init__(layers=[PointerLayer(buffer(layer.keys), buffer(layer.values)) for layer in like.layers])

    def fill(self, first: int, prefilled: DynamicCache, source: Tensor) -> None:
        """Copy prompts into rows first, first+1, ...: `source[i]` is the prefilled row that row first+i takes."""
        length = prefilled.layers[0].keys.shape[2]
        self.reserve(length)
        for layer, full in zip(self.layers, prefilled.layers, strict=True):
            layer.keys[first : first + len(source), :, :length] = full.keys[source]
            layer.values[first : first + len(source), :, :length] = full.values[source]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy one row's first `length` entries over another row."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    @property
    def length(self) -> int:
        """Entries per row, used or not."""
        return self.layers[0].length

    def reserve(self, length: int) -> None:
        """Make room for rows of `length` entries.

        On a GPU for twice as many: a graph is captured for each length that the cache has had (`captured`).
        """
        if length <= self.length:
            return
        rounded = -(-length // BLOCK) * BLOCK
        if self.layers[0].keys.device.type == "cuda":
            rounded = 2 ** (rounded - 1).bit_length()
        for layer in self.layers:
            layer.grow(max(length, min(rounded, self.capacity)))

    def point(self, pointers: Tensor) -> int:
        """Feed rows 0..len(pointers)-1 next, row i writing at `pointers[i]`, for which there is room already; how many
        entries attention will see."""
        rows = torch.arange(len(pointers), device=pointers.device)
        for layer in self.layers:
            layer.rows, layer.pointers = rows, pointers
        return self.length


class Backbone:
    """A stock causal LM, plain or wrapped by PEFT, as two functions: tokens -> hidden, hidden -> logits."""

    def __init__(self, model: nn.Module):
        causal = causal_lm(model)
        self.model, self.causal = model, causal
        self.config = causal.config.get_text_config()
        self.body = causal.base_model
        self.settled = Settled()  # for the time of a run
        self.logit_scale = _logit_scale(self.config)
        self.logit_cap = getattr(self.config, "final_logit_softcapping", None)
        _refuse_by_config(causal)

    @property
    def device(self) -> torch.device:
        return self.causal.device

    @property
    def max_length(self) -> int:
        """Longest context in tokens that the model was made for; 2**31 when its config does not say."""
        limits = [getattr(self.config, "max_position_embeddings", None)]
        if getattr(self.config, "sliding_window", None) and _slides(self.config):
            limits.append(self.config.sliding_window)
        for part in rotary(self.config):
            if part.get("rope_type") in ("longrope", "dynamic"):
                # beyond this length its frequencies depend on the longest row of the batch
                limits.append(part.get("original_max_position_embeddings"))
        return min([limit for limit in limits if limit], default=2**31)

    def prefill(self, ids: Tensor, first: int = 0) -> tuple[Tensor, DynamicCache]:
        """Hidden states (B, P - first, H) from position `first` on, and keys/values, of right-padded prompts (B, P)."""
        cache = DynamicCache()  # without the config, so that no layer drops what lies before its window
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with self.settled.instead():
            out = self.body(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.last_hidden_state[:, first:], cache

    def for_a_run(self) -> Backbone:
        """The same, as long as the model does not change."""
        now = copy.copy(self)
        now.settled = Settled.of(self.causal)
        return now

    def fastest(self, capacity: int, rows: int = 1) -> Network:
        """What does `prefill` and `decode` fastest for the model as it is now and `rows` rows of up to `capacity`
        tokens."""
        embed = getattr(self.body, "embed_tokens", None)
        settled = self.settled.get(getattr(embed, "token_adapter", embed))
        put_in = settled.put_in if settled else None
        network = (self.causal not in _unfused and fuse(self.causal, capacity, put_in)) or self
        return Captured(network, self.causal, rows) if can_capture(self.causal, self.settled) else network

    def decode(self, ids: Tensor, pointers: Tensor, cache: PointerCache) -> Tensor:
        """Feed one token per row at `pointers` (n,), its position, where the cache has room; hidden states (n, H)."""
        allowed = (torch.arange(cache.point(pointers), device=ids.device) <= pointers[:, None])[:, None, None]
        causal = self.causal
        fast = causal.config._attn_implementation == "sdpa" and (causal.device.type, causal.dtype) == FAST_ON
        token = _one_query.set(fast)
        try:
            with self.settled.instead():
                out = self.body(
                    input_ids=ids[:, None],
                    attention_mask=_added(causal, allowed) if fast else attention_mask(causal, allowed),
                    position_ids=pointers[:, None],
                    past_key_values=cache,
                    use_cache=True,
                )
        finally:
            _one_query.reset(token)
        return out.last_hidden_state[:, 0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits (n, V) of hidden states (n, H), with the scalings that stock models apply."""
        with self.settled.instead():
            logits = self.causal.get_output_embeddings()(hidden).float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        return torch.tanh(logits / self.logit_cap) * self.logit_cap if self.logit_cap else logits


def one_query_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query per row as two batched products: on CPU faster than sdpa, which is made for many.

    Shapes: query (B, H, 1, D), key and value (B, G, S, D) with H a multiple of G, float mask (B, 1, 1, S);
    returns (B, 1, H, D), as transformers' attention functions do.
    """
    rows, heads, _, width = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, width)
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.add(attention_mask, grouped @ key.transpose(2, 3), alpha=scale)
    return (scores.softmax(-1) @ value).reshape(rows, 1, heads, value.shape[3]), None


FAST_ON = ("cpu", torch.float32)  # where `one_query_attention` takes sdpa's place
_one_query: ContextVar[bool] = ContextVar("one_query", default=False)  # of this thread: its decode step runs


def _dispatching(stock: Any) -> Any:
    """transformers' sdpa, but within a decode step of the engine in this thread `one_query_attention`."""

    def sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and _one_query.get():
            return one_query_attention(module, *args, **kwargs)
        return stock(module, *args, **kwargs)

    sdpa.stock = stock  # type: ignore[attr-defined]
    return sdpa


_sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
if _sdpa.__module__ == __name__:  # this file was run before: an exported folder's code may be loaded again
    _sdpa = _sdpa.stock
ALL_ATTENTION_FUNCTIONS.register("sdpa", _dispatching(_sdpa))


_modes: weakref.WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while this lasts in any thread; then each submodule is in the mode that it was in."""
    with _lock:
        users, training = _modes.get(model) or (0, [part for part in model.modules() if part.training])
        _modes[model] = users + 1, training
        model.eval()
    try:
        yield
    finally:
        with _lock:
            users, training = _modes.pop(model)
            if users > 1:
                _modes[model] = users - 1, training
            else:
                for part in training:
                    part.training = True


def causal_lm(model: Any) -> Any:
    """The stock causal LM inside wrappers: accelerate's or DDP's `module`, PEFT's `get_base_model`."""
    while not isinstance(model, PreTrainedModel):
        if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
            raise UserError("the policy's adapter is a learned prompt, whose tokens have no place here; use LoRA")
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "module"):
            model = model.module
        else:
            raise UserError(f"the policy is a {type(model).__name__}; expected a transformers causal language model")
    return model


def attention_mask(causal: Any, allowed: Tensor) -> Tensor:
    """A boolean 4D mask (True: may attend) as the model's attention takes it.

    sdpa takes booleans; the others add the mask to their scores, where a boolean would be silently wrong.
    """
    return allowed if causal.config._attn_implementation == "sdpa" else _added(causal, allowed)


def _added(causal: Any, allowed: Tensor) -> Tensor:
    """The mask as it is added to scores."""
    floats = torch.zeros(allowed.shape, dtype=causal.dtype, device=allowed.device)
    return floats.masked_fill_(~allowed, torch.finfo(causal.dtype).min)


_passed: weakref.WeakKeyDictionary[PreTrainedModel, Any] = weakref.WeakKeyDictionary()  # models that were checked
_unfused: weakref.WeakSet[PreTrainedModel] = weakref.WeakSet()  # that do something else than what is written out


def check(backbone: Backbone) -> None:
    """Refuse, with the reason, a model whose cache cannot rewind exactly or that cannot be scored packed.

    Types three tokens, rewinds two, types another, and compares with the same context computed from scratch
    by the model's own forward; the same with the deleted tokens beside it in one masked sequence; and with the
    model as it is called, since scoring hears of hooks that rollouts pass over. Costs a few forward passes on a
    handful of tokens.

    Raises:
        UserError: they differ, or the model cannot be driven this way at all.
    """
    causal = backbone.causal
    parts = frozenset(map(name_of, causal.modules())), len(settling(causal))  # an adapter may have come since
    changes = sum(map(_changes, backbone.model.modules()))
    rounded = causal.dtype != torch.float32 or _rounds_products(backbone.device)
    how = (causal.config._attn_implementation, causal.dtype, backbone.device, parts, changes, rounded)
    if _passed.get(causal) == how:
        return
    slower = [models for models in (_unfused, uncaptured) if causal not in models]
    try:
        _compare(backbone, rounded, slower)
    except UserError:
        for models in slower:  # slowly it was no better
            models.discard(causal)
        raise
    _passed[causal] = how


def _compare(backbone: Backbone, rounded: bool, slower: list[weakref.WeakSet[Any]]) -> None:
    """Put the model into those of `slower` that it needs, or raise UserError where nothing helps."""
    name = type(backbone.causal).__name__

    def gap(logits: Tensor, expected: Tensor) -> float:
        return (logits - expected).masked_fill(logits == expected, 0.0).abs().max().item()  # a model may ban tokens

    def is_close(logits: Tensor, expected: Tensor, rounded: bool = rounded) -> bool:
        allowed = 0.05 if rounded else 1e-3
        largest = expected.masked_fill(expected.isinf(), 0.0).abs().max().item()
        return gap(logits, expected) <= allowed * max(1.0, largest)

    def is_heard() -> bool:
        """Whether what the model says when it is called, perhaps within accelerate's autocast, is what it is."""
        if is_close(called, expected, rounded=True):
            return True
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast(backbone.device.type, dtype, cache_enabled=False):
                if is_close(called, _from_scratch(backbone), rounded=True):
                    return True
        return False

    try:
        with torch.no_grad(), evaluating(backbone.causal):
            expected = _from_scratch(backbone)
            rewound, packed = _both_ways(backbone)
            for models in slower:  # a function that its layers call may have been replaced
                if not is_close(rewound, expected) and is_close(packed, expected):
                    models.add(backbone.causal)
                    rewound, _ = _both_ways(backbone)
            called = _as_called(backbone)
            well = is_close(rewound, expected) and is_close(packed, expected)
            heard = well and is_heard()
    except (AttributeError, TypeError, KeyError, IndexError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{name} cannot be driven with a rewinding cache and 4D masks: {reason}") from error
    if not (are_numbers(expected) and expected.isfinite().any()):
        raise UserError(NOT_NUMBERS)
    if not well:
        off = max(gap(logits, expected) for logits in (rewound, packed))
        raise UserError(
            f"{name} cannot rewind: after a delete its logits are off by {off:.2g}; use a full-attention model"
        )
    if not heard:
        off = gap(called, expected)
        raise UserError(
            f"{name}, when it is called, gives other logits than its layers and head do (off by {off:.2g}): by a hook "
            "on it or a replaced forward, which rollouts would not hear of; take that out"
        )


def _rounds_products(device: torch.device) -> bool:
    """Whether float32 products are rounded on their way there, by autocast or to TF32."""
    products = torch.backends.cuda.matmul  # torch's own question raises where this was set and not all of it
    tf32 = getattr(products, "fp32_precision", None) == "tf32" or (
        not hasattr(products, "fp32_precision") and products.allow_tf32
    )
    within = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return within or (device.type == "cuda" and tf32)


def _changes(module: nn.Module) -> int:
    """How much there is that `forward` of its class does not say."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) + ("forward" in vars(module))


def _probe(backbone: Backbone) -> Tensor:
    """Token ids (6,): five, and one that comes after the third when the fourth and fifth are deleted."""
    return (torch.arange(1, 7, device=backbone.device) * 7919) % backbone.config.vocab_size


def _from_scratch(backbone: Backbone) -> Tensor:
    """Logits (V,) after four tokens by its class's own forward; accelerate wraps a model's in autocast."""
    causal = backbone.causal
    return type(causal).forward(causal, input_ids=_probe(backbone)[None, [0, 1, 2, 5]]).logits[0, -1].float()


def _as_called(backbone: Backbone) -> Tensor:
    """The same by the model as scoring calls it, with its hooks and adapters; not compiled, which takes its time."""
    model: Any = backbone.model
    while not isinstance(model, PreTrainedModel) and not isinstance(getattr(model, "peft_config", None), dict):
        model = model.module  # of several processes each asks by itself
    model = getattr(model, "_orig_mod", model)
    with torch.compiler.set_stance("force_eager"):
        return model._call_impl(input_ids=_probe(backbone)[None, [0, 1, 2, 5]]).logits[0, -1].float()


def _both_ways(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """The same when two tokens were deleted before the last: rewound to from five, and beside the deleted two."""
    backbone, ids = backbone.for_a_run(), _probe(backbone)
    network = backbone.fastest(capacity=5)
    _, prefilled = network.prefill(ids[None, :2])
    cache = PointerCache(prefilled, rows=1, capacity=5)
    cache.fill(0, prefilled, torch.zeros(1, dtype=torch.long, device=ids.device))
    cache.reserve(5)
    for token, position in ((ids[2], 2), (ids[3], 3), (ids[4], 4), (ids[5], 3)):
        hidden = network.decode(token[None], torch.tensor([position], device=ids.device), cache)
    rewound = backbone.logits(hidden)[0]
    del network, backbone.settled  # before PEFT makes its own
    beside = torch.ones(6, 6, dtype=torch.bool, device=ids.device).tril()
    beside[5, 3:5] = False  # the last token comes after the third, not after the deleted two
    packed = type(backbone.causal).forward(
        backbone.causal,
        input_ids=ids[None],
        attention_mask=attention_mask(backbone.causal, beside[None, None]),
        position_ids=torch.tensor([[0, 1, 2, 3, 4, 3]], device=ids.device),
        use_cache=False,
    )
    return rewound, packed.logits[0, -1].float()


def _refuse_by_config(causal: PreTrainedModel) -> None:
    config, name = causal.config.get_text_config(), type(causal).__name__
    if causal.config.is_encoder_decoder:
        raise UserError(f"{name} is an encoder-decoder; deleting needs a decoder-only causal language model")
    state = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    state |= set(getattr(config, "attention_layers", None) or ()) - {"global"}  # GPT-Neo counts places in packed rows
    if state:
        kinds = ", ".join(sorted(state))
        raise UserError(f"{name} cannot rewind: its layers of type {kinds} are not full attention over all tokens")
    if getattr(causal, "_is_stateful", False):
        raise UserError(f"{name} cannot rewind: it is recurrent, so its state has no past to go back to")
    if config._attn_implementation not in MASKED_ATTENTION:
        raise UserError(
            f"{name} uses attention {config._attn_implementation!r}, which takes no 4D masks; "
            f"load it with attn_implementation set to {' or '.join(MASKED_ATTENTION)}"
        )


def _slides(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    return types is None or "sliding_attention" in types


def _logit_scale(config: Any) -> float:
    """The factor on the logits: Cohere multiplies, Granite divides, Falcon-H1 names it differently."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    return 1.0 / divisor if divisor else 1.0
