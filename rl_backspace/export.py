"""What makes a policy's folder useful to people without this package: a model card, and `generate` as code.

custom_generate/   the engine's own files, which transformers loads by itself:
                   model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True)
README.md          what it was trained on, what came out with the token allowed and blocked, how to load it
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from rl_backspace.config import Config
from rl_backspace.errors import UserError, one_line
from rl_backspace.folder import RunFolder, is_run, refuse_existing
from rl_backspace.policy import EMBEDDED, Policy, load

# modules that generate with deletes, and no others
CODE = ("errors", "semantics", "fused", "captured", "backbone", "engine", "generation")
ENTRY = '''"""transformers' `generate` with a delete token, as this model was trained with it. Written by rl-backspace.

Needs torch and transformers, nothing else. The arguments are those of `model.generate`, and besides them
`max_actions`, `max_deletes`, `delete_bias`, `window` and `stream`: see `generation.generate`.
"""

import copy
from typing import Any

from transformers import StopStringCriteria
from transformers.generation import GenerationMixin

from .generation import generate as decode

DELETE = {rules}


def generate(
    inputs: Any = None, generation_config: Any = None, *, model: Any, streamer: Any = None, **options: Any
) -> Any:
    """What `model.generate(..., custom_generate=...)` calls, deletes and all."""
    if streamer is not None:
        options["stream"] = streamer
    stops, tokenizer = options.pop("stop_strings", None), options.pop("tokenizer", None)
    if stops is None and generation_config is not None and generation_config.stop_strings:
        stops, generation_config = generation_config.stop_strings, copy.deepcopy(generation_config)
        generation_config.stop_strings = None
    if stops:
        if tokenizer is None:
            raise ValueError("stop_strings: got no tokenizer beside them; give the model's as tokenizer=")
        options["stopping_criteria"] = [*(options.get("stopping_criteria") or []), StopStringCriteria(tokenizer, stops)]
    if options.get("custom_generate") is None:
        options["custom_generate"] = decode
        if options.get("delete") is None:
            options["delete"] = DELETE
    return GenerationMixin.generate(model, inputs, generation_config, **options)
'''


def write_code(folder: Path, rules: dict[str, Any]) -> None:
    """The folder `custom_generate`, for a policy with these rules, as `Policy.semantics` gives them."""
    target = folder / "custom_generate"
    target.mkdir(exist_ok=True)
    for name in CODE:
        source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        local = re.sub(rf"^from rl_backspace\.({'|'.join(CODE)}) import", r"from .\1 import", source, flags=re.M)
        (target / f"{name}.py").write_text(local, encoding="utf-8")
    (target / "generate.py").write_text(ENTRY.replace("{rules}", repr(rules)), encoding="utf-8")


def publish(policy: Policy, run: RunFolder, folder: Path | None = None) -> None:
    """Save a policy in its run, or in another folder, with all that others need.

    Raises:
        UserError: as `Policy.save`.
    """
    folder = folder or run.policy
    policy.save(folder)
    if policy.rules.deletes:
        write_code(folder, policy.semantics())
    write_card(policy, run, folder)


def write_card(policy: Policy, run: RunFolder, folder: Path | None = None) -> None:
    """README.md beside a saved policy, from what the run has left so far."""
    folder = folder or run.policy
    (folder / "README.md").write_text(card(run.config(), run.summary(), policy, str(folder)), encoding="utf-8")


def export(run: Path, out: Path, merge: bool) -> None:
    """Write a run's policy for others: its adapter, or a plain checkpoint with the adapter merged into it.

    Raises:
        UserError: no finished run, the folder is taken or cannot be written, or there is no adapter.
    """
    folder = RunFolder.open(run)
    refuse_existing(out, how="")
    policy = load(folder.policy)
    policy.critic = None  # of no use without training
    if policy.whole and not merge:
        raise UserError(f"{run}: trained as a whole (lora: null), so there is no adapter; leave out --adapter-only")
    if not policy.whole and merge:
        policy.model = policy.model.merge_and_unload()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        publish(policy, folder, out)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out}: cannot be written ({one_line(error)}); choose another folder") from error


def card(config: Config, summary: dict[str, Any] | None, policy: Policy, name: str) -> str:
    """A model card in the hub's format, Markdown under YAML."""
    adapter, deletes = not policy.whole, bool(policy.rules.deletes)
    start = config.model.replace("{seed}", str(config.seed))
    base = start if config.lora is None else policy.base
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "tags": ["rl-backspace", *(["self-correction"] if deletes else []), *(["lora"] if adapter else [])],
    }
    kind = "a LoRA adapter for" if adapter else "made of"
    what = "with a delete token" if deletes else "without a delete token, to compare with those that have one"
    took = "When it emits the token, its own last output is removed, from what is read and from what it sees next. "
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {config.name}: a language model that {'can' if deletes else 'cannot'} take it back",
            "",
            f"A policy {what}, {kind} `{base}`. {took if deletes else ''}{_training(config, summary, start)}",
            "",
            *(_semantics(policy) if deletes else []),
            *_results(summary, deletes),
            "## How to use it",
            "",
            "```python",
            _loading(policy, name).strip(),
            "```",
            "",
            *_notes(policy, name),
        ]
    )


