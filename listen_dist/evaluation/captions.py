"""Scores of captions by aac-metrics.

`cider_d` and `rouge_l` are computed the same on every machine, on words after Whisper's basic
normalisation. What the literature reports besides wants Java: `cider_d_ptb` (the same after the PTB
tokenizer), `meteor`, `spice` and `spider`. What cannot be computed is left out, with the reason.

The Java tools are found where `aac-metrics-download` puts them, or else (PTB tokenizer and METEOR) inside
the package pycocoevalcap.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from listen_dist.evaluation.bootstrap import Figure, ratio
from listen_dist.evaluation.wording import nfc, normalize, words

_SPLIT = "Whisper's basic normalisation, split at spaces and around each character of a script without them"
TOKENIZERS = {"cider_d": _SPLIT, "rouge_l": _SPLIT,
              "cider_d_ptb": "PTB", "meteor": "PTB", "spice": "PTB", "spider": "PTB"}
WITH_JAVA = ("cider_d_ptb", "meteor", "spice", "spider")
FAILURES = (OSError, RuntimeError, ValueError, subprocess.SubprocessError)
_JARS = {"aac-metrics/stanford_nlp/stanford-corenlp-3.4.1.jar": "tokenizer/stanford-corenlp-3.4.1.jar",
         "aac-metrics/meteor/meteor-1.5.jar": "meteor/meteor-1.5.jar",
         "aac-metrics/meteor/data": "meteor/data"}
"""Where aac-metrics looks, and where it lies in pycocoevalcap."""
_SPICE = "aac-metrics/spice/spice-1.0.jar"


def caption_figures(hypotheses: Sequence[str], references: Sequence[Sequence[str]], java: bool = True,
                    ) -> tuple[dict[str, Figure], dict[str, str]]:
    """The figures, and for each that could not be computed the reason.

    For the intervals CIDEr-D's word weights stay those of the whole split, and METEOR's corpus figure
    moves with the mean of its clips.

    Args:
        java: False leaves the four metrics that want Java out, without a word.
    """
    from aac_metrics.functional import cider_d, rouge_l  # takes seconds to import

    said = [words(normalize(text, "basic")) for text in hypotheses]
    meant = [[words(normalize(text, "basic")) or "(none)" for text in row] for row in references]
    figures: dict[str, Figure] = {}
    left_out: dict[str, str] = {}
    if len(said) > 1:
        figures["cider_d"] = ratio(cider_d(said, meant)[1]["cider_d"].tolist())
    else:
        left_out["cider_d"] = "not computed, because it needs two samples or more"
    figures["rouge_l"] = ratio(rouge_l(said, meant)[1]["rouge_l"].tolist())
    if java:
        with java_tools() as found:
            _add_java_figures(figures, left_out, hypotheses, references, found)
    return figures, left_out


def _add_java_figures(figures: dict[str, Figure], left_out: dict[str, str], hypotheses: Sequence[str],
                      references: Sequence[Sequence[str]], tools: Path | str) -> None:
    from aac_metrics.functional import cider_d, meteor, spice
    from aac_metrics.utils import checks
    from aac_metrics.utils.tokenization import preprocess_mono_sents, preprocess_mult_sents

    # It refuses newer versions beforehand; the tokenizer and METEOR run on them (see the tests), and what
    # does not run says so.
    checks.MAX_JAVA_MAJOR_VERSION = 99
    if isinstance(tools, str):
        left_out.update(dict.fromkeys(WITH_JAVA, f"not computed, because {tools}"))
        return
    try:
        said = preprocess_mono_sents([_line(text) for text in hypotheses], cache_path=tools)
        meant = preprocess_mult_sents([[_line(text) for text in row] for row in references], cache_path=tools)
    except FAILURES as error:
        left_out.update(dict.fromkeys(WITH_JAVA, _reason("the tokenizer failed: ", error)))
        return

    def attempt(name: str, score: Callable[[], Figure]) -> None:
        try:
            figures[name] = score()
        except FAILURES as error:
            left_out[name] = _reason("", error)

    def meteor_figure() -> Figure:
        corpus, clips = meteor(said, meant, cache_path=tools)
        moved = clips["meteor"] - clips["meteor"].mean() + corpus["meteor"]
        return ratio(moved.tolist())

    attempt("cider_d_ptb", lambda: ratio(cider_d(said, meant)[1]["cider_d"].tolist()))
    attempt("meteor", meteor_figure)
    if (tools / _SPICE).is_file():
        attempt("spice", lambda: ratio(spice(said, meant, cache_path=tools)[1]["spice"].tolist()))
    else:
        left_out["spice"] = ("not computed, because its models are missing; run aac-metrics-download (no Python "
                             "package holds them)")
    missing = [name for name in ("spice", "cider_d_ptb") if name not in figures]
    if missing:
        left_out["spider"] = f"not computed, because {' and '.join(missing)} could not be computed"
    else:
        both = figures["spice"], figures["cider_d_ptb"]
        figures["spider"] = Figure(len(said), lambda counts: (both[0].of(counts) + both[1].of(counts)) / 2)


@contextmanager
def java_tools() -> Iterator[Path | str]:
    """A folder as aac-metrics wants it, or the reason why there is none."""
    from aac_metrics.utils.globals import get_default_cache_path

    downloaded = Path(get_default_cache_path())
    package = importlib.util.find_spec("pycocoevalcap")
    if shutil.which("java") is None:
        yield "there is no Java on this machine; install a Java runtime (version 8 to 17)"
    elif (downloaded / next(iter(_JARS))).is_file():
        yield downloaded
    elif package is None or package.submodule_search_locations is None:
        yield "its Java tools are missing; pip install pycocoevalcap==1.2, or run aac-metrics-download"
    else:
        inside = Path(package.submodule_search_locations[0])
        with tempfile.TemporaryDirectory() as folder:
            for wanted, there in _JARS.items():
                (Path(folder) / wanted).parent.mkdir(parents=True, exist_ok=True)
                (Path(folder) / wanted).symlink_to(inside / there)
            yield Path(folder)


def _reason(where: str, error: Exception) -> str:
    first = next(iter(str(error).splitlines()), type(error).__name__)
    return f"not computed, because {where}{first}"


def _line(text: str) -> str:
    """One line, since the tools count lines, without the bars that divide METEOR's fields; never empty."""
    return " ".join(nfc(text).replace("|", " ").split()) or "."
