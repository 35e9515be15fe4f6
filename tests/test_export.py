"""What others load: by stock packages, with equal logits and equal answers, and without this package at all."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoints import CHARACTERS, checkpoint
from commands import call
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import rl_backspace
from rl_backspace.config import Config, Delete, Lora, parse
from rl_backspace.engine import Sampling
from rl_backspace.errors import UserError
from rl_backspace.export import card, export, publish
from rl_backspace.folder import RunFolder
from rl_backspace.policy import Policy, create, load
from rl_backspace.semantics import Budget

PROMPTS = ["1 2 3=6:", "4 5=9:", "7 7 7 7=0:"]
BUDGET = Budget(8, 24)
BIAS = 8.0  # so that untrained models delete
EAGER = Sampling(temperature=0, delete_bias=BIAS)
LORA = {"r": 4, "alpha": 8}
SUMMARY = {
    "accuracy": {
        "base": {"blocked": {"sampled": 0.5, "greedy": 0.625}},
        "after": {
            "allowed": {"sampled": 0.75, "greedy": 0.875},
            "blocked": {"sampled": 0.25, "greedy": 0.125},
        },
    },
    "steps": 7,
}
for key, value in {"interval": [0.1, 0.9], "deletes_per_answer": 1.5}.items():
    SUMMARY[key] = {
        stage: {token: dict.fromkeys(cell, value) for token, cell in tokens.items()}
        for stage, tokens in SUMMARY["accuracy"].items()  # type: ignore[attr-defined]
    }


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own for code that transformers loads; one, since Python finds it through `sys.path`."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        yield


def disturb(made: Policy, seed: int) -> None:
    """As after training: every trained number is another."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def run_of(
    folder: Path, lora: Any = LORA, family: str = "Llama", spare: int = 2, **options: Any
) -> tuple[Path, Policy]:
    """A run that was never trained: its folder, and its policy."""
    base = checkpoint(folder / "base", family=family, spare=spare, **options)
    content = {
        "name": "small",
        "model": str(base),
        "task": {"fn": "signs", "count": 3},
        "rewards": {"correct": {"fn": "correctness:checked"}},
        "trainer": {"max_steps": 7},
        "lora": lora,
    }
    config: Config = parse(content)
    for seed in range(9):  # until it deletes something
        made = create(str(base), Delete(), Lora(**lora) if lora else None, seed=0)
        disturb(made, seed)
        if any(rollout.deletes for rollout in made.generate(PROMPTS, BUDGET, EAGER)):
            break
    run = RunFolder.create(folder / "run", config)
    run.summarise(SUMMARY)
    publish(made, run)
    return run.path, made


def logits(model: Any, count: int = CHARACTERS) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(count)[None]).logits[..., : CHARACTERS + 1]


def answers(made: Policy, prompts: list[str] = PROMPTS, budget: Budget = BUDGET) -> list[list[int]]:
    rollouts = made.generate(prompts, budget, EAGER)
    assert sum(rollout.deletes for rollout in rollouts) > 0
    return [rollout.visible for rollout in rollouts]


def generated(model: Any, tokenizer: Any, **options: Any) -> list[list[int]]:
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "delete_bias": BIAS, **options}
    out = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    return [rollout.visible for rollout in out.rollouts]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare", [2, 0], ids=["spare rows", "resized"])
def test_every_way_to_load_it_gives_equal_logits_and_answers(
    tied: bool, spare: int, family: str, tmp_path: Path
) -> None:
    run, made = run_of(tmp_path, family=family, spare=spare, tie_word_embeddings=tied)
    expected, said, adapter = logits(made.model), answers(made), run / "adapter"
    tokenizer = AutoTokenizer.from_pretrained(adapter)

    ours = load(run)
    assert torch.equal(logits(ours.model), expected) and answers(ours) == said
    assert generated(ours.model, tokenizer, custom_generate=rl_backspace.generate) == said

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if not spare:
        base.resize_token_embeddings(len(tokenizer))
    with_adapter = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if not spare:
        with_adapter.resize_token_embeddings(len(tokenizer))
    with_adapter.load_adapter(str(adapter))
    for model in (
        PeftModel.from_pretrained(base, adapter),
        AutoPeftModelForCausalLM.from_pretrained(str(adapter)),
        with_adapter,
    ):
        assert torch.equal(logits(model), expected)
        assert generated(model, tokenizer, custom_generate=rl_backspace.generate, delete=adapter) == said

    export(run, tmp_path / "merged", merge=True)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(stock), expected, rtol=1e-4, atol=1e-3)
    assert generated(stock, tokenizer, custom_generate=rl_backspace.generate) == said
    again = load(tmp_path / "merged")
    assert again.rules == made.rules and answers(again) == said
    assert again.tokenizer.get_vocab() == made.tokenizer.get_vocab()

    export(run, tmp_path / "alone", merge=False)
    assert torch.equal(logits(load(tmp_path / "alone").model), expected)


