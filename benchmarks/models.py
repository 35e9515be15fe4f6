"""Models made here from a config: random weights, a chosen share of deletes, any size."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

SIZES = {
    "1m": {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 128},
    "30m": {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 128},
    "70m": {"hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8, "vocab_size": 50304},  # as Pythia's
}
USED, PAD, EOS, DELETE = 128, 0, 1, 127  # of the vocabulary, in prompts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(size: str, deletes: float, context: int, seed: int = 0) -> PreTrainedModel:
    """A Llama that deletes with probability `deletes` wherever it may, and hardly prefers one token to another.

    With random weights all logits are near 0, so a bias on one output row sets its probability.
    """
    torch.manual_seed(seed)
    shape = SIZES[size]
    model = LlamaForCausalLM(
        LlamaConfig(
            intermediate_size=4 * shape["hidden_size"],
            max_position_embeddings=context,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            eos_token_id=EOS,
            bos_token_id=None,
            **shape,
        )
    )
    if deletes:
        bias = torch.zeros(shape["vocab_size"])
        bias[DELETE] = torch.tensor(deletes / (1 - deletes) * (len(bias) - 1)).log()
        model.lm_head.bias = nn.Parameter(bias)
    model.generation_config.eos_token_id = None  # nothing ends an answer, in `generate` neither
    return model.eval().to(DEVICE)


def prompts(rows: int, length: int, seed: int = 1) -> Tensor:
    """Random prompts (rows, length), all different, without special tokens."""
    return torch.randint(2, DELETE, (rows, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def adapt(model: PreTrainedModel, rows: list[int] | None = None) -> PeftModel:
    """The model with a LoRA adapter on all its linear layers, which may train rows of the embedding too. Where the head
    has a bias PEFT would leave that out then."""
    return get_peft_model(
        model, LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", trainable_token_indices=rows)
    )
