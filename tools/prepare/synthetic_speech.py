"""Speak short English sentences with the free voices of flite and write manifests for `asr`.

    python tools/prepare/synthetic_speech.py
    python tools/prepare/synthetic_speech.py --sentences 3000 --recombined 3000 --workers 8
    python tools/prepare/synthetic_speech.py --out /data/manifests --recordings /data/recordings

The voices (kal16, slt, rms; awb for the test alone) are those of Debian's flite and libflite1, the
sentences come from fortunes and fortunes-min; both are fetched without root. Written:
asr_synthetic.{train,test}.jsonl and 16 kHz WAV files in <recordings>/synthetic/clips. No sentence is in both
splits, nor in the telephone prompts' asr manifests where those lie in --out. Which sentences, which voice and
how fast follows from md5 of the text, so a smaller run is a part of a bigger one, the manifests come out the
same bytes every time, and a run that was stopped goes on where it was.

`--recombined` adds sentences that go from word to word as the telephone prompts to train on do: their words in
new orders, which can't be known by heart. `--remixed` does so with the fortunes. `--words` adds clips of one word.
`--perturb` plays every clip to train on at a speed of its own, pitch included, which makes many voices of three
(Ko et al. 2015, "Audio augmentation for speech recognition").
"""

from __future__ import annotations

import ctypes.util
import os
import re
import subprocess
import wave
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import soundfile
import torchaudio.functional
from debian_packages import fetch_files, fetch_renamed
from phone_rules import SPLITS, digest, drawn, normalise, record_id
from recipe import PrepareError, recordings_parser, run_main
from torch import from_numpy
from tqdm import tqdm

from listen_dist.data.decode import decode_audio
from listen_dist.data.manifest import read_manifest, write_manifest
from listen_dist.structures import SAMPLE_RATE, Record

FOLDER = "synthetic"
TRAIN_VOICES, TEST_VOICE = ("kal16", "rms", "slt"), "awb"
TEST_SENTENCES = 60
MAX_RECOMBINED = 14
"""Words of a recombined sentence; the prompts go on for longer."""
MIN_WORDS, MAX_WORDS = 2, 10
MAX_SOURCE = 30
"""Words of a sentence that others are made of."""
LONG_WORDS = 9
"""Of the sentences this long half are left out, which brings the mean from 2.3 s to 2.2 s."""
STRETCH_PERCENT = range(85, 116)
"""Length of a clip, in percent of the voice's own."""
SPEED_PERCENT = range(85, 116)
"""Speed of a perturbed clip, in percent of what was spoken."""
SPEAK_TIMEOUT = 60
"""Seconds; a sentence takes 0.04."""

