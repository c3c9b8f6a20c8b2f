"""How many tokens a set's texts take, learned from some of them: the index knows only their characters."""

from __future__ import annotations

from collections.abc import Sequence

from listen_dist.data.schedule import TextTokens
from listen_dist.data.shard_members import ShardError
from listen_dist.data.shards import ShardIndex
from listen_dist.data.text import TextEncoder

SAMPLES = 128
"""Samples of the first shard that are looked at."""


def learn_text_tokens(index: ShardIndex, text: TextEncoder) -> TextTokens:
    """Fit tokens over characters to samples spread over the set's first shard.

    A function of the shard's bytes and the tokenizer alone, to the last bit on any machine: the plan of
    batches hangs on it. Samples that can't be used don't count.

    Raises:
        SourceError: the source fails.
    """
    table = index.shard_table(0)
    points = []
    for place in range(min(SAMPLES, len(table))):
        row = place * len(table) // min(SAMPLES, len(table))
        try:
            record = index.read_sample(0, row, "record").record
        except ShardError:
            continue
        # The template and EOS are counted apart.
        tokens = len(text.after_ids(record)) - text.fixed_after + len(text.target_ids(record.answers[0])) - 1
        points.append((int(table.text_chars[row]), tokens))
    return fit_line(points)


def fit_line(points: Sequence[tuple[int, int]]) -> TextTokens:
    """The least-squares line through (characters, tokens), never falling; the rule of thumb where there is no point."""
    if not points:
        return TextTokens()
    # In integers up to the one division: sums of floats differ between machines.
    count, x, y = len(points), sum(c for c, _ in points), sum(t for _, t in points)
    spread = count * sum(c * c for c, _ in points) - x * x
    slope = max(0.0, (count * sum(c * t for c, t in points) - x * y) / spread) if spread else 0.0
    return TextTokens((y - slope * x) / count, slope)
