"""Studies on runs whose numbers are known: what is run, what is not run again, and what the results say."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from checkpoints import checkpoint
from commands import call

from rl_backspace import study
from rl_backspace.config import dump
from rl_backspace.study import ARMS, Pair, read, rows, verdicts
from rl_backspace.sweep import Job, run_all

EXPERIMENT = {
    "name": "small",
    "task": {"fn": "signs", "count": 3, "train": 50, "test": 8},
    "rewards": {"correct": {"fn": "correctness:checked"}},
    "warmup": {"steps": 10, "group": 2, "trainer": {"per_device_train_batch_size": 4}},
    "trainer": {"max_steps": 5, "per_device_train_batch_size": 16, "num_generations": 4, "max_completion_length": 8},
}
RIGHT = {"policy": 0.9, "blocked": 0.5, "random": 0.3, "twin": 0.6}  # of seed 0; each seed's are a little higher
LENGTH, SPENT = 4.0, 7.0  # actions of an answer without deletes and with


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("experiment.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "model": str(checkpoint(tmp_path / "base"))}))
    write_study()
    return tmp_path


def write_study(**fields: Any) -> None:
    entry = {"config": "experiment.yaml", "set": ["trainer.max_steps=6"]}
    Path("study.yaml").write_text(yaml.safe_dump({"name": "s", "experiments": {"signs": entry}, **fields}))


def finish(place: Path, config: Any) -> None:
    """A run with known results, as `train` would leave it."""
    (place / "adapter").mkdir(parents=True)
    (place / "adapter" / "adapter_config.json").write_text("{}")
    (place / "config.yaml").write_text(dump(config))
    up, is_policy = 0.01 * config.seed, bool(config.delete.tokens)

    def cell(arm: str, actions: float, deletes: float = 0.0) -> dict[str, float]:
        return {"accuracy": RIGHT[arm] + up, "actions_per_answer": actions, "deletes_per_answer": deletes}

    start = RIGHT["blocked" if is_policy else "twin"]
    tries = [[n * LENGTH, min(1.0, start + 0.05 * (n - 1) + up)] for n in range(1, 9)]
    arms = {"allowed": cell("twin", LENGTH)}
    if is_policy:
        arms = {
            "allowed": cell("policy", SPENT, 1.5),
            "blocked": cell("blocked", LENGTH),
            "random": cell("random", SPENT, 1.5),
        }
    curve = {"allowed": [[0, 0], [9, 0.9]], "best_of": [[a, y - 0.02] for a, y in tries], "majority": tries}
    (place / "controls.json").write_text(json.dumps({how: {"arms": arms, "curve": curve} for how in study.DECODINGS}))
    stage = {how: 0.4 + up for how in study.DECODINGS}
    summary = {
        "accuracy": {"base": {"blocked": stage}, "before": {"allowed": {how: a + 0.1 for how, a in stage.items()}}},
        "actions_per_answer": {"base": {"blocked": {"sampled": 5.0}}},
        "reference_actions": LENGTH,
        "warmup_actions": 600 if is_policy else 700,
        "actions": 1000 if is_policy else 1200,
        "rollouts": 96,
        "steps": 6,
        "seconds": 60.0,
    }
    (place / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Runs are made up; what would have been run is noted."""
    noted: list[list[str]] = []

    def run(todo: Mapping[str, Job], total: int, jobs: int, lock: int, failures: dict[str, str]) -> None:
        for id, job in todo.items():
            if job.after in failures:
                continue
            command = job.command()
            noted.append(command)
            if stop and len(noted) > stop[0]:
                raise KeyboardInterrupt
            pair = Pair("signs", 0, command[4], tuple(command[5:-2]))
            content = [argument for argument in command[5:-2] if not argument.startswith("seed=")]
            seed = next(int(a.removeprefix("seed=")) for a in command if a.startswith("seed="))
            config = Pair("signs", seed, command[4], tuple(content)).config()
            assert pair.file == "experiment.yaml" and command[-1] == str(job.place)
            if fail and fail[0] in command:
                failures[id] = "it broke"
            else:
                finish(job.place, config)

    stop, fail = list[int](), list[str]()
    monkeypatch.setattr(study, "run_all", run)
    ENDS.update(stop=stop, fail=fail)
    return noted


