"""Fast exact forms of the two kinds of delta. Nothing here knows a method."""
