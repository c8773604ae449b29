"""The stages of a run: config, data, model, check, train, evaluate, export."""
