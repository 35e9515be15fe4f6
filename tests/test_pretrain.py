"""Base models from nothing, and on from one that is there."""

from __future__ import annotations

import contextlib
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from rl_backspace.config import PretrainConfig, parse_pretrain
from rl_backspace.errors import UserError
from rl_backspace.policy import find_base, load_base
from rl_backspace.pretrain import pretrain


def config(**fields: object) -> PretrainConfig:
    tasks = [{"fn": "signs", "count": 3, "train": 50, "test": 1}]
    shape = {} if "model" in fields else {"width": 16, "layers": 1, "heads": 2}
    return parse_pretrain({"tasks": tasks, "batch": 8, **shape, **fields})


def test_it_learns_and_goes_on_from_what_was_learned(tmp_path: Path) -> None:
    pretrain(config(steps=300), tmp_path / "first")
    pretrain(config(steps=1, model=str(tmp_path / "first"), learning_rate=1e-6), tmp_path / "second")
    (first, tokenizer), (second, _) = load_base(str(tmp_path / "first")), load_base(str(tmp_path / "second"))
    assert second.config.num_hidden_layers == 1
    gaps = [(a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert 0 < max(gaps) < 1e-4
    prompt = tokenizer("1 2 3=6:", return_tensors="pt")
    with torch.no_grad():
        chances = second(**prompt).logits[0, -1].softmax(-1)
    assert chances[tokenizer("+-").input_ids].sum() > 0.9


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model: .arith-2m. is no folder; did you mean"):
        pretrain(config(steps=1, model="arith-2m"), tmp_path / "out")
    assert find_base("runs/arith-2m")[0] == "runs/arith-2m"  # which may be pretrained later
    with pytest.raises(UserError, match="layers: 'arith-1m' has a shape of its own; leave layers out"):
        config(model="arith-1m", layers=7)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("File too large")])
def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def full(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", full)
    with pytest.raises(UserError, match=r"out: cannot be written \(.*(No space|too large).*\); make room, or"):
        pretrain(config(steps=1), tmp_path / "out")


def test_it_runs_in_any_thread(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pretrain, config(steps=1), tmp_path / "out").result()
    load_base(str(tmp_path / "out"))


@pytest.mark.parametrize("steps", [3, 50])
def test_what_was_learned_is_kept_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    before, clip, taken = signal.getsignal(signal.SIGINT), torch.nn.utils.clip_grad_norm_, []

    def interrupted(*args: Any) -> Any:
        taken.append(1)
        if len(taken) == 3:
            signal.raise_signal(signal.SIGINT)
        return clip(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt) if steps > 3 else contextlib.nullcontext():
        pretrain(config(steps=steps), tmp_path / "out")
    assert len(taken) == 3
    pretrain(config(steps=1, model=str(tmp_path / "out")), tmp_path / "on")
    assert signal.getsignal(signal.SIGINT) is before
