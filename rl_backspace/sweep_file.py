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
from typing import Any

import yaml

from rl_backspace.compare import short, short_names
from rl_backspace.config import read_yaml
from rl_backspace.errors import UserError, nearest

KEYS = ("method", "parameters", "command", "run_cap", "metric", "program", "name", "description", "project", "entity")
SERVER = {
    "early_terminate": "wandb's server decides which runs to end early",
    "scheduler": "its engine needs wandb's server",
}
EXAMPLE = '["${env}", rl-backspace, train, experiments/arith.yaml, "${args}"]'
ARGS = {"${args}": "--", "${args_no_hyphens}": ""}  # what stands before name=value
MOST_RUNS = 10_000

FIELDS: dict[str, tuple[str, ...]] = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "log_uniform_values": ("min", "max"),
    "normal": ("mu", "sigma"),
}
"""Those of wandb's distributions that are known here, and what each takes."""
DEFAULTS = {"mu": 0.0, "sigma": 1.0, "q": 1.0}
IN_A_GRID = ("constant", "categorical", "int_uniform")


@dataclass(frozen=True)
class Parameter:
    """One parameter, a key of the experiment file, and how it is chosen."""

    name: str
    kind: str
    spec: Mapping[str, Any]

    def choices(self) -> Sequence[Any] | None:
        """Every value that there is, or None where there is no end of them."""
        if self.kind == "constant":
            return [self.spec["value"]]
        if self.kind == "int_uniform":
            return range(self.spec["min"], self.spec["max"] + 1)
        return self.spec.get("values")

    def draw(self, generator: random.Random) -> Any:
        """A value, as wandb's own search draws it; with `q` the nearest multiple of it."""
        spec = {**DEFAULTS, **self.spec}
        match self.kind:
            case "constant":
                return spec["value"]
            case "categorical" | "categorical_w_probabilities":
                return generator.choices(spec["values"], spec.get("probabilities"))[0]
            case "int_uniform":
                return generator.randint(spec["min"], spec["max"])
            case "log_uniform_values":
                return math.exp(generator.uniform(math.log(spec["min"]), math.log(spec["max"])))
            case "normal":
                return generator.normalvariate(spec["mu"], spec["sigma"])
            case _:
                drawn = generator.uniform(spec["min"], spec["max"])
                return round(drawn / spec["q"]) * spec["q"] if self.kind == "q_uniform" else drawn


@dataclass(frozen=True)
class Run:
    """One run: the folder's name and the values by parameter."""

    id: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, read.

    Attributes:
        words: its command; what is in `ARGS` stands for the values.
        config: the experiment file in it.
    """

    path: Path
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
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a sweep file in wandb's format")
    content = read_yaml(path, yaml.SafeLoader)  # as wandb reads it, to which 1e-5 is text and 1.0e-5 a number
    problems: list[str] = []
    _check_keys(content, count, problems)
    parameters = _parameters(content.get("parameters"), content.get("method"), problems)
    words = _words(content, problems)
    config = _experiment(words, problems)
    chosen: list[dict[str, Any]] = []
    if not problems:
        chosen = _choose(content, parameters, count, problems)
    if problems:
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return Sweep(path, content, words, config, _runs(parameters, chosen))


def _check_keys(content: Mapping[str, Any], count: int | None, problems: list[str]) -> None:
    for key in content:
        if key in SERVER:
            problems.append(f"{key}: {SERVER[key]}; take it out, or use `wandb sweep` and `wandb agent`")
        elif key not in KEYS:
            problems.append(f"{key}: unknown key{nearest(key, KEYS)}; known here: {', '.join(KEYS)}")
    method, cap = content.get("method"), content.get("run_cap")
    if method == "bayes":
        problems.append("method: bayes needs wandb's server, which chooses by earlier results; set grid or random")
    elif method not in ("grid", "random"):
        problems.append(f"method: expected grid or random; got {method!r}")
    if cap is not None and (type(cap) is not int or cap < 1):
        problems.append(f"run_cap: expected a number of runs; got {cap!r}")
    elif method == "random" and cap is None and count is None:
        problems.append("run_cap: missing; a random sweep has no end of its own: add it, or give --count")


def _parameters(block: Any, method: Any, problems: list[str]) -> list[Parameter]:
    """The parameters in the file's order."""
    if not isinstance(block, dict) or not block:
        problems.append(f"parameters: expected some by name, such as seed: {{values: [0, 1, 2]}}; got {block!r}")
        return []
    found = []
    for name, spec in block.items():
        wrong = []
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            wrong = ["wandb takes names of letters, digits, '.', '_' and '-' only"]
        elif isinstance(spec, dict) and "parameters" in spec:
            wrong = [f"nested parameters would replace the whole block; write {name}.{_first(spec['parameters'])}"]
        else:
            kind, wrong = _kind(spec)
            wrong = wrong or _spec_problems(kind, spec)
            if not wrong and method == "grid" and kind not in IN_A_GRID:
                wrong = [f"a grid cannot have {kind}; give value or values, or set method: random"]
            if not wrong:
                found.append(Parameter(name, kind, spec))
        problems += [f"parameters.{name}: {problem}" for problem in wrong]
    names = sorted(names_in(parameter.name) for parameter in found)
    problems += [
        f"parameters.{'.'.join(outer)} and parameters.{'.'.join(inner)} set the same thing; take one of them out"
        for outer, inner in itertools.combinations(names, 2)
        if inner[: len(outer)] == outer
    ]
    return found


