"""Local checkpoints of tiny models, as a user would have them: a folder with a model and a tokenizer."""

from __future__ import annotations

from pathlib import Path

from conftest import tiny

from rl_backspace.pretrain import character_tokenizer

CHARACTERS = len(character_tokenizer())  # the tokenizer's size: ids beyond it are spare rows


def checkpoint(folder: Path, family: str = "Llama", spare: int = 2, **overrides: object) -> Path:
    """Save a random model of a family with `spare` rows that its character tokenizer leaves free."""
    tokenizer = character_tokenizer()
    tiny(family, vocab_size=len(tokenizer) + spare, **overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
