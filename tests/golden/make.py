"""Writes the golden folders: python tests/golden/make.py FOLDER, from the root of a checkout.

Written by plait 0.1; never write these again: they stand for what users saved. This file is kept to
say what the folders are; it uses the inside of that version, and need not run with a later one. A
new format gets folders of its own beside these.

All commands run inside FOLDER, so that the files hold relative paths only. What `tests/test_golden`
measures is recorded last, by the very functions of that test, in a copy.
"""

import copy
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

import plait
from plait.assets.generator import builtin_rows
from plait.federated.server import RoundRecord
from plait.run.config import load_config
from plait.run.federate import load_federate_config, simulate
from plait.run.train import train
from tests import test_golden as golden
from tests import tiny
from tests.tiny_runs import (
    CHARACTERS,
    copy_rows,
    film_rows,
    interrupt,
    save_model,
    write_rows,
)

STEPS = 10
TARGETS = ["q_proj", "v_proj"]

# Name of the folder -> method and its options.
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "alloc": ("alloc", {"first": 3, "every": 3, "rounds": 2, "n_A": 2}),
    "cola": ("cola", {"num_A": 2, "num_B": 3}),
    "cola_heuristic_sora": (
        "cola",
        {
            "strategy": "heuristic",
            "init": "pissa_split",
            "gates": [{"name": "sora", "l1_weight": 0.1, "xi": 3e-4}],
        },
    ),
    "droplora": ("droplora", {"inner_dropout": 0.5}),
    "dual_lora": ("dual_lora", {"r": 4, "gate_steps": 20}),
    "dual_module": ("dual_module", {"r": 4, "target_r": 1, "tinit": 2, "tfinal": 2, "deltaT": 1}),
    "fedalora_het": ("fedalora_het", {"common_rank": 3}),
    "hydra": ("hydra", {"num_B": 2}),
    "hydra_droplora": (
        "hydra",
        {"num_B": 2, "gates": [{"name": "droplora", "inner_dropout": 0.2, "scope": "step"}]},
    ),
    "molora": ("molora", {"num_experts": 3, "top_k": 2}),
    "nola": ("nola", {"num_basis_A": 8, "num_basis_B": 8}),
    "nola_bfloat16": (
        "nola",
        {"num_basis_A": 8, "num_basis_B": 8, "basis_dtype": "bfloat16", "a0": False},
    ),
    "shared_b_task": ("shared_b", {"routing": "task", "tasks": ["copy", "turn"]}),
    "shared_b_token": ("shared_b", {"num_A": 2}),
    "sora": ("sora", {"r": 4, "l1_weight": 1.0, "xi": 0.05}),
    "sora_pissa": ("sora", {"init": "pissa", "l1_weight": 0.1}),
    "tied": ("tied", {}),
    "tied_vectors": ("tied", {"train": ["u", "v"]}),
}

TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 2,
    "save_strategy": "no",
    "eval_strategy": "no",
    "use_cpu": True,
}
LLAMA, BERT = {"name": "bases/llama"}, {"name": "bases/bert", "task": "classification"}
COPY = {"train": "data/copy.jsonl", "validation": 0.2}
FILMS = {"train": "data/films.jsonl", "validation": "data/films_held_out.jsonl"}
TWO = {"r": 2, "target_modules": TARGETS, "lora_dropout": 0.1}
DUAL_MODULE = {"r": 4, "shared_r": 2, "target_r": 1, "tinit": 2, "tfinal": 2, "deltaT": 1}
ADALORA = {"r": 2, "init_r": 4, "tinit": 1, "tfinal": 2, "deltaT": 1}