ENDS: dict[str, list[Any]] = {}  # stop: after so many runs; fail: those with this in their command


def test_a_study_runs_policies_and_then_twins_that_train_no_less(here: Path, runner: list[list[str]]) -> None:
    result = call("study", "study.yaml")
    assert result.code == 0, result.err
    assert len(runner) == 6  # three seeds by default, the policy of each and then its twin
    for seed, (policy, twin) in enumerate(zip(runner[::2], runner[1::2], strict=True)):
        assert "delete.tokens={}" not in policy and policy[-1] == f"runs/s/signs-{seed}/policy"
        assert twin[-1] == f"runs/s/signs-{seed}/twin" and f"seed={seed}" in twin
        assert {"delete.tokens={}", "warmup.clean=1", "warmup.beta=0", "evaluation.controls=8"} <= set(twin)
        assert {"warmup.group=1", "warmup.trainer.per_device_train_batch_size=8"} <= set(twin)
        assert "warmup.steps=20" in twin  # 10 steps; 600 actions of 80 examples, but its own take 4: 18.75, and 3 %
        assert "trainer.max_steps=17" in twin  # 6 steps; 1000 actions of 96 rollouts, but its own take 4: 15.6, and 3 %


def test_accumulation_and_short_answers_of_the_policy_take_no_steps_away(here: Path, runner: list[list[str]]) -> None:
    content = yaml.safe_load(Path("experiment.yaml").read_text())
    content["warmup"]["trainer"]["gradient_accumulation_steps"] = 3
    Path("experiment.yaml").write_text(yaml.safe_dump(content))
    write_study(seeds=[0])
    assert call("study", "study.yaml").code == 0
    assert "warmup.steps=10" in runner[1]  # 600 actions of 240 examples are shorter than its own


def test_a_real_pair_trains_and_the_twin_no_less(here: Path) -> None:
    write_study(seeds=[0])
    result = call("study", "study.yaml")
    assert result.code == 0, result.err
    policy, twin = (json.loads((here / "runs/s/signs-0" / w / "summary.json").read_text()) for w in ("policy", "twin"))
    assert policy["deletes"] > 0 == twin["deletes"]
    assert twin["warmup_actions"] >= policy["warmup_actions"] > 0 and twin["actions"] >= policy["actions"] > 0
    text = (here / "runs/s/results.md").read_text()
    assert "FEWER" not in text and "wins 0 of 2" in text  # one seed shows nothing
    assert f"trained on {policy['warmup_actions']:,} actions in the warm-up and {policy['actions']:,} in RL" in text
    assert call("study", "study.yaml").code == 0  # and is not trained again
    assert (here / "runs/s/results.md").read_text() == text


def test_finished_runs_are_never_run_again(here: Path, runner: list[list[str]]) -> None:
    ENDS["stop"].append(4)
    assert call("study", "study.yaml").code == 130
    done = {path.parent for path in here.glob("runs/s/*/*/summary.json")}
    assert len(done) == 4 and "Not there, and not counted: signs-2" in (here / "runs/s/results.md").read_text()
    ENDS["stop"].clear()
    del runner[:]
    assert call("study", "study.yaml").code == 0
    assert len(runner) == 2
    text = (here / "runs/s/results.md").read_text()
    del runner[:]
    assert call("study", "study.yaml").code == 0
    assert not runner and (here / "runs/s/results.md").read_text() == text


def test_more_seeds_can_be_added_and_another_experiment_is_refused(here: Path, runner: list[list[str]]) -> None:
    write_study(seeds=[0])
    assert call("study", "study.yaml").code == 0 and len(runner) == 2
    write_study(seeds=[0, 5])
    assert call("study", "study.yaml").code == 0 and len(runner) == 4
    entry = {"config": "experiment.yaml", "set": ["trainer.max_steps=7"]}
    write_study(seeds=[0], experiments={"signs": entry})
    result = call("study", "study.yaml")
    assert result.code == 2 and "runs/s/signs-0/policy: made with another config" in result.err


