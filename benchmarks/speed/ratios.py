"""Measure what a method costs beside peft's LoRA and the frozen model, in one process.

    python -m benchmarks.speed.ratios calls       # 50 layers of 16 x 16: the price of a call
    python -m benchmarks.speed.ratios step        # a training step of a small Llama, fp32
    python -m benchmarks.speed.ratios step --bf16
    python -m benchmarks.speed.ratios generate    # greedy tokens of an adapter that is not merged
    python -m benchmarks.speed.ratios calls --only cola-kaiming dual_lora

Variants take turns, forwards and backwards, in each round; a figure is the median over the rounds
of the ratio within a round, with the quartiles. CPU time of one thread. `self` is the reference
measured against a second one of itself: outside 1.00 +- .03 the run tells nothing.
"""

import gc
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
from benchmarks._common import parser, read_results, table, write_results
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


def step(name: str, dtype: torch.dtype) -> Callable[[], float]:
    """A training step of 4 x 256 tokens; every variant sends a gradient into the first layer."""
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
    model.train()
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


def main() -> None:
    """Measure one kind of figure and write it into the results."""
    arguments = parser(__doc__)
    arguments.add_argument("what", choices=["calls", "evaluate", "step", "generate"])
    arguments.add_argument("--bf16", action="store_true", help="with step: a bf16 base")
    arguments.add_argument("--wide", action="store_true", help="with generate: hidden size 512")
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--only", nargs="*", help="variants; default: all")
    arguments.add_argument("--label", default="", help="what is measured, such as a commit")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    names = args.only or [n for n in METHODS if args.what != "generate" or n != "dual_lora"]
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    makers: dict[str, Callable[[str], Callable[[], float]]] = {
        "calls": lambda n: calls(n, True)[0],
        "evaluate": lambda n: calls(n, False)[0],
        "step": lambda n: step(n, dtype),
        "generate": lambda n: generate(n, args.wide),
    }
    make = makers[args.what]
    runs = {"lora": make("lora"), "self": make("lora")}
    references = ["lora"]
    if args.what == "step":
        extra = ["frozen", "frozen-2", "lora-native", "full"]
        runs |= {name: make(name) for name in extra}
        references.append("frozen")
    elif args.what == "generate":
        runs["base"] = make("base")
    runs |= {name: make(name) for name in names}
    seconds = measure(runs, args.rounds)
    rows = []
    found: dict[str, Any] = {}
    for name in runs:
        found[name] = {to: ratio(seconds, name, to) for to in references}
        cells = [f"{m:.2f} ({a:.2f} to {b:.2f})" for m, a, b in found[name].values()]
        rows.append([name, f"{1e3 * statistics.median(seconds[name]):.1f}", *cells])
    kind = args.what + (" bf16" if args.bf16 else "") + (" wide" if args.wide else "")
    key = f"{kind} {args.label}".strip()
    print(table(["variant", "ms", *(f"/ {to}" for to in references)], rows))
    results = read_results(RESULTS)
    results[key] = {
        "ratios": found,
        "milliseconds": {n: 1e3 * statistics.median(s) for n, s in seconds.items()},
        "rounds": args.rounds,
        "environment": environment(),
    }
    write_results(RESULTS, results)


if __name__ == "__main__":
    main()
