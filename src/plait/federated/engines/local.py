"""Federated fine-tuning in one process: a server, all clients, and a loop between them.

    Federation = Server + Site,   exchange: for each client, site.answer(order)

Payloads are encoded and decoded as for a network, so the measured bytes are those of a network, and
the other engines (`workers`, `flower`) give the same bits.

Limits: no time-outs, because one process cannot stop its own client; `workers` has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from plait.federated.client import Evaluate, Roster, Site, Train
from plait.federated.methods import Algorithm, State
from plait.federated.privacy import Privacy
from plait.federated.protocol import Reply
from plait.federated.server import Progress, RoundRecord, Server, ServerOptions

Deliver = Callable[[str, int, bytes], Sequence[bytes]]  # (client, round, upload)


class Federation:
    """A federated run in one process; `step` runs a round, `run` all remaining ones.

    Args:
        base: the base model. It is shared and frozen; its weights do not change.
        configs: client -> peft config of its adapter.
        method: of `plait.federated.algorithm`.
        train: a client's local training of the model; see `client.LocalTraining`. An exception
            that it raises is a failure of that client and not of the run.
        folder: for the checkpoints and the clients' private states.
        options: see ServerOptions.
        facts: what else decides the result, such as the data; a resumed run must have the same.
        resume: continue from the newest checkpoint, or from the start if there is none.
        privacy: clip and noise the updates.
        evaluate: measures a client's model, for `server.evaluate` and `step(measure=True)`.
        deliver: what arrives of an upload; for tests of faults. None: the upload, once.
        progress: called after each client.

    Raises:
        ValueError: see Roster and Server.
    """

    def __init__(
        self,
        base: nn.Module,
        configs: Mapping[str, PeftConfig],
        method: Algorithm,
        train: Train,
        folder: str | Path,
        options: ServerOptions | None = None,
        *,
        facts: Mapping[str, Any] | None = None,
        resume: bool = False,
        privacy: Privacy | None = None,
        evaluate: Evaluate | None = None,
        deliver: Deliver | None = None,
        progress: Progress | None = None,
    ) -> None:
        roster, folder = Roster(base, configs, method), Path(folder)
        options = options or ServerOptions()
        self.site = Site(
            roster, train, folder / "clients", run=options.run, seed=options.seed, evaluate=evaluate
        )
        self.server = Server(
            roster,
            folder / "server",
            options,
            facts=facts,
            resume=resume,
            privacy=privacy,
            stored=self.site.stored,
            progress=progress,
        )
        self.clients, self.deliver = roster.clients, deliver

    @property
    def round(self) -> int:
        """Completed rounds."""
        return self.server.round

    @property
    def state(self) -> State:
        """The server's state of the method."""
        return self.server.state

    def model_of(self, client: str) -> nn.Module:
        """A client's model as it would start the next round; valid until the next call or step.

        For `private_policy` "reset" and "redraw" its private part is a fresh start.
        """
        model, _ = self.site.put(*self.server.order("evaluate", client))
        return model.eval()

    def run(self, done: Callable[[RoundRecord], None] | None = None) -> None:
        """Run all remaining rounds; see `Server.step`."""
        while self.round < self.server.options.rounds:
            self.step(done)

    def step(
        self, done: Callable[[RoundRecord], None] | None = None, *, measure: bool = False
    ) -> RoundRecord:
        """Run one round; see `Server.step`."""
        return self.server.step(self.exchange, done, measure=measure)

    def exchange(self, orders: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
        """The `Exchange` of one process: client after client."""
        for name in orders:
            reply = self.site.answer(orders[name])
            yield from ((name, data) for data in self._delivered(name, reply))

    def _delivered(self, name: str, data: bytes) -> list[bytes]:
        if self.deliver is None:
            return [data]
        reply, number = Reply.unpack(data), self.round + 1
        if reply.failed:
            return [data]
        sent = self.deliver(name, number, reply.upload)
        return [replace(reply, upload=upload).pack() for upload in sent]
