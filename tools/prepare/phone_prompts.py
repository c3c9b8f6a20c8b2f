"""Fetch recorded telephone prompts (five languages, four speakers) and write manifests for five tasks.

    python tools/prepare/phone_prompts.py
    python tools/prepare/phone_prompts.py --out /data/manifests --recordings /data/recordings

The recordings are Debian's asterisk-core-sounds-*-g722 (CC BY-SA 3.0, CC BY 3.0), the transcripts
core-sounds-en.txt.gz of asterisk-core-sounds-en; layout: /usr/share/asterisk/sounds/<voice>/<prompt>.g722.
Written: {asr,language_id,speaker_verification,speech_qa,translation}.{train,dev,test}.jsonl. A prompt is in
the same split in every language and task, and no English sentence is in two splits. Files that are
there already are not fetched again, and the manifests come out the same bytes every time.

`--full` writes language_id_full.train.jsonl and speaker_verification_full.train.jsonl as well: all clips, and more
pairs, for a longer training.
"""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import phone_rules as rules
from debian_packages import Rename, fetch_files
from phone_pairs import Clip, draw_pairs
from recipe import PrepareError, recordings_parser, run_main

from listen_dist.data.manifest import write_manifest
from listen_dist.structures import Record

VOICES = {  # language: (folder in the package, speaker, language's name)
    "en": ("en_US_f_Allison", "allison", "English"),
    "es": ("es_MX_f_Allison", "allison", "Spanish"),
    "fr": ("fr_CA_f_June", "june", "French"),
    "it": ("it_IT_m_Carlo", "carlo", "Italian"),
    "ru": ("ru_RU_f_IvrvoiceRU", "ivrvoice-ru", "Russian"),
}
FOLDER = "phone_prompts"
TRANSCRIPTS = f"{FOLDER}/core-sounds-en.txt.gz"
MIN_SECONDS, MAX_SECONDS = 0.2, 30.0
"""A few prompts are empty files, a few are long talks."""
LANGUAGE_CLIPS = {"train": 150, "dev": 30, "test": 30}
"""Clips a language for language_id."""
PAIRS = {"train": 600, "dev": 80, "test": 100}
FULL_PAIRS = 3000
QUESTIONS = {"train": 1000, "dev": 100, "test": 100}


def main() -> None:
    """Fetch, then write all manifests."""
    parser = recordings_parser(__doc__)
    parser.add_argument("--full", action="store_true", help="also larger sets to train on")
    options = parser.parse_args()
    recordings = options.recordings.resolve()
    fetch_files(_packages(), recordings)
    with gzip.open(recordings / TRANSCRIPTS, "rt", encoding="utf-8") as file:
        transcripts = rules.parse_transcripts(file.read())
    clips = find_clips(recordings / FOLDER, transcripts)
    print(f"{len(clips)} clips with speech, {sum(clip.seconds for clip in clips) / 3600:.2f} h")
    write_all(clips, transcripts, options.out.resolve(), options.full)


def _packages() -> dict[str, Rename]:
    """Return package → which of its files to take, and where to put them."""

    def from_voice(language: str) -> Rename:
        prefix = f"usr/share/asterisk/sounds/{VOICES[language][0]}/"

        def rename(name: str) -> str | None:
            inside = name.removeprefix(prefix)
            return f"{FOLDER}/{language}/{inside}" if inside != name and name.endswith(".g722") else None

        return rename

    def transcripts(name: str) -> str | None:
        return TRANSCRIPTS if name.endswith("/core-sounds-en.txt.gz") else None

    packages: dict[str, Rename] = {f"asterisk-core-sounds-{name}-g722": from_voice(name) for name in VOICES}
    return {**packages, "asterisk-core-sounds-en": transcripts}


def find_clips(folder: Path, transcripts: dict[str, str]) -> list[Clip]:
    """Return the recordings of prompts whose English transcript we have, of a usable length."""
    clips = []
    for language, (_, speaker, _) in VOICES.items():
        for prompt in sorted(transcripts):
            path = folder / language / f"{prompt}.g722"
            if path.is_file():
                seconds = path.stat().st_size / 8000  # G.722: 64 kbit/s
                if MIN_SECONDS <= seconds <= MAX_SECONDS:
                    clips.append(Clip(prompt, language, speaker, seconds, str(path)))
    if not clips:
        raise PrepareError(f"no recordings below {folder}; delete {folder.parent} and run again")
    return clips


