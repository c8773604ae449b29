"""A sequence of random numbers of its own for each of several trainings in one process."""

from typing import Any

import torch


class Stream:
    """The random numbers that a process of its own would draw after torch.manual_seed(seed).

        with stream.on(device):
            ...                      # draws go on where those of the last time ended

    The numbers of everybody else are not touched. Contexts of one stream must not be nested.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.states: dict[str, torch.Tensor] = {}  # by kind of device
        self.device = torch.device("cpu")
        self.before: Any = None

    def on(self, device: torch.device) -> "Stream":
        """Choose the device on which the numbers are drawn."""
        self.device = device
        return self

    def __enter__(self) -> None:
        """Put this stream in the place of the process's."""
        kind, source = self.device.type, _source(self.device)
        self.before = source.get_rng_state()
        if kind not in self.states:
            self.states[kind] = torch.Generator(self.device).manual_seed(self.seed).get_state()
        source.set_rng_state(self.states[kind])

    def __exit__(self, *error: Any) -> None:
        """Put the process's stream back."""
        source = _source(self.device)
        self.states[self.device.type] = source.get_rng_state()
        source.set_rng_state(self.before)


def _source(device: torch.device) -> Any:
    """The module of torch that holds the process's numbers for a device."""
    return torch if device.type == "cpu" else torch.get_device_module(device)
