"""`plait inspect`: what trained adapters have learned, as tables, JSON and pictures."""
