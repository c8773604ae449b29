"""Count what a method keeps and makes: exact on every machine, however busy it is.

    python -m benchmarks.speed.counts saved       # bytes saved for the backward, fp32 and bf16
    python -m benchmarks.speed.counts layer       # peak of one 4096 x 11008 layer in a step
    python -m benchmarks.speed.counts vocabulary  # the output layer on target positions only

Saved bytes are those of the storages that the forward of a training step keeps, each once, without
parameters and buffers. The peak is the largest sum of the storages that are alive at once in a
step, weights and optimizer state included. Only the seconds of `vocabulary` depend on the machine.
"""

import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks._common import parser, read_results, table, versions, write_results
from benchmarks.speed.ratios import LINEARS, METHODS, config, ids_of, llama, model_of
from plait.run.folder import environment
from plait.run.trainer import only_targets

RESULTS = Path(__file__).parent / "results" / "counts.json"
MIB = 2**20


class Live(TorchDispatchMode):
    """The bytes of the storages that are alive, and the most there were."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()
        for t in given:
            self._add(t)

    def _add(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        place = storage.data_ptr()
        if not place or place in self.known:
            return
        self.known.add(place)
        size = storage.nbytes()
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        weakref.finalize(storage, self._drop, place, size)

    def _drop(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.bytes -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor):
                self._add(t)
        return out


def saved(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes that a forward keeps for its backward, beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        loss = run()
    total = sum(kept.values())
    del loss
    return total


def saved_of(name: str, dtype: torch.dtype) -> float:
    """MiB saved by the step of benchmarks.speed.ratios."""
    model = model_of(name, dtype)
    tokens = torch.randint(0, 512, (4, 256), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": tokens, "labels": tokens, **ids_of(name, 4)}
    return saved(model, lambda: model(**inputs).loss) / MIB


class Layer(nn.Module):
    """One linear layer of a 7B model."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4096, 11008, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(tokens, 4096) to (tokens, 11008)."""
        return self.linear(x)


def peak_of(name: str, dtype: torch.dtype, tokens: int) -> float:
    """MiB of the largest moment in the second step of one layer."""
    model: Any = Layer().to(dtype).requires_grad_(False)
    if name != "frozen":
        model = get_peft_model(model, config(name, ["linear"], r=16))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3) if trained else None
    x = torch.randn(tokens, 4096).to(dtype).requires_grad_()

    def step() -> None:
        model(x).float().square().mean().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        x.grad = None

    step()
    states = optimizer.state.values() if optimizer is not None else ()
    state = [t for one in states for t in one.values() if isinstance(t, Tensor)]
    with Live([*model.parameters(), *model.buffers(), *state, x]) as live:
        step()
    return live.peak / MIB


def vocabulary(size: int = 128_256, tokens: int = 512, targets: int = 64) -> dict[str, Any]:
    """Peak and CPU seconds of a step whose rows have 64 targets, with and without narrowing."""
    base = llama(256, 688, 1, size).requires_grad_(False)
    model: Any = get_peft_model(base, config("sora", LINEARS)).train()
    ids = torch.randint(0, size, (1, tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :-targets] = -100
    found = {}
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    for name, given in (
        ("all positions", inputs),
        ("target positions", only_targets(inputs, size)),
    ):
        assert given is not None
        model(**given).loss.backward()
        begin = time.process_time()
        loss = model(**given).loss
        loss.backward()
        seconds = time.process_time() - begin
        with Live([*model.parameters(), *model.buffers()]) as live:
            model(**given).loss.backward()
        found[name] = {"peak": live.peak / MIB, "seconds": seconds, "loss": float(loss.detach())}
    return found


def page(results: dict[str, Any]) -> str:
    """The tables of what was counted."""
    parts = []
    if "saved" in results:
        rows = [[n, *(f"{v:.2f}" for v in own)] for n, own in results["saved"]["MiB"].items()]
        parts += [
            "### MiB saved for the backward of the training step above\n",
            table(["variant", "fp32", "bf16"], rows),
        ]
    if "layer" in results:
        own = results["layer"]
        rows = [
            [
                n,
                *(
                    f"{v:.0f} ({v / base:.2f})"
                    for v, base in zip(p, own["MiB"]["lora"], strict=True)
                ),
            ]
            for n, p in own["MiB"].items()
        ]
        parts += [
            f"### Peak of a step of one 4096 x 11008 layer, {own['tokens']} tokens, r = 16\n",
            "MiB, weights and optimizer state included, and in brackets the share of LoRA's.\n",
            table(["variant", "fp32", "bf16"], rows),
        ]
    if "vocabulary" in results:
        rows = [
            [n, f"{v['peak']:.0f}", f"{v['seconds']:.2f}", f"{v['loss']:.6f}"]
            for n, v in results["vocabulary"]["found"].items()
        ]
        parts += [
            "### A vocabulary of 128,256: logits of all 512 positions, and of 64 targets\n",
            f"One step, one thread, {versions(results['vocabulary']['environment'], 'torch')}.\n",
            table(["logits", "peak MiB", "CPU s", "loss"], rows),
        ]
    return "\n".join(parts)


def main() -> None:
    """Count some of it and write it into the results."""
    arguments = parser(__doc__)
    kinds = ["saved", "layer", "vocabulary"]
    arguments.add_argument("what", nargs="+", choices=[*kinds, "all"])
    args = arguments.parse_args()
    torch.set_num_threads(1)
    results = read_results(RESULTS)
    both = (torch.float32, torch.bfloat16)
    for kind in kinds if "all" in args.what else args.what:
        if kind == "saved":
            names = ["frozen", "lora", "lora-native", "full", *METHODS]
            results[kind] = {"MiB": {n: [saved_of(n, dtype) for dtype in both] for n in names}}
        elif kind == "layer":
            names, tokens = ["frozen", "lora", "cola-kaiming", "dual_lora"], 256
            found = {n: [peak_of(n, dtype, tokens) for dtype in both] for n in names}
            results[kind] = {"MiB": found, "tokens": tokens}
        else:
            results[kind] = {"found": vocabulary()}
        results[kind]["environment"] = environment()
        print(page({kind: results[kind]}), flush=True)
        write_results(RESULTS, results, page(results))


if __name__ == "__main__":
    main()
