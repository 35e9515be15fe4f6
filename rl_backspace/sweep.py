"""Running a sweep: every run checked before the first one starts, then a process for each, then the comparison."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rl_backspace.config import Config, override, parse, read_yaml
from rl_backspace.errors import UserError
from rl_backspace.sweep_file import ARGS, Run, Sweep, arguments, names_in, read

Process = tuple["subprocess.Popen[bytes]", int]
"""A run's process, and where in its log it begins."""


def run_sweep(
    path: Path, out: Path | None = None, jobs: int = 1, count: int | None = None, dry_run: bool = False
) -> int:
    """Run what is left of a sweep, `jobs` at a time, and compare its runs.

    Returns:
        The exit code: 1 where a run failed, 130 where Ctrl-C ended it.

    Raises:
        UserError: mistakes in the file or in any of its runs, or a folder that holds something else.
    """
    sweep = read(path, count)
    configs = check(sweep)
    folder = out or Path("runs") / _folder_name(sweep)
    _refuse_folder(folder, sweep)
    done = _finished(folder, sweep, configs)
    if dry_run:
        print(*(run.id for run in sweep.runs), sep="\n")
        _say(f"# ok: {len(sweep.runs)} runs, {len(done)} of them finished; would write {folder}")
        return 0
    with _claimed(folder, path) as lock:
        left = [run for run in sweep.runs if run.id not in done]
        for run in left:
            _move_aside(folder, run)
        _say(f"{len(left)} of {len(sweep.runs)} runs to do in {folder}; what each prints is in {folder}/<run>.log")
        try:
            failures = _run_all(sweep, left, folder, jobs, lock)
        except KeyboardInterrupt:
            finished = len(_finished(folder, sweep, configs))
            _say(f"interrupted: {finished} of {len(sweep.runs)} runs finished; the same command does the others")
            return 130
    _report(folder, sweep, failures)
    return 1 if failures else 0


