"""Small models of several families, made here: random weights, real architectures."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import PreTrainedModel

torch.set_num_threads(1)  # on models this small, one thread is faster than two

VOCAB, EOS, DELETE = 32, 1, 31
FAMILIES = ("Llama", "Qwen3", "Mistral", "GPTNeoX", "Gemma2", "Gemma3Text", "Qwen2", "Phi", "GPT2")


def tiny(family: str = "Llama", seed: int = 0, **overrides: object) -> PreTrainedModel:
    """A random model of a family: 2 layers, width 32, a vocabulary of 32; weights large enough to have opinions."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
        "sliding_window": None,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": EOS,
        "bos_token_id": 2,
    }
    if family in ("GPTNeoX", "Phi", "GPT2"):
        del sizes["head_dim"], sizes["num_key_value_heads"]
    if family.startswith("Gemma"):
        sizes["sliding_window"] = 128
    if family == "GPT2":
        sizes.update(n_embd=32, n_layer=2, n_head=4, n_positions=128)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config" if family != "Gemma3Text" else "Gemma3TextConfig")(
        **{**sizes, **overrides}
    )
    name = "GPT2LMHeadModel" if family == "GPT2" else f"{family.removesuffix('Text')}ForCausalLM"
    return getattr(transformers, name)(config).eval()


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param
