"""The environment plays by the engine's rules and pays what the trainer's rewards pay."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import checkpoint
from gymnasium.utils.env_checker import check_env

import rl_backspace
from rl_backspace import BackspaceEnv
from rl_backspace.engine import Sampling
from rl_backspace.errors import UserError
from rl_backspace.semantics import IllegalAction

CONFIG = """
name: small
model: {model}
task: {{fn: {task}}}
delete: {{memory: {memory}, budget: 14}}
rewards:
  correct: {{fn: "correctness:checked"}}
  cost: {{fn: "delete_cost:flat", weight: 0.5, kwargs: {{cost: 0.1}}}}
  metric: {{fn: "length:actions", weight: 0.0, kwargs: {{cost: 1.0}}}}
trainer: {{max_steps: 5, max_completion_length: 5}}
"""


def experiment(folder: Path, task: str = "signs, count: 3, train: 40, test: 4", memory: str = "erase") -> Path:
    path = folder / "experiment.yaml"
    path.write_text(CONFIG.format(model=checkpoint(folder / "model"), task=task, memory=memory))
    return path


def play(env: BackspaceEnv, row: int, actions: list[int]) -> tuple[list[dict[str, Any]], list[float], Any]:
    observation, _ = env.reset(seed=0, options={"row": row})
    seen, rewards, last = [observation], [], None
    for action in actions:
        observation, reward, *last = env.step(action)
        seen.append(observation)
        rewards.append(reward)
    return seen, rewards, last


def test_gymnasium_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    check_env(BackspaceEnv(experiment(tmp_path)), skip_render_check=True)


@pytest.mark.parametrize("memory", ["erase", "keep", "hint"])
def test_a_policy_that_is_driven_step_by_step_does_what_the_engine_does(memory: str, tmp_path: Path) -> None:
    env = BackspaceEnv(experiment(tmp_path, memory=memory))
    sampling = Sampling(temperature=0, delete_bias=4.0)
    rows = list(range(6))
    rollouts = env.policy.generate([env.rows[row]["prompt"] for row in rows], env.experiment.budget, sampling)
    assert sum(rollout.deletes for rollout in rollouts) > 3
    for row, rollout in zip(rows, rollouts, strict=True):
        observation, info = env.reset(options={"row": row})
        assert info == {"row": row, "prompt": env.rows[row]["prompt"]}
        actions, over = [], False
        while not over:
            ids = observation["context"][: observation["length"][0]]
            with torch.no_grad():
                logits = env.policy.model(input_ids=torch.tensor(ids)[None]).logits[0, -1]
            logits[list(env.policy.rules.deletes)] += 4.0
            logits[observation["action_mask"] == 0] = -torch.inf
            actions.append(int(logits.argmax()))
            observation, _, terminated, truncated, info = env.step(actions[-1])
            over = terminated or truncated
        assert (actions, info["end"], info["deletes"]) == (rollout.actions, rollout.end, rollout.deletes)
        assert terminated == (rollout.end == "eos") and truncated == (rollout.end != "eos")
        assert info["text"] == env.policy.text(rollout.visible)


def test_the_reward_is_the_weighted_total_at_the_end(tmp_path: Path) -> None:
    env = BackspaceEnv(experiment(tmp_path))
    (delete,) = env.policy.rules.deletes
    plus, minus = (env.policy.tokenizer.convert_tokens_to_ids(sign) for sign in "+-")
    right = [*env.policy.tokenizer(env.rows[3]["answer"], add_special_tokens=False).input_ids, 1]
    wrong = minus if right[0] == plus else plus
    seen, rewards, (terminated, truncated, info) = play(env, 3, [wrong, delete, *right])
    assert terminated and not truncated and rewards == [0.0] * 5 + [pytest.approx(0.95)]
    assert info["rewards"] == pytest.approx([0, -0.05, 0, 0, 0, 1])  # the press, weighted, where it happened
    assert all(env.observation_space.contains(observation) for observation in seen)


def test_what_the_mask_forbids_is_refused(tmp_path: Path) -> None:
    env = BackspaceEnv(experiment(tmp_path))
    (delete,) = env.policy.rules.deletes
    observation, _ = env.reset(seed=1)
    assert observation["action_mask"][delete] == 0 and observation["action_mask"].sum() == env.vocabulary - 1
    with pytest.raises(IllegalAction):
        env.step(delete)
    env.step(1)
    with pytest.raises(IllegalAction, match="after the rollout ended"):
        env.step(1)


def test_the_seed_decides_the_prompts(tmp_path: Path) -> None:
    env = BackspaceEnv(experiment(tmp_path))
    rows = [[env.reset(seed=seed)[1]["row"], env.reset()[1]["row"]] for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]


def test_it_shows_what_was_typed_and_struck_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = BackspaceEnv(experiment(tmp_path), render_mode="human")
    (delete,) = env.policy.rules.deletes
    plus, minus = (env.policy.tokenizer.convert_tokens_to_ids(sign) for sign in "+-")
    play(env, 0, [plus, minus, delete, plus, 1])
    assert env.render() == f"{env.rows[0]['prompt']} +~~-~~+⏎"
    assert capsys.readouterr().out == f"{env.render()}\n"


def test_the_keyboard_slips_here_too(tmp_path: Path) -> None:
    env = BackspaceEnv(experiment(tmp_path, "typos, length: 4, rate: 0.5, train: 40, test: 4"))
    letter = env.policy.tokenizer(env.rows[0]["answer"], add_special_tokens=False).input_ids[0]
    typed = []
    env.reset(seed=0)
    for _ in range(300):
        env.reset(options={"row": 0})
        env.step(letter)
        typed.append(env.machine.visible[0])
    assert 0.4 < np.mean([token != letter for token in typed]) < 0.6
    assert len(set(typed)) > 5 and set(typed) <= set(env._keyboard.tokens)  # type: ignore[union-attr]


def test_a_keyboard_types_nothing_illegal_and_swaps_nothing_fixed(tmp_path: Path) -> None:
    """Each slip would type a banned token if it could; deletes and the end always arrive."""
    path = experiment(tmp_path, "typos, length: 4, rate: 0.5, train: 40, test: 4")
    env = BackspaceEnv(path, ["delete.retry=ban", "delete.budget=400"])
    (delete,) = env.policy.rules.deletes
    keyboard: Any = replace(env._keyboard, rate=1.0)  # type: ignore[type-var]
    env._keyboard, tokens = keyboard, sorted(keyboard.tokens)
    env.reset(seed=0, options={"row": 0})
    for left in range(len(tokens), 1, -1):
        chosen = next(token for token in tokens if token not in env.machine.illegal())
        env.step(chosen)
        assert env.machine.visible[0] in tokens and len(env.machine.illegal()) < len(tokens)
        env.step(delete)  # is no letter that slips
        assert len(set(env.machine.tried[0])) == len(tokens) - left + 1
    banned = env.machine.tried[0][0]
    with pytest.raises(IllegalAction):
        env.step(banned)
    env.reset(options={"row": 0})
    assert env.step(1)[2] and env.machine.visible == [1]


def test_what_is_outside_of_the_spaces_is_refused(tmp_path: Path) -> None:
    env = BackspaceEnv(experiment(tmp_path))
    env.reset(seed=0)
    for action in (-1, env.vocabulary, 1.5, "a", None):
        with pytest.raises(UserError, match="action: got"):
            env.step(action)  # type: ignore[arg-type]
    for row in (-1, len(env.rows), "0"):
        with pytest.raises(UserError, match="options: got row="):
            env.reset(options={"row": row})
    with pytest.raises(UserError, match="options: got 'rows'"):
        env.reset(options={"rows": 1})
    with pytest.raises(UserError, match="render_mode: got 'rgb'"):
        BackspaceEnv(env.experiment, render_mode="rgb")
    env.step(np.array(5))
    assert env.machine.visible == [5]


def test_the_package_without_gymnasium_lacks_the_environment_alone() -> None:
    code = """
import sys
class Nothing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] == "gymnasium":
            raise ModuleNotFoundError("No module named 'gymnasium'", name=name)
sys.meta_path.insert(0, Nothing())
import rl_backspace
from rl_backspace import *
assert Budget and not hasattr(rl_backspace, "BackspaceEnv") and "Rules" in dir(rl_backspace)
try:
    rl_backspace.BackspaceEnv
except AttributeError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "BackspaceEnv needs gymnasium: pip install 'rl-backspace[gym]'\n"
    assert "BackspaceEnv" in dir(rl_backspace)


def test_bad_experiments_are_refused_as_by_train(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        BackspaceEnv(tmp_path / "nothing.yaml")
    with pytest.raises(UserError, match="max_completion_length"):
        BackspaceEnv(experiment(tmp_path), ["trainer.max_completion_length=2"])
