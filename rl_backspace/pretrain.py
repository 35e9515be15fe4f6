"""A base model from nothing: a character tokenizer with spare rows and a small Llama, trained on task answers.

`rl-backspace pretrain experiments/bases/arith-1m.yaml OUT` made the embedded model of that name; anyone can run it
again. A file that names a `model` goes on from that one instead.
"""

from __future__ import annotations

import random
import string
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rl_backspace.callbacks import StopOnInterrupt
from rl_backspace.config import PretrainConfig
from rl_backspace.errors import UserError, one_line
from rl_backspace.plugins import load_task
from rl_backspace.policy import load_base, place
from rl_backspace.tasks import Row

SPECIAL = ["<pad>", "<eos>", "<unk>"]


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, `<eos>` to end an answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = string.digits + string.ascii_letters + string.punctuation + " \n"
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def batch(rows: list[Row], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded token ids (B, L) and labels (B, L), -100 outside the answers."""
    prompts = [tokenizer(row["prompt"]).input_ids for row in rows]
    typed = [tokenizer(row["answer"], add_special_tokens=False).input_ids for row in rows]
    answers = [[*ids, tokenizer.eos_token_id] for ids in typed]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def _new(config: PretrainConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A small Llama with random weights, and its tokenizer."""
    tokenizer = character_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.context,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )
    return model, tokenizer


def pretrain(config: PretrainConfig, out: Path) -> None:
    """Train and save; prints the loss every hundred steps.

    Ctrl-C lets the current step end, and what was learned is saved.

    Raises:
        KeyboardInterrupt: it was stopped, and has been saved.
        UserError: there is no such base model or task, or the folder cannot be written.
    """
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    model, tokenizer = _new(config) if config.model is None else load_base(config.model)
    place(model.float()).train()
    rows = [load_task(task.model_dump(exclude={"weight"}), config.seed).train for task in config.tasks]
    weights = [task.weight for task in config.tasks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.learning_rate, total_steps=config.steps, pct_start=0.05
    )
    started, total = time.time(), 0.0
    with StopOnInterrupt() as stop:
        stop.training = True
        for step in range(1, config.steps + 1):
            source = rng.choices(rows, weights, k=config.batch)
            ids, labels = (part.to(model.device) for part in batch([rng.choice(rows) for rows in source], tokenizer))
            logits = model(ids).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
            if step % 100 == 0:
                print(f"step {step}/{config.steps}  loss {total / 100:.4f}  {time.time() - started:.0f} s", flush=True)
                total = 0.0
            if stop.asked:
                break
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        try:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
        except (OSError, SafetensorError) as error:
            said = f"cannot be written ({one_line(error)}); make room, or choose another folder"
            raise UserError(f"{out}: {said}") from error
    if step < config.steps:
        print(f"the model after {step} of {config.steps} steps is in {out}")
        raise KeyboardInterrupt