# Finished runs.
RUNS: dict[str, dict[str, Any]] = {
    "causal_lm": {
        "model": {"name": "builtin:tiny"},
        "method": {"name": "dual_module", **TWO, **DUAL_MODULE, "target_modules": ["v_proj"]},
        "data": {
            "train": "data/shift.jsonl",
            "validation": "builtin:shift?n=12",
        },
    },
    "classification": {
        "model": BERT,
        "method": {
            "name": "dual_lora",
            "r": 4,
            "gate_steps": 8,
            "target_modules": ["query", "value"],
        },
        "data": FILMS,
        "training": {"learning_rate": 3e-2, "max_steps": 40, "logging_steps": 10},
    },
    "regression": {
        "model": {"name": "bases/llama", "task": "regression"},
        "method": {"name": "cola", **TWO, "num_A": 2, "num_B": 2, "strategy": "random"},
        "data": {"train": "data/counts.csv", "validation": 0.2, "columns": {"label": "count"}},
    },
    "tasks": {
        "model": LLAMA,
        "method": {"name": "shared_b", **TWO, "routing": "task"},
        "data": COPY,
    },
    "router": {
        "model": LLAMA,
        "method": {"name": "hydra", **TWO, "num_B": 3},
        "data": COPY,
    },
    "template": {
        "model": LLAMA,
        "method": {"name": "lora", **TWO, "lr_scale": {"lora_B": 2.0}},
        "optimizer": {"name": "lora_rite"},
        "data": {
            "train": "data/pairs.tsv",
            "validation": 0.2,
            "prompt_template": "{left} => ",
            "completion_template": "{right}.",
        },
    },
    "adalora": {
        "model": LLAMA,
        "method": {"name": "adalora", **TWO, **ADALORA},
        "data": COPY,
        "training": {"learning_rate": 0.1},
    },
    "pissa": {"model": LLAMA, "method": {"name": "pissa", **TWO}, "data": COPY},
    "chain": {
        "model": LLAMA,
        "method": {"name": "lora", **TWO},
        "chain": {"plan": "chain", "links": 2},
        "data": COPY,
    },
    "full": {"model": LLAMA, "method": {"name": "full"}, "data": COPY},
}

# Runs that were interrupted after 5 of 8 steps.
UNFINISHED: dict[str, dict[str, Any]] = {
    "lora": {"method": {"name": "lora", **TWO}},
    "classification": {
        "model": BERT,
        "method": {"name": "lora", "r": 2, "target_modules": ["query"]},
        "data": FILMS,
    },
    "adalora": {"method": {"name": "adalora", **TWO, **ADALORA}},
    "chain": {"method": {"name": "lora", **TWO}, "chain": {"plan": "rac", "links": 4}},
    "dual_module": {"method": {"name": "dual_module", **TWO, **DUAL_MODULE}},
    "lora_rite": {"method": {"name": "shared_b", **TWO}, "optimizer": {"name": "lora_rite"}},
    "lorsum": {
        "method": {"name": "lora", **TWO, "lora_dropout": 0.0},
        "optimizer": {"name": "lorsum"},
    },
    "pissa": {"method": {"name": "pissa", **TWO}},
}

# Federated runs; the one named `interrupted` is `fedalora`, stopped in round 2 of 3 when
# the clients had trained and the server had not stored the round.
FEDERATED: dict[str, dict[str, Any]] = {
    "fedit": {
        "method": {"name": "lora", "r": 2, "target_modules": TARGETS},
        "federated": {"method": "fedit"},
        "partition": {"kind": "dirichlet", "clients": 3, "by": "task", "alpha": 1.0},
        "sampling": {"fraction": 0.7},
    },
    "fedalora": {
        "method": {"name": "lora", "r": 2, "target_modules": TARGETS},
        "federated": {"method": "fedalora"},
        "partition": {"kind": "iid", "clients": 2},
        "evaluation": {"after_training": True},
        "local": {"rounds": 3},
    },
    "fedalora_het": {
        "method": {"name": "fedalora_het", "common_rank": 3, "target_modules": TARGETS},
        "federated": {
            "method": "fedalora_het",
            "ranks": {"copy": 3, "turn": 2},
            "options": {"common_rank": 3},
        },
        "partition": {"kind": "by_column", "by": "task"},
        "guard": {"min_updates": 2},
    },
    "flora": {
        "method": {"name": "lora", "target_modules": TARGETS},
        "federated": {"method": "flora", "ranks": [1, 2]},
        "partition": {"kind": "iid", "clients": 2},
    },
}
FEDERATED["interrupted"] = FEDERATED["fedalora"]


