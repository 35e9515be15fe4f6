"""Running a sweep: the settings of every run checked before the first one starts, then a process for each, then the
comparison."""

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rl_backspace.config import Config, override, parse, read_yaml
from rl_backspace.errors import UserError, words
from rl_backspace.sweep_file import ARGS, Run, Sweep, arguments, names_in, read

LOCK, KEPT = ".lock", "sweep.yaml"

Process = tuple["subprocess.Popen[bytes]", int]
"""A run's process, and where in its log it begins."""


def run_sweep(
    path: Path, out: Path | None = None, jobs: int = 1, count: int | None = None, dry_run: bool = False
) -> int:
    """Run what is left of a sweep, `jobs` at a time, and compare its runs.

    Returns:
        The exit code: 1 where a run or the comparison failed, 130 where Ctrl-C ended it.

    Raises:
        UserError: mistakes in the file or in any of its runs, or a folder that holds something else.
    """
    from rl_backspace.compare import refuse_others

    sweep = read(path, count)
    configs = check(sweep)
    folder = out or Path("runs") / _folder_name(sweep)
    if not any(os.path.isfile(folder / name) for name in (LOCK, KEPT)):
        from rl_backspace.folder import refuse_existing

        refuse_existing(folder)
    refuse_others(folder)
    if dry_run:
        done = _finished(_places(folder, sweep), sweep, configs)
        print(*(run.id for run in sweep.runs), sep="\n")
        _say(f"# ok: {len(sweep.runs)} runs, {len(done)} of them finished; would write {folder}")
        return 0
    failures: dict[str, str] = {}
    with claimed(folder) as lock:
        places = _places(folder, sweep)
        left = [run for run in sweep.runs if run.id not in _finished(places, sweep, configs)]
        _keep(folder, sweep)
        for run in left:
            move_aside(places[run.id])
        _say(f"{len(left)} of {len(sweep.runs)} runs to do in {folder}; what each prints is in {folder}/<run>.log")
        try:
            todo = {run.id: Job(places[run.id], partial(sweep.command, run, places[run.id])) for run in left}
            run_all(todo, len(places), jobs, lock, failures)
        except KeyboardInterrupt:
            tell(failures, places)
            finished = sum(is_finished(place) for place in places.values())
            _say(f"interrupted: {finished} of {len(sweep.runs)} runs finished; the same command does the others")
            return 130
    return _report(folder, places, failures)


def check(sweep: Sweep) -> dict[str, Config]:
    """The resolved config of each run, by id.

    Raises:
        UserError: a line for each mistake, however many runs make it, with the parameter and the sweep's file.
    """
    try:
        base = read_yaml(Path(sweep.config))
    except UserError as error:
        raise UserError(f"{sweep.path}: command: {error}") from error
    told: dict[str, list[str]] = {}
    in_file = set(resolve(base, [], told)[1])
    in_command = set(resolve(base, sweep.overrides(None), told)[1])
    problems: dict[str, str] = {}
    configs: dict[str, Config] = {}
    alike: dict[str, str] = {}
    for run in sweep.runs:
        changed = [f"{name}: {line}" for name, value in run.values.items() if (line := _changed(value))]
        problems.update({line: f"{sweep.path}: parameters.{line}" for line in changed})
        config, lines = resolve(base, sweep.overrides(run), told) if not changed else (None, [])
        for line in lines:
            its = f"command: {line}" if line in in_command else _blame(line, run)
            problems.setdefault(line, f"{sweep.config}: {line}" if line in in_file else f"{sweep.path}: {its}")
        if config is not None:
            configs[run.id] = config
            if (same := alike.setdefault(config.model_dump_json(), run.id)) != run.id:
                line = f"{same} and {run.id} come to the same run, whatever their values; take one out"
                problems.setdefault("alike", f"{sweep.path}: parameters: {line}")
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems.values())))
    return configs


def resolve(
    base: Mapping[str, Any], overrides: list[str], told: dict[str, list[str]]
) -> tuple[Config | None, list[str]]:
    """A run's config and what is wrong with it. What many runs share is checked once; `told` keeps what it said."""
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

    def once(shared: Any, function: Any, *inputs: Any) -> None:
        key, before = json.dumps([function.__name__, shared], default=str), len(lines)
        if key in told:
            lines.extend(told[key])
        else:
            attempt(function, *inputs)
            told[key] = lines[before:]

    attempt(override, content, overrides)
    config = attempt(parse, content) if not lines else None
    if config is None:
        return None, lines
    attempt(load_terms, config.rewards, None, None)
    if model := attempt(model_of, config):
        once(model, _find_model, model)
    attempt(grpo_config, config, None)
    attempt(warmup_config, config, None)
    spec = config.task.model_dump()
    once(spec, load_task, spec, config.seed)
    if config.audit == "strict" and not lines:
        once(config.model_dump(include={"model", "task", "delete", "rewards"}), _audit, config)
    return config, lines


