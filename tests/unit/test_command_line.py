"""Command lines: a config key with dashes is answered with the word to write; `~` is expanded in every option."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from listen_dist import evaluate, planner, train
from listen_dist.command_line import ConfigParser, user_path

CONFIG = ["--config", "c.yaml"]


@pytest.mark.parametrize("program", [train.main, evaluate.main, lambda argv: planner.main(["--gpus", "8", *argv])])
@pytest.mark.parametrize(("words", "write"), [
    (["--train.max_steps", "5"], "write train.max_steps=5"),
    (["--train.max_steps=5"], "write train.max_steps=5"),
    (["-train.max_steps=5"], "write train.max_steps=5"),
    (["--train.max-steps", "5"], "write train.max_steps=5"),
    (["--data.train[0].path=a=b"], "write data.train[0].path=a=b"),
    (["--model.checkpointing"], "write model.checkpointing=VALUE"),
    (["--model.checkpointing", "train.max_steps=5"], "write model.checkpointing=VALUE"),
    (["--run_dir", "runs/a"], "write run_dir=runs/a"),
    (["--max_steps=5"], "write train.max_steps=5"),
    (["--seed", "1"], "write model.seed=1 or train.seed=1"),
])
def test_a_key_with_dashes_is_answered_with_the_word_to_write(
        program: Callable[[list[str]], int], words: list[str], write: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        program([*CONFIG, *words])
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: {words[0]}: a config key has no dashes: {write}\n")


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["--no-such-option"]])
def test_other_options_are_argparses(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main([*CONFIG, *words])
    assert "config key has no" not in capsys.readouterr().err


def test_overrides_may_stand_anywhere(tmp_path: Path) -> None:
    for parser in (train.build_parser(), evaluate.build_parser()):
        read = parser.parse_intermixed_args(["a=-1.5", "--conf", "~/c.yaml", "b=--x.y", "--local_rank=0", "c="])
        assert read.overrides == ["a=-1.5", "b=--x.y", "c="] and read.config == str(Path.home() / "c.yaml")


def test_home_is_expanded_behind_an_equals_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert evaluate.build_parser().parse_args([*CONFIG, "--out=~/r", "--checkpoint=~/c"]).out == "/home/me/r"
    parser: argparse.ArgumentParser = ConfigParser()
    parser.add_argument("--out", type=user_path)
    assert parser.parse_args(["--out=~/r"]).out == Path("/home/me/r")
    assert parser.parse_args(["--out=~nobody-here/r"]).out == Path("~nobody-here/r")
