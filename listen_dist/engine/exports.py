"""Exports: a trained pool and projector in one folder, to be shared.

    trainables.safetensors   pool and projector (and LoRA), fp32 or fp16
    config.yaml              the configuration they were trained with
    README.md                a model card for people
    export.json              step, sha256 of the files above, fingerprints and licences of the frozen models (`frozen`:
                             over all weights, for people; `content`: quick, to be compared when it is loaded), and,
                             where it was evaluated, which share of each task's clips had each prompt

The frozen models are not in it; whoever loads it must have the same ones, which the fingerprints tell.
`tools/export.py` writes one; `Listener.from_checkpoint` and `model.init_from` read it like a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers.utils import cached_file

from listen_dist import config as configuration
from listen_dist import dist
from listen_dist.engine import checkpoint, fingerprints
from listen_dist.engine.checkpoint import CheckpointError
from listen_dist.models.beats import load_audio_encoder
from listen_dist.models.encoders import load_speech_encoder
from listen_dist.schema import Config, ConfigError, ModelConfig

STATISTICS = "pool.query_"
"""Buffers beside the learned parameters begin so."""
FILES = ("trainables.safetensors", "config.yaml", "README.md")
FROZEN = {
    "llm": "prompts and projector live in the embedding space of the LLM that they were trained with and mean nothing "
           "to another",
    "speech_encoder": "the projector reads the frames of the encoder that it was trained with",
    "audio_encoder": "the projector reads the frames of the encoder that it was trained with",
}
"""The frozen models by their keys under `model`, and why another one will not do."""


@dataclass(frozen=True)
class Frozen:
    """One frozen model that an export needs."""

    name: str
    """Last part of its path, or its Hugging Face name."""
    fingerprint: str
    licence: str


def resolve(path: Path) -> Path:
    """The export or checkpoint folder at `path` (a run folder: its newest checkpoint), its files checked.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (path / "export.json").is_file():
        found = checkpoint.resolve(path)
        checkpoint.read_state(found)
        return found
    for name, expected in _read(path)["sha256"].items():
        if not (path / name).is_file() or hashlib.sha256((path / name).read_bytes()).hexdigest() != expected:
            raise CheckpointError(f"{path / name}: missing or damaged (sha256 differs from export.json); "
                                  "copy the export again")
    return path


def _read(path: Path) -> dict[str, Any]:
    file = path / "export.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
        if set(tree["sha256"]) == set(FILES) and tree["format_version"] == 1:
            return {**tree, "frozen": {key: Frozen(**value) for key, value in tree["frozen"].items()}}
        reason = "not of the format that this version reads"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    raise CheckpointError(f"{file}: damaged ({reason}); copy the export again")


def step_of(path: Path) -> int:
    """Steps that a resolved export or checkpoint was trained for."""
    is_export = (path / "export.json").is_file()
    return int(_read(path)["step"]) if is_export else checkpoint.read_state(path).step


def read_usage(path: Path) -> dict[str, list[float]]:
    """By task, the share of clips that had each prompt in front [N]; empty where the export does not say."""
    return dict(_read(path).get("usage", {}))


def frozen_weights(model: ModelConfig) -> dict[str, str]:
    """sha256 over all weights of the frozen models, by their config keys. Reads them all: a minute for a large LLM."""
    found = {"llm": llm_fingerprint(model.llm),
             "speech_encoder": load_speech_encoder(model.speech_encoder, torch.float32).fingerprint}
    if model.audio_encoder:
        found["audio_encoder"] = load_audio_encoder(model.audio_encoder, torch.float32).fingerprint
    return found


