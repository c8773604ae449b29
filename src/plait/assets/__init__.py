"""What plait ships so that a first run needs no download: a tiny model and generated tasks."""

from pathlib import Path

from plait.assets.generator import builtin_rows

__all__ = ["builtin_rows", "tiny_model_dir"]


def tiny_model_dir() -> Path:
    """Return the folder of the shipped tiny Llama (342,048 parameters, one token a character)."""
    return Path(__file__).parent / "tiny"