# Not taken: songs, poems and pictures, source code, and jokes at other people's expense.
TOPICS = frozenset(
    """art computers cookie education food fortunes goedel humorists kids law linuxcookie literature magic
    medicine miscellaneous news paradoxum people pets platitudes politics riddles science sports startrek tao
    wisdom work""".split()
)
# What is often said alone.
CLOSED_CLASSES = tuple(
    """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million
    first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth
    sixteenth seventeenth eighteenth nineteenth twentieth thirtieth
    monday tuesday wednesday thursday friday saturday sunday
    january february march april may june july august september october november december
    today tomorrow yesterday morning afternoon evening yes no
    b c d e f g h j k l m n o p q r s t u v w x y z""".split()
)
BLOCKED = re.compile(
    r"""\b(?:adult|alcohol|arse|ass(?:es|hole)?\b|bastard|beer|bitch|blond|bloody|boob|booz|bra\b|breast
    |brothel|bugger|bull?shit|castrat|cocain|cock|colored|condom|corpse|crap|cunt|dammit|damn|dick
    |dope\b|drug|drunk|dumb|dwarf|erect|erotic|fags?\b|faggot|fart|fat\b|feminis|fetish|fuck|gay|genital
    |girl|goddamn|hang|hell\b|hemp|heroin|homo|hooker|idiot|impoten|incest|kill|kinky|lesbian|lust
    |marijuana|masturb|mistress|moron|murder|naked|nipple|nud[ei]|oral\b|orgasm|orgy|panties|penis
    |pervert|piss|porn|pregnan|prostitut|puberty|pussy|queer|rap(?:e|ist)|screw|seduc|sex|shit|shoot
    |shot|slave|slut|sperm|stupid|suck|suicid|testic|tits?\b|ugly|urin|vagina|vibrator|virgin|vomit
    |whisk|whore|wife|wives|woman|women)""",
    re.IGNORECASE | re.VERBOSE,
)
ABBREVIATION = re.compile(r"\b([A-Z]|Mr|Mrs|Ms|Dr|St|Prof|Gen|Capt|Jr|Sr|No|vs|etc|[ei]\.[eg])\.")
# Lower case but for the first word and "I": names, and abbreviations in capitals, are hard to spell by ear.
SENTENCE = re.compile(
    r"""(?:[A-Z][a-z]+|A|I)(?:['-][a-z]+)*
    (?:[,;:]?[ ](?:(?:[a-z][a-z]+|a)(?:['-][a-z]+)*|I(?:'[a-z]+)?))*[.!?]""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Clip:
    """A sentence, who speaks it, and for which split."""

    text: str
    voice: str
    split: str
    percent: int = 100
    """Speed in percent of what the voice speaks, pitch included."""

    @property
    def id(self) -> str:
        """Name of the record and of the file: a function of voice, text and speed alone."""
        name = record_id("syn", self.voice, f"{digest(f'{self.voice}/{self.text}') % 16**10:010x}")
        return name if self.percent == 100 else f"{name}-{self.percent}"

    @property
    def perturbed(self) -> Clip:
        """The same clip at a speed of its own."""
        return replace(self, percent=SPEED_PERCENT[digest(f"speed/{self.id}") % len(SPEED_PERCENT)])

    @property
    def stretch(self) -> float:
        """Length as a multiple of the voice's own."""
        return STRETCH_PERCENT[digest(f"stretch/{self.text}") % len(STRETCH_PERCENT)] / 100


def main() -> None:
    """Fetch, choose the sentences, speak them, write the manifests."""
    parser = recordings_parser(__doc__)
    parser.add_argument("--sentences", type=int, default=2000, help="clips to train on (default: 2000)")
    parser.add_argument(
        "--recombined", type=int, default=0, help="clips more, of the telephone prompts' words (default: 0)"
    )
    parser.add_argument(
        "--remixed", type=int, default=0, help="clips more, of all the texts' words in new orders (default: 0)"
    )
    parser.add_argument(
        "--words", type=int, default=0, help="clips more of one word each: numbers, days, letters by every voice, "
        "then the texts' commonest words (default: 0)"
    )
    parser.add_argument(
        "--perturb", action="store_true", help="each clip to train on at 0.85 to 1.15 times its speed and pitch"
    )
    parser.add_argument("--name", default="asr_synthetic", help="of the set, in its manifests' names")
    parser.add_argument("--workers", type=int, default=2, help="clips spoken at a time (default: 2)")
    options = parser.parse_args()
    if min(options.sentences, options.workers) < 1 or min(options.recombined, options.remixed, options.words) < 0:
        raise PrepareError("--sentences and --workers are numbers above 0, the others no negative ones")
    recordings, out = options.recordings.resolve(), options.out.resolve()
    _fetch(recordings)
    known = known_sentences(out)
    texts = read_texts(recordings / FOLDER / "fortunes")
    clips = choose_clips(texts, options.sentences, known)
    known |= {normalise(clip.text) for clip in clips}
    if options.recombined:
        clips += [_train_clip(text) for text in recombined(training_prompts(out), options.recombined, known)]
    if options.remixed:
        held = {normalise(clip.text) for clip in clips if clip.split == "test"}
        sources = [text for text in clean_sentences(texts, MAX_SOURCE) if normalise(text) not in held]
        clips += [_train_clip(text) for text in recombined(sources, options.remixed, known)]
    clips += single_words(texts, options.words, known)
    if options.perturb:
        clips = [clip.perturbed if clip.split == "train" else clip for clip in clips]
    records = speak_all(clips, recordings / FOLDER, options.workers)
    print(f"{'set':<20}{'split':<7}{'records':>8}{'hours':>8}{'mean s':>8}  voices")
    for split in ("train", "test"):
        group = [record for record in records if record.split == split]
        write_manifest(out / f"{options.name}.{split}.jsonl", group)
        seconds = sum(record.duration or 0.0 for record in group)
        voices = ", ".join(f"{name} {n}" for name, n in sorted(Counter(r.speaker for r in group).items()))
        mean = seconds / len(group)
        print(f"{options.name:<20}{split:<7}{len(group):>8}{seconds / 3600:>8.2f}{mean:>8.2f}  {voices}")


# --- fetch ------------------------------------------------------------------------------------------


def _fetch(recordings: Path) -> None:
    """Fetch flite and the texts, and ALSA's library, which flite is linked to, where the machine has none."""
    fetch_files(
        {
            "flite": _program_name,
            "libflite1": _library_name,
            "fortunes": _text_name,
            "fortunes-min": _text_name,
        },
        recordings,
    )
    if not ctypes.util.find_library("asound"):
        fetch_renamed(("libasound2", "libasound2t64"), _library_name, recordings)
    (recordings / FOLDER / "flite/flite").chmod(0o755)


def _program_name(name: str) -> str | None:
    return f"{FOLDER}/flite/flite" if name == "usr/bin/flite" else None


def _library_name(name: str) -> str | None:
    """Return where a shared library goes: under the name that programs ask for, in the package a link."""
    match = re.fullmatch(r"usr/lib/[^/]+/(libflite\w*|libasound)\.so\.[\d.]+", name)
    version = {"libasound": 2}.get(match[1], 1) if match else 0
    return f"{FOLDER}/flite/{match[1]}.so.{version}" if match else None


def _text_name(name: str) -> str | None:
    folder, _, topic = name.rpartition("/")
    return f"{FOLDER}/fortunes/{topic}" if folder == "usr/share/games/fortunes" and topic in TOPICS else None


# --- choose the sentences ---------------------------------------------------------------------------


def read_texts(folder: Path) -> list[str]:
    """Return the collections of fortunes in `folder`."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in sorted(folder.glob("*"))]
    if not texts:
        raise PrepareError(f"no texts below {folder}; delete {folder.parent} and run again")
    return texts


def known_sentences(manifests: Path) -> set[str]:
    """Return the normalised sentences of the telephone prompts' asr manifests, as far as they are there."""
    paths = [manifests / f"asr.{split}.jsonl" for split in SPLITS]
    return {normalise(record.target) for path in paths if path.is_file() for record in read_manifest(path)}


def choose_clips(texts: Iterable[str], count: int, known: set[str]) -> list[Clip]:
    """Return `count` clips to train on and the test's, whose sentences are the same whatever `count` is.

    Raises:
        PrepareError: the texts hold fewer sentences.
    """
    sentences = [text for text in clean_sentences(texts) if normalise(text) not in known]
    short = [text for text in sentences if len(normalise(text).split()) < LONG_WORDS or digest(text) % 2]
    ordered = drawn(short, "synthetic")
    held, rest = ordered[:TEST_SENTENCES], ordered[TEST_SENTENCES:]
    if len(rest) < count:
        raise PrepareError(
            f"--sentences {count}: the texts hold {len(rest)} clean sentences; ask for no more"
        )
    return [Clip(text, TEST_VOICE, "test") for text in held] + [_train_clip(text) for text in rest[:count]]


def _train_clip(text: str) -> Clip:
    return Clip(text, TRAIN_VOICES[digest(f"voice/{text}") % len(TRAIN_VOICES)], "train")


def training_prompts(manifests: Path) -> list[str]:
    """Return the transcripts of the telephone prompts to train on.

    Raises:
        PrepareError: their manifest is not there.
    """
    path = manifests / "asr.train.jsonl"
    if not path.is_file():
        raise PrepareError(f"{path} is missing, whose words --recombined takes; run phone_prompts.py first")
    return [record.target for record in read_manifest(path)]


def recombined(prompts: Sequence[str], count: int, known: set[str]) -> list[str]:
    """Return `count` sentences that are a chain of the prompts' word pairs, none of them a known sentence.

    Raises:
        PrepareError: the prompts give fewer.
    """
    following: dict[str, list[str]] = defaultdict(list)
    for prompt in prompts:
        for word, after in pairwise(["", *prompt.split(), ""]):
            following[word].append(after)
    found: dict[str, str] = {}
    for turn in range(50 * count):
        words = [""]
        while len(words) == 1 or words[-1]:
            choices = following[words[-1]]
            words.append(choices[digest(f"recombined/{turn}/{len(words)}") % len(choices)])
        text = " ".join(words[1:-1])
        if MIN_WORDS <= len(words) - 2 <= MAX_RECOMBINED and normalise(text) not in known:
            found.setdefault(normalise(text), text)
        if len(found) == count:
            return list(found.values())
    raise PrepareError(f"{count} sentences in new orders: there are {len(found)}; ask for no more")


def single_words(texts: Iterable[str], count: int, known: set[str]) -> list[Clip]:
    """Return `count` clips of one word: closed classes by every voice, then the commonest words of the texts.

    A word that is a known sentence by itself is left out: some telephone prompts to test on are one word.

    Raises:
        PrepareError: there are fewer.
    """
    closed = [word for word in CLOSED_CLASSES if word not in known]
    clips = [Clip(f"{word.capitalize()}.", voice, "train") for word in closed for voice in TRAIN_VOICES]
    known = known.union(closed)
    words = Counter(word for text in clean_sentences(texts, MAX_SOURCE) for word in normalise(text).split())
    for word, _ in sorted(words.items(), key=lambda pair: (-pair[1], pair[0])):
        if len(word) > 2 and word.isalpha() and word not in known:
            clips.append(_train_clip(f"{word.capitalize()}."))
    if len(clips) < count:
        raise PrepareError(f"--words {count}: there are {len(clips)}; ask for no more")
    return clips[:count]


def clean_sentences(texts: Iterable[str], most_words: int = MAX_WORDS) -> list[str]:
    """Return the short, clean sentences of collections of fortunes, sorted; none comes twice.

    A word that comes only once or twice in all texts (a typo, a foreign language) makes a sentence unfit.
    """
    fortunes = [fortune for text in texts for fortune in re.split(r"^%.*$", text, flags=re.MULTILINE)]
    pieces = [piece for fortune in fortunes for piece in split_sentences(fortune)]
    frequency = Counter(word for piece in pieces for word in normalise(piece).split())
    found: dict[str, str] = {}
    for piece in sorted(set(pieces)):
        words = normalise(piece).split()
        if is_clean(piece) and MIN_WORDS <= len(words) <= most_words and all(frequency[w] > 2 for w in words):
            found.setdefault(" ".join(words), piece)
    return sorted(found.values())


def split_sentences(fortune: str) -> list[str]:
    """Return the sentences of one fortune, without the attribution at its end and quotation marks around.

    >>> split_sentences('"Nothing is\\nalways."  Is it?\\n\\t\\t-- Anon.')
    ['Nothing is always.', 'Is it?']
    """
    said = re.split(r"^\s*--", fortune, maxsplit=1, flags=re.MULTILINE)[0]
    sentences = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[ \t]|[QA]:)", said):
        line = ABBREVIATION.sub(r"\1@", re.sub(r"\s+", " ", paragraph))  # "@" is no character of a sentence
        line = re.sub(r"^ ?[QA]: ?", "", line)
        sentences += [part.strip(" \"'`") for part in re.split(r"(?<=[.!?])[\"']* +(?=[\"'`]*[A-Z])", line)]
    return [sentence for sentence in sentences if sentence]


