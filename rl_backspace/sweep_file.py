"""A sweep file in Weights & Biases' format: its parameters, its command, and the runs that they make.

`wandb agent` and `rl-backspace sweep` write a run's values on its command line alike, `--name=value` with the value as
Python prints it, and leave it to `config.override` to read them. What only wandb's server can do is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import re
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from rl_backspace.compare import short, short_names
from rl_backspace.config import PlainLoader, PositiveInt, Share, Strict, read_yaml, validate
from rl_backspace.errors import UserError, nearest

SERVER = {
    "early_terminate": "wandb's server decides which runs to end early",
    "scheduler": "its engine needs wandb's server",
}
EXAMPLE = '["${env}", rl-backspace, train, experiments/arith.yaml, "${args}"]'
ARGS = {"${args}": "--", "${args_no_hyphens}": ""}  # what stands before name=value
MOST_RUNS = 10_000

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class File(Strict):
    """The keys of a sweep file."""

    method: Literal["grid", "random"]
    parameters: dict[Any, Any] = Field(min_length=1)
    command: Any = None
    run_cap: PositiveInt | None = None
    name: str | None = None
    program: Any = None
    metric: Any = None
    description: Any = None
    project: Any = None
    entity: Any = None


class Distribution(Strict):
    """How a parameter is chosen, drawn as wandb's own search draws it."""

    distribution: str | None = None

    def choices(self) -> Sequence[Any] | None:
        """Every value that there is, or None where there is no end of them."""
        return None

    def draw(self, generator: random.Random) -> Any:
        return generator.choice(self.choices() or ())


class Constant(Distribution):
    value: Any

    def choices(self) -> Sequence[Any]:
        return [self.value]


class Categorical(Distribution):
    values: list[Any] = Field(min_length=1)

    def choices(self) -> Sequence[Any]:
        return self.values

    def draw(self, generator: random.Random) -> Any:
        return generator.choices(self.values)[0]


class Weighted(Categorical):
    probabilities: list[Share]

    @field_validator("probabilities")
    @classmethod
    def _one_each(cls, shares: list[float], info: ValidationInfo) -> list[float]:
        count = len(info.data.get("values", shares))
        if len(shares) != count or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(f"{count} numbers that sum to 1, one for each value")
        return shares

    def draw(self, generator: random.Random) -> Any:
        return generator.choices(self.values, self.probabilities)[0]


class Uniform(Distribution):
    min: Finite
    max: Finite

    @field_validator("max")
    @classmethod
    def _above(cls, most: float, info: ValidationInfo) -> float:
        if most <= info.data.get("min", -math.inf):
            raise ValueError(f"a number above {info.data['min']}")
        return most

    def draw(self, generator: random.Random) -> Any:
        return generator.uniform(self.min, self.max)


class IntUniform(Uniform):
    min: int
    max: int

    def choices(self) -> Sequence[int]:
        return range(self.min, self.max + 1)

    def draw(self, generator: random.Random) -> Any:
        return generator.randint(self.min, self.max)


class QUniform(Uniform):
    q: Annotated[int, Field(gt=0, lt=2**53)] | Positive = 1.0

    def draw(self, generator: random.Random) -> Any:
        multiple = super().draw(generator) / self.q
        return round(multiple) * self.q if math.isfinite(multiple) else multiple


class LogUniform(Uniform):
    min: Positive

    def draw(self, generator: random.Random) -> Any:
        return math.exp(generator.uniform(math.log(self.min), math.log(self.max)))


class Normal(Distribution):
    mu: Finite = 0.0
    sigma: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    def draw(self, generator: random.Random) -> Any:
        return generator.normalvariate(self.mu, self.sigma)


KINDS: dict[str, type[Distribution]] = {
    "constant": Constant,
    "categorical": Categorical,
    "categorical_w_probabilities": Weighted,
    "int_uniform": IntUniform,
    "uniform": Uniform,
    "q_uniform": QUniform,
    "log_uniform_values": LogUniform,
    "normal": Normal,
}
"""Those of wandb's distributions that are known here."""
IN_A_GRID = (Constant, Categorical, IntUniform)


@dataclass(frozen=True)
class Run:
    """One run: the folder's name, a digest of the values that ends it, and the values by parameter."""

    id: str
    digest: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read.

    Attributes:
        text: what was read.
        words: its command; what is in `ARGS` stands for the values.
        config: the experiment file in it.
    """

    path: Path
    text: bytes
    content: dict[str, Any]
    words: list[str]
    config: str
    runs: list[Run]

    def command(self, run: Run, out: Path) -> list[str]:
        return [*self._expand(self.words, run), "--out", str(out)]

    def overrides(self, run: Run | None) -> list[str]:
        """A run's, as `config.override` gets them; without one, those that the command has for all."""
        words = self.words[self.words.index(self.config) + 1 :]
        return self._expand(words, run) if run else [word for word in words if word not in ARGS]

    def _expand(self, words: Iterable[str], run: Run) -> list[str]:
        expanded = (arguments(run.values, ARGS[word]) if word in ARGS else [word] for word in words)
        return list(itertools.chain.from_iterable(expanded))


