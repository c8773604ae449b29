"""Use a finished run: predictions for the rows of a file, and a chat."""
