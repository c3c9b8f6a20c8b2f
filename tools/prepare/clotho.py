"""Write `caption` manifests of Clotho v2.1.

    python tools/prepare/clotho.py /data/clotho

Get the archives and caption files from https://zenodo.org/records/4783391 (which describes them) and unpack the
audio beside the captions:

    clotho_captions_{development,validation,evaluation}.csv       file_name,caption_1,…,caption_5
    {development,validation,evaluation}/<file_name>               15 to 30 s of sound, 44.1 kHz

Written: clotho.{train,dev,test}.jsonl from development, validation and evaluation. A dev or test clip is one record
with its five captions as references. A train clip is five records with one caption each, since training takes a
record's first answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recipe import PrepareError, read_table, recipe_parser, record_name, require, run_main, write_splits

from listen_dist.structures import Record

SPLITS = {"train": "development", "dev": "validation", "test": "evaluation"}
CAPTIONS = tuple(f"caption_{number}" for number in range(1, 6))
CURE = (
    "get clotho_captions_<split>.csv and clotho_audio_<split>.7z of https://zenodo.org/records/4783391 and unpack"
    " the audio beside the csv files, as development/, validation/ and evaluation/"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the captions of the three splits and write the manifests."""
    parser = recipe_parser(__doc__, "the folder with the three csv files and the three folders of audio")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    write_splits("clotho", {split: read_split(folder, split) for split in SPLITS}, options, CURE)


def read_split(folder: Path, split: str) -> list[Record]:
    """Return the records of a split (`train`, `dev` or `test`), in the order of its table.

    Raises:
        PrepareError: a missing file, or `file:line` of a row that can't be right.
    """
    table = require(folder / f"clotho_captions_{SPLITS[split]}.csv", CURE)
    audio = require(folder / SPLITS[split], CURE)
    records = []
    for place, row in read_table(table, ("file_name", *CAPTIONS)):
        captions = [row[column].strip() for column in CAPTIONS]
        if not all(captions):
            raise PrepareError(f"{place}: {CAPTIONS[captions.index('')]} is empty; every clip has five captions")
        records += clip_records(audio / row["file_name"].strip(), captions, split)
    return records


def clip_records(path: Path, captions: list[str], split: str) -> list[Record]:
    """Return a training clip's record for each caption, or a held-out clip's one record with all of them."""
    name = record_name("clotho", path.stem)
    answers = [(caption,) for caption in captions] if split == "train" else [tuple(captions)]
    return [
        Record(
            id=f"{name}-{number}" if split == "train" else name,
            audio=(str(path),),
            task="caption",
            target=references[0],
            references=references if len(references) > 1 else (),
            language="en",
            split=split,
        )
        for number, references in enumerate(answers, 1)
    ]


if __name__ == "__main__":
    run_main(main)