def test_a_twin_of_other_steps_counts_if_it_was_trained_on_no_less(here: Path, runner: list[list[str]]) -> None:
    write_study(seeds=[0])
    assert call("study", "study.yaml").code == 0
    twin = here / "runs/s/signs-0/twin"
    config, summary = (
        yaml.safe_load((twin / "config.yaml").read_text()),
        json.loads((twin / "summary.json").read_text()),
    )
    config["warmup"]["steps"], config["trainer"]["max_steps"] = 19, 16
    (twin / "config.yaml").write_text(yaml.safe_dump(config))
    assert call("study", "study.yaml").code == 0 and len(runner) == 2
    for key in ("warmup_actions", "actions"):
        (twin / "summary.json").write_text(json.dumps({**summary, key: 10}))
        result = call("study", "study.yaml")
        assert result.code == 2 and "signs-0/twin: made with another config" in result.err
    (twin / "summary.json").write_text(json.dumps(summary))
    for other in (yaml.safe_dump({**config, "seed": 1}), "name: ["):
        (twin / "config.yaml").write_text(other)
        result = call("study", "study.yaml")
        assert result.code == 2 and "signs-0/twin: made with another config" in result.err and len(runner) == 2


JOB = """
import pathlib, sys, time
place, how, other = pathlib.Path(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
place.mkdir()
until = time.time() + 60 * (how == "beside")
while not other.exists() and time.time() < until:
    time.sleep(0.05)
if not other.exists():
    sys.exit("it broke")
(place / "summary.json").write_text("")
"""


def test_a_job_starts_beside_others_as_soon_as_what_it_needs_is_done(tmp_path: Path) -> None:
    """Two policies beside each other, which end only once the other began; a twin after its own policy."""
    todo = {}
    for seed, how, other in ((0, "beside", "1/policy"), (1, "beside", "0/policy"), (2, "after", "nothing")):
        for id, arguments, after in (
            (f"{seed}/policy", (how, other), None),
            (f"{seed}/twin", ("after", f"{seed}/policy/summary.json"), f"{seed}/policy"),
        ):
            place = tmp_path / id
            place.parent.mkdir(exist_ok=True)
            command = [sys.executable, "-c", JOB, str(place), arguments[0], str(tmp_path / arguments[1])]
            todo[id] = Job(place, partial(list, command), after)
    failures = dict[str, str]()
    with open(tmp_path / ".lock", "ab") as lock:
        run_all(todo, len(todo), 2, lock.fileno(), failures)
    assert failures == {"2/policy": "it broke"}
    assert not (tmp_path / "2" / "twin").exists()


def test_a_run_that_fails_is_told_and_the_others_count(here: Path, runner: list[list[str]]) -> None:
    ENDS["fail"].append("seed=1")
    result = call("study", "study.yaml")
    assert result.code == 1 and "failed: signs-1/policy: it broke" in result.err
    text = Path("runs/s/results.md").read_text()
    assert "signs, seeds 0, 2: trained" in text and "not counted: signs-1" in text
    with open("runs/s/results.csv") as stream:
        assert {row["seed"] for row in csv.DictReader(stream)} == {"0", "2"}


def test_a_row_of_fewer_seeds_than_others_says_so(here: Path, runner: list[list[str]]) -> None:
    write_study(experiments={"signs": {"config": "experiment.yaml"}, "other": {"config": "experiment.yaml"}})
    ENDS["fail"].append("runs/s/other-1/policy")
    assert call("study", "study.yaml").code == 1
    text = Path("runs/s/results.md").read_text()
    assert "| signs | greedy |" in text and "| other (2 of 3 seeds) | greedy |" in text


def test_what_failed_is_told_where_ctrl_c_ends_the_others(here: Path, runner: list[list[str]]) -> None:
    ENDS["fail"].append("seed=0")
    ENDS["stop"].append(2)
    result = call("study", "study.yaml")
    assert result.code == 130 and "failed: signs-0/policy: it broke" in result.err and "interrupted" in result.err


