"""NOLA: the bases value by value, their mixture and its gradient, what is stored and what not."""

import copy
import gc
import json
import math
import pickle
import weakref
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM

import plait
from plait.methods import _bases as bases
from plait.methods._bases import Mixture, basis, mixture, values
from plait.testing import helpers, tiny
from plait.testing.case import Case
from plait.testing.helpers import (
    adamw,
    batch,
    deltas,
    layers,
    logits,
    one_delta,
    one_layer,
    random_state_kept,
    relative,
    steps,
    trained,
    wrap,
)
from tests.support import warm

CASE = Case("nola", {"r": 2, "num_basis_A": 6, "num_basis_B": 5})

# Times 2^23. Philox is specified to the bit, and NumPy keeps its raw stream.
GOLDEN = {
    (0, "A:8x4096"): [
        4113333, -8280406, 5142125, -568512, 4415703, -640668, 6957378, 1919297,
    ],
    (7, "B:4096x8"): [
        -1658252, 3877652, 328130, -1050110, -4985832, 5171090, 6013610, 1495045,
    ],
}  # fmt: skip


layer = partial(one_delta, CASE)  # of one fp64 layer, in training


def matrices(seed: int, tag: str, count: int, rows: int, cols: int) -> Tensor:
    """The bases (count, rows, cols) in fp64, element by element from the raw 64-bit stream."""
    size = count * rows * cols
    raw = np.random.Philox(key=[seed, zlib.crc32(tag.encode())]).random_raw((size + 1) // 2)
    halves = [half for word in raw for half in (int(word) & 0xFFFFFFFF, int(word) >> 32)]
    flat = [((u >> 8) - 2**23) / 2**23 for u in halves[:size]]
    return torch.tensor(flat, dtype=torch.float64).view(count, rows, cols)


def factors(delta: Any) -> tuple[Tensor, Tensor]:
    """A and B by the definition, term by term, in fp64; differentiable in a and b."""
    config, base = delta.config, delta.base
    r, n_in, n_out = config.r, base.in_features, base.out_features
    A_i = matrices(config.seed, f"A:{r}x{n_in}", config.num_basis_A, r, n_in)
    B_j = matrices(config.seed, f"B:{n_out}x{r}", config.num_basis_B, n_out, r)
    A = sum((w * M for w, M in zip(delta.a, A_i, strict=True)), torch.zeros(r, n_in))
    B = sum((w * M for w, M in zip(delta.b, B_j, strict=True)), torch.zeros(n_out, r))
    A, B = A / math.sqrt(len(A_i)), B / math.sqrt(len(B_j))
    if config.a0:
        tag = f"{base.name}/A0:{r}x{n_in}"
        A = A + matrices(config.seed, tag, 1, r, n_in)[0] / math.sqrt(n_in)
    return A, B


# The bases -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "tag"), GOLDEN)
def test_first_values(seed: int, tag: str) -> None:
    found = values(seed, tag, 0, 8).astype(np.float64) * 2**23
    assert found.tolist() == GOLDEN[seed, tag]
    assert zlib.crc32(b"A:8x4096") == 932273037


def test_first_values_in_a_fresh_process() -> None:
    """Through the class that the layers use, after other draws from every global generator."""
    script = (
        "import json, random, numpy, torch; from plait.methods._bases import basis\n"
        "random.seed(5); numpy.random.seed(5); torch.manual_seed(5)\n"
        "torch.rand(3), numpy.random.rand(3)\n"
        "a = basis(0, 'A:8x4096', 256, 8, 4096, torch.float32)\n"
        "b = basis(7, 'B:4096x8', 256, 4096, 8, torch.float32)\n"
        "first = [(x.part(0, 1, torch.device('cpu'))[0, :8] * 2**23).tolist() for x in (a, b)]\n"
        "print(json.dumps(first))"
    )
    done = warm.python(code=script)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == list(GOLDEN.values())


def test_distribution() -> None:
    """Uniform on [-1, 1): mean 0, variance 1/3, neighbours uncorrelated; streams differ."""
    v = values(3, "A:8x512", 0, 200_000).astype(np.float64)
    assert v.min() >= -1
    assert v.max() < 1
    assert abs(v.mean()) < 0.005
    assert abs(v.var() - 1 / 3) < 0.003
    assert abs(np.corrcoef(v[:-1], v[1:])[0, 1]) < 0.01
    for other in (values(4, "A:8x512", 0, 1000), values(3, "B:8x512", 0, 1000)):
        assert abs(np.corrcoef(v[:1000], other)[0, 1]) < 0.15


@settings(max_examples=60)
@given(start=st.integers(0, 40), count=st.integers(0, 40), seed=st.integers(0, 2**63 - 1))
def test_random_access(start: int, count: int, seed: int) -> None:
    """Any part is that part of the whole, whatever the block of the generator."""
    whole = values(seed, "t", 0, 96)
    assert np.array_equal(values(seed, "t", start, count), whole[start : start + count])


def test_values_against_the_definition() -> None:
    """Element (i, row, col) is number (i rows + row) cols + col of the stream."""
    one = basis(11, "B:5x3", 4, 5, 3, torch.float32)
    found = one.part(1, 4, torch.device("cpu")).view(3, 5, 3)
    assert torch.equal(found.double(), matrices(11, "B:5x3", 4, 5, 3)[1:])


# The mixture -----------------------------------------------------------------------------------


def test_worked_example() -> None:
    # By hand from the golden numbers: A = (3 A_1 + A_2) / sqrt(2) of two bases (1, 4).
    one = basis(0, "A:8x4096", 2, 1, 4, torch.float32)  # the first 8 values of the stream
    v = [n / 2**23 for n in GOLDEN[0, "A:8x4096"]]
    expected = [(3 * v[i] + v[i + 4]) / math.sqrt(2) for i in range(4)]
    found = mixture(torch.tensor([3.0, 1.0], dtype=torch.float64), one, True)
    assert relative(found, torch.tensor([expected], dtype=torch.float64)) < 1e-15


@settings(max_examples=25)
@given(
    n_in=st.integers(1, 9), n_out=st.integers(1, 9), r=st.integers(1, 3), ka=st.integers(1, 5),
    kb=st.integers(1, 5), a0=st.booleans(), keep=st.booleans(),
)  # fmt: skip
def test_forward_is_the_loop(
    n_in: int, n_out: int, r: int, ka: int, kb: int, a0: bool, keep: bool
) -> None:
    """Outputs and all gradients against the sums, written out, in fp64."""
    model, delta = layer(
        n_in, n_out, r=r, num_basis_A=ka, num_basis_B=kb, a0=a0, keep_bases=keep, seed=3
    )
    x, dy = tiny.numbers(4, n_in).requires_grad_(), tiny.numbers(4, n_out, key=1)
    A, B = factors(delta)
    slow = delta.scaling * x @ A.T @ B.T
    fast = model(x) - layers(model)[0].base_layer(x)
    assert relative(fast, slow) < 1e-6  # A0 is rounded to fp32
    wanted = [x, delta.a, delta.b]
    for found, expected in zip(
        torch.autograd.grad(fast, wanted, dy),
        torch.autograd.grad(slow, wanted, dy),
        strict=True,
    ):
        assert float((found - expected).abs().max()) < 1e-6 * max(float(expected.abs().max()), 1)


def test_gradient_is_the_projection() -> None:
    """da_i = <A_i, dA> / sqrt(ka), with dA the gradient of the factor itself."""
    _, delta = layer()
    A, _ = delta.factors()
    dA = tiny.numbers(*A.shape, key=4)
    (da,) = torch.autograd.grad(A, [delta.a], dA)
    by_hand = [float((M * dA).sum()) / math.sqrt(6) for M in matrices(0, "A:2x7", 6, 2, 7)]
    assert relative(da, torch.tensor(by_hand, dtype=torch.float64)) < 1e-12


@pytest.mark.parametrize("keep", [True, False])
def test_gradcheck(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bases, "CHUNK", 12)  # two matrices at a time
    one = basis(0, "A:2x3", 5, 2, 3, torch.float32)
    w = tiny.numbers(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: Mixture.apply(w, one, keep), [w])


@pytest.mark.parametrize("chunk", [1, 30, 2**24])
def test_made_anew_equals_kept(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep_bases=False mixes a few bases at a time, holds none, and gives the same numbers."""
    monkeypatch.setattr(bases, "CHUNK", chunk)
    kept, made = (wrap(CASE, init_weights=False, keep_bases=keep) for keep in (True, False))
    assert relative(logits(made), logits(kept)) < 1e-6
    grads = []
    for model in (kept, made):
        model.train()(**batch(model)).loss.backward()
        grads.append([p.grad for p in trained(model).values()])
    for found, expected in zip(grads[1], grads[0], strict=True):
        assert relative(found, expected) < 1e-5


def test_nothing_is_held_where_bases_are_not_kept() -> None:
    gc.collect()
    _, delta = layer(seed=41, keep_bases=False)
    delta.factors()
    assert not any(one.kept for one in delta.bases)


# Start, count, size ----------------------------------------------------------------------------


def test_start() -> None:
    """dW = 0 with a gradient for b and, in the first step, none for a."""
    model = wrap(CASE).train()
    model(**batch(model)).loss.backward()
    for delta in deltas(model):
        assert not delta.a.any()
        assert not delta.b.any()
        assert not delta.weight().any()
        assert delta.b.grad.any()
        assert not delta.a.grad.any()
        bound = 1 / math.sqrt(delta.base.in_features)
        assert 0.8 * bound < float(delta.A0.abs().max()) <= bound
    first, second = deltas(model)[0], deltas(model)[3]
    assert first.alike == second.alike
    assert not torch.equal(first.A0, second.A0)  # each layer has its own
    assert first.bases[0] is second.bases[0]  # and the bases are those of the shape


def test_start_of_the_paper() -> None:
    """a0=False: no A0, a ~ N(0, 1)."""
    delta = deltas(wrap(CASE, a0=False, num_basis_A=2000, target_modules=["q_proj"]))[0]
    assert abs(float(delta.a.mean().detach())) < 0.1
    assert abs(float(delta.a.std().detach()) - 1) < 0.1
    A, B = delta.factors()
    assert relative(A.double(), factors(delta)[0]) < 1e-5
    assert not B.any()


def test_defaults() -> None:
    config = plait.NolaConfig()
    assert (config.num_basis_A, config.num_basis_B, config.a0) == (256, 256, True)
    assert config.lora_alpha == 2.0  # r / 4: s = .25, as in the released scripts
    assert plait.NolaConfig(r=16, lora_alpha=3).lora_alpha == 3
    assert deltas(wrap(CASE, lora_alpha=None))[0].scaling == 0.25


Q_V, ALL = ["q_proj", "v_proj"], "all-linear"
# Llama-2-7B, 64 layers of q and v, 224 of all: numbers, and bytes of the file with its header.
SIZES = [
    (Q_V, 128, 16_384, 82_136),
    (Q_V, 256, 32_768, 147_752),
    (ALL, 128, 57_344, 287_280),
    (ALL, 256, 114_688, 516_872),
]


@pytest.mark.parametrize(("targets", "bases", "count", "size"), SIZES)
def test_count_and_file_on_llama_2_7b(
    targets: Any, bases: int, count: int, size: int, tmp_path: Path
) -> None:
    """ka + kb a layer, whatever its shape; q and v with 128 bases stay below 100 kB."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig())
    config = plait.NolaConfig(
        r=8, num_basis_A=bases, num_basis_B=bases, target_modules=targets, task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config)
    assert sum(p.numel() for p in trained(model).values()) == count
    assert 2 * bases * len(layers(model)) == count
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    file = tmp_path / "adapter_model.safetensors"  # as peft writes it
    zeros = {n: torch.zeros(t.shape) for n, t in tensors.items()}
    save_file(zeros, file, metadata={"format": "pt"})
    found = file.stat().st_size
    assert found == pytest.approx(size, rel=0.01)
    assert (found < 100_000) == (targets == Q_V and bases == 128)


def test_memory_of_the_bases() -> None:
    """The page's figure: Llama-2-7B, all linear layers, r = 16, 512 bases, one of each shape."""
    tags = {(16, 4096), (16, 11008), (4096, 16), (11008, 16)}
    assert sum(512 * rows * cols * 4 for rows, cols in tags) == 989_855_744
    kept = basis(0, "A:16x64", 512, 16, 64, torch.float32).parts(torch.device("cpu"), True)
    assert sum(m.numel() * m.element_size() for _, _, m in kept) == 512 * 16 * 64 * 4


# One basis everywhere --------------------------------------------------------------------------


def test_reload_from_the_seed(tmp_path: Path) -> None:
    """Bit-equal, though no basis and no A0 is in the file."""
    model = wrap(CASE, seed=5)
    steps(model, adamw(model, 5e-2), 3)
    model.save_pretrained(tmp_path)
    state = get_peft_model_state_dict(model)
    assert {name.rpartition(".")[2] for name in state} == {"a", "b"}
    expected = logits(model)
    assert not torch.equal(expected, helpers.base_logits(tiny.llama()))
    del model
    gc.collect()
    for lean in (False, True):
        again = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=lean)
        assert torch.equal(logits(again), expected)


def test_global_generators_are_left_alone(tmp_path: Path) -> None:
    gc.collect()  # no basis of before is known
    base, again = tiny.llama(), tiny.llama()
    for keep in (True, False):
        with random_state_kept():
            model = wrap(CASE, base, keep_bases=keep, seed=77, init_weights=False)
            model.train()(**batch(model)).loss.backward()
            model.save_pretrained(tmp_path)
            logits(PeftModel.from_pretrained(again, tmp_path))
        base, again = tiny.llama(), tiny.llama()


def test_precisions_use_one_basis() -> None:
    """fp32, fp64 and bf16 bases give the same factors; under autocast, too."""
    found = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        _, delta = one_layer(CASE, 7, 5, dtype)
        delta = delta.plait_delta["default"]
        with torch.no_grad():
            delta.a.copy_(torch.arange(6) / 8)
            delta.b.copy_(torch.arange(5) / 8)
        found[dtype] = delta.factors()
        with torch.autocast("cpu", torch.bfloat16):
            inside = delta.factors()
            grads = torch.autograd.grad(inside[0].sum(), [delta.a])
        outside = torch.autograd.grad(delta.factors()[0].sum(), [delta.a])
        assert torch.equal(inside[0], found[dtype][0])
        assert torch.equal(inside[1], found[dtype][1])
        assert torch.equal(grads[0], outside[0])
    for i in (0, 1):
        assert torch.equal(found[torch.float32][i], found[torch.bfloat16][i])
        assert found[torch.float64][i].dtype == torch.float64
        assert relative(found[torch.float32][i].double(), found[torch.float64][i]) < 1e-6


def test_bf16_bases_are_rounded_once() -> None:
    _, delta = layer(basis_dtype="bfloat16")
    M = matrices(0, "A:2x7", 6, 2, 7).bfloat16().double()
    expected = torch.einsum("i,irn->rn", delta.a, M) / math.sqrt(6) + delta.A0
    assert relative(delta.factors()[0], expected) < 1e-12
    delta.factors()
    assert {t.dtype for one in delta.bases for t in one.kept.values()} == {torch.bfloat16}
    _, exact = layer()
    assert not torch.equal(exact.factors()[0], delta.factors()[0])


def test_a_compiled_layer() -> None:
    """NumPy inside does not stop torch.compile."""
    _, host = one_layer(CASE, 7, 5, torch.float32)
    x = tiny.numbers(3, 7, dtype=torch.float32)
    params = list(host.plait_delta["default"].parameters())
    expected = torch.autograd.grad(host(x).square().sum(), params)
    compiled = torch.compile(host, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), params)  # type: ignore[operator]
    for ours, wanted in zip(found, expected, strict=True):
        assert relative(ours, wanted) < 1e-5


