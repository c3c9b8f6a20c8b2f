"""Text to token ids: what stands around the audio, and the target."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from listen_dist.config import ModelConfig
from listen_dist.structures import Record, TextFrame
from listen_dist.tasks import instruction_for


class TextEncoder:
    """Token ids of a record's texts; picklable, for loader workers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._after = config.after_audio
        eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        before = self._ids(config.before_audio)
        # A template that begins with the BOS token itself must not get it twice.
        has_own_bos = bool(before) and before[0] == bos
        self.frame = TextFrame(bos=() if bos is None or has_own_bos else (bos,), before=tuple(before), eos=eos,
                               pad=eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id)

    def after_ids(self, record: Record) -> list[int]:
        """The text between the audio and the target: the template with this record's instruction."""
        return self._ids(self._after.replace("{instruction}", instruction_for(record)))

    def target_ids(self, text: str) -> list[int]:
        """A target with EOS behind it."""
        return [*self._ids(text), self.frame.eos]

    def decode(self, ids: list[int]) -> str:
        """Generated ids as text, special tokens dropped."""
        return self._tokenizer.decode(ids, skip_special_tokens=True).strip()

    def piece(self, token: int) -> str:
        """One entry of the vocabulary as text, spaces and special tokens kept."""
        return self._tokenizer.decode([token])

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)
