"""Bundled rewards. Each is a plain function in TRL's signature; YAML names it `module:function`.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None | list[float]]

`completions` and `completion_ids` are what is visible in the end, never what was deleted. By name a function
may also ask for the dataset's columns (`answer`, ...), for what happened on the way (`actions`, `deletes`,
`ends`: why each rollout ended, one of `eos`, `length`, `budget` and `stuck`), and for `rules`, `task`, `rows`,
`trainer_state` and `decode`, which turns visible token ids into text.

For each row it returns a number, None where it has nothing to say, or a list with one number for each action of the
trace, so that a delete pays where it happens. GRPO takes the sum of a list; PPO takes each where it stands.

    correctness    checked, exact, numeric          is the final answer right?
    delete_cost    flat, per_token, progressive     what deleting costs             per action
    loop_penalty   repeats, oscillations, states    going round in circles          per action
    ending         unfinished, empty                how the rollout ended
    length         over, actions                    visible tokens; compute         `actions` per action
    shaping        progress                         potential-based, for PPO        per action
    improvement    bonus                            farmable: for the audit only    per action
"""
