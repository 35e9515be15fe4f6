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
from rl_backspace.folder import RunFolder, refuse_existing
from rl_backspace.policy import Policy, load
from rl_backspace.semantics import Rules

CODE = ("errors", "semantics", "backbone", "engine", "generation")  # modules that generate with deletes, and no others
ENTRY = '''"""transformers' `generate` with a delete token, as this model was trained with it. Written by rl-backspace.

Needs torch and transformers, nothing else. The arguments are those of `model.generate`, and besides them
`max_actions`, `max_deletes`, `delete_bias`, `window` and `stream`: see `generation.generate`.
"""

from typing import Any

from transformers.generation import GenerationMixin

from .generation import generate as decode
from .semantics import Rules

DELETE = {rules}


def generate(
    inputs: Any = None, generation_config: Any = None, *, model: Any, streamer: Any = None, **options: Any
) -> Any:
    """What `model.generate(..., custom_generate=...)` calls, deletes and all."""
    if streamer is not None:
        options["stream"] = streamer
    for name, ours in (("delete", DELETE), ("custom_generate", decode)):
        if options.get(name) is None:
            options[name] = ours
    return GenerationMixin.generate(model, inputs, generation_config, **options)
'''


def write_code(folder: Path, rules: Rules) -> None:
    """The folder `custom_generate`, for a policy with these rules."""
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
    write_code(folder, policy.rules)
    (folder / "README.md").write_text(card(run.config(), run.summary(), policy, str(folder)), encoding="utf-8")


def export(run: Path, out: Path, merge: bool) -> None:
    """Write a run's policy for others: its adapter, or a plain checkpoint with the adapter merged into it.

    Raises:
        UserError: no finished run, the folder is taken or cannot be written, or there is no adapter.
    """
    folder = RunFolder.open(run)
    refuse_existing(out)
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
    adapter = not policy.whole
    base = config.model if config.lora is None else policy.base
    head = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "tags": ["rl-backspace", "self-correction", *(["lora"] if adapter else [])],
    }
    units = {"token": "the last token", "line": "back to the last line", "answer": "all of the answer"}
    kind = "a LoRA adapter for" if adapter else "made of"
    delete = [
        f"- `{token}` takes back {units.get(str(unit), f'the last {unit} tokens')}"
        for token, unit in policy.semantics()["tokens"].items()
    ]
    steps = summary["steps"] if summary else config.trainer.get("max_steps", "some")
    loading = _ADAPTER if adapter else _MERGED
    return "\n".join(
        [
            "---",
            yaml.safe_dump(head, sort_keys=False).rstrip(),
            "---",
            "",
            f"# {config.name}: a language model that can take it back",
            "",
            f"A policy with a delete token, {kind} `{base}`. When it "
            "emits the token, its own last output is removed, from what is read and from what it sees next. Trained "
            f"by rl-backspace from `{config.model}` on the task `{config.task.fn}`: "
            f"{config.warmup.steps} steps of correction warm-up, then {steps} steps of {config.algorithm.upper()}.",
            "",
            *delete,
            "",
            f"Memory `{policy.rules.memory}`, retry `{policy.rules.retry}`; `delete.json` has it for programs.",
            "",
            *_results(summary),
            "## How to use it",
            "",
            "```python",
            loading.format(base=policy.model.name_or_path, name=name).strip(),
            "```",
            "",
            f"`trust_remote_code` runs the files in `{name}/custom_generate`, which need torch and transformers alone. "
            "With `pip install rl-backspace`, take `custom_generate=rl_backspace.generate` "
            + (f"and `delete='{name}'` instead." if adapter else "instead.")
            + " `max_deletes=0` turns deleting off. Without `custom_generate`, the delete token is typed like any "
            "other and takes nothing back.",
            "",
        ]
    )


_ADAPTER = """
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
base = AutoModelForCausalLM.from_pretrained("{base}")
if len(tokenizer) > base.get_input_embeddings().num_embeddings:  # the base had no row to spare
    base.resize_token_embeddings(len(tokenizer))
model = PeftModel.from_pretrained(base, "{name}")
inputs = tokenizer("...", return_tensors="pt")
model.generate(**inputs, max_new_tokens=64, custom_generate="{name}", trust_remote_code=True)
"""
_MERGED = """
from transformers import pipeline

pipe = pipeline("text-generation", "{name}", trust_remote_code=True)  # deletes by itself
pipe("...", max_new_tokens=64)
"""


def _results(summary: dict[str, Any] | None) -> list[str]:
    """Accuracy in the last stage, token allowed and blocked, and of the base model."""
    if not summary:
        return []
    accuracy, deletes = summary["accuracy"], summary["deletes_per_answer"]
    rows = [("base model", "base", "blocked")] if "base" in accuracy else []
    last = list(accuracy)[-1]
    rows += [(f"this policy, token {token}", last, token) for token in accuracy[last]]

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
