"""Bundled rewards. Each is a plain function in TRL's signature; YAML names it `module:function`.

    def reward(prompts, completions, completion_ids, **columns) -> list[float | None]

`completions` and `completion_ids` are what is visible in the end, never what was deleted. By name a function
may also ask for the dataset's columns (`answer`, ...), for what happened on the way (`actions`, `deletes`,
`ends`), and for `rules`, `task`, `rows` and `trainer_state`.
"""
