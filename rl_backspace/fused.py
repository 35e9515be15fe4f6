"""Small models in fewer and larger operations: their number is what a small model's steps cost, and a LoRA adapter
triples those of each linear layer. Equal to the models' own forward but for rounding.

In rollouts, Llama-like models are written out (`fuse`): query, key and value weights are one matrix, gate and up too,
with the adapter added to them and the norms' scales multiplied into them, once for all the steps of a run. Only for
what is listed in `FAMILIES`, as it stands in transformers; everything else takes its own forward.

In training, any model's own forward is taken, in which layers with an adapter are one product (`adapters_joined`).

Where an adapter trains some rows of the embedding, PEFT copies the whole of it at each call to put them in: `Settled`
does so once for a run, for any model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from transformers import DynamicCache

# by name, since some of them need not be there
FAMILIES = {
    (f"transformers.models.{name.lower()}.modeling_{name.lower()}", f"{name}Model")
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
}
LORA = ("peft.tuners.lora.layer", "Linear")
TOKENS = ("peft.tuners.trainable_tokens.layer", "TrainableTokensLayer")
COMPILED = ("torch._dynamo.eval_frame", "OptimizedModule")
# tokens of prompts at once: on a CPU what a layer makes of them stays in the core's own cache
PART = {"cpu": 512, "cuda": 2**16}
# they are copied for each run or forward pass: a larger model saves less than that takes, or has no memory for it
MOST_WEIGHTS = {"cpu": 40_000_000, "cuda": 400_000_000}
Affine = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out)."""


@dataclass(frozen=True)
class _Layer:
    """One layer; the scales of its two norms are in the weights that come after them."""

    epsilon: float  # of the norm before attention
    qkv: Affine
    norms: tuple[nn.Module, nn.Module] | None  # of each head's query and key
    out: Affine
    epsilon_between: float  # of the norm before the MLP
    gate_up: Affine
    act: Callable[[Tensor], Tensor]
    down: Affine


class _Other(Exception):
    """A layer does something else than those that are written out here."""


