"""What the programs' command lines have in common; imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OPTION = re.compile(r"--?([A-Za-z_][\w.\[\]-]*)(?:=(.*))?", re.DOTALL)


def user_path(text: str) -> Path:
    """A path given to an option: shells leave the `~` of `--out=~/runs` as it is."""
    return Path(os.path.expanduser(text))


class ConfigParser(argparse.ArgumentParser):
    """The command line of a program that takes `key=value` overrides of its config."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(  # type: ignore[override]
            self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        for place, word in enumerate(words):
            if (found := _OPTION.fullmatch(word)) and not self._is_own(word):
                self._refuse_key(word, found[1].replace("-", "_"), found[2] or _value(words[place + 1:]))
        return super().parse_known_args(words, namespace)

    def _is_own(self, word: str) -> bool:
        """An option of the parser, or the beginning of one."""
        name = word.partition("=")[0]
        return any(option.startswith(name) for action in self._actions for option in action.option_strings)

    def _refuse_key(self, word: str, name: str, value: str) -> None:
        """End the program where an option is the name of a config key, or its last part."""
        from listen_dist.config import known_keys  # OmegaConf takes a while

        keys = [name] if "." in name else [key for key in known_keys() if key.rpartition(".")[2] == name]
        if keys:
            self.error(f"{word}: a config key has no dashes: write {' or '.join(f'{key}={value}' for key in keys)}")


def _value(rest: Sequence[str]) -> str:
    """The word behind an option, if it may be its value."""
    return rest[0] if rest and "=" not in rest[0] and not rest[0].startswith("--") else "VALUE"