def check(sweep: Sweep) -> dict[str, Config]:
    """The resolved config of each run, by id.

    Raises:
        UserError: a line for each mistake, however many runs make it, with the parameter and the sweep's file.
    """
    try:
        base = read_yaml(Path(sweep.config))
    except UserError as error:
        raise UserError(f"{sweep.path}: command: {error}") from error
    tasks: dict[str, list[str]] = {}
    in_file = set(_resolve(base, [], tasks)[1])
    in_command = set(_resolve(base, sweep.overrides(None), tasks)[1])
    problems: dict[str, str] = {}
    configs: dict[str, Config] = {}
    for run in sweep.runs:
        config, lines = _resolve(base, sweep.overrides(run), tasks)
        if config is not None:
            configs[run.id] = config
        for line in lines:
            its = f"command: {line}" if line in in_command else _blame(line, run)
            problems.setdefault(line, f"{sweep.config}: {line}" if line in in_file else f"{sweep.path}: {its}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems.values())))
    return configs


def _resolve(
    base: Mapping[str, Any], overrides: list[str], tasks: dict[str, list[str]]
) -> tuple[Config | None, list[str]]:
    """A run's config and what is wrong with it. A task is made once, whatever the seed; `tasks` keeps what it said."""
    from rl_backspace.experiment import grpo_config, model_of, warmup_config
    from rl_backspace.plugins import load_task
    from rl_backspace.terms import load_terms

    content = copy.deepcopy(dict(base))
    lines: list[str] = []

    def attempt(function: Any, *inputs: Any) -> Any:
        try:
            return function(*inputs)
        except UserError as error:
            lines.extend(str(error).splitlines())

    attempt(override, content, overrides)
    config = attempt(parse, content) if not lines else None
    if config is None:
        return None, lines
    attempt(load_terms, config.rewards, None, None)
    attempt(model_of, config)
    attempt(grpo_config, config, None)
    attempt(warmup_config, config, None)
    spec = config.task.model_dump()
    task = json.dumps(spec, default=str)
    if task not in tasks:
        before = len(lines)
        attempt(load_task, spec, config.seed)
        tasks[task] = lines[before:]
    else:
        lines += tasks[task]
    return config, lines


def _blame(line: str, run: Run) -> str:
    """A line about a config with the parameter that it is about, or with all values of the first run that made it."""
    for name, value in run.values.items():
        for dashes in ARGS.values():
            told = f"override {f'{dashes}{name}={value}'!r}: "
            if line.startswith(told):
                return f"parameters.{name}: {line.removeprefix(told)}"
    about = names_in(line.partition(": ")[0])
    for name in run.values:
        own = names_in(name)
        shared = min(2, len(own), len(about))  # names that make it the same block
        if own[:shared] == about[:shared]:
            return f"parameters.{line}" if about == own else f"parameters.{name}: {line}"
    return f"{line} (with {', '.join(arguments(run.values, ''))})"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _folder_name(sweep: Sweep) -> str:
    named = re.sub(r"[^\w.-]+", "-", str(sweep.content.get("name") or "")).strip("-.")
    return named or sweep.path.stem


def _refuse_folder(folder: Path, sweep: Sweep) -> None:
    """Refuse a folder with anything in it but this sweep, of which there may be more runs now."""
    from rl_backspace.folder import refuse_existing

    kept = folder / "sweep.yaml"
    if not kept.is_file():
        refuse_existing(folder)
        return
    before = read_yaml(kept)
    changed = [key for key in ("method", "parameters", "command") if before.get(key) != sweep.content.get(key)]
    if changed:
        raise UserError(
            f"{folder}: holds another sweep: its sweep.yaml differs from {sweep.path} in {', '.join(changed)}; "
            "give --out another folder"
        )


def _finished(folder: Path, sweep: Sweep, configs: Mapping[str, Config]) -> set[str]:
    """The ids of the runs that are there already.

    Raises:
        UserError: one was made with another config, because the experiment file has changed since.
    """
    done = {run.id for run in sweep.runs if (folder / run.id / "summary.json").exists()}
    others = [run for run in done if not _is_config(folder / run / "config.yaml", configs[run])]
    if others:
        raise UserError(
            f"{folder}: {len(others)} of the runs in it, such as {min(others)}, were made when {sweep.config} was "
            "another; give --out another folder"
        )
    return done


def _is_config(path: Path, config: Config) -> bool:
    try:
        return parse(read_yaml(path)) == config
    except UserError:
        return False


@contextlib.contextmanager
def _claimed(folder: Path, path: Path) -> Iterator[int]:
    """Make the folder with a copy of the sweep file, and hold its lock: a file descriptor, which the runs inherit, so
    that it is held for as long as any of them goes on."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "sweep.yaml", "a+b") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: runs of this sweep are going on; wait for them, or end them") from error
            stream.truncate(0)
            stream.write(path.read_bytes())
            stream.flush()
            yield stream.fileno()
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give --out another folder") from error


def _move_aside(folder: Path, run: Run) -> None:
    """A run that did not finish begins again; what there is of it is kept."""
    if not (folder / run.id).exists():
        return
    aside = folder / "unfinished"
    aside.mkdir(exist_ok=True)
    target = next(new for i in itertools.count(1) if not (new := aside / f"{run.id}.{i}").exists())
    (folder / run.id).rename(target)
    _say(f"{folder / run.id}: did not finish before; moved to {target}, to run again")


def _run_all(sweep: Sweep, left: list[Run], folder: Path, jobs: int, lock: int) -> dict[str, str]:
    """Run them; what each that failed said last, by id. Whatever ends this early ends the runs, which save."""
    waiting, failures = list(left), {}
    running: dict[str, Process] = {}
    environment = {"WANDB_RUN_GROUP": folder.name, **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}), **os.environ}
    bar = tqdm(total=len(sweep.runs), initial=len(sweep.runs) - len(left), desc="sweep", unit="run", dynamic_ncols=True)
    with _ended_as_by_ctrl_c():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[run.id] = _start(sweep.command(run, folder / run.id), folder, run, environment, lock)
                time.sleep(0.05)
                for id in [id for id, (process, _) in running.items() if process.poll() is not None]:
                    process, start = running.pop(id)
                    if not (folder / id / "summary.json").exists():
                        failures[id] = _last_words(folder / f"{id}.log", start, process.returncode)
                        bar.set_postfix(failed=len(failures), refresh=False)
                    bar.update()
        finally:
            bar.close()
            _end([process for process, _ in running.values()])
    return failures


@contextlib.contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Where SIGTERM, or SIGHUP unless it is ignored, would end this process, they are a KeyboardInterrupt."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(command: list[str], folder: Path, run: Run, environment: Mapping[str, str], lock: int) -> Process:
    with open(folder / f"{run.id}.log", "ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=[lock],
            start_new_session=True,  # a Ctrl-C in the terminal reaches it once, from here
        )
    return process, start


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """End runs as Ctrl-C does, after their current step; the second one ends them at once and the third kills them."""
    for how in (signal.SIGINT, signal.SIGINT, signal.SIGKILL):
        for process in processes:
            process.send_signal(how)
        with contextlib.suppress(KeyboardInterrupt):
            for process in processes:
                process.wait()
            return


def _last_words(log: Path, start: int, code: int) -> str:
    """The last error that a run printed, or else its last line."""
    with open(log, "rb") as stream:
        stream.seek(start)
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"ended with exit code {code} and no word"])[-1]


def _report(folder: Path, sweep: Sweep, failures: Mapping[str, str]) -> None:
    """The comparison of the runs that finished, and what the others said, once for all that said the same."""
    finished = [folder / run.id for run in sweep.runs if run.id not in failures]
    if finished:
        from rl_backspace.compare import compare

        compare(finished, out=folder)
    groups: dict[str, list[str]] = {}
    for id, said in failures.items():
        groups.setdefault(said.replace(id, "<run>"), []).append(id)
    for said, ids in groups.items():
        others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        _say(f"failed: {ids[0]}{others}: {said} (see {folder / ids[0]}.log)")