def check_frozen(path: Path, config: Config, of_projector: bool = True) -> None:
    """Refuse frozen models that `path` was not trained on.

    They are told by content, so that folders can move; in a checkpoint of an earlier version, which holds no
    fingerprints, by the last part of their paths. Every rank must call it.

    Args:
        path: a resolved export or checkpoint.
        config: names the models in use.
        of_projector: the projector is taken too, which is bound to the encoders besides the LLM.

    Raises:
        ConfigError: naming the model, and why it must be the same.
    """
    saved = configuration.load(path / "config.yaml").model
    is_export = (path / "export.json").is_file()
    content = _read(path).get("content", {}) if is_export else checkpoint.read_state(path).content
    # What isn't there is named as that, not as another model.
    found = dist.on_main(fingerprints.of_models, config.model)
    if content:
        same = {key: content.get(f"model.{key}") == found.get(f"model.{key}") for key in FROZEN}
    elif is_export:  # of an earlier version
        needed: Mapping[str, Frozen] = _read(path)["frozen"]
        here = dist.on_main(frozen_weights, config.model)
        same = {key: (needed[key].fingerprint if key in needed else None) == here.get(key) for key in FROZEN}
    else:
        same = {key: Path(getattr(saved, key)).name == Path(getattr(config.model, key)).name for key in FROZEN}
    for key, why in FROZEN.items() if of_projector else [("llm", FROZEN["llm"])]:
        if not same[key]:
            raise ConfigError(f"model.{key} = {getattr(config.model, key)!r}: is not the model that {path} was trained "
                              f"on ({Path(getattr(saved, key)).name or 'none'}): {why}. Give that one, or train anew")


def start_from(config: Config, trainable: nn.ModuleDict) -> None:
    """Fill the trainables as `model.init_from` and `projector.init_from` say; nothing where neither is given.

    Raises:
        CheckpointError, ConfigError: what they name can't be used, or belongs to other frozen models.
    """
    if config.model.init_from is not None:
        path, with_projector = resolve(Path(config.model.init_from)), config.model.init_projector
        check_frozen(path, config, with_projector)
        if with_projector:
            checkpoint.load_trainables(path, trainable)
        else:
            checkpoint.load_trainables(path, trainable["pool"], "pool.")
    if config.projector.init_from is not None:
        path = resolve(Path(config.projector.init_from))
        check_frozen(path, config)
        checkpoint.load_trainables(path, trainable["projector"], "projector.")


