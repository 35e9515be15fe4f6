"""The benchmarks compare what they say: both sides do the same work, and the command loses no result."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from benchmarks import __main__ as command
from benchmarks import growth, measure, profile
from benchmarks.cases import CASES, Case, Setting, Unfair, expect, expect_equal_gradients
from benchmarks.measure import Comparison, Peaks, Timing, compare, peak
from benchmarks.report import Result

SMALL = Setting("1m", batch=8, prompt=4, actions=16)
LONG = {"grpo", "grpo-shared", "warmup", "warmup-long", "start-up", "backtrack-sampler"}  # or not installed


@pytest.fixture(autouse=True)
def without_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that this process holds, half a second each."""
    monkeypatch.setattr(measure.gc, "collect", lambda: 0)


@pytest.mark.parametrize("key", sorted(CASES.keys() - LONG))
def test_both_sides_of_a_case_do_the_same_work(key: str) -> None:
    ours, peer = CASES[key].setup(SMALL)  # compares tokens, deletes, log-probabilities or gradients
    assert ours() > 0 and peer() > 0


@pytest.mark.parametrize("key", sorted(CASES))
def test_every_case_has_a_row_in_the_readme(key: str) -> None:
    text = (Path(command.__file__).parent / "README.md").read_text(encoding="utf-8")
    goal = f"{'at most ' if CASES[key].memory else ''}{CASES[key].goal:g}"
    assert any(f"`{key}`" in line and line.endswith(f"| {goal} |") for line in text.splitlines())


def test_who_goes_first_changes_and_the_first_runs_do_not_count() -> None:
    order: list[str] = []

    def side(name: str, work: int) -> Any:
        def run() -> int:
            order.append(name)
            return work

        return run

    found = compare(side("ours", 6), side("peer", 3), 3)
    assert order == ["ours", "peer", "ours", "peer", "peer", "ours", "ours", "peer"]
    assert found.ours.work == [6] * 3 and found.peer.work == [3] * 3
    assert len(found.ours.wall) == len(found.peer.cpu) == 3


def test_a_ratio_is_that_of_neighbours_in_time() -> None:
    """Not that of all work over all time, which a single slow pair would rule."""
    slow = Comparison(Timing([10] * 3, [1, 100, 1], [1] * 3), Timing([1] * 3, [1, 100, 1], [1] * 3))
    assert slow.ratios() == [10] * 3 and slow.ratio == 10 and slow.spread == (10, 10)


@pytest.mark.parametrize(("memory", "ratio", "verdict"), [(False, 2, "ok"), (False, 1, "miss"), (True, 2, "miss")])
def test_more_speed_and_less_memory_are_better(memory: bool, ratio: int, verdict: str) -> None:
    case = Case("", "", 1.5, lambda setting: (int, int), memory)
    speed = Comparison(Timing([ratio] * 2, [1] * 2, [1] * 2), Timing([1] * 2, [1] * 2, [1] * 2))
    assert Result(case, Peaks(ratio, 1) if memory else speed).verdict == verdict


def test_the_peak_is_what_is_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # where these are not

    def apart() -> int:
        for _ in range(4):
            torch.zeros(1000)
        return 1

    def together() -> int:
        return len([torch.zeros(1000) for _ in range(4)])

    assert peak(together) == 4 * peak(apart) >= 16_000


def run(monkeypatch: pytest.MonkeyPatch, main: Any, arguments: Sequence[object]) -> int:
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    try:
        return int(main() or 0)
    except SystemExit as ended:
        return int(ended.code or 0)


def one() -> int:
    return 1


def unfair(setting: Setting) -> Any:
    expect(False, "both sides do the same")


def absent(setting: Setting) -> Any:
    raise ModuleNotFoundError("no such package", name="some_peer")


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch) -> None:
    fair = {"first": one, "last": one}
    made = {
        "unfair": Case("a", "b", 1.0, unfair),
        "absent": Case("a", "b", 1.0, absent),
        **{name: Case("a", "b", 0.0, lambda setting, side=side: (side, side)) for name, side in fair.items()},  # type: ignore[misc]
    }
    monkeypatch.setattr(command, "CASES", made)