class Fused:
    """Feeds tokens, as `Backbone`'s `prefill` and `decode` do. Weights are those at the time it was made.

    Args:
        causal: a model of `FAMILIES`, in evaluation mode.
        layers: its layers, laid out by `fuse`.
        capacity: most positions of a row.
        embed: its embedding.
    """

    def __init__(self, causal: Any, layers: list[_Layer], capacity: int, embed: Callable[[Tensor], Tensor]):
        body, attention = causal.base_model, causal.base_model.layers[0].self_attn
        self.embed, self.norm, self.layers = embed, body.norm, layers
        self.width, self.scale = attention.head_dim, attention.scaling
        self.heads, self.groups = causal.config.num_attention_heads, causal.config.num_key_value_heads
        weight = layers[0].qkv[0]
        self.mean = weight.new_full((weight.shape[1], 1), 1 / weight.shape[1])
        cos, sin = body.rotary_emb(weight, torch.arange(capacity, device=causal.device)[None])
        self.half = self.width // 2
        self.cos = cos[0]
        self.sin = torch.cat((-sin[0, :, : self.half], sin[0, :, self.half :]), -1)  # of x rolled by half: rotate_half

    def prefill(self, ids: Tensor, first: int = 0) -> tuple[Tensor, DynamicCache]:
        """Hidden states (B, P - first, H) from position `first` on, and keys/values, of right-padded prompts (B, P)."""
        rows, length = ids.shape
        hidden = self.mean.new_empty(rows, length - first, len(self.mean))
        sizes = (rows, self.groups, length, self.width)
        states = [(hidden.new_empty(sizes), hidden.new_empty(sizes)) for _ in self.layers]
        for part in torch.arange(rows).split(max(1, PART[ids.device.type] // length)):
            where = slice(int(part[0]), int(part[-1]) + 1)
            self._prefill(ids[where], hidden[where], [(keys[where], values[where]) for keys, values in states])
        cache = DynamicCache()
        for index, (keys, values) in enumerate(states):
            cache.update(keys, values, index)
        return hidden, cache

    def _prefill(self, ids: Tensor, out: Tensor, states: list[tuple[Tensor, Tensor]]) -> None:
        rows, length = ids.shape
        cos, sin = self.cos[:length, None], self.sin[:length, None]
        hidden = self.embed(ids).reshape(rows * length, -1).clone()
        wanted = out.shape[1]  # of the last layer, which has only keys and values of what is before them
        mask = torch.ones(wanted, length, dtype=torch.bool, device=ids.device).tril(length - wanted)
        for layer, (keys, values) in zip(self.layers, states, strict=True):
            turned, value = self._project(layer, hidden, (rows, length), cos, sin)
            query, key = turned.transpose(1, 2).split([self.heads, self.groups], 1)
            keys.copy_(key)
            values.copy_(value.transpose(1, 2))
            if last := layer is self.layers[-1]:
                query, hidden = query[:, :, -wanted:], hidden.view(rows, length, -1)[:, -wanted:].flatten(0, 1)
            seen = F.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask if last else None,
                is_causal=not last,
                scale=self.scale,
                enable_gqa=self.heads != self.groups,
            )
            self._finish(layer, hidden, seen.transpose(1, 2).reshape(len(hidden), -1))
        out.copy_(self.norm(hidden).view_as(out))

    def decode(self, ids: Tensor, pointers: Tensor, cache: Any) -> Tensor:
        """Hidden states (n, H) of tokens (n,), written at `pointers` (n,) of the cache's first n rows."""
        rows, groups, width = len(ids), self.groups, self.width
        length = cache.point(pointers)
        unseen = torch.arange(length, device=ids.device) > pointers[:, None]
        mask = torch.zeros(rows, length, dtype=torch.float32, device=ids.device)
        mask.masked_fill_(unseen, torch.finfo(torch.float32).min)
        mask = mask[:, None].expand(rows, groups, length).reshape(rows * groups, 1, length)
        first = torch.arange(rows * groups, device=ids.device).view(rows, groups) * length
        places = (first + pointers[:, None]).flatten()  # where keys and values go
        cos, sin = self.cos[pointers][:, None], self.sin[pointers][:, None]

        hidden = self.embed(ids).clone()  # it is added to; an embedding of one's own may hand out what it keeps
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            turned, value = self._project(layer, hidden, (rows,), cos, sin)
            query, key = turned.split([self.heads, groups], 1)
            stored.keys.view(-1, width).index_copy_(0, places, key.reshape(-1, width))
            stored.values.view(-1, width).index_copy_(0, places, value.reshape(-1, width))
            keys = stored.keys[:rows].view(rows * groups, length, width)
            values = stored.values[:rows].view(rows * groups, length, width)
            query = query.reshape(rows * groups, -1, width)
            seen = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=self.scale).softmax(-1)
            self._finish(layer, hidden, torch.bmm(seen, values).view(rows, -1))
        return self.norm(hidden)

    def _project(
        self, layer: _Layer, hidden: Tensor, shape: tuple[int, ...], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Turned queries and keys (*shape, heads + groups, width) and values (*shape, groups, width)."""
        qkv = F.linear(self._normed(hidden, layer.epsilon), *layer.qkv).view(*shape, -1, self.width)
        turned, value = qkv.split([self.heads + self.groups, self.groups], -2)
        if layer.norms is not None:
            query, key = turned.split([self.heads, self.groups], -2)
            turned = torch.cat((layer.norms[0](query), layer.norms[1](key)), -2)
        return torch.addcmul(turned * cos, turned.roll(self.half, -1), sin), value

    def _finish(self, layer: _Layer, hidden: Tensor, seen: Tensor) -> None:
        """The rest of a layer after its attention, added to the hidden states (n, H)."""
        hidden.add_(F.linear(seen, *layer.out))
        gate, up = F.linear(self._normed(hidden, layer.epsilon_between), *layer.gate_up).chunk(2, -1)
        hidden.add_(F.linear(layer.act(gate).mul_(up), *layer.down))

    def _normed(self, hidden: Tensor, epsilon: float) -> Tensor:
        """RMSNorm without its scale, the mean as a product with a vector: half the time of `mean`."""
        return hidden * (hidden * hidden).mm(self.mean).add_(epsilon).rsqrt_()


def fuse(causal: Any, capacity: int, embed: Callable[[Tensor], Tensor] | None = None) -> Fused | None:
    """A model as it is now, written out; None where it has to run its own forward.

    Args:
        embed: what takes its embedding's place.
    """
    body = causal.base_model
    on = causal.device.type
    if name_of(body) not in FAMILIES or causal.dtype != torch.float32 or on not in MOST_WEIGHTS:
        return None
    if torch.is_autocast_enabled(on) or sum(p.numel() for p in body.layers.parameters()) > MOST_WEIGHTS[on]:
        return None
    if is_changed(body) or any(p.device != causal.device for p in body.parameters()):
        return None
    layers = body.layers[: causal.config.num_hidden_layers]
    parts = [body, *layers, *(part for layer in layers for part in layer.children())]
    if not all(_is_stock(body, part) for part in parts):
        return None
    try:
        laid_out = [_lay_out(layer, layers[0].self_attn) for layer in layers]
        return Fused(causal, laid_out, capacity, embed or body.embed_tokens)
    except _Other:
        return None


def name_of(module: nn.Module) -> tuple[str, str]:
    return type(module).__module__, type(module).__name__


def is_changed(model: nn.Module) -> bool:
    """Whether somebody has changed what a part of a model does, or hooks into it."""
    return any(map(_is_changed, model.modules())) or _has_any_global_hook()


def _is_changed(module: nn.Module) -> bool:
    """Somebody has changed what it does, or transformers and PEFT have left hooks there that do nothing any more."""
    return bool(_has_own_forward(module) or module._forward_hooks or module._forward_pre_hooks)


def _has_own_forward(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return forward is not None and not isinstance(forward, Instead)


def _lay_out(layer: Any, first: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    if (attention.scaling, attention.head_dim, attention.is_causal) != (first.scaling, first.head_dim, True):
        raise _Other
    before, between = layer.input_layernorm, layer.post_attention_layernorm
    return _Layer(
        before.variance_epsilon,
        _joined(attention.q_proj, attention.k_proj, attention.v_proj, scale=before.weight),
        (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        _joined(attention.o_proj),
        between.variance_epsilon,
        _joined(mlp.gate_proj, mlp.up_proj, scale=between.weight),
        mlp.act_fn,
        _joined(mlp.down_proj),
    )


def _is_stock(body: nn.Module, module: nn.Module) -> bool:
    """Whether a part of a model is of its family's own classes, and they have their own forward."""
    kind, home = type(module), type(body).__module__
    return kind.__module__ == home and kind.forward.__module__ == home


def _joined(*modules: nn.Module, scale: Tensor | None = None) -> Affine:
    """Linear layers of the same input as one; the input is to be scaled (H,) before."""
    weights, biases = zip(*map(_affine, modules), strict=True)
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    weight = weight if scale is None else weight * scale
    if all(bias is None for bias in biases):
        return weight, None
    zeros = [weight.new_zeros(len(weight)) for weight in weights]
    return weight, torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])


