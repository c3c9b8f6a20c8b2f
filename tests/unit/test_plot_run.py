"""tools/plot_run.py on made-up metrics."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib.image
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import plot_run


def test_losses_and_scores_by_task(tmp_path: Path) -> None:
    lines = [{"step": step, "loss_asr": 4.0 / step, "loss_caption": 3.0, "loss": 9.0, "clips_seen": 30.0 * step,
              "elapsed_seconds": 60.0 * step + 60} for step in (1, 2, 3, 3)]
    lines.insert(2, {"step": 2, "dev/asr/wer": 0.5})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    losses, scores = plot_run.read_curves(tmp_path)
    assert losses == {"asr": ([1, 2, 3], [4.0, 2.0, 4.0 / 3]), "caption": ([1, 2, 3], [3.0, 3.0, 3.0])}
    assert scores == {"asr wer": ([2], [0.5])}
    assert plot_run.read_curves(tmp_path, "clips")[1] == {"asr wer": ([60], [0.5])}
    assert plot_run.read_curves(tmp_path, "minutes")[0]["asr"][0] == [2, 3, 4]
    assert plot_run.main([str(tmp_path)]) == 0
    assert matplotlib.image.imread(tmp_path / "curves.png").std() > 0.01
    assert plot_run.main([str(tmp_path), "--out", str(tmp_path / "curves.docx")]) == 2, "no picture's suffix"


@pytest.mark.parametrize(("text", "reason"), [
    (None, "name the folder of a run"), ("{}\n", "metrics.jsonl:1: no line of metrics"),
    ('{"step": 1}\n', "no training loss")])
def test_what_is_no_run_is_refused(tmp_path: Path, text: str | None, reason: str,
                                   capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert plot_run.main([str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err