def test_a_model_trained_as_a_whole_is_exported_as_it_is(tmp_path: Path) -> None:
    run, made = run_of(tmp_path, lora=None)
    export(run, tmp_path / "out", merge=True)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(made.model))
    assert answers(load(tmp_path / "out")) == answers(made)


def test_pipelines_delete(tmp_path: Path) -> None:
    run, made = run_of(tmp_path)
    expected = [f"{p}{made.text(ids)}" for p, ids in zip(PROMPTS, answers(made), strict=True)]
    adapter = str(run / "adapter")
    pipe = pipeline("text-generation", adapter, tokenizer=adapter)
    options = {"max_new_tokens": 8, "do_sample": False, "custom_generate": rl_backspace.generate, "delete_bias": BIAS}
    assert [out[0]["generated_text"] for out in pipe(PROMPTS, delete=adapter, **options)] == expected
    pipe = pipeline("text-generation", load(run).model, tokenizer=made.tokenizer)
    assert [out[0]["generated_text"] for out in pipe(PROMPTS, batch_size=3, **options)] == expected


STOCK = """
import json, sys, torch
class Nothing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "rl_backspace":
            raise ModuleNotFoundError("No module named 'rl_backspace'")
sys.meta_path.insert(0, Nothing())
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline
merged, adapter, prompts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
options = {"max_new_tokens": 8, "do_sample": False, "delete_bias": 8.0}
pipe = pipeline("text-generation", merged, trust_remote_code=True)
found = {"pipeline": [out[0]["generated_text"] for out in pipe(prompts, **options)]}
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
options["trust_remote_code"] = True
for name, model in (
    ("merged", AutoModelForCausalLM.from_pretrained(merged)),
    ("adapter", AutoPeftModelForCausalLM.from_pretrained(adapter)),
):
    folder = {"merged": merged, "adapter": adapter}[name]
    options["delete_bias"] = 8.0
    out = model.generate(**inputs, custom_generate=folder, **options)
    found[name] = tokenizer.batch_decode(out, skip_special_tokens=True)
    out = model.generate(**inputs, custom_generate=folder, max_deletes=0, **options)
    options.pop("delete_bias", None)
    plain = model.generate(**inputs, suppress_tokens=[%d], **options)
    found[name + " blocked"] = bool(torch.equal(out, plain))
    stops = {"stop_strings": tokenizer.decode(plain[0, -2]), "tokenizer": tokenizer}
    out = model.generate(**inputs, custom_generate=folder, max_deletes=0, **options, **stops)
    plain = model.generate(**inputs, suppress_tokens=[%d], **options, **stops)
    found[name + " stopped"] = bool(torch.equal(out, plain))
class Parts(TextStreamer):
    parts = []
    def on_finalized_text(self, text, stream_end=False):
        self.parts.append(text)
stream = Parts(tokenizer, skip_prompt=True, skip_special_tokens=True)
one = {key: value[-1:] for key, value in inputs.items()}
model.generate(**one, custom_generate=adapter, streamer=stream, window=3, delete_bias=8.0, **options)
found["streamed"] = "".join(stream.parts)
assert "rl_backspace" not in sys.modules
print(json.dumps(found))
"""


