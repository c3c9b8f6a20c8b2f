"""Score Whisper's own decoder on the transcription clips of a config: what a LiSTEN model is measured against.

    python tools/eval_whisper.py --config configs/quickstart.yaml --split test --out runs/whisper-tiny.en
    python tools/compare_runs.py runs/whisper-tiny.en runs/quickstart --tasks asr

Takes the `asr` samples of the split's sets, and the whole Whisper model that `model.speech_encoder` names,
decodes with Whisper's own rules on 30 s windows and as many beams as `eval.beams` says, and writes results.json and
predictions.jsonl as evaluate.py does, with the same normaliser.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from os.path import expanduser
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import numpy as np
import torch
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from listen_dist import config as configuration
from listen_dist import exits, logs
from listen_dist.command_line import ConfigParser, user_path
from listen_dist.data.manifest import file_sha256
from listen_dist.data.schedule import SampleRef
from listen_dist.data.shards import ShardError, ShardIndex
from listen_dist.errors import ListenError
from listen_dist.evaluation.predictions import Prediction
from listen_dist.evaluation.results import code_commit, score_and_write, versions
from listen_dist.models.encoders import check_model_folder
from listen_dist.schema import ConfigError, SetConfig
from listen_dist.structures import SAMPLE_RATE, AudioSample, SkippedSample

TASK = "asr"


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ConfigParser(description=__doc__)
    parser.add_argument("--config", type=expanduser, required=True, help="YAML file, e.g. configs/quickstart.yaml")
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--out", required=True, type=user_path, help="where results go")
    parser.add_argument("--batch", type=int, default=16, help="clips decoded at once (default 16)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any config key, e.g. model.speech_encoder=…")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; the exit code."""
    return exits.run(lambda: evaluate(parse_arguments(argv)), "Lower --batch")


def evaluate(arguments: argparse.Namespace) -> None:
    """Decode and score the split's transcription clips."""
    logs.setup()
    config = configuration.load(arguments.config, arguments.overrides)
    split, out, batch = arguments.split, arguments.out, arguments.batch
    sets: list[SetConfig] = getattr(config.data, split)
    indexes = [index for index in (ShardIndex.load(entry.path, config.data) for entry in sets) if TASK in index.tasks]
    if not indexes:
        raise ConfigError(f"data.{split}: none of its sets holds a sample of the task {TASK!r}")
    reader = Whisper.load(config.model.speech_encoder, config.device, config.eval.beams)
    predictions: list[Prediction] = []
    skipped: list[SkippedSample] = []
    for index in indexes:
        for samples in groups(index, batch, config.data.max_seconds, skipped):
            texts = reader.transcribe(samples)
            predictions += [Prediction(sample.record.id, TASK, text, sample.record.answers, (), ())
                            for sample, text in zip(samples, texts, strict=True)]
    weights = Path(config.model.speech_encoder) / "model.safetensors"
    score_and_write(out, "", {
        "step": 0, "checkpoint": config.model.speech_encoder,
        "checkpoint_sha256": file_sha256(weights) if weights.is_file() else "", "split": split, "k": 0,
        "decoding": {"decoder": "Whisper's own", "beams": config.eval.beams, "batch": batch},
        "data_fingerprints": {str(index.folder): index.fingerprint for index in indexes},
        "code_commit": code_commit(), "versions": versions(), "ranks": 1, "llm": "none", "untrained_tasks": [],
    }, sorted(predictions, key=lambda row: row.id), skipped)


def groups(index: ShardIndex, size: int, max_seconds: float, skipped: list[SkippedSample],
           ) -> Iterator[list[AudioSample]]:
    """The transcription clips of a set, so many at a time; those that cannot be read are added to `skipped`."""
    refs = [SampleRef(0, shard, row) for shard in range(len(index.counts))
            for row in np.flatnonzero(index.shard_table(shard).tasks == TASK).tolist()]
    group: list[AudioSample] = []
    for ref in logs.progress(refs, f"transcribing {index.folder}"):
        try:
            sample = index.read_sample(ref.shard, ref.row, "audio", max_seconds)
        except ShardError as error:
            skipped.append(SkippedSample(index.shard_table(ref.shard).ids[ref.row],
                                         str(index.folder / index.shards[ref.shard].name), str(error)))
            continue
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


@dataclass(frozen=True)
class Whisper:
    """A whole Whisper model, encoder and decoder."""

    model: WhisperForConditionalGeneration
    processor: WhisperProcessor
    beams: int

    @classmethod
    def load(cls, path: str, device: str, beams: int) -> Whisper:
        """From a folder or Hugging Face name, in fp32.

        Raises:
            ListenError: weights are missing, as in a folder that holds the encoder alone.
        """
        check_model_folder(path, "model.speech_encoder")
        logging.getLogger("transformers").setLevel(logging.ERROR)  # it warns of missing weights; refused below
        model, found = WhisperForConditionalGeneration.from_pretrained(path, dtype=torch.float32,
                                                                       output_loading_info=True)
        missing = sorted(set(found["missing_keys"]) - {"proj_out.weight"})  # that one is the decoder's embedding
        if missing:
            raise ListenError(f"model.speech_encoder = {path!r}: has no decoder to score: {len(missing)} weights are "
                             f"missing, the first {missing[0]}")
        cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
        return cls(model.eval().to("cuda" if cuda else "cpu"), WhisperProcessor.from_pretrained(path), beams)

    @torch.no_grad()
    def transcribe(self, samples: Sequence[AudioSample]) -> list[str]:
        """Transcripts of some clips, each padded with silence to 30 s as Whisper was trained."""
        waves = [sample.waveform for sample in samples]
        features = self.processor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
        ids = self.model.generate(features.to(self.model.device), num_beams=self.beams, do_sample=False,
                                  **self._languages(samples))
        return [text.strip() for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def _languages(self, samples: Sequence[AudioSample]) -> dict[str, Any]:
        """For a multilingual model: each clip's language where the records say it, else as Whisper finds it."""
        if not getattr(self.model.generation_config, "is_multilingual", False):
            return {}
        languages = [sample.record.language for sample in samples]
        return {"task": "transcribe", "language": languages if all(languages) else None}


if __name__ == "__main__":
    sys.exit(main())
