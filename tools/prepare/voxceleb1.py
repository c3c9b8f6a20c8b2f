"""Write `speaker_verification` manifests of VoxCeleb1.

    python tools/prepare/voxceleb1.py /data/voxceleb1
    python tools/prepare/voxceleb1.py /data/voxceleb1 --trials veri_test.txt --pairs 200000

Unpack vox1_dev_wav.zip and vox1_test_wav.zip (https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html describes
them) into the same folder, and put the list of trial pairs beside:

    wav/id10001/<video>/00001.wav            1,251 speakers, of which id10270 to id10309 are for test
    veri_test2.txt                           "1 id10270/5r0dWxy17C8/00001.wav id10270/…" a line; 1: same speaker

Written: voxceleb1.{train,dev,test}.jsonl. Test is the official trial list, in its order (veri_test2.txt is the
cleaned one of 37,611 trials). Training pairs are drawn from the other speakers: each clip drawn is paired once with
the same speaker in another video, and once with another speaker, so that nothing but the voices
tells the answer. One in 30 of these speakers is held out for dev. Which pairs: a function of the clips' names and
--seed alone. The answers are yes and no. Pairs over 30 s are skipped, counted and named by shard_dataset.py.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path

from phone_rules import digest, drawn
from recipe import PrepareError, check_apart, held_out, recipe_parser, require, run_main, text_lines, write_splits
from tqdm import tqdm

from listen_dist.structures import Record

TEST_SPEAKERS = frozenset(f"id{number}" for number in range(10270, 10310))
DEV_ONE_IN = 30
"""One in so many training speakers is held out for dev."""
CURE = (
    "unpack vox1_dev_wav.zip and vox1_test_wav.zip of VoxCeleb1 into this folder, so that it holds"
    " wav/<speaker>/<video>/<number>.wav"
)
TRIALS_CURE = (
    "get the list of trial pairs from https://www.robots.ox.ac.uk/~vgg/data/voxceleb/vox1.html (veri_test2.txt is the"
    " cleaned one; say --trials veri_test.txt for the other)"
)

_TRIAL = re.compile(r"([01]) ((id\d{5})/[\w-]+/\d+\.wav) ((id\d{5})/[\w-]+/\d+\.wav)")

Pair = tuple[str, str, str]
"""(clip, clip, "yes" or "no"); a clip is `id10001/1zcIwhmdeo4/00001.wav`"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw pairs, read the trials and write the manifests."""
    parser = recipe_parser(__doc__, "the folder with wav/ and the trial list")
    parser.add_argument("--trials", default="veri_test2.txt", help="the trial list (default veri_test2.txt)")
    parser.add_argument("--pairs", type=int, default=100_000, help="pairs for train (default 100,000)")
    parser.add_argument("--dev-pairs", type=int, default=2_000, help="pairs for dev (default 2,000)")
    parser.add_argument("--seed", type=int, default=0, help="for the pairs and the dev speakers (default 0)")
    options = parser.parse_args(arguments)
    wav = require(options.folder.resolve() / "wav", CURE)
    trials = list(read_trials(require(options.folder.resolve() / options.trials, TRIALS_CURE)))
    clips = find_clips(wav)
    dev = {speaker for speaker in clips if held_out(speaker, f"voxceleb1/{options.seed}", DEV_ONE_IN)}
    splits = {
        "train": draw_pairs({s: clips[s] for s in clips if s not in dev}, options.pairs, options.seed),
        "dev": draw_pairs({s: clips[s] for s in clips if s in dev}, options.dev_pairs, options.seed),
    }
    records = {split: [_record(wav, pair, split) for pair in pairs] for split, pairs in splits.items()}
    records["test"] = [_record(wav, pair, "test", f"{number:06d}-") for number, pair in enumerate(trials, 1)]
    check_apart(records)
    write_splits("voxceleb1", records, options, CURE)


