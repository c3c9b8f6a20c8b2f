"""Configurations: odd keys, values, types and YAML, in files and on the command line."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import yaml

from listen_dist import config as configuration
from listen_dist.errors import ListenError
from listen_dist.schema import Config
from tests import tiny
from tests.fuzz import mutate
from tests.fuzz.cases import Fault, one_line

ROOT = Path(__file__).parents[2]
SYNTAX = (
    "\t",
    "&a",
    "*a",
    "<<: *a",
    "!!python/object/apply:os.system ['touch owned']",
    "!!binary abc",
    "- ",
    "? ",
    ": ",
    "|",
    ">",
    "%YAML 9",
    "---",
    "...",
    "{",
    "[",
    "'",
    '"',
    "${train.max_steps}",
    "${oc.env:HOME}",
    "${nothing}",
    "${",
    "???",
    "\0",
    "\ufeff",
    "#",
    "@",
    "`",
    "!!set",
    "!!timestamp 2020",
    "0o7",
    "1_000",
    ".nan",
    "-.inf",
    "1e",
    "12:30:45",
    "~",
    "é: 1",
)
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(8)
)


def prepare(_: Path) -> tuple[list[str], list[str]]:
    """All keys, and the shipped files."""
    return configuration.known_keys(), sorted(map(str, (ROOT / "configs").rglob("*.yaml")))


def case(world: tuple[list[str], list[str]], chance: random.Random, folder: Path) -> str:
    keys, files = world
    path = folder / "c.yaml"
    path.write_bytes(_file(chance, keys, files))
    words = [_word(chance, keys) for _ in range(chance.choice((0, 0, 0, 1, 1, 2)))]
    (folder / "words.txt").write_bytes("\n".join(map(repr, words)).encode())
    try:
        config = configuration.load(path, words)
    except ListenError as error:
        one_line(error)
        return "refused"
    finally:
        if Path("owned").exists():
            raise Fault("a configuration ran a program")
    _check(config, folder)
    return "used"


def _check(config: Config, folder: Path) -> None:
    """What passed is of the types it says, without NaN, and reads back from the file that a run writes."""
    for key, value in _values(dataclasses.asdict(config), ""):
        if isinstance(value, float) and math.isnan(value):
            raise Fault(f"{key.split('[')[0]} is NaN and passes")
    (folder / "again.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    try:
        again = configuration.load(folder / "again.yaml")
    except ListenError as error:
        raise Fault(f"what passed is refused when read back: {str(error)[:100]}") from error
    if again != config:
        raise Fault(f"read back, {configuration.differences(config, again)[:3]} differ")


def _values(node: Any, key: str) -> Any:
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if pairs is None:
        yield key, node
    else:
        for name, child in pairs:
            yield from _values(child, f"{key}.{name}" if isinstance(node, dict) else f"{key}[{name}]")


def _file(chance: random.Random, keys: list[str], files: list[str]) -> bytes:
    pick = chance.random()
    if pick < 0.01:
        return BOMB.encode()
    tree: Any = tiny.config_tree(tiny.Tiny(Path("/tiny")))
    if pick < 0.2:
        tree = {"base": chance.choice((*files, "c.yaml", "", "nowhere.yaml", 3, "."))}
    for _ in range(chance.choice((0, 1, 1, 2))):
        _set(tree, chance.choice(keys), _value(chance))
    if chance.random() < 0.2:
        tree = mutate.tree(chance, tree)
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=chance.random() < 0.5)
    if chance.random() < 0.2:
        rows = text.split("\n")
        for _ in range(chance.choice((1, 1, 3))):
            at = chance.randrange(len(rows))
            place = chance.randrange(len(rows[at]) + 1)
            rows[at] = rows[at][:place] + chance.choice(SYNTAX) + rows[at][place:]
        text = "\n".join(rows)
    content = text.encode("utf-8", "surrogatepass")
    return mutate.data(chance, content) if chance.random() < 0.15 else content


def _set(tree: Any, key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(tree, dict):
            return
        name = name.removesuffix("[0]")
        inner = tree.setdefault(name, {})
        tree = inner[0] if isinstance(inner, list) and inner else inner
    if isinstance(tree, dict):
        tree[last.removesuffix("[0]")] = value


def _value(chance: random.Random) -> Any:
    if chance.random() < 0.3:
        return chance.choice(
            (
                1,
                2,
                0.5,
                1e-4,
                True,
                "none",
                "replicated",
                "fixed",
                [],
                {},
                ["asr"],
                {"asr": 2.0},
                "float32",
                "~/x",
                "$HOME/x",
                [{"path": "/x"}],
                "/x/{a,b}",
                "https://h/x",
                "s3://b/c",
                "{1..9999999}",
                "a@b=c",
            )
        )
    return mutate.value(chance)


def _word(chance: random.Random, keys: list[str]) -> str:
    key = chance.choice(keys)
    if chance.random() < 0.2:
        at = chance.randrange(len(key))
        key = key[:at] + chance.choice(("", ".", "[0]", "[", "é", " ", "..", "[99]", "[-1]", "=")) + key[at + 1 :]
    key = key.replace("[0]", chance.choice(("[0]", ".0", "[0]", "[7]", "")))
    value = chance.choice(SYNTAX) if chance.random() < 0.25 else _value(chance)
    spelled = (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    )
    return f"{key}={spelled}" if chance.random() < 0.95 else chance.choice((key, "", "=", "--x", spelled))
