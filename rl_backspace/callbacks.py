"""What happens around a training step: progress, metrics on disk, and a clean stop on Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl_backspace.folder import RunFolder

SHOWN = {"loss": "loss", "reward": "reward", "accuracy": "accuracy", "deletes_per_answer": "deletes"}


_bars: list[Any] = []


def close_bars() -> None:
    """End every open bar's line, so that what is printed next has a line of its own."""
    while _bars:
        _bars.pop().close()


class Progress(TrainerCallback):
    """A bar with reward, accuracy, deletes per answer and the time left; the same numbers in metrics.jsonl."""

    def __init__(self, phase: str, folder: RunFolder):
        self.phase, self.folder = phase, folder
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, desc=self.phase, unit="step", dynamic_ncols=True)
        _bars.append(self.bar)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        shown = {label: f"{logs[key]:.3f}" for key, label in SHOWN.items() if isinstance(logs.get(key), float)}
        if "reward" in logs:
            shown.pop("loss", None)
        if shown and self.bar is not None:
            self.bar.set_postfix(shown)
        self.folder.metrics(self.phase, state.global_step, logs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        close_bars()


class StopOnInterrupt(TrainerCallback):
    """In training, the first Ctrl-C lets the current step end, so that what is kept is whole; a second one stops
    at once. Elsewhere the first one does. SIGTERM, by which other programs end one, is the same."""

    def __init__(self) -> None:
        self.asked = self.training = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnInterrupt:
        if threading.current_thread() is threading.main_thread():  # others get no signals, and may set no handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, signum: int, frame: FrameType | None) -> None:
        if self.asked or not self.training:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step; once more to stop at once")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.asked:
            control.should_training_stop = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training = True

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.training = False
