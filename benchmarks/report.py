"""Results as a table for people and as JSON with the machine they hold for."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cases import Case, Setting
from benchmarks.measure import Comparison, Peaks
from rl_backspace.errors import UserError, one_line, words
from rl_backspace.folder import atomically


def at_least(least: int, most: int = 1_000_000) -> Callable[[str], int]:
    """A number of the command line."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"got {text}; expected a whole number from {least} to {most:,}")
        return value

    return number


def writable(ends: str, *beside: str) -> Callable[[str], Path]:
    """A file of the command line that can be written, so that no work is lost for it, and beside it others that end
    so; in a folder that is there or was made."""

    def path(text: str) -> Path:
        file = Path(text)
        if file.suffix != ends:
            raise argparse.ArgumentTypeError(f"got {text}; expected a file that ends in {ends}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            for one in (file.resolve(), *(file.with_suffix(other).resolve() for other in beside)):
                is_new = not one.exists()
                one.open("a").close()
                if is_new:
                    one.unlink()
        except OSError as error:
            raise argparse.ArgumentTypeError(f"{one_line(error)}; name another file") from error
        return file

    return path


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command and end with its exit code: 2 where what was asked for cannot be, 130 where Ctrl-C ended it."""
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except (UserError, OSError) as error:  # such as a full disk
        print(f"error: {words(error)}", file=sys.stderr)
        code = 2
    sys.exit(code)


@dataclass(frozen=True)
class Result:
    case: Case
    comparison: Comparison | Peaks

    @property
    def verdict(self) -> str:
        better = (
            self.comparison.ratio <= self.case.goal if self.case.memory else self.comparison.ratio >= self.case.goal
        )
        return "ok" if better else "miss"


def table(results: list[Result], setting: Setting, console: Console) -> None:
    out = Table(
        title=f"{setting.size} model, batch {setting.batch}, prompts of {setting.prompt}, {setting.actions} actions, "
        f"{torch.get_num_threads()} thread(s)",
        caption="sides: actions per second (warm-up: learned tokens; start-up: starts), or tensors at once, at most; "
        "ratio: the median of the repeats'; spread: their quartiles",
    )
    for name in ("ours", "peer"):
        out.add_column(name)
    for name in ("our side", "peer's", "ratio", "spread", "goal"):
        out.add_column(name, justify="right")
    out.add_column("")
    for result in results:
        compared = result.comparison
        if isinstance(compared, Peaks):
            sides, spread, goal = [f"{side / 1e6:,.1f} MB" for side in (compared.ours, compared.peer)], "", "at most "
        else:
            rates = [sum(side.work) / sum(side.wall) for side in (compared.ours, compared.peer)]
            sides = [f"{rate:,.{0 if rate > 10 else 2}f}" for rate in rates]
            spread, goal = "{:.2f} to {:.2f}".format(*compared.spread), ""
        out.add_row(
            result.case.name,
            result.case.peer,
            *sides,
            f"{compared.ratio:.2f}",
            spread,
            f"{goal}{result.case.goal:g}",
            f"[green]{result.verdict}" if result.verdict == "ok" else f"[red]{result.verdict}",
        )
    console.print(out)
    load, cores = _load(), os.cpu_count() or 1
    if load > 1.5 * cores:
        console.print(f"[yellow]the machine is busy (load {load:.1f} on {cores} cores): spreads are wide")


def write(results: dict[str, Result], setting: Setting, path: Path) -> None:
    """Every repeat's work and seconds, the machine and the versions, as JSON."""
    content = {
        "versions": {name: version(name) for name in ("rl-backspace", "torch", "transformers", "trl", "peft")},
        "setting": asdict(setting),
        "cases": {
            key: {
                "ours": result.case.name,
                "peer": result.case.peer,
                "goal": result.case.goal,
                "ratio": result.comparison.ratio,
                "verdict": result.verdict,
                **_measured(result.comparison),
            }
            for key, result in results.items()
        },
    }
    save(content, path)


def save(content: dict[str, Any], path: Path) -> None:
    """As JSON, with the time and the machine; whole or not at all."""
    content = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "machine": machine(), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _measured(compared: Comparison | Peaks) -> dict[str, Any]:
    if isinstance(compared, Peaks):
        return {"bytes": asdict(compared)}
    return {
        "spread": compared.spread,
        "ratios": compared.ratios(),
        "ratios_cpu": compared.ratios("cpu"),
        "timings": asdict(compared),
    }


def machine() -> dict[str, Any]:
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": _load(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": "float32",
    }


def _load() -> float:
    """Processes that ran or waited, averaged over the last minute; this one is among them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
