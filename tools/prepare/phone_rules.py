"""The rules behind `phone_prompts.py`: pure functions of prompt ids and transcripts, without files.

Everything drawn is drawn by md5 of a name, so the manifests are the same on every machine and Python.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeVar

SPLITS = ("train", "dev", "test")
_HELD_OUT_RANK = {"train": 0, "dev": 1, "test": 2}

Item = TypeVar("Item")


def parse_transcripts(text: str) -> dict[str, str]:
    """Return prompt id → cleaned transcript from `id: text` lines; clips without speech are left out."""
    transcripts: dict[str, str] = {}
    for line in text.splitlines():
        prompt, separator, spoken = line.partition(":")
        if separator and not line.startswith(";"):
            cleaned = clean_transcript(spoken)
            if cleaned:
                transcripts[prompt.strip()] = cleaned
    return transcripts


def clean_transcript(text: str) -> str:
    """Return what is said: without notes and dots of ellipsis, signs as words, case and punctuation kept.

    >>> clean_transcript(" ...press # now. (simple tone sound plays)")
    'press pound now.'
    """
    text = re.sub(r"\[[^]]*\]|<[^>]*>|\([^)]*\)", " ", text)
    text = text.replace("...", " ").replace("#", " pound ").replace("*", " star ")
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r" ([.,?!])", r"\1", text)
    return text if re.search(r"\w", text) else ""


def normalise(text: str) -> str:
    """Return lower-case words without punctuation: equal results are the same sentence."""
    return " ".join(words(text))


def words(text: str) -> list[str]:
    """Return the lower-case words of a text; apostrophes stay inside words."""
    return re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower())


def digest(name: str) -> int:
    """Return md5 of a name as a number: our seeded, portable randomness."""
    return int(hashlib.md5(name.encode(), usedforsecurity=False).hexdigest(), 16)


def id_split(prompt: str) -> str:
    """Return the split of a prompt id, the same in every language: a tenth test, a tenth dev."""
    return {0: "test", 1: "dev"}.get(digest(prompt) % 10, "train")


def split_prompts(transcripts: dict[str, str]) -> dict[str, list[str]]:
    """Return split → prompt ids, sorted, such that no sentence is in two splits.

    A prompt whose sentence some other prompt holds out further (test before dev before train) is dropped.
    """
    held: dict[str, str] = {}
    for prompt, text in transcripts.items():
        sentence, split = normalise(text), id_split(prompt)
        if _HELD_OUT_RANK[split] >= _HELD_OUT_RANK[held.get(sentence, "train")]:
            held[sentence] = split
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for prompt in sorted(transcripts):
        if held[normalise(transcripts[prompt])] == id_split(prompt):
            splits[id_split(prompt)].append(prompt)
    return splits


def drawn(items: Iterable[Item], salt: str) -> list[Item]:
    """Return items in an order drawn by md5 of their text and a salt."""
    return sorted(items, key=lambda item: digest(f"{salt}/{item}"))


def record_id(*parts: str) -> str:
    """Return a safe record id of words and prompt ids: `asr-en-digits_0`."""
    return "-".join(re.sub(r"[^A-Za-z0-9_-]", "_", part) for part in parts)


# --- questions whose answers the transcript settles -------------------------------------------------

_NUMBERS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
    sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand
    million billion"""
_FUNCTION_WORDS = """a an and are at be been by can do for from has have if in is it may me more my no not of
    on or other that the then there they this to try until up was we when which while who will with you your"""
NUMBER_WORDS = frozenset(_NUMBERS.split())
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
# Ordinals, and "oh" for zero, are numbers to some listeners and not to others: not asked about.
_UNCLEAR_NUMBERS = re.compile(r"(st|nd|rd|th|ieth)$|^(oh|niner|first|second|third)$")
KEYWORDS = ("press", "conference", "number", "message", "extension", "please")

Question = tuple[str, str, str, tuple[str, ...]]
"""(prompt id, question, answer, choices)"""


