"""The tasks and the text a record asks with."""

from __future__ import annotations

import pytest

from listen_dist.errors import ListenError
from listen_dist.structures import Record
from listen_dist.tasks import TASKS, Task, choices_for, get_task, instruction_for


def record(task: str, **fields: str) -> Record:
    return Record(id="a", audio=("a.wav",), task=task, target="x", **fields)  # type: ignore[arg-type]


def test_all_tasks_of_the_method_are_there() -> None:
    expected = [
        "asr",
        "translation",
        "emotion",
        "speaker_verification",
        "speech_qa",
        "caption",
        "language_id",
    ]
    assert sorted(TASKS) == sorted(expected)
    assert all(name == task.name for name, task in TASKS.items())


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_task_is_complete(task: Task) -> None:
    assert task.metric in ("wer", "bleu", "accuracy", "cider_d")
    assert task.better == ("lower" if task.metric == "wer" else "higher")
    assert task.max_new_tokens > 0
    assert (task.answers == "choice") == (task.metric == "accuracy")
    assert len(task.instruction.split()) <= 4, "the LLM reads it with every clip"


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(ListenError, match="unknown task 'captions': did you mean 'caption'"):
        get_task("captions")
    with pytest.raises(ListenError, match="known: asr, "):
        get_task("zzzzzz")


def test_instruction_is_the_records_own_first() -> None:
    assert instruction_for(record("asr")) == "Transcribe."
    assert instruction_for(record("asr", instruction="Write it down.")) == "Write it down."
    assert instruction_for(record("speech_qa", question="Is a number said?")) == "Is a number said?"
    with pytest.raises(ListenError, match="record 'a': task 'speech_qa' needs `question`"):
        instruction_for(record("speech_qa"))


def test_choices_come_from_the_record_or_the_task() -> None:
    assert choices_for(Record("a", (), "speaker_verification", "no")) == ("yes", "no")
    assert choices_for(Record("a", (), "emotion", "sad", meta={"choices": ["sad", "glad"]})) == ("sad", "glad")
    assert choices_for(Record("a", (), "emotion", "sad")) == ()
    assert choices_for(Record("a", (), "asr", "sad", meta={"choices": ["sad", "glad"]})) == ()


@pytest.mark.parametrize("choices, part", [
    (["glad", "angry"], "the answer 'sad' is not among the choices"),
    (["sad"], "no list of two or more"), (["sad", "sad"], "no list of two or more"), ("sad", "no list of two or more"),
    (["sad", ""], "no list of two or more"), (["sad", 3], "no list of two or more"),
    ({"sad": 1}, "no list of two or more"),
])
def test_unusable_choices_are_refused(choices: object, part: str) -> None:
    with pytest.raises(ListenError, match=f"record 'a': .*{part}"):
        choices_for(Record("a", (), "emotion", "sad", meta={"choices": choices}))
