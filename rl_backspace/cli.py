"""The command line. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from rl_backspace.errors import UserError, one_line


class Interruptible(typer.core.TyperGroup):
    """Commands of which Ctrl-C is told, whatever typer makes of it."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=Interruptible,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Language models that can take it back: teach one when to press delete.",
)
rewards = typer.Typer(no_args_is_help=True, help="What an experiment's reward would teach.")
app.add_typer(rewards, name="rewards")
LAST_SEED = 2**32 - 1  # as in experiment files
ANSWER = 256  # most visible tokens where no experiment says it
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

ConfigPath = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="an experiment file, such as experiments/arith.yaml")
]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="a folder that `train` wrote")]


@app.command(context_settings=OVERRIDES)
def train(
    context: typer.Context,
    config: ConfigPath,
    out: Annotated[Path | None, typer.Option(help="the run folder; default: runs/<name>")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything, print the resolved config, stop")
    ] = False,
) -> None:
    """Teach a model to delete: correction warm-up, then RL.

    Any key of the file can be set here: trainer.learning_rate=1e-4 or --reward.delete_cost.weight=0.1
    """
    from rl_backspace.config import dump

    parsed = _parse(config, context.args)
    from rl_backspace.experiment import prepare
    from rl_backspace.folder import default_folder

    folder = out or default_folder(parsed)
    experiment = prepare(parsed, folder)
    from rl_backspace.audit import heed

    for warning in heed(experiment):
        typer.echo(f"warning: {warning}", err=True)
    if dry_run:
        typer.echo(dump(parsed), nl=False)
        typer.echo(f"# ok: would write {folder}", err=True)
        return
    from rl_backspace.callbacks import close_bars
    from rl_backspace.run import train as run

    try:
        run(experiment, folder)
    except KeyboardInterrupt as interrupt:
        close_bars()
        typer.echo(f"interrupted: {interrupt}" if interrupt.args else "interrupted", err=True)
        raise typer.Exit(130) from None
    finally:
        close_bars()


@app.command(context_settings=OVERRIDES)
def corrections(
    context: typer.Context,
    config: ConfigPath,
    count: Annotated[int, typer.Option(min=1, help="prompts; each gives warmup.group corrections")] = 4,
    out: Annotated[Path | None, typer.Option(help="a .jsonl file for all of them; must not exist")] = None,
) -> None:
    """Show corrections such as the warm-up begins with, or write them: what is typed, deleted, learned.

    Those from the model's own errors are the untrained policy's; `train` asks it again as it learns.
    """
    import json

    parsed = _parse(config, context.args)
    if out is not None and (os.path.lexists(out) or not out.absolute().parent.is_dir()):
        why = "already there" if os.path.lexists(out) else f"there is no folder {out.parent}"
        raise UserError(f"{out}: {why}; give --out a new file in a folder that exists")
    from rl_backspace.display import console, correction_lines, correction_record
    from rl_backspace.experiment import prepare
    from rl_backspace.warmup import first_corrections

    experiment = prepare(parsed, None)
    tokenizer, rules = experiment.policy.tokenizer, experiment.policy.rules
    made = first_corrections(experiment.policy, experiment.task, experiment.budget, parsed.warmup, parsed.seed, count)
    if out is not None:
        records = [correction_record(row, correction, tokenizer, rules) for row, correction in made]
        try:
            with open(out, "x", encoding="utf-8") as stream:
                stream.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        except OSError as error:
            raise UserError(f"{out}: cannot be written: {error.strerror}; give --out another file") from error
        typer.echo(f"{len(made)} corrections of {count} prompts written to {out}", err=True)
        return
    for row, correction in made:
        typed, learned = correction_lines(row["prompt"], correction, tokenizer, rules)
        console.print(typed, style="bold", soft_wrap=True)
        console.print(f"{learned}  {correction.source or 'no error'}", style="dim", soft_wrap=True)
    console.print("^ learned as typed; . not learned; anything else is learned instead of what was typed", style="dim")


@rewards.command(name="audit", context_settings=OVERRIDES)
def audit_rewards(context: typer.Context, config: ConfigPath) -> None:
    """Play known traces through the reward: does right earn most, and does nothing else pay? Exit code 1 if not."""
    parsed = _parse(config, context.args)
    from rl_backspace.audit import audit
    from rl_backspace.display import audit_table, console
    from rl_backspace.experiment import prepare

    experiment = prepare(parsed, None)
    found = audit(experiment)
    console.print(audit_table(found, experiment.policy.tokenizer, experiment.policy.rules))
    for violation in found.violations:
        console.print(f"violated: {violation}", soft_wrap=True)
    if found.violations:
        raise typer.Exit(1)
    for ordering in found.unchecked:
        console.print(f"not checked, for these rules and this budget have no room for it: {ordering}", soft_wrap=True)
    console.print(f"nothing else pays that should not, at {len(found.shares)} points of training")