def test_the_results_are_what_the_runs_say(here: Path, runner: list[list[str]]) -> None:
    assert call("study", "study.yaml").code == 0
    with open("runs/s/results.csv") as stream:
        records = list(csv.DictReader(stream))
    assert len(records) == 3 * 2 * len(ARMS)
    found = {(r["arm"], r["seed"]): r for r in records if r["decoding"] == "greedy"}
    assert float(found["policy", "2"]["accuracy"]) == pytest.approx(0.92)
    best = found["twin_tries", "0"]  # two tries: the first number that costs no fewer than 7 actions; by vote
    assert (float(best["accuracy"]), float(best["actions"]), best["n"]) == (pytest.approx(0.65), 8.0, "2")
    assert float(found["own_tries", "0"]["accuracy"]) == pytest.approx(0.55)
    assert float(found["policy", "0"]["deletes"]) == 1.5
    text = (here / "runs/s/results.md").read_text()
    assert "| signs | greedy | **91.0 ± 2.5** | 51.0 ± 2.5 | 56.0 ± 2.5 (n 2) | 31.0 ± 2.5 | 61.0 ± 2.5 | 66.0 " in text
    assert "± 2.5 (n 2) | × 0.26 |" in text  # 9 % against 34 %
    assert "wins 2 of 2 comparisons; by both decodings on signs" in text
    assert "+30.0 ± 0.0 over the twin, +25.0 ± 0.0 over its best rival (twin, n tries)" in text
    assert "Blocked it is -10.0 ± 0.0 from the twin: the gain goes. 7.0 actions and 1.50 deletes" in text
    assert "trained on 1,800 actions in the warm-up and 3,000 in RL; its corrections are labelled" in text
    assert (
        "signs, before RL: the base model 41.0 ± 2.5 sampled and 41.0 ± 2.5 greedy; after the warm-up 51.0 ± 2.5"
        in text
    )
    assert "The twin: 2,100 and 3,600.\n" in text and "6 runs took 0.1 hours" in text
    assert (here / "runs/s/results.png").stat().st_size > 10_000


def changed(records: list[dict[str, Any]], arm: str, values: list[float], key: str = "accuracy") -> list[Any]:
    return [{**r, key: values[r["seed"]]} if r["arm"] == arm else r for r in records]


