"""The tasks: what the model is asked, how long its answer may be, and which metric scores it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from listen_dist.errors import ListenError

if TYPE_CHECKING:  # brings torch along, which would keep `--help` waiting
    from listen_dist.structures import Record


@dataclass(frozen=True)
class Task:
    """One task, as data, decoding and scoring need to know it."""

    name: str
    instruction: str
    """Default text after the audio; short, since the LLM reads it with every clip.
    Empty where each record brings its own (`speech_qa`: the question)."""
    metric: str
    """Name of the main metric: wer, bleu, accuracy or cider_d."""
    better: Literal["lower", "higher"]
    max_new_tokens: int
    """Limit when decoding, in tokens of the LLM."""
    tokens_per_second: float
    """For text as long as the speech: a limit that grows with the clip (on top of 10 tokens), so that
    a model that loops stops where no speaker could have said more. 0: no such limit."""
    answers: Literal["text", "choice"]
    """`choice`: a short answer out of a closed set, scored as right or wrong. `text`: anything."""
    choices: tuple[str, ...] = ()
    """The closed set where the task itself fixes it; empty where the data does (`meta.choices`)."""
    one_line: bool = False
    """An answer ends at its line's end: targets are learned as one line, and decoding stops there."""


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("asr", "Transcribe.", "wer", "lower", 160, 10, "text", one_line=True),
        Task("translation", "Translate.", "bleu", "higher", 160, 10, "text", one_line=True),
        Task("emotion", "Which emotion?", "accuracy", "higher", 6, 0, "choice"),
        Task("speaker_verification", "Same speaker?", "accuracy", "higher", 4, 0, "choice", ("yes", "no")),
        Task("speech_qa", "", "accuracy", "higher", 24, 0, "choice"),
        Task("caption", "Describe the sound.", "cider_d", "higher", 40, 0, "text", one_line=True),
        Task("language_id", "Which language?", "accuracy", "higher", 6, 0, "choice"),
    )
}


def token_limit(name: str, seconds: float) -> int:
    """Most tokens that a clip of this task and length may be answered with."""
    task = get_task(name)
    by_length = 10 + int(task.tokens_per_second * seconds) if task.tokens_per_second else task.max_new_tokens
    return min(task.max_new_tokens, by_length)


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        ListenError: nobody defined it; the message names the nearest known one.
    """
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
    raise ListenError(f"unknown task {name[:80]!r}: {hint}")


NOTHING_SAID = ("",)
"""The answers of a clip without speech."""


def check_answers(task: str, answers: Sequence[str]) -> None:
    """The one rule for right answers that the task's metric can take: at least one, and none of them blank.

    For `asr` no text may be the only right answer; a manifest must mark it (`manifest.is_no_speech`).

    Raises:
        ListenError: saying what is wrong with the answers.
    """
    get_task(task)
    if task == "asr" and tuple(answers) == NOTHING_SAID:
        return
    if not answers or not all(answer.strip() for answer in answers):
        raise ListenError("key 'target' is empty and there are no 'references'; give the right answer")


def target_for(record: Record) -> str:
    """The text to learn: the first right answer, in one line where the task's answers are."""
    target = record.answers[0]
    return " ".join(target.split()) if get_task(record.task).one_line and len(target.splitlines()) > 1 else target


def choices_for(record: Record) -> tuple[str, ...]:
    """The closed set that the answer comes from: the record's `meta.choices`, or the task's own; else empty.

    Raises:
        ListenError: `meta.choices` is no list of two or more different texts, or the right answer is not in it.
    """
    task = get_task(record.task)
    if task.answers != "choice":
        return ()
    choices = record.meta.get("choices", list(task.choices))
    if choices == []:
        return ()
    if not isinstance(choices, list) or len(set(map(str, choices))) < max(2, len(choices)) or not all(
            isinstance(choice, str) and choice.strip() for choice in choices):
        raise ListenError(f"record {record.id!r}: meta.choices = {choices!r:.80} is no list of two or more "
                         "different texts; mend the manifest and write the shard anew")
    if record.answers[0] not in choices:
        raise ListenError(f"record {record.id!r}: the answer {record.answers[0]!r:.80} is not among the choices "
                         f"{choices!r:.200}; mend the manifest and write the shard anew")
    return tuple(choices)


def instruction_for(record: Record) -> str:
    """Return the text that follows the audio: the record's instruction, its question, or the default.

    Raises:
        ListenError: the task is unknown, or has no default and the record brings none.
    """
    text = record.instruction or record.question or get_task(record.task).instruction
    if not text:
        raise ListenError(f"record {record.id!r}: task {record.task!r} needs `question` or `instruction`")
    return text
