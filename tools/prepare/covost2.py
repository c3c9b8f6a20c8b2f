"""Write `translation` manifests of CoVoST 2, English speech to Chinese text.

    python tools/prepare/covost2.py /data/covost/en

The layout is that of https://github.com/facebookresearch/covost (README, "CoVoST 2"): unpack the English Common
Voice Corpus 4 (https://commonvoice.mozilla.org/datasets), put covost_v2.en_zh-CN.tsv beside its validated.tsv, and
run CoVoST's get_covost_splits.py --version 2 --src-lang en --tgt-lang zh-CN, which writes the three split files:

    en/clips/common_voice_en_<number>.mp3
    en/covost_v2.en_zh-CN.{train,dev,test}.tsv          path, sentence, translation, client_id; no quoting

Written: covost2.{train,dev,test}.jsonl, split as CoVoST splits. The instruction is "Translate to Chinese."
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from recipe import read_table, recipe_parser, record_name, report, require, run_main, write_splits

from listen_dist.structures import Record

SPLITS = ("train", "dev", "test")
INSTRUCTION = "Translate to Chinese."
SPLIT_CURE = (
    "get CoVoST 2's covost_v2.en_zh-CN.tsv and run its get_covost_splits.py --version 2 --src-lang en"
    " --tgt-lang zh-CN, with --root this folder (https://github.com/facebookresearch/covost)"
)
CLIP_CURE = "unpack the English Common Voice Corpus 4 into this folder, so that it holds clips/*.mp3"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the three split files and write the manifests."""
    parser = recipe_parser(__doc__, "the folder en, with clips/ and covost_v2.en_zh-CN.<split>.tsv")
    options = parser.parse_args(arguments)
    folder = options.folder.resolve()
    require(folder / "clips", CLIP_CURE)
    for split in SPLITS:
        require(_table(folder, split), SPLIT_CURE)
    splits = {split: read_split(folder, split) for split in SPLITS}
    write_splits("covost2", splits, options, CLIP_CURE)


def read_split(folder: Path, split: str) -> list[Record]:
    """Return the records of a split, in the order of its table; rows without a translation are left out.

    Raises:
        PrepareError: `file:line` of a row that can't be right.
    """
    records, empty = [], []
    columns = ("path", "sentence", "translation", "client_id")
    rows = read_table(_table(folder, split), columns, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
    for place, row in rows:
        if not row["translation"].strip():
            empty.append(place)
            continue
        records.append(
            Record(
                id=record_name("covost2", PurePosixPath(row["path"]).stem),
                audio=(str(folder / "clips" / row["path"]),),
                task="translation",
                target=row["translation"].strip(),
                instruction=INSTRUCTION,
                language="en",
                speaker=row["client_id"],
                split=split,
                meta={"sentence": row["sentence"], "target_language": "zh-CN"},
            )
        )
    report(f"rows of {split} left out, without a translation", empty)
    return records


def _table(folder: Path, split: str) -> Path:
    return folder / f"covost_v2.en_zh-CN.{split}.tsv"


if __name__ == "__main__":
    run_main(main)
