from rl_backspace.cli import entry

entry()
