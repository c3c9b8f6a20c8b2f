"""Checkpoints: small folders of safetensors and JSON, written beside and then renamed.

    step-000200/
        trainables.safetensors   pool and projector, fp32
        optimizer.safetensors    AdamW's moments, by parameter name
        state.json               step, loader cursor, sha256 of the two files above
        config.yaml              the resolved configuration
    latest                       the name of the newest complete folder; moved last

No frozen weight is in it, and nothing in it can run code.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from listen_dist.config import Config, ConfigError, differences, load, to_yaml
from listen_dist.structures import LoaderState

logger = logging.getLogger(__name__)

FREE_TO_CHANGE = ("run_dir", "device", "parallel.", "eval.", "tracking.", "data.test", "data.dev", "data.workers",
                  "data.cache_dir", "data.cache_gib", "data.timeout_seconds", "data.retries",
                  "train.max_steps", "train.max_minutes", "train.log_every", "train.save_every", "train.keep",
                  "train.checksum_every", "train.eval_every", "train.eval_limit", "train.resume", "pool.backend",
                  "pool.top_k", "model.attention")
"""Keys that may differ between a checkpoint and the run that goes on from it."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the first line names the file and the cure."""


@dataclass(frozen=True)
class TrainState:
    """All of a run that is not a tensor. Generators are functions of (seed, step), so none is stored."""

    step: int = 0
    """Optimizer steps done."""
    loader: LoaderState = LoaderState()
    skipped_steps: int = 0
    """Steps left out because the gradient was not finite."""
    skipped_samples: int = 0
    finished: bool = False
    """The run came to its end (`train.max_steps`, or earlier by `train.max_minutes`)."""


def save(folder: Path, config: Config, state: TrainState, trainable: nn.Module,
         optimizer: torch.optim.Optimizer) -> Path:
    """Write `folder`/step-N, move `latest`, drop all but the newest `train.keep`. Rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{state.step:06d}"
    beside = folder / f".{name}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_file({k: v.detach().cpu().contiguous() for k, v in trainable.state_dict().items()},
              beside / "trainables.safetensors")
    save_file(_moments(trainable, optimizer), beside / "optimizer.safetensors")
    (beside / "config.yaml").write_text(to_yaml(config))
    hashes = {file: _sha256(beside / file) for file in ("trainables.safetensors", "optimizer.safetensors")}
    (beside / "state.json").write_text(json.dumps({"format_version": 1, **asdict(state), "sha256": hashes}, indent=1))
    for file in [*beside.iterdir(), beside]:
        _sync(file)
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)
    _write_latest(folder, name)
    # Later ones are there when the user went back to an older one: this run will write them anew.
    until_now = [path for path in complete(folder) if _step_of(path) <= state.step]
    for old in until_now[: -config.train.keep]:
        if _step_of(old) not in _best_steps(folder):
            shutil.rmtree(old)
    return target


def _best_steps(folder: Path) -> set[int]:
    """Steps that best.json names (see evaluation/dev.py), whose checkpoints are kept."""
    file = folder / "best.json"
    best = json.loads(file.read_text())["best"] if file.is_file() else {}
    return {entry["step"] for entry in best.values()}


def complete(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted((path for path in folder.glob("step-*")
                   if path.name.removeprefix("step-").isdigit() and (path / "state.json").is_file()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or None where nothing was saved yet."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    name = pointer.read_text().strip()
    path = folder / name
    if "/" in name or not (path / "state.json").is_file():
        raise CheckpointError(f"{pointer}: names {name!r}, which is not a complete checkpoint; "
                              f"write one of {[p.name for p in complete(folder)]} into it")
    return path


def resolve(path: Path) -> Path:
    """A checkpoint folder from itself, from a run folder or from a folder of checkpoints."""
    if (path / "state.json").is_file():
        return path
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here (expected state.json, or checkpoints/latest)")
    return found


def read_state(path: Path) -> TrainState:
    """The state of one checkpoint, its tensor files checked against their hashes."""
    file = path / "state.json"
    try:
        tree = json.loads(file.read_text())
        hashes = tree.pop("sha256")
        tree.pop("format_version")
        state = TrainState(**{**tree, "loader": LoaderState(**tree["loader"])})
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: damaged ({error}); go on from another checkpoint of the folder") from error
    for name, expected in hashes.items():
        if not (path / name).is_file() or _sha256(path / name) != expected:
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


def check_same_config(path: Path, config: Config) -> Config:
    """Refuse to go on from a checkpoint of another experiment.

    Returns:
        the configuration that the checkpoint was written with.

    Raises:
        ConfigError: naming the first keys that differ, and the cure.
    """
    saved = load(path / "config.yaml")
    differing = [key for key in differences(saved, config) if not key.startswith(FREE_TO_CHANGE)]
    if differing:
        raise ConfigError(f"{path}: belongs to another config; these keys differ: {', '.join(differing[:5])}. "
                          "Choose another run_dir, or restore them")
    return saved


def _moments(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {f"{name}/{key}": value.detach().cpu().contiguous()
            for name, p in module.named_parameters() for key, value in optimizer.state.get(p, {}).items()}


def _write_latest(folder: Path, name: str) -> None:
    beside = folder / ".latest.tmp"
    beside.write_text(name + "\n")
    _sync(beside)
    beside.rename(folder / "latest")
    _sync(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
