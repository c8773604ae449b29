"""Train one run into its run folder, and continue it after an interruption.

The held-out metric is taken before and after. A run that is stopped (Ctrl-C, a full disk, NaN in
the loss) keeps its last complete checkpoint; `resume=True` continues from there to the same
weights, bit for bit on the CPU, as a run that was never stopped.
"""

import json
import shutil
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from plait.chain import ChainCallback, chain_of
from plait.core.events import PlaitCallback, PlaitWarning, check_events, drive_adalora
from plait.gates.alloc import set_development_batch
from plait.run.adapter import stored_numbers, upstream_noise
from plait.run.callbacks import MetricsFile, StopOnSignal
from plait.run.card import (
    read_environment,
    read_evaluation,
    write_card,
    write_evaluation,
    write_loss_curve,
)
from plait.run.config import RunConfig, allocates, config_to_dict, dump_config, load_config
from plait.run.data import DataBundle
from plait.run.evaluate import Progress, evaluate_model
from plait.run.folder import RunFolder, diff_configs, environment, replace_dir, write_atomic
from plait.run.model import parameter_counts, to_device
from plait.run.optimizers import OPTIMIZERS
from plait.run.prepare import prepare
from plait.run.trainer import RunTrainer, adalora_of, latest_checkpoint, writable

# What a resumed run may change: nothing of this reaches a weight.
_FREE = (
    "evaluation.batch_size",
    "output.",
    "training.logging_",
    "training.log_level",
    "training.report_to",
    "training.run_name",
    "training.project",
    "training.save_steps",
    "training.save_strategy",
    "training.save_total_limit",
    "training.disable_tqdm",
)

DEVELOPMENT_ROWS = 32  # validation rows that an allocation scores ranks on

_INITIAL = "initial"  # PiSSA's start, below checkpoints/


