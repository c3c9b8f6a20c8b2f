"""Text to token ids: what stands around the audio, and the target."""

from __future__ import annotations

import re
from functools import cached_property

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from listen_dist.schema import ModelConfig
from listen_dist.structures import Record, TextFrame
from listen_dist.tasks import instruction_for

KNOWN_TEXTS = 1000
"""Instructions whose token ids are kept."""


class TextEncoder:
    """Token ids of a record's texts; picklable, for loader workers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._after = config.after_audio
        self._known: dict[str, list[int]] = {}
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        before = self._ids(config.before_audio)
        # A template that begins with the BOS token itself must not get it twice.
        has_own_bos = bool(before) and before[0] == bos
        self.frame = TextFrame(bos=() if bos is None or has_own_bos else (bos,), before=tuple(before), eos=eos,
                               pad=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    @property
    def fixed_after(self) -> int:
        """Tokens between audio and target that are there with any instruction."""
        return len(self._ids(self._after.replace("{instruction}", "")))

    def after_ids(self, record: Record) -> list[int]:
        """The text between the audio and the target: the template with this record's instruction."""
        text = self._after.replace("{instruction}", instruction_for(record))
        if text not in self._known:  # a task's own instruction comes again with every clip
            if len(self._known) >= KNOWN_TEXTS:
                self._known.clear()
            self._known[text] = self._ids(text)
        return self._known[text]

    def target_ids(self, text: str) -> list[int]:
        """A target with EOS behind it."""
        return [*self._ids(text), self.frame.eos]

    @cached_property
    def line_ends(self) -> tuple[int, ...]:
        """All tokens that end a line."""
        # As byte-level and SentencePiece vocabularies write a line end, or as it is; decoding tells for sure.
        marks = ("\u010a", "\u010d", "<0x0A>", "<0x0D>", "\n", "\r")
        tokens = [i for piece, i in self._tokenizer.get_vocab().items() if any(mark in piece for mark in marks)]
        return tuple(sorted(i for i in tokens if i != self.frame.eos and re.search(r"[\r\n]", self.piece(i))))

    def decode(self, ids: list[int]) -> str:
        """Generated ids as text, special tokens dropped."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def piece(self, token: int) -> str:
        """One entry of the vocabulary as text, spaces and special tokens kept."""
        return self._tokenizer.decode([token])

    def _ids(self, text: str) -> list[int]:
        if isinstance(self._tokenizer, PreTrainedTokenizerFast):  # its own `encode` takes four times as long
            return list(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)
        return self._tokenizer.encode(text, add_special_tokens=False)
