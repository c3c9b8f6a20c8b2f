"""Pairs of phone prompts for speaker verification, drawn by rule.

Each language has one speaker, and Allison reads two (English and Spanish). So a different-speaker pair
is always in two languages: pairs of different speakers in one language are impossible with these
recordings. To keep language alone from telling the answer, a third of the same-speaker pairs joins
Allison's English with her Spanish, and her two languages alternate in the different-speaker pairs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import combinations

from phone_rules import digest, drawn


@dataclass(frozen=True)
class Clip:
    """One recording of one prompt."""

    prompt: str
    language: str
    """Two letters."""
    speaker: str
    seconds: float
    path: str

    def __str__(self) -> str:
        return f"{self.language}/{self.prompt}"


def draw_pairs(clips: list[Clip], count: int, salt: str) -> list[tuple[Clip, Clip, str]]:
    """Return about `count` (clip, clip, "yes" or "no"), exactly as many of each answer, no pair twice.

    Within an answer, the kinds of pairs (which languages) come equally often; the two clips of a pair
    are different prompts, so that what is said doesn't tell.
    """
    by_language = {
        name: [c for c in clips if c.language == name] for name in sorted({c.language for c in clips})
    }
    speaker = {name: group[0].speaker for name, group in by_language.items()}
    same = [(name, name) for name in by_language]
    crossing = [pair for pair in combinations(by_language, 2) if speaker[pair[0]] == speaker[pair[1]]]
    unlike = [pair for pair in combinations(by_language, 2) if speaker[pair[0]] != speaker[pair[1]]]
    yes_third = count // 6
    yes = _draw(by_language, crossing, yes_third, f"{salt}/cross") if crossing else []
    yes += _draw(by_language, same, count // 2 - len(yes), f"{salt}/same")
    no = _draw(by_language, _weighted(unlike, speaker), count // 2, f"{salt}/unlike")
    size = min(len(yes), len(no))
    pairs = [(a, b, "yes") for a, b in yes[:size]] + [(a, b, "no") for a, b in no[:size]]
    return sorted(pairs, key=lambda pair: digest(f"{salt}/{pair[0]}/{pair[1]}"))


def _weighted(kinds: list[tuple[str, str]], speaker: dict[str, str]) -> list[tuple[str, str]]:
    """Order kinds such that every pair of speakers comes equally often, also one met in two languages."""
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for kind in kinds:
        groups.setdefault(tuple(sorted(speaker[name] for name in kind)), []).append(kind)
    rounds = max((len(group) for group in groups.values()), default=0)
    return [group[turn % len(group)] for turn in range(rounds) for group in groups.values()]


def _draw(
    by_language: dict[str, list[Clip]], kinds: list[tuple[str, str]], count: int, salt: str
) -> list[tuple[Clip, Clip]]:
    """Return `count` pairs, the kinds in turn; each kind walks through its clips in drawn orders."""
    found: list[tuple[Clip, Clip]] = []
    seen: set[frozenset[str]] = set()
    drawn_so_far: Counter[tuple[str, str]] = Counter()
    for turn in range(count * 3):  # a few are met twice or have the same prompt: draw on
        if len(found) == count:
            break
        first, second = kind = kinds[turn % len(kinds)]
        a = _nth_drawn(by_language[first], drawn_so_far[kind], f"{salt}/{first}{second}/a")
        b = _nth_drawn(by_language[second], drawn_so_far[kind], f"{salt}/{first}{second}/b")
        drawn_so_far[kind] += 1
        pair = frozenset((str(a), str(b)))
        if a.prompt != b.prompt and pair not in seen:
            seen.add(pair)
            # which one is heard first must not follow the alphabet of languages
            found.append((a, b) if digest(f"{salt}/{a}/{b}") % 2 else (b, a))
    return found


def _nth_drawn(clips: list[Clip], number: int, salt: str) -> Clip:
    """Return item `number` of an endless walk: every round a new drawn order of all clips."""
    lap, position = divmod(number, len(clips))
    return drawn(clips, f"{salt}/{lap}")[position]
