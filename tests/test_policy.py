from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoints import CHARACTERS, checkpoint
from conftest import tiny
from peft import AutoPeftModelForCausalLM, PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.trainer_utils import align_special_tokens

from rl_backspace.backbone import causal_lm
from rl_backspace.config import Delete, Lora
from rl_backspace.engine import Engine, Sampling
from rl_backspace.errors import UserError
from rl_backspace.policy import EMBEDDED, Policy, create, load, load_base
from rl_backspace.pretrain import character_tokenizer
from rl_backspace.semantics import Budget, Rules

LORA = Lora(r=4, alpha=8)
CHAT = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}>"


def policy(folder: Path, delete: Delete | None = None, lora: Lora | None = LORA, **options: Any) -> Policy:
    return create(str(checkpoint(folder, **options)), delete or Delete(), lora, seed=0)


def rows_of(made: Policy) -> dict[str, Tensor]:
    """Copies of both embeddings as the model uses them, the adapter's rows included."""
    made.model.eval()
    base = causal_lm(made.model)
    ids = torch.arange(base.config.get_text_config().vocab_size)
    hidden = torch.eye(base.config.hidden_size)[None]
    with torch.no_grad():
        return {
            "in": base.get_input_embeddings()(ids).clone(),
            "out": base.get_output_embeddings()(hidden)[0].T.clone(),
        }


def disturb(made: Policy) -> None:
    """Change everything that training could have changed."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def logits(model: Any, ids: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=ids).logits


def everything(made: Policy) -> Tensor:
    """One sequence with every token of the vocabulary that is in use."""
    return torch.arange(len(made.tokenizer))[None]


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "whole"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_fresh_token_takes_a_spare_row_and_touches_no_other(tied: bool, lora: Lora | None, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, spare=3, tie_word_embeddings=tied)
    before = AutoModelForCausalLM.from_pretrained(folder)
    made = create(str(folder), Delete(), lora, seed=0)
    (token,) = made.rules.deletes
    assert token == CHARACTERS
    assert made.model.get_input_embeddings().weight.shape[0] == CHARACTERS + 3  # never resized
    for embedding, old in zip(
        rows_of(made).values(), (before.get_input_embeddings(), before.get_output_embeddings()), strict=True
    ):
        others = torch.arange(CHARACTERS + 3) != token
        assert torch.equal(embedding[others], old.weight[others])
        # near the middle of the used rows: neither certain nor unheard of before the first step
        used = old.weight[:CHARACTERS]
        distance = (embedding[token] - used.mean(0)).norm() / (used - used.mean(0)).norm(dim=1).median()
        assert 0 < distance < 0.3


@pytest.mark.parametrize("tied", [True, False])
def test_a_training_step_moves_the_tokens_rows_and_no_other(tied: bool, family: str, tmp_path: Path) -> None:
    made = policy(tmp_path, family=family, tie_word_embeddings=tied)
    (token,) = made.rules.deletes
    before = rows_of(made)
    made.model.train()
    optimizer = torch.optim.SGD([p for p in made.model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[5, 6, token, 7, token]])
    torch.manual_seed(0)
    made.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for name, after in rows_of(made).items():
        moved = (after != before[name]).any(dim=1).nonzero().flatten().tolist()
        assert moved == [token], name


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_adapter_loads_with_equal_logits_here_and_in_plain_peft(
    tied: bool, family: str, tmp_path: Path
) -> None:
    base = checkpoint(tmp_path / "base", family=family, tie_word_embeddings=tied)
    delete = Delete(tokens={"<|undo|>": "line", "<|back|>": 3}, memory="hint", retry="free")
    made = create(str(base), delete, LORA, seed=0)
    disturb(made)
    folder = tmp_path / "adapter"
    made.save(folder)
    ids = everything(made)
    expected = logits(made.model, ids)

    loaded = load(folder)
    assert loaded.rules == made.rules
    assert torch.equal(logits(loaded.model, ids), expected)

    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
    auto = AutoPeftModelForCausalLM.from_pretrained(str(folder))
    for model in (plain, auto):
        assert torch.equal(logits(model, ids), expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in delete.tokens:
        index = tokenizer.convert_tokens_to_ids(text)
        assert loaded.rules.deletes[index] == delete.tokens[text]
        assert tokenizer(f"1{text}2").input_ids == [*tokenizer("1").input_ids, index, *tokenizer("2").input_ids]
    # rounding, not equality: the update is added to the weights
    torch.testing.assert_close(logits(plain.merge_and_unload(), ids), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_is_a_stock_checkpoint_with_equal_logits(tied: bool, family: str, tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", family=family, tie_word_embeddings=tied)
    delete = Delete(tokens={"<|undo|>": "line", "<|back|>": 3}, memory="hint", retry="free")
    made = create(str(base), delete, None, seed=0)
    disturb(made)
    folder = tmp_path / "model"
    for _ in range(2):  # the second time over the first
        made.save(folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "model"]
    shutil.rmtree(base)  # it needs no base
    ids = everything(made)
    expected = logits(made.model, ids)

    loaded = load(folder)
    assert loaded.whole and loaded.rules == made.rules
    assert torch.equal(logits(loaded.model, ids), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder), ids), expected)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == made.tokenizer.get_vocab()
    for token in ("eos_token_id", "pad_token_id", "padding_side"):
        assert getattr(tokenizer, token) == getattr(made.tokenizer, token)


def test_all_of_a_whole_model_is_trained_in_float32(tmp_path: Path) -> None:
    tiny(vocab_size=CHARACTERS + 2).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    character_tokenizer().save_pretrained(tmp_path / "base")
    made = create(str(tmp_path / "base"), Delete(), None, seed=0)
    assert all(p.requires_grad and p.dtype == torch.float32 for p in made.model.parameters())
    made.save(tmp_path / "model")
    for trainable in (True, False):
        loaded = load(tmp_path / "model", trainable).model
        assert all(p.requires_grad == trainable and p.dtype == torch.float32 for p in loaded.parameters())


def test_a_forward_that_accelerate_has_wrapped_is_no_wrong_model(tmp_path: Path) -> None:
    """After training in bfloat16 the model's own forward still rounds; the float32 rollouts are not to be blamed."""
    made = policy(tmp_path, lora=None)
    made.model.forward = torch.autocast("cpu", torch.bfloat16)(made.model.forward)
    Engine(made.model, made.rules)


