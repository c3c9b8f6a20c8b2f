"""Write `emotion` manifests of IEMOCAP, four classes, leave one session out.

    python tools/prepare/iemocap.py /data/IEMOCAP_full_release                  # session 5 is held out
    for s in 1 2 3 4 5; do python tools/prepare/iemocap.py /data/IEMOCAP_full_release --held-out $s; done

The layout is that of the release (https://sail.usc.edu/iemocap, its README.txt and Documentation):

    Session<n>/dialog/EmoEvaluation/<dialog>.txt       [6.2901 - 8.2357]<tab>Ses01F_impro01_F000<tab>neu<tab>[…]
    Session<n>/sentences/wav/<dialog>/<turn>.wav

Written: iemocap_fold<n>.{train,dev,test}.jsonl. Test is the held-out session n, dev the session after it (1 after 5),
train the other three: every session has its own two speakers, so no split shares a session or a speaker, and each
session is once test and once dev. To train on four sessions, as most papers do, give train and dev to the trainer.
The answers are angry, happy, sad and neutral; excited counts as happy, turns with other labels are left out (5,531 of
10,039 turns stay).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from recipe import PrepareError, check_apart, recipe_parser, require, run_main, text_lines, write_splits

from listen_dist.structures import Record

SESSIONS = (1, 2, 3, 4, 5)
ANSWERS = {"ang": "angry", "hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral"}
CHOICES = ["angry", "happy", "sad", "neutral"]

# "[6.2901 - 8.2357]\tSes01F_impro01_F000\tneu\t[2.5000, 2.5000, 2.5000]"; the last F or M is who speaks
_TURN = re.compile(r"\[[\d.]+ - [\d.]+\]\t((Ses0[1-5][FM]_\w+)_([FM])\w+)\t([a-z]{3})\t\[[-\d., ]+\]\s*")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read all sessions and write the manifests of one fold."""
    parser = recipe_parser(__doc__, "the folder IEMOCAP_full_release, with Session1 to Session5")
    parser.add_argument("--held-out", type=int, choices=SESSIONS, default=5, help="the test session (default 5)")
    options = parser.parse_args(arguments)
    cure = f"unpack IEMOCAP_full_release so that {options.folder}/Session1 to Session5 hold dialog/ and sentences/"
    folder = options.folder.resolve()
    splits: dict[str, list[Record]] = {"train": [], "dev": [], "test": []}
    for session in SESSIONS:
        splits[split_of(session, options.held_out)] += read_session(folder, session, options.held_out, cure)
    check_apart(splits)
    write_splits(f"iemocap_fold{options.held_out}", splits, options, cure)


def split_of(session: int, test_session: int) -> str:
    """Return the split of a session when `test_session` is held out."""
    if session == test_session:
        return "test"
    return "dev" if session == test_session % len(SESSIONS) + 1 else "train"


def read_session(folder: Path, session: int, test_session: int, cure: str) -> list[Record]:
    """Return the records of a session's turns with one of the four emotions, in the order of dialog and turn.

    Raises:
        PrepareError: the first missing file, or `file:line` of a turn that can't be right.
    """
    evaluations = require(folder / f"Session{session}" / "dialog" / "EmoEvaluation", cure)
    dialogs = sorted(evaluations.glob("Ses*.txt"))
    if not dialogs:
        raise PrepareError(f"{evaluations}/Ses*.txt is missing: {cure}")
    sentences = require(folder / f"Session{session}" / "sentences" / "wav", cure)
    return [
        Record(
            id=f"iemocap-{turn}",
            audio=(str(sentences / dialog.stem / f"{turn}.wav"),),
            task="emotion",
            target=ANSWERS[label],
            language="en",
            speaker=f"Ses0{session}_{gender}",
            split=split_of(session, test_session),
            meta={"choices": CHOICES, "label": label, "session": session},
        )
        for dialog in dialogs
        for turn, gender, label in read_turns(dialog)
        if label in ANSWERS
    ]


def read_turns(path: Path) -> Iterator[tuple[str, str, str]]:
    """Yield (turn, F or M, label) of a dialog's evaluation, whose other lines are the annotators'.

    Raises:
        PrepareError: a line that begins with a time is no turn of this dialog.
    """
    for number, line in text_lines(path, errors="replace"):  # annotators' comments may be in any encoding
        if line.startswith("["):
            found = _TURN.fullmatch(line)
            if not found or found[2] != path.stem:
                expected = f"[start - end] {path.stem}_… label [v, a, d], between tabs"
                raise PrepareError(f"{path}:{number}: expected {expected}; found {line.strip()[:80]!r}")
            yield found[1], found[3], found[4]


if __name__ == "__main__":
    run_main(main)
