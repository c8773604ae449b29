"""Fast exact forms of the two kinds of Delta. Nothing here depends on a method."""

from plait.kernels.choose import configure

__all__ = ["configure"]
