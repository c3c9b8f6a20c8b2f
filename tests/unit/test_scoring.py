"""From predictions to results.json's entries: metrics by task, baselines, intervals, what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from listen_dist.errors import ListenError
from listen_dist.evaluation.metrics import wer_scores
from listen_dist.evaluation.predictions import Prediction
from listen_dist.evaluation.results import table
from listen_dist.evaluation.scoring import baseline_for, entry_for, own_scores, score_task

pytestmark = pytest.mark.timeout(120)


def rows(task: str, said: list[str], answers: list[tuple[str, ...]], choices: tuple[str, ...] = (),
         likelihoods: list[tuple[float, ...]] | None = None) -> list[Prediction]:
    return [Prediction(f"{task}-{i}", task, text, meant, (), (), choices, likelihoods[i] if likelihoods else ())
            for i, (text, meant) in enumerate(zip(said, answers, strict=True))]


def test_baselines_are_of_the_split_itself() -> None:
    pairs = rows("speaker_verification", ["no"] * 3, [("yes",), ("no",), ("yes",)])
    name, said = baseline_for("speaker_verification", pairs)
    assert (name, [row.text for row in said]) == ("most_frequent", ["yes"] * 3)
    assert score_task("speaker_verification", said).figures["accuracy"].value == pytest.approx(2 / 3)
    name, said = baseline_for("asr", rows("asr", ["x", "y"], [("a b",), ("c",)]))
    assert (name, [row.text for row in said]) == ("silence", ["", ""])
    assert score_task("asr", said).figures["wer"].value == 1.0
    assert score_task("translation", rows("translation", ["", ""], [("a",), ("b",)])).figures["bleu"].value == 0


def test_an_entry_has_figures_intervals_and_the_baselines_own() -> None:
    likelihoods = [(-1.0, -2.0), (-3.0, -1.0), (-1.0, -1.5), (-0.5, -4.0)]
    answers = [("yes",), ("no",), ("no",), ("yes",)]
    entry = entry_for("speaker_verification", rows("speaker_verification", ["yes", "no", "yes", "yes"], answers,
                                                   ("yes", "no"), likelihoods))
    assert entry["metrics"] == {"accuracy": 0.75, "unweighted_accuracy": 0.75, "eer": 0.0}
    assert entry["baseline"] == {"accuracy": 0.5, "unweighted_accuracy": 0.5, "eer": 0.5}
    assert entry["answered_by"] == {"likelihood": 4} and entry["samples"] == 4
    low, high = entry["intervals"]["accuracy"]
    assert 0 <= low < 0.75 < high <= 1


def test_the_eer_wants_all_samples_asked_so_and_both_answers() -> None:
    def metrics(answers: list[tuple[str, ...]], likelihoods: list[tuple[float, ...]]) -> set[str]:
        return set(score_task("speaker_verification", rows("speaker_verification", ["yes", "no"], answers,
                                                           ("no", "yes"), likelihoods)).figures)

    assert "eer" in metrics([("yes",), ("no",)], [(-2.0, -1.0), (-1.0, -2.0)])
    assert "eer" not in metrics([("yes",), ("yes",)], [(-2.0, -1.0), (-1.0, -2.0)])
    assert "eer" not in metrics([("yes",), ("no",)], [(-2.0, -1.0), ()])


def test_questions_with_free_answers_are_scored_as_text() -> None:
    answers = [("the red car", "a red car"), ("two",)]
    free = entry_for("speech_qa", rows("speech_qa", ["A red car.", "three"], answers))
    assert free["metric"] == "rouge_l" and free["metrics"]["exact_match"] == 0.5
    assert free["metrics"]["rouge_l"] == pytest.approx(0.5)
    closed = entry_for("speech_qa", rows("speech_qa", ["two", "one"], [("two",), ("two",)], ("one", "two")))
    assert closed["metric"] == "accuracy" and closed["metrics"]["accuracy"] == 0.5
    assert closed["answered_by"] == {"generation": 2}


def test_chinese_is_split_as_chinese() -> None:
    scores = score_task("translation", rows("translation", ["我喜欢学习中文"], [("我喜欢学习中文",)]))
    assert scores.figures["bleu"].value == pytest.approx(100)
    assert "tok:zh" in scores.computed_by["bleu"] and "version:" in scores.computed_by["chrf"]


def transcripts(said: list[str], meant: list[str], language: str) -> list[Prediction]:
    return [replace(row, language=language) for row in rows("asr", said, [(text,) for text in meant])]


def test_the_main_figure_and_the_rules_follow_the_language() -> None:
    chinese = score_task("asr", transcripts(["我喜欢学习中文"], ["我喜欢学中文"], "zh"))
    assert chinese.metric == "cer" and chinese.figures["cer"].value == pytest.approx(1 / 6)
    assert "written without spaces" in chinese.computed_by["cer"] and "basic rules" in chinese.computed_by["cer"]
    english = score_task("asr", transcripts(["colour"], ["color"], "en"))
    assert english.metric == "wer" and english.figures["wer"].value == 0 and english.figures["wer_basic"].value == 1
    assert english.computed_by["wer"] == "Whisper's English rules (numbers, spelling, fillers): 1 clips"
    nameless = score_task("asr", transcripts(["colour", "की"], ["color", "की"], "")).computed_by["wer"]
    assert "English rules (numbers, spelling, fillers): 1 clips; Whisper's basic" in nameless
    assert "2 of them name no language, and English was taken where all letters are Latin" in nameless


def test_references_without_words_are_counted_and_alone_give_no_figure() -> None:
    mixed = transcripts(["so said the cat", "a dog", ""], ["[noise]", "a cat", "♪"], "en")
    entry = entry_for("asr", mixed)
    assert entry["metrics"]["insertions"] == 4 and entry["metrics"]["wer"] == 5 / 2
    assert entry["references_without_words"] == 2 and "2 references hold no word" in table({"asr": entry})
    assert own_scores(score_task("asr", mixed), 3) == [{"wer": None}, {"wer": 0.5}, {"wer": None}]
    alone = entry_for("asr", mixed[::2])
    assert alone["metrics"] == {} and alone["not_computed"] == {
        "wer": "not computed, because no reference has a word left once it is normalised"}
    assert "not computed, because no reference" in table({"asr": alone})


def test_words_said_where_nothing_is_said_are_insertions() -> None:
    figures = score_task("asr", rows("asr", ["hello there", "", "a b"], [("",), ("",), ("a b",)])).figures
    assert (figures["insertions"].value, figures["wer"].value) == (2, 1.0)


def test_a_missing_reference_is_refused() -> None:
    for task, answers in (("asr", ()), ("translation", ("",)), ("asr", ("a", " ")), ("asr", ("", ""))):
        with pytest.raises(ListenError, match=f"sample '{task}-0' has no reference"):
            score_task(task, rows(task, ["x"], [answers]))
    with pytest.raises(ListenError, match="no prediction to score; is the split empty"):
        score_task("asr", [])


def test_the_table_says_which_is_better_and_how_sure() -> None:
    def entry(metric: str, better: str, ours: float, theirs: float) -> dict[str, object]:
        return {"samples": 3, "skipped": 2, "metric": metric, "better": better, "metrics": {metric: ours},
                "intervals": {metric: (ours - 0.1, ours + 0.1)}, "baseline": {metric: theirs},
                "baseline_name": "silence"}

    alone = {"samples": 1, "skipped": 0, "metric": "cider_d", "better": "higher", "metrics": {}, "baseline": {},
             "not_computed": {"cider_d": "not computed, because it needs two samples or more"}}
    heard = entry("wer", "lower", 0.3, 1.0) | {"ended_by": {"eos": 1, "line": 1, "limit": 1}}
    heard["metrics"] = wer_scores(["a b c d e", "x"], ["a b c", "y z"]) | {"wer": 0.3}  # type: ignore[operator]
    text = table({"asr": heard, "emotion": entry("accuracy", "higher", 0.3, 0.5),
                  "language_id": entry("accuracy", "higher", 0.5, 0.5), "caption": alone})
    assert "of 5 reference words: 1 substitutions (20.0 %), 1 deletions (20.0 %), 2 insertions (40.0 %)\n" in text
    assert "1 answers would have gone on after their line's end, and were cut there\n" in text
    assert "1 answers reached the limit of tokens\n" in text
    text = [line for line in text.splitlines() if not line.startswith(" ")]
    assert "(better;" in text[1] and "(NOT better;" in text[2] and "(NOT better;" in text[3]
    assert text[1].split()[:3] == ["asr", "3", "2"]
    assert "0.200 … 0.400" in text[1] and "not computed, because" in text[4]
