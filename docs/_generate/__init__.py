"""The parts of the documentation that are written from the code; `docs/update.py` places them."""
