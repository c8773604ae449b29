"""Exports in llama.cpp itself: every mergeable method as an adapter and merged, on two models.

llama.cpp computes in float32 from float32 files. Logits then differ by the order of additions
alone: by up to 5e-4 is measured, for adapters that move them by 25. TOLERANCE is twice that; an
adapter that is read with another scale or another order of rows is off by 1 and more.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from plait.core.config import DeltaConfig
from plait.core.registry import find
from plait.run.config import MethodConfig, method_names, peft_config
from plait.run.serving.gguf import FAMILIES, write_gguf
from plait.testing import tiny
from plait.upstream.export import LoraExport, to_lora
from plait.upstream.table import BASELINES
from tests.support import llamacpp

llamacpp.require()

TOLERANCE = 1e-3
DATA = Path(os.environ.get("PLAIT_DATA", "../shared/data"))
PROMPTS, STEPS = 100, 24
FULL = 10_000  # no rank is larger
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS: dict[str, dict[str, Any]] = {
    "alloc": {"rounds": 0},
    "dual_lora": {"gate_steps": 0},
    "dual_module": {"tinit": 1, "tfinal": 1, "deltaT": 1},
    "nola": {"num_basis_A": 16, "num_basis_B": 16},
    "vblora": {"num_vectors": 16, "vector_length": 4, "topk": 2},
    "unilora": {"theta_d_length": 512},
    "adalora": {"init_r": 6, "tinit": 1, "tfinal": 1, "deltaT": 1},
}


@dataclass(frozen=True)
class Case:
    """A method with options; choice: of a task, for methods that route."""

    method: str
    options: dict[str, Any]
    choice: dict[str, Any]


def mergeable(method: str) -> bool:
    row: Any = BASELINES[method] if method in BASELINES else find(method)
    return row.mergeable and method != "full"


CASES = {name: Case(name, OPTIONS.get(name, {}), {}) for name in method_names() if mergeable(name)}
PATTERNS = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 24}}
CASES |= {
    "lora, patterns": Case("lora", PATTERNS, {}),
    "cola, patterns": Case("cola", PATTERNS, {}),
    "sora, pissa": Case("sora", {"init": "pissa"}, {}),
    "shared_b, task": Case("shared_b", {"routing": "task", "tasks": ["a", "b"]}, {"task": "b"}),
}
# A base weight that the adapter was split from is not the one that is served.
del CASES["pissa"]


@dataclass(frozen=True)
class Live:
    """What a model of transformers writes after the prompts, and its logits at every position.

    start: length of a prompt. tokens: each with what follows. logits: (prompts, tokens, words).
    """

    start: int
    tokens: list[list[int]]
    logits: np.ndarray

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, prompts: list[list[int]]) -> "Live":
        """Greedy continuations of STEPS tokens; the prompts have one length."""
        ids = torch.tensor(prompts)
        steps = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, **steps)
        return cls(ids.shape[1], out.tolist(), model(input_ids=out).logits.numpy())

    def compare(self, server: llamacpp.LlamaCpp) -> tuple[int, float]:
        """Prompts with equal greedy tokens, and the largest difference of a logit."""
        equal, worst = 0, 0.0
        for tokens, theirs in zip(self.tokens, self.logits, strict=True):
            ours = server.logits(tokens)
            worst = max(worst, float(np.abs(ours - theirs).max()))
            chosen = [logits[self.start - 1 : -1].argmax(-1) for logits in (ours, theirs)]
            equal += bool((chosen[0] == chosen[1]).all())
        return equal, worst

    def distance(self, other: "Live") -> float:
        """Largest difference of the logits at the prompts."""
        return float(np.abs(self.logits - other.logits)[:, : self.start].max())


@dataclass(frozen=True)
class Served:
    """A base model, and every case of it in the forms that llama.cpp loads."""

    name: str
    folder: Path
    base: Live
    live: dict[str, Live]
    exports: dict[str, LoraExport]
    prompts: list[list[int]]

    def open(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / "base", dtype=torch.float32)

    def file(self, form: str, case: str) -> Path:
        """form: base, theirs (converted by llama.cpp), ours (written by plait) or merged."""
        return self.folder / f"{form} {case}.gguf"


def adapted(base: Any, case: Case) -> Any:
    """A model with the method of a case, its update away from zero and its ranks uneven."""
    options = {"r": 4, "target_modules": ALL, **case.options}
    tasks = options.pop("tasks", None)
    config = peft_config(MethodConfig(name=case.method, options=options), "causal_lm", 10, tasks)
    with tiny.seed():
        model: Any = get_peft_model(base, config)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=gen))
        if isinstance(config, DeltaConfig):
            for i, layer in enumerate(model.base_model.plait_layers()):
                delta = layer.plait_delta["default"]
                for gate in (getattr(delta, name, None) for name in ("g", "live_ranks")):
                    if gate is not None:
                        gate[: i % 4] = 0
    if "task" in case.choice:
        model.set_task(case.choice["task"])
    return model.eval()


def exported(model: PeftModel, case: Case) -> LoraExport:
    """The adapter as a plain LoRA, at full rank if the method is no low-rank one."""
    row: Any = BASELINES.get(case.method) or find(case.method)
    exact = case.choice or row.exact_export
    return to_lora(model, rank=None if exact else FULL, **case.choice)


def stories(to: Path, data: Path) -> list[list[int]]:
    """Write stories260K, or random weights of its shape; return prompts."""
    if (data / "model.safetensors").is_file():
        AutoModelForCausalLM.from_pretrained(data, dtype=torch.float32).save_pretrained(to)
        tokenizer = AutoTokenizer.from_pretrained(data)
        openings = (
            "Once upon a time|Lily|The dog|Tom|One day a|Mom|A bird|In the park|Ben|Sue|Max|A frog|"
            "Dad"
        )
        endings = (
            "was very sad|said to her|saw a big|and his friend|ran to the|had a red|went to the|"
            "did not like|liked the little|wanted to play|looked at the|found a small"
        )
        texts = [f"{a} {b}" for a in openings.split("|") for b in endings.split("|")]
        # Of one length, so that the live model writes after all of them at once.
        ends = dict.fromkeys(tuple(tokenizer(text)["input_ids"][-7:]) for text in texts)
        prompts = [[tokenizer.bos_token_id, *ids] for ids in ends if len(ids) == 7][:PROMPTS]
        assert len(prompts) == PROMPTS
        return prompts
    write_random(to, LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=172, num_hidden_layers=5,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
    ))  # fmt: skip
    return random_prompts(512)


def write_random(to: Path, config: LlamaConfig) -> None:
    config.initializer_range = 0.2  # so that random logits have no ties
    with tiny.seed():
        LlamaForCausalLM(config).save_pretrained(to)


def random_prompts(vocabulary: int) -> list[list[int]]:
    gen = torch.Generator().manual_seed(0)
    return torch.randint(3, vocabulary, (PROMPTS, 6), generator=gen).tolist()


@pytest.fixture(scope="module", params=["stories260K", "GQA, tied"])
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    if request.param == "stories260K":
        prompts = stories(folder / "base", DATA / "stories260k")
    else:
        write_random(folder / "base", tiny.llama_config(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        ))  # fmt: skip
        prompts = random_prompts(96)
    served = Served(request.param, folder, Live.of(plain(folder), prompts), {}, {}, prompts)
    jobs = [llamacpp.base_job(folder / "base", served.file("base", ""))]
    for name, case in CASES.items():
        model = adapted(served.open(), case)
        served.live[name] = Live.of(model, prompts)
        lora = served.exports[name] = exported(model, case)
        lora.write(folder / "lora" / name)
        write_gguf(lora, model.get_base_model(), served.file("ours", name))
        merged = model.merge_and_unload(safe_merge=True, **case.choice)
        merged.save_pretrained(folder / "merged" / name)
        jobs += [
            llamacpp.lora_job(folder / "base", folder / "lora" / name, served.file("theirs", name)),
            llamacpp.base_job(folder / "merged" / name, served.file("merged", name)),
        ]
    failures = [failure for failure in llamacpp.convert(jobs, folder) if failure]
    assert not failures, failures[0]
    return served


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def server(served: Served) -> Any:
    """llama.cpp with the base model."""
    server = llamacpp.LlamaCpp(served.file("base", ""))
    yield server
    server.close()


def assert_same_tensors(ours: Path, theirs: Path) -> None:
    """Two GGUF adapters hold the same tensors, and say the same of themselves."""
    import gguf

    files = [gguf.GGUFReader(file) for file in (ours, theirs)]
    one, other = ({t.name: t.data for t in file.tensors} for file in files)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert files[0].fields[key].contents() == files[1].fields[key].contents(), key


def check(served: Served, server: llamacpp.LlamaCpp, live: Live, what: str) -> None:
    """Greedy tokens of all prompts equal, logits within the tolerance, an update worth a test."""
    equal, worst = live.compare(server)
    moved = live.distance(served.base)
    llamacpp.MEASURED.append(
        f"{served.name:<12} {what:<24} greedy {equal:>3} of {PROMPTS}, logits differ by up to "
        f"{worst:.1e}, the adapter moves them by {moved:.1f}"
    )
    assert moved > 20 * TOLERANCE
    assert worst <= TOLERANCE
    assert equal == PROMPTS


def test_base(served: Served, server: llamacpp.LlamaCpp) -> None:
    server.use()
    equal, worst = served.base.compare(server)
    llamacpp.MEASURED.append(
        f"{served.name:<12} {'base':<24} greedy {equal:>3} of {PROMPTS}, logits differ by up to "
        f"{worst:.1e}"
    )
    assert worst <= TOLERANCE
    assert equal == PROMPTS


@pytest.mark.parametrize("case", CASES)
def test_adapter(served: Served, server: llamacpp.LlamaCpp, case: str) -> None:
    """plait's GGUF is that of llama.cpp's converter, tensor by tensor, and computes the same."""
    assert_same_tensors(served.file("ours", case), served.file("theirs", case))
    adapter = server.load(served.file("ours", case))
    assert adapter, "llama.cpp refuses the adapter"
    server.use(adapter)
    check(served, server, served.live[case], case)


@pytest.mark.parametrize("case", CASES)
def test_merged(served: Served, case: str) -> None:
    server = llamacpp.LlamaCpp(served.file("merged", case))
    check(served, server, served.live[case], f"{case}, merged")
    server.close()


def test_scale_of_a_half_halves_the_update(served: Served, server: llamacpp.LlamaCpp) -> None:
    lora = served.exports["cola"]
    stock: Any = get_peft_model(served.open(), lora.config)
    set_peft_model_state_dict(stock, {
        name: t / 2 if "lora_B" in name else t for name, t in lora.tensors.items()
    })  # fmt: skip
    server.use(server.load(served.file("ours", "cola")), scales=[0.5])
    check(served, server, Live.of(stock.eval(), served.prompts), "cola at scale 0.5")


def test_two_adapters_add_up(served: Served, server: llamacpp.LlamaCpp) -> None:
    names, scales = ["cola", "sora"], [0.7, 1.5]
    total: Any = served.open()
    with torch.no_grad():
        for name, scale in zip(names, scales, strict=True):
            tensors = served.exports[name].tensors
            for key, A in tensors.items():
                if "lora_A" in key:
                    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    B = tensors[key.replace("lora_A", "lora_B")]
                    total.get_submodule(module).weight += scale * B @ A
    server.use(*(server.load(served.file("ours", n)) for n in names), scales=scales)
    check(served, server, Live.of(total.eval(), served.prompts), "cola * 0.7 + sora * 1.5")


def test_ranks_are_uneven_where_it_matters(served: Served) -> None:
    """The cases above test something: a form with one rank a layer differs from the padded one."""
    model = adapted(served.open(), CASES["sora"])
    assert len({layer.rank for layer in to_lora(model).layers}) > 1


# Architectures, and what llama.cpp refuses ------------------------------------------------------


def small(architecture: str, **changes: Any) -> Any:
    """A random model of one of the architectures that plait writes GGUF for."""
    sizes = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "initializer_range": 0.2, **changes,
    }  # fmt: skip
    if architecture == "Gemma2ForCausalLM":  # llama.cpp takes it from the size of a head
        sizes["query_pre_attn_scalar"] = sizes["head_dim"]
    cls = getattr(transformers, architecture)
    with tiny.seed():
        return cls(cls.config_class(**sizes)).eval()


def with_lora(base: Any, **options: Any) -> Any:
    """A model with a random stock LoRA on all linear layers."""
    config = LoraConfig(
        r=4, lora_alpha=4, init_lora_weights=False, task_type="CAUSAL_LM", **options
    )
    with tiny.seed(1):
        return get_peft_model(base, config).eval()


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Live]]:
    """A folder with a base model and an adapter of each architecture, and the live models."""
    top, lives, jobs = tmp_path_factory.mktemp("architectures"), {}, []
    for architecture in FAMILIES:
        folder, base = top / architecture, small(architecture)
        base.save_pretrained(folder / "base")
        model = with_lora(base, target_modules="all-linear")
        lives[architecture], lora = Live.of(model, random_prompts(96)[:20]), to_lora(model)
        lora.write(folder / "lora")
        write_gguf(lora, model.get_base_model(), folder / "ours.gguf")
        jobs += [
            llamacpp.base_job(folder / "base", folder / "base.gguf"),
            llamacpp.lora_job(folder / "base", folder / "lora", folder / "theirs.gguf"),
        ]
    failures = [failure for failure in llamacpp.convert(jobs, top) if failure]
    assert not failures, failures[0]
    return top, lives


@pytest.mark.parametrize("architecture", FAMILIES)
def test_architecture(architectures: tuple[Path, dict[str, Live]], architecture: str) -> None:
    """Names, order of rows and logits, for every architecture that plait knows."""
    folder, live = architectures[0] / architecture, architectures[1][architecture]
    assert_same_tensors(folder / "ours.gguf", folder / "theirs.gguf")
    server = llamacpp.LlamaCpp(folder / "base.gguf")
    server.use(server.load(folder / "ours.gguf"))
    equal, worst = live.compare(server)
    llamacpp.MEASURED.append(
        f"{architecture:<37} greedy {equal:>3} of {len(live.tokens)}, logits differ by up to "
        f"{worst:.1e}"
    )
    # llama.cpp reads Gemma's GELU from a table of float16.
    assert worst <= (10 * TOLERANCE if "Gemma" in architecture else TOLERANCE)
    assert equal == len(live.tokens)
    server.close()


def test_untied_output_is_served_and_a_tied_one_refused(tmp_path: Path) -> None:
    """plait refuses what llama.cpp would refuse only when it loads the file."""
    models, jobs = {}, []
    for tied in (False, True):
        folder = tmp_path / f"tied {tied}"
        base = small("LlamaForCausalLM", tie_word_embeddings=tied)
        base.save_pretrained(folder / "base")
        model = with_lora(base, target_modules=["lm_head"])
        lora = to_lora(model)
        lora.write(folder / "lora")
        models[tied] = model, lora, folder
        jobs += [
            llamacpp.base_job(folder / "base", folder / "base.gguf"),
            llamacpp.lora_job(folder / "base", folder / "lora", folder / "theirs.gguf"),
        ]
    assert llamacpp.convert(jobs, tmp_path)[0] is None
    for tied, (model, lora, folder) in models.items():
        files = [folder / name for name in ("base.gguf", "theirs.gguf", "ours.gguf")]
        server = llamacpp.LlamaCpp(files[0])
        if tied:
            assert not files[1].exists() or server.load(files[1]) is None
            with pytest.raises(ValueError, match="refuses lm_head where the base ties"):
                write_gguf(lora, model.get_base_model(), files[2])
        else:
            write_gguf(lora, model.get_base_model(), files[2])
            server.use(server.load(files[2]))
            assert Live.of(model, random_prompts(96)[:5]).compare(server)[1] <= TOLERANCE
        server.close()