def _first(block: Any) -> str:
    return str(next(iter(block), "key")) if isinstance(block, dict) else "key"


def _kind(spec: Any) -> tuple[str, list[str]]:
    """The distribution's name, inferred as wandb does where none is given, and what is wrong with it."""
    if not isinstance(spec, dict):
        return "", [f"expected value, values, or a distribution with what it takes; got {spec!r}"]
    kind = spec.get("distribution")
    if kind is None and "value" in spec:
        kind = "constant"
    elif kind is None and "values" in spec:
        kind = "categorical_w_probabilities" if "probabilities" in spec else "categorical"
    elif kind is None and {"min", "max"} <= set(spec):
        types = {type(spec["min"]), type(spec["max"])}
        kind = "int_uniform" if types == {int} else "uniform" if types == {float} else None
        if kind is None:
            return "", ["give min and max both as whole numbers or both with a decimal point, or name a distribution"]
    if kind not in FIELDS:
        what = (
            "no value, values or distribution" if kind is None else f"no distribution {kind!r}{nearest(kind, FIELDS)}"
        )
        return "", [f"{what}; there are {', '.join(FIELDS)}"]
    return kind, []


def _spec_problems(kind: str, spec: Mapping[str, Any]) -> list[str]:
    takes = FIELDS[kind]
    problems = [
        f"{key} is not for {kind}, which takes {', '.join(takes)}{nearest(key, takes)}"
        for key in spec
        if key not in (*takes, "distribution")
    ]
    problems += [f"{key} is missing; {kind} needs it" for key in takes if key not in spec and key not in DEFAULTS]
    numbers = {key: spec[key] for key in takes if key in spec and key not in ("value", "values", "probabilities")}
    for key, number in numbers.items():
        expected = "a whole number" if kind == "int_uniform" else "a number"
        if type(number) not in ((int,) if kind == "int_uniform" else (int, float)) or not math.isfinite(number):
            text = isinstance(number, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", number)
            advice = "; to wandb a number has a point and a sign in it, such as 1.0e-5" if text else ""
            problems.append(f"{key}: expected {expected}; got {number!r}{advice}")
    if problems:
        return problems
    if "values" in takes:
        return _values_problems(spec)
    if "min" in takes and spec["min"] >= spec["max"]:
        problems.append(f"min {spec['min']} is not below max {spec['max']}")
    elif kind == "log_uniform_values" and spec["min"] <= 0:
        problems.append(f"min: expected a number above 0; got {spec['min']}")
    if numbers.get("q", 1) <= 0:
        problems.append(f"q: expected a number above 0; got {numbers['q']}")
    if numbers.get("sigma", 0) < 0:
        problems.append(f"sigma: expected 0 or more; got {numbers['sigma']}")
    return problems


def _values_problems(spec: Mapping[str, Any]) -> list[str]:
    values, shares = spec["values"], spec.get("probabilities")
    if not isinstance(values, list) or not values:
        return [f"values: expected a list of them; got {values!r}"]
    if shares is None:
        return []
    fine = isinstance(shares, list) and all(type(share) in (int, float) and share >= 0 for share in shares)
    if not fine or len(shares) != len(values) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        return [f"probabilities: expected {len(values)} numbers that sum to 1, one for each value; got {shares!r}"]
    return []


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
    content: Mapping[str, Any], parameters: list[Parameter], count: int | None, problems: list[str]
) -> list[dict[str, Any]]:
    """The values of each run, by name. The n-th draw of a random sweep depends on its parameters and n alone."""
    cap = min(cap for cap in (content.get("run_cap"), count, MOST_RUNS + 1) if cap is not None)
    rows: Iterable[Iterable[Any]]
    names = [parameter.name for parameter in parameters]
    if content["method"] == "grid":
        columns = [p.choices() or () for p in parameters]
        if max(map(len, columns)) > MOST_RUNS:
            cap, columns = MOST_RUNS + 1, [range(MOST_RUNS + 1)] * len(columns)
        rows = itertools.islice(itertools.product(*columns), cap)
    else:
        sweep = _digest(content["parameters"])
        rows = ([p.draw(random.Random(f"{sweep} {p.name} {i}")) for p in parameters] for i in range(cap))
    chosen = {tuple(arguments(values)): values for row in rows for values in [dict(zip(names, row, strict=True))]}
    if len(chosen) > MOST_RUNS:
        problems.append(f"parameters: more than {MOST_RUNS} runs; set run_cap, or give --count")
    return list(chosen.values())


def _runs(parameters: list[Parameter], chosen: list[dict[str, Any]]) -> list[Run]:
    """Runs with ids that say what varies; a digest of all values keeps them apart."""
    varied = {p.name for p in parameters if len(p.choices() or (0, 0)) > 1}
    names = short_names(varied)
    runs = []
    for values in chosen:
        told = ",".join(f"{names[name]}={_plain(short(value))}" for name, value in values.items() if name in varied)
        runs.append(Run(f"{told[:80]}{'-' * bool(told)}{_digest(values)}", values))
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
