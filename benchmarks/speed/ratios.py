"""Measure what a method costs beside peft's LoRA and the frozen model, in one process.

    python -m benchmarks.speed.ratios calls       # 50 layers of 16 x 16: the price of a call
    python -m benchmarks.speed.ratios step        # a training step of a small Llama, fp32
    python -m benchmarks.speed.ratios step --bf16
    python -m benchmarks.speed.ratios generate    # greedy tokens of an adapter that is not merged
    python -m benchmarks.speed.ratios adapters    # 8, 32 and 128 adapters in one training batch
    python -m benchmarks.speed.ratios served      # the same without gradients
    python -m benchmarks.speed.ratios arms        # 8 arms of a sweep in one process
    python -m benchmarks.speed.ratios calls --only cola-kaiming dual_lora

Variants take turns, forwards and backwards, in each round; a figure is the median over the rounds
of the ratio within a round, with the quartiles. CPU time of one thread. `self` is the reference
measured against a second one of itself: outside 1.00 +- .03 the run tells nothing.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import plait
from benchmarks._common import parser, read_results, table, versions, write_results
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "ratios.json"

# Name -> registry key and options beside r, lora_alpha and lora_dropout = 0.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "cola-kaiming": ("cola", {"init": "kaiming"}),
    "cola-pissa": ("cola", {"init": "pissa"}),
    "cola-8x8": ("cola", {"init": "kaiming", "num_A": 8, "num_B": 8}),
    "cola-heuristic": ("cola", {"init": "kaiming", "strategy": "heuristic"}),
    "cola-random": ("cola", {"init": "kaiming", "strategy": "random"}),
    "droplora": ("droplora", {}),
    "sora": ("sora", {}),
    "alloc": ("alloc", {}),
    "tied": ("tied", {}),
    "nola": ("nola", {}),
    "dual_module": ("dual_module", {"total_steps": 1000}),
    "fedalora_het": ("fedalora_het", {}),
    "shared_b": ("shared_b", {"num_A": 3}),
    "shared_b-task": ("shared_b", {"routing": "task", "tasks": ["a", "b", "c"]}),
    "hydra": ("hydra", {"num_B": 3}),
    "molora": ("molora", {"num_experts": 3}),
    "dual_lora": ("dual_lora", {"r": 16}),
}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def config(name: str, targets: list[str], **common: Any) -> Any:
    """The config of a variant; "lora" is upstream's."""
    shared = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": targets, **common}
    if name == "lora":
        return LoraConfig(**shared)
    key, options = METHODS[name]
    return plait.find(key).config(**{**shared, **options})


class Stack(nn.Module):
    """50 small layers, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(50))

    def forward(self, x: torch.Tensor, **_: Any) -> torch.Tensor:
        """(rows, 16) to (rows, 16)."""
        for layer in self.layers:
            x = layer(x)
        return x


def ids_of(name: str, rows: int) -> dict[str, Any]:
    """Task ids, for a method that routes by them."""
    return {"task_ids": torch.arange(rows) % 3} if name == "shared_b-task" else {}


def calls(name: str, training: bool) -> tuple[Callable[[], float], Callable[[], float] | None]:
    """Forward, and forward with backward, of the small layers; seconds of 20 runs."""
    torch.manual_seed(0)
    base = Stack().requires_grad_(False)
    model: Any = base
    if name != "frozen":
        model = get_peft_model(base, config(name, [str(i) for i in range(50)]))  # type: ignore
    model.train(training)
    x, ids = torch.randn(4, 16, requires_grad=training), ids_of(name, 4)

    def forward() -> float:
        begin = time.process_time()
        for _ in range(20):
            model(x, **ids)
        return time.process_time() - begin

    def both() -> float:
        begin = time.process_time()
        for _ in range(20):
            model(x, **ids).sum().backward()
        return time.process_time() - begin

    if training:
        return both, None

    def evaluate() -> float:
        with torch.no_grad():
            return forward()

    return evaluate, None


def llama(hidden: int, inner: int, layers: int, vocabulary: int) -> Any:
    """A Llama with random weights."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    return LlamaForCausalLM(shape)


