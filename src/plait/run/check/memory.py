"""Estimate the memory of a run: one step of training and one batch of evaluation, traced.

The batch with the longest rows passes a copy of the model that has shapes and no numbers (torch's
fake tensors), and every tensor that it would allocate is counted until it would be freed. So the
estimate knows the model's attention, the method's intermediate results and the optimizer's state,
and computes nothing. Not included: Python, workspaces inside kernels, and fragmentation.
"""

import copy
import inspect
import warnings
import weakref
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from plait.run.evaluate import batches
from plait.run.model import context_of, recomputes
from plait.run.prepare import Prepared, training_rows
from plait.run.trainer import narrowed, training_collator

_KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # key of `training` -> type of autocast


@dataclass(frozen=True)
class Memory:
    """The most bytes that a run takes at a time.

    weights: all parameters and buffers as they are held. gradients: of what is trained. optimizer:
    its state after the first step. activations: what a training step takes besides at its peak.
    evaluation: what an evaluation takes besides weights and the optimizer's state, generation
    included; None without held-out rows. traced: False if the step cannot be traced: then
    activations and evaluation are a rule of thumb.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    evaluation: int | None
    traced: bool

    @property
    def training(self) -> int:
        """Bytes at the peak of a training step."""
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def evaluating(self) -> int | None:
        """Bytes at the peak of an evaluation, while the optimizer's state is kept."""
        return None if self.evaluation is None else self.weights + self.optimizer + self.evaluation


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it is on.

    now: bytes that are still held. most: the largest `now` since `restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()):
        """Start to count; known: tensors whose memory was there before."""
        super().__init__()
        self.now = self.most = 0
        self._held: dict[int, Any] = {}
        self._known = [tensor.untyped_storage() for tensor in known]  # kept: addresses are reused
        self._ignored = {storage._cdata for storage in self._known}

    def restart(self) -> None:
        """Forget the largest number so far."""
        self.most = self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the storages of its results."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._count(value)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._held or key in self._ignored:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._held[key]

        self._held[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)


def estimate_memory(run: Prepared, optimizer: torch.optim.Optimizer) -> Memory:
    """Estimate the memory of a run.

    optimizer: over the parameters of run.model.
    """
    model, split = run.model, run.data.held_out_split
    held = [*model.parameters(), *model.buffers()]
    weights = sum(t.numel() * t.element_size() for t in held)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    try:
        if run.cfg.objective.name != "sft":
            raise NotImplementedError("the step of another objective")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the libraries about themselves
            state, step, evaluation = _trace(run, optimizer)
    except Exception:  # a kernel without shapes, or numbers that decide shapes
        state = sum(2 * 4 * p.numel() for p in trained)  # as AdamW keeps
        step, evaluation = _rule_of_thumb(run, gradients)
        traced = False
    else:
        traced = True
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=max(step - gradients, 0),
        evaluation=None if split is None else evaluation,
        traced=traced,
    )


# ------------------------------------------------------------------------------------- tracing


def _trace(run: Prepared, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Return the bytes of (the optimizer's state, a step's peak, an evaluation's peak).

    Both peaks are beside weights and state; that of the step holds the gradients.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(fake):
        model, moving = copy.deepcopy((run.model, optimizer))
    step_rows = _longest(run, run.arguments.per_device_train_batch_size)
    if run.cfg.model.task == "causal_lm":
        step_rows = narrowed(run.model, step_rows) or step_rows
    held_out = [_first(run, split) for split in run.data.splits() if split != "train"]
    known = [*model.parameters(), *model.buffers()]
    with fake, Allocations(known) as counted:
        _step(run, model, _fake(fake, step_rows, model))
        step = counted.most
        counted.restart()
        _bare_step(moving)
        model.zero_grad()
        state = counted.now
        step = max(step, counted.most - state)
        counted.restart()
        for batch, prompts in held_out:
            _evaluate(run, model, _fake(fake, batch, model), prompts, counted)
        evaluation = counted.most - state
    return state, step, evaluation


def _longest(run: Prepared, count: int) -> dict[str, Tensor]:
    """Return a batch of `count` rows as long as the longest training row, padded if rows differ.

    Packs count as rows; without their positions, whose numbers a model looks at.
    """
    data = run.data
    if run.cfg.data.packing:
        packs = training_rows(run.cfg, data)
        sizes = [sum(len(row["input_ids"]) for row in packs[i]) for i in range(len(packs))]
        batch = training_collator(run)([packs[sizes.index(max(sizes))]] * count)
        return {k: v for k, v in batch.items() if k not in ("position_ids", "use_cache")}
    lengths = [len(ids) for ids in data.train["input_ids"]]
    rows = [data.train[lengths.index(most)] for most in (max(lengths), min(lengths))]
    return _unmasked(data.collator([rows[0], *[rows[1]] * (count - 1)]))


def _first(run: Prepared, split: str) -> tuple[dict[str, Tensor], list[int]]:
    """Return an evaluation's first batch, of the longest rows, and the lengths of its prompts.

    The prompts are those of the first batch of generation; [] if nothing is generated.
    """
    data, size = run.data, run.cfg.evaluation.batch_size
    rows = data.splits()[split]
    longest = next(batches(rows, [len(ids) for ids in rows["input_ids"]], size))
    batch = _unmasked(data.collator([rows[i] for i in longest]))
    if not run.cfg.evaluation.generate or data.kind not in ("completion", "messages"):
        return batch, []
    lengths = rows["prompt_length"]
    return batch, [lengths[i] for i in next(batches(rows, lengths, size))]


def _unmasked(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a mask that masks nothing: models look at its numbers and ignore it."""
    if bool(batch["attention_mask"].all()):
        del batch["attention_mask"]
    return batch


def _fake(mode: FakeTensorMode, batch: Mapping[str, Tensor], model: Any) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: mode.from_tensor(t, static_shapes=True).to(device) for name, t in batch.items()}


def _autocast(run: Prepared, device: str) -> AbstractContextManager[Any]:
    kinds = [kind for key, kind in _KINDS.items() if getattr(run.arguments, key)]
    return torch.autocast(device, kinds[0]) if kinds else nullcontext()


def _step(run: Prepared, model: Any, batch: dict[str, Tensor]) -> None:
    """Make the gradients of a batch as the Trainer does."""
    args = run.arguments
    model.train()
    if recomputes(run.cfg.training):
        _base(model).gradient_checkpointing_enable({"use_reentrant": False})
    with _autocast(run, next(model.parameters()).device.type):
        outputs = model(**batch)
    if args.bf16 or args.fp16:
        outputs["logits"] = outputs["logits"].float()  # as accelerate does to what a model returns
    loss = outputs["loss"]
    del outputs
    loss.backward()


def _bare_step(optimizer: torch.optim.Optimizer) -> None:
    """Make an optimizer's step without hooks: a method's events would need numbers."""
    step: Any = type(optimizer).step
    getattr(step, "__wrapped__", step)(optimizer)


@torch.no_grad()
def _evaluate(
    run: Prepared,
    model: Any,
    batch: dict[str, Tensor],
    prompts: list[int],
    counted: Allocations,
) -> None:
    """Do what an evaluation does with a batch, and generate from prompts of these lengths."""
    device = next(model.parameters()).device.type
    model.eval()
    labels = batch.pop("labels")
    with _autocast(run, device):
        logits = model(**batch).logits
    if run.arguments.bf16 or run.arguments.fp16:
        logits = logits.float()
    if run.cfg.model.task == "causal_lm":
        scores = logits[0, 1:].clone().float()  # one row at a time, its target tokens
        torch.nn.functional.cross_entropy(scores, labels[0, 1:], reduction="sum")
        del scores
    del logits
    if prompts:
        prompt, padded, new = max(prompts), len(set(prompts)) > 1, run.cfg.evaluation.max_new_tokens
        length = min(prompt + new, context_of(model) or prompt + new)
        extra = {k: v for k, v in batch.items() if k == "task_ids"}
        _generate(model, batch["input_ids"], prompt, length, padded, extra, counted)


def _generate(
    model: Any,
    like: Tensor,
    prompt: int,
    length: int,
    padded: bool,
    extra: Mapping[str, Tensor],
    counted: Allocations,
) -> None:
    """Read prompts of `prompt` tokens, and then the last token of texts of `length` tokens.

    like: token ids (rows, any), for number, type and device. padded: whether prompts differ in
    length. extra: further inputs.
    """
    parameters = inspect.signature(type(_base(model)).forward).parameters
    name = "cache" if "cache" in parameters else "past_key_values"  # as transformers names it

    def read(tokens: int, cache: Any) -> Any:
        past = 0 if cache is None else cache.get_seq_length()
        return model(
            input_ids=like.new_zeros(len(like), tokens),
            attention_mask=like.new_ones(len(like), past + tokens) if padded else None,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
            **extra,
        ).get("past_key_values")

    if not isinstance(read(prompt, None), DynamicCache):
        return  # a state of fixed size
    before = counted.most
    cache = read(length - 1, None) if length > 1 else None
    counted.most = max(before, counted.now)  # the cache; it was not made at once
    read(1, cache)


# ------------------------------------------------------------------------- without a trace


def _rule_of_thumb(run: Prepared, gradients: int) -> tuple[int, int]:
    """Return the bytes of a step and of an evaluation, beside weights and the optimizer's state.

    17 numbers of the hidden size per token and block (Korthikanti et al. 2022, without attention
    scores, which fused attention does not keep), one where blocks are recomputed, and for causal
    models the logits with their fp32 copy and gradient.
    """
    base: Any = _base(run.model)
    shape, args, data = base.config.get_text_config(), run.arguments, run.data
    size = 2 if args.bf16 or args.fp16 else torch.finfo(base.dtype).bits // 8
    blocks = shape.num_hidden_layers
    kept = blocks + 17 if recomputes(run.cfg.training) else 17 * blocks
    vocabulary = shape.vocab_size if run.cfg.model.task == "causal_lm" else 0
    pairs = 2 if run.cfg.objective.name in ("dpo", "kto", "reward") else 1
    tokens = args.per_device_train_batch_size * data.longest * pairs
    step = tokens * (shape.hidden_size * kept * size + vocabulary * (size + 4 + 4))
    tokens = run.cfg.evaluation.batch_size * data.longest
    evaluation = tokens * (shape.hidden_size * 17 * size + vocabulary * (size + 4))
    return gradients + step, evaluation


def _base(model: PeftModel | PreTrainedModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