def arguments(values: Mapping[str, Any], before: str = "--") -> list[str]:
    """Values by name as wandb's agent writes them."""
    return [f"{before}{name}={value}" for name, value in values.items()]


def read(path: Path, count: int | None = None) -> Sweep:
    """A sweep file with its runs, which are the same ones whenever it is read.

    Args:
        count: most runs, besides the file's own run_cap.

    Raises:
        UserError: a line for each mistake in the file.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file; give a sweep file in wandb's format")
    content = read_yaml(path, PlainLoader)  # to wandb 1e-5 is text and 1.0e-5 a number
    text = path.read_bytes()
    problems: list[str] = []
    try:
        _check_keys(content, count, problems)
        parameters = _parameters(content.get("parameters"), content.get("method"), problems)
        words = _words(content, problems)
        config = _experiment(words, problems)
        chosen = _choose(content, parameters, count, problems) if not problems else []
        runs = _runs(parameters, chosen)
    except RecursionError:
        problems = ["a value holds itself; write it out"]
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return Sweep(path, text, content, words, config, runs)


def _check_keys(content: Mapping[str, Any], count: int | None, problems: list[str]) -> None:
    known = {key: value for key, value in content.items() if key not in SERVER}
    problems += [
        f"{key}: {SERVER[key]}; take it out, or use `wandb sweep` and `wandb agent`" for key in content if key in SERVER
    ]
    if known.get("method") == "bayes":
        problems.append("method: bayes needs wandb's server, which chooses by earlier results; set grid or random")
        known["method"] = "grid"
    validate(File, known, problems)
    if content.get("method") == "random" and content.get("run_cap") is None and count is None:
        problems.append("run_cap: missing; a random sweep has no end of its own: add it, or give --count")


def _parameters(block: Any, method: Any, problems: list[str]) -> dict[str, Distribution]:
    """How each parameter is chosen, in the file's order."""
    found: dict[str, Distribution] = {}
    for name, spec in block.items() if isinstance(block, dict) else ():
        wrong: list[str] = []
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            wrong = [": wandb takes names of letters, digits, '.', '_' and '-' only"]
        elif isinstance(spec, dict) and "parameters" in spec:
            key = next(iter(nested), "key") if isinstance(nested := spec["parameters"], dict) else "key"
            wrong = [f": nested parameters would replace the whole block; write {name}.{key}"]
        elif (kind := _kind(spec)) not in list(KINDS):  # a list, for it may be anything
            known = f"value, values, min and max alike whole or not, or a distribution of {', '.join(KINDS)}"
            wrong = [f": expected {known}; got {spec!r}{nearest(kind, KINDS)}"]
        elif distribution := validate(KINDS[kind], spec, wrong):
            found[name] = distribution
            if method == "grid" and not isinstance(distribution, IN_A_GRID):
                wrong = [f": a grid cannot have {kind}; give value or values, or set method: random"]
        problems += [f"parameters.{name}{'' if line[0] == ':' else '.'}{line}{_point(line)}" for line in wrong]
    for outer, inner in itertools.pairwise(sorted(map(names_in, found))):
        if inner[: len(outer)] == outer:
            problems.append(f"parameters.{'.'.join(outer)} and parameters.{'.'.join(inner)} set the same thing")
            problems[-1] += "; take one of them out"
    return found


def _point(line: str) -> str:
    """What to add to a line about text that would be a number elsewhere."""
    number = re.search(r"got '[-+]?\d+[eE][-+]?\d+' \(str\)$", line)
    return "; to wandb a number has a point and a sign in it, such as 1.0e-5" if number else ""


def _kind(spec: Any) -> Any:
    """The distribution's name, inferred as wandb does where there is none."""
    if not isinstance(spec, dict):
        return None
    ends = [type(spec.get(end)) for end in ("min", "max")]
    fits = {
        "constant": "value" in spec,
        "categorical_w_probabilities": {"values", "probabilities"} <= spec.keys(),
        "categorical": "values" in spec,
        "int_uniform": ends == [int, int],
        "uniform": ends == [float, float],
    }
    return spec.get("distribution") or next((kind for kind, it_does in fits.items() if it_does), None)