def write_all(clips: list[Clip], transcripts: dict[str, str], out: Path, full: bool) -> None:
    """Write every task's three manifests and print a table of what is in them."""
    makers: dict[str, Callable[[list[Clip], dict[str, str], str], list[Record]]] = {
        "asr": asr_records,
        "language_id": language_records,
        "speaker_verification": verification_records,
        "speech_qa": question_records,
        "translation": translation_records,
    }
    split_of = {
        prompt: split for split, group in rules.split_prompts(transcripts).items() for prompt in group
    }
    groups = {split: [c for c in clips if split_of.get(c.prompt) == split] for split in rules.SPLITS}
    print(f"{'task':<26}{'split':<7}{'records':>8}{'hours':>8}  answers")
    for task, make in makers.items():
        for split, group in groups.items():
            _write(out, task, make(group, transcripts, split))
    if full:
        _write(out, "language_id_full", language_records(groups["train"], transcripts, "train", len(clips)))
        pairs = verification_records(groups["train"], transcripts, "train", FULL_PAIRS)
        _write(out, "speaker_verification_full", pairs)


def _write(out: Path, name: str, records: list[Record]) -> None:
    """Write a manifest of one split, and its row of the table."""
    split = records[0].split
    write_manifest(out / f"{name}.{split}.jsonl", records)
    hours = sum(record.duration or 0.0 for record in records) / 3600
    top = Counter(record.target for record in records).most_common(6)
    shown = ", ".join(f"{answer} {count}" for answer, count in top) if top[0][1] > 4 else "all texts"
    print(f"{name:<26}{split:<7}{len(records):>8}{hours:>8.2f}  {shown}")


def asr_records(clips: list[Clip], transcripts: dict[str, str], split: str) -> list[Record]:
    """English clips and what is said in them."""
    return [_record("asr", clip, split, transcripts[clip.prompt]) for clip in clips if clip.language == "en"]


def translation_records(clips: list[Clip], transcripts: dict[str, str], split: str) -> list[Record]:
    """Clips of the other languages and the English text of the same prompt."""
    return [
        _record("translation", clip, split, transcripts[clip.prompt], instruction="Translate to English.")
        for clip in clips
        if clip.language != "en"
    ]


def language_records(
    clips: list[Clip], transcripts: dict[str, str], split: str, most: int | None = None
) -> list[Record]:
    """Equally many clips of every language, of 1 to 5 s as far as there are enough (long ones only cost)."""
    names = [voice[2] for voice in VOICES.values()]
    groups = []
    for language in VOICES:
        group = rules.drawn([c for c in clips if c.language == language], f"language_id/{split}")
        groups.append(sorted(group, key=lambda clip: not 1.0 <= clip.seconds <= 5.0))
    size = min(most or LANGUAGE_CLIPS[split], *(len(group) for group in groups))
    return [
        _record("language_id", clip, split, VOICES[clip.language][2], meta={"choices": names})
        for group in groups
        for clip in group[:size]
    ]


def verification_records(
    clips: list[Clip], transcripts: dict[str, str], split: str, count: int | None = None
) -> list[Record]:
    """Pairs of clips of 1 to 4 s by the same speaker or by two (see phone_pairs.py)."""
    short = [clip for clip in clips if 1.0 <= clip.seconds <= 4.0]
    records = []
    for first, second, answer in draw_pairs(short, count or PAIRS[split], f"pairs/{split}"):
        name = f"{rules.digest(f'{first}+{second}') % 16**8:08x}"
        records.append(
            Record(
                id=rules.record_id("sv", first.language, second.language, name),
                audio=(first.path, second.path),
                task="speaker_verification",
                target=answer,
                language=first.language if first.language == second.language else "",
                speaker="+".join(sorted({first.speaker, second.speaker})),
                duration=round(first.seconds + 0.1 + second.seconds, 4),
                split=split,
                meta={"kind": f"{first.language}-{second.language}", "choices": ["yes", "no"]},
            )
        )
    return records


def question_records(clips: list[Clip], transcripts: dict[str, str], split: str) -> list[Record]:
    """English clips with questions; every kind as often, every answer of a kind as often."""
    english = {clip.prompt: clip for clip in clips if clip.language == "en"}
    texts = {prompt: transcripts[prompt] for prompt in english}
    records = []
    for kind, ask in rules.QUESTION_KINDS.items():
        share = QUESTIONS[split] // len(rules.QUESTION_KINDS)
        for prompt, question, answer, choices in rules.keep_balanced(ask(texts), share, f"{kind}/{split}"):
            number = f"{rules.digest(question) % 16**4:04x}"
            meta: dict[str, object] = {"kind": kind, "choices": list(choices)}
            clip = english[prompt]
            records.append(
                _record("speech_qa", clip, split, answer, f"-{kind}-{number}", question=question, meta=meta)
            )
    return records


def _record(
    task: str,
    clip: Clip,
    split: str,
    target: str,
    suffix: str = "",
    instruction: str = "",
    question: str = "",
    meta: dict[str, object] | None = None,
) -> Record:
    return Record(
        id=rules.record_id(task.replace("speech_", ""), clip.language, clip.prompt) + suffix,
        audio=(clip.path,),
        task=task,
        target=target,
        instruction=instruction,
        question=question,
        language=clip.language,
        speaker=clip.speaker,
        duration=round(clip.seconds, 4),
        split=split,
        meta=meta or {},
    )


if __name__ == "__main__":
    run_main(main)
