"""`python -m benchmarks`: every ratio beside its goal."""

from __future__ import annotations

import argparse
import os
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from benchmarks import report
from benchmarks.cases import CASES, Setting
from benchmarks.measure import Comparison, Peaks, compare, peak
from benchmarks.models import SIZES
from rl_backspace.errors import UserError, first_line

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which to run: {', '.join(CASES)} (default: all)")
    pairs, threads, size = report.at_least(2), report.at_least(0, os.cpu_count() or 1), report.at_least(1)
    parser.add_argument("--repeats", type=pairs, default=9, help="measured pairs per case, at least 2 (default 9)")
    parser.add_argument("--threads", type=threads, default=1, help="torch threads (default 1; 0: torch's own choice)")
    out = report.writable(".json")
    parser.add_argument("--out", type=out, help="JSON file for the results (default: one by date in results/)")
    for name, default in (("batch", 64), ("prompt", 32), ("actions", 64)):
        parser.add_argument(f"--{name}", type=size, default=default)
    parser.add_argument("--size", choices=sorted(SIZES), default="1m")
    given = parser.parse_args()
    unknown = sorted(set(given.cases) - set(CASES))
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    return given


def main() -> int:
    """The exit code: 2 where a case cannot be of the size that was asked for, 1 where one was refused for another
    reason; a peer that is not installed is no failure."""
    given, console = arguments(), Console()
    if given.threads:
        torch.set_num_threads(given.threads)
    setting = Setting(given.size, given.batch, given.prompt, given.actions)
    path = given.out or RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{given.size}-{torch.get_num_threads()}t.json"
    results, failed = {}, 0
    with Progress(console=console, transient=True) as progress:
        for key in given.cases or CASES:
            case = CASES[key]
            bar = progress.add_task(f"{case.name} / {case.peer}", total=given.repeats)
            try:
                ours, peer = case.setup(setting)
                if case.memory:
                    compared: Comparison | Peaks = Peaks(peak(ours), peak(peer))
                else:
                    compared = compare(ours, peer, given.repeats, on_pair=partial(progress.advance, bar))
            except ModuleNotFoundError as error:
                console.print(f"[yellow]{key} is left out: its peer needs pip install --no-deps {error.name}")
                continue
            except (UserError, MemoryError, RuntimeError) as error:  # Unfair, and torch's of memory
                console.print(f"[red]{key} is left out: {escape(first_line(error))}")
                failed = max(failed, 2 if isinstance(error, UserError) else 1)
                continue
            results[key] = report.Result(case, compared)
            report.write(results, setting, path)  # case by case, so that none is lost
    if results:
        report.table(list(results.values()), setting, console)
        console.print(f"written to {path}")
    return failed


if __name__ == "__main__":
    report.run(main)
