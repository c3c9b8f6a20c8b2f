"""Write `caption` manifests of AudioCaps.

    python tools/prepare/audiocaps.py /data/audiocaps --skip-missing
    python tools/prepare/audiocaps.py /data/audiocaps --audio "{split}/{audiocap_id}.wav"

The captions are dataset/{train,val,test}.csv of https://github.com/cdjkim/audiocaps (its README names the columns;
AudioCaps 2.0 in dataset2.0/ has the same). The sounds are 10 s of YouTube videos, which everybody fetches alone, so
where they lie is said by --audio:

    {train,val,test}.csv                                  audiocap_id,youtube_id,start_time,caption
    audio/{train,val,test}/<youtube_id>_<start_time>.wav

Written: audiocaps.{train,dev,test}.jsonl. In dev (val) and test the captions of one clip are the references of one
record; in train every caption is a record. Some videos are gone: --skip-missing goes on without them and counts them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipe import PrepareError, read_table, recipe_parser, record_name, report, require, run_main, write_splits

from listen_dist.structures import Record

SPLITS = {"train": "train", "dev": "val", "test": "test"}
COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")
AUDIO = "audio/{split}/{youtube_id}_{start_time}.wav"
CURE = "get train.csv, val.csv and test.csv of https://github.com/cdjkim/audiocaps (folder dataset)"
CLIP_CURE = "fetch the clip, say with --audio where the clips lie, or go on without with --skip-missing"

Clip = list[dict[str, str]]
"""The rows of one clip."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the three tables and write the manifests."""
    parser = recipe_parser(__doc__, "the folder with train.csv, val.csv and test.csv")
    parser.add_argument("--audio", default=AUDIO, metavar="PATTERN",
                        help=f"a clip's path in the folder, of {{split}} and the columns (default {AUDIO})")
    parser.add_argument("--skip-missing", action="store_true", help="leave out clips that are not there; count them")
    options = parser.parse_args(arguments)
    splits = {split: read_split(options, split) for split in SPLITS}
    write_splits("audiocaps", splits, options, CLIP_CURE)


def read_split(options: argparse.Namespace, split: str) -> list[Record]:
    """Return the records of a split (`train`, `dev` or `test`), in the order of its table.

    Raises:
        PrepareError: a missing table, `file:line` of a row that can't be right, or a wrong --audio.
    """
    folder = options.folder.resolve()
    clips: dict[str, Clip] = {}
    for place, row in read_table(require(folder / f"{SPLITS[split]}.csv", CURE), COLUMNS):
        if not row["caption"].strip():
            raise PrepareError(f"{place}: the caption is empty")
        clip = row["audiocap_id"] if split == "train" else f"{row['youtube_id']}_{row['start_time']}"
        clips.setdefault(clip, []).append(row)
    paths = {clip: _path(folder, split, rows[0], options.audio) for clip, rows in clips.items()}
    if options.skip_missing:
        missing = {clip: path for clip, path in paths.items() if not path.is_file()}
        report(f"of {len(clips)} clips of {split} left out, not there", [str(path) for path in missing.values()])
        clips = {clip: rows for clip, rows in clips.items() if clip not in missing}
    return [clip_record(clip, rows, paths[clip], split) for clip, rows in clips.items()]


def clip_record(name: str, rows: Clip, path: Path, split: str) -> Record:
    """Return the record of a clip with one caption or several."""
    captions = tuple(row["caption"].strip() for row in rows)
    return Record(
        id=record_name("audiocaps", name),
        audio=(str(path),),
        task="caption",
        target=captions[0],
        references=captions if len(captions) > 1 else (),
        language="en",
        split=split,
        meta={"youtube_id": rows[0]["youtube_id"], "start_time": rows[0]["start_time"]},
    )


def _path(folder: Path, split: str, row: dict[str, str], pattern: str) -> Path:
    try:
        return folder / pattern.format(split=SPLITS[split], **row)
    except (KeyError, IndexError, ValueError, AttributeError):
        raise PrepareError(f"--audio {pattern}: use {{split}} and {', '.join(f'{{{c}}}' for c in COLUMNS)}") from None


if __name__ == "__main__":
    run_main(main)
