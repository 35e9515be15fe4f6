"""The run folder: everything a run leaves behind, written as it happens.

config.yaml       the resolved config            metrics.jsonl   one line per logged step
versions.json     packages, machine, seed        traces.jsonl    a sample of rollouts of each step
adapter/          adapter, tokenizer, semantics  summary.json    before and after, and the run's counts
controls.json     what competes with deleting, with `evaluation.controls`
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

from rl_backspace.config import Config, Wandb, dump, parse, read_yaml
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
        self._table: TraceTable | None = None  # and traces

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
            folder = cls(path, path / ("model" if config.lora is None else "adapter"))
            versions = {name: version(name) for name in PACKAGES}
            machine = {"python": platform.python_version(), "platform": platform.platform(), "cpus": os.cpu_count()}
            folder._write("versions.json", {"packages": versions, **machine, "seed": config.seed})
        except OSError as error:
            raise UserError(
                f"{path}: cannot write the run folder: {error.strerror}; choose another with --out"
            ) from error
        return folder

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """A finished run.

        Raises:
            UserError: there is no run here, or it has no policy yet.
        """
        policies = [path / name for name, file in POLICIES.items() if (path / name / file).exists()]
        if policies and is_run(path):
            return cls(path, policies[0])
        needed = " or ".join(f"{name}/{file}" for name, file in POLICIES.items())
        missing = needed if is_run(path) else "config.yaml"
        raise UserError(f"{path}: no finished run here ({missing} is missing); give a folder that `train` wrote")

    def config(self) -> Config:
        return parse(read_yaml(self.path / "config.yaml"))

    def summary(self) -> dict[str, Any] | None:
        """summary.json; None while the run has not finished."""
        try:
            return json.loads((self.path / "summary.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def metrics(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; wandb gets the same under `phase/`."""
        self._append("metrics.jsonl", {"phase": phase, "step": step, **values})
        if self.mirror is not None:
            self.mirror.define_metric(f"{phase}/*", step_metric=f"{phase}/step")
            self.mirror.log({f"{phase}/{key}": value for key, value in {"step": step, **values}.items()})

    def trace(self, record: Mapping[str, Any]) -> None:
        """Append one line to traces.jsonl; wandb gets a table of them in the end."""
        self._append("traces.jsonl", record)
        if self._table is not None:
            self._table.add(record)

    def examined(self, found: Mapping[str, Any]) -> None:
        """controls.json: what `controls.examine` found."""
        self._write("controls.json", found)

    def summarise(self, summary: Mapping[str, Any]) -> None:
        self._write("summary.json", summary)
        if self.mirror is not None:
            self.mirror.summary.update(summary)

    @contextlib.contextmanager
    def mirrored(self, config: Config) -> Iterator[None]:
        """Log to wandb too while this lasts, if the config asks for it or wandb's agent started the run."""
        if config.wandb is None and not _by_agent():
            yield
            return
        import wandb

        settings = (config.wandb or Wandb()).model_dump()
        if _by_agent():  # the sweep has a project, and can only see what is online
            settings |= {"project": None, "mode": None}
        try:
            self.mirror = wandb.init(name=self.path.name, config=config.model_dump(), dir=self.path, **settings)
        except wandb.errors.Error as error:
            raise UserError(f"wandb: {str(error).splitlines()[0]}; set wandb.mode to offline to do without") from error
        self._table = TraceTable()
        failed = 1
        try:
            yield
            failed = 0
        finally:
            if self._table.records:
                columns, rows = self._table.rows()
                self.mirror.log({"traces": wandb.Table(columns, rows, allow_mixed_types=True)})
            self.mirror.finish(exit_code=failed)
            self.mirror = self._table = None

    def _append(self, file: str, record: Mapping[str, Any]) -> None:
        with open(self.path / file, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(record) + "\n")

    def _write(self, file: str, content: Mapping[str, Any]) -> None:
        with atomically(self.path / file) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


class TraceTable:
    """Traces for wandb, `MOST_ROWS` of them at most: of every step, or of every n-th in a run with more."""

    MOST_ROWS = 1000

    def __init__(self) -> None:
        self.records: list[Mapping[str, Any]] = []
        self._every = 1

    def add(self, record: Mapping[str, Any]) -> None:
        if record["step"] % self._every == 0:
            self.records.append(record)
        while len(self.records) > self.MOST_ROWS and len({record["step"] for record in self.records}) > 1:
            self._every *= 2
            self.records = [record for record in self.records if record["step"] % self._every == 0]
        del self.records[self.MOST_ROWS :]

    def rows(self) -> tuple[list[str], list[list[Any]]]:
        """Column names and rows; a prompt of chat messages is its last one."""
        rewards = list(self.records[0]["rewards"])
        columns = ("step", "prompt", "typed", "visible", "end", "deletes")
        texts = [
            {**record, "prompt": p if isinstance(p := record["prompt"], str) else p[-1]["content"]}
            for record in self.records
        ]
        rows = [[*(r[column] for column in columns), *(r["rewards"][name] for name in rewards)] for r in texts]
        return [*columns, *(f"rewards/{name}" for name in rewards)], rows


@contextlib.contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`, which is replaced once all is written, and left as it was by a crash."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def default_folder(config: Config) -> Path:
    """runs/<name>, and in a sweep of wandb's, where many runs have one name, runs/<name>-<the run's id>."""
    return Path("runs") / (f"{config.name}-{os.environ['WANDB_RUN_ID']}" if _by_agent() else config.name)


def _by_agent() -> bool:
    """Whether `wandb agent` started this run."""
    return {"WANDB_SWEEP_ID", "WANDB_RUN_ID"} <= os.environ.keys()


def is_run(path: Path) -> bool:
    """Whether a run was begun there."""
    return (path / "config.yaml").is_file()


def refuse_existing(path: Path, how: str = " with --out") -> None:
    """Nothing is ever overwritten.

    Args:
        how: another folder is chosen; empty where it is an argument of the command.

    Raises:
        UserError: the path is a file, a folder that is not empty, or one that cannot be made.
    """
    try:
        _refuse_impossible(path)
        taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    except OSError as error:
        raise UserError(f"{path}: cannot be a folder: {error.strerror}; choose another{how}") from error
    if taken and (path / "config.yaml").exists() and not (path / "summary.json").exists():
        kept = path / ("model" if (path / "model").exists() else "adapter")
        raise UserError(
            f"{path}: already there, and the run in it did not finish; its {kept.name}, if any, is in "
            f"{kept}; choose another folder{how}, or remove this one"
        )
    if taken:
        raise UserError(f"{path}: already there and not empty; choose another folder{how}")


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
