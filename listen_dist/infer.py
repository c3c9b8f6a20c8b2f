"""Listen to audio files with a trained checkpoint: text per file, in the order of the files.

    python -m listen_dist.infer a.flac b.mp3 --checkpoint runs/quickstart
    python -m listen_dist.infer recordings/ --task caption --jsonl > captions.jsonl
    python -m listen_dist.infer a.wav b.wav --task speaker_verification
    python -m listen_dist.infer call.mp3 --instruction "Which language?" --choices english,french --explain
    ffmpeg … -f wav - | python -m listen_dist.infer -

Any format that soundfile or PyAV (FFmpeg) decodes, any rate, any number of channels. Recordings longer than the
encoder's window are cut in pauses for `asr`; other tasks refuse them.

Exit codes: 0 all files answered; 1 some files could not be used, each is named on stderr and the others'
answers are printed; 2 wrong usage, no usable checkpoint or frozen model, out of memory, stdout can't be written (disk
full, no permission); 130 interrupted by Ctrl-C, the answers until then are printed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from os.path import expanduser

from listen_dist import exits
from listen_dist.errors import ListenError, print_in_any_locale
from listen_dist.inference.options import add_model
from listen_dist.tasks import TASKS, get_task


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m listen_dist.infer", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE", help="audio file, folder (searched at all depths), pipe, "
                        "or - for the bytes of one file on stdin; two recordings a question for speaker_verification")
    parser.add_argument("--checkpoint", type=expanduser, default="latest", metavar="DIR",
                        help="export, checkpoint or run folder; `latest` (default): the newest checkpoint below runs/")
    parser.add_argument("--task", metavar="NAME",
                        help=f"{', '.join(TASKS)} (default asr; speech_qa with --instruction)")
    parser.add_argument("--instruction", default="", metavar="TEXT", help="a question of your own")
    parser.add_argument("--choices", default="", metavar="A,B,…", help="answer with the likeliest of these")
    parser.add_argument("--max-new-tokens", type=int, metavar="N",
                        help="longest answer in tokens (default: by task and length of the clip)")
    parser.add_argument("--jsonl", action="store_true", help="one JSON object a file, also for files that failed")
    parser.add_argument("--explain", action="store_true", help="also the prompts picked and their scores")
    parser.add_argument("--top-k", type=int, metavar="K", help="prompts to pick (default: as trained); fewer make the "
                        "input shorter and may cost quality. The quickstart (10 prompts, k = 4) has WER 0.519 at 4, "
                        "0.519 at 2, 0.574 at 1, within chance of each other: docs/inference.md")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N",
                        help="LLM input tokens of one batch (default 2048)")
    add_model(parser)
    arguments = parser.parse_args(argv)
    arguments.task = arguments.task or ("speech_qa" if arguments.instruction else "asr")
    arguments.choices = tuple(choice.strip() for choice in arguments.choices.split(",") if choice.strip())
    try:
        check(arguments)
    except ListenError as error:
        parser.error(str(error))
    return arguments


def check(arguments: argparse.Namespace) -> None:
    """What can be known before anything is loaded.

    Raises:
        ListenError: naming the option and the cure.
    """
    task = get_task(arguments.task)
    if not task.instruction and not arguments.instruction:
        raise ListenError(f"--task {task.name}: needs a question, --instruction \"…\"")
    if len(arguments.choices) == 1 or len(set(arguments.choices)) < len(arguments.choices):
        raise ListenError("--choices: give two or more different answers, separated by commas")
    if arguments.max_new_tokens is not None and arguments.max_new_tokens < 1:
        raise ListenError("--max-new-tokens: must be at least 1")
    if arguments.batch_tokens < 32:
        raise ListenError("--batch-tokens: must be at least 32")
    if sum(file in ("-", "/dev/stdin", "/dev/fd/0") for file in arguments.files) > 1:
        raise ListenError("-: stdin can be read once only")


def listen(arguments: argparse.Namespace) -> int:
    # torch and transformers take seconds, which neither --help nor a wrong option needs.
    from listen_dist.inference import shell

    return shell.run(arguments)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    print_in_any_locale()
    try:
        return exits.run(lambda: listen(parse_arguments(argv)), "Lower --batch-tokens")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
