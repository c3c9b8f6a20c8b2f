"""One typed, frozen configuration; the only module that knows OmegaConf.

`load(path, overrides)` merges a YAML file and `key=value` words from the command line
into nested dataclasses and checks them against each other. Nothing is loaded before
that: a wrong key, type or combination ends the program with one line that names it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import braceexpand
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from listen_dist import yaml_text
from listen_dist.errors import ListenError
from listen_dist.schema import Config, ConfigError, DataConfig, require
from listen_dist.tasks import TASKS, get_task


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `key=value` overrides, check, and return a frozen Config.

    A file may begin with `base: FILE` (seen from its own folder) and then hold only what differs;
    lists are replaced as a whole.

    Raises:
        ConfigError: file missing or not YAML, unknown key, wrong type, contradiction.
    """
    path = Path(path)
    files = _with_bases(path)
    overrides = list(overrides)
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"{word!r}: an override has the form key=value, e.g. train.max_steps=50")
    words = [_read_word(*word.split("=", 1)) for word in overrides]
    source, key = str(path), ""
    try:
        merged = OmegaConf.unsafe_merge(_writable(OmegaConf.structured(Config)), *files)
        _writable(merged)
        source = "command line"
        for key, value in words:
            OmegaConf.update(merged, key, value)
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, AssertionError, IndexError, TypeError, ValueError) as error:
        key = getattr(error, "full_key", None) or key
        raise ConfigError(f"{source}: {key}: {str(error).splitlines()[0]}") from error
    assert isinstance(config, Config)
    check(config)
    return config


