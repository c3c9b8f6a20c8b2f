"""Texts as they are compared: Unicode form, case, punctuation, and what counts as a word.

English rules (numbers, spelling, fillers) are for English alone; every other language gets the basic ones: lower
case, no punctuation, combining marks kept (they are the vowels of Hindi, Thai or Arabic). In scripts written without
spaces each character with its marks counts as a word.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache

import regex
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

NORMALIZERS = {"english": "Whisper's English rules (numbers, spelling, fillers)",
               "basic": "Whisper's basic rules (lower case, no punctuation, combining marks kept)"}
ENGLISH = ("en", "eng", "english")

_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]"  # U+30FC: a long vowel
_CHARACTER = regex.compile(rf"(?={_UNSPACED})\P{{M}}\p{{M}}*")
_SPACES = regex.compile(rf" +(?={_UNSPACED})|(?<={_UNSPACED}\p{{M}}*) +")
_INVISIBLE = regex.compile(r"(?![\u200c\u200d])\p{Cf}|[\ufe00-\ufe0f]")
"""Soft hyphens, zero-width spaces, direction marks, variants of emoji; the two joiners are spelling."""
_STRAY_MARKS = regex.compile(r"(?<!\S)\p{M}+")
"""Of a sign that was dropped."""


@cache
def _english() -> EnglishTextNormalizer:
    return EnglishTextNormalizer()


_BASIC = BasicTextNormalizer(preserve_marks=True)


def nfc(text: str) -> str:
    """One form for every letter: an accent may come composed or apart."""
    return unicodedata.normalize("NFC", text)


def normalize(text: str, rules: str = "english") -> str:
    """A text by Whisper's rules.

    Args:
        rules: a key of NORMALIZERS.
    """
    text = _INVISIBLE.sub("", nfc(text))
    if rules == "english":
        return _english()(text).strip()
    text = text.lower().replace("i\u0307", "i")  # what lower() makes of the Turkish İ
    return " ".join(_STRAY_MARKS.sub("", _BASIC(text)).split())


def rules_for(language: str, reference: str) -> str:
    """Which rules a clip is scored by: those of its language; where none is given, English for Latin letters."""
    if language:
        return "english" if regex.split("[-_]", language.lower())[0] in ENGLISH else "basic"
    letters = regex.findall(r"\p{L}", reference)
    return "english" if all(regex.match(r"\p{Latin}", letter) for letter in letters) else "basic"


def words(text: str) -> str:
    """The text with its words divided by spaces, a character of an unspaced script being one."""
    return " ".join(_CHARACTER.sub(lambda match: f" {match[0]} ", text).split())


def letters(text: str) -> str:
    """The text for counting characters: spaces beside an unspaced script mean nothing."""
    return _SPACES.sub("", text)


def is_unspaced(texts: Sequence[str]) -> bool:
    """Whether most words of some normalised texts are characters of scripts without spaces."""
    characters = sum(len(_CHARACTER.findall(text)) for text in texts)
    return 2 * characters > sum(len(words(text).split()) for text in texts)


def bleu_tokenizer(references: Sequence[str]) -> tuple[str, str]:
    """sacrebleu's tokenizer for the references' script, and why it is that one."""
    scripts = ("Han", "Hiragana", "Katakana", "Hangul", "Thai", "Lao", "Khmer", "Myanmar")
    text = "".join(references)
    counts = Counter({script: len(regex.findall(rf"\p{{{script}}}", text)) for script in scripts})
    if 2 * counts.total() <= len(regex.findall(r"\p{L}", text)):
        return "13a", "words by spaces"
    kana = counts.pop("Hiragana") + counts.pop("Katakana")
    if 5 * kana > counts["Han"] + kana:
        return "ja-mecab", "Japanese"
    script = counts.most_common(1)[0][0]
    if script == "Han":
        return "zh", "Chinese"
    return ("ko-mecab", "Korean") if script == "Hangul" else ("char", f"{script} script is written without spaces")
