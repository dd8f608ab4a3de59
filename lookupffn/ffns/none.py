"""No feed-forward layer: the baseline that says how much of a model the others are worth."""

from lookupffn.branches import NoFFN


def no_ffn(hidden_size: int, intermediate_size: int) -> NoFFN:
    """``y = 0``, whatever the sizes."""
    return NoFFN()
