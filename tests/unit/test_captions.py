"""Scores of captions: against pycocoevalcap on the same strings, with Java's tools and without them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from listen_dist.evaluation import captions
from listen_dist.evaluation.captions import WITH_JAVA, caption_figures
from listen_dist.evaluation.metrics import bleu_scores, normalize, values

pytestmark = pytest.mark.timeout(400)
needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java on this machine")

SAID = ["A dog barks loudly.", "rain on a window", "someone isn't closing a door!", "", "a bell | rings ||| twice"]
MEANT = [["a dog barks loudly", "A dog is barking - again"], ["Rain falls on a roof.", "rain on the roof"],
         ["a door slams shut", "someone slams a door; it isn't open"], ["a cat meows", "A cat is meowing."],
         ["a bell rings twice", "two rings of a bell", "the bell (rings) twice"]]


def coco(scorer: object, said: list[str], meant: list[list[str]]) -> tuple[float, np.ndarray]:
    """A score of pycocoevalcap on strings that are split already."""
    corpus, clips = scorer.compute_score(dict(enumerate(meant)), {i: [text] for i, text in enumerate(said)})
    return float(corpus), np.array(clips)


def test_cider_and_rouge_are_those_of_pycocoevalcap() -> None:
    """pycocoevalcap's `Cider` is CIDEr-D (clipped, with the length penalty), whatever its name says."""
    said = [normalize(text, "basic") for text in SAID]
    meant = [[normalize(text, "basic") for text in row] for row in MEANT]
    figures, left_out = caption_figures(SAID, MEANT, java=False)
    assert left_out == {} and set(figures) == {"cider_d", "rouge_l"}
    corpus, clips = coco(Cider(), said, meant)
    assert figures["cider_d"].value == pytest.approx(corpus, abs=1e-9) and corpus > 0.5
    for clip, expected in enumerate(clips):
        assert figures["cider_d"].of(np.eye(5)[[clip]])[0] == pytest.approx(expected, abs=1e-9)
    spoken = [i for i, text in enumerate(said) if text]  # pycocoevalcap divides by the words said
    _, rows = coco(Rouge(), [said[i] for i in spoken], [meant[i] for i in spoken])
    assert figures["rouge_l"].value == pytest.approx(rows.sum() / 5, abs=1e-9)


@needs_java
def test_javas_tools_give_what_they_give_pycocoevalcap() -> None:
    figures, left_out = caption_figures(SAID, MEANT)
    if "spice" in left_out:
        assert left_out["spice"].startswith("not computed, because its models are missing; run aac-metrics-download")
        assert "spice could not" in left_out["spider"]
    bars = [text.replace("|", " ") for text in SAID]  # they would divide the fields of METEOR's input
    tokenize = PTBTokenizer().tokenize
    meant = tokenize({i: [{"caption": text} for text in row] for i, row in enumerate(MEANT)})
    said = tokenize({i: [{"caption": text or "."}] for i, text in enumerate(bars)})
    theirs = [said[i][0] for i in range(5)], [meant[i] for i in range(5)]
    assert theirs[0][2] == "someone is n't closing a door"
    assert figures["cider_d_ptb"].value == pytest.approx(coco(Cider(), *theirs)[0], abs=1e-9)
    assert figures["cider_d_ptb"].value != pytest.approx(figures["cider_d"].value, abs=1e-3)
    corpus, clips = coco(Meteor(), *theirs)
    assert figures["meteor"].value == pytest.approx(corpus, abs=1e-9)
    assert corpus != pytest.approx(clips.mean(), abs=1e-4)  # METEOR's corpus figure is no mean of its clips'


@pytest.mark.parametrize("missing, reason", [
    ("java", "there is no Java on this machine"), ("package", "its Java tools are missing; pip install pycocoevalcap"),
])
def test_what_cannot_be_computed_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str,
                                          reason: str) -> None:
    monkeypatch.setenv("AAC_METRICS_CACHE_PATH", str(tmp_path))
    if missing == "java":
        monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(captions.shutil, "which", lambda name: "/usr/bin/java")
        monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    figures, left_out = caption_figures(SAID, MEANT)
    assert set(left_out) == set(WITH_JAVA) and not set(left_out) & set(figures)
    assert all(text.startswith(f"not computed, because {reason}") for text in left_out.values()), left_out
    assert values(figures) == values(caption_figures(SAID, MEANT, java=False)[0])


def test_one_caption_has_no_word_weights() -> None:
    figures, left_out = caption_figures(SAID[:1], MEANT[:1], java=False)
    assert set(figures) == {"rouge_l"} and "two samples or more" in left_out["cider_d"]


@pytest.mark.parametrize("tokenize, said, meant", [
    ("13a", ["the cat's on a mat.", "it rained, twice"], ["the cat is on the mat.", "it has rained twice!"]),
    ("zh", ["我喜欢学习中文。", "他去了 Beijing"], ["我喜欢学中文。", "他昨天去了 Beijing"]),
])
def test_bleu_is_that_of_sacrebleus_command(tmp_path: Path, tokenize: str, said: list[str], meant: list[str]) -> None:
    (tmp_path / "said").write_text("\n".join(said) + "\n")
    (tmp_path / "meant").write_text("\n".join(meant) + "\n")
    command = [sys.executable, "-m", "sacrebleu", tmp_path / "meant", "-i", tmp_path / "said", "-tok", tokenize,
               "-m", "bleu", "chrf", "-b", "-w", "8"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    theirs = [float(word.strip(" ,[]\"")) for word in printed.split() if word.strip(" ,[]\"")]
    ours = bleu_scores(said, meant, tokenize)
    assert [ours["bleu"], ours["chrf"]] == pytest.approx(theirs, abs=1e-7)