# Another stream, copies, memory ----------------------------------------------------------------


def test_another_stream_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A numpy whose Philox gave other numbers, or an edited config, is found out at load."""
    model = wrap(CASE, init_weights=False)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert set(saved["checksums"]) == {
        "0/A:2x24", "0/B:24x2", "0/B:12x2", "0/B:40x2",
    }  # fmt: skip
    text = r"nola: the basis A:2x24 of seed 0 has the checksum \d+, the adapter was trained with"

    original = bases.values
    monkeypatch.setattr(bases, "values", lambda *args: original(*args) * np.float32(0.5))
    with pytest.raises(ValueError, match=text + r" \d+\. Use the numpy and plait"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)
    monkeypatch.undo()

    saved["checksums"]["0/A:2x24"] += 1
    path.write_text(json.dumps(saved), encoding="utf-8")
    with pytest.raises(ValueError, match=text):
        PeftModel.from_pretrained(tiny.llama(), tmp_path)


def test_a_copied_config_may_have_another_seed() -> None:
    config = CASE.config()
    first = get_peft_model(tiny.llama(), config)
    other = copy.deepcopy(config)
    other.seed = 1
    second = get_peft_model(tiny.llama(), other)
    assert not torch.equal(deltas(first)[0].factors()[0], deltas(second)[0].factors()[0])


def test_copies_share_the_basis() -> None:
    model = wrap(CASE, init_weights=False)
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert all(a.bases[0] is b.bases[0] for a, b in zip(deltas(model), deltas(twin), strict=True))
    revived = pickle.loads(pickle.dumps(deltas(model)[0]))
    assert revived.bases[0] is deltas(model)[0].bases[0]
    assert torch.equal(revived.factors()[0], deltas(model)[0].factors()[0])
    steps(twin, adamw(twin, 5e-2), 1)
    assert torch.equal(logits(model), expected)


def test_memory_is_freed_with_the_last_model() -> None:
    model = wrap(CASE, seed=101)
    logits(model)
    twin = copy.deepcopy(model)
    refs = [weakref.ref(one) for one in deltas(model)[0].bases]
    tensors = [weakref.ref(t) for ref in refs for t in ref().kept.values()]  # type: ignore[union-attr]
    assert len(tensors) == 2
    del model
    gc.collect()
    assert all(ref() is not None for ref in (*refs, *tensors))
    del twin
    gc.collect()
    assert all(ref() is None for ref in (*refs, *tensors))


def test_a_checkpoint_without_frozen_parameters() -> None:
    """What accelerate saves under FSDP2 leaves frozen parameters out: none is needed here."""
    model = wrap(CASE, init_weights=False)
    kept = get_model_state_dict(model, options=StateDictOptions(ignore_frozen_params=True))
    mine = {n: v for n, v in kept.items() if "plait_nola" in n}
    assert {n.rpartition(".")[2] for n in mine} == {"a", "b"}
    fresh = wrap(CASE)
    assert not nn.Module.load_state_dict(fresh, mine, strict=False).unexpected_keys
    assert torch.equal(logits(fresh), logits(model))


# Relatives -------------------------------------------------------------------------------------


def test_export_materialises_the_factors(tmp_path: Path) -> None:
    """A plain LoRA of rank r, exact in stock peft; the compact form keeps the scale."""
    model = wrap(CASE, r=3, lora_alpha=None)
    steps(model, adamw(model, 5e-2), 4, key=None)
    export = plait.to_lora(model)
    assert export.error == 0
    assert {one.rank for one in export.layers} == {3}
    assert (export.config.r, export.config.lora_alpha) == (3, 3)
    compact = plait.to_lora(model, compact=True).config
    assert (compact.r, compact.lora_alpha) == (3, 0.75)
    export.write(tmp_path)
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    with torch.no_grad():
        assert relative(stock(input_ids=tiny.tokens()).logits, logits(model)) < 1e-5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_basis_A": 0}, "num_basis_A = 0 is out of range. Give 1 or more"),
        ({"num_basis_B": 1.5}, "num_basis_B = 1.5 is not a whole number"),
        ({"basis_dtype": "float16"}, "basis_dtype = 'float16' is not known. Use one of 'float32'"),
        ({"lora_alpha": 0}, "lora_alpha = 0 is out of range"),
    ],
)
def test_refused_options(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        plait.NolaConfig(**options)


@pytest.mark.parametrize("keep", [True, False])
def test_tracers_leave_no_trace_in_the_bases(keep: bool) -> None:
    """torch.export, fake tensors and inference mode, before and after the first real forward."""

    def model() -> Any:
        return one_layer(CASE, 16, 16, torch.float32, keep_bases=keep, seed=77 + keep)[0].eval()

    x = tiny.numbers(3, 16, dtype=torch.float32)
    for _ in range(2):
        net = model()
        layer = layers(net)[0]
        program = torch.export.export(layer, (x,))
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            net(fake.from_tensor(x))
        with torch.inference_mode():
            inferred = net(x)
        model().train()(x).sum().backward()
        actual = model()(x).detach()
        update = actual - layer.base_layer(x)
        assert update.abs().max() > 1e-3
        assert torch.equal(inferred, actual)
        assert relative(update, x @ layer.get_delta_weight("default").T) < 1e-4
        assert relative(program.module()(x), actual) < 1e-6
        kept = [t for one in deltas(net)[0].bases for t in one.kept.values()]
        assert all(type(t) is Tensor and not t.is_inference() for t in kept)
        assert len(kept) == (2 if keep else 0)