def test_a_refused_case_leaves_the_others(cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    out = tmp_path / "deep" / "results.json"
    assert run(monkeypatch, command.main, ["--repeats", 2, "--out", out]) == 1
    found = json.loads(out.read_text())
    assert list(found["cases"]) == ["first", "last"] and found["cases"]["last"]["verdict"] == "ok"
    said = " ".join(capsys.readouterr().out.split())
    assert "unfair is left out: not a fair comparison; expected that both sides do the same" in said
    assert "pip install --no-deps some_peer" in said


def test_a_peer_that_is_not_installed_is_no_failure(
    cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert run(monkeypatch, command.main, ["absent", "last", "--repeats", 2, "--out", tmp_path / "a.json"]) == 0
    assert run(monkeypatch, command.main, ["absent", "--out", tmp_path / "b.json"]) == 0
    assert not (tmp_path / "b.json").exists()


def test_results_are_kept_when_a_later_case_breaks(
    cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(setting: Setting) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(command.CASES, "broken", Case("a", "b", 1.0, broken))
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, command.main, ["first", "broken", "--repeats", 2, "--out", tmp_path / "a.json"])
    assert list(json.loads((tmp_path / "a.json").read_text())["cases"]) == ["first"]


@pytest.mark.parametrize("stops", ["measuring", "drawing", "never"])
def test_half_a_picture_does_not_take_the_place_of_a_whole_one(
    stops: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points, is_whole = iter(range(5 if stops == "measuring" else 8)), stops == "never"

    def compared(ours: Any, peer: Any, repeats: int) -> Comparison:
        if next(points, None) is None:
            raise KeyboardInterrupt
        return Comparison(Timing([4], [1.0], [1.0]), Timing([2], [1.0], [1.0]))

    axis = growth.Axis("rows", (4, 16), lambda setting, value: (lambda: 1, lambda: 1))
    monkeypatch.setattr(growth, "AXES", dict.fromkeys(growth.AXES, axis))
    monkeypatch.setattr(growth, "compare", compared)
    found, part, picture = tmp_path / "a.json", tmp_path / "a.part.json", tmp_path / "a.png"
    found.write_text("earlier")
    picture.write_text("earlier")
    if stops == "drawing":

        def half(figure: Figure, file: Path, **options: Any) -> None:
            file.write_text("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(Figure, "savefig", half)
    with contextlib.nullcontext() if is_whole else pytest.raises(KeyboardInterrupt):
        run(monkeypatch, growth.main, ["--out", picture])
    assert (picture.read_bytes() == b"earlier") != is_whole
    assert (found.read_text() == "earlier") != is_whole and part.exists() != is_whole
    lines = json.loads((found if is_whole else part).read_text())["microseconds"]
    assert lines["batch"] == {"values": [4, 16], "ours": [250000.0] * 2, "peer": [500000.0] * 2}
    assert len(lines) == (3 if stops == "measuring" else 4)


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (command.main, ["generat"], "no case generat; there are generate,"),
        (command.main, ["--repeats", "1"], "got 1; expected a whole number from 2 to 1,000,000"),
        (command.main, ["--batch", "0"], "got 0; expected a whole number from 1 to 1,000,000"),
        (command.main, ["--actions", "many"], "got many; expected a whole number from 1"),
        (command.main, ["--prompt", "9" * 30], "expected a whole number from 1"),
        (command.main, ["--threads", "100000"], "expected a whole number from 0 to"),
        (command.main, ["shared", "--batch", "6"], "--batch: got 6; expected a multiple of 8"),
        (command.main, ["grpo", "--batch", "6"], "--batch: got 6; expected a multiple of 8"),
        (command.main, ["--out", "results.txt"], "got results.txt; expected a file that ends in .json"),
        (command.main, ["--out", "{folder}/file/a.json"], "name another file"),
        (command.main, ["--out", "{folder}/folder.json"], "folder.json'; name another file"),
        (command.main, ["--out", "/proc/results.json"], "name another file"),
        (growth.main, ["--out", "{folder}/picture.pdf"], "expected a file that ends in .png"),
        (growth.main, ["--out", "{folder}/folder.png"], "folder.json'; name another file"),
        (growth.main, ["--out", "{folder}/half.png"], "half.part.json'; name another file"),
        (growth.main, ["--repeats", "1"], "from 2"),
        (profile.main, ["--repeats", "0"], "from 1"),
    ],
)
def test_bad_input_is_refused_before_anything_is_measured(
    main: Any,
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "half.part.json").mkdir()
    assert run(monkeypatch, main, [argument.format(folder=tmp_path) for argument in arguments]) == 2
    assert said in " ".join("".join(capsys.readouterr()).split())
    assert not (tmp_path / "folder.png").exists() and not (tmp_path / "half.png").exists()


@pytest.mark.parametrize("wrong", [0.5, float("nan")])
def test_other_gradients_are_unfair(wrong: float) -> None:
    model = torch.nn.Linear(2, 2)

    def side(factor: float) -> Any:
        def run() -> int:
            model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.full((2,), factor)
            return 1

        return run

    expect_equal_gradients(model, side(1.0), side(1.0))
    with pytest.raises(Unfair, match="same gradients"):
        expect_equal_gradients(model, side(1.0), side(wrong))


def test_what_memory_has_no_room_for_is_left_out_in_one_line(
    cases: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def large() -> int:
        return torch.empty(2**60).numel()

    monkeypatch.setitem(command.CASES, "large", Case("a", "b", 1.0, lambda setting: (large, large)))
    assert run(monkeypatch, command.main, ["large", "last", "--repeats", 2, "--out", tmp_path / "a.json"]) == 1
    assert list(json.loads((tmp_path / "a.json").read_text())["cases"]) == ["last"]
    assert "large is left out:" in capsys.readouterr().out
