"""The one error of every reader of checkpoints."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint that cannot be read; the message names the file, the place, what was expected and what came."""