def write(source: Path, out: Path, config: Config, results: Mapping[str, Any] | None, half: bool,
          usage: Mapping[str, list[float]] | None = None, notes: str = "") -> Path:
    """Write an export of a checkpoint; the folder appears whole or not at all.

    Args:
        source: a resolved checkpoint.
        config: where the frozen models lie here, and how the export answers.
        results: of an evaluation of this checkpoint (results.json), for the model card.
        half: store float16 instead of float32.
        usage: of the prompts by task, in the same evaluation (see `read_usage`).
        notes: Markdown for the end of the model card.

    Raises:
        ConfigError: the folder is there already, the results are of another checkpoint, or the frozen models here are
            not those it was trained with.
        OSError: it can't be written.
    """
    if out.exists():
        raise ConfigError(f"{out}: is there already; name another folder, or remove it")
    trainables = source / "trainables.safetensors"
    if results and results.get("checkpoint_sha256") != hashlib.sha256(trainables.read_bytes()).hexdigest():
        raise ConfigError(f"the results are of {results.get('checkpoint')}, not of {source}; evaluate this checkpoint")
    check_frozen(source, config)
    saved = configuration.load(source / "config.yaml")
    frozen = {key: Frozen(_short(getattr(saved.model, key)), value, licence(getattr(config.model, key)))
              for key, value in frozen_weights(config.model).items()}
    # Variances of queries are too small for float16.
    tensors = {key: value.half() if half and not key.startswith(STATISTICS) else value
               for key, value in load_file(trainables).items()}
    step = checkpoint.read_state(source).step
    # Nobody else has this machine's folders.
    shared = replace(saved, run_dir=".", eval=config.eval, model=replace(saved.model, init_from=None),
                     projector=replace(saved.projector, freeze=False, init_from=None),
                     train=replace(saved.train, eval_every=0),
                     data=replace(saved.data, train=[], dev=[], test=[], cache_dir=""))
    contents = {"trainables.safetensors": save(tensors), "config.yaml": configuration.to_yaml(shared).encode(),
                "README.md": (model_card(shared, step, tensors, frozen, results) + (notes and f"\n{notes}")).encode()}
    tree = {"format_version": 1, "step": step, "frozen": {key: vars(model) for key, model in frozen.items()},
            "content": fingerprints.of_models(config.model), "usage": usage or {},
            "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}}
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        for name, content in (contents | {"export.json": json.dumps(tree, indent=1).encode()}).items():
            (beside / name).write_bytes(content)
        beside.rename(out)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return out


def model_card(config: Config, step: int, tensors: Mapping[str, torch.Tensor], frozen: Mapping[str, Frozen],
               results: Mapping[str, Any] | None) -> str:
    """What the export is, needs and reaches, as Markdown."""
    sizes = {part: sum(value.numel() for key, value in tensors.items()
                       if key.startswith(f"{part}.") and not key.startswith(STATISTICS))
             for part in ("pool", "projector", "lora")}
    learned = ", ".join(f"{part} {size:,}" for part, size in sizes.items() if size)
    lines = [
        "# LiSTEN prompts and projector", "",
        f"Learned parameters after {step} steps: {learned}. Selection `{config.pool.selection}`, {config.pool.prompts} "
        f"prompts, k = {config.pool.k}. The frozen models are not included.", "",
        "## Use", "```",
        "python -m listen_dist.infer a.flac --checkpoint THIS_FOLDER --llm DIR --speech-encoder DIR", "```", "",
        "## Frozen models it needs", "| | model | licence | fingerprint (sha256 of the weights) |", "|---|---|---|---|",
        *(f"| {key} | {model.name} | {model.licence} | `{model.fingerprint}` |" for key, model in frozen.items()), "",
        "## Figures"]
    if results is None:
        lines.append("Not evaluated.")
    else:
        lines += [f"Split `{results['split']}`, k = {results['k']}, decoding {json.dumps(results['decoding'])}.", "",
                  "| task | samples | metric | value | 95 % interval | trivial baseline |", "|---|---|---|---|---|---|"]
        lines += [_figure(task, entry) for task, entry in results["tasks"].items()]
    return "\n".join([*lines, ""])


def _figure(task: str, entry: Mapping[str, Any]) -> str:
    metric = entry["metric"]
    skipped = entry.get("skipped", 0)  # results of an earlier version don't say by task
    of_all = f" of {entry['samples'] + skipped}" if skipped else ""
    start = f"| {task} | {entry['samples']}{of_all} | {metric}"
    if metric not in entry["metrics"]:
        return f"{start} | not computed | | |"
    low, high = entry["intervals"][metric]
    value, baseline = entry["metrics"][metric], entry["baseline"][metric]
    return (f"{start} ({entry['better']} is better) | {value:.3f} | "
            f"{low:.3f} … {high:.3f} | {baseline:.3f} |")


def llm_fingerprint(path: str) -> str:
    """sha256 over an LLM's files of weights, in the order of their names; nothing is unpickled.

    Raises:
        FileNotFoundError: it has none.
    """
    digest = hashlib.sha256()
    for file in fingerprints.weight_files(path, "model.llm"):
        with open(file, "rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def licence(path: str) -> str:
    """What a model's SOURCE.json or model card calls its licence."""
    folder = _folder(path)
    if (folder / "SOURCE.json").is_file():
        tree = json.loads((folder / "SOURCE.json").read_text(encoding="utf-8"))
        return str(tree.get("source", {}).get("licence", "not stated"))
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    stated = re.search(r"^licen[sc]e: *(\S.*)$", text, re.M)
    return stated[1].strip() if stated else "not stated"


def _folder(path: str) -> Path:
    """Where the files of a folder or Hugging Face name lie here."""
    if os.path.exists(path):
        return Path(path) if os.path.isdir(path) else Path(path).parent
    return Path(str(cached_file(path, "config.json"))).parent


def _short(path: str) -> str:
    """A Hugging Face name as it is, of a folder its name alone: paths of one machine are nobody else's business."""
    return path if path.count("/") == 1 and not os.path.isdir(path) else Path(path).name
