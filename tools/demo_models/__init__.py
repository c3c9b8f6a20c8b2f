"""The demo's real models: where they come from, how they are converted, and how that is checked.

Used by tools/get_demo_models.py; nothing of the package listen_dist depends on it.
"""

from listen_dist.errors import ListenError


class DemoModelError(ListenError):
    """A step failed; the first line of the message names the file and the cure."""
