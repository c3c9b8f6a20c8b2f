"""Write `asr` manifests of LibriSpeech, one for each of its subsets.

    python tools/prepare/librispeech.py /data/LibriSpeech
    python tools/prepare/librispeech.py /data/LibriSpeech --subsets train-clean-100 dev-clean test-clean

Get the archives from https://www.openslr.org/12 and unpack them all in one place; each re-creates the folder
LibriSpeech, which is described in its README.TXT:

    LibriSpeech/<subset>/<speaker>/<chapter>/<speaker>-<chapter>.trans.txt      "<utterance> TEXT" a line
    LibriSpeech/<subset>/<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac

Written: librispeech.<subset>.jsonl. The target is the transcript in lower case (the set has capitals, which cost
a language model twice the tokens; WER is counted without case). No speaker is in two subsets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from recipe import PrepareError, check_apart, recipe_parser, require, run_main, text_lines, write_splits
from tqdm import tqdm

from listen_dist.structures import Record

SUBSETS = (
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
)
DEFAULT = tuple(name for name in SUBSETS if name != "train-other-500")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the transcripts of the subsets and write their manifests."""
    parser = recipe_parser(__doc__, "the folder LibriSpeech of the archives")
    parser.add_argument("--subsets", nargs="+", choices=SUBSETS, default=DEFAULT, metavar="NAME",
                        help=f"which of {', '.join(SUBSETS)} (default: all but train-other-500)")
    options = parser.parse_args(arguments)
    splits = {subset: read_subset(options.folder.resolve(), subset) for subset in options.subsets}
    check_apart(splits)
    write_splits("librispeech", splits, options, cure(options.folder, "the subset's archive"))


def cure(folder: Path, archive: str) -> str:
    """Return what to do when a file is missing."""
    return (
        f"unpack {archive} of https://www.openslr.org/12 so that {folder} holds"
        " <subset>/<speaker>/<chapter>/*.flac and *.trans.txt"
    )


def read_subset(folder: Path, subset: str) -> list[Record]:
    """Return the records of a subset, in the order of speaker, chapter and utterance.

    Raises:
        PrepareError: the first missing file, or `file:line` of a transcript that can't be right.
    """
    require(folder / subset, cure(folder, f"{subset}.tar.gz"))
    chapters = sorted(path for path in (folder / subset).glob("*/*") if path.is_dir())
    records = []
    for chapter in tqdm(chapters, desc=subset, unit="chapter", disable=None, leave=False):
        transcripts = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
        require(transcripts, cure(folder, f"{subset}.tar.gz"))
        lines = dict(read_transcripts(transcripts))
        untold = sorted(path.stem for path in chapter.glob("*.flac") if path.stem not in lines)
        if untold:
            raise PrepareError(f"{transcripts}: no line for {untold[0]}; is the file cut short?")
        records += [_record(folder, subset, utterance, text) for utterance, text in lines.items()]
    return records


def read_transcripts(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (utterance, text) of a chapter's transcripts.

    Raises:
        PrepareError: a line is not an utterance of this chapter and its text.
    """
    chapter = path.name.removesuffix(".trans.txt")
    for number, line in text_lines(path):
        utterance, _, text = line.strip().partition(" ")
        if not utterance.startswith(f"{chapter}-") or not text.strip():
            raise PrepareError(f"{path}:{number}: expected '{chapter}-<number> TEXT', found {line.strip()[:80]!r}")
        yield utterance, text.strip()


def utterance_path(folder: Path, subset: str, utterance: str) -> Path:
    """Return where the audio of an utterance (`1272-128104-0000`) lies."""
    speaker, chapter, _ = utterance.split("-")
    return folder / subset / speaker / chapter / f"{utterance}.flac"


def _record(folder: Path, subset: str, utterance: str, text: str) -> Record:
    return Record(
        id=f"librispeech-{utterance}",
        audio=(str(utterance_path(folder, subset, utterance)),),
        task="asr",
        target=text.lower(),
        language="en",
        speaker=f"librispeech-{utterance.split('-')[0]}",
        split=subset.split("-")[0],
        meta={"subset": subset},
    )


if __name__ == "__main__":
    run_main(main)
