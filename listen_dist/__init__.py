"""LiSTEN: teach a frozen LLM to hear with a pool of soft prompts."""

__version__ = "0.1.0"