def read_trials(path: Path) -> Iterator[Pair]:
    """Yield the trials of an official list.

    Raises:
        PrepareError: `file:line` of a line that is no trial, or of one whose speakers are there to be trained on.
    """
    for number, line in text_lines(path):
        found = _TRIAL.fullmatch(line.strip())
        if not found or (found[1] == "1") != (found[3] == found[5]):
            expected = "'1 clip clip' (same speaker) or '0 clip clip'"
            raise PrepareError(f"{path}:{number}: expected {expected}, found {line.strip()[:80]!r}")
        if not {found[3], found[5]} <= TEST_SPEAKERS:
            raise PrepareError(
                f"{path}:{number}: a training speaker in the trials; use veri_test2.txt or veri_test.txt"
                " (the lists E and H test on speakers that are trained on here)"
            )
        yield found[2], found[4], "yes" if found[1] == "1" else "no"


def find_clips(wav: Path) -> dict[str, list[str]]:
    """Return training speaker → its clips, both sorted."""
    speakers = sorted(path for path in wav.glob("id*") if path.name not in TEST_SPEAKERS)
    print(f"{len(speakers)} training speakers are there (the whole set has 1,211)")
    if not speakers:
        raise PrepareError(f"{wav / 'id10001'} is missing: {CURE}")
    return {
        path.name: sorted(clip.relative_to(wav).as_posix() for clip in path.glob("*/*.wav"))
        for path in tqdm(speakers, desc="speakers", unit="speaker", disable=None)
    }


def draw_pairs(clips: dict[str, list[str]], count: int, seed: int) -> list[Pair]:
    """Return `count` pairs (fewer if there are no more), as many of each answer, none twice.

    Walks through all clips in drawn orders; every clip met gives one pair of each answer.
    """
    found: list[Pair] = []
    seen: set[frozenset[str]] = set()
    groups = {speaker: sorted(clips[speaker]) for speaker in sorted(clips) if clips[speaker]}
    speakers = list(groups)
    everything = [clip for group in groups.values() for clip in group]
    for lap in range(count if len(groups) > 1 else 0):
        before = len(found)
        for clip in drawn(everything, f"{seed}/{lap}"):
            if len(found) + 2 > count:
                return found
            salt = f"{seed}/{lap}/{clip}"
            same = _partner(clip, groups[_speaker(clip)], seen, f"{salt}/yes")
            other = _partner(clip, groups[_other_speaker(clip, speakers, salt)], seen, f"{salt}/no")
            if same and other:
                seen |= {frozenset((clip, same)), frozenset((clip, other))}
                found += [(clip, same, "yes"), (clip, other, "no")]
        if len(found) == before:
            break
    return found


def _speaker(clip: str) -> str:
    return clip.split("/", 1)[0]


def _other_speaker(clip: str, speakers: list[str], salt: str) -> str:
    """Draw one of the other speakers; `speakers` are sorted."""
    own = bisect_left(speakers, _speaker(clip))
    step = 1 + digest(f"{salt}/who") % (len(speakers) - 1)
    return speakers[(own + step) % len(speakers)]


def _partner(clip: str, options: list[str], seen: set[frozenset[str]], salt: str) -> str | None:
    """Return the first option, from a drawn place on, of another video that makes a new pair with `clip`."""
    video = clip.rpartition("/")[0] + "/"
    start = digest(salt) % len(options)
    turned = options[start:] + options[:start]
    return next((o for o in turned if not o.startswith(video) and frozenset((clip, o)) not in seen), None)


def _record(wav: Path, pair: Pair, split: str, prefix: str = "") -> Record:
    first, second, answer = pair
    names = [clip.removesuffix(".wav").replace("/", "-") for clip in (first, second)]
    return Record(
        id=f"vox1-{prefix}{names[0]}-{names[1]}",
        audio=(str(wav / first), str(wav / second)),
        task="speaker_verification",
        target=answer,
        speaker="+".join(sorted({first.split("/")[0], second.split("/")[0]})),
        split=split,
        meta={"choices": ["yes", "no"]},
    )


if __name__ == "__main__":
    run_main(main)