def test_people_without_this_package_can_delete(tmp_path: Path) -> None:
    run, made = run_of(tmp_path)
    export(run, tmp_path / "merged", merge=True)
    expected = [f"{p}{made.text(ids)}" for p, ids in zip(PROMPTS, answers(made), strict=True)]
    (token,) = made.rules.deletes
    result = subprocess.run(
        [sys.executable, "-c", STOCK % (token, token), "merged", "run/adapter", json.dumps(PROMPTS)],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["pipeline"] == found["merged"] == found["adapter"] == expected
    assert found["merged blocked"] and found["adapter blocked"] and found["merged stopped"] and found["adapter stopped"]
    (windowed,) = answers(made, PROMPTS[-1:], Budget(8, 24, window=3))
    assert found["streamed"].strip() == made.text(windowed).strip()


@pytest.mark.parametrize("merge", [True, False])
def test_the_card_says_what_came_out_and_its_code_runs(
    merge: bool, tmp_path: Path, modules: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = run_of(tmp_path)
    export(run, tmp_path / "out", merge)
    text = (tmp_path / "out" / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    said = yaml.safe_load(head)
    assert said["base_model"] == str(tmp_path / "base") and said["pipeline_tag"] == "text-generation"
    assert said["library_name"] == ("transformers" if merge else "peft")
    assert "| base model | 50.0 (10.0–90.0) | 62.5 (10.0–90.0) | 1.50, 1.50 |" in body
    assert "| this policy, token allowed | 75.0 (10.0–90.0) | 87.5" in body
    assert "| this policy, token blocked | 25.0 (10.0–90.0) | 12.5" in body
    assert "`<|delete|>` takes back the last token" in body and "7 steps of GRPO" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
    capsys.readouterr()
    exec(code.replace('"..."', f'"{PROMPTS[0]}"').replace("=64", "=8, do_sample=False"), {})
    (rollout,) = load(tmp_path / "out").generate(PROMPTS[:1], BUDGET)
    assert capsys.readouterr().out.strip() == f"{PROMPTS[0]}{made.text(rollout.visible)}".strip()
    assert rollout.visible


def body_of(config: dict[str, Any], made: Policy, run: Path) -> str:
    content = {**RunFolder.open(run).config().model_dump(), **config}
    return card(parse(content), SUMMARY, made, "out")


def test_the_card_says_where_a_policy_comes_from(tmp_path: Path) -> None:
    run, made = run_of(tmp_path)
    assert "1000 steps of correction warm-up, then 7 steps of GRPO" in body_of({}, made, run)
    text = body_of({"model": str(tmp_path / "{seed}"), "seed": 7}, made, run)
    assert str(tmp_path / "7") in text and "{seed}" not in text
    on = RunFolder.open(run).config().warmup.model_dump() | {"steps": 0}
    text = body_of({"model": str(run), "warmup": on}, made, run)
    assert f"going on from the run `{run}`, on the task `signs`: 7 steps of GRPO." in text
    embedded = create("arith-1m", Delete(), Lora(**LORA), seed=0)
    text = body_of({"model": "arith-1m"}, embedded, run)
    assert "`arith-1m` is part of rl-backspace" in text and str(Path(rl_backspace.__file__).parent) not in text


def test_the_card_of_a_twin_speaks_of_no_delete_token(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    twin = create(str(tmp_path / "base"), Delete(tokens={}), Lora(**LORA), seed=0)
    text = body_of({"delete": {"tokens": {}}}, twin, run)
    assert "without a delete token" in text and "takes back" not in text and "custom_generate" not in text
    assert "this policy, token" not in text and "self-correction" not in text
    publish(twin, RunFolder.open(run), tmp_path / "out")
    assert not (tmp_path / "out" / "custom_generate").exists()
    twin.model = twin.model.merge_and_unload()
    publish(twin, RunFolder.open(run), tmp_path / "whole")
    assert "trust_remote_code" not in (tmp_path / "whole" / "README.md").read_text()
    assert load(tmp_path / "whole").generate(PROMPTS, BUDGET)


@pytest.mark.parametrize("merge", [True, False])
def test_policies_of_chat_prompts_are_asked_in_their_template(
    merge: bool, tmp_path: Path, modules: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run, made = run_of(tmp_path)
    made.tokenizer.chat_template = "{% for m in messages %}+{{ m['content'] }}{% endfor %}="
    made.chat = True
    publish(made, RunFolder.open(run))
    export(run, tmp_path / "out", merge)
    again = load(tmp_path / "out")
    assert again.chat and json.loads((tmp_path / "out" / "delete.json").read_text())["chat"] is True
    (expected,) = again.generate([[{"role": "user", "content": "1 2"}]], BUDGET)
    said = call("generate", tmp_path / "out", "1 2", "--temperature", 0, "--tokens", 8, "--json")
    assert json.loads(said.out)["actions"] == expected.actions
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S)
    capsys.readouterr()
    exec(code.replace('"..."', '"1 2"').replace("=64", "=8, do_sample=False"), {})
    assert made.text(expected.visible).strip() in capsys.readouterr().out


def test_who_knows_nothing_of_deletes_gets_the_blocked_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, made = run_of(tmp_path)
    export(run, tmp_path / "merged", merge=True)
    (token,) = made.rules.deletes
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        stock.get_output_embeddings().weight[token] *= 3
    inputs = made.tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    out = stock.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert not (out == token).any()
    assert torch.equal(out, stock.generate(**inputs, max_new_tokens=8, do_sample=False, suppress_tokens=[token]))
    assert load(tmp_path / "merged").model.generation_config.suppress_tokens is None
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    expected = answers(made)
    assert generated(remote, tokenizer) == expected
    assert generated(remote, tokenizer, custom_generate=rl_backspace.generate) == expected
    assert generated(remote, tokenizer, delete=run) == generated(remote, tokenizer, delete=str(run)) == expected


def test_a_run_in_progress_has_a_card_without_results(tmp_path: Path) -> None:
    run, made = run_of(tmp_path)
    (run / "summary.json").unlink()
    publish(made, RunFolder.open(run))
    text = (run / "adapter" / "README.md").read_text()
    assert "Accuracy" not in text and "small" in text


def test_the_command_exports(tmp_path: Path) -> None:
    run, made = run_of(tmp_path)
    assert call("export", run, "--merge", tmp_path / "m").code == 0
    assert call("export", run, tmp_path / "a", "--adapter-only").code == 0
    assert (tmp_path / "m" / "config.json").exists() and (tmp_path / "a" / "adapter_config.json").exists()
    for folder in ("m", "a"):
        command = ("generate", tmp_path / folder, PROMPTS[0], "--temperature", 0, "--bias", BIAS, "--tokens", 8)
        shown = call(*command)
        expected = made.generate(PROMPTS[:1], BUDGET, EAGER)[0]
        typed = [line for line in shown.out.splitlines() if line.startswith(PROMPTS[0])]
        assert shown.code == 0 and len(typed) == 1
        record = call(
            "generate", tmp_path / folder, PROMPTS[0], "--temperature", 0, "--bias", BIAS, "--tokens", 8, "--json"
        ).out
        assert json.loads(record)["actions"] == expected.actions


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_generate_keeps_to_a_short_context_by_itself(memory: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", max_position_embeddings=48)
    create(str(base), Delete(memory=memory), Lora(**LORA), seed=0).save(tmp_path / "adapter")  # type: ignore[arg-type]
    record = json.loads(call("generate", tmp_path / "adapter", PROMPTS[0], "--bias", 1, "--json").out)
    assert len(record["actions"]) > 1
    said = call("generate", tmp_path / "adapter", PROMPTS[0], "--tokens", 50)
    assert said.code == 2 and "--tokens" in said.errors[0] and "max_new_tokens" in said.errors[0]
    assert "limit is 48" in call("generate", tmp_path / "adapter", "1" * 60).errors[0]


# refusals


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = run_of(tmp_path, lora=None)
    assert "no finished run here" in refused(lambda: export(tmp_path, tmp_path / "x", True))
    assert "there is no adapter" in refused(lambda: export(run, tmp_path / "x", False))
    assert "already there and not empty" in refused(lambda: export(run, tmp_path / "base", True))
    (tmp_path / "file").write_text("")
    assert str(tmp_path / "file") in refused(lambda: export(run, tmp_path / "file" / "x", True))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rl_backspace.export.card", full)
    assert "No space left" in refused(lambda: export(run, tmp_path / "y", True))


def test_an_adapter_for_another_base_is_told(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    other = checkpoint(tmp_path / "other", hidden_size=16)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert "size mismatch" in refused(lambda: load(run))


@pytest.mark.parametrize("layers", [1, 3])
def test_an_adapter_for_another_number_of_layers_is_told(layers: int, tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    other = checkpoint(tmp_path / "other", num_hidden_layers=layers)
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(other)
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert "the adapter does not fit its base" in refused(lambda: load(run))


def test_saved_rules_that_are_not_the_policys_are_told(tmp_path: Path) -> None:
    run, made = run_of(tmp_path)
    file = run / "adapter" / "delete.json"
    saved = json.loads(file.read_text())
    ids = {text: index + 1 for text, index in saved["ids"].items()}
    for change, said in (({"ids": ids}, "one of them belongs to another policy"), ({"memory": "x"}, "memory: got 'x'")):
        file.write_text(json.dumps({**saved, **change}))
        assert said in refused(lambda: load(run))
    assert "memory: got 'x'" in refused(
        lambda: generated(made.model, made.tokenizer, custom_generate=rl_backspace.generate, delete=run)
    )
    typo = tmp_path / "runs-typo"
    assert "no delete.json" in refused(
        lambda: generated(made.model, made.tokenizer, custom_generate=rl_backspace.generate, delete=typo)
    )


def test_a_tokenizer_without_the_token_is_told(tmp_path: Path) -> None:
    run, _ = run_of(tmp_path)
    AutoTokenizer.from_pretrained(tmp_path / "base").save_pretrained(run / "adapter")
    assert "has no token '<|delete|>'" in refused(lambda: load(run))