def _affine(module: Any) -> Affine:
    """What a linear layer does, its active LoRA adapters included."""
    if type(module) is nn.Linear and type(module.weight) is nn.Parameter:  # not a quantised weight
        return module.weight, module.bias
    if name_of(module) != LORA:
        raise _Other
    weight, bias = _affine(module.base_layer)
    if module.disable_adapters:
        if module.merged:  # its forward takes the adapter out again
            raise _Other
        return weight, bias
    for name in () if module.merged else _active(module):
        if name in module.lora_variant or module.lora_B[name].bias is not None:
            raise _Other
        weight = weight + module.get_delta_weight(name)
    return weight, bias


class Instead:
    """What takes the place of a layer's forward for a while, in the thread that put it there; others find the layer's.

    Args:
        layer: PEFT's, which puts rows into the weight of its base at each call.
        made: its base with them.
    """

    def __init__(self, layer: Any, made: nn.Module):
        self.layer, self.made = layer, made

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if _inside.get():
            return self.put_in(x)
        return type(self.layer).forward(self.layer, x, *args, **kwargs)  # type: ignore[no-any-return]

    def put_in(self, x: Tensor) -> Tensor:
        return type(self.made).forward(self.made, x)  # type: ignore[no-any-return]


_inside: ContextVar[bool] = ContextVar("inside", default=False)  # of this thread: such layers are replaced


class Settled(dict[Any, Instead]):
    """By layer in which an adapter trains some rows of an embedding or output head, its forward with these rows put
    into the weight, once; PEFT copies the whole weight at each call. What does more than that is not among them.
    """

    @classmethod
    def of(cls, model: nn.Module) -> Settled:
        """Those of a model as it is now."""
        weights: dict[tuple[int, int], nn.Parameter] = {}
        return cls((layer, Instead(layer, _settled(layer, weights))) for layer in settling(model))

    @contextlib.contextmanager
    def instead(self) -> Iterator[None]:
        """Inside, the model's forward takes these."""
        token = _inside.set(True)
        try:
            for layer, forward in self.items():
                layer.forward = forward
            yield
        finally:
            for layer in self:
                vars(layer).pop("forward", None)
            _inside.reset(token)


def settling(model: nn.Module) -> list[Any]:
    """The layers that `Settled` replaces; none of a model that was compiled, which would be compiled for each run."""
    modules = list(model.modules())
    layers = [layer for layer in modules if name_of(layer) == TOKENS and _may_settle(layer)]
    return [] if any(map(_is_compiled, modules)) else layers


