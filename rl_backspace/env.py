"""An environment in Gymnasium's terms, so that other RL libraries can drive a policy action by action.

A state is the context that the policy would be conditioned on, an action is a token id, and the reward comes when
the rollout ends. Semantics, legality and rewards are those of the engine and the trainer.
"""

from __future__ import annotations

import operator
from pathlib import Path
from typing import Any

import numpy as np

from rl_backspace.config import override, parse, read_yaml
from rl_backspace.display import last_message, strike
from rl_backspace.engine import Rollout
from rl_backspace.errors import UserError
from rl_backspace.experiment import Experiment, prepare
from rl_backspace.keyboard import keyboard_of
from rl_backspace.semantics import IllegalAction, Machine
from rl_backspace.tasks import Row
from rl_backspace.terms import call, per_action

try:
    import gymnasium
    from gymnasium import spaces
except ImportError as error:
    raise UserError("BackspaceEnv needs gymnasium: pip install 'rl-backspace[gym]'") from error


class BackspaceEnv(gymnasium.Env[Any, Any]):
    """One prompt of an experiment's training rows per episode.

    Observation: `context` (capacity,) int64, the token ids that the policy is conditioned on, padded with zeros on
    the right; `length` (1,) int64, how many they are; `action_mask` (V,) int8, 1 where an action is legal.
    Action: a token id below V, delete tokens included.
    Reward: 0 until the episode ends, then the weighted total as at the end of training, where every schedule has
    risen; `info["rewards"]` has it per action, for those that pay on the way.
    Terminated: the answer ended, or no action is legal. Truncated: its length or budget is spent.

    Args:
        experiment: an experiment file, or one that is prepared already.
        overrides: of the file, as on the command line: `trainer.max_completion_length=16`.
        render_mode: "ansi": `render` returns the trace, deleted text between ~~; "human": it is printed.

    Raises:
        UserError: as `train`.
    """

    metadata = {"render_modes": ["ansi", "human"]}  # noqa: RUF012

    def __init__(
        self,
        experiment: str | Path | Experiment,
        overrides: list[str] | None = None,
        render_mode: str | None = None,
    ):
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise UserError(f"render_mode: got {render_mode!r}; expected None, 'ansi' or 'human'")
        if not isinstance(experiment, Experiment):
            content = read_yaml(Path(experiment))
            override(content, overrides or [])
            experiment = prepare(parse(content), None)
        self.experiment, self.render_mode = experiment, render_mode
        self.policy = experiment.policy
        self.rows = experiment.task.train
        self._prompts = self.policy.encode([row["prompt"] for row in self.rows])
        self._keyboard = keyboard_of(experiment.task, self.policy)
        rules, budget = self.policy.rules, experiment.budget
        self.vocabulary = int(self.policy.model.get_input_embeddings().weight.shape[0])
        self.capacity = max(map(len, self._prompts)) + budget.most_actions
        self.action_space = spaces.Discrete(self.vocabulary)
        self.observation_space = spaces.Dict(
            {
                "context": spaces.Box(0, self.vocabulary - 1, (self.capacity,), np.int64),
                "length": spaces.Box(1, self.capacity, (1,), np.int64),
                "action_mask": spaces.Box(0, 1, (self.vocabulary,), np.int8),
            }
        )
        self._row: Row = self.rows[0]
        self._prompt: list[int] = self._prompts[0]
        self.machine = Machine(rules, budget)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin an episode with a random prompt, or with `options={"row": index}`.

        Raises:
            UserError: other options, or no such row.
        """
        super().reset(seed=seed)
        index = (options or {}).get("row")
        if strange := sorted(set(options or {}) - {"row"}):
            raise UserError(f"options: got {strange[0]!r}; expected nothing but 'row'")
        if index is not None and not (isinstance(index, (int, np.integer)) and 0 <= index < len(self.rows)):
            raise UserError(f"options: got row={index!r}; expected a number from 0 to {len(self.rows) - 1}")
        index = int(self.np_random.integers(len(self.rows))) if index is None else index
        self._row, self._prompt = self.rows[index], self._prompts[index]
        self.machine = Machine(self.policy.rules, self.experiment.budget)
        return self._observe(), {"row": index, "prompt": self._row["prompt"]}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take an action.

        Raises:
            UserError: it is no token id of the action space.
            semantics.IllegalAction: the mask forbids it, or the episode has ended.
        """
        machine, given = self.machine, action
        try:
            action = operator.index(action)
        except TypeError:
            action = -1
        if not 0 <= action < self.vocabulary:
            raise UserError(f"action: got {given!r}; expected a token id from 0 to {self.vocabulary - 1}")
        if machine.end is None and action in machine.illegal():  # whatever a keyboard would make of it
            raise IllegalAction(f"action {action} at step {len(machine.trace)} is illegal here")
        machine.step(self._typed(action))
        observation = self._observe()
        if machine.end is None and not observation["action_mask"].any():
            machine.stop("stuck")
        info: dict[str, Any] = {"text": self.policy.text(machine.visible), "deletes": machine.deleted}
        if machine.end is None:
            return observation, 0.0, False, False, info
        rewards = self._rewards()
        info |= {"end": machine.end, "rewards": rewards, "actions": list(machine.trace)}
        if self.render_mode == "human":
            print(self.render())
        return observation, sum(rewards), machine.end in ("eos", "stuck"), machine.end in ("length", "budget"), info

    def render(self) -> str:  # type: ignore[override]
        """The prompt and the trace so far; deleted text stands between ~~."""
        before = f"{last_message(self._row['prompt'])} "
        return strike(self.machine.trace, self.policy.tokenizer, self.policy.rules, before, marks=True).plain

    def _observe(self) -> dict[str, np.ndarray]:
        ids = [*self._prompt, *self.machine.context]
        context = np.zeros(self.capacity, np.int64)
        context[: len(ids)] = ids
        mask = np.ones(self.vocabulary, np.int8)
        mask[self.machine.illegal()] = 0
        return {"context": context, "length": np.array([len(ids)]), "action_mask": mask}

    def _typed(self, action: int) -> int:
        """What the task's keyboard makes of an action."""
        keyboard = self._keyboard
        if keyboard is None or action in keyboard.fixed or self.np_random.random() >= keyboard.rate:
            return action
        others = sorted(set(keyboard.tokens) - set(self.machine.illegal()) - {action})
        return others[self.np_random.integers(len(others))] if others else action

    def _rewards(self) -> list[float]:
        """The weighted total at each action."""
        machine, experiment = self.machine, self.experiment
        assert machine.end is not None
        rollout = Rollout(self._prompt, machine.trace, machine.visible, [], machine.end, machine.deleted, 0)
        steps = max(1, experiment.args.max_steps)
        values = call(experiment.terms, [rollout], [self._row], self.policy, steps, steps)
        total = [0.0] * len(machine.trace)
        for weight, (value,) in zip(experiment.args.reward_weights, values, strict=True):
            for step, part in enumerate(per_action(value, len(machine.trace))):
                total[step] += weight * part
        return total
