"""The page: the real program, opened in a real browser, and asked without one."""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile

from listen_dist import app, infer
from listen_dist.engine import checkpoint
from listen_dist.structures import SAMPLE_RATE
from tests import launching, tiny
from tests.browser import MICROPHONE, open_tab

pytestmark = pytest.mark.timeout(600)

PREDICTIONS = {"asr": [(0, 1, 2, 3), (0, 1, 2, 4)], "caption": [(5, 6, 7, 0)]}
"""Prompts in front of some evaluated clips."""
USAGE = {"asr": [1, 1, 1, 0.5, 0.5, 0, 0, 0, 0, 0], "caption": [1, 0, 0, 0, 0, 1, 1, 1, 0, 0]}


@pytest.fixture(scope="module")
def run(untrained: Path) -> Iterator[Path]:
    """A run with a checkpoint that was evaluated."""
    weights = (checkpoint.resolve(untrained) / "trainables.safetensors").read_bytes()
    results, predictions = untrained / "results.json", untrained / "predictions.jsonl"
    results.write_text(json.dumps({"checkpoint_sha256": hashlib.sha256(weights).hexdigest()}))
    rows = [{"id": f"{task}-{i}", "task": task, "text": "", "answers": [""], "prompts": prompts, "scores": [0.1] * 4}
            for task, clips in PREDICTIONS.items() for i, prompts in enumerate(clips)]
    predictions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield untrained
    results.unlink()
    predictions.unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    soundfile.write(folder / "clip.flac", tiny.sound(1.7, 0), SAMPLE_RATE)
    soundfile.write(folder / "other.wav", tiny.sound(0.6, 1), SAMPLE_RATE)
    soundfile.write(folder / "long.flac", tiny.sound(41, 2), SAMPLE_RATE)
    (folder / "text.wav").write_text("this is no audio " * 50)
    return folder


@contextmanager
def served(run: Path, log: Path) -> Iterator[str]:
    """The program on a free port of its own choice; its address."""
    words = [sys.executable, "-m", "listen_dist.app", "--checkpoint", run, "--device", "cpu", "--port", "0",
             "--max-seconds", "40", "--max-megabytes", "1"]
    program = launching.start(words, log, {"TMPDIR": str(log.parent), "PYTHONPATH": str(launching.ROOT)})
    try:
        for _ in range(2400):
            found = re.search(r"at (http://127\.0\.0\.1:\d+) ", log.read_text(encoding="utf-8"))
            if found or program.poll() is not None:
                break
            time.sleep(0.1)
        assert found, log.read_text(encoding="utf-8")
        yield found[1]
        program.send_signal(signal.SIGTERM)  # Ctrl-C goes the same way
        assert launching.wait(program, log, 60).code == 0, log.read_text(encoding="utf-8")
        assert not list(log.parent.glob("listen_dist-*")), "uploads are left behind"
    finally:
        launching.kill_tree(program)


