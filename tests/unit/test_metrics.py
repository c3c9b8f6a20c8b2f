"""Scores of texts, against plain computations of their own."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from listen_dist.evaluation import captions
from listen_dist.evaluation.metrics import (
    NoWordsError,
    bleu_figures,
    bleu_scores,
    caption_scores,
    choice_scores,
    equal_error_rate,
    normalize,
    wer_scores,
)
from listen_dist.evaluation.wording import words

pytestmark = pytest.mark.timeout(300)


def edits(a: list[str], b: list[str]) -> int:
    """Levenshtein's distance by a plain dynamic programme."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


sentences = st.lists(st.sampled_from(["cat", "dog", "bird", "house", "tree"]), min_size=0, max_size=8).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(sentences, sentences.filter(bool)), min_size=1, max_size=6))
def test_wer_is_edits_over_reference_words(pairs: list[tuple[str, str]]) -> None:
    hypotheses, references = [h for h, _ in pairs], [r for _, r in pairs]
    scores = wer_scores(hypotheses, references)
    words = sum(len(r.split()) for r in references)
    assert scores["wer"] == pytest.approx(sum(edits(h.split(), r.split()) for h, r in pairs) / words)
    letters = sum(len(r) for r in references)
    assert scores["cer"] == pytest.approx(sum(edits(list(h), list(r)) for h, r in pairs) / letters)
    total = scores["insertions"] + scores["deletions"] + scores["substitutions"]
    assert total == sum(edits(h.split(), r.split()) for h, r in pairs)


def test_corpus_wer_is_no_mean_of_rows() -> None:
    assert wer_scores(["one", "a b c d e f g h i x"], ["two", "a b c d e f g h i j"])["wer"] == pytest.approx(2 / 11)


@pytest.mark.parametrize("said, meant", [
    ("Hello, World!", "hello world"), ("twenty one", "21"), ("colour", "color"), ("um, it is", "it's"),
    ("Mr. Smith won't", "mister smith will not"), ("  two   spaces ", "2 spaces"),
])
def test_english_normalisation(said: str, meant: str) -> None:
    assert normalize(said) == normalize(meant)
    assert wer_scores([said], [meant])["wer"] == 0


def test_basic_normalisation_leaves_words_alone() -> None:
    assert normalize("Yes.", "basic") == "yes"
    assert normalize("twenty one", "basic") == "twenty one"
    assert normalize("Où êtes-vous ?", "basic") == "où êtes vous"


def test_words_said_to_a_reference_without_words_count_and_no_words_at_all_is_an_error() -> None:
    assert wer_scores(["x y", "cat"], ["(music)", "cat"])["wer"] == 2
    assert wer_scores(["", "cat"], ["(music)", "cat"])["wer"] == 0
    with pytest.raises(NoWordsError, match="no reference has a word left"):
        wer_scores(["x"], ["(music)"])


@pytest.mark.parametrize("language, said, meant", [
    ("hi", "किताब", "कतब"), ("hi", "की", "का"), ("ml", "കാ", "കി"), ("th", "ดี", "ดา"), ("ar", "كَتَبَ", "كُتِبَ"),
    ("ta", "கா", "கீ"), ("de", "schön", "schon"), ("fr", "pêche", "péché"), ("", "की", "का"),
])
def test_marks_that_make_another_word_count(language: str, said: str, meant: str) -> None:
    scores = wer_scores([said], [meant], [language])
    assert scores["wer"] == 1 and scores["cer"] > 0 and scores["wer_basic"] == 1
    assert choice_scores([said], [meant])["accuracy"] == 0
    same = wer_scores([unicodedata.normalize("NFD", meant)], [unicodedata.normalize("NFC", meant)], [language])
    assert same["wer"] == same["cer"] == 0


def test_english_rules_are_for_english() -> None:
    assert wer_scores(["Twenty-one colours, um"], ["21 colors"], ["en-GB"])["wer"] == 0
    assert wer_scores(["sieben um zehn"], ["sieben zehn"], ["de"])["insertions"] == 1
    assert wer_scores(["sieben um zehn"], ["sieben zehn"])["insertions"] == 0, "a language of its own says what it is"
    assert wer_scores(["İstanbul ❤️ co\u00adop"], ["istanbul coop"], ["tr"])["wer"] == 0


@pytest.mark.parametrize("language, said, meant", [
    ("zh-CN", "我喜欢学习中文", "我喜欢学中文"), ("ja", "今日はいい天気だ", "今日は良い天気だ"),
    ("th", "สวัสดีครับ", "สวัสดีคะ"), ("my", "မင်္ဂလာပါ", "မင်္ဂလာ"), ("km", "សួស្តី", "សួស្ត"), ("lo", "ສະບາຍດີ", "ສະບາຍ"),
    ("yue", "2008年好", "2008年好嗎"),
])
def test_characters_are_words_where_no_space_divides_them(language: str, said: str, meant: str) -> None:
    scores = wer_scores([said], [meant], [language])
    assert 0 < scores["wer"] < 0.8 and scores["reference_words"] >= 2
    assert wer_scores([words(said)], [meant], [language]) == scores and " " in words(said), "spaces mean nothing"
    assert choice_scores([said], [meant])["accuracy"] == 0


def test_made_up_words_are_counted_apart() -> None:
    scores = wer_scores(["there is good you know what i mean", "b"], ["there is good", "a"], ["en", "en"])
    assert (scores["insertions"], scores["substitutions"], scores["reference_words"]) == (5, 1, 4)
    assert (scores["insertion_share"], scores["substitution_share"], scores["deletion_share"]) == (5 / 4, 1 / 4, 0)


