"""The data of a run; see plait.run.data.bundle."""

from plait.run.data.bundle import DataBundle, Split, load_data

__all__ = ["DataBundle", "Split", "load_data"]