def bases_and_data() -> None:
    """Two random models with their tokenizers, and the rows."""
    for kind in ("llama", "bert"):
        save_model(kind, Path("bases") / kind)
    teach_copying()
    Path("data").mkdir()
    write_rows(Path("data/copy.jsonl"), copy_rows(tasks=True))
    rows = film_rows(32)
    write_rows(Path("data/films.jsonl"), rows[:24])
    write_rows(Path("data/films_held_out.jsonl"), rows[24:])
    texts = [row["prompt"].strip(">?") + CHARACTERS[i % 8] for i, row in enumerate(copy_rows(32))]
    lines = ["text,count", *(f"{text},{text.count('a') / 2}" for text in texts)]
    Path("data/counts.csv").write_text("\n".join(lines) + "\n")
    lines = ["left\tright", *(f"{text}\t{text[::-1]}" for text in texts)]
    Path("data/pairs.tsv").write_text("\n".join(lines) + "\n")
    write_rows(Path("data/shift.jsonl"), builtin_rows("shift?n=32", "train", 0))


def teach_copying() -> None:
    """Train the causal base to answer `ab>` with `ab`, so that it has something to say."""
    model = golden.base().train()
    tokenizer = AutoTokenizer.from_pretrained("bases/llama")
    rows = [f"{row['prompt']}{row['completion']}" for row in copy_rows(64)]
    ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(400):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained("bases/llama")


def trained(config: Any, plan: plait.ChainPlan | None = None) -> PeftModel:
    """The base with an adapter after some steps of AdamW, its chain started before them."""
    ids = tiny.tokens(8, 12, key=1)
    with tiny.seed(1):
        model = get_peft_model(golden.base(), copy.deepcopy(config))
        if config.peft_type == "PLAIT_ALLOC":
            development = tiny.tokens(4, 12, key=2)
            plait.set_development_batch(model, {"input_ids": development, "labels": development})
        inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
        if getattr(config, "tasks", None):
            inputs["task_ids"] = torch.arange(len(ids)) % 2
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=2e-2)
        if plan is not None:
            plait.chain.start(model, plan, total_steps=STEPS)
        model.train()
        for _ in range(STEPS):
            model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


