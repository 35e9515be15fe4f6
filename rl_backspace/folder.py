"""The run folder: everything a run leaves behind, written as it happens.

config.yaml       the resolved config            metrics.jsonl   one line per logged step
versions.json     packages, machine, seed        traces.jsonl    a sample of rollouts of each step
adapter/          adapter, tokenizer, semantics  summary.json    before and after, and the run's counts
model/            in its place with `lora: null`: the whole model, tokenizer, semantics
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rl_backspace.config import Config, dump, parse, read_yaml
from rl_backspace.errors import UserError

PACKAGES = ("rl-backspace", "torch", "transformers", "trl", "peft", "wandb", "numpy")

POLICIES = {"model": "config.json", "adapter": "adapter_config.json"}  # folders of policies, and a file of each


class RunFolder:
    """A run's files.

    Attributes:
        path: the folder.
        policy: where in it the policy is saved.
    """

    def __init__(self, path: Path, policy: Path):
        self.path, self.policy = path, policy
        self.mirror: Any = None  # a wandb run that gets every metric too

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """A new run folder with its config and versions.

        Raises:
            UserError: the folder holds something already, or cannot be written.
        """
        refuse_existing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "config.yaml").write_text(dump(config), encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"{path}: cannot write the run folder: {error.strerror}; choose another with --out"
            ) from error
        folder = cls(path, policy_folder(path, config))
        versions = {name: version(name) for name in PACKAGES}
        machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
        folder._write("versions.json", {"packages": versions, **machine, "seed": config.seed})
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run.

        Raises:
            UserError: there is no run here, or it has no policy yet.
        """
        policies = [path / name for name, file in POLICIES.items() if (path / name / file).exists()]
        if policies and (path / "config.yaml").exists():
            return cls(path, policies[0])
        needed = " or ".join(f"{name}/{file}" for name, file in POLICIES.items())
        missing = needed if (path / "config.yaml").exists() else "config.yaml"
        raise UserError(f"{path}: no finished run here ({missing} is missing); give a folder that `train` wrote")

    def config(self) -> Config:
        return parse(read_yaml(self.path / "config.yaml"))

    def metrics(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; wandb gets the same under `phase/`."""
        self._append("metrics.jsonl", {"phase": phase, "step": step, **values})
        if self.mirror is not None:
            self.mirror.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self.mirror.log({f"{phase}/{key}": value for key, value in {"step": step, **values}.items()})

    def trace(self, record: Mapping[str, Any]) -> None:
        """Append one line to traces.jsonl."""
        self._append("traces.jsonl", record)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", summary)
        if self.mirror is not None:
            self.mirror.summary.update(summary)

    @contextlib.contextmanager
    def mirrored(self, config: Config) -> Iterator[None]:
        """Log to wandb too while this lasts, if the config asks for it."""
        if config.wandb is None:
            yield
            return
        import wandb

        settings = config.wandb.model_dump()
        try:
            self.mirror = wandb.init(name=config.name, config=config.model_dump(), dir=self.path, **settings)
        except wandb.errors.Error as error:
            raise UserError(f"wandb: {str(error).splitlines()[0]}; set wandb.mode to offline to do without") from error
        try:
            yield
        finally:
            self.mirror.finish()
            self.mirror = None

    def _append(self, file: str, record: Mapping[str, Any]) -> None:
        with open(self.path / file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def _write(self, file: str, content: Mapping[str, Any]) -> None:
        """All or nothing, so that a crash leaves no half file."""
        temporary = self.path / f".{file}.tmp"
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        temporary.replace(self.path / file)


def policy_folder(run: Path, config: Config) -> Path:
    """Where a run saves its policy: an adapter, or the whole model where all of it is trained."""
    return run / ("model" if config.lora is None else "adapter")


def refuse_existing(path: Path) -> None:
    """Nothing is ever overwritten.

    Raises:
        UserError: the path is a file, a folder that is not empty, or one that cannot be made.
    """
    try:
        _refuse_impossible(path)
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder: {error.strerror}; choose another with --out") from error
    if taken and (path / "config.yaml").exists() and not (path / "summary.json").exists():
        kept = path / ("model" if (path / "model").exists() else "adapter")
        raise UserError(
            f"{path}: already there, and the run in it did not finish; its {kept.name}, if any, is in "
            f"{kept}; choose another folder with --out, or remove this one"
        )
    if taken:
        raise UserError(f"{path}: already there and not empty; choose another folder with --out, or another name")


def _refuse_impossible(path: Path) -> None:
    """Raises the OSError that making the folder would: a file on the way to it, or a name that is too long."""
    if _is_there(path):
        return
    parent = next(parent for parent in path.absolute().parents if _is_there(parent))
    if not parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{parent} is a file")
    for part in path.parts:
        _is_there(parent / part)


def _is_there(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
