"""Export of a federated run: each client's adapter as a plain LoRA that stock peft loads.

    OUT/<client>/adapter_config.json, adapter_model.safetensors      OUT/README.md

The exported model is the one with which the client would start the next round, and which the last
evaluation measured: with `private_policy` "reset" or "redraw" its private part is a fresh start. A
trunk (flora, fedex) is stacked in front of the adapter, fedalora_het folds into (M A, B_bar), gates
and mixes into the factors, so the update is exact. Before anything is put in place, peft reads each
export back on a fresh base model, and the logits are compared.

The run folder is only read: the server's newest checkpoint and each client's state of its last
accepted round. A server whose clients keep private factors on their own machines does not have
them; copy the client's folder to RUN/clients first.
"""

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from plait.core.init import seeded
from plait.federated.client import Site
from plait.federated.methods import Algorithm
from plait.federated.protocol import Order
from plait.federated.state import Checkpoint, Checkpoints, ClientStore
from plait.run.config import REMOTE_CODE, check_remote_code, did_you_mean
from plait.run.export import (
    ALL,
    DTYPES,
    ExportReport,
    HeldOutRows,
    check_max_rank,
    check_server,
    dependence,
    lock_for,
    loss_refused,
    name_base,
    readers_of,
    refuse_misread,
)
from plait.run.export.logits import base_shift, difference, logits_of, tolerance
from plait.run.federated.config import FederateConfig, load_federate_config
from plait.run.federated.folder import FederatedFolder
from plait.run.federated.setup import Setup, prepare_federation
from plait.run.folder import replace_dir, write_atomic
from plait.run.model import load_base
from plait.upstream.export import EXACT, TOLERATED, to_lora

_PROBE = (4, 16)  # rows and tokens that logits are compared on


@dataclass(frozen=True)
class ClientExport:
    """The result of exporting a client's adapter.

    client: its name. ranks: smallest and largest rank of a layer. layers: how many. error: largest
    part of a layer's dW that is left out (relative Frobenius norm), 0 if exact. logit_error:
    largest difference between the logits of the export, read by peft, and of the run's model;
    logit_shift: largest difference to the base model's, for scale. held_out: what an export that is
    not exact changed of the client's held-out metrics, as text. readers: title of each reader ->
    why it cannot read the export. refused: why nothing was written; "" if it was.
    """

    client: str
    ranks: tuple[int, int] = (0, 0)
    layers: int = 0
    error: float = 0.0
    logit_error: float = 0.0
    logit_shift: float = 0.0
    held_out: tuple[str, ...] = ()
    readers: Mapping[str, list[str]] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Choices:
    """What an export of clients is asked for; each as in plait.run.export.export_run."""

    max_rank: int | None = None
    server: str = ALL
    compact: bool = False
    dtype: str | None = None
    lossy: bool = False


