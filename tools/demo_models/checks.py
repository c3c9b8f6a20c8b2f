"""Checks of the converted models: each returns a line of what it saw and raises DemoModelError if it's wrong.

The structural ones take seconds and run after each conversion. The behavioural ones run with --check and in
tests/e2e/test_demo_models.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import DemoModelError
from .chat_llm import TURN_END, TURN_START, load_gguf

# Text that a byte-level tokenizer can stumble over.
TEXTS = (
    "  two leading spaces, a\n\nblank line\tand a tab ",
    "In 2024, 1234567   89 (3.14159)",
    "it's we'll DON'T , spaced . punctuation !",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "我能吞下玻璃而不伤身体。",
    "naïve café, 😀 👩‍🔬 ✓",
)
PROMPT = "The capital of France is"
ENGLISH = "The old man walked slowly down the street, stopped at the corner and waited for the bus to arrive."
QUESTION = "What is the capital of France? Answer in one sentence."
# Recordings of Debian's asterisk-core-sounds-en-g722 and their words, lower case, without punctuation.
CLIPS = {
    "agent-loginok.g722": "agent logged in",
    "conf-onlyperson.g722": "you are currently the only person in this conference",
    "tt-monkeysintro.g722": "they have been carried away by monkeys",
}


@dataclass(frozen=True)
class Loaded:
    """A model as any user would load it from its folder."""

    folder: Path
    model: Any
    text: Any
    """The tokenizer of the LLM, the processor of Whisper."""

    def expect(self, condition: bool, complaint: str) -> None:
        """Raise DemoModelError naming the folder unless `condition` holds."""
        if not condition:
            raise DemoModelError(
                f"{self.folder}: {complaint}. Delete the folder and run tools/get_demo_models.py again; if "
                "it stays so, compare the installed versions with those in setup.cfg."
            )


def load_llm(folder: Path) -> Loaded:
    """Load the converted LLM in its stored dtype; raise DemoModelError unless every weight fits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pair: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    model, info = pair
    loaded = Loaded(folder, model.eval(), AutoTokenizer.from_pretrained(folder))
    _expect_all_keys(loaded, info)
    return loaded


