"""YAML read by the schema: text stays text, and paths are expanded.

YAML takes `no`, `001` and `2026_11_28` for other things than text. Where a key holds text, what stands there is
taken as it stands.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import typing
from typing import Any

import yaml
from omegaconf import OmegaConf

from listen_dist.schema import PATH, Config, ConfigError

MOST_VALUES = 100_000
"""In a text, aliases written out. A few lines of aliases of aliases can stand for billions."""
_NULL = "tag:yaml.org,2002:null"


def read(text: str, where: str, hint: Any = Config) -> Any:
    """The value that YAML text stands for.

    Args:
        where: what errors name: a file, or a key of the command line.
        hint: the type that the schema gives it.

    Raises:
        ConfigError: it isn't YAML, or a path holds a variable that isn't set.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is None:
            return None
        if _size(node, {}) > MOST_VALUES:
            raise ConfigError(f"{where}: its aliases (`*name`) stand for more than {MOST_VALUES:,} values; write out "
                              "what you need")
        _apply(node, hint, where)
        boxed = yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode("tag:yaml.org,2002:str", "value"), node)])
        # OmegaConf's reader knows more forms of numbers, and refuses a key that comes twice.
        plain = OmegaConf.create(yaml.serialize(boxed, Dumper=yaml.SafeDumper, allow_unicode=True, width=sys.maxsize))
        return OmegaConf.to_container(plain)["value"]  # type: ignore[index, call-overload]
    except ConfigError:
        raise
    except Exception as error:  # PyYAML and OmegaConf raise many types for malformed text
        raise ConfigError(f"{where}{_place(error, text)}: not readable as YAML: {_problem(error)}") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Scalars, lists and mappings below a node, one that comes again by an alias counted again."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # met again below itself: endless
        below = [child for pair in node.value for child in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 if isinstance(node, yaml.ScalarNode) else 1 + sum(_size(child, known) for child in below)
    return known[id(node)]


def _place(error: Exception, text: str) -> str:
    """` line 3 (max_steps: [)` of text with several lines."""
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines()
    if mark is None or len(lines) < 2:
        return ""
    number = min(mark.line, len(lines) - 1)
    return f" line {number + 1} ({lines[number].strip():.60})"


def _problem(error: Exception) -> str:
    said = getattr(error, "problem", None) or str(error).splitlines()[0]
    cure = "; text that holds `: ` or ` #` needs quotes" if "mapping values" in said else ""
    return f"{said}{cure}"


def _apply(node: yaml.Node, hint: Any, where: str, key: str = "") -> None:
    """Turn the scalars below a node into what the schema takes them for."""
    if isinstance(node, yaml.ScalarNode):
        if _holds_text(hint) and node.tag != _NULL:
            node.tag, node.style = "tag:yaml.org,2002:str", node.style or "'"
            if PATH in _metadata(hint):
                node.value = expand(node.value, key or where)
    elif _holds_text(hint):
        raise ConfigError(f"{where}{f': {key}' if key else ''}: expected text, found `key: value` or a list; text "
                          "that holds `: `, or begins with a bracket, needs quotes")
    elif isinstance(node, yaml.SequenceNode):
        for number, child in enumerate(node.value):
            _apply(child, next(iter(typing.get_args(hint)), None), where, f"{key}[{number}]")
    else:
        hints = typing.get_type_hints(hint, include_extras=True) if dataclasses.is_dataclass(hint) else {}
        for name, child in node.value:
            inner = hint if name.value == "<<" else hints.get(name.value)
            _apply(child, inner, where, f"{key}.{name.value}" if key else name.value)


def _holds_text(hint: Any) -> bool:
    """str, a path, a choice of words, or one of them or null."""
    if typing.get_origin(hint) is typing.Annotated:
        return _holds_text(typing.get_args(hint)[0])
    return hint is str or any(one is str or isinstance(one, str) or typing.get_origin(one) is typing.Annotated
                              for one in typing.get_args(hint) if typing.get_origin(hint) not in (list, dict))


def _metadata(hint: Any) -> tuple[Any, ...]:
    """What `Annotated` adds to a type, or to the type beside null."""
    return tuple(word for one in (hint, *typing.get_args(hint)) for word in getattr(one, "__metadata__", ()))


def expand(path: str, key: str) -> str:
    """A path with `~` and environment variables put in and no slash at its end.

    Raises:
        ConfigError: naming `key`, where a variable or a user isn't known.
    """
    def variable(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        if name in os.environ:
            return os.environ[name]
        if found[1] and name in {field.name for field in dataclasses.fields(Config)}:
            return found[0]  # ${run_dir}: another key, which OmegaConf puts in
        raise ConfigError(f"{key} = {path!r}: the environment variable {name} is not set; set it, or write the path "
                          "out")

    full = os.path.expanduser(re.sub(r"\$(?:\{(\w+)\}|([A-Za-z_]\w*))", variable, path))
    if re.match(r"~[^/]*(/|$)", full) and not os.path.exists(full):
        raise ConfigError(f"{key} = {path!r}: no such home folder; write the path out (./{full} for a folder of this "
                          "name)")
    return re.sub(r"(?<=[^/:])/+$", "", full)