def export_clients(
    run: str | Path,
    out: str | Path,
    client: str | None = None,
    choices: Choices = Choices(),
    *,
    overrides: Sequence[str] = (),
    done: Callable[[ClientExport], None] = lambda entry: None,
) -> list[ClientExport]:
    """Export the adapters of a run into a new folder.

    Args:
        run: the run folder. out: the folder to write. client: one client's name; None: all.
        choices: the form, and what may be lost.
        overrides: `model.trust_remote_code=true`, which the folder's own config cannot say.
        done: called after each client.

    Returns:
        One entry for each client. A client whose update is zero everywhere, because it never took
        part, depends on the input, or would lose more than it may is refused with the reason.

    Raises:
        FileExistsError: `out` exists; or it is in the run folder, and another process writes
            there.
        ValueError: no round is complete, the client is unknown, nothing can be exported, or peft
            reads an export differently.
        StateError: a saved state is missing or damaged.
    """
    out, folder = Path(out), FederatedFolder.open(run)
    _check_new(out)
    check_server(choices.server)
    if choices.max_rank is not None:
        check_max_rank(choices.max_rank, choices.server)
    for text in overrides:
        if not text.startswith(f"{REMOTE_CODE}="):
            raise ValueError(f"command line: {text} cannot be changed after training. Remove it.")
    config = load_federate_config(folder.config, overrides)
    check_remote_code(config.model, folder.config, overrides)
    checkpoint = Checkpoints(folder.server).newest()
    if checkpoint is None or not checkpoint.state.round:
        raise ValueError(f"{folder.path}: no round is complete, so there is nothing to export.")
    setup = prepare_federation(config)
    roster = setup.roster
    if client is not None and client not in roster.clients:
        raise ValueError(
            f"client {client!r} is none of the run's. {did_you_mean(client, roster.clients)} The "
            f"clients are {', '.join(roster.clients)}."
        )
    names = list(roster.clients) if client is None else [client]
    exports: list[ClientExport] = []

    def write(place: Path) -> None:
        check = _Check(setup)
        for name in names:
            with tempfile.TemporaryDirectory() as scratch:
                site = Site(roster, _no_training, scratch, run=checkpoint.run)
                model = _model_of(site, checkpoint, folder.clients, name)
                entry = _export(model, name, place / name, check, choices)
            exports.append(entry)
            done(entry)
        if all(entry.refused for entry in exports):
            raise ValueError(f"client {exports[0].client!r}: {exports[0].refused}")
        card = _card(config, roster.method, checkpoint.state.round, exports)
        write_atomic(place / "README.md", card)
        _check_new(out)  # once more: an export takes a while

    with lock_for(out, run):
        replace_dir(out, write)
    return exports


def _check_new(out: Path) -> None:
    if out.exists():
        raise FileExistsError(f"{out}: exists. Give a new folder, or remove it.")


def _no_training(model: nn.Module, client: str, round: int) -> Any:
    raise AssertionError("nothing is trained here")


def _model_of(site: Site, checkpoint: Checkpoint, states: Path, client: str) -> PeftModel:
    """The client's model at the start of the next round; `site` works on a copy of its state.

    A site removes the generations that are not asked for; those may belong to a running run.
    """
    roster, state = site.roster, checkpoint.state
    method, declared = roster.method, roster.clients[client]
    generation, held = checkpoint.last_accepted.get(client, 0), checkpoint.trunks.get(client, 0)
    store = ClientStore(states, checkpoint.run, client)
    if generation:
        keeps = bool(method.private(roster.first(client), declared))
        if store.path(generation).is_file() or keeps:
            store.read(generation)  # raises if it is damaged
            kept = ClientStore(site.folder, checkpoint.run, client).path(generation)
            kept.parent.mkdir(parents=True)
            shutil.copyfile(store.path(generation), kept)
        else:  # all that it needs comes from the server
            generation, held = 0, 0
    down = method.payload_down(state, declared, held)
    config = site.roster.digest(client)
    order = Order("evaluate", checkpoint.run, state.round + 1, client, generation, config=config)
    model, _ = site.put(order, down)
    assert isinstance(model, PeftModel)
    return model.eval()


def _export(
    model: PeftModel, client: str, place: Path, check: "_Check", choices: Choices
) -> ClientExport:
    what = dependence(model)
    if what is not None:
        reason = f"its update depends on the {what}, so no plain LoRA holds it"
        return ClientExport(client, refused=reason)
    dtype = None if choices.dtype is None else DTYPES[choices.dtype]
    try:
        lora = to_lora(model, rank=choices.max_rank, compact=choices.compact, dtype=dtype)
        readers = readers_of(model, lora)
        refuse_misread(lora, readers, choices.server, choices.compact)
    except ValueError as error:  # NotMergeable is one
        return ClientExport(client, refused=str(error))
    name_base(lora, check.config.model)
    exact = lora.error <= EXACT and lora.rounding <= EXACT
    report = ExportReport(exact, lora.layers, 0.0, 0.0, 0, lora.rank, readers)
    rows = None
    if not exact and (choices.lossy or lora.error <= TOLERATED):
        rows = check.held_out(model, client)
    lora.write(place, lossy=True)  # into a folder that is removed if it is refused
    error, shift, stock = check(model, place, exact)
    if rows is not None:
        report = replace(report, held_out=rows.compare(stock))
    remedy = "Raise or leave out --max-rank, or serve the client's adapter with plait"
    refused = loss_refused(report, check.config.method.name, remedy)
    if refused is not None and not choices.lossy:
        shutil.rmtree(place)
        return ClientExport(client, refused=refused)
    ranks = [layer.rank for layer in lora.layers if layer.rank]
    return ClientExport(
        client,
        (min(ranks), max(ranks)),
        len(ranks),
        lora.error,
        error,
        shift,
        tuple(report.held_out.said()) if report.held_out is not None else (),
        readers,
    )


