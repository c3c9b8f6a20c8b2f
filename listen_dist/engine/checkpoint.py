"""Checkpoints: small folders of safetensors and JSON, written beside and then renamed.

    step-000200/
        trainables.safetensors   pool and projector, fp32
        optimizer.safetensors    AdamW's moments, by parameter name
        config.yaml              the resolved configuration
        state.json               step, loader cursor, sums since the last report, fingerprints of the sets and of the
                                 frozen models, sha256 of the files above
    latest                       the name of the newest complete folder; moved last
    best.json                    dev scores (see evaluation/dev.py); the steps it names as best are never dropped

No frozen weight is in it, and nothing in it can run code. engine/saver.py writes them from a thread.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

from listen_dist.config import differences, load, to_yaml
from listen_dist.data.manifest import file_sha256
from listen_dist.errors import ListenError
from listen_dist.schema import Config, ConfigError
from listen_dist.structures import LoaderState

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = ("run_dir", "device", "parallel.", "eval.", "tracking.", "data.test", "data.dev", "data.workers",
                  "data.cache_dir", "data.cache_gib", "data.timeout_seconds", "data.retries",
                  "train.max_steps", "train.max_minutes", "train.log_every", "train.save_every", "train.keep",
                  "train.checksum_every", "train.eval_every", "train.eval_limit", "train.resume",
                  "train.max_skipped_in_a_row", "pool.backend", "pool.top_k", "model.attention",
                  "model.checkpointing", "model.compile")
"""Keys that may differ between a checkpoint and the run that goes on from it."""


class CheckpointError(ListenError):
    """A checkpoint that cannot be used; the first line names the file and the cure."""


@dataclass(frozen=True)
class TrainState:
    """All of a run that is not a tensor. Generators are functions of (seed, step), so none is stored."""

    step: int = 0
    """Optimizer steps done."""
    loader: LoaderState = LoaderState()
    skipped_steps: int = 0
    """Steps left out because the loss or the gradient was not finite."""
    skipped_samples: int = 0
    finished: bool = False
    """The run came to its end (`train.max_steps`, or earlier by `train.max_minutes`)."""
    skipped_in_a_row: int = 0
    """How many of the `skipped_steps` were the last ones."""
    meter: Mapping[str, Any] = field(default_factory=dict)
    """The sums of the steps since the last report (see `Meter.state`)."""
    content: Mapping[str, str] = field(default_factory=dict)
    """What it was trained with: fingerprints of the sets and frozen models by config key (see fingerprints.py)."""


@dataclass(frozen=True)
class Snapshot:
    """A copy, on the host, of all that a checkpoint holds; training may go on while it is written."""

    config: Config
    state: TrainState
    trainables: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]


def snapshot(config: Config, state: TrainState, module: nn.Module, optimizer: torch.optim.Optimizer) -> Snapshot:
    """Copy the learned parameters and AdamW's moments (`parameter/moment`) to the host."""
    def copied(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("cpu", copy=True).contiguous()

    moments = {f"{name}/{key}": copied(value)
               for name, p in module.named_parameters() for key, value in optimizer.state.get(p, {}).items()}
    return Snapshot(config, state, {key: copied(value) for key, value in module.state_dict().items()}, moments)


def write(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder`/step-N, move `latest`, drop all but the newest `train.keep` and the best. Rank 0 only.

    Raises:
        OSError: disk full, no permission …; what was there before is as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{snapshot.state.step:06d}"
    for leftover in folder.glob(".step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(leftover, ignore_errors=True)
    beside = folder / f".{name}.tmp"
    files = {"trainables.safetensors": to_bytes(snapshot.trainables),
             "optimizer.safetensors": to_bytes(snapshot.moments),
             "config.yaml": to_yaml(snapshot.config).encode()}
    hashes = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    state = {"format_version": 1, **asdict(snapshot.state), "sha256": hashes}
    try:
        beside.mkdir()
        for file, content in (files | {"state.json": json.dumps(state, indent=1).encode()}).items():
            _write_synced(beside / file, content)
        _sync(beside)
        target = _move_into_place(beside, folder / name)
        point(folder, name)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)  # half a checkpoint would fill the disk further
        raise
    _drop_old(folder, snapshot.state.step, snapshot.config.train.keep)
    return target


def point(folder: Path, name: str) -> None:
    """Let `latest` name another checkpoint of the folder."""
    beside = folder / ".latest.tmp"
    _write_synced(beside, f"{name}\n".encode())
    beside.rename(folder / "latest")
    _sync(folder)


def _move_into_place(beside: Path, target: Path) -> Path:
    """Rename; one of the same step that is there (the run went back to an older one) goes after that."""
    old = target.with_name(f".{target.name}.old")
    if target.exists():
        target.rename(old)
    beside.rename(target)
    shutil.rmtree(old, ignore_errors=True)
    return target


def _drop_old(folder: Path, step: int, keep: int) -> None:
    # Later ones are there when the run went back to an older one: it will write them anew.
    until_now = [path for path in complete(folder) if _step_of(path) <= step]
    for old in until_now[:-keep]:
        if _step_of(old) not in _best_steps(folder):
            shutil.rmtree(old, ignore_errors=True)


def _latest(folder: Path) -> str:
    try:
        return (folder / "latest").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _best_steps(folder: Path) -> set[int]:
    """Steps that best.json names, whose checkpoints are kept."""
    file = folder / "best.json"
    try:
        best = json.loads(file.read_text(encoding="utf-8"))["best"] if file.is_file() else {}
    except (OSError, ValueError, KeyError):  # damaged: then only the newest ones are kept
        best = {}
    return {entry["step"] for entry in best.values()}


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("step-*")
                   if path.name.removeprefix("step-").isdigit() and (path / "state.json").is_file()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or with a warning the newest usable one before it; None where none is.

    Raises:
        CheckpointError: there are some, and all are damaged.
    """
    there, name = complete(folder), _latest(folder)
    named = folder / name
    if named in there:
        there = there[: there.index(named) + 1]
    elif name:
        logger.warning("%s: names %r, which is not a complete checkpoint here", folder / "latest", name)
    damage: list[str] = []
    for path in reversed(there):
        try:
            read_state(path)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        for line in damage:
            logger.warning("%s", line)
        if damage or (name and path != named):
            logger.warning("going back to %s", path)
        return path
    if damage or name:
        raise CheckpointError(f"{folder}: no checkpoint here can be used ({'; '.join(damage) or 'none is complete'}); "
                              "restore one, or choose another run_dir to begin anew")
    return None


def resolve(path: Path) -> Path:
    """A checkpoint folder from itself, from a run folder or from a folder of checkpoints."""
    if (path / "state.json").is_file():
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here (expected state.json, or checkpoints/latest)")
    return found


def read_state(path: Path) -> TrainState:
    """The state of one checkpoint, its files checked against their hashes."""
    file = path / "state.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        hashes = tree.pop("sha256")
        tree.pop("format_version")
        state = TrainState(**{**tree, "loader": LoaderState(**tree["loader"])})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); go on from another checkpoint of the folder") from error
    for name, expected in hashes.items():
        if not (path / name).is_file() or file_sha256(path / name) != expected:
            raise CheckpointError(f"{path / name}: missing or damaged (sha256 differs from state.json); "
                                  "go on from another checkpoint of the folder")
    return state


def load_trainables(path: Path, module: nn.Module, prefix: str = "") -> None:
    """Fill `module` from trainables.safetensors, all of it or the part under `prefix`.

    Raises:
        CheckpointError: file damaged, or of a model with other shapes.
    """
    file = path / "trainables.safetensors"
    try:
        tensors = load_file(file)
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from error
    except RuntimeError as error:
        raise CheckpointError(f"{file}: belongs to another model (pool, projector or LLM of other sizes): "
                              f"{str(error).splitlines()[-1].strip()}") from error


def load_optimizer(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Fill AdamW's moments from optimizer.safetensors."""
    tensors = load_file(path / "optimizer.safetensors")
    for name, p in module.named_parameters():
        found = {key.rpartition("/")[2]: value for key, value in tensors.items() if key.startswith(f"{name}/")}
        if p.requires_grad and found:
            optimizer.state[p] = {key: value if key == "step" else value.to(p.device) for key, value in found.items()}


def check_same_config(path: Path, config: Config, content: Mapping[str, str]) -> Config:
    """Refuse to go on from a checkpoint of another experiment, or with other data or frozen models.

    The same content may lie elsewhere: then its path is free to change.

    Args:
        content: fingerprints of what `config` names (see fingerprints.py).

    Returns:
        the configuration that the checkpoint was written with.

    Raises:
        ConfigError: naming the first keys that differ, and the cure.
    """
    saved, known = load(path / "config.yaml"), read_state(path).content
    differing = [key for key in differences(_at_new_places(saved, config, known, content), config)
                 if not key.startswith(FREE_TO_CHANGE)]
    if differing:
        raise ConfigError(f"{path}: belongs to another config; these keys differ: {', '.join(differing[:5])}. "
                          "Choose another run_dir, or restore them")
    _check_content(path, known, content)
    return saved


def _at_new_places(saved: Config, config: Config, known: Mapping[str, str], content: Mapping[str, str]) -> Config:
    """`saved` with the paths of `config` wherever content of a known fingerprint is meant.

    Whether it is the same content is another question, with an answer of its own.
    """
    model = {name: getattr(config.model, name) for name in ("llm", "speech_encoder", "audio_encoder")
             if f"model.{name}" in known and f"model.{name}" in content}
    train = saved.data.train
    if len(train) == len(config.data.train):
        train = [replace(old, path=new.path) if f"data.train[{i}]" in known else old
                 for i, (old, new) in enumerate(zip(train, config.data.train, strict=True))]
    return replace(saved, model=replace(saved.model, **model), data=replace(saved.data, train=train))


def _check_content(path: Path, known: Mapping[str, str], content: Mapping[str, str]) -> None:
    if not known:
        logger.warning("%s: is of an earlier version, without fingerprints of its data and models; whether they are "
                       "still the same can't be checked", path)
        return
    other = [key for key in {**known, **content} if known.get(key) != content.get(key)]
    for key in (key for key in other if key.startswith("data.dev") and key in known and key in content):
        logger.warning("%s: is another set than before; the dev scores from here on don't compare with the earlier "
                       "ones", key)
    if bound := [key for key in other if not key.startswith("data.dev")]:
        raise ConfigError(f"{path}: was trained with other content than now lies under {', '.join(bound[:5])} (shards "
                          "written again, or another model). Restore it to go on, or start a new run in another "
                          f"run_dir (model.init_from={path} takes over what was learned)")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