def _training(config: Config, summary: dict[str, Any] | None, start: str) -> str:
    steps = summary["steps"] if summary else config.trainer.get("max_steps", "some")
    warmup = "correction warm-up" if config.delete.tokens else "warm-up"
    parts = [f"{config.warmup.steps} steps of {warmup}"] if config.warmup.steps else []
    parts += [f"{steps} steps of {config.algorithm.upper()}"] if steps else []
    origin = f"going on from the run `{start}`," if is_run(Path(start)) else f"from `{start}`"
    return f"Trained by rl-backspace {origin} on the task `{config.task.fn}`: {', then '.join(parts) or 'no steps'}."


def _semantics(policy: Policy) -> list[str]:
    units = {"token": "the last token", "line": "back to the last line", "answer": "all of the answer"}
    tokens = policy.semantics()["tokens"].items()
    return [
        *(f"- `{token}` takes back {units.get(str(unit), f'the last {unit} tokens')}" for token, unit in tokens),
        "",
        f"Memory `{policy.rules.memory}`, retry `{policy.rules.retry}`; `delete.json` has it for programs.",
        "",
    ]


def _is_embedded(policy: Policy) -> bool:
    return Path(policy.model.name_or_path).parent == EMBEDDED


def _loading(policy: Policy, name: str) -> str:
    messages = '[{"role": "user", "content": "..."}]'
    deletes = bool(policy.rules.deletes)
    if policy.whole:
        trust = ", trust_remote_code=True)  # deletes by itself" if deletes else ")"
        return _MERGED.format(name=name, trust=trust, prompt=messages if policy.chat else '"..."')
    template = (
        f'tokenizer.apply_chat_template({messages}, add_generation_prompt=True, return_dict=True, return_tensors="pt")'
    )
    return _ADAPTER.format(
        name=name,
        imports="from rl_backspace.policy import load_base\n" if _is_embedded(policy) else "",
        base=f'load_base("{policy.base}")[0]'
        if _is_embedded(policy)
        else f'AutoModelForCausalLM.from_pretrained("{policy.model.name_or_path}")',
        inputs=template if policy.chat else 'tokenizer("...", return_tensors="pt")',
        options=f', custom_generate="{name}", trust_remote_code=True' if deletes else "",
    )


def _notes(policy: Policy, name: str) -> list[str]:
    adapter, notes = not policy.whole, []
    if adapter and _is_embedded(policy):
        notes += [
            f"The base `{policy.base}` is part of rl-backspace; `rl-backspace export RUN DIR --merge` makes a model "
            "that does not need it.",
            "",
        ]
    if policy.rules.deletes:
        without = (
            "the delete token is typed like any other and takes nothing back"
            if adapter
            else "`generation_config.json` suppresses the delete token"
        )
        notes += [
            f"`trust_remote_code` runs the files in `{name}/custom_generate`, which need torch and transformers alone. "
            "With `pip install rl-backspace`, take `custom_generate=rl_backspace.generate` "
            + (f"and `delete='{name}'` instead." if adapter else "instead.")
            + f" `max_deletes=0` turns deleting off. Without `custom_generate`, {without}.",
            "",
        ]
    return notes


_ADAPTER = """
from peft import PeftModel
{imports}from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
base = {base}
if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the base had no row to spare
    base.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(base, "{name}")
inputs = {inputs}
out = model.generate(**inputs, max_new_tokens=64{options})
print(tokenizer.batch_decode(out, skip_special_tokens=True)[0])
"""
_MERGED = """
from transformers import pipeline

pipe = pipeline("text-generation", "{name}"{trust}
print(pipe({prompt}, max_new_tokens=64)[0]["generated_text"])
"""


def _results(summary: dict[str, Any] | None, can_delete: bool) -> list[str]:
    """Accuracy in the last stage, token allowed and blocked, and of the base model."""
    if not summary:
        return []
    accuracy, deletes = summary["accuracy"], summary["deletes_per_answer"]
    rows = [("base model", "base", "blocked")] if "base" in accuracy else []
    last = list(accuracy)[-1]
    rows += [(f"this policy, token {token}" if can_delete else "this policy", last, token) for token in accuracy[last]]

    def cell(stage: str, token: str, how: str) -> str:
        low, high = summary["interval"][stage][token][how]
        return f"{100 * accuracy[stage][token][how]:.1f} ({100 * low:.1f}–{100 * high:.1f})"

    return [
        "Accuracy on held-out prompts, % (95 % interval); one seed:",
        "",
        "| | sampled | greedy | deletes per answer: sampled, greedy |",
        "|---|---:|---:|---:|",
        *(
            f"| {label} | {cell(stage, token, 'sampled')} | {cell(stage, token, 'greedy')} "
            f"| {deletes[stage][token]['sampled']:.2f}, {deletes[stage][token]['greedy']:.2f} |"
            for label, stage, token in rows
        ),
        "",
    ]