class _Check:
    """Compares the logits of an export, read by peft on a fresh base, with the run's model."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.config = setup, setup.config
        self.base: Any = None

    def held_out(self, model: PeftModel, client: str) -> HeldOutRows | None:
        """Measure a client's model on its held-out rows; None where it has none here."""
        data, rows = self.setup.data, self.setup.held_out.get(client)
        if data is None or rows is None:
            return None
        own = replace(data, validation=rows, test=None)
        return HeldOutRows(model, own, "validation", self.setup.run)

    def __call__(
        self, model: PeftModel, place: Path, exact: bool
    ) -> tuple[float, float, PeftModel]:
        """Return the largest logit difference, the adapter's largest effect, the model as read.

        Raises:
            ValueError: an exact fp32 export is off by more than rounding.
        """
        if self.base is None:  # no labels: the head, where there is one, comes with the adapter
            labels = None if self.config.model.task == "causal_lm" else model.config.num_labels
            self.base = load_base(self.config.model, labels).to(model.device).eval()
        # The copy has its own modules and the base's own weights.
        base = copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})
        stock = PeftModel.from_pretrained(base, str(place)).eval()
        ids = torch.randint(model.config.vocab_size, _PROBE, generator=seeded("export"))
        inputs = {"input_ids": ids}
        logits = logits_of(model, inputs)
        shift = base_shift(model, inputs, logits)
        error = difference(logits_of(stock, inputs), logits)
        single = self.config.model.dtype == "float32"
        if exact and single and not error <= tolerance(logits):
            raise ValueError(
                f"{place.name}: peft reads the export with logits off by {error:.2e}. Nothing was "
                "written; please report this with the run's config."
            )
        return error, shift, stock


def _card(
    config: FederateConfig, method: Algorithm, rounds: int, exports: list[ClientExport]
) -> str:
    rows = "".join(
        f"| {x.client} | {x.layers} | {_ranks(x)} | {x.error:.2%} | {x.logit_error:.2e} | "
        f"{x.logit_shift:.2e} |\n"
        if not x.refused
        else f"| {x.client} | not exported: {x.refused} | | | | |\n"
        for x in exports
    )
    return (
        f"# Plain LoRAs of the clients\n\nThe clients' adapters after {rounds} rounds of "
        f"{method.key}. Load a folder with stock peft on {config.model.name}, without plait.\n\n"
        "| client | layers | rank | part of dW left out | logits off by | logits moved by |\n"
        f"|---|---|---|---|---|---|\n{rows}{_readers(exports)}{_held_out(exports)}"
    )


def _readers(exports: list[ClientExport]) -> str:
    """Which programs read all exported folders right, and why others do not."""
    reasons: dict[str, list[str]] = {}
    for x in exports:
        for title, of_client in x.readers.items():
            known = reasons.setdefault(title, [])
            known += [reason for reason in of_client if reason not in known]
    right = [title for title, why in reasons.items() if not why]
    others = [f"- not by {title}: {'; '.join(why)}\n" for title, why in reasons.items() if why]
    return f"\nRead right by {', '.join(right)}.\n{''.join(others)}" if reasons else ""


def _held_out(exports: list[ClientExport]) -> str:
    """What exports that are not exact changed of the held-out metrics."""
    lines = "".join(f"- {x.client}: {'; '.join(x.held_out)}\n" for x in exports if x.held_out)
    return f"\nOn the clients' held-out rows, the run -> the export:\n\n{lines}" if lines else ""


def _ranks(x: ClientExport) -> str:
    least, most = x.ranks
    return str(most) if least == most else f"{least} to {most}"