@app.command(name="eval")
def evaluate(
    run: RunPath,
    rows: Annotated[
        int | None, typer.Option(min=1, help="test prompts, at most; default: as in the run's config")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=LAST_SEED, help="of the sampling; default: the run's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Does deleting help? A run on its test prompts beside what competes with it: the token blocked, deletes at random
    times, the best and the commonest of several answers for the same actions; and what its deletions were good for."""
    import json

    from rl_backspace.controls import examine
    from rl_backspace.display import console, controls_table, deletions_table

    config, task, policy, budget = _open(run)
    test = task.test[: rows or config.evaluation.rows]
    found = examine(policy, task, test, budget, config.seed if seed is None else seed)
    if as_json:
        typer.echo(json.dumps(found if task.ceiling is None else {**found, "ceiling": task.ceiling}))
        return
    for how, results in found.items():
        console.print(controls_table(how, results["arms"], task.ceiling))
    if policy.rules.deletes:
        console.print(deletions_table(found))


@app.command()
def generate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run, or what `export` wrote")],
    prompts: Annotated[
        list[str] | None, typer.Argument(help="- reads one from standard input; default: three of the task's")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="more prompts: all of a text file, or each line of a .jsonl file")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 1.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="sample from the likeliest that sum to this")] = 1.0,
    blocked: Annotated[bool, typer.Option("--blocked", help="do not let it delete")] = False,
    bias: Annotated[float, typer.Option(help="added to the delete token's logit: above 0 it deletes more")] = 0.0,
    window: Annotated[
        int | None, typer.Option(min=0, help="how many tokens back it can delete; what is older is final")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="most visible tokens; default: as in the run's config, or 256")
    ] = None,
    final: Annotated[
        bool, typer.Option("--final", help="print the answer alone, and each part once no delete can reach it")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print a line of JSON for each prompt")] = False,
    seed: Annotated[int, typer.Option(min=0, max=LAST_SEED, help="of the sampling")] = 0,
    delay: Annotated[float, typer.Option(min=0, help="seconds between actions in a terminal")] = 0.15,
) -> None:
    """Print a trace as it happens: typing, striking out, retyping."""
    import json
    from dataclasses import replace

    import torch
    from transformers import TextStreamer

    from rl_backspace.display import TypingStreamer, console, last_message, strike, trace_record
    from rl_backspace.engine import Engine, Sampling
    from rl_backspace.generation import Feed
    from rl_backspace.semantics import ACTIONS_PER_TOKEN, Budget

    policy, rows, budget, keyboard = _open_for_prompts(run)
    asked: list[Any] = _asked(prompts or [], file)
    if final and as_json:
        raise UserError("--final and --json: got both; expected one of them")
    if asked and policy.chat:
        asked = [[{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt for prompt in asked]
    if not asked and not rows:
        raise UserError(f"{run}: no run, so no task with prompts; give one, or - for standard input, or --file")
    asked = asked or [row["prompt"] for row in rows[:3]]
    engine = Engine(policy.model, policy.rules, keyboard=keyboard)
    sampling = Sampling(temperature, top_p=top_p, delete_bias=bias)
    encoded = policy.encode(asked)
    if tokens is None and budget is None:
        tokens = max(1, min(ANSWER, engine.room(encoded)))
    if tokens is not None:
        budget = Budget(tokens, ACTIONS_PER_TOKEN * tokens)
    budget = replace(budget, deletes=0 if blocked else None, window=window)
    engine.capacity(encoded, budget)  # refuses a prompt that does not fit before anything is printed
    torch.manual_seed(seed)
    if as_json:
        for prompt, rollout in zip(asked, engine.run(encoded, budget, sampling), strict=True):
            typer.echo(json.dumps(trace_record(prompt, rollout, policy), ensure_ascii=False))
        return
    for prompt, ids in zip(asked, encoded, strict=True):
        before = f"{last_message(prompt)} "
        stream: Any = None
        if final:
            stream = TextStreamer(policy.tokenizer, skip_prompt=True, skip_special_tokens=True)
        elif console.is_terminal:
            stream = TypingStreamer(policy.tokenizer, before, delay)
        feed = Feed(stream)
        try:
            if stream is not None:
                feed.begin(policy.rules, budget, torch.tensor([ids]))
            (rollout,) = engine.run([ids], budget, sampling, on_action=None if stream is None else feed)
        finally:
            feed.end()
        if stream is None:
            console.print(strike(rollout.actions, policy.tokenizer, policy.rules, before, marks=True), soft_wrap=True)


def _asked(prompts: list[str], file: Path | None) -> list[Any]:
    """The prompts that the user gave."""
    import json

    from rl_backspace.plugins import is_prompt

    asked: list[Any] = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in prompts]
    if file is None:
        return asked
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); give --file a text file or a .jsonl file") from error
    if not text.strip():
        raise UserError(f"{file}: got an empty file; expected a prompt, or one on each line of a .jsonl file")
    if file.suffix != ".jsonl":
        return [*asked, text.rstrip("\n")]
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
        except ValueError:
            content = None
        prompt = content.get("prompt") if isinstance(content, dict) else content
        if not is_prompt(prompt):
            raise UserError(
                f"{file}: line {number} has no prompt; expected a JSON string, a list of chat messages, each with role "
                'and content, or an object with one of them as "prompt"'
            )
        asked.append(prompt)
    return asked


@app.command()
def export(
    run: RunPath,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="folder for the model; must not exist")],
    merge: Annotated[
        bool, typer.Option("--merge/--adapter-only", help="one plain checkpoint, or the adapter for its base")
    ] = True,
) -> None:
    """Write the policy for others: a Hugging Face model with its tokenizer, a card, and generation as code."""
    from rl_backspace.export import export as write

    write(run, out, merge)
    typer.echo(f"written to {out}; {out}/README.md says how to load it", err=True)


@app.command()
def pretrain(
    config: ConfigPath,
    out: Annotated[Path, typer.Argument(help="folder for the model; must not exist")],
) -> None:
    """Make a small base model, from nothing or on from another one, in the Hugging Face format."""
    from rl_backspace.config import parse_pretrain, read_yaml
    from rl_backspace.folder import refuse_existing

    parsed = parse_pretrain(read_yaml(config))
    refuse_existing(out, how="")
    from rl_backspace.pretrain import pretrain as run

    run(parsed, out)


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a sweep file in Weights & Biases' format")],
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default: runs/<the file's name>")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    count: Annotated[int | None, typer.Option(min=1, help="most runs; default: the file's run_cap")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the runs, stop")] = False,
) -> None:
    """Run every combination of a sweep file, then compare them. The same command goes on where it was stopped.

    With an account the same file works for `wandb sweep` and `wandb agent`.
    """
    from rl_backspace.sweep import run_sweep

    raise typer.Exit(run_sweep(file, out, jobs, count, dry_run))


@app.command()
def study(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a study file, such as experiments/studies/study.yaml")],
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default: runs/<the study's name>")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="runs at a time")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="an experiment to run, not all; can be repeated")] = None,
    into: Annotated[
        Path | None, typer.Option(help="a Markdown file: the table goes between its <!-- study --> and <!-- /study -->")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the runs, stop")] = False,
) -> None:
    """Does deleting help? Experiments beside twins without a token, over seeds: a table, a picture and what they say.

    The same command goes on where it was stopped, and writes the results again when all is done.
    """
    from rl_backspace.study import run_study

    raise typer.Exit(run_study(file, out, jobs, dry_run, only or (), into))


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders, or folders of runs")],
    sort: Annotated[
        str | None, typer.Option(help="a column, highest first, or lowest with - before it; default: accuracy.sampled")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="for tables and picture; default: the folder of runs, or compare")
    ] = None,
) -> None:
    """Runs side by side, those that differ in the seed alone as one: a table, as CSV too, and a picture."""
    from rl_backspace.compare import compare as show

    show(runs, sort, out)


def _parse(config: Path, arguments: list[str]) -> Any:
    """The experiment file with the command line's overrides."""
    from rl_backspace.config import override, parse, read_yaml

    content = read_yaml(config)
    override(content, arguments)
    return parse(content)


def _open(run: Path) -> tuple[Any, Any, Any, Any]:
    """Config, task, policy and budget of a finished run."""
    from rl_backspace.experiment import action_budget
    from rl_backspace.folder import RunFolder
    from rl_backspace.plugins import load_task
    from rl_backspace.policy import load

    folder = RunFolder.open(run)
    config = folder.config()
    return config, load_task(config.task.model_dump(), config.seed), load(folder.policy), action_budget(config)


def _open_for_prompts(path: Path) -> tuple[Any, list[Any], Any, Any]:
    """Policy, test rows, budget and keyboard of a run; of a policy's own folder no rows, budget and keyboard."""
    from rl_backspace.folder import is_run
    from rl_backspace.keyboard import keyboard_of
    from rl_backspace.policy import load
    from rl_backspace.semantics import SEMANTICS_FILE

    if is_run(path) or not (path / SEMANTICS_FILE).exists():
        _, task, policy, budget = _open(path)
        policy.chat = isinstance(task.test[0]["prompt"], list)
        return policy, task.test, budget, keyboard_of(task, policy)
    return load(path), [], None, None


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code. A user's mistake is one line per problem and code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin cost a factor of ten beside other work
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    arguments = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    try:
        code: int = app(args=arguments, standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        for line in str(error).splitlines():
            typer.echo(f"error: {line}", err=True)
        return 2
    except (OSError, UnicodeError) as error:  # such as a folder that cannot be read, or output that nobody reads
        typer.echo(f"error: {one_line(error)}", err=True)
        return 2
    except (typer.Abort, KeyboardInterrupt):
        typer.echo("interrupted", err=True)
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors: their class has moved between versions
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "rl-backspace")
        typer.echo(f"error: {error.format_message().rstrip('.')}; see {command} --help", err=True)
        return 2


def entry() -> None:
    """The console script."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # other packages' deprecations are not the user's to mend
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    sys.exit(main())