def names_in(key: str) -> tuple[str, ...]:
    """A key's names; `reward` stands for `rewards`, as in overrides."""
    first, *others = key.split(".")
    return ("rewards" if first == "reward" and others else first, *others)


def _words(content: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The command with its macros replaced as wandb's agent does, except those of the values."""
    command = content.get("command")
    if not isinstance(command, list) or not command:
        problems.append(f"command: expected a list such as {EXAMPLE}; got {command!r}")
        return []
    macros = {"${env}": "/usr/bin/env", "${interpreter}": sys.executable, "${program}": str(content.get("program"))}
    words: list[str] = []
    for word in map(str, command):
        word = re.sub(r"\$\{envvar:([A-Z0-9_]*)\}", lambda match: os.environ.get(match[1], match[1]), word)
        if word in macros:
            words.append(macros[word])
        elif "${" in word and word not in ARGS:
            known = [*ARGS, *macros, "${envvar:NAME}"]
            problems.append(f"command: {word!r} is none of {', '.join(known)}{nearest(word, known)}")
        else:
            words.append(word)
    return words


def _experiment(words: list[str], problems: list[str]) -> str:
    """The experiment file in the command, which must be a `train` of ours. `rl-backspace` becomes this very Python."""
    module = [i + 1 for i in range(len(words)) if words[i : i + 2] == ["-m", "rl_backspace"]]
    at = next(iter([i for i, word in enumerate(words) if Path(word).name == "rl-backspace"] + module), len(words))
    rest = words[at + 1 :]
    if words and (len(rest) < 2 or rest[0] != "train" or rest[1] in ARGS or rest[1].startswith("-")):
        problems.append(f"command: expected rl-backspace train and an experiment file, such as {EXAMPLE}")
    elif words and not any(word in ARGS for word in rest):
        problems.append("command: without ${args} every run would be the same; add it")
    problems += [
        f"command: {word} is not for a sweep, whose runs have folders of their own; take it out"
        for word in rest
        if word.partition("=")[0] in ("--out", "--dry-run", "--help")
    ]
    if at < len(words) and words[at] == "rl-backspace":
        words[at : at + 1] = [sys.executable, "-m", "rl_backspace"]
    if words and shutil.which(words[0]) is None:
        problems.append(f"command: there is no program {words[0]!r} here")
    return rest[1] if len(rest) > 1 else ""


def _choose(
    content: Mapping[str, Any], parameters: Mapping[str, Distribution], count: int | None, problems: list[str]
) -> list[dict[str, Any]]:
    """The values of each run, by name. The n-th draw of a random sweep depends on its parameters and n alone."""
    cap = min(cap for cap in (content.get("run_cap"), count, MOST_RUNS + 1) if cap is not None)
    rows: Iterable[Iterable[Any]]
    if content["method"] == "grid":
        columns = [itertools.islice(its.choices() or (), cap) for its in parameters.values()]
        rows = itertools.islice(itertools.product(*columns), cap)
    else:
        sweep = _digest(content["parameters"])
        draws = parameters.items()
        rows = ([its.draw(random.Random(f"{sweep} {name} {i}")) for name, its in draws] for i in range(cap))
    chosen = {tuple(arguments(values)): values for row in rows for values in [dict(zip(parameters, row, strict=True))]}
    if len(chosen) > MOST_RUNS:
        problems.append(f"parameters: more than {MOST_RUNS} runs; set run_cap, or give --count")
    return list(chosen.values())


def _runs(parameters: Mapping[str, Distribution], chosen: list[dict[str, Any]]) -> list[Run]:
    """Runs with ids that say what varies; a digest of all values keeps them apart."""
    varied = {name for name, its in parameters.items() if (choices := its.choices()) is None or choices[1:2]}
    names = short_names(varied)
    runs = []
    for values in chosen:
        told = ",".join(f"{names[name]}={_plain(short(value))}" for name, value in values.items() if name in varied)
        digest = _digest(values)
        runs.append(Run(f"{told[:80]}{'-' * bool(told)}{digest}", digest, values))
    return runs


def _plain(text: str) -> str:
    """Text as a part of a file's name."""
    return re.sub(r"[^\w.+-]+", "_", text, flags=re.ASCII).strip("_")[:24]


def _digest(values: Any) -> str:
    return hashlib.blake2b(_canonical(values).encode(), digest_size=4).hexdigest()


def _canonical(value: Any) -> str:
    """One text for equal values, whatever the order of their keys."""
    if isinstance(value, dict):
        return f"{{{', '.join(sorted(f'{key!r}: {_canonical(inner)}' for key, inner in value.items()))}}}"
    return f"[{', '.join(map(_canonical, value))}]" if isinstance(value, list) else repr(value)
