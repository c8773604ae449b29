"""Gates: what multiplies the rank axis, one file a gate."""
