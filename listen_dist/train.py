"""Train a pool of prompts and a projector on top of a frozen LLM.

    deepspeed --num_gpus 2 listen_dist/train.py --config configs/quickstart.yaml train.max_steps=50
    torchrun --nproc-per-node 2 listen_dist/train.py --config configs/quickstart.yaml
    python listen_dist/train.py --config configs/quickstart.yaml
"""

from __future__ import annotations

import sys
from os.path import expanduser
from pathlib import Path

# A launched script's own folder comes first on sys.path and would shadow other packages' modules. The folder above
# it stands there instead: a script of this checkout runs its code, wherever else the package is installed.
sys.path[:] = [str(Path(__file__).resolve().parents[1]),
               *(entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent)]

if __name__ == "__main__":
    # First of all: a signal during the imports means "start me again" too.
    from listen_dist.engine import signals

    signals.leave_when_asked()

import argparse

from listen_dist.command_line import ConfigParser


def build_parser() -> argparse.ArgumentParser:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, required=True, help="YAML file, see configs/")
    parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; not used")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, e.g. train.max_steps=50")
    return parser


if __name__ == "__main__":
    # Before torch is imported, which takes seconds: --help and a wrong option are answered at once.
    build_parser().parse_intermixed_args()

import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import torch

from listen_dist import config as configuration
from listen_dist import dist, exits, logs, tracking
from listen_dist.data.loader import find_filler, training_steps
from listen_dist.data.mixture import Mixture
from listen_dist.data.shards import ShardError
from listen_dist.data.sources import hosts_of
from listen_dist.engine import checkpoint, exports, fingerprints
from listen_dist.engine.assembly import Parts, assemble, with_pool_tasks
from listen_dist.engine.checkpoint import TrainState
from listen_dist.engine.health import report_links
from listen_dist.engine.meter import COLLAPSED, Meter, share_in_use
from listen_dist.engine.optim import build_optimizer
from listen_dist.engine.replicated import ReplicatedTrainables
from listen_dist.engine.run_lock import RunLock
from listen_dist.engine.saver import Saver
from listen_dist.engine.signals import StopRequest
from listen_dist.engine.start_up import StartUp
from listen_dist.engine.step import NonFiniteError, StepResult, train_step
from listen_dist.engine.warm_start import fit_last_layer
from listen_dist.engine.watchdog import Watchdog
from listen_dist.evaluation.decoding import check_ids
from listen_dist.evaluation.dev import DevHistory, evaluate_dev
from listen_dist.exits import RESUMABLE
from listen_dist.model_sizes import Sizes, count, llm_size
from listen_dist.planner import Cluster, plan_memory
from listen_dist.schema import Config, ConfigError
from listen_dist.structures import Batch, LoaderState

logger = logging.getLogger("listen_dist.train")

NARROW_REPORTS = 3
"""Reports in a row after which a pool is said to narrow: where k is drawn, one alone may be a small k's."""

MEMORY_CURE = ("Lower data.batch_tokens or set model.checkpointing=true; `python -m listen_dist.planner` says what a "
               "config needs")


@dataclass
class Run:
    """A run that is set up and stands at `state`."""

    config: Config
    parts: Parts
    replicated: ReplicatedTrainables
    optimizer: torch.optim.AdamW
    state: TrainState
    trackers: tracking.Trackers
    saver: Saver
    stop: StopRequest
    watchdog: Watchdog
    start_up: StartUp
    first_step: int
    """Where this process began; with `started`, for the time left."""
    started: float
    last_step: int
    """Where training ends: `train.max_steps`, or earlier where `train.max_minutes` would be over."""
    narrow: int = 0
    """The last so many reports found a narrow pool."""

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)


def parse_arguments(argv: Sequence[str] | None = None) -> Config:
    arguments = build_parser().parse_intermixed_args(argv)
    return configuration.load(arguments.config, arguments.overrides)


def find_resume(config: Config, content: Mapping[str, str]) -> tuple[Path, Config] | None:
    """The checkpoint to go on from and the config it was written with, checked; None to begin anew.

    Args:
        content: fingerprints of what the config names (see engine/fingerprints.py).
    """
    found = checkpoint.newest(Path(config.run_dir) / "checkpoints")
    if found is None:
        return None
    if config.train.resume == "never":
        raise ConfigError(f"{config.run_dir}: holds {found.name} of an earlier run; set train.resume=auto to go on "
                          "from it, or choose another run_dir")
    return found, checkpoint.check_same_config(found, config, content)


