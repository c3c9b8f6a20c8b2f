#!/usr/bin/env python3
"""How far the encoder's frames on a clip's true length are from those of the clip padded to 30 s.

    python tools/compare_true_length.py assets/manifests/asr.test.jsonl assets/models/whisper-tiny.en --clips 20

For each clip the frames that both give are compared: |a − b| / |b| over all of them, and the cosine of each pair
of frames. Padded frames attend to silence too, so they differ; the figures say by how much.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Sequence

import numpy as np
import torch

from listen_dist import exits
from listen_dist.command_line import user_path
from listen_dist.data.decode import decode_audio
from listen_dist.data.features import LogMel
from listen_dist.data.manifest import read_manifest
from listen_dist.models.encoders import load_speech_encoder
from listen_dist.structures import SAMPLE_RATE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; the exit code."""
    return exits.run(lambda: compare(argv))


def compare(argv: Sequence[str] | None) -> None:
    """Parse the command line, compare, print a line of figures (JSON with --json)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=user_path)
    parser.add_argument("encoder", help="Whisper folder or name")
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(argv)
    encoder, log_mel = load_speech_encoder(options.encoder, torch.float32), LogMel.from_pretrained(options.encoder)
    relative, cosines = [], []
    for record in itertools.islice(read_manifest(options.manifest), options.clips):
        waveform = decode_audio(record.audio[0])
        padded = np.pad(waveform, (0, 30 * SAMPLE_RATE - len(waveform)))
        ours, theirs = (encoder.encode([log_mel(wave)])[0] for wave in (waveform, padded))
        theirs = theirs[: len(ours)]
        relative.append(float((ours - theirs).norm() / theirs.norm()))
        cosines.append(torch.nn.functional.cosine_similarity(ours, theirs, dim=-1))
    cosine = torch.cat(cosines)
    figures = {"clips": len(relative), "frames": len(cosine), "relative_difference": float(np.mean(relative)),
               "cosine_mean": float(cosine.mean()), "cosine_5th_percentile": float(cosine.quantile(0.05))}
    print(json.dumps(figures) if options.json else "  ".join(f"{k} {v:.4g}" for k, v in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
