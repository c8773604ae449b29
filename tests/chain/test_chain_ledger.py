"""The ledger: what it holds, what it refuses, and going on from it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import plait
from plait import ChainPlan
from plait.chain import Ledger, chain_of, start
from tests.support import chains as toys

PLANS = {
    "chain": ChainPlan.chain(3, ranks=[2, 1, 2]),
    "rac": ChainPlan.rac(3),
    "xgb": ChainPlan.xgb(4),
    "keep": ChainPlan.chain(3, reset_optimizer=False),
    "merge": ChainPlan.chain(3, storage="merge"),
}


def saved(folder: Path, plan: Any = PLANS["chain"], steps: int = 8) -> Any:
    """A model in mid-chain, with its adapter and ledger in a folder."""
    model = toys.wrap()
    optimizer = toys.adamw(model)
    start(model, plan, 12)
    toys.train(model, optimizer, steps)
    model.save_pretrained(str(folder))
    plait.chain.save(model, folder)
    return model


def test_what_the_ledger_holds(tmp_path: Path) -> None:
    model = saved(tmp_path, ChainPlan.rac(3, seed=7))
    chain = chain_of(model)
    assert chain is not None
    table = json.loads((tmp_path / "chain.json").read_text())
    assert (table["step"], table["link"], table["total_steps"]) == (8, 2, 12)
    assert table["plan"]["recipe"] == "rac"
    assert table["links"][0] == {
        "link": 0, "module": "layers.0.up", "rank": 2, "scaling": 2.0, "steps": 4, "seed": 7,
        "recipe": "rac",
    }  # fmt: skip
    tensors = load_file(tmp_path / "chain.safetensors")
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert torch.equal(tensors["1/layers.2.down/B"], chain.ledger.records[11].B)
    live = toys.layer(model).lora_A["default"].weight
    assert torch.equal(tensors["frozen/layers.0.up"], live)
    again = Ledger.load(tmp_path)
    assert (again.plan, again.step, again.link) == (chain.plan, 8, 2)
    for name in ("layers.0.up", "layers.2.down"):
        for one, two in zip(again.stacked(name), chain.ledger.stacked(name), strict=True):  # type: ignore
            assert torch.equal(one, two)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "chain"))) == [
        "chain.json", "chain.safetensors",
    ]  # fmt: skip


def test_load_for_inference(tmp_path: Path) -> None:
    """The adapter and the ledger of a folder are the trained model, bit for bit."""
    for name in ("chain", "rac", "xgb", "merge"):
        folder = tmp_path / name
        model = saved(folder, PLANS[name]).eval()
        loaded = PeftModel.from_pretrained(toys.Blocks(), str(folder))  # type: ignore[arg-type]
        assert not torch.equal(toys.output(loaded), toys.output(model))
        chain = plait.chain.load(loaded, folder)
        assert torch.equal(toys.output(loaded), toys.output(model))
        assert not any(p.requires_grad for p in loaded.parameters())
        assert list(chain.parameters()) == []
        plait.chain.save(loaded, tmp_path / "again")
        again = (tmp_path / "again" / "chain.json").read_text()
        assert again == (folder / "chain.json").read_text()


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("stop", [4, 6])  # exactly at a boundary; in the middle of a link
def test_going_on_is_not_stopping(name: str, stop: int, tmp_path: Path) -> None:
    """Golden 8 in a loop of one's own: weights, ledger and optimizer, bit for bit."""
    plan = PLANS[name]
    whole = toys.wrap()
    optimizer = toys.adamw(whole)
    start(whole, plan, 12)
    schedule = plait.chain_schedule(plan, optimizer, 12, "cosine")
    toys.train(whole, optimizer, 12, schedule=schedule)

    first = toys.wrap()
    optimizer = toys.adamw(first)
    start(first, plan, 12)
    schedule = plait.chain_schedule(plan, optimizer, 12, "cosine")
    toys.train(first, optimizer, stop, schedule=schedule)
    first.save_pretrained(str(tmp_path))
    plait.chain.save(first, tmp_path)
    state = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}
    torch.save(state, tmp_path / "state.pt")

    second = toys.wrap()
    optimizer = toys.adamw(second)
    second.load_adapter(str(tmp_path), "default", is_trainable=True)
    chain = start(second, plan, 12, resume=tmp_path)
    schedule = plait.chain_schedule(plan, optimizer, 12, "cosine")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    optimizer.load_state_dict(state["optimizer"])
    schedule.load_state_dict(state["schedule"])
    toys.train(second, optimizer, 12 - stop, first=stop, schedule=schedule)
    chain.finish()
    assert torch.equal(toys.output(whole), toys.output(second))
    for (n, p), (m, q) in zip(whole.named_parameters(), second.named_parameters(), strict=True):
        assert n == m
        assert torch.equal(p, q), n
        assert p.requires_grad == q.requires_grad
    plait.chain.save(whole, tmp_path / "a")
    plait.chain.save(second, tmp_path / "b")
    for file in ("chain.json", "chain.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_the_frozen_side_comes_from_the_ledger(tmp_path: Path) -> None:
    """Adapter-only checkpoints of sharded training leave frozen parameters out."""
    model = saved(tmp_path, PLANS["rac"])
    other = toys.wrap()
    toys.adamw(other)
    start(other, PLANS["rac"], 12, resume=tmp_path)
    for n, p in model.named_parameters():
        if "lora_A" in n:
            assert torch.equal(p, other.get_parameter(n)), n


@pytest.mark.parametrize("name", ["chain.json", "chain.safetensors"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        start(toys.wrap(), PLANS["chain"], 12, resume=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: {name} is missing, so the finished links of the chain are unknown. Give a "
        "folder that a chain was saved to."
    )


@pytest.mark.parametrize("damage", ["cut", "bit", "json", "other", "version", "lines"])
def test_a_damaged_ledger(damage: str, tmp_path: Path) -> None:
    saved(tmp_path)
    tensors, table = tmp_path / "chain.safetensors", tmp_path / "chain.json"
    content, text = tensors.read_bytes(), table.read_text()
    where, what = tensors, "damaged, cut off, or of another chain.json (the checksum differs)"
    if damage == "cut":
        tensors.write_bytes(content[: len(content) // 2])
    elif damage == "bit":
        tensors.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "other":
        saved(tmp_path / "other", steps=9)
        tensors.write_bytes((tmp_path / "other" / "chain.safetensors").read_bytes())
        table.write_text(text.replace("a", "b", 0))
        saved(tmp_path / "third", steps=3)
        tensors.write_bytes((tmp_path / "third" / "chain.safetensors").read_bytes())
    else:
        where, what = table, "is not JSON ("
        cut = {
            "json": text[: len(text) // 2],
            "version": text.replace('"version": 1', '"version": 9'),
            "lines": text.replace('"step": 8,', ""),
        }
        table.write_text(cut[damage])
        what = {
            "json": what,
            "version": "is not a ledger that this version of plait reads.",
            "lines": "is incomplete ('step').",
        }[damage]
    with pytest.raises(ValueError) as caught:
        Ledger.load(tmp_path)
    assert str(caught.value).startswith(f"{where}: {what}")
    assert str(caught.value).endswith("Copy both files again, or resume from another checkpoint.")


def test_another_plan_or_model(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(ValueError) as caught:
        start(toys.wrap(), ChainPlan.chain(4, lr="global"), 13, resume=tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the chain was made by another plan (links: 3 -> 4; ranks: [2, 1, 2] -> None; "
        "lr: restart -> global; total_steps: 12 -> 13). Restore the plan, or start again."
    )
    with pytest.raises(ValueError, match=r"was trained on other layers \(layers.0.down and 2 more"):
        start(toys.wrap(target_modules=["up"]), PLANS["chain"], 12, resume=tmp_path)
    wide = toys.Blocks()
    for block in wide.layers:
        block["up"], block["down"] = torch.nn.Linear(10, 9), torch.nn.Linear(9, 10)  # type: ignore
    with pytest.raises(ValueError, match=r"link 0 of layers.0.up is 8 x 10, the layer 9 x 10. Use"):
        plait.chain.load(toys.wrap(wide), tmp_path)