def test_a_win_needs_intervals_apart_from_every_rival(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    records = list(rows(read(Path("study.yaml"))[1], here / "runs" / "s"))
    assert all(verdict.beats and verdict.rival == "twin_tries" for verdict in verdicts(records))
    for arm in study.RIVALS:
        for verdict in verdicts(changed(records, arm, [0.89, 0.9, 0.91])):
            assert not verdict.beats and verdict.rival == arm
    assert not any(verdict.beats for verdict in verdicts([r for r in records if r["seed"] == 0]))  # one seed
    cheap = changed(records, "twin_tries", [6.9] * 3, "actions")  # tries that were given less
    assert not any(verdict.beats for verdict in verdicts(cheap))


def test_whether_the_gain_goes_is_said_where_it_can_be_told(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    records = list(rows(read(Path("study.yaml"))[1], here / "runs" / "s"))

    def said(arm: str, values: list[float]) -> set[str]:
        return {verdict.blocking for verdict in verdicts(changed(records, arm, values))}

    assert said("blocked", [0.6, 0.61, 0.62]) == {"the gain goes"}
    assert said("blocked", [0.85, 0.86, 0.87]) == {"some of the gain stays"}
    assert said("blocked", [0.5, 0.75, 0.95]) == {"what stays cannot be told"}
    assert said("policy", [0.5, 0.51, 0.52]) == said("policy", [0.3, 0.7, 0.99]) == {"no gain is shown"}


def test_where_nothing_is_wrong_there_is_no_share_of_errors(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    records = list(rows(read(Path("study.yaml"))[1], here / "runs" / "s"))
    assert {verdict.errors for verdict in verdicts(changed(records, "twin", [1.0] * 3))} == {None}


BESIDE = {
    "keep": {"config": "experiment.yaml", "set": ["delete.memory=keep"], "twin": "signs"},
    "signs": {"config": "experiment.yaml", "set": ["trainer.max_steps=6"]},
}


def test_a_policy_can_be_put_beside_the_twin_of_another(here: Path, runner: list[list[str]]) -> None:
    write_study(experiments=BESIDE, seeds=[0, 1])
    assert call("study", "study.yaml").code == 0
    assert [command[-1] for command in runner[:3]] == [
        f"runs/s/{run}" for run in ("keep-0/policy", "signs-0/policy", "signs-0/twin")
    ]
    assert len(runner) == 6
    mine, theirs = ([v for v in verdicts(records_of(here)) if v.experiment == name] for name in BESIDE)
    assert [v.accuracy["twin"] for v in mine] == [v.accuracy["twin"] for v in theirs]
    text = (here / "runs/s/results.md").read_text()
    assert "The twin of signs: 1,400 and 2,400" in text and "6 runs took 0.1 hours" in text
    assert "| keep | sampled |" not in text and "wins 2 of 2 comparisons; by both decodings on signs." in text
    changed = text.split("| changed |")[1].splitlines()[2:4]
    assert [row.split(" | ")[0] for row in changed] == [
        "| signs, as above",
        "| signs, `delete.memory=keep`, `trainer.max_steps=5`",
    ]
    assert changed[1].endswith(" | 90.5 ± 6.4 | 90.5 ± 6.4 | 50.5 ± 6.4, 50.5 ± 6.4 | 1.50, 1.50 |")


def test_a_change_is_told_by_what_the_experiments_come_to(here: Path, runner: list[list[str]]) -> None:
    other = ['delete.tokens={"<|back|>": token}', "warmup.steps=3", "warmup.steps=4"]
    signs = {"config": "experiment.yaml", "set": ["delete.retry=free"]}
    write_study(experiments={"signs": signs, "a": {"config": "experiment.yaml", "set": other, "twin": "signs"}})
    ENDS["fail"].append("runs/s/a-1/policy")
    call("study", "study.yaml")
    (row,) = [line for line in Path("runs/s/results.md").read_text().splitlines() if line.startswith("| signs, `")]
    expected = (
        r"""| signs, `delete.tokens={"<\|back\|>": "token"}`, `delete.retry=ban`, `warmup.steps=4` (2 of 3 seeds) | """
    )
    assert row.startswith(expected)


def records_of(here: Path) -> list[dict[str, Any]]:
    return list(rows(read(Path("study.yaml"))[1], here / "runs" / "s"))


def test_some_experiments_alone_are_run_with_the_twins_they_need(here: Path, runner: list[list[str]]) -> None:
    write_study(experiments={**BESIDE, "longer": {"config": "experiment.yaml"}}, seeds=[0])
    assert call("study", "study.yaml", "--only", "keep").code == 0
    assert {command[-1] for command in runner} == {
        f"runs/s/{run}" for run in ("keep-0/policy", "signs-0/policy", "signs-0/twin")
    }
    del runner[:]
    assert call("study", "study.yaml", "--only", "longer").code == 0 and len(runner) == 2
    assert "not counted" not in (here / "runs/s/results.md").read_text()
    result = call("study", "study.yaml", "--only", "kep")
    assert result.code == 2 and "--only kep: not in the study; it has keep" in result.err


def test_results_can_be_written_from_small_files_alone(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    text = (here / "runs/s/results.md").read_text()
    kept = ("config.yaml", "controls.json", "summary.json")
    for path in [path for path in here.glob("runs/s/*/*/*") if path.name not in kept]:
        shutil.rmtree(path)
    del runner[:]
    assert call("study", "study.yaml").code == 0
    assert not runner and (here / "runs/s/results.md").read_text() == text


def test_results_that_cannot_be_written_are_one_line_and_the_runs_are_kept(here: Path, runner: list[list[str]]) -> None:
    (here / "runs/s/results.png").mkdir(parents=True)
    (here / "runs/s/study.yaml").touch()
    result = call("study", "study.yaml")
    assert result.code == 2 and len(result.errors) == 1
    assert "runs/s: the results could not be written: " in result.errors[0] and "results.png" in result.errors[0]
    (here / "runs/s/results.png").rmdir()
    Path("page.md").write_text("<!-- study -->\n<!-- /study -->\n")
    Path(".page.md.tmp").mkdir()
    result = call("study", "study.yaml", "--into", "page.md")
    assert result.code == 2 and len(result.errors) == 1
    assert "--into page.md: the results could not be written: " in result.errors[0]
    assert call("study", "study.yaml").code == 0 and len(runner) == 6  # none of them again


def test_results_are_written_where_nobody_reads_what_is_printed(
    here: Path, runner: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    call("study", "study.yaml")
    shutil.copy("runs/s/results.md", "earlier.md")
    for file in Path("runs/s").glob("results.*"):
        file.unlink()

    def closed(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    result = call("study", "study.yaml")
    assert result.code == 2 and "could not be written" not in result.err
    assert (
        Path("runs/s/results.md").read_text() == Path("earlier.md").read_text() and Path("runs/s/results.png").exists()
    )


def test_the_table_goes_into_a_page_of_ones_own(here: Path, runner: list[list[str]]) -> None:
    Path("README.md").write_text("before\n<!-- study -->\nold\n<!-- /study -->\nafter\n")
    for _ in range(2):
        assert call("study", "study.yaml", "--into", "README.md").code == 0
        text = Path("README.md").read_text()
        assert text.startswith("before\n<!-- study -->\n| task |") and text.endswith("signs.\n<!-- /study -->\nafter\n")
    assert text.split("-->\n")[1].removesuffix("<!-- /study ") in Path("runs/s/results.md").read_text()


def test_a_page_keeps_its_line_ends_its_mode_and_its_link(here: Path, runner: list[list[str]]) -> None:
    Path("page.md").write_bytes(b"as `<!-- study -->` says\r\n<!-- study -->\r\n<!-- /study -->\r\nafter\r\n")
    Path("page.md").chmod(0o640)
    Path("link.md").symlink_to("page.md")
    write_study(seeds=[0])
    assert call("study", "study.yaml", "--into", "link.md").code == 0
    assert Path("link.md").is_symlink() and Path("page.md").stat().st_mode & 0o777 == 0o640
    lines = Path("page.md").read_bytes().split(b"\n")
    assert lines[0] == b"as `<!-- study -->` says\r" and all(line.endswith(b"\r") for line in lines[:-1])
    assert lines[-3:] == [b"<!-- /study -->\r", b"after\r", b""]


def test_what_is_not_there_stands_under_the_table(here: Path, runner: list[list[str]]) -> None:
    Path("page.md").write_text("<!-- study -->\n<!-- /study -->\n")
    ENDS["fail"].append("seed=1")
    assert call("study", "study.yaml", "--into", "page.md").code == 1
    assert "Not there, and not counted: signs-1.\n<!-- /study -->" in Path("page.md").read_text()


def test_a_twin_that_was_trained_on_less_is_no_rival_to_beat(here: Path, runner: list[list[str]]) -> None:
    call("study", "study.yaml")
    records = records_of(here)
    for key in study.TRAINED:
        less = [{**r, key: 599} if r["arm"] == "twin" and r["seed"] == 1 else r for r in records]
        assert all(verdict.fewer and not verdict.beats for verdict in verdicts(less))
        assert "61.0 ± 2.5 (trained on fewer actions)" in study.table_of(verdicts(less), [], {})


def test_an_experiment_that_is_not_asked_for_stands_in_no_ones_way(here: Path, runner: list[list[str]]) -> None:
    write_study(experiments={**BESIDE, "longer": {"config": "experiment.yaml"}}, seeds=[0])
    assert call("study", "study.yaml").code == 0
    changed_one = {"config": "experiment.yaml", "set": ["trainer.max_steps=9"]}
    write_study(experiments={**BESIDE, "longer": changed_one}, seeds=[0])
    assert call("study", "study.yaml").code == 2
    assert call("study", "study.yaml", "--only", "keep").code == 0
    assert "Not there, and not counted: longer-0." in (here / "runs/s/results.md").read_text()


@pytest.mark.parametrize(
    "content",
    [
        None,
        "words",
        "<!-- study -->",
        "<!-- /study -->\n<!-- study -->\n",
        "<!-- study -->\n<!-- study -->\n<!-- /study -->\n",
    ],
)
def test_a_page_without_a_place_for_the_table_is_left_alone(
    content: str | None, here: Path, runner: list[list[str]]
) -> None:
    if content is not None:
        Path("README.md").write_text(content)
    result = call("study", "study.yaml", "--into", "README.md")
    assert result.code == 2 and len(result.errors) == 1 and "--into README.md: " in result.err and not runner
    assert content is None or Path("README.md").read_text() == content


def test_dry_runs_only_tell(here: Path, runner: list[list[str]]) -> None:
    result = call("study", "study.yaml", "--dry-run", "--out", "elsewhere")
    assert result.code == 0 and len(result.out.split()) == 6 and "elsewhere/signs-0/policy" in result.out
    assert not runner and not (here / "elsewhere").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"seeds": []}, "study.yaml: seeds"),
        ({"seeds": [1, 1]}, "seeds: got [1, 1]; give each once"),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["task.coun=3"]}}}, "task.coun"),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["model=nowhere/at/all"]}}}, "nowhere/at/all"),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["rewards.correct.fn=no:x"]}}}, "rewards.correct"),
        ({"sedes": [1]}, "study.yaml: sedes: unknown"),
        ({"experiments": {}}, "study.yaml: experiments"),
        ({"experiments": {"a": {"config": "nothing.yaml"}}}, "nothing.yaml"),
        (
            {"experiments": {"a": {"config": "experiment.yaml", "set": ["trainer.max_step=3"]}}},
            "experiments.a: trainer",
        ),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["delete.tokens={}"]}}}, "with a delete token"),
        ({"experiments": {"a": {"config": "experiment.yaml", "set": ["model=runs/x-{seed}"]}}}, "from its base model"),
        ({"experiments": {"a": {"config": "experiment.yaml", "twin": "b"}}}, "experiments.a: twin: got 'b'; expected"),
        (
            {"experiments": {**BESIDE, "a": {"config": "experiment.yaml", "twin": "keep"}}},
            "experiments.a: twin: got 'keep'; expected",
        ),
        (
            {"experiments": {**BESIDE, "a": {"config": "experiment.yaml", "set": ["task.count=4"], "twin": "signs"}}},
            "experiments.a: twin: signs has another task",
        ),
    ],
)
def test_bad_studies_are_refused_in_one_line(fields: dict[str, Any], said: str, here: Path) -> None:
    write_study(**fields)
    result = call("study", "study.yaml")
    assert result.code == 2 and len(result.errors) == 1 and said in result.errors[0]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *((file, content) for file in ("controls.json", "summary.json") for content in (None, "{", "[]", "{}")),
        ("summary.json", ["actions_per_answer", "base"]),
        ("summary.json", ["warmup_actions"]),
        ("summary.json", ["reference_actions"]),
        ("controls.json", ["sampled", "arms", "random"]),
        ("controls.json", ["greedy", "curve", "majority"]),
    ],
)
def test_files_that_are_not_whole_are_told(
    content: str | list[str] | None, file: str, here: Path, runner: list[list[str]]
) -> None:
    write_study(seeds=[0])
    call("study", "study.yaml")
    path = here / "runs/s/signs-0/policy" / file
    if isinstance(content, list):  # a key with nothing behind it
        whole = json.loads(path.read_text())
        inner = whole
        for key in content[:-1]:
            inner = inner[key]
        inner[content[-1]] = []
        content = json.dumps(whole)
    path.unlink() if content is None else path.write_text(content)
    result = call("study", "study.yaml")
    assert result.code == 2 and len(result.errors) == 1
    assert "runs/s/signs-0/" in result.errors[0] and ("not what `train` writes" in result.errors[0] or not content)


