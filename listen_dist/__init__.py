"""LiSTEN: teach a frozen LLM to hear with a pool of soft prompts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from listen_dist.inference.listener import Listener

__version__ = "0.1.0"
__all__ = ["Listener"]


def __getattr__(name: str) -> Any:
    """`Listener` brings torch and transformers along, so it is imported when it is first asked for."""
    if name != "Listener":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from listen_dist.inference import listener

    return listener.Listener