def train(
    cfg: RunConfig,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> RunFolder:
    """Train a run; return its folder, with the adapter (or model/), metrics, picture and card.

    resume: continue the run in output.dir from its last complete checkpoint, or from the start
    where there is none yet. callbacks: further Trainer callbacks, such as a progress bar.
    progress: called while the held-out metric is taken, with (rows done, rows in all).

    Raises FileExistsError when output.dir holds something and resume is False; ValueError when a
    resumed config differs in what reaches the weights, and what loading data and model raises;
    FloatingPointError when the loss or a weight is NaN or infinite; OSError when a file cannot
    be written; KeyboardInterrupt after a signal, once the checkpoint is written.
    """
    folder = _resumed(cfg) if resume else RunFolder.new(cfg.output.dir)
    args = training_arguments(cfg, folder)
    prepared = prepare(cfg)
    folder.path.mkdir(parents=True, exist_ok=True)  # nothing is refused from here on
    tokenizer, data = prepared.tokenizer, prepared.data
    model = to_device(prepared.model, cfg)
    checkpoint = _prepare(folder, cfg, data, model)
    _give_development(data, model)

    split = data.held_out_split
    if split is not None and "before" not in read_evaluation(folder):
        before = evaluate_model(model, data, split, cfg, progress=progress)
        write_evaluation(folder, split=split, before=before)

    stop = StopOnSignal()
    plan = None if cfg.chain is None else cfg.chain.build()
    # Made after the first evaluation: the Trainer seeds all generators.
    trainer = RunTrainer(
        cfg,
        data,
        stop,
        model=model,
        args=args,
        chain=None if plan is None else ChainCallback(plan, checkpoint=checkpoint),
        data_collator=data.collator,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        callbacks=[MetricsFile(folder.metrics), PlaitCallback(), stop, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    _check_adalora(cfg, model, steps)
    seconds = _fit(folder, trainer, stop, checkpoint, steps)

    check_events(model)
    trainer.check_finite()
    # Off with the autocast of mixed precision: both metrics are of the model as it is loaded.
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with writable(
        folder.model if cfg.method.name == "full" else folder.adapter, folder.checkpoints
    ):
        stored = _save_trained(folder, model, tokenizer)
    _note(folder, steps=steps, seconds=seconds, stored=stored)
    if split is not None:
        after = evaluate_model(model, data, split, cfg, progress=progress)
        write_evaluation(folder, after=after)
    write_loss_curve(folder, f"{cfg.method.name} on {cfg.model.name.rpartition('/')[2]}")
    card = write_card(folder, cfg)
    if cfg.method.name != "full":  # peft's own card does not say what is needed to load this
        write_atomic(folder.adapter / "README.md", card)
    return folder


def training_arguments(cfg: RunConfig, folder: RunFolder) -> TrainingArguments:
    """Return the TrainingArguments of a run; raise ValueError for what a run cannot do."""
    given = dict(cfg.training)
    if given.get("push_to_hub"):
        raise ValueError(
            "training.push_to_hub is true, but would upload without the model card. Upload the "
            "finished adapter/ with: hf upload REPO RUN/adapter"
        )
    if given.get("load_best_model_at_end") and cfg.method.name == "adalora":
        raise ValueError(
            "training.load_best_model_at_end does not work with adalora: peft 0.21.2 cannot load "
            "an adapter of other ranks into the one in training. Set it to false."
        )
    own = OPTIMIZERS.get(cfg.optimizer.name)
    if own is not None and not own.clips:
        norm = given.get("max_grad_norm", TrainingArguments.max_grad_norm)
        if norm:
            warnings.warn(
                f"training.max_grad_norm is {norm:g}, and {own.key} needs the raw gradients: it is "
                "set to 0. The optimizer has a clip of its own.",
                PlaitWarning,
                stacklevel=2,
            )
        given["max_grad_norm"] = 0.0
    given.setdefault("dataloader_pin_memory", torch.cuda.is_available())  # else torch warns
    given.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens per second
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        remove_unused_columns=False,  # the collator takes what the model needs, task ids included
        **{**given, "disable_tqdm": True},
    )
    if args.world_size > 1:
        raise ValueError(
            f"training: {args.world_size} processes were started, a run takes one. Start plait "
            "train without a launcher."
        )
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would wrap the model in DataParallel
    return args


# --------------------------------------------------------------------------------------- stages


def _resumed(cfg: RunConfig) -> RunFolder:
    """Open the folder of an unfinished run and compare its config with this one."""
    path = Path(cfg.output.dir)
    if not (path / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{path}: there is no run to resume (config.yaml is missing). Train without --resume."
        )
    folder = RunFolder.open(path)
    if folder.card.is_file():
        raise ValueError(
            f"{path}: this run is finished, nothing is left to resume. Train to another "
            "output.dir, or evaluate it: plait evaluate " + str(path)
        )
    before = config_to_dict(load_config(folder.config))
    changed = [
        line for line in diff_configs(before, config_to_dict(cfg)) if not line.startswith(_FREE)
    ]
    if changed:
        listed = "".join(f"\n  {line}" for line in changed)
        raise ValueError(
            f"{path}: the config changed since this run began, so the result would be of neither:"
            f"{listed}\nPut the values back, or train to another output.dir."
        )
    return folder


def _prepare(
    folder: RunFolder, cfg: RunConfig, data: DataBundle, model: PeftModel | PreTrainedModel
) -> Path | None:
    """Write what is known before training; return the checkpoint to start from."""
    facts = {
        "kind": data.kind,
        "labels": data.labels,
        "tasks": data.tasks,
        "train_rows": len(data.train),
        "train_tokens": sum(len(ids) for ids in data.train["input_ids"]),
    }
    known = read_environment(folder).get("run", {})
    for name in ("train_rows", "train_tokens"):
        if name in known and known[name] != facts[name]:
            raise ValueError(
                f"{folder.path}: the data changed since this run began ({name}: {known[name]} -> "
                f"{facts[name]}). Put the data back, or train to another output.dir."
            )
    trainable, everything = parameter_counts(model)
    seeds = {"training": cfg.training["seed"], "data": cfg.data.seed}
    write_atomic(folder.config, dump_config(cfg))
    _write_environment(folder, environment() | {"seeds": seeds, "run": known})
    _note(folder, **facts, trainable=trainable, parameters=everything)
    if not folder.checkpoints.is_dir():
        folder.checkpoints.mkdir()
    for unfinished in folder.checkpoints.glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
        shutil.rmtree(unfinished)
    if _edits_base(model) and not (folder.checkpoints / _INITIAL).is_dir():
        replace_dir(folder.checkpoints / _INITIAL, lambda to: model.save_pretrained(str(to)))
    return latest_checkpoint(folder.checkpoints)


def _fit(
    folder: RunFolder,
    trainer: RunTrainer,
    stop: StopOnSignal,
    checkpoint: Path | None,
    steps: int,
) -> float:
    """Run the training loop from a checkpoint; return the seconds of training so far."""
    earlier = read_environment(folder).get("run", {}).get("seconds", 0.0)
    start = 0 if checkpoint is None else int(checkpoint.name.rpartition("-")[2])
    if checkpoint is not None and start >= steps:
        # The Trainer would make one step too many from its last checkpoint.
        trainer.load_weights(checkpoint)
        return earlier
    if adalora_of(trainer.trained) is not None:
        drive_adalora(trainer.trained, start)
    began = time.monotonic()
    try:
        with stop:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FloatingPointError:
        write_loss_curve(folder, f"{folder.path.name}, stopped")
        raise
    seconds = earlier + time.monotonic() - began
    _note(folder, seconds=seconds)
    if stop.requested and trainer.state.global_step < steps:
        raise KeyboardInterrupt(
            f"training: stopped after step {trainer.state.global_step} of {steps}; "
            f"{latest_checkpoint(folder.checkpoints)} is complete."
        )
    return seconds


def _give_development(data: DataBundle, model: PeftModel | PreTrainedModel) -> None:
    """Give validation rows to a method that scores its ranks."""
    if not isinstance(model, PeftModel) or not allocates(model.peft_config["default"]):
        return
    rows = data.splits()["validation"]
    batch = data.collator([rows[i] for i in range(min(DEVELOPMENT_ROWS, len(rows)))])
    set_development_batch(model, {k: v.to(model.device) for k, v in batch.items()})


def _check_adalora(cfg: RunConfig, model: nn.Module, steps: int) -> None:
    """AdaLoRA prunes on a schedule that has to have the true length."""
    tuner = adalora_of(model)
    if tuner is None:
        return
    planned = tuner.peft_config[tuner.trainable_adapter_name].total_step
    if planned != steps:
        raise ValueError(
            f"method.total_step is {planned}, but training has {steps} optimizer steps, so "
            f"adalora's schedule would not end where training does. Set it to {steps}, or leave "
            "it out."
        )


def _edits_base(model: nn.Module) -> bool:
    """Whether upstream put a part of the base weight into the adapter (PiSSA and its like)."""
    if not isinstance(model, PeftModel):
        return False
    start = model.active_peft_config.to_dict().get("init_lora_weights")
    return isinstance(start, str) and start.startswith(("pissa", "olora", "corda", "lora_ga"))


def _save_trained(folder: RunFolder, model: PeftModel | PreTrainedModel, tokenizer: Any) -> int:
    """Save the adapter, or the whole model; return how many numbers it holds."""
    options = {}
    if _edits_base(model):
        # As a plain LoRA of twice the rank: the base it is put on later is the whole one.
        options["path_initial_model_for_weight_conversion"] = str(folder.checkpoints / _INITIAL)

    def write(to: Path) -> None:
        model.save_pretrained(str(to), **options)
        tokenizer.save_pretrained(str(to))
        chain = chain_of(model)
        if chain is not None:
            chain.save(to)

    if isinstance(model, PeftModel):
        with upstream_noise():
            replace_dir(folder.adapter, write)
        return stored_numbers(folder.adapter)
    replace_dir(folder.model, write)
    return sum(p.numel() for p in model.parameters())


def _write_environment(folder: RunFolder, content: dict[str, Any]) -> None:
    write_atomic(folder.environment, json.dumps(content, indent=1) + "\n")


def _note(folder: RunFolder, **facts: Any) -> None:
    """Add facts about this run to environment.json."""
    content = read_environment(folder)
    content["run"] = content.get("run", {}) | facts
    _write_environment(folder, content)