def load_whisper(folder: Path) -> Loaded:
    """Load the converted Whisper with its decoder; raise DemoModelError unless every weight fits."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    pair: Any = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    model, info = pair
    loaded = Loaded(folder, model.eval(), WhisperProcessor.from_pretrained(folder))
    _expect_all_keys(loaded, info)
    return loaded


def _expect_all_keys(loaded: Loaded, info: dict[str, Any]) -> None:
    """No weight is missing, left over or of another shape."""
    wrong = {kind: keys for kind, keys in info.items() if keys}
    loaded.expect(not wrong, f"the weights don't fit the model: {wrong}")


def _expect_tied(loaded: Loaded) -> None:
    """The output head and the token embeddings are one tensor."""
    head, embedding = loaded.model.get_output_embeddings(), loaded.model.get_input_embeddings()
    tied = head.weight.data_ptr() == embedding.weight.data_ptr()
    loaded.expect(tied, "the output head is not tied to the embeddings")


def llm_structure(llm: Loaded, parameters: int, begins: bool) -> str:
    """Sizes, tied embeddings, dtype and the special ids wherever they are written.

    A model that `begins` has a BOS token, that of a turn, and no pad token of its own.
    """
    import torch

    count = llm.model.num_parameters()
    llm.expect(count == parameters, f"has {count} parameters, not {parameters}")
    llm.expect(llm.model.dtype == torch.bfloat16, f"stored as {llm.model.dtype}, not bfloat16")
    _expect_tied(llm)
    start, end = (llm.text.convert_tokens_to_ids(t) for t in (TURN_START, TURN_END))
    wanted = (start, end, end) if begins else (None, end, llm.text.pad_token_id)
    for holder in (llm.text, llm.model.config, llm.model.generation_config):
        ids = (holder.bos_token_id, holder.eos_token_id, holder.pad_token_id)
        llm.expect(ids == wanted, f"{type(holder).__name__} has BOS, EOS, pad {ids}")
    return f"{count:,} parameters in bf16, tied; BOS, EOS, pad {wanted}"


def llm_tokenizer(llm: Loaded) -> str:
    """Text survives the round trip, special tokens are one id, nothing is added on its own."""
    tokenizer = llm.text
    llm.expect(tokenizer.is_fast, "the tokenizer is not a fast one")
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        back = tokenizer.decode(ids)
        llm.expect(back == text, f"the tokenizer turns {text!r} into {back!r}")
        bare = tokenizer.encode(text, add_special_tokens=False)
        llm.expect(ids == bare, "the tokenizer adds tokens of its own")
    digits = tokenizer.tokenize("x   2024")
    llm.expect(digits[-4:] == ["2", "0", "2", "4"], f"digits don't stand alone: {digits}")
    turn = tokenizer.tokenize(f"{TURN_START}user\nhi{TURN_END}")
    llm.expect(turn == [TURN_START, "user", "Ċ", "hi", TURN_END], f"a turn of the chat is encoded as {turn}")
    return f"{len(TEXTS)} texts come back unchanged, special tokens are one id, no BOS added"


def llm_english(llm: Loaded) -> str:
    """Ordinary English is not surprising to the model."""
    import torch

    bos = [] if llm.text.bos_token_id is None else [llm.text.bos_token_id]
    ids = torch.tensor([[*bos, *llm.text.encode(ENGLISH)]])
    with torch.inference_mode():
        loss = llm.model(input_ids=ids, labels=ids).loss.item()
    llm.expect(loss < 5, f"the loss on plain English is {loss:.2f}, far too high")
    return f"loss {loss:.2f} nats a token on an English sentence"


def llm_chat(llm: Loaded) -> str:
    """A question in the chat template is answered and the answer ends with EOS."""
    turns = [{"role": "user", "content": QUESTION}]
    text = llm.text.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    inputs = llm.text(text, return_tensors="pt")
    output = llm.model.generate(**inputs, max_new_tokens=60, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    answer = llm.text.decode(output, skip_special_tokens=True)
    llm.expect(output[-1].item() == llm.text.eos_token_id, f"the answer doesn't end with EOS: {answer!r}")
    llm.expect("Paris" in answer, f"the answer to {QUESTION!r} is {answer!r}")
    return f"{QUESTION!r} → {answer!r} and EOS"


def llm_same_as_gguf(llm: Loaded, gguf: Path) -> str:
    """The folder holds the GGUF's weights rounded to bf16, and computes the same from them.

    Greedy tokens and logits are compared in bf16 on both sides, where they must be equal bit for bit;
    rounding itself is judged by the logits of the unrounded fp32 model.
    """
    import torch

    ids = torch.tensor([llm.text.encode(PROMPT)])
    model = load_gguf(gguf, torch.float32).eval()
    with torch.inference_mode():
        exact = model(ids).logits
    # Not model.to(bfloat16): that would round the frequencies of the rotary embedding as well.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    ours = dict(llm.model.named_parameters())
    for name, parameter in model.named_parameters():
        llm.expect(torch.equal(parameter, ours[name]), f"{name} is not that of {gguf}")
    with torch.inference_mode():
        rounded, stored = model(ids).logits, llm.model(ids).logits
    llm.expect(torch.equal(rounded, stored), f"the logits are not those of {gguf}")
    error = ((stored.float() - exact).norm() / exact.norm()).item()
    llm.expect(error < 0.05, f"bf16 changes the logits by {error:.1%}")
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": llm.text.pad_token_id}
    tokens = [m.generate(ids, attention_mask=torch.ones_like(ids), **options) for m in (model, llm.model)]
    llm.expect(torch.equal(*tokens), f"20 greedy tokens differ from those of {gguf}")
    return f"weights, logits and 20 greedy tokens equal the GGUF's in bf16; {error:.2%} from fp32"


def whisper_structure(whisper: Loaded, parameters: int) -> str:
    """Sizes, tied embeddings, and the ids decoding starts and ends with."""
    count = whisper.model.num_parameters()
    whisper.expect(count == parameters, f"has {count} parameters, not {parameters}")
    _expect_tied(whisper)
    tokenizer, rules = whisper.text.tokenizer, whisper.model.generation_config
    start = tokenizer.encode("x")[:2]
    decoding = [rules.decoder_start_token_id, rules.no_timestamps_token_id]
    whisper.expect(start == decoding, f"texts start with {start}, decoding with {decoding}")
    ends = {tokenizer.eos_token_id, rules.eos_token_id, whisper.model.config.eos_token_id}
    whisper.expect(len(ends) == 1, f"there are several end tokens: {ends}")
    return f"{count:,} parameters in {whisper.model.dtype}, encoder and decoder, tied"


def whisper_transcribes(whisper: Loaded, recording: Path) -> str:
    """The model with its own decoder writes down a real recording, one of CLIPS."""
    import torch

    options = {"sampling_rate": 16_000, "return_attention_mask": True, "return_tensors": "pt"}
    features = whisper.text(read_g722(recording), **options)
    many = whisper.model.generation_config.is_multilingual
    language = {"language": "en", "task": "transcribe"} if many else {}  # a model for English alone refuses both
    with torch.inference_mode():
        ids = whisper.model.generate(**features, max_new_tokens=100, **language)
    heard = whisper.text.batch_decode(ids, skip_special_tokens=True)[0]
    plain = " ".join("".join(c for c in heard.lower() if c.isalpha() or c == " ").split())
    words = CLIPS[recording.name]
    whisper.expect(plain == words, f"{recording} says {words!r}, Whisper heard {heard!r}")
    return f"{recording.name} → {heard!r}"


def find_clips(recordings: Path) -> list[Path]:
    """The recordings of CLIPS below `recordings`, in any folder that says English."""
    return sorted(
        path for name in CLIPS for path in recordings.rglob(name) if _is_english(path.relative_to(recordings))
    )


def _is_english(path: Path) -> bool:
    """Whether one of the folders above a recording says English: en, en_US_f_Allison …"""
    return any(part.startswith("en") for part in path.parent.parts)


def read_g722(path: Path) -> Any:
    """Decode raw G.722 to mono float32 at 16 kHz, [S] in -1..1."""
    import av
    import numpy as np

    with av.open(str(path), format="g722") as container:
        blocks = [frame.to_ndarray() for frame in container.decode(audio=0)]
    return np.concatenate(blocks, axis=1)[0].astype(np.float32) / 32768
