"""The decode step of Llama-like models written out: the arithmetic of the stock layers in fewer and larger operations.

A small model's step on CPU is bound by the number of operations, and a LoRA adapter triples those of each linear layer.
Here query, key and value weights are one matrix, gate and up too, and the adapter is added to them, once for all the
steps of a run. Only for what is listed in `FAMILIES`, as it stands in transformers; everything else takes its own
forward, to which this is equal but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

FAMILIES = (LlamaModel, MistralModel, Qwen2Model, Qwen3Model)
MOST_WEIGHTS = 2**27  # they are copied; in a larger model the linear layers are all that counts
LORA = ("peft.tuners.lora.layer", "Linear")  # by name, since peft need not be there
Affine = tuple[Tensor, Tensor | None]
"""Weight (out, in) and bias (out)."""


@dataclass(frozen=True)
class _Layer:
    before: nn.Module  # RMSNorm
    qkv: Affine
    norms: tuple[nn.Module, nn.Module] | None  # of each head's query and key
    out: Affine
    between: nn.Module
    gate_up: Affine
    down: Affine


class FusedStep:
    """Feeds one token per row, as `Backbone.decode` does. Weights are those at the time it was made.

    Args:
        causal: a model of `FAMILIES`, in evaluation mode.
        layers: its layers, laid out by `fuse`.
        capacity: most positions of a row.
    """

    def __init__(self, causal: Any, layers: list[_Layer], capacity: int):
        body, attention = causal.base_model, causal.base_model.layers[0].self_attn
        self.embed, self.norm, self.layers = body.embed_tokens, body.norm, layers
        self.act: Callable[[Tensor], Tensor] = body.layers[0].mlp.act_fn
        self.width, self.scale = attention.head_dim, attention.scaling
        self.heads, self.groups = causal.config.num_attention_heads, causal.config.num_key_value_heads
        positions = torch.arange(capacity, device=causal.device)[None]
        cos, sin = body.rotary_emb(layers[0].qkv[0], positions)
        self.half = self.width // 2
        self.cos = cos[0]
        self.sin = torch.cat((-sin[0, :, : self.half], sin[0, :, self.half :]), -1)  # of x rolled by half: rotate_half

    def __call__(self, ids: Tensor, pointers: Tensor, cache: Any) -> Tensor:
        """Hidden states (n, H) of tokens (n,), written at `pointers` (n,) of the cache's first n rows."""
        rows, groups, heads, width = len(ids), self.groups, self.heads, self.width
        length = cache.point(pointers)
        unseen = torch.arange(length, device=ids.device) > pointers[:, None]
        mask = torch.zeros(rows, length, device=ids.device).masked_fill_(unseen, torch.finfo(torch.float32).min)
        mask = mask[:, None].expand(rows, groups, length).reshape(rows * groups, 1, length)
        first = torch.arange(rows * groups, device=ids.device).view(rows, groups) * length
        places = (first + pointers[:, None]).flatten()  # where keys and values go
        cos, sin = self.cos[pointers][:, None], self.sin[pointers][:, None]

        hidden = self.embed(ids)
        for layer, stored in zip(self.layers, cache.layers, strict=True):
            qkv = F.linear(layer.before(hidden), *layer.qkv).view(rows, heads + 2 * groups, width)
            turned, value = qkv.split([heads + groups, groups], 1)
            if layer.norms is not None:
                query, key = turned.split([heads, groups], 1)
                turned = torch.cat((layer.norms[0](query), layer.norms[1](key)), 1)
            turned = torch.addcmul(turned * cos, turned.roll(self.half, -1), sin)
            stored.keys.view(-1, width).index_copy_(0, places, turned[:, heads:].reshape(-1, width))
            stored.values.view(-1, width).index_copy_(0, places, value.reshape(-1, width))
            keys = stored.keys[:rows].view(rows * groups, length, width)
            values = stored.values[:rows].view(rows * groups, length, width)
            query = turned[:, :heads].reshape(rows * groups, -1, width)
            seen = torch.baddbmm(mask, query, keys.transpose(1, 2), alpha=self.scale).softmax(-1)
            hidden = hidden + F.linear(torch.bmm(seen, values).view(rows, -1), *layer.out)
            gate, up = F.linear(layer.between(hidden), *layer.gate_up).chunk(2, -1)
            hidden = hidden + F.linear(self.act(gate) * up, *layer.down)
        return self.norm(hidden)


def fuse(causal: Any, capacity: int) -> FusedStep | None:
    """The written-out step of a model as it is now; None where it has to run its own forward."""
    body = causal.base_model
    if type(body) not in FAMILIES or causal.dtype != torch.float32 or causal.device.type != "cpu":
        return None
    if torch.is_autocast_enabled("cpu") or sum(p.numel() for p in body.layers.parameters()) > MOST_WEIGHTS:
        return None
    if any("forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks for m in body.modules()):
        return None  # somebody has changed what it does
    layers = []
    for layer in body.layers:
        attention, mlp = layer.self_attn, layer.mlp
        parts = [
            _joined(attention.q_proj, attention.k_proj, attention.v_proj),
            _joined(attention.o_proj),
            _joined(mlp.gate_proj, mlp.up_proj),
            _joined(mlp.down_proj),
        ]
        if any(part is None for part in parts):
            return None
        qkv, out, gate_up, down = parts
        norms = (attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None
        layers.append(_Layer(layer.input_layernorm, qkv, norms, out, layer.post_attention_layernorm, gate_up, down))  # type: ignore[arg-type]
    return FusedStep(causal, layers, capacity)


def _joined(*modules: nn.Module) -> Affine | None:
    """Linear layers of the same input as one."""
    found = [_affine(module) for module in modules]
    if any(one is None for one in found):
        return None
    weights, biases = zip(*found, strict=True)  # type: ignore[arg-type]
    if len(modules) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    zeros = [weight.new_zeros(len(weight)) for weight in weights]
    return torch.cat(weights), torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])


def _affine(module: Any) -> Affine | None:
    """What a linear layer does, its active LoRA adapters included; None where it does something else."""
    if type(module) is nn.Linear:
        return module.weight, module.bias
    kind = type(module)
    if (kind.__module__, kind.__name__) != LORA or type(module.base_layer) is not nn.Linear:
        return None
    weight = module.base_layer.weight
    if not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_variant or module.lora_bias.get(name):
                return None
            if name in module.lora_A:
                weight = weight + module.get_delta_weight(name)
    return weight, module.base_layer.bias
