"""A federation on a network."""
