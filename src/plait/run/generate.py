"""Continue prompts: of held-out rows for a metric, or a user's with a finished run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from plait.run.data.reader import template_columns
from plait.run.data.tokens import encode_chat, encode_prompt
from plait.run.model import context_of, pads_left
from plait.run.prepare import TrainedRun, load_run

# What generation takes from a model's generation_config.json: which tokens start, end and pad.
_SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")


def generate_run(
    path: str | Path,
    prompt: str | None = None,
    fields: Mapping[str, str] | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> str:
    """Continue one prompt with a run; arguments and errors as in `generate_all`."""
    options = (fields, task, max_new_tokens, temperature, seed, overrides)
    return generate_all(path, [prompt], *options)[0]


def generate_all(
    path: str | Path,
    prompts: Sequence[str | None],
    fields: Mapping[str, str] | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Continue prompts with a run, put into the same template as in training.

    prompts: the texts; if data.prompt_template has one column, they fill that column. None: fields
    alone fill it. fields: column -> text, for templates with several. task: for a run that routes
    by task. max_new_tokens: None: evaluation.max_new_tokens. temperature: as in generate_ids.
    seed: of sampling. overrides: as in load_run.

    Raises ValueError for an encoder run, a prompt that does not fill the template, and a task that
    is missing or unknown.
    """
    run = load_run(path, overrides)
    check_generates(run, f"Use: plait evaluate {path}")
    rows = [_prompt_ids(run, prompt, fields or {}) for prompt in prompts]
    run.set_task(task)
    seed_sampling(seed)
    return continue_all(run, rows, max_new_tokens, temperature)


def check_generates(run: TrainedRun, remedy: str) -> None:
    """Raise ValueError for a run that generates no text; remedy: what the user can do instead."""
    if run.cfg.model.task != "causal_lm":
        raise ValueError(
            f"{run.folder.path}: model.task is {run.cfg.model.task}, which generates no text. "
            f"{remedy}"
        )


def seed_sampling(seed: int) -> None:
    """Seed what samples tokens."""
    torch.manual_seed(seed)


def continue_all(
    run: TrainedRun,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    task_ids: Sequence[int] | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Continue prompts in batches of evaluation.batch_size, the longest first; return the texts.

    max_new_tokens, temperature: as in generate_all. task_ids: for each prompt, where rows name
    their tasks. advance: called with the size of each batch that is done.
    """
    evaluation, texts = run.cfg.evaluation, [""] * len(prompts)
    most = evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), evaluation.batch_size):
        batch = order[start : start + evaluation.batch_size]
        extra = {}
        if task_ids is not None:
            extra["task_ids"] = torch.tensor([task_ids[i] for i in batch])
        rows, decoding = [prompts[i] for i in batch], evaluation.decoding
        made = generate_ids(run.model, run.tokenizer, rows, most, temperature, decoding, **extra)
        for i, ids in zip(batch, made, strict=True):
            texts[i] = decode(run.tokenizer, ids)
        advance(len(batch))
    return texts


def _prompt_ids(run: TrainedRun, prompt: str | None, fields: Mapping[str, str]) -> list[int]:
    """Return the ids of a prompt in the run's template."""
    path, template = run.folder.path, run.cfg.data.prompt_template
    columns: list[str] = []
    if template is not None:
        columns = list(dict.fromkeys(template_columns(template, "data.prompt_template")))
    if len(columns) == 1 and prompt is not None:
        fields = {columns[0]: prompt, **fields}
        prompt = None
    if template is not None:
        if prompt is not None or sorted(fields) != sorted(columns):
            asked = " ".join(f"--field {name}=TEXT" for name in columns)
            raise ValueError(f"{path}: data.prompt_template is {template!r}. Give {asked}.")
        return encode_prompt(run.tokenizer, template.format(**fields))
    if prompt is None or fields:
        raise ValueError(f"{path}: this run has no prompt template. Give --prompt TEXT alone.")
    if run.facts["kind"] == "messages":
        return encode_chat(run.tokenizer, [{"role": "user", "content": prompt}])
    return encode_prompt(run.tokenizer, prompt)


def generate_ids(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    decoding: Mapping[str, Any] | None = None,
    streamer: BaseStreamer | None = None,
    **inputs: Tensor,
) -> list[list[int]]:
    """Continue prompts; return the new ids of each up to its end token.

    Each token is the argmax of the logits unless the arguments say otherwise: nothing but the
    special tokens is taken from the model's generation_config.json.

    Prompts are padded on the left. Those of one length are taken at a time by a model that is not
    told its positions, which padding would shift, and near the end of the context; RWKV takes them
    one by one.

    temperature: 0 takes the likeliest token each time, above 0 samples. decoding: further arguments
    of transformers' GenerationConfig, as EvaluationConfig.decoding returns them. streamer: gets
    the tokens of a single prompt as they come. inputs: further tensors for the model, such as
    task_ids (prompts,).
    Raises ValueError for an empty prompt and for prompts that leave no room in the context.
    """
    longest = max(len(ids) for ids in prompts)
    if not all(prompts):
        raise ValueError("the prompt has no tokens. Give at least one character.")
    context = context_of(model)
    if context is None:
        context = longest + max_new_tokens
    if longest >= context:
        raise ValueError(
            f"the prompt has {longest} tokens, the model's context {context}. Shorten the prompt."
        )
    groups: dict[int, list[int]] = {}  # of prompts that are continued together
    alone = model.config.model_type == "rwkv"  # upstream mixes up the states of single tokens
    together = pads_left(model) and longest + max_new_tokens <= context
    for i, ids in enumerate(prompts):
        groups.setdefault(i if alone else 0 if together else len(ids), []).append(i)
    if len(groups) > 1:
        made: dict[int, list[int]] = {}
        for chosen in groups.values():
            group = [prompts[i] for i in chosen]
            kept: Any = {name: tensor[chosen] for name, tensor in inputs.items()}
            texts = generate_ids(
                model, tokenizer, group, max_new_tokens, temperature, decoding, **kept
            )
            made |= dict(zip(chosen, texts, strict=True))
        return [made[i] for i in range(len(prompts))]
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    ends = _end_ids(model, tokenizer)
    options = GenerationConfig(
        max_new_tokens=min(max_new_tokens, context - longest),
        do_sample=temperature > 0,
        temperature=temperature if temperature > 0 else None,
        top_k=0 if temperature > 0 else None,
        pad_token_id=pad,
        eos_token_id=ends or None,
        use_cache=True,
        **(decoding or {}),
    )
    device = next(model.parameters()).device
    inputs = {"input_ids": ids, "attention_mask": mask, **inputs}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    with plain_generation(model):
        rows = model.generate(**inputs, generation_config=options, streamer=streamer)
    return [_until(row, ends) for row in rows[:, longest:].tolist()]


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Within the context a model's generate() uses its arguments alone, and the special tokens.

    transformers fills in every argument that is not given from generation_config.json: repetition
    penalties, n-grams that may not repeat, suppressed tokens, beams, custom keys.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    saved = base.generation_config
    base.generation_config = GenerationConfig(**{n: getattr(saved, n, None) for n in _SPECIAL})
    try:
        yield
    finally:
        base.generation_config = saved


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of some ids, without special tokens and outer white space."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _end_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end a text for the tokenizer or the model (a chat model has several)."""
    ends = model.generation_config.eos_token_id
    ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    return sorted({end for end in ends if isinstance(end, int)})


def _until(ids: list[int], ends: list[int]) -> list[int]:
    """Cut ids at the first end token; what follows it is padding."""
    return next((ids[:n] for n, i in enumerate(ids) if i in ends), ids)