def length_questions(texts: dict[str, str]) -> list[Question]:
    """Ask how many words are said: one, few (2 to 4) or many (6 or more; 5 is left out as unclear)."""
    question, choices = "How many words: one, few or many?", ("one", "few", "many")
    found: list[Question] = []
    for prompt, text in texts.items():
        count = len(words(text))
        answer = "one" if count == 1 else "few" if count <= 4 else "many" if count >= 6 else ""
        # abbreviations ("IAX", "A.M.") are one word to the eye and several to the ear
        if answer and not re.search(r"\b[A-Z]{2,}\d*\b|\b[A-Z]\.", text):
            found.append((prompt, question, answer, choices))
    return found


def number_questions(texts: dict[str, str]) -> list[Question]:
    """Ask whether a number is said."""
    question, choices = "Is a number said?", ("yes", "no")
    found: list[Question] = []
    for prompt, text in texts.items():
        spoken = words(text)
        if any(word.isdigit() or word in NUMBER_WORDS for word in spoken):
            found.append((prompt, question, "yes", choices))
        elif not any(_UNCLEAR_NUMBERS.search(word) for word in spoken):
            found.append((prompt, question, "no", choices))
    return found


def keyword_questions(texts: dict[str, str]) -> list[Question]:
    """Ask whether a frequent word is said."""
    found: list[Question] = []
    for keyword in KEYWORDS:
        question = f'Is "{keyword}" said?'
        for prompt, text in texts.items():
            said = keyword in words(text)
            # inflections ("pressed", "numbers") would make "no" a matter of taste
            if said or keyword not in text.lower():
                found.append((prompt, question, "yes" if said else "no", ("yes", "no")))
    return found


def word_questions(texts: dict[str, str]) -> list[Question]:
    """Ask which of two words is said; the other one comes from another clip of the same split."""
    vocabulary = sorted({word for text in texts.values() for word in _content_words(text)})
    found: list[Question] = []
    for prompt, text in texts.items():
        said = drawn(_content_words(text), f"word/{prompt}")
        others = [word for word in vocabulary if word not in words(text) and not _akin(word, words(text))]
        if not said or not others:
            continue
        pair = (said[0], drawn(others, f"other/{prompt}")[0])
        choices = pair if digest(f"order/{prompt}") % 2 else pair[::-1]
        found.append((prompt, f"Which word is said, {choices[0]} or {choices[1]}?", said[0], choices))
    return found


def keep_balanced(questions: Sequence[Question], limit: int, salt: str) -> list[Question]:
    """Keep at most `limit` questions such that no answer is more frequent than another.

    Questions with the same words are balanced among themselves, those asked once (`Which word …`) by the
    place of the right answer. Wordings are taken in turn; which clips is drawn by md5.
    """
    wordings = Counter(question[1] for question in questions)
    groups: dict[str, dict[int, list[Question]]] = defaultdict(lambda: defaultdict(list))
    for question in questions:
        wording = question[1] if wordings[question[1]] > 1 else ""
        groups[wording][question[3].index(question[2])].append(question)
    bundles: list[tuple[int, str, tuple[Question, ...]]] = []
    for wording, by_answer in groups.items():
        if len(by_answer) == len(questions[0][3]):  # an answer that never comes can't be balanced
            columns = [drawn(by_answer[place], salt) for place in sorted(by_answer)]
            bundles.extend((turn, wording, bundle) for turn, bundle in enumerate(zip(*columns, strict=False)))
    kept = [question for _, _, bundle in sorted(bundles) for question in bundle]
    return kept[: limit // len(questions[0][3]) * len(questions[0][3])] if kept else []


QUESTION_KINDS = {
    "length": length_questions,
    "number": number_questions,
    "keyword": keyword_questions,
    "word": word_questions,
}


def _content_words(text: str) -> list[str]:
    return sorted({word for word in words(text) if len(word) > 2 and word not in FUNCTION_WORDS})


def _akin(word: str, others: Iterable[str]) -> bool:
    """Tell whether a word shares its first four letters with one of the others ("number", "numbers")."""
    return any(word[:4] == other[:4] for other in others)