def test_accuracy_weighted_and_not() -> None:
    scores = choice_scores(["Yes!", "no", "yes", "maybe"], ["yes", "yes", "yes", "no"])
    assert scores["accuracy"] == 0.5
    assert scores["unweighted_accuracy"] == pytest.approx((2 / 3 + 0) / 2)
    assert choice_scores(["+", " - "], ["-", "-"])["accuracy"] == 0.5  # no word in them, but not alike


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-6, 6), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: len({kind for _, kind in rows}) == 2))
def test_eer_is_where_scikit_learns_roc_crosses(rows: list[tuple[int, bool]]) -> None:
    """Few different scores, so that ties are frequent."""
    scores, kinds = [float(score) for score, _ in rows], [kind for _, kind in rows]
    false_alarms, hits, _ = roc_curve(kinds, scores)
    crossing = brentq(lambda x: 1 - x - np.interp(x, false_alarms, hits), 0, 1)
    assert equal_error_rate(scores, kinds) == pytest.approx(crossing, abs=1e-9)


def test_eer_by_hand_and_its_needs() -> None:
    assert equal_error_rate([3.0, 2.0, 1.0, 0.0], [True, True, False, False]) == 0
    assert equal_error_rate([0.0] * 6, [True, False] * 3) == 0.5
    assert equal_error_rate([4.0, 3.0, 2.0, 1.0], [True, False, True, False]) == 0.5
    with pytest.raises(ValueError, match="found one kind alone"):
        equal_error_rate([1.0, 2.0], [True, True])


def test_bleu_and_chinese() -> None:
    assert bleu_scores(["the cat sat on the mat"], ["the cat sat on the mat"])["bleu"] == pytest.approx(100)
    assert bleu_scores(["我喜欢学习中文"], ["我喜欢学习中文"], "zh")["bleu"] == pytest.approx(100)
    assert bleu_scores(["a dog ran"], ["the cat sat on the mat"])["bleu"] < 10
    said, meant = ["我喜欢学习中文", "好"], ["我喜欢学中文", "好"]
    assert bleu_scores(said, meant) == bleu_scores(said, meant, "zh") != bleu_scores(said, meant, "13a")
    said, meant = ["hello, my friend at sea"], ["hello, my friend at 海"]  # half of the texts is not most
    assert bleu_scores(said * 2, meant + said) == bleu_scores(said * 2, meant + said, "13a")


@pytest.mark.parametrize("text, near, tokenizer", [
    ("今日はとても良い天気ですね", "今日はとてもいい天気ですね", "ja-mecab|char"),
    ("สวัสดีครับ ยินดีต้อนรับ", "สวัสดีคะ ยินดีต้อนรับ", "char"),
    ("오늘은 날씨가 아주 좋습니다", "오늘은 날씨가 매우 좋습니다", "ko-mecab|char"),
    ("我喜欢学习中文", "我喜欢学中文", "zh"),
    ("où êtes-vous, mes amis ?", "où êtes-vous, mes chers amis ?", "13a"),
    ("привет, мои дорогие друзья и братья", "привет, мои дорогие друзья и сёстры", "13a"),
])
def test_bleu_splits_as_the_language_does(text: str, near: str, tokenizer: str) -> None:
    figures, how = bleu_figures([near], [text])
    assert 20 < figures["bleu"].value < 100 and re.search(rf"tok:({tokenizer})\b", how["bleu"]), how
    apart, composed = unicodedata.normalize("NFD", text), unicodedata.normalize("NFC", text)
    assert bleu_scores([apart], [composed]) == {"bleu": pytest.approx(100), "chrf": pytest.approx(100)}


@pytest.fixture
def no_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tools are tested in test_captions.py; each start of one takes seconds."""
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)


@pytest.mark.usefixtures("no_java")
def test_cider_prefers_the_reference() -> None:
    references = [["a dog barks loudly", "a dog is barking"], ["rain falls on a roof", "rain on the roof"],
                  ["a door slams shut", "someone slams a door"]]
    right = caption_scores(["a dog barks loudly", "rain falls on a roof", "a door slams shut"], references)["cider_d"]
    punctuated = caption_scores(["A dog barks loudly.", "Rain falls on a roof!", "A door slams shut"], references)
    near = caption_scores(["a dog barks", "rain on a window", "a door"], references)["cider_d"]
    wrong = caption_scores(["music plays", "music plays", "music plays"], references)["cider_d"]
    assert right > near > wrong == pytest.approx(0)
    assert punctuated["cider_d"] == pytest.approx(right)


@pytest.mark.parametrize("score", [wer_scores, choice_scores, bleu_scores, caption_scores])
def test_lengths_must_agree(score: object) -> None:
    for hypotheses, references in ((["a"], ["a", "b"]), ([], [])):
        with pytest.raises(ValueError, match="expected as many of each"):
            score(hypotheses, references)  # type: ignore[operator]


@pytest.mark.usefixtures("no_java")
def test_silence_is_scored_and_references_of_another_kind_are_refused() -> None:
    """A text in the place of a list would be read letter by letter."""
    assert wer_scores(["", ""], ["a b", "c"])["wer"] == 1 and bleu_scores(["", ""], ["a b", "c"])["bleu"] == 0
    assert choice_scores(["", ""], ["yes", "no"])["accuracy"] == 0
    assert set(caption_scores(["", ""], [["a b"], ["c"]]).values()) == {0.0}
    for references in (["a dog", "rain"], [["a dog"], []], [["a dog"], ()]):
        with pytest.raises(ValueError, match="expected a list of one or more texts"):
            caption_scores(["a dog", "rain"], references)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference 0 is .*; expected one text"):
        bleu_scores(["a dog"], [["a dog"]])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="found one text"):
        wer_scores("a dog", "a dog")