def is_clean(sentence: str) -> bool:
    """Tell whether a sentence is plain words (see SENTENCE) that one would say to anyone."""
    return bool(SENTENCE.fullmatch(sentence)) and not BLOCKED.search(sentence)


# --- speak ------------------------------------------------------------------------------------------


def speak_all(clips: Sequence[Clip], folder: Path, workers: int) -> list[Record]:
    """Return the records of clips, spoken where their file isn't there yet, in the clips' order."""
    (folder / "clips").mkdir(exist_ok=True)
    with ThreadPoolExecutor(workers) as pool:  # threads: the work is done by flite's processes
        spoken = pool.map(partial(speak, folder=folder), clips)
        return list(tqdm(spoken, total=len(clips), desc="speak", unit="clip", disable=None))


def speak(clip: Clip, folder: Path) -> Record:
    """Speak one clip to a file, unless it is there."""
    path = folder / f"clips/{clip.id}.wav"
    if not path.is_file():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            if clip.percent == 100:
                run_flite(clip, folder / "flite", temporary)
            else:
                spoken = speak(replace(clip, percent=100), folder)
                samples = from_numpy(decode_audio(spoken.audio[0]))
                faster = torchaudio.functional.resample(samples, clip.percent, 100)
                soundfile.write(temporary, faster.numpy(), SAMPLE_RATE, format="WAV")
            wav_seconds(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return Record(
        id=clip.id,
        audio=(str(path),),
        task="asr",
        target=clip.text,
        language="en",
        speaker=f"flite-{clip.voice}",
        duration=round(wav_seconds(path), 4),
        split=clip.split,
    )


def run_flite(clip: Clip, folder: Path, path: Path) -> None:
    """Run the flite in `folder` on a clip's text."""
    command = [folder / "flite", "-voice", clip.voice, "--setf", f"duration_stretch={clip.stretch}"]
    try:
        subprocess.run(
            [*command, "-t", clip.text, "-o", path],
            env={**os.environ, "LD_LIBRARY_PATH": str(folder)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=SPEAK_TIMEOUT,
            encoding="utf-8",
        )
    except OSError as error:
        raise PrepareError(f"flite does not start: {error}; delete {folder} and run again") from None
    except subprocess.TimeoutExpired:
        raise PrepareError(f"flite took over {SPEAK_TIMEOUT} s to speak {clip.text!r}") from None
    except subprocess.CalledProcessError as error:
        raise PrepareError(f"flite failed (exit {error.returncode}):\n{error.stderr.strip()}") from None


def wav_seconds(path: Path) -> float:
    """Return the length of a mono 16 kHz WAV file.

    Raises:
        PrepareError: it is something else, or cut short.
    """
    try:
        with wave.open(str(path)) as file:
            seconds = file.getnframes() / SAMPLE_RATE
            whole = path.stat().st_size >= file.getnframes() * file.getsampwidth()
            fits = (file.getframerate(), file.getnchannels()) == (SAMPLE_RATE, 1)
    except (wave.Error, EOFError, OSError) as error:
        raise PrepareError(f"{path} is no WAV file ({error}); delete it and run again") from None
    if not (fits and whole and seconds > 0.1):
        raise PrepareError(f"{path} is not whole mono speech at 16 kHz; delete it and run again")
    return seconds


if __name__ == "__main__":
    run_main(main)
