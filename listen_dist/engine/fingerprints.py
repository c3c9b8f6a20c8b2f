"""What a run goes on with, told by content: the training sets and the frozen models, wherever they lie.

A model's fingerprint takes seconds at 7B parameters: a file of weights counts with its size, its two ends (the header
of a safetensors file, the check sums of a zip of torch) and SAMPLES blocks between them. It sees another model, other
training of the same one and other precision; it can't see a change of a few weights in a file over WHOLE bytes.
A set's fingerprint is over the hashes in its index: what the bytes of its shards were when it was written.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from listen_dist.data.shards import ShardIndex
from listen_dist.models.beats import check_audio_checkpoint
from listen_dist.models.encoders import check_model_folder
from listen_dist.schema import Config, ModelConfig

WHOLE = 64 << 20
"""Bytes of a file that is read whole."""
END = 1 << 20
SAMPLES, BLOCK = 256, 4096

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers looks for them."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_NO_CONTENT = ("transformers_version", "_name_or_path", "use_cache", "torch_dtype", "dtype")
"""Keys of a config.json that change when the same model is saved again."""


def of_run(config: Config) -> dict[str, str]:
    """Fingerprints of the frozen models and of the sets, by config key. One rank calls it.

    The dev sets count where training scores on them.

    Raises:
        FileNotFoundError: a model is not there.
        ShardError, SourceError: a set is not there, or its source fails.
    """
    sets = {f"data.train[{i}]": entry for i, entry in enumerate(config.data.train)}
    if config.train.eval_every:
        sets |= {f"data.dev[{i}]": entry for i, entry in enumerate(config.data.dev)}
    return of_models(config.model) | {key: ShardIndex.load(entry.path, config.data, check_files=False).fingerprint
                                      for key, entry in sets.items()}


def of_models(model: ModelConfig) -> dict[str, str]:
    """Fingerprints of the frozen models, by config key.

    Raises:
        FileNotFoundError: one is not there, or holds no weights.
    """
    paths = {"model.llm": model.llm, "model.speech_encoder": model.speech_encoder,
             "model.audio_encoder": model.audio_encoder}
    return {key: of_model(path, key) for key, path in paths.items() if path}


def of_model(path: str, key: str) -> str:
    """Fingerprint of a folder or Hugging Face name, or of a single file of weights.

    Args:
        path: what `key` of the configuration says.

    Raises:
        FileNotFoundError: naming the key.
    """
    digest = hashlib.sha256()
    if key == "model.audio_encoder":
        check_audio_checkpoint(path)
        _add_sampled(digest, path)
        return digest.hexdigest()
    for file in weight_files(path, key):
        _add_sampled(digest, file)
    settings = json.loads(Path(str(cached_file(path, "config.json"))).read_bytes())
    digest.update(json.dumps({name: settings[name] for name in sorted(settings) if name not in _NO_CONTENT},
                             sort_keys=True).encode())
    if key == "model.llm" and (tokenizer := _first_of(path, _TOKENIZERS)):
        digest.update(Path(tokenizer).read_bytes())
    return digest.hexdigest()


def weight_files(path: str, key: str) -> list[str]:
    """The files that transformers loads a model's weights from, in the order of their names.

    They are downloaded where `path` is a Hugging Face name that is not here yet.

    Raises:
        FileNotFoundError: there are none.
    """
    check_model_folder(path, key)
    found = _first_of(path, _WEIGHTS)
    if found is None:
        raise FileNotFoundError(f"{key} = {path!r}: holds no weights (model.safetensors or pytorch_model.bin, or an "
                                "index of several)")
    files: list[str] = get_checkpoint_shard_files(path, found)[0] if found.endswith(".index.json") else [found]
    for file in files:
        if not os.path.isfile(file):
            raise FileNotFoundError(f"{key} = {path!r}: {os.path.basename(file)} is missing; copy the model again")
    return sorted(files)


def _first_of(path: str, names: tuple[str, ...]) -> str | None:
    for name in names:
        if found := cached_file(path, name, _raise_exceptions_for_missing_entries=False,
                                _raise_exceptions_for_connection_errors=False):
            return str(found)
    return None


def _add_sampled(digest: Any, file: str) -> None:
    with open(file, "rb") as content:
        size = os.fstat(content.fileno()).st_size
        digest.update(f"{size};".encode())
        if size <= WHOLE:
            stretches = [(0, size)]
        else:
            step = (size - 2 * END) // SAMPLES
            stretches = [(0, END), *((END + i * step, BLOCK) for i in range(SAMPLES)), (size - END, END)]
        for start, length in stretches:
            digest.update(os.pread(content.fileno(), length, start))
