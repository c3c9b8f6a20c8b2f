"""Write `speech_qa` manifests of LibriSQA: part I with free answers, part II with four options.

    python tools/prepare/librisqa.py /data/LibriSQA --librispeech /data/LibriSpeech

The questions are https://huggingface.co/datasets/ZihanZhao/LibriSQA (its README explains the keys), the speech is
LibriSpeech's train-clean-360 and test-clean (see librispeech.py):

    LibriSQA/LibriSQA-PartI/LibriSQA-PartI-{train,test}.json      speech_path, question, answer, text, duration
    LibriSQA/LibriSQA-PartII/LibriSQA-PartII-{train,test}.json    speech_path, question_and_option, answer, …

Written: librisqa1.{train,dev,test}.jsonl and librisqa2.{train,dev,test}.jsonl. Part I: the question as it is, the
answer as it is. Part II: the question and the lettered options as lines, the answer is the letter alone, and
`meta.choices` the letters; the analysis is left out. The set has no dev split: a fiftieth of the training speakers
is held out by md5, the same for both parts. Of speech_path only the utterance's name counts.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from librispeech import cure as speech_cure
from librispeech import utterance_path
from recipe import (
    PrepareError,
    check_apart,
    held_out,
    one_line,
    recipe_parser,
    report,
    require,
    run_main,
    write_all,
)

from listen_dist.command_line import user_path
from listen_dist.structures import Record

FILES = {"train": "train-clean-360", "test": "test-clean"}
"""Split of the set → subset of LibriSpeech."""
PARTS = {1: "PartI", 2: "PartII"}
KEYS = {1: ("speech_path", "question", "answer"), 2: ("speech_path", "question_and_option", "answer")}
DEV_ONE_IN = 50
"""One in so many training speakers is held out for dev."""

_UTTERANCE = re.compile(r"(\d+)-\d+-\d+")
_OPTION = re.compile(r"^\s*\(?([A-D])[.):]\s*(\S.*)$", re.MULTILINE)
_LETTER = re.compile(r"\s*(?:Option\s+)?\(?([A-D])\)?(?:[.:].*)?\s*", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read both parts and write their manifests."""
    parser = recipe_parser(__doc__, "the folder of the questions, with LibriSQA-PartI and LibriSQA-PartII")
    parser.add_argument("--librispeech", type=user_path, required=True, help="the folder LibriSpeech of the archives")
    options = parser.parse_args(arguments)
    for subset in FILES.values():
        require(options.librispeech / subset, speech_cure(options.librispeech, f"{subset}.tar.gz"))
    parts = {part: read_part(options, part) for part in PARTS}
    for splits in parts.values():
        check_apart(splits)
    write_all({(f"librisqa{part}", split): records for part, splits in parts.items()
               for split, records in splits.items()}, options, speech_cure(options.librispeech, "the subset's archive"))


def read_part(options: argparse.Namespace, part: int) -> dict[str, list[Record]]:
    """Return split → records of one part.

    Raises:
        PrepareError: a file is missing, is not JSON, or an entry lacks a key; the message names file and entry.
    """
    splits: dict[str, list[Record]] = {"train": [], "dev": [], "test": []}
    unusable = []
    for split, subset in FILES.items():
        path = options.folder / f"LibriSQA-{PARTS[part]}" / f"LibriSQA-{PARTS[part]}-{split}.json"
        require(path, f"get https://huggingface.co/datasets/ZihanZhao/LibriSQA into {options.folder}")
        asked: Counter[str] = Counter()
        for place, entry in _entries(path, KEYS[part]):
            found = _UTTERANCE.fullmatch(Path(entry["speech_path"]).stem)
            if not found:
                raise PrepareError(f"{place}: speech_path {entry['speech_path'][:80]!r} names no LibriSpeech utterance")
            utterance, speaker = found[0], found[1]
            question = free_question(entry) if part == 1 else lettered_question(entry)
            if question is None:
                unusable.append(place)
                continue
            asked[utterance] += 1
            chosen = "dev" if split == "train" and held_out(speaker, "librisqa", DEV_ONE_IN) else split
            splits[chosen].append(
                Record(
                    id=f"librisqa{part}-{utterance}-{asked[utterance]}",
                    audio=(str(utterance_path(options.librispeech.resolve(), subset, utterance)),),
                    task="speech_qa",
                    question=question[0],
                    target=question[1],
                    language="en",
                    speaker=f"librispeech-{speaker}",
                    split=chosen,
                    meta={"part": part, **question[2]},
                )
            )
    report(f"entries of part {part} left out (no question, or an answer that is none of its options)", unusable)
    return splits


Question = tuple[str, str, dict[str, object]]
"""(question, answer, what goes into `meta`)"""


def free_question(entry: dict[str, str]) -> Question | None:
    """Return a question of part I, or None if it or its answer is empty."""
    question, answer = entry["question"].strip(), entry["answer"].strip()
    return (question, answer, {}) if question and answer else None


def lettered_question(entry: dict[str, str]) -> Question | None:
    """Return a question of part II with its options as lines, or None if the answer is none of the options.

    >>> lettered_question({"question_and_option": "Question: Who?\\nOptions:\\nA. He.\\nB. She.", "answer": "B"})
    ('Who?\\nA. He.\\nB. She.', 'B', {'choices': ['A', 'B'], 'options': ['He.', 'She.']})
    """
    text = re.sub(r"^\s*Question:\s*", "", entry["question_and_option"])
    options = {letter: option.strip() for letter, option in _OPTION.findall(text)}
    answer = _LETTER.fullmatch(entry["answer"])
    first = _OPTION.search(text)
    question = re.sub(r"\s*Options?:\s*$", "", text[: first.start()]).strip() if first else ""
    if not question or len(options) < 2 or answer is None or answer[1] not in options:
        return None
    lines = [question, *(f"{letter}. {option}" for letter, option in options.items())]
    return "\n".join(lines), answer[1], {"choices": list(options), "options": list(options.values())}


def _entries(path: Path, keys: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return (where it stands, entry) of a JSON list of objects."""
    try:
        entries = json.loads(path.read_bytes())
    except ValueError as error:
        raise PrepareError(f"{path}: not JSON ({error}); download it again") from None
    if not isinstance(entries, list):
        raise PrepareError(f"{path}: expected a JSON list, found {type(entries).__name__}; download it again")
    found = []
    for number, entry in enumerate(entries, 1):
        wrong = [key for key in keys if not isinstance(entry, dict) or not isinstance(entry.get(key), str)]
        if wrong:
            raise PrepareError(f"{path}: entry {number} has no text under {wrong[0]!r}; download it again")
        found.append((f"{path}: entry {number}", entry | {key: one_line(entry[key]) for key in keys}))
    return found


if __name__ == "__main__":
    run_main(main)
