"""Look at a run before it starts: everything validated, counted and estimated; nothing trained.

report  what `plait check` shows
memory  what a training step and an evaluation take
"""

from plait.run.check.report import CheckReport, check, masked_pieces

__all__ = ["CheckReport", "check", "masked_pieces"]