def model_of(name: str, dtype: torch.dtype) -> Any:
    """The model of a variant; each sends a gradient into the first layer."""
    base = llama(512, 1376, 2, 512).to(dtype).requires_grad_(False)
    model: Any = base
    if name == "full":
        base.requires_grad_(True)
    elif name == "lora-native":
        model = get_peft_model(base, config("lora", LINEARS), autocast_adapter_dtype=False)
    elif not name.startswith("frozen"):
        model = get_peft_model(base, config(name, LINEARS))
    base.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out if out.requires_grad else out.requires_grad_()
    )
    return model.train()


def step(name: str, dtype: torch.dtype) -> Callable[[], float]:
    """A training step of 4 x 256 tokens."""
    model = model_of(name, dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    tokens = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    ids = ids_of(name, 4)

    def run() -> float:
        gc.collect()
        begin = time.process_time()
        model(input_ids=tokens, labels=tokens, **ids).loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return time.process_time() - begin

    return run


def generate(name: str, wide: bool) -> Callable[[], float]:
    """128 greedy tokens after one, on a model of 260,000 parameters or a wider one."""
    base = llama(512, 1376, 4, 512) if wide else llama(64, 172, 5, 512)
    model: Any = base
    if name != "base":
        model = get_peft_model(base, config(name, LINEARS))
        ids = ids_of(name, 1)
        if ids:
            model.base_model.set_task("b")
    model.eval()
    start = torch.ones(1, 1, dtype=torch.long)
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False, "pad_token_id": 0}

    def run() -> float:
        gc.collect()
        begin = time.process_time()
        with torch.no_grad():
            model.generate(input_ids=start, **options)
        return time.process_time() - begin

    return run


MANY = (8, 32, 128)
ROWS = 128  # rows of a batch of many adapters, 8 tokens each