def _find_model(model: str) -> None:
    """Raises UserError where it is neither a finished run nor anything that can be a base model; loads nothing."""
    from rl_backspace.folder import RunFolder, is_run
    from rl_backspace.policy import find_base

    if is_run(Path(model)):
        RunFolder.open(Path(model))
    else:
        find_base(model)


def _audit(config: Config) -> None:
    """Raises UserError as `train` would, of an experiment that is `audit: strict`."""
    from rl_backspace.audit import heed
    from rl_backspace.experiment import prepare

    heed(prepare(config, None))


def _changed(value: Any) -> str:
    """What is wrong with a value that is another one on a command line; text may become a number, as 1e-5 does."""
    content: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # which is told of the run
        override(content, arguments({"x": value}))
    read = content.get("x", value)
    text = isinstance(value, str)
    if repr(read) == repr(value) or (text and (isinstance(read, float) or value[:1] in ("'", '"'))):
        return ""
    quoted = json.dumps(value, ensure_ascii=False).replace("'", "''") if text else ""
    advice = f"quote it once more, as '{quoted}'" if text else "set it in the experiment file"
    return f"{value!r} would be read as {read!r} on the run's command line; {advice}"


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
    named = re.sub(r"[^\w.-]+", "-", sweep.content.get("name") or "").strip("-.")
    return named or sweep.path.stem


def _places(folder: Path, sweep: Sweep) -> dict[str, Path]:
    """Each run's folder by id: where it is already, though fewer parameters may have varied then, or will be.

    Raises:
        UserError: the runs that are there are none of these.
    """
    from rl_backspace.folder import is_run

    there = {path.name.rpartition("-")[2]: path for path in folder.glob("*") if is_run(path)}
    if there and there.keys().isdisjoint(run.digest for run in sweep.runs):
        raise UserError(
            f"{folder}: holds another sweep: none of its {len(there)} runs is in {sweep.path}; "
            "give --out another folder"
        )
    return {run.id: there.get(run.digest, folder / run.id) for run in sweep.runs}


def is_finished(place: Path) -> bool:
    return (place / "summary.json").exists()


def _finished(places: Mapping[str, Path], sweep: Sweep, configs: Mapping[str, Config]) -> set[str]:
    """The ids of the runs that are there already.

    Raises:
        UserError: one was made with another config, because the experiment file has changed since.
    """
    done = {id for id, place in places.items() if is_finished(place)}
    others = [str(places[id]) for id in done if not is_config(places[id] / "config.yaml", configs[id])]
    if others:
        raise UserError(
            f"{min(others)}: made when {sweep.config} was another, as {len(others)} of the runs there were; "
            "give --out another folder"
        )
    return done


def is_config(path: Path, config: Config) -> bool:
    """Whether the file holds this config."""
    try:
        return parse(read_yaml(path)) == config
    except UserError:
        return False


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[int]:
    """Make the folder and hold its lock: a file descriptor, which the runs inherit, so that it is held for as long as
    any of them goes on."""
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / LOCK, "ab") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{folder}: its runs are going on; wait for them, or end them") from error
            yield stream.fileno()
    except OSError as error:
        said = error.strerror or error
        raise UserError(f"{folder}: {said}; mend that to go on with the same command, or give --out another") from error


def _keep(folder: Path, sweep: Sweep) -> None:
    """A copy of the sweep file, unless it is that."""
    from rl_backspace.folder import atomically

    kept = folder / KEPT
    if not kept.exists() or kept.read_bytes() != sweep.text:
        with atomically(kept) as temporary:
            temporary.write_bytes(sweep.text)


def move_aside(place: Path) -> None:
    """A run that did not finish begins again; what there is of it is kept."""
    if not place.exists():
        return
    aside = place.parent / "unfinished"
    aside.mkdir(exist_ok=True)
    target = next(new for i in itertools.count(1) if not (new := aside / f"{place.name}.{i}").exists())
    place.rename(target)
    _say(f"{place}: did not finish before; moved to {target}, to run again")


