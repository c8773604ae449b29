"""A federated run from one config file."""
