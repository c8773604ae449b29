"""The Flower app of a run: what is shipped in it, and its server program."""

import io
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="needs plait[federated]")

from flwr.app import Context, RecordDict

from plait.federated.engines.flower.exchange import GridExchange
from plait.run.deploy.submit import write_app
from plait.run.federated.setup import Setup
from tests.support import ROOT
from tests.support.flower import FakeGrid, _task, exchanged, node  # noqa: F401# noqa: F401

EXAMPLE = ROOT / "examples" / "federated" / "fedalora_het.yaml"


def test_the_app_holds_its_programs_and_the_config_and_nothing_else(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    folder = write_app(tmp_path / "app", EXAMPLE)
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as fab:
        names = {"pyproject.toml", "server_app.py", "client_app.py", "run.yaml", ".info/CONTENT"}
        assert set(fab.namelist()) == names
        assert fab.read("run.yaml") == EXAMPLE.read_bytes()


def test_the_server_program_conducts_and_its_errors_name_their_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import plait.run.federated.conduct as federate

    monkeypatch.setattr(federate, "open_folder", lambda config, resume: None)
    called: list[tuple[str, int, bool]] = []

    def conduct(setup: Setup, exchange: GridExchange, *, resume: bool, done: Any) -> None:
        called.append((setup.config.federated.method, exchange.least or 0, resume))
        exchange.wait = 0.1
        exchanged(exchange, "a")

    monkeypatch.setattr(federate, "conduct", conduct)
    app = runpy.run_path(str(write_app(tmp_path / "app", EXAMPLE) / "server_app.py"))["app"]

    def context(resume: bool) -> Context:
        return Context(1, 1, {}, RecordDict(), {"resume": resume})

    app(FakeGrid({1: node("a")}), context(False))
    with pytest.raises(RuntimeError, match=r"^TooFewNodes: federated: 1 of 1 clients"):
        app(FakeGrid({}), context(True))
    assert called == [("fedalora_het", 2, False), ("fedalora_het", 2, True)], "min_updates is 2"