@dataclass(frozen=True)
class Job:
    """A run that is left to do.

    Attributes:
        place: its folder.
        command: asked for when it starts.
        after: the id of the job that it needs; where that one fails, it is not run.
    """

    place: Path
    command: Callable[[], list[str]]
    after: str | None = None


def run_all(todo: Mapping[str, Job], total: int, jobs: int, lock: int, failures: dict[str, str]) -> None:
    """Run these, `jobs` at a time, each time the first that can start. Whatever ends this early ends the runs, which
    save.

    Args:
        total: how many there are with those that are done already.
        lock: a file descriptor that they inherit.
        failures: gets what each that failed said last, by id.
    """
    waiting = dict(todo)
    running: dict[str, Process] = {}
    bar = tqdm(total=total, initial=total - len(todo), desc="runs", unit="run", dynamic_ncols=True)
    with _counted() as asked:
        try:
            while waiting or running:
                for id in list(waiting):
                    after = todo[id].after
                    if len(running) == jobs:
                        break
                    if after in waiting or after in running:
                        continue
                    job = waiting.pop(id)
                    if after in failures:
                        bar.update()
                        continue
                    try:
                        running[id] = _start(job, jobs, lock)
                    except UserError as error:
                        failures[id] = str(error)
                        bar.set_postfix(failed=len(failures), refresh=False)
                        bar.update()
                time.sleep(0.05)
                for id in [id for id, (process, _) in running.items() if process.poll() is not None]:
                    process, start = running.pop(id)
                    if not is_finished(todo[id].place):
                        failures[id] = _last_words(_log(todo[id].place), start, process.returncode)
                        bar.set_postfix(failed=len(failures), refresh=False)
                    bar.update()
                if asked:
                    raise KeyboardInterrupt
        finally:
            bar.close()
            _end([process for process, _ in running.values()], asked)


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """The signals that asked this process to end, which only add to this list meanwhile: one that came while a run is
    started would leave that run alone. What is ignored stays so."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _log(place: Path) -> Path:
    return place.with_name(f"{place.name}.log")


def _start(job: Job, jobs: int, lock: int) -> Process:
    """Raises UserError where there is no command or it cannot be started, which the log has too."""
    with open(_log(job.place), "ab") as log:
        start = log.tell()
        try:
            process = subprocess.Popen(
                job.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    "WANDB_RUN_GROUP": job.place.parent.name,
                    **({"OMP_NUM_THREADS": "1"} if jobs > 1 else {}),
                    **os.environ,
                },
                pass_fds=[lock],
                start_new_session=True,  # a Ctrl-C in the terminal reaches it once, from here
            )
        except (UserError, OSError) as error:
            log.write(f"error: {words(error)}\n".encode())
            raise UserError(words(error)) from error
    return process, start


def _end(processes: list[subprocess.Popen[bytes]], asked: list[int]) -> None:
    """End runs after their current step; when asked again, end them at once, and then kill them.

    By SIGTERM, which does as Ctrl-C does and is not ignored where the sweep was started in the background.
    """
    for how in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        before = len(asked)
        for process in processes:
            process.send_signal(how)
        while len(asked) == before or how == signal.SIGKILL:
            if all(process.poll() is not None for process in processes):
                return
            time.sleep(0.05)


def _last_words(log: Path, start: int, code: int) -> str:
    """The last error that a run printed, or else its last line; a run without one gets it, if the disk has room.

    Raises:
        OSError: it has none, which may be why the run failed and would fail all others.
    """
    with open(log, "rb") as stream:
        stream.seek(start)
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        lines = [f"ended with exit code {code} and no word"]
        with open(log, "a") as stream:
            stream.write(f"{lines[0]}\n")
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines)[-1]


def tell(failures: Mapping[str, str], places: Mapping[str, Path]) -> None:
    """What runs that failed said last, by id; once for all that said the same."""
    groups: dict[str, list[str]] = {}
    for id, said in failures.items():
        groups.setdefault(said.replace(id, "<run>"), []).append(id)
    for said, ids in groups.items():
        others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        _say(f"failed: {ids[0]}{others}: {said} (see {_log(places[ids[0]])})")


def _report(folder: Path, places: Mapping[str, Path], failures: Mapping[str, str]) -> int:
    """What the runs that failed said, and the comparison of the others."""
    from rl_backspace.compare import compare

    tell(failures, places)
    try:
        if finished := [place for id, place in places.items() if id not in failures]:
            compare(finished, out=folder)
    except (UserError, OSError) as error:
        _say(f"error: {error}\nthe runs are kept; once that is mended: rl-backspace compare {folder}")
        return 1
    return 1 if failures else 0