def adapters() -> None:
    """An adapter of each method, chains, and what a weighted sum becomes."""
    common = {"target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    for name, (key, options) in ADAPTERS.items():
        cls = plait.find(key).config
        config = cls(**{"r": 2, "total_steps": STEPS, **common, **options})
        trained(config).save_pretrained(f"adapters/{name}")
    plain = LoraConfig(r=2, lora_alpha=4, target_modules=TARGETS, task_type="CAUSAL_LM")
    plans = {
        "chain_lora": plait.ChainPlan.chain(links=3),
        "chain_rac": plait.ChainPlan.rac(links=3, freeze="A", seed=0),
        "chain_xgb": plait.ChainPlan.xgb(links=3),
    }
    for name, plan in plans.items():
        model = trained(plain, plan)
        model.save_pretrained(f"adapters/{name}")
        plait.chain.save(model, f"adapters/{name}")
    model = PeftModel.from_pretrained(golden.base(), "adapters/chain_lora")
    plait.chain.load(model, "adapters/chain_lora")
    plait.chain.save_stacked(model, "exports/chain_lora")
    golden.weighted_sum().write("exports/weighted_sum")
    for place in Path().glob("*/*/README.md"):  # peft's empty card
        place.unlink()


def write_config(name: str, folder: str, raw: dict[str, Any]) -> str:
    """A config as a user writes it."""
    file = Path("configs") / f"{name}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump({**raw, "output": {"dir": folder}}, sort_keys=False)
    file.write_text(text)
    return str(file)


def run_config(name: str, folder: str, raw: dict[str, Any]) -> str:
    """The config of a run; what `raw` leaves out is that of most runs here."""
    whole = {
        "model": LLAMA,
        "data": COPY,
        **raw,
        "training": {**TRAINING, **raw.get("training", {})},
        "evaluation": {"max_new_tokens": 8, "batch_size": 8},
    }
    return write_config(name, folder, whole)


def runs() -> None:
    """Finished runs, and interrupted ones with what an uninterrupted one ends with."""
    for name, raw in RUNS.items():
        folder = train(load_config(run_config(name, f"runs/{name}", raw)))
        shutil.rmtree(folder.checkpoints)
        folder.loss_curve.unlink()
        if raw["model"]["name"] == "builtin:tiny":  # stored as the place where plait is installed
            file = folder.adapter / "adapter_config.json"
            config = json.loads(file.read_text())
            config["base_model_name_or_path"] = "builtin:tiny"
            file.write_text(json.dumps(config, indent=2, sort_keys=True))
    for name, raw in UNFINISHED.items():
        cfg = load_config(run_config(f"unfinished_{name}", f"unfinished/{name}", raw))
        whole = train(cfg)
        kept = Path("uninterrupted") / name
        kept.mkdir(parents=True)
        for file in ("adapter/adapter_model.safetensors", "eval.json"):
            shutil.copy(whole.path / file, kept)
        shutil.rmtree(whole.path)
        try:
            train(cfg, callbacks=[interrupt(5)])
        except KeyboardInterrupt:
            for file in (whole.path / "checkpoints").rglob("README.md"):
                file.unlink()
        else:
            raise AssertionError(f"{name} was not interrupted")


def federated() -> None:
    """Federated runs and an interrupted one."""
    common = {
        "model": LLAMA,
        "data": {"train": "data/copy.jsonl", "validation": "data/copy.jsonl"},
        "local": {"rounds": 2, "steps": 2, "batch_size": 4, "learning_rate": 1e-2},
    }

    def stop(record: RoundRecord) -> None:
        if record.round == 2:
            raise KeyboardInterrupt

    for name, raw in FEDERATED.items():
        whole = {**common, **raw, "local": {**common["local"], **raw.get("local", {})}}
        file = write_config(f"federated_{name}", f"federated/{name}", whole)
        cut = name == "interrupted"
        try:
            folder = simulate(load_federate_config(file), done=stop if cut else None)
        except KeyboardInterrupt:
            assert cut
        else:
            assert not cut
            for picture in folder.path.glob("*.png"):
                picture.unlink()


def record() -> None:
    """What the test measures: expected.json and expected.safetensors."""
    values: dict[str, Any] = {
        "machine": {
            **golden.machine(),
            "python": platform.python_version(),
        }
    }
    tensors: dict[str, Tensor] = {"ids": tiny.tokens(3, 8)}
    save_file(tensors, "expected.safetensors")  # the measures read the ids
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copytree(here, Path(scratch) / "golden")
        os.chdir(Path(scratch) / "golden")
        for name in golden.places("adapters", "exports"):
            tensors[f"logits/{name}"] = golden.adapter_logits(name)
        measures: dict[str, tuple[Callable[[str], Any], list[str]]] = {
            "evaluation": (golden.evaluation, list(RUNS)),
            "generation": (golden.generation, list(golden.PROMPTS)),
            "inspection": (golden.inspection, list(golden.INSPECTED)),
            "federated": (golden.federated, ["report"]),
        }
        for kind, (measure, names) in measures.items():
            values[kind] = {name: measure(name) for name in names}
        for name in golden.EXPORTED:
            tensors[f"logits/export/{name}"] = golden.export_logits(name)
        for name in golden.FEDERATED_EXPORTS:
            for client, logits in golden.client_logits(name).items():
                tensors[f"logits/federated/{name}/{client}"] = logits
    os.chdir(here)
    save_file(tensors, "expected.safetensors")
    Path("expected.json").write_text(json.dumps(values, indent=1) + "\n")


def main(folder: str) -> None:
    """Write all into a folder that does not exist or holds no golden folders."""
    out = Path(folder)
    if (out / "bases").exists():
        raise SystemExit(f"{out}: the golden folders are there. They are never written again.")
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    os.chdir(out)
    bases_and_data()
    adapters()
    runs()
    federated()
    record()


if __name__ == "__main__":
    main(sys.argv[1])
