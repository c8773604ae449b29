"""Continue prompts: of held-out rows for a metric, or one prompt with a finished run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from plait.run.data.reader import template_columns
from plait.run.data.tokens import encode_chat, encode_prompt
from plait.run.model import context_of, pads_left
from plait.run.prepare import TrainedRun, load_run


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
    """Continue one prompt with a run, put into the same template as in training.

    prompt: the text; if data.prompt_template has one column, it fills that column. fields: column
    -> text, for templates with several. task: for a run that routes by task. max_new_tokens: None:
    evaluation.max_new_tokens. temperature: as in generate_ids. seed: of sampling. overrides: as in
    load_run.

    Raises ValueError for an encoder run, a prompt that does not fill the template, and a task that
    is missing or unknown.
    """
    run = load_run(path, overrides)
    cfg = run.cfg
    if cfg.model.task != "causal_lm":
        raise ValueError(
            f"{path}: model.task is {cfg.model.task}, which generates no text. "
            f"Use: plait evaluate {path}"
        )
    ids = _prompt_ids(run, prompt, fields or {})
    routed = cfg.method.options.get("routing") == "task"
    if routed and task is None:
        known = ", ".join(run.facts["tasks"])
        raise ValueError(f"{path}: this run routes by task. Give --task, one of {known}.")
    if task is not None:
        if not routed:
            raise ValueError(f"{path}: --task {task}: this run does not route. Leave --task out.")
        select_task: Any = run.model.set_task  # a method of the adapter's tuner
        select_task(task)
    torch.manual_seed(seed)
    most = cfg.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
    made = generate_ids(run.model, run.tokenizer, [ids], most, temperature)
    return decode(run.tokenizer, made[0])


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
    **inputs: Tensor,
) -> list[list[int]]:
    """Continue prompts; return the new ids of each up to its end token.

    Prompts are padded on the left. Those of one length are taken at a time by a model that is not
    told its positions, which padding would shift, and near the end of the context; RWKV takes them
    one by one.

    temperature: 0 takes the likeliest token each time, above 0 samples. inputs: further tensors
    for the model, such as task_ids (prompts,).
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
            kept = {name: tensor[chosen] for name, tensor in inputs.items()}
            texts = generate_ids(model, tokenizer, group, max_new_tokens, temperature, **kept)
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
    )
    device = next(model.parameters()).device
    inputs = {"input_ids": ids, "attention_mask": mask, **inputs}
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    rows = model.generate(**inputs, generation_config=options)
    return [_until(row, ends) for row in rows[:, longest:].tolist()]


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