def test_what_trainers_change_in_the_configs_keeps_no_model_from_being_saved(tmp_path: Path) -> None:
    """Published generation configs may break transformers' own rules, which it holds changed ones to."""
    model = tiny(vocab_size=CHARACTERS + 2)
    model.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [7], "top_k": 5}')
    character_tokenizer().save_pretrained(tmp_path / "base")
    made = create(str(tmp_path / "base"), Delete(), None, seed=0)
    align_special_tokens(made.model, made.tokenizer)  # as transformers does before it trains
    made.model.config.use_cache = False
    made.save(tmp_path / "model")
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    assert (saved.temperature, saved.top_k, saved.pad_token_id) == (0.6, 5, made.tokenizer.pad_token_id)
    assert set(saved.eos_token_id) == load(tmp_path / "model").rules.eos == {1, 7}
    before, after = (AutoConfig.from_pretrained(tmp_path / name).to_dict() for name in ("base", "model"))
    assert {**before, "_name_or_path": ""} == {**after, "_name_or_path": ""}


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "whole"])
def test_a_saved_whole_model_is_a_base_that_has_its_delete_token(lora: Lora | None, tmp_path: Path) -> None:
    made = policy(tmp_path / "base", lora=None)
    disturb(made)
    made.save(tmp_path / "model")
    ids = everything(made)
    again = create(str(tmp_path / "model"), Delete(), lora, seed=1)
    assert again.rules == made.rules
    assert torch.equal(logits(again.model, ids), logits(made.model, ids))
    disturb(again)
    again.save(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again").model, ids), logits(again.model, ids))


@pytest.mark.parametrize("lora", [LORA, None], ids=["lora", "whole"])
def test_a_save_that_breaks_off_leaves_the_old_one_whole(
    lora: Lora | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = policy(tmp_path / "base", lora=lora)
    made.save(tmp_path / "saved")
    ids = everything(made)
    expected = logits(made.model, ids)
    disturb(made)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(made.tokenizer), "save_pretrained", full)
        with pytest.raises(OSError, match="no space"):
            made.save(tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved").model, ids), expected)
    with torch.no_grad():
        next(p for p in made.model.parameters() if p.requires_grad).fill_(torch.nan)
    assert "training diverged" in refused(lambda: made.save(tmp_path / "saved"))
    assert torch.equal(logits(load(tmp_path / "saved").model, ids), expected)


def test_only_the_loaded_copy_that_is_to_be_trained_has_gradients(tmp_path: Path) -> None:
    policy(tmp_path / "base").save(tmp_path / "adapter")
    frozen, trainable = (load(tmp_path / "adapter", trainable=flag).model for flag in (False, True))
    assert not any(p.requires_grad for p in frozen.parameters())
    names = {name for name, p in trainable.named_parameters() if p.requires_grad}
    assert names and all("lora_" in name or "token_adapter" in name for name in names)


def test_the_semantics_file_says_all_that_rules_say(tmp_path: Path) -> None:
    delete = Delete(tokens={"<|a|>": "answer", "<|l|>": "line"}, memory="keep", retry="ban", boundary="\n")
    made = policy(tmp_path / "base", delete)
    made.save(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "delete.json").read_text())
    newline = made.tokenizer.convert_tokens_to_ids("\n")
    assert saved == {
        "tokens": {"<|a|>": "answer", "<|l|>": "line"},
        "ids": {"<|a|>": CHARACTERS, "<|l|>": CHARACTERS + 1},
        "layers": 2,
        "memory": "keep",
        "retry": "ban",
        "boundaries": [newline],
        "eos": [made.tokenizer.eos_token_id],
    }
    assert made.rules == Rules(
        {CHARACTERS: "answer", CHARACTERS + 1: "line"}, frozenset([1]), "keep", "ban", frozenset([newline])
    )


def test_boundaries_are_asked_for_by_a_line_alone(tmp_path: Path) -> None:
    assert policy(tmp_path, Delete(boundary="zz")).rules.boundaries == frozenset()


@pytest.mark.parametrize("spare", [0, 1])
def test_a_full_embedding_grows(spare: int, tmp_path: Path) -> None:
    delete = Delete(tokens={"<|a|>": "token", "<|b|>": "answer"})
    made = policy(tmp_path, delete, spare=spare)
    assert made.rules.deletes == {CHARACTERS: "token", CHARACTERS + 1: "answer"}
    old = AutoModelForCausalLM.from_pretrained(tmp_path).get_input_embeddings().weight
    new = rows_of(made)["in"]
    assert new.shape[0] == CHARACTERS + 2 and torch.equal(new[:CHARACTERS], old[:CHARACTERS])


def test_a_policy_without_a_delete_token_is_a_twin(tmp_path: Path) -> None:
    made = policy(tmp_path / "base", Delete(tokens={}))
    disturb(made)
    made.save(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.rules == made.rules and not made.rules.deletes
    assert torch.equal(logits(loaded.model, everything(made)), logits(made.model, everything(made)))
    (rollout,) = loaded.generate(["1 2=3:"], Budget(6, 18))
    assert rollout.deletes == 0 and rollout.actions == rollout.visible


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_it_scores_what_it_generated(memory: Any, tmp_path: Path) -> None:
    made = policy(tmp_path, Delete(memory=memory))
    made.model.train()
    budget = Budget(6, 18)
    sampling = Sampling(temperature=0.7, delete_bias=6.0)
    rollouts = made.generate(["1 2=3:", "4:", "5 6 7=8:"], budget, sampling, torch.Generator().manual_seed(0))
    assert sum(rollout.deletes for rollout in rollouts) > 0
    for rollout, scores in zip(rollouts, made.score(rollouts, budget, temperature=0.7), strict=True):
        torch.testing.assert_close(scores, torch.tensor(rollout.logprobs), rtol=1e-4, atol=1e-4)
    assert made.model.training


def test_an_existing_token_can_be_the_delete_token(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", spare=0)  # and then no row needs to be free
    made = create(str(base), Delete(tokens={"~": "token"}), LORA, seed=0)
    index = character_tokenizer().convert_tokens_to_ids("~")
    assert made.rules.deletes == {index: "token"}
    original = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert torch.equal(rows_of(made)["in"], original)  # it starts as it was
    disturb(made)
    made.save(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.rules == made.rules
    assert torch.equal(logits(loaded.model, everything(made)), logits(made.model, everything(made)))


def test_the_generation_configs_own_ends_count(tmp_path: Path) -> None:
    model = tiny(vocab_size=CHARACTERS + 2)
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    assert create(str(tmp_path), Delete(), LORA, 0).rules.eos == {1, 7}


def test_the_seed_decides_the_fresh_weights(tmp_path: Path) -> None:
    base = str(checkpoint(tmp_path))
    one, same, other = (create(base, Delete(), LORA, seed) for seed in (3, 3, 4))
    states = [{k: v for k, v in made.model.state_dict().items() if "lora_A" in k} for made in (one, same, other)]
    rows = [rows_of(made)["in"][CHARACTERS] for made in (one, same, other)]
    assert torch.equal(rows[0], rows[1]) and not torch.equal(rows[0], rows[2])
    key = next(iter(states[0]))
    assert torch.equal(states[0][key], states[1][key]) and not torch.equal(states[0][key], states[2][key])


def test_a_fresh_adapter_changes_nothing(tmp_path: Path) -> None:
    made = policy(tmp_path)
    ids = everything(made)[:, :CHARACTERS]
    base = logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids)
    assert torch.equal(logits(made.model, ids)[..., :CHARACTERS], base[..., :CHARACTERS])


# refusals


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text", ["<eos>", "<pad>"])
def test_a_token_that_has_a_meaning_already_is_refused(text: str, tmp_path: Path) -> None:
    assert repr(text) in refused(lambda: policy(tmp_path, Delete(tokens={text: "token"})))


def test_a_line_that_could_never_end_is_refused(tmp_path: Path) -> None:
    delete = Delete(tokens={"<|x|>": "line"}, boundary="zz")
    assert refused(lambda: policy(tmp_path, delete)).startswith("delete.boundary: no token")


def test_a_head_with_a_bias_is_trained_whole(tmp_path: Path) -> None:
    config = transformers.PhiConfig(
        vocab_size=CHARACTERS + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model = transformers.PhiForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    said = refused(lambda: create(str(tmp_path), Delete(), LORA, 0))
    assert said.startswith("lora: the output head of PhiForCausalLM has a bias")
    made, ids = create(str(tmp_path), Delete(), None, 0), torch.arange(CHARACTERS)[None]
    assert torch.equal(logits(made.model, ids)[..., :CHARACTERS], logits(model, ids)[..., :CHARACTERS])
    create(str(tmp_path), Delete(tokens={}), LORA, 0)  # a twin has no token of its own


@pytest.mark.parametrize("modules", [["nothing_like_it"], ["lm_head"], "lm_head", ["embed_tokens"], ".*"])
def test_lora_where_it_cannot_be_is_refused(modules: Any, tmp_path: Path) -> None:
    base = str(checkpoint(tmp_path))
    said = refused(lambda: create(base, Delete(), Lora(target_modules=modules), 0))
    assert said.startswith("lora.target_modules: ")


def mamba(folder: Path) -> None:
    config = transformers.MambaConfig(
        vocab_size=CHARACTERS + 2, hidden_size=32, state_size=4, num_hidden_layers=2, eos_token_id=1, pad_token_id=0
    )
    transformers.MambaForCausalLM(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def t5(folder: Path) -> None:
    config = transformers.T5Config(vocab_size=CHARACTERS + 2, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)


def without_eos(folder: Path) -> None:
    checkpoint(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def cut_short(folder: Path) -> None:
    checkpoint(folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (mamba, "MambaForCausalLM cannot rewind"),
        (t5, "T5"),
        (without_eos, "no end-of-sequence token"),
        (lambda folder: None, "cannot be loaded"),
        (cut_short, "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    ],
    ids=["mamba", "t5", "without_eos", "empty", "cut_short", "no_json"],
)
def test_folders_that_hold_no_model_of_use(make: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    make(tmp_path)
    assert said in refused(lambda: create(str(tmp_path), Delete(), LORA, 0))


@pytest.mark.parametrize("name", ["/nowhere/model", "./nothing", "", "a b", "arith-1M", "arith1m"])
def test_names_that_are_no_model_are_refused_without_asking_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked the hub")

    monkeypatch.setattr("httpx.Client.send", ask)
    said = refused(lambda: load_base(name))
    assert said.startswith(f"model: {name!r} ") and "arith-1m" in said


def test_a_model_of_the_package_goes_by_its_name_wherever_it_is_installed(tmp_path: Path) -> None:
    if not (EMBEDDED / "arith-1m" / "config.json").exists():
        pytest.skip("no embedded model here")
    made = create("arith-1m", Delete(), LORA, 0)
    made.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/another/machine/rl_backspace/models/arith-1m"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    ids = everything(made)
    assert torch.equal(logits(load(tmp_path).model, ids), logits(made.model, ids))


def test_a_whole_model_made_of_one_of_the_package_is_its_own(tmp_path: Path) -> None:
    made = create("arith-1m", Delete(), None, 0)
    disturb(made)
    made.save(tmp_path)
    assert "model" not in json.loads((tmp_path / "delete.json").read_text())
    ids = everything(made)
    assert torch.equal(logits(load(tmp_path).model, ids), logits(made.model, ids))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no whole adapter or model of rl-backspace here (FileNotFoundError"),
    "no semantics": (lambda folder: (folder / "delete.json").unlink(), "no whole adapter"),
    "empty semantics": (lambda folder: (folder / "delete.json").write_text("{}"), "no whole adapter"),
    "semantics of another kind": (lambda folder: (folder / "delete.json").write_text("[]"), "no whole adapter"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "no whole adapter"),
    "cut weights": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"xx"), "no whole adapter"),
    "no base": (lambda folder: shutil.rmtree(folder.parent / "base"), "base' is no folder"),
    "another tokenizer": (lambda folder: character_tokenizer().save_pretrained(folder), "no token '<|delete|>'"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_is_no_whole_adapter(damage: Callable[[Path], Any], said: str, tmp_path: Path) -> None:
    policy(tmp_path / "base").save(tmp_path / "adapter")
    damage(tmp_path / "adapter")
    assert said in refused(lambda: load(tmp_path / "adapter"))


WHOLE_DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no semantics": lambda folder: (folder / "delete.json").unlink(),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "half a config": lambda folder: (folder / "config.json").write_text("{"),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut weights": lambda folder: (folder / "model.safetensors").write_bytes(b"xx"),
}


@pytest.mark.parametrize("damage", WHOLE_DAMAGE.values(), ids=WHOLE_DAMAGE)
def test_a_folder_that_is_no_whole_model(damage: Callable[[Path], Any], tmp_path: Path) -> None:
    policy(tmp_path / "base", lora=None).save(tmp_path / "model")
    damage(tmp_path / "model")
    said = refused(lambda: load(tmp_path / "model"))
    assert "no whole adapter or model of rl-backspace here" in said
    assert said.endswith("expected RUN/adapter or RUN/model")


def test_quantised_weights_are_not_trained_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tokenizer = load_base(str(checkpoint(tmp_path)))
    base.hf_quantizer = object()
    monkeypatch.setattr("rl_backspace.policy.load_base", lambda model: (base, tokenizer))
    assert refused(lambda: create(str(tmp_path), Delete(), None, 0)).startswith("lora: null trains all parameters")


# text in, text out


def test_prompts_become_the_tokenizers_ids_and_answers_text(tmp_path: Path) -> None:
    made = policy(tmp_path)
    texts = ["3 4=7:", "x"]
    assert made.encode(texts) == [made.tokenizer(text).input_ids for text in texts]
    visible = [*made.tokenizer("+ -").input_ids, made.tokenizer.eos_token_id]
    assert made.text(visible) == "+ -"


def test_chat_prompts_go_through_the_template(tmp_path: Path) -> None:
    made = policy(tmp_path)
    chat = [[{"role": "user", "content": "2+2"}], [{"role": "user", "content": "1"}]]
    assert "no chat template" in refused(lambda: made.encode(chat))
    made.tokenizer.chat_template = CHAT
    assert [made.text(ids) for ids in made.encode(chat)] == ["[user]2+2>", "[user]1>"]
    assert "some prompts are text" in refused(lambda: made.encode([*chat, "text"]))
    made.tokenizer.chat_template = "{{ raise_exception('user must start') }}"
    assert "user must start" in refused(lambda: made.encode(chat))


def test_what_python_is_given_by_mistake_is_told(tmp_path: Path) -> None:
    made = policy(tmp_path / "base")
    assert "got the text '1 2'; expected a list" in refused(lambda: made.generate("1 2", Budget(3)))  # type: ignore[arg-type]
    assert "prompts: got 5" in refused(lambda: made.generate([5], Budget(3)))
    assert made.generate([], Budget(3)) == [] == made.score([])
    rollouts = made.generate(["1 2"], Budget(3))
    assert "temperature: got 0" in refused(lambda: made.score(rollouts, temperature=0))
    made.model.train()
    made.score(rollouts)
    assert made.model.base_model.model.training
