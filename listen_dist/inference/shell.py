"""What `python -m listen_dist.infer` does once its arguments are read."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from listen_dist.data.decode import AUDIO_SUFFIXES, AudioError, is_audio_name
from listen_dist.engine import checkpoint
from listen_dist.engine.checkpoint import CheckpointError
from listen_dist.errors import ListenError
from listen_dist.inference.listener import Answer, Ask, Clip, Listener


def run(arguments: argparse.Namespace) -> int:
    """Load the model, answer every file; the exit code."""
    try:
        names, clips = inputs(arguments.files, arguments.task == "speaker_verification")
        path = newest_below(Path("runs")) if arguments.checkpoint == "latest" else Path(arguments.checkpoint)
        listener = Listener.from_checkpoint(
            path, device=arguments.device, dtype=arguments.dtype, top_k=arguments.top_k, llm=arguments.llm,
            speech_encoder=arguments.speech_encoder, audio_encoder=arguments.audio_encoder)
        ask = Ask(arguments.task, arguments.instruction, arguments.choices, arguments.max_new_tokens)
        results = listener.listen(clips, ask, arguments.batch_tokens)
        # One file that was named itself: its text alone, for use in a shell.
        bare = len(names) == 1 and not Path(arguments.files[0]).is_dir()
        return write(names, results, Form(arguments.jsonl, arguments.explain, bare))
    except BrokenPipeError:  # the reader has had enough, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def newest_below(folder: Path) -> Path:
    """The run of `folder` whose checkpoint is the newest.

    Raises:
        CheckpointError: there is none.
    """
    pointers = sorted(folder.glob("**/checkpoints/latest"), key=lambda file: file.stat().st_mtime)
    if not pointers:
        raise CheckpointError(f"--checkpoint latest: no run below {folder}/ here; train first, or name a checkpoint")
    return checkpoint.resolve(pointers[-1].parent)


def inputs(files: list[str], in_pairs: bool) -> tuple[list[str], Iterator[Clip]]:
    """Names and sources of what is asked about, in order; folders searched, stdin read when its turn comes.

    Raises:
        ListenError: an odd number of files where they go in pairs; a folder without audio.
    """
    found = [path for file in files for path in _expand(file)]
    if not in_pairs:
        return found, (_source(name) for name in found)
    if len(found) % 2:
        raise ListenError(f"speaker_verification compares two recordings each; {len(found)} were given")
    pairs = list(zip(found[::2], found[1::2], strict=True))
    return [f"{a} {b}" for a, b in pairs], ((_source(a), _source(b)) for a, b in pairs)


def _expand(file: str) -> list[str]:
    if file == "-" or not Path(file).is_dir():
        return [file]
    files = sorted(str(path) for path in Path(file).rglob("*") if path.is_file())
    inside = [path for path in files if is_audio_name(Path(path).name)]
    if not inside:
        raise ListenError(f"{file}: holds no audio file ({' '.join(sorted(AUDIO_SUFFIXES))})")
    if others := [path for path in files if path not in set(inside)]:
        # Not on stdout, which may be read by a program.
        print(f"{file}: {len(inside)} audio files; {len(others)} others are left out by their names, for instance "
              f"{_one_line(others[0])}", file=sys.stderr)
    return inside


def _one_line(name: str) -> str:
    """A file's name as it may stand in a line: line ends, tabs and their like as Python writes them."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _source(name: str) -> str | bytes:
    return sys.stdin.buffer.read() if name == "-" else name


class Form:
    """How an answer is written."""

    def __init__(self, jsonl: bool, explain: bool, bare: bool) -> None:
        self._jsonl, self._explain, self._bare = jsonl, explain, bare

    def lines(self, name: str, result: Answer | AudioError) -> str:
        """The lines of one file for stdout, without the last line end; empty for a failure in plain text."""
        if self._jsonl:
            return json.dumps({"file": name, **self._tree(result)}, ensure_ascii=False)
        if isinstance(result, AudioError):
            return ""
        text = " ".join(result.text.split())
        explained = [self._parts_line(result, n) for n in range(len(result.parts) if self._explain else 0)]
        return "\n".join([text if self._bare else f"{_one_line(name)}\t{text}", *explained])

    def _tree(self, result: Answer | AudioError) -> dict[str, object]:
        if isinstance(result, AudioError):
            return {"error": str(result)}
        parts = {"parts": [asdict(part) for part in result.parts]} if self._explain else {}
        return {"text": result.text, "seconds": round(result.seconds, 3), **parts}

    @staticmethod
    def _parts_line(result: Answer, number: int) -> str:
        part = result.parts[number]
        words = [f"  {part.start:.1f}-{part.end:.1f} s  prompts:"]
        words += [f"{prompt} ({score:.3f})" for prompt, score in zip(part.prompts, part.scores, strict=True)]
        if part.likelihoods:
            choices = zip(part.choices, part.likelihoods, strict=True)
            words += [" log p:", *(f"{choice} ({value:.2f})" for choice, value in choices)]
        return " ".join(words)


def write(names: list[str], results: Iterable[tuple[int, Answer | AudioError]], form: Form) -> int:
    """Print results in the order of the files, each as soon as those before it are there; the exit code.

    When the program is interrupted, what is known by then is printed too.
    """
    waiting: dict[int, Answer | AudioError] = {}
    following, failed = 0, 0
    bar = tqdm(total=len(names), desc="listening", unit="clip", disable=None, leave=False)  # on a terminal only
    try:
        for number, result in results:
            waiting[number] = result
            if isinstance(result, AudioError):
                failed += 1
                tqdm.write(f"error: {'-: ' if names[number] == '-' else ''}{_one_line(str(result))}", file=sys.stderr)
            while following in waiting:
                _print(form.lines(names[following], waiting.pop(following)))
                following += 1
            bar.update()
    finally:
        bar.close()
        for number in sorted(waiting):
            _print(form.lines(names[number], waiting[number]))
    return 1 if failed else 0


def _print(lines: str) -> None:
    if not lines:
        return
    try:
        tqdm.write(lines, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"the answers can't be written to stdout: {error.strerror}; send them elsewhere") from error