def _settled(layer: Any, weights: dict[tuple[int, int], nn.Parameter]) -> nn.Module:
    base = layer.base_layer
    which = id(layer.trainable_tokens_delta), base.weight.data_ptr()  # tied ones need only one
    if which not in weights:
        weights[which] = nn.Parameter(layer.get_merged_weights(layer.active_adapters).detach(), requires_grad=False)
    made: nn.Module = copy.copy(base)
    made._parameters = {**dict.fromkeys(base._parameters), "weight": weights[which]}  # PEFT leaves a bias out
    return made


def _may_settle(layer: Any) -> bool:
    """Whether all that a layer does at each call is to put rows into the weight of its base and take that."""
    kind, scaled = type(layer.base_layer), hasattr(layer.base_layer, "embed_scale")
    stock = kind.forward in (nn.Embedding.forward, nn.Linear.forward)
    gemma = kind.__module__.startswith("transformers.models.gemma")  # whose scale PEFT takes as it is
    return (
        (gemma if scaled else stock)
        and type(layer.base_layer.weight) is nn.Parameter
        and getattr(layer.base_layer, "max_norm", None) is None
        and not _has_own_forward(layer)
        and not (layer.disable_adapters or layer.merged)
        and len(layer.active_adapters) == 1
    )


@contextlib.contextmanager
def adapters_joined(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers with a LoRA adapter multiply by the sum of both, forward and backward; in small float32
    models, where nothing but the plain adapter is there to be done. The sums are kept until backward."""
    modules = list(model.modules())
    adapted = [module for module in modules if name_of(module) == LORA]
    layers: dict[Any, str] = {m: name for m in adapted if (name := _plain_adapter(m)) is not None}
    if any(map(_is_fixed, modules)) or _has_any_global_hook():
        layers = {}
    on = next((layer.base_layer.weight.device.type for layer in layers), "cpu")
    if sum(layer.base_layer.weight.numel() for layer in layers) > MOST_WEIGHTS.get(on, 0):
        layers = {}
    try:
        for layer, name in layers.items():
            layer.forward = partial(_adapted, layer, name)
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_fixed(module: nn.Module) -> bool:
    """Whether what is below has to stay as it is: it runs once more in backward, or was compiled."""
    return _is_compiled(module) or bool(getattr(module, "gradient_checkpointing", False))


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or name_of(module) == COMPILED


def _plain_adapter(layer: Any) -> str | None:
    """The adapter's name, where all that a LoRA layer does is x (W + s B A)^T + b, with W and b frozen."""
    base, active = layer.base_layer, _active(layer)
    if layer.disable_adapters or layer.merged or len(active) != 1 or type(base) is not nn.Linear:
        return None
    (name,) = active
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    weights = base.weight, down.weight, up.weight
    plain = (
        type(layer).forward.__module__ == LORA[0]
        and name not in layer.lora_variant
        and (type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not dropout.training))
        and (type(down), type(up)) == (nn.Linear, nn.Linear)
        and down.bias is up.bias is None
        and type(layer.scaling[name]) in (int, float)
        and all(type(weight) is nn.Parameter and weight.dtype == torch.float32 for weight in weights)
        and len({weight.device for weight in weights}) == 1
        and not (base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad))
        and not any(_is_changed(m) or m._backward_hooks or m._backward_pre_hooks for m in layer.modules())
    )
    return name if plain else None


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _adapted(layer: Any, name: str, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer's forward with the adapter that was active when it was joined; PEFT's where something else is asked for
    by now, or the sum would cost more than it saves."""
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    width = x.shape[-1]
    changed = layer.disable_adapters or layer.merged or _active(layer) != [name] or args or kwargs
    few = x.dim() < 2 or x.numel() // width * (width + len(up)) < base.weight.numel()
    if changed or few or x.dtype != torch.float32 or torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    out: Tensor = _Adapted.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, width), base.weight, base.bias, down, up, layer.scaling[name]
    )
    return out.view(*x.shape[:-1], -1)


class _Adapted(torch.autograd.Function):
    """x (W + s B A)^T + b of x (n, in)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        joined = torch.addmm(weight, up, down, alpha=scaling)
        ctx.save_for_backward(x, joined, down, up)
        ctx.scaling = scaling
        return F.linear(x, joined, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, joined, down, up = ctx.saved_tensors
        if joined.numel() <= 4 * (down.numel() + up.numel()):  # one large product is faster than four narrow ones
            both = (gradient.t() @ x).mul_(ctx.scaling)
            of_down, of_up = up.t() @ both, both @ down.t()
        else:
            of_down = (gradient @ up).mul_(ctx.scaling).t() @ x
            of_up = gradient.t() @ (x @ down.t()).mul_(ctx.scaling)
        of_x = gradient @ joined if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_down, of_up, None