def _with_bases(path: Path, above: tuple[Path, ...] = ()) -> list[Any]:
    """A YAML file's tree behind those of the files it is based on, the last base first; keys checked."""
    if not path.exists() or path.is_dir():
        named = f" (the base of {above[-1]})" if above else " (configs/ holds examples)"
        raise ConfigError(f"{path}: no such config file{named}")
    try:
        tree = yaml_text.read(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if tree is None:  # an empty file
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines at the top level")
    base = tree.pop("base", None)
    _refuse_unknown_keys(tree, Config, str(path), prefix="")
    if base is None:
        return [OmegaConf.create(tree)]
    if path.resolve() in [file.resolve() for file in above]:
        raise ConfigError(f"{path}: base: it is based on itself")
    return [*_with_bases(path.parent / yaml_text.expand(str(base), f"{path}: base"), (*above, path)),
            OmegaConf.create(tree)]


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML text that `load` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def _writable(node: Any) -> Any:
    """Lift the read-only flags that OmegaConf takes over from frozen dataclasses."""
    OmegaConf.set_readonly(node, False)
    for child in (node if OmegaConf.is_list(node) else node.values()):
        if OmegaConf.is_config(child):
            _writable(child)
    return node


def _refuse_unknown_keys(values: dict[Any, Any], schema: type, source: str, prefix: str) -> None:
    hints = typing.get_type_hints(schema)
    for key, value in values.items():
        full = f"{prefix}{key}"
        if key not in hints:
            near = nearest(str(full), known_keys())
            raise ConfigError(f"{source}: unknown key {full!r}; the nearest known one is {near!r}")
        inner = hints[key]
        if dataclasses.is_dataclass(inner):
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {full}: expected `key: value` lines below it, found {value!r}")
            _refuse_unknown_keys(value, typing.cast(type, inner), source, f"{full}.")
        elif typing.get_origin(inner) is list and isinstance(value, list):
            (item,) = typing.get_args(inner)
            for i, entry in enumerate(value):
                if isinstance(entry, dict):
                    _refuse_unknown_keys(entry, item, source, f"{full}[{i}].")


def _read_word(key: str, text: str) -> tuple[str, Any]:
    """An override's key and value: `data.train.0.path` and `data.train[0].path` both name a list's entry."""
    known = known_keys()
    if re.sub(r"\.(\d+)(?=\.|$)|\[\d+\]", "[0]", key).removesuffix("[0]") not in known:
        raise ConfigError(f"command line: unknown key {key!r}; the nearest known one is {nearest(key, known)!r}")
    parts = re.split(r"[.\[]", key)
    hint: Any = Config
    for part in parts:
        inner = typing.get_type_hints(hint, include_extras=True) if dataclasses.is_dataclass(hint) else {}
        hint = inner.get(part) or next(reversed(typing.get_args(hint)), None)
    value = yaml_text.read(text, f"command line: {key}", hint)
    if isinstance(value, dict | list):
        tree: Any = value
        for part in reversed(parts):
            tree = {part: tree}
        _refuse_unknown_keys(tree, Config, "command line", prefix="")
    return key, value


def known_keys(schema: type = Config, prefix: str = "") -> list[str]:
    """Every dotted key of the configuration."""
    keys: list[str] = []
    for name, hint in typing.get_type_hints(schema).items():
        if dataclasses.is_dataclass(hint):
            keys += known_keys(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
            if typing.get_origin(hint) is list:
                keys += known_keys(typing.get_args(hint)[0], f"{prefix}{name}[0].")
            elif typing.get_origin(hint) is dict:
                keys += [f"{prefix}{name}.{task}" for task in TASKS]
    return keys


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`; among dotted keys the last part counts most, or its initials (`lr`)."""
    def likeness(candidate: str) -> float:
        asked, last = word.split(".")[-1], candidate.split(".")[-1]
        alike = difflib.SequenceMatcher(None, asked, last).ratio()
        short = "_" in last and asked == "".join(part[0] for part in last.split("_"))
        return max(alike, short) + 0.5 * difflib.SequenceMatcher(None, word, candidate).ratio()

    return max(known, key=likeness)


def differences(a: Config, b: Config) -> list[str]:
    """Dotted keys at which two configurations differ."""
    return _differences(dataclasses.asdict(a), dataclasses.asdict(b), "")


def _differences(a: Any, b: Any, prefix: str) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        return [key for name in {**a, **b}
                for key in _differences(a.get(name), b.get(name), f"{prefix}.{name}" if prefix else name)]
    return [] if a == b else [prefix]


AT_LEAST = {
    "lora.rank": 0, "pool.prompts": 1, "projector.window": 0.02, "projector.hidden": 1, "projector.layers": 1,
    "projector.heads": 1,
    "train.max_steps": 1, "train.log_every": 1, "train.save_every": 1, "train.keep": 1, "train.checksum_every": 1,
    "train.eval_every": 0, "train.eval_limit": 0, "train.batches_per_step": 0, "train.max_minutes": 0,
    "train.warmup_steps": 0, "train.weight_decay": 0, "train.max_skipped_in_a_row": 1,
    "train.clip_norm": 0, "train.min_learning_rate": 0, "data.batch_tokens": 32, "data.window": 1, "data.workers": 0,
    "data.max_target_tokens": 2, "data.max_bad_fraction": 0, "data.retries": 0,
    "parallel.max_live_parameters": 0, "parallel.node_size": 0,
    "data.augment.gain_db": 0, "data.augment.time_masks": 0, "data.augment.mel_masks": 0,
    "data.augment.time_mask_seconds": 0, "data.augment.mel_mask_bins": 0, "eval.beams": 1,
    "eval.batch_tokens": 32, "eval.limit": 0, "eval.no_repeat_ngram_size": 0,
}
"""Smallest values (a projector window: one frame; a target: one token and EOS)."""


def check(config: Config) -> None:
    """Cross-field checks; no file is opened and no weight loaded.

    Raises:
        ConfigError: naming the key, its value and what would be right.
    """
    pool, train, data, projector = config.pool, config.train, config.data, config.projector
    for key, value in (("run_dir", config.run_dir), ("model.llm", config.model.llm),
                       ("model.speech_encoder", config.model.speech_encoder)):
        require(bool(value), key, value, "must be set")
    for key, least in AT_LEAST.items():
        number: Any = functools.reduce(getattr, key.split("."), config)
        require(number >= least, key, number, f"must be at least {least}")
    require(1 <= pool.k <= pool.prompts, "pool.top_k", pool.k, f"must be 1 … pool.prompts = {pool.prompts}")
    require(1 <= pool.k_max <= pool.prompts, "pool.train_k_max", pool.k_max,
             f"must be 1 … pool.prompts = {pool.prompts}")
    require(0 <= pool.shared_share < 1, "pool.shared_share", pool.shared_share, "must be within 0 … 1, 1 excluded")
    if pool.selection == "task_static" and pool.tasks:
        pool.task_parts()
    require(data.batch_prompts is None or data.batch_prompts >= 0, "data.batch_prompts", data.batch_prompts,
             "must be at least 0")
    require(bool(config.lora.targets), "lora.targets", config.lora.targets, "must name a layer, e.g. [q_proj, v_proj]")
    require(not (projector.freeze and pool.selection == "none" and not config.lora.rank), "projector.freeze", True,
             "with pool.selection = 'none' and no LoRA leaves nothing to learn")
    require(projector.kind == "mlp" or projector.hidden % projector.heads == 0, "projector.hidden",
             projector.hidden, f"must be a multiple of projector.heads = {projector.heads}")
    from_model = config.model.init_from is not None and config.model.init_projector
    loads_projector = from_model or projector.init_from is not None
    require(not projector.freeze or loads_projector, "projector.freeze", True,
            "needs projector.init_from or model.init_from: a frozen random projector cannot learn")
    require(not loads_projector or projector.start == "random", "projector.start", projector.start,
            f"would overwrite what {'model' if from_model else 'projector'}.init_from loads; give one of the two")
    require(not from_model or projector.init_from is None, "projector.init_from", projector.init_from,
            "model.init_from brings a projector too; set model.init_projector=false, or give one of the two")
    require("{instruction}" in config.model.after_audio, "model.after_audio", config.model.after_audio,
             "must hold {instruction}, else every task gets the same question")
    for task, weight in train.task_weights.items():
        try:
            get_task(task)
        except ListenError as error:
            raise ConfigError(f"train.task_weights: {error}") from None
        # A list or null passes OmegaConf where it is a value of a dict.
        require(isinstance(weight, float) and 0 < weight < math.inf, f"train.task_weights.{task}", weight,
                "must be positive and finite")
    for key, beta in (("train.beta1", train.beta1), ("train.beta2", train.beta2)):
        require(0 <= beta < 1, key, beta, "must be within 0 … 1, 1 excluded")
    require(train.learning_rate > 0, "train.learning_rate", train.learning_rate, "must be positive")
    require(train.min_learning_rate <= train.learning_rate, "train.min_learning_rate", train.min_learning_rate,
             f"is above train.learning_rate = {train.learning_rate}")
    require(train.eval_every == 0 or bool(data.dev), "train.eval_every", train.eval_every, "needs sets in data.dev")
    require(0 < data.max_seconds <= 30, "data.max_seconds", data.max_seconds,
             "must be within the encoder's window of 30 s")
    for split in ("train", "dev", "test"):
        for i, entry in enumerate(getattr(data, split)):
            require(bool(entry.path), f"data.{split}[{i}].path", entry.path, "must be set")
            set_addresses(entry.path, f"data.{split}[{i}].path")
            require(entry.weight > 0, f"data.{split}[{i}].weight", entry.weight, "must be positive")
            for key, limit in (("max_seconds", entry.max_seconds), ("max_samples", entry.max_samples)):
                require(limit >= 0, f"data.{split}[{i}].{key}", limit, "must be at least 0 (no limit)")
                require(split == "train" or not limit, f"data.{split}[{i}].{key}", limit,
                         "only training leaves samples out; evaluation has eval.limit")
            require(split == "train" or not entry.task, f"data.{split}[{i}].task", entry.task,
                     "only training leaves samples out")
    require(data.temperature is None or data.temperature > 0, "data.temperature", data.temperature,
             "must be positive; 1 draws in proportion to size, large values from all sets alike")
    _check_augment(data)
    splits = config.eval.splits
    require(bool(splits) and len(set(splits)) == len(splits) and set(splits) <= {"dev", "test"}, "eval.splits",
             splits, "must be [dev], [test] or [dev,test]")
    require(config.eval.length_penalty == 1 or config.eval.beams > 1, "eval.length_penalty",
             config.eval.length_penalty, "needs eval.beams above 1; greedy decoding compares no lengths")
    require(config.eval.repetition_penalty > 0, "eval.repetition_penalty", config.eval.repetition_penalty,
             "must be positive (1: none)")
    require(data.cache_gib > 0, "data.cache_gib", data.cache_gib, "must be positive")
    require(data.timeout_seconds > 0, "data.timeout_seconds", data.timeout_seconds, "must be positive")
    parallel = config.parallel
    require(parallel.timeout_minutes > 0, "parallel.timeout_minutes", parallel.timeout_minutes, "must be positive")
    require(parallel.llm == "replicated" or not config.model.compile, "model.compile", True,
             f"needs parallel.llm=replicated; hooks gather a layer's weights under parallel.llm={parallel.llm}")
    require(0 <= parallel.stuck_minutes < parallel.timeout_minutes, "parallel.stuck_minutes", parallel.stuck_minutes,
             f"must be below parallel.timeout_minutes = {parallel.timeout_minutes}, 0 or more")


def _check_augment(data: DataConfig) -> None:
    augment, where = data.augment, "data.augment."
    for key in augment.active if data.stored_features else ():
        require(False, where + key, getattr(augment, key),
                "works on audio, which stored encoder frames no longer are; set data.stored_features=false")
    require(0 <= augment.speed <= 0.5, where + "speed", augment.speed, "must be within 0 … 0.5")
    require(0 <= augment.reverb_share <= 1, where + "reverb_share", augment.reverb_share, "must be within 0 … 1")
    snr = augment.noise_snr_db
    require(len(snr) == 2 and snr[0] <= snr[1], where + "noise_snr_db", snr, "must be [lowest, highest]")


def set_addresses(path: str, key: str = "path") -> list[str]:
    """The folders that a set's path names: braces expanded, in that order.

    Raises:
        ConfigError: naming `key`, where an address is none that we read.
    """
    try:
        addresses = list(braceexpand.braceexpand(path, escape=False))
    except ValueError:
        raise ConfigError(f"{key} = {path!r}: a brace without its pair") from None
    require(len(set(addresses)) == len(addresses), key, path, "names a folder twice")
    for address in addresses:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", address)
        if scheme:
            require(re.match(r"(https?|s3|gs)://[^/]", address) is not None, key, path,
                     f"{scheme[0]!r} is no source; give a folder, or an address that begins with http://, https://, "
                     "s3:// or gs:// (a folder whose name holds a colon: ./name)")
            require(re.search(r"[@?#]", address) is None, key, path, "an address holds no password (those belong "
                     "into ~/.netrc or the store's environment), no '?' and no '#'")
    return addresses
