"""`python -m plait.run.config` writes schema.json from the classes that are installed."""

from plait.run.config import schema

schema.FILE.write_text(schema.text(), encoding="utf-8")
