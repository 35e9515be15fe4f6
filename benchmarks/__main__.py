"""`python -m benchmarks`: every ratio beside its goal."""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from benchmarks import report
from benchmarks.cases import CASES, Setting, Unfair
from benchmarks.measure import Comparison, Peaks, compare, peak
from benchmarks.models import SIZES
from rl_backspace.errors import UserError

RESULTS = Path(__file__).parent / "results"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which to run: {', '.join(CASES)} (default: all)")
    pairs, threads, size = report.at_least(2), report.at_least(0), report.at_least(1)
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
    """The exit code: 1 where a case was refused; a peer that is not installed is no failure."""
    given, console = arguments(), Console()
    if given.threads:
        torch.set_num_threads(given.threads)
    setting = Setting(given.size, given.batch, given.prompt, given.actions)
    path = given.out or RESULTS / f"{time.strftime('%Y%m%d-%H%M%S')}-{given.size}-{torch.get_num_threads()}t.json"
    results, failed = {}, False
    with Progress(console=console, transient=True) as progress:
        for key in given.cases or CASES:
            case = CASES[key]
            try:
                ours, peer = case.setup(setting)
            except ModuleNotFoundError as error:
                console.print(f"[yellow]{key} is left out: its peer needs pip install --no-deps {error.name}")
                continue
            except (Unfair, UserError) as error:
                console.print(f"[red]{key} is left out: {escape(str(error))}")
                failed = True
                continue
            bar = progress.add_task(f"{case.name} / {case.peer}", total=given.repeats)
            if case.memory:
                compared: Comparison | Peaks = Peaks(peak(ours), peak(peer))
            else:
                compared = compare(ours, peer, given.repeats, on_pair=partial(progress.advance, bar))
            results[key] = report.Result(case, compared)
            report.write(results, setting, path)  # case by case, so that none is lost
    if not results:
        return int(failed)
    report.table(list(results.values()), setting, console)
    console.print(f"written to {path}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