def claim_folder(config: Config) -> RunLock:
    """Make sure that `run_dir` can be written and that no other run does; rank 0 only."""
    folder = Path(config.run_dir)
    try:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "checkpoints"):
            return RunLock(folder)
    except OSError as error:
        raise ConfigError(f"run_dir = {config.run_dir!r}: cannot be written: {error}") from error


def state_of(found: tuple[Path, Config] | None, config: Config) -> TrainState:
    """Where to go on from; `finished` where nothing is left to do."""
    if found is None:
        return TrainState()
    path, saved = found
    state = checkpoint.read_state(path)
    asked_for_more = (config.train.max_steps, config.train.max_minutes) != (
        saved.train.max_steps, saved.train.max_minutes)
    return replace(state, finished=state.finished and not asked_for_more or state.step >= config.train.max_steps)


def set_up(config: Config, device: torch.device, stop: StopRequest, resume_from: Path | None, state: TrainState,
           start_up: StartUp) -> Run:
    parts = assemble(config, device)
    start_up.lap("models")
    replicated = ReplicatedTrainables(parts.model.trainable, parts.model.pool.observed)
    optimizer = build_optimizer(parts.model.trainable, config.train)
    if resume_from is not None:
        checkpoint.load_trainables(resume_from, parts.model.trainable)
        checkpoint.load_optimizer(resume_from, parts.model.trainable, optimizer)
        logger.info("going on from %s", resume_from)
    else:
        start_anew(parts)
    start_up.lap("weights")
    replicated.prove_equal(state.step)
    trackers = tracking.Trackers()
    if dist.is_main():
        (Path(config.run_dir) / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
        flat = {f"{part}.{name}" if name else part: str(value) for part, tree in asdict(config).items()
                for name, value in (tree if isinstance(tree, dict) else {"": tree}).items()}
        trackers = tracking.build_trackers(config, flat)
    folder = Path(config.run_dir)
    run = Run(config, parts, replicated, optimizer, state, trackers, Saver(folder / "checkpoints"), stop,
              Watchdog(config.parallel.stuck_seconds, folder, state.step), start_up, first_step=state.step,
              started=time.monotonic(), last_step=config.train.max_steps)
    start_up.lap("tracker")
    return run


def start_anew(parts: Parts) -> None:
    """Initial weights that are not from a seed: an earlier run's, and least squares for the projector."""
    exports.start_from(parts.config, parts.model.trainable)
    if parts.config.projector.start == "least_squares":
        fit_last_layer(parts.model, clips_of_any_rank(parts))


def clips_of_any_rank(parts: Parts) -> Iterator[Batch]:
    """The training batches in plan order, all of them, alike on every rank."""
    data = parts.config.data
    reader = parts.reader(data.train, with_targets=True)
    steps = training_steps(
        reader, parts.mixture(reader), parts.training_cost(reader), replace(data, workers=0), parts.config.train.seed,
        per_step=1, rank=0, world_size=1, start=LoaderState())
    return (batch for batches, _ in steps for batch in batches)


def summarize(run: Run) -> None:
    """Say what learns, what lies on each rank, and what memory is planned."""
    model, config = run.parts.model, run.config
    size = llm_size(config.model.llm)
    pool, projector, learned = count(model.pool), count(model.projector), count(model.trainable)
    audio = model.audio_encoder
    # The planner counts LoRA's adapters with the pool.
    sizes = Sizes(size, count(model.encoder), model.encoder.width, count(audio) if audio else 0,
                  audio.width if audio else 0, projector, learned - projector)
    frozen_projector = " (frozen)" if config.projector.freeze else ""
    held = dist.gather_objects(run.parts.sharding.bytes_held())
    adapters = f", LoRA {learned - pool - projector:,}" if config.lora.rank else ""
    logger.info("learned parameters: pool %s (%.3f %% of the LLM), projector %s%s%s", f"{pool:,}",
                100 * pool / size.parameters, f"{projector:,}", frozen_projector, adapters)
    logger.info("frozen parameters: LLM %s, speech encoder %s, audio encoder %s", f"{size.parameters:,}",
                f"{sizes.speech_parameters:,}", f"{sizes.audio_parameters:,}")
    for rank, size_held in enumerate(held):
        logger.info("rank %d of %d holds %.1f MiB of the LLM (parallel.llm = %s), all of the rest, on %s",
                    rank, len(held), size_held / 2**20, config.parallel.llm, model.device)
    cluster = Cluster(dist.world_size(), len(dist.node_ranks(config.parallel.node_size)[0]))
    plan = plan_memory(config, sizes, cluster, config.parallel.llm)
    for line in plan.lines():
        logger.info(line)


def hosts_asked(config: Config) -> set[str]:
    """The hosts that training reads from: sets, noise and impulse responses."""
    addresses = [*(entry.path for entry in (*config.data.train, *config.data.dev)),
                 config.data.augment.noise, config.data.augment.reverb]
    return {host for address in addresses if "://" in address for host in hosts_of(address)}


def train(run: Run) -> None:
    """The loop: take a step's batches, step, now and then report and save. Ends early when asked to stop."""
    config, model = run.config, run.parts.model
    reader = run.parts.reader(config.data.train, with_targets=True)
    mixture = run.parts.mixture(reader)
    for line in mixture.describe():
        logger.info(line)
    per_step = config.train.batches_per_step or dist.world_size()
    steps = training_steps(reader, mixture, run.parts.training_cost(reader), config.data, config.train.seed,
                           per_step, dist.rank(), dist.world_size(), run.state.loader,
                           pin_memory=model.device.type == "cuda")
    meter = Meter(config.pool.prompts, model.device, run.state.skipped_samples, run.state.meter,
                  hosts_asked(config))
    filler = find_filler(reader)
    history, evaluate_every = DevHistory(run.folder / "checkpoints", run.state.step), config.train.eval_every
    model.train()
    run.stop.can_wait = True
    stopping = False
    while run.state.step < run.last_step and not stopping:
        step = run.state.step
        run.watchdog.beat(step)
        before = time.perf_counter()
        batches, loader_state = next(steps)
        meter.waited(time.perf_counter() - before)
        if step == run.first_step:
            run.start_up.lap("data")
        note_skipped(run, batches)
        result = train_step(model, run.replicated, run.optimizer, config, step, run.last_step, batches, filler,
                            stop=bool(run.stop.asked))
        meter.add(result, batches)
        if step == run.first_step:
            run.start_up.lap("step")
            logger.info("%s", run.start_up)
        run.state = replace(run.state, step=step + 1, loader=loader_state)
        note_outcome(run, result)
        if run.state.step % config.train.log_every == 0 or run.state.step == run.last_step:
            report(run, meter, mixture, result.rate, float(result.grad_norm))
        last, stopping = run.state.step >= run.last_step, result.stop
        if run.state.step % config.train.checksum_every == 0 or last or stopping:
            run.replicated.prove_equal(run.state.step)
        is_best = (bool(evaluate_every) and run.state.step % evaluate_every == 0 and not stopping
                   and evaluate(run, history))
        if run.state.step % config.train.save_every == 0 or last or stopping or is_best:
            run.state = replace(run.state, finished=last, meter=meter.state())
            save(run)
    # All ranks wait for the last checkpoint: a launcher ends those that are left as soon as one has gone.
    dist.on_main(run.saver.finish)
    steps.close()  # ends the loader's processes
    passes = mixture.epochs(run.state.loader.samples)
    logger.info("gone through: %s", ", ".join(f"{label} {times:.2f} times" for label, times in passes.items()))


def evaluate(run: Run, history: DevHistory) -> bool:
    """Score the dev sets; whether this step is the best so far in anything."""
    scores, step = evaluate_dev(run.parts), run.state.step
    is_best, warnings = history.add(step, scores)
    run.trackers.log({f"dev/{task}/{score.metric}": score.value for task, score in scores.items()}, step)
    logger.info("step %d: dev %s%s", step, ", ".join(f"{task} {score.metric} {score.value:.3f}"
                                                     for task, score in scores.items()), " (a best)" * is_best)
    for warning in warnings if dist.is_main() else ():
        logger.warning("step %d: %s", step, warning)
    return is_best


def note_outcome(run: Run, result: StepResult) -> None:
    """Name the clips of a step that was left out; too many such steps in a row end the run."""
    state, limit = run.state, run.config.train.max_skipped_in_a_row
    in_a_row = 0 if result.applied else state.skipped_in_a_row + 1
    run.state = replace(state, skipped_in_a_row=in_a_row)
    if result.applied:
        return
    run.state = replace(state, skipped_steps=state.skipped_steps + 1, skipped_in_a_row=in_a_row)
    file = run.folder / f"nonfinite-rank{dist.rank()}.jsonl"
    logs.append_lines(file, [json.dumps({"step": state.step, "ids": batch.ids, "loss": out.token_loss_sum.item(),
                                         "match_loss": out.match_loss_sum.item()}) for batch, out in result.outputs])
    if in_a_row >= limit:
        raise NonFiniteError(
            f"step {state.step}: the loss or the gradient was not finite in {in_a_row} steps in a row "
            f"(train.max_skipped_in_a_row); their clips are named in {run.folder}/nonfinite-rank*.jsonl. "
            "If a few clips recur there, remove them; otherwise lower train.learning_rate, or set "
            "model.dtype=float32. The last checkpoint is from before")


def report(run: Run, meter: Meter, mixture: Mixture, rate: float, grad_norm: float) -> None:
    """One progress line, the trackers, and the stop when too much of the data is bad."""
    metrics = meter.report() | {"learning_rate": rate, "grad_norm": grad_norm}
    metrics |= {f"epochs_{label}": times for label, times in mixture.epochs(run.state.loader.samples).items()}
    metrics["clips_seen"] = float(run.state.loader.samples)
    step, config = run.state.step, run.config
    if metrics["skipped_steps"]:
        logger.warning("step %d: %d steps since the last report had a non-finite loss or gradient and were left out; "
                       "their clips are named in nonfinite-rank*.jsonl", step, metrics["skipped_steps"])
    if any(meter.retries.values()):
        logger.warning("step %d: tries of network sources that failed since the last report, all made again: %s", step,
                       ", ".join(f"{host} {count}" for host, count in meter.retries.items() if count))
    run.state = replace(run.state, skipped_samples=int(metrics["skipped_samples"]))
    run.trackers.log(metrics | {"failed_checkpoints": float(run.saver.failed)}, step)
    if config.train.max_minutes:
        keep_to_time(run, metrics["elapsed_seconds"])
    logger.info(progress_line(run, metrics))
    warn_of_collapse(run, metrics["effective_prompts"])
    bad, read = meter.skipped, run.state.loader.samples
    if read >= 100 and bad > config.data.max_bad_fraction * read:
        raise ShardError(f"{bad} of {read} samples could not be used (data.max_bad_fraction = "
                         f"{config.data.max_bad_fraction}); they are named in {skipped_file(run)}")


def warn_of_collapse(run: Run, effective: float) -> None:
    """Say when the pool gives nearly every clip the same prompts, three reports in a row, and when no longer."""
    pool, step = run.config.pool, run.state.step
    if not effective or pool.selection != "similarity" or step <= run.config.train.warmup_steps:
        return  # nothing was chosen, or nobody chooses
    before, narrow = run.narrow, share_in_use(effective, pool.k_max, pool.prompts) < COLLAPSED
    run.narrow = before + 1 if narrow else 0
    if not dist.is_main():  # all ranks know the same
        return
    if run.narrow == NARROW_REPORTS:
        logger.warning("step %d: the pool narrows: %.1f of %d prompts are effectively in use since the last report "
                       "(%d stand in front of a clip). If that stays so, the choice carries no information: try "
                       "pool.query=centred or a smaller pool.match_weight", step, effective, pool.prompts, pool.k_max)
    elif before >= NARROW_REPORTS and not narrow:
        logger.info("step %d: the pool is broad again: %.1f of %d prompts in use", step, effective, pool.prompts)


def keep_to_time(run: Run, elapsed: float) -> None:
    """Cut the number of steps to what fits `train.max_minutes`; all ranks know the same `elapsed` seconds."""
    step, limit = run.state.step, run.config.train
    left = 60 * limit.max_minutes - elapsed
    fitting = step + max(0, int(left / elapsed * (step - run.first_step)))
    run.last_step = min(limit.max_steps, fitting)


def progress_line(run: Run, metrics: dict[str, float]) -> str:
    done, left = run.state.step - run.first_step, run.last_step - run.state.step
    eta = (time.monotonic() - run.started) / done * left
    loss, match = (f"{metrics[name]:.3f}" if name in metrics else "none" for name in ("loss", "match_loss"))
    return (f"step {run.state.step}/{run.last_step} | loss {loss} | match {match} | "
            f"lr {metrics['learning_rate']:.2e} | "
            f"{metrics['clips_per_second']:.1f} clips/s | {metrics['tokens_per_second']:.0f} tokens/s | "
            f"waiting for data {100 * metrics['waiting_share']:.0f} % | "
            f"prompts in use {metrics['effective_prompts']:.1f} | left {logs.clock(eta)}")


def save(run: Run) -> None:
    if dist.is_main():
        run.saver.save(checkpoint.snapshot(run.config, run.state, run.parts.model.trainable, run.optimizer))


def skipped_file(run: Run) -> Path:
    return run.folder / f"skipped-rank{dist.rank()}.jsonl"


def note_skipped(run: Run, batches: list[Batch]) -> None:
    """Name every sample that was left out, in a file and (the first ones) in the log."""
    lines = [json.dumps(asdict(sample)) for batch in batches for sample in batch.skipped]
    if lines:
        logs.append_lines(skipped_file(run), lines)
        logger.warning("skipped %d samples, e.g. %s", len(lines), lines[0])


@contextmanager
def folder_of_our_own(config: Config) -> Iterator[None]:
    """Hold `run_dir` for this run; rank 0 does, and all ranks learn of a refusal."""
    held: list[RunLock] = []
    dist.on_main(lambda: held.append(claim_folder(config)))
    try:
        yield
    finally:
        for lock in held:
            lock.release()


def run_program(config: Config, stop: StopRequest) -> int:
    """Set up and train; the exit code."""
    start_up = StartUp()
    start_up.lap("imports")
    device = dist.setup(config.device, config.parallel.timeout_minutes)
    start_up.lap("process group")
    with folder_of_our_own(config):
        logs.setup(Path(config.run_dir) / "train.log")
        if not config.data.train:
            raise ConfigError("data.train: no set to train on; name a folder of shards")
        config = with_pool_tasks(config)
        content = dist.on_main(fingerprints.of_run, config)
        found = dist.on_main(find_resume, config, content)
        state = replace(state_of(found, config), content=content)
        if state.finished:  # before anything is loaded, and before a tracker's thread runs that would have to be ended
            logger.info("already trained for %d steps; raise train.max_steps (or train.max_minutes) to go on",
                        state.step)
            return 0
        if config.train.eval_every:
            dist.on_main(check_ids, "dev", config)
        run = set_up(config, device, stop, found and found[0], state, start_up)
        outcome: tracking.Outcome = "FAILED"
        try:
            summarize(run)
            if config.parallel.health_check:
                report_links(device)
                start_up.lap("links")
            run.started = time.monotonic()
            with run.watchdog:
                train(run)
            outcome = "FINISHED" if run.state.finished else "KILLED"
        finally:
            run.trackers.close(outcome)
        if not run.state.finished:
            logger.info("stopped after step %d, which is saved; the same command goes on from there", run.state.step)
            return RESUMABLE
        logger.info("done. Evaluate with: deepspeed listen_dist/evaluate.py --config %s",
                    run.folder / "config.yaml")
        return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; a known mistake ends it with one line instead of a traceback.

    Returns:
        the exit code (see `exits`); RESUMABLE: stopped by a signal.
    """
    code = exits.FAULT
    with StopRequest() as stop:
        try:
            code = exits.run(lambda: run_program(parse_arguments(argv), stop), MEMORY_CURE)
        finally:
            dist.shutdown(failed=code not in (0, RESUMABLE))
    return code


if __name__ == "__main__":
    sys.exit(main())