def adapters(name: str, count: int, training: bool) -> Callable[[], float]:
    """Gradients, or outputs, of 1,024 tokens in rows of 8, shared out among some adapters."""
    base = llama(256, 688, 2, 512).requires_grad_(False)
    names = [f"number {i}" for i in range(count)]
    model: Any = get_peft_model(base, config(name, LINEARS), adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, config(name, LINEARS))
    model.base_model.set_adapter(names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:  # one step: the adapters are in use, not fresh copies of each other
        p.grad = torch.zeros_like(p)
    torch.optim.SGD(trained, lr=0.1).step()
    if training:
        base.get_input_embeddings().register_forward_hook(
            lambda module, args, out: out if out.requires_grad else out.requires_grad_()
        )
    model.train(training)
    tokens = torch.randint(0, 512, (ROWS, 8), generator=generator)
    each = [names[i * count // ROWS] for i in range(ROWS)]
    extra = {"adapter_names": each} if count > 1 else {}

    def run() -> float:
        gc.collect()
        begin = time.process_time()
        if training:
            model(input_ids=tokens, labels=tokens, **extra).loss.backward()
        else:
            with torch.no_grad():
                model(input_ids=tokens, **extra)
        taken = time.process_time() - begin
        model.zero_grad()
        return taken

    return run


def arms(name: str, count: int, rows: int) -> Callable[[], float]:
    """20 steps of some arms on a model of 260,000 parameters, each with rows of 32 tokens."""
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, torch.Tensor]:
        tokens = torch.randint(0, 512, (rows, 32), generator=generator)
        return {"input_ids": tokens, "labels": tokens}

    sweep = [
        plait.Arm(f"arm {i}", config(name, LINEARS, seed=i), [batch() for _ in range(20)], lr=1e-3)
        for i in range(count)
    ]

    def run() -> float:
        base = llama(64, 172, 5, 512).requires_grad_(False)
        gc.collect()
        begin = time.process_time()
        plait.train_together(base, sweep)
        return time.process_time() - begin

    return run


def measure(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each variant in each round, after two rounds that do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round in range(rounds + 2):
        order = list(runs) if round % 2 else list(reversed(runs))
        for name in order:
            taken = runs[name]()
            if round > 1:
                seconds[name].append(taken)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, to: str) -> tuple[float, float, float]:
    """Median and quartiles of the ratio within a round."""
    ratios = [a / b for a, b in zip(seconds[name], seconds[to], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, low, high


KINDS = ("calls", "evaluate", "step", "step bf16", "generate", "adapters", "served", "arms")
TITLES = {
    "calls": "Forward and backward of 50 layers of 16 x 16, 4 rows",
    "evaluate": "Forward of the same layers in evaluation",
    "step": "A training step, fp32: 2 blocks of hidden size 512, 1,024 tokens, r = 8",
    "step bf16": "The same step, bf16 base",
    "generate": "128 greedy tokens, adapters not merged, hidden size 64, 5 blocks",
    "adapters": "Gradients of 128 rows of 8 tokens, hidden size 256, by number of adapters",
    "served": "The same rows without gradients",
    "arms": "20 steps of 8 arms in one process, hidden size 64, rows of 32 tokens",
}


def variants(kind: str, only: list[str] | None) -> tuple[dict[str, Callable[[], float]], list[str]]:
    """The runs of a kind by name, and the names of those that others are divided by."""
    names = only or [n for n in METHODS if kind != "generate" or n != "dual_lora"]
    if kind in ("adapters", "served"):
        training, method = kind == "adapters", (only or ["sora"])[0]
        runs = {"one": adapters(method, 1, training), "self": adapters(method, 1, training)}
        for count in MANY:
            runs[f"{count} adapters"] = adapters(method, count, training)
        return runs, ["one"]
    if kind == "arms":
        method = (only or ["sora"])[0]
        runs = {"one": arms(method, 1, 1), "self": arms(method, 1, 1)}
        return runs | {"8 arms": arms(method, 8, 1)}, ["one"]
    makers: dict[str, Callable[[str], Callable[[], float]]] = {
        "calls": lambda n: calls(n, True)[0],
        "evaluate": lambda n: calls(n, False)[0],
        "step": lambda n: step(n, torch.float32),
        "step bf16": lambda n: step(n, torch.bfloat16),
        "generate": lambda n: generate(n, wide=False),
        "generate wide": lambda n: generate(n, wide=True),
    }
    make, references = makers[kind], ["lora"]
    runs = {"lora": make("lora"), "self": make("lora")}
    if kind.startswith("step"):
        runs |= {name: make(name) for name in ("frozen", "frozen-2", "lora-native", "full")}
        references.append("frozen")
    elif kind.startswith("generate"):
        runs["base"] = make("base")
    return runs | {name: make(name) for name in names}, references


def figures(kind: str, only: list[str] | None, rounds: int) -> dict[str, Any]:
    """Measure one kind; `valid` tells whether a reference beside itself gave 1.00 +- .03."""
    load = os.getloadavg()[0]
    runs, references = variants(kind, only)
    seconds = measure(runs, rounds)
    found = {n: {to: ratio(seconds, n, to) for to in references} for n in runs}
    return {
        "ratios": found,
        "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "rounds": rounds,
        "valid": abs(found["self"][references[0]][0] - 1) <= 0.03,
        "load": [round(load, 1), round(os.getloadavg()[0], 1)],
        "environment": environment(),
    }


def page(results: dict[str, Any]) -> str:
    """The tables of all kinds, with their conditions."""
    parts = []
    for kind, title in TITLES.items():
        if kind not in results:
            continue
        one = results[kind]
        references = list(next(iter(one["ratios"].values())))
        rows = [
            [name, f"{one['milliseconds'][name]:.1f}"]
            + [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in own.values()]
            for name, own in one["ratios"].items()
        ]
        packages = versions(one["environment"], "torch", "peft", "transformers")
        state = "" if one["valid"] else " **Void: `self` is outside 1.00 +- 0.03.**"
        note = f"{one['rounds']} rounds, one thread, {packages}"
        if "load" in one:
            cores = one["environment"]["cpu_count"]
            note += f"; load of the machine {one['load'][0]} to {one['load'][1]} on {cores} cores"
        if "commit" in one:
            note += f"; measured at commit {one['commit']}"
        head = ["variant", "ms", *(f"/ {to}" for to in references)]
        parts += [f"### {title}\n", f"{note}.{state}\n", table(head, rows)]
    return "\n".join(parts)


def main() -> None:
    """Measure some kinds of figures and write them into the results."""
    arguments = parser(__doc__)
    arguments.add_argument("what", nargs="+", choices=[*KINDS, "all", "generate wide", "page"])
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--only", nargs="*", help="variants; default: all")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    results = read_results(RESULTS)
    for kind in KINDS if "all" in args.what else [k for k in args.what if k != "page"]:
        results[kind] = figures(kind, args.only, args.rounds)
        print(page({kind: results[kind]}), flush=True)
        write_results(RESULTS, results, page(results))
    write_results(RESULTS, results, page(results))


if __name__ == "__main__":
    main()