def test_a_policy_that_is_not_whole_is_told_before_its_twin_or_anything_else_runs(
    here: Path, runner: list[list[str]]
) -> None:
    write_study(seeds=[0])
    call("study", "study.yaml")
    shutil.rmtree("runs/s/signs-0/twin")
    Path("runs/s/signs-0/policy/summary.json").write_text("{}")
    write_study(seeds=[1, 0])
    del runner[:]
    result = call("study", "study.yaml")
    assert result.code == 2 and len(result.errors) == 1 and not runner
    assert "runs/s/signs-0/policy: summary.json is not what `train` writes" in result.errors[0]


def test_what_another_process_finished_meanwhile_is_looked_at(
    here: Path, runner: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(seeds=[0])

    @contextlib.contextmanager
    def late(folder: Path) -> Iterator[int]:
        config = Pair("signs", 0, "experiment.yaml", ("trainer.max_steps=99",)).config()
        for which in ("policy", "twin"):
            finish(folder / "signs-0" / which, config)
        yield 0

    monkeypatch.setattr(study, "claimed", late)
    result = call("study", "study.yaml")
    assert result.code == 2 and "signs-0/policy: made with another config" in result.errors[0] and not runner


def test_a_folder_of_something_else_is_left_alone(here: Path, runner: list[list[str]]) -> None:
    (here / "mine" / "signs-0" / "policy").mkdir(parents=True)
    (here / "mine" / "signs-0" / "policy" / "thesis.txt").write_text("words")
    result = call("study", "study.yaml", "--out", "mine")
    assert result.code == 2 and "mine: already there and not empty" in result.err and not runner
