"""What survives a restart: the server's checkpoints and each client's private state.

Both are frames of `payload`: a digest, a JSON header, safetensors. A file is whole or absent.

    server   <folder>/round-000012.ckpt       after round 12; the last two are kept
    client   <folder>/<run>/<client>/round-000012.state   written before the client answers

A client's private state is versioned by round: the server names the generation to start from,
which is the round of the client's last accepted update (0: its first start). The client takes
exactly that one and discards newer ones, so a rejected, late or lost update rolls back the private
side too, and a resumed server repeats a round from the same private state. A missing or damaged
generation is an error, never a silent fresh start.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from plait.core.files import naming, write_atomic
from plait.federated.adapter import StateDict
from plait.federated.methods import State
from plait.federated.payload import (
    CorruptFrame,
    blob_of,
    check_name,
    pack_tensors,
    unpack_tensors,
)

_VERSION = 1
_KEPT = 2  # server checkpoints
_FILE = re.compile(r"round-(\d{6,})\.(ckpt|state)")
_PACKAGES = ("plait", "torch", "peft", "transformers", "safetensors")


class StateError(RuntimeError):
    """A saved state that cannot be used."""


class MissingState(StateError):
    """A saved state that is missing."""


class CorruptState(StateError):
    """A saved state that is damaged, or that belongs elsewhere."""


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config, independent of the order of its keys."""
    text = json.dumps(config, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """The versions of the libraries that decide the bits."""
    return {name: version(name) for name in _PACKAGES}


def _write(path: Path, header: Mapping[str, Any], tensors: StateDict) -> None:
    write_atomic(path, pack_tensors({"version": _VERSION, **header}, tensors))


def _read(path: Path, remedy: str) -> tuple[dict[str, Any], StateDict]:
    try:
        header, tensors = unpack_tensors(path.read_bytes())
    except CorruptFrame as error:
        raise CorruptState(f"{path}: {error}. {remedy}") from None
    if header.get("version") != _VERSION:
        text = f"{path}: version {header.get('version')!r}, this plait reads {_VERSION}"
        raise CorruptState(f"{text}. {remedy}")
    return header, tensors


def _rounds(folder: Path) -> dict[int, Path]:
    """Round -> file, in order, without what a killed writer left behind."""
    files = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FILE.fullmatch(path.name)
        if match:
            files[int(match[1])] = path
    return dict(sorted(files.items()))


def _sweep(folder: Path) -> None:
    """Remove the temporary files of a writer that was killed."""
    for path in folder.glob(".round-*"):
        path.unlink(missing_ok=True)


# The server -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """All that the server needs to continue after a round.

    run: its name. method: key. config: hash of the run's config. state: the method's.
    last_accepted: client -> round of its last accepted update. trunks: client -> completed rounds
    that its trunk holds. rejections: the guard's. accepted: client -> SHA-256 of its update of this
    round. Sampling is drawn from (seed, round), so it has no state. versions: of the libraries.
    """

    run: str
    method: str
    config: str
    state: State
    last_accepted: dict[str, int] = field(default_factory=dict)
    trunks: dict[str, int] = field(default_factory=dict)
    rejections: dict[str, dict[str, int]] = field(default_factory=dict)
    accepted: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=versions)


class Checkpoints:
    """The server's checkpoints in a folder; one server writes there."""

    def __init__(self, folder: str | Path, keep: int = _KEPT) -> None:
        if keep < 1:
            raise ValueError(f"checkpoint: keep = {keep}. Give 1 or more.")
        self.folder, self.keep = Path(folder), keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write the checkpoint of a round, then drop the oldest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = checkpoint.state
        facts = {f.name: getattr(checkpoint, f.name) for f in fields(checkpoint)}
        facts["state"] = {"round": state.round}
        path = self.folder / f"round-{state.round:06d}.ckpt"
        _write(path, facts, state.tensors)
        for _, old in list(_rounds(self.folder).items())[: -self.keep]:
            old.unlink()
        return path

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint, of any config; None if there is none yet.

        Nothing is changed on the disk, so a reader does not disturb a server at work.

        Raises:
            CorruptState: it is damaged; the message names the one before it.
        """
        files = _rounds(self.folder)
        if not files:
            return None
        *older, (number, path) = files.items()
        remedy = "Remove it to start from the beginning."
        if older:
            remedy = f"Remove it to go on after round {older[-1][0]}, from {older[-1][1].name}."
        facts, tensors = _read(path, remedy)
        facts.pop("version")
        state = State(facts.pop("state", {}).get("round"), tensors)
        try:
            checkpoint = Checkpoint(state=state, **facts)
        except TypeError as error:
            raise CorruptState(f"{path}: {error}. {remedy}") from None
        if state.round != number:
            raise CorruptState(f"{path}: holds round {state.round}. {remedy}")
        return checkpoint

    def latest(self, config: str) -> Checkpoint | None:
        """The newest checkpoint, to continue from; None if there is none yet.

        Args:
            config: hash of the config of the run that continues.

        Raises:
            CorruptState: as `newest`.
            ValueError: it was written under another config.
        """
        _sweep(self.folder)
        checkpoint = self.newest()
        if checkpoint is not None and checkpoint.config != config:
            path = list(_rounds(self.folder).values())[-1]
            raise ValueError(
                f"{path}: was written under another config ({checkpoint.config[:12]}, now "
                f"{config[:12]}). Put the config back, or use another folder."
            )
        return checkpoint


class Spool(Mapping[str, StateDict]):
    """Accepted uploads on the disk, each read when a mean needs it: one in memory at a time.

    A file is mapped into memory and not copied: a mean holds its sum and one upload. The spool
    starts empty: what a killed server left there is removed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.files: dict[str, Path] = {}
        self._digests: dict[str, bytes] = {}
        for path in self.folder.glob("*.upload"):
            path.unlink()

    def add(self, client: str, data: bytes) -> None:
        """Keep the tensors of an upload. They need not outlive this process, so nothing is synced.

        Args:
            client: who sent it. data: the upload as it came, after its checks.
        """
        path, blob = self.folder / f"{check_name('client', client)}.upload", blob_of(data)
        with naming(path):
            path.write_bytes(blob)
        self.files[client], self._digests[client] = path, hashlib.sha256(blob).digest()

    def drop(self, client: str) -> None:
        """Remove an upload that the guard rejected."""
        self.files.pop(client).unlink()

    def clear(self) -> None:
        """Remove all uploads, at the end of a round."""
        for client in list(self.files):
            self.drop(client)

    def __getitem__(self, client: str) -> StateDict:
        path = self.files[client]
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        if digest != self._digests[client]:
            text = "the digest does not match the content: damaged or cut off"
            raise CorruptState(f"{path}: {text}. Run the round again.")
        return load_file(path)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


# The clients ------------------------------------------------------------------------------------


class ClientStore:
    """The private state of one client in one run, by generation."""

    def __init__(self, folder: str | Path, run: str, client: str) -> None:
        self.run, self.client = check_name("run", run), check_name("client", client)
        self.folder = Path(folder) / run / client

    def path(self, generation: int) -> Path:
        """The file of a generation."""
        return self.folder / f"round-{generation:06d}.state"

    def generations(self) -> list[int]:
        """The generations that exist, in order."""
        return list(_rounds(self.folder))

    def save(self, generation: int, tensors: StateDict) -> None:
        """Write the state after a round; call it before the update is sent.

        Args:
            generation: the round, 1, 2, ... tensors: what stays on the client.
        """
        if generation < 1:
            raise ValueError(f"client {self.client!r}: generation = {generation}. Give a round.")
        self.folder.mkdir(parents=True, exist_ok=True)
        facts = {"run": self.run, "client": self.client, "round": generation}
        _write(self.path(generation), facts, tensors)

    def read(self, generation: int) -> StateDict:
        """The state after a round.

        Raises:
            MissingState: it does not exist.
            CorruptState: it is damaged, or that of another client or round.
        """
        remedy = "Bring the file back, or let the client join under another name, from its start."
        path = self.path(generation)
        if not path.is_file():
            raise MissingState(
                f"{path}: generation {generation} of client {self.client!r} is missing; there "
                f"are {self.generations()}. {remedy}"
            )
        facts, tensors = _read(path, remedy)
        facts = {key: facts.get(key) for key in ("run", "client", "round")}
        expected = {"run": self.run, "client": self.client, "round": generation}
        if facts != expected:
            raise CorruptState(f"{path}: holds {facts}, not {expected}. {remedy}")
        return tensors

    def load(self, generation: int) -> StateDict | None:
        """Read the generation that the server named, remove all others; None for generation 0."""
        _sweep(self.folder)
        tensors = self.read(generation) if generation else None
        for number, other in _rounds(self.folder).items():
            if number != generation:
                other.unlink()
        return tensors
