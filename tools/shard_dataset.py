#!/usr/bin/env python3
"""Turn manifests into shards: 16 kHz mono FLAC in WebDataset tars, with an index.

    python tools/shard_dataset.py assets/manifests/asr.train.jsonl assets/shards/train
    python tools/shard_dataset.py assets/manifests/*.train.jsonl assets/shards/train     # one mixed set
    python tools/shard_dataset.py assets/manifests/*.jsonl assets/shards --separate      # asr/train/, asr/dev/ …
    python tools/shard_dataset.py M.jsonl OUT --features speech --speech-encoder assets/models/whisper-tiny.en
    python tools/shard_dataset.py M.jsonl OUT --features speech,audio --speech-encoder DIR --audio-encoder BEATs.pt
    python tools/shard_dataset.py OUT --verify          # check the hashes and decode every sample
    python tools/shard_dataset.py OUT --stats           # hours, tasks, languages, lengths
    python tools/shard_dataset.py OUT --plot set.png    # the same as a picture

A set that lies elsewhere (https://host/set, s3://bucket/set) can be verified and counted too.

Samples are laid out in the order of md5(id), so that every shard is a fair sample of the whole. The same
input gives the same bytes. A run that was stopped goes on where it was: finished shards whose hash and
input agree are kept. A sample that can't be used is skipped, counted, and named in OUT/skipped.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from os.path import expanduser
from pathlib import Path

from shard_build import BuildOptions, build
from shard_stats import plot, print_stats, verify_all

from listen_dist import exits
from listen_dist.command_line import user_path
from listen_dist.data.shards import ShardIndex
from listen_dist.errors import ListenError


def main() -> int:
    """Run the tool; the exit code."""
    return exits.run(lambda: work(_parse()))


def work(options: argparse.Namespace) -> None:
    """Do what the command line says."""
    if options.manifests:
        settings = BuildOptions(
            shard_seconds=0.0 if options.shard_mb else options.shard_seconds,
            max_seconds=options.max_seconds,
            speech_encoder=options.speech_encoder if options.features else None,
            shard_bytes=int(options.shard_mb * 1e6),
            audio_encoder=options.audio_encoder,
        )
        indexes = build(_sets(options), settings, options.workers, options.overwrite)
    else:
        indexes = [ShardIndex.load(options.out)]
    for index in indexes:
        if options.verify:
            verify_all(index, options.max_seconds)
        if options.stats:
            print_stats(index)
        if options.plot:
            plot(index, options.plot)


def _sets(options: argparse.Namespace) -> dict[Path, list[Path]]:
    """Return output folder → its manifests."""
    out = Path(options.out)
    if not options.separate:
        return {out: options.manifests}
    sets = {out.joinpath(*manifest.stem.split(".")): [manifest] for manifest in options.manifests}
    if len(sets) < len(options.manifests):
        raise ListenError("--separate: two manifests have the same name, so their shards would share a folder")
    return sets


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("manifests", type=user_path, nargs="*", help="JSON lines, one sample a line")
    parser.add_argument("out", type=expanduser, help="folder for the shards (made if missing)")
    parser.add_argument(
        "--separate",
        action="store_true",
        help="a folder for each manifest: OUT/asr/train for asr.train.jsonl",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shard-seconds", type=float, default=600.0, help="audio a shard (default 600)")
    size.add_argument("--shard-mb", type=float, default=0.0, help="or: megabytes a shard, about")
    parser.add_argument("--max-seconds", type=float, default=30.0, help="skip longer samples (default 30)")
    parser.add_argument(
        "--workers", type=int, default=2, help="processes, a shard each at a time (default 2)"
    )
    parser.add_argument(
        "--features", choices=["speech", "speech,audio"], help="also store the frozen encoders' frames"
    )
    parser.add_argument(
        "--speech-encoder", type=expanduser, metavar="DIR", help="Whisper folder or name, with --features"
    )
    parser.add_argument("--audio-encoder", type=expanduser, metavar="FILE",
                        help="BEATs checkpoint, with --features speech,audio")
    parser.add_argument("--overwrite", action="store_true", help="replace shards of other input in OUT")
    parser.add_argument("--verify", action="store_true", help="check hashes, decode every sample")
    parser.add_argument("--stats", action="store_true", help="print hours, tasks, languages, lengths")
    parser.add_argument("--plot", type=user_path, metavar="FILE", help="draw lengths and hours by task (png, pdf, svg)")
    options = parser.parse_args()
    if bool(options.features) != bool(options.speech_encoder):
        parser.error("--features and --speech-encoder DIR go together")
    if (options.features == "speech,audio") != bool(options.audio_encoder):
        parser.error("--features speech,audio and --audio-encoder FILE go together")
    if not options.manifests and not (options.verify or options.stats or options.plot):
        parser.error("give a manifest and a folder, or one folder with --verify, --stats or --plot")
    if options.manifests and "://" in options.out:
        parser.error("shards are written to a local or shared folder; copy them to their server afterwards")
    if options.plot and options.separate:
        parser.error("--plot draws one set: call it for each folder")
    if options.shard_seconds <= 0 or options.shard_mb < 0 or options.max_seconds <= 0 or options.workers < 1:
        parser.error("--shard-seconds, --shard-mb, --max-seconds and --workers must be above 0")
    return options


if __name__ == "__main__":
    sys.exit(main())