@pytest.fixture(scope="module")
def address(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(run, tmp_path_factory.mktemp("page") / "log") as address:
        yield address


@pytest.fixture(scope="module")
def tab(address: str) -> Iterator[Any]:
    with open_tab(*MICROPHONE) as tab:
        asked: list[str] = []
        tab.on("request", lambda request: asked.append(request.url))
        yield tab
        assert all(url.startswith((address, f"blob:{address}", "data:")) for url in asked), asked


@pytest.fixture
def page(tab: Any, address: str) -> Any:
    tab.goto(address)
    tab.locator("#task option").first.wait_for(state="attached")
    return tab


def choose(page: Any, file: Path, slot: int = 0) -> None:
    page.locator(".slot").nth(slot).locator("input[type=file]").set_input_files(file)
    page.locator(".slot").nth(slot).locator(".chosen").wait_for()


def answer(page: Any) -> str:
    page.click("#ask")
    page.locator("#timing:not(:empty)").wait_for()
    return page.inner_text("#answer")


def said_by_the_shell(run: Path, capfd: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capfd.readouterr()
    assert infer.main([*map(str, words), "--checkpoint", str(run), "--device", "cpu", "--jsonl", "--explain"]) == 0
    return json.loads(capfd.readouterr().out)


# --- in the browser ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_clip_gets_the_text_that_the_shell_gives(page: Any, run: Path, folder: Path, tmp_path: Path,
                                                   capfd: pytest.CaptureFixture[str]) -> None:
    choose(page, folder / "clip.flac")
    assert page.inner_text(".name") == "clip.flac" and page.inner_text(".length") == "1.7 s"
    shown, shell = answer(page), said_by_the_shell(run, capfd, folder / "clip.flac")
    assert shown.split() == shell["text"].split() and shown
    timing = page.inner_text("#timing")
    assert re.match(r"First words after \d+\.\d\d s, all after \d+\.\d\d s, for 1\.7 s of audio", timing)
    rows = [row.split("\t") for row in page.locator("#prompts tbody tr").all_inner_texts()]
    (part,) = shell["parts"]
    assert [(row[0], row[1]) for row in rows] == [
        (str(prompt), f"{score:.3f}") for prompt, score in zip(part["prompts"], part["scores"], strict=True)]
    for row, prompt in zip(rows, part["prompts"], strict=True):
        tasks = [f"{task} {usage[prompt]:.0%}".replace("%", " %") for task, usage in USAGE.items() if usage[prompt]]
        assert sorted(re.findall(r"\w+ \d+ %", row[-1])) == sorted(tasks)
        assert tasks or "hardly any" in row[-1]
    widths = [bar.bounding_box()["width"] for bar in page.locator("#prompts .fill").all()]
    assert widths == sorted(widths, reverse=True) and widths[0] > 100
    picture = tmp_path / "page.png"
    page.screenshot(path=picture, full_page=True)
    assert picture.stat().st_size > 10_000


@pytest.mark.usefixtures("one_thread")
def test_a_pair_a_question_and_choices(page: Any, run: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page.select_option("#task", "speaker_verification")
    choose(page, folder / "clip.flac")
    page.click("#ask")
    assert page.inner_text("#error") == "Choose two recordings first."
    choose(page, folder / "other.wav", 1)
    shell = said_by_the_shell(run, capfd, folder / "clip.flac", folder / "other.wav", "--task", "speaker_verification")
    assert answer(page) == shell["text"]
    assert sorted(row.split("\t")[0] for row in page.locator("#likelihoods tr").all_inner_texts()) == ["no", "yes"]
    page.select_option("#task", "speech_qa")
    page.click("#ask")
    page.get_by_text("write a question first").wait_for()
    page.fill("#instruction", "Which words?")
    page.fill("#choices", "please hold, the line is busy")
    shell = said_by_the_shell(run, capfd, folder / "clip.flac", "--instruction", "Which words?", "--choices",
                              "please hold,the line is busy")
    assert answer(page) == shell["text"]


def test_what_is_no_audio_is_said_kindly(page: Any, folder: Path) -> None:
    for name, said in (("text.wav", "text.wav: this is not an audio file, or one that is damaged"),
                       ("long.flac", "long.flac: 41.0 s long by its header; the limit is 40 s")):
        page.locator(".slot input[type=file]").first.set_input_files(folder / name)
        page.get_by_text(said, exact=True).wait_for()
        assert page.locator(".chosen").first.is_hidden()
    choose(page, folder / "clip.flac")
    assert page.locator("#error").is_hidden() and answer(page)


def test_a_microphone(page: Any) -> None:
    page.locator(".record").first.click()
    page.get_by_text(re.compile(r"stop \(0\.[5-9] s\)|stop \([1-9]")).first.wait_for()
    page.locator(".record").first.click()
    page.locator(".chosen").first.wait_for()
    assert page.inner_text(".name") == "recording.webm" and float(page.inner_text(".length").split()[0]) > 0.2
    assert answer(page)


# --- without a browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def web(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60) as web:
        yield web


def send(web: httpx.Client, file: Path, name: str | None = None) -> str:
    received = web.post("/clips", params={"name": name or file.name}, content=file.read_bytes())
    return received.raise_for_status().json()["clip"]


def test_nothing_but_the_page_can_be_read(web: httpx.Client, address: str, folder: Path, run: Path) -> None:
    key = send(web, folder / "clip.flac", "../../../escaped.g722.flac")
    for path in ("/clips", f"/clips/{key}", f"/{key}", "/../app.py", "/%2e%2e/%2e%2e/etc/passwd", "/docs",
                 "/openapi.json", "/static/page.py", "/page.py"):
        assert web.get(path).status_code in (404, 405), path
    for clip in ("../../etc/passwd", str(folder / "clip.flac"), "", key + "x"):
        refused = web.post("/answers", json={"clips": [clip]})
        assert refused.status_code == 404 and "no longer on the server" in refused.json()["error"]
    assert web.get("/").headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("headers, said", [
    ({"Host": "elsewhere.example"}, "not called elsewhere.example"),
    ({"Origin": "http://elsewhere.example"}, "another site"), ({"Origin": "null"}, "another site"),
])
def test_other_sites_are_refused(web: httpx.Client, headers: dict[str, str], said: str) -> None:
    for refused in (web.get("/about", headers=headers), web.post("/clips", headers=headers, content=b"x")):
        assert refused.status_code == 403 and said in refused.json()["error"]


@pytest.mark.parametrize("body, said", [
    ({"task": "asrr"}, "did you mean 'asr'"), ({"task": "speech_qa"}, "write a question"),
    ({"task": "speaker_verification"}, "two recordings"), ({"choices": ["yes"]}, "two or more"),
    ({"instruction": "x" * 2000}, "instruction: "), ({"clips": ["a"] * 3}, "clips: "),
])
def test_questions_that_make_no_sense(web: httpx.Client, folder: Path, body: dict[str, Any], said: str) -> None:
    refused = web.post("/answers", json={"clips": [send(web, folder / "clip.flac")], **body})
    assert refused.status_code == 422 and said in refused.json()["error"]


def test_too_many_bytes_are_not_kept(web: httpx.Client) -> None:
    refused = web.post("/clips", params={"name": "big.wav"}, content=bytes(2**20 + 1))
    assert refused.status_code == 413 and refused.json()["error"] == "big.wav: larger than the limit of 1 MB"
    assert web.post("/clips", content=b"").json()["error"] == "recording: empty file (0 bytes)"


def test_any_format_is_decoded_or_named(web: httpx.Client, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 8_000)
    for container, subtype in (("WAV", "GSM610"), ("WAV", "G721_32"), ("AU", "G723_24"), ("WAV", "NMS_ADPCM_16"),
                               ("WAV", "PCM_16")):
        soundfile.write(tmp_path / "a", noise, 8_000, format=container, subtype=subtype)
        send(web, tmp_path / "a", "a.g722" if subtype == "PCM_16" else "a")
    refused = web.post("/clips", params={"name": "a.m3u8"}, content=b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    assert refused.status_code == 422 and "not an audio file" in refused.json()["error"]


def test_who_leaves_makes_room(web: httpx.Client, folder: Path) -> None:
    """More readers than may wait leave in the middle; who comes then is answered."""
    question = {"clips": [send(web, folder / "clip.flac")], "task": "caption"}
    for _ in range(10):
        for _ in range(300):  # until the server has noticed that the one before has gone
            with web.stream("POST", "/answers", json=question) as stream:
                if stream.status_code == 200:
                    assert "text" in json.loads(next(stream.iter_lines()))
                    break
            time.sleep(0.1)
        assert stream.status_code == 200
    *_, last = web.post("/answers", json=question).raise_for_status().text.splitlines()
    assert json.loads(last)["answer"]["text"]


def test_a_port_that_is_taken_and_a_checkpoint_that_is_none(address: str, run: Path,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main(["--checkpoint", str(run), "--port", address.rpartition(":")[2]]) == 2
    assert "take another --port" in capsys.readouterr().err
    assert app.main(["--checkpoint", "/nowhere"]) == 2
    assert "/nowhere: no checkpoint here" in capsys.readouterr().err


def test_nothing_heavy_is_imported_for_help() -> None:
    code = ("import sys, listen_dist.app as app\n"
            "try: app.main(['--help'])\nexcept SystemExit: pass\n"
            "assert not {'torch', 'fastapi', 'numpy'} & set(sys.modules), 'heavy'\n")
    assert "127.0.0.1" in launching.run([sys.executable, "-c", code], 60).check().output
