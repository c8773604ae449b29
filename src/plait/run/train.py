"""Train one run into its run folder, and continue it after an interruption.

The held-out metric is taken before and after. A run that is stopped (Ctrl-C, a full disk, NaN in
the loss) keeps its last complete checkpoint; `resume=True` continues from there to the same
weights, bit for bit on the CPU, as a run that was never stopped.
"""

import warnings
from collections.abc import Sequence

import torch
from transformers import TrainerCallback, TrainingArguments

from plait.callback import PlaitCallback
from plait.core.events import PlaitWarning, check_events
from plait.run.adapter import keep_start, save_trained
from plait.run.callbacks import MetricsFile, StopOnSignal
from plait.run.card import write_card, write_loss_curve
from plait.run.config import RunConfig, config_to_dict, dump_config, load_config
from plait.run.evaluate import Progress, evaluate_model
from plait.run.folder import RunFolder, diff_configs, write_atomic
from plait.run.metrics import METRICS
from plait.run.optimizers import OPTIMIZERS
from plait.run.prepare import prepare
from plait.run.trainer import RunTrainer, last_complete, writable
from plait.upstream.table import BASELINES

# What a resumed run may change: none of these keys changes a weight.
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

_INITIAL = "initial"  # PiSSA's start, below checkpoints/


def train(
    cfg: RunConfig,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> RunFolder:
    """Train a run; return its folder, with the adapter (or model/), metrics, picture and card.

    Nothing is written before all checks have passed.

    Args:
        cfg: the run.
        resume: continue the run in output.dir from its last complete checkpoint, or from the start
            if there is none yet.
        callbacks: further Trainer callbacks, such as a progress bar.
        progress: called while the held-out metric is taken, with (rows done, rows in all).

    Raises:
        FileExistsError: output.dir holds something and resume is False.
        ValueError: a resumed config or its data differ in what decides the weights; and what
            `prepare` raises.
        FloatingPointError: the loss or a weight is NaN or infinite.
        OSError: a file cannot be written.
        KeyboardInterrupt: after a signal, when the checkpoint is written.
    """
    folder = RunFolder(cfg.output.dir)
    args = training_arguments(cfg, folder)
    if resume:
        _check_resumable(folder, cfg)
    else:
        folder.check_free()
    run = prepare(cfg)
    model, split = run.place(), run.data.held_out_split
    title = f"{cfg.method.name} on {cfg.model.name.rpartition('/')[2]}"
    folder.begin(dump_config(cfg), run.seeds, run.facts)
    keep_start(model, folder.checkpoints / _INITIAL)
    checkpoint = last_complete(folder.checkpoints)

    if split is not None and "before" not in folder.read_evaluation():
        before = evaluate_model(model, run.data, split, cfg, progress=progress)
        folder.write_evaluation(split=split, before=before)

    # Made after the first evaluation: the Trainer seeds all generators.
    stop = StopOnSignal()
    started = [MetricsFile(folder), PlaitCallback(), stop, *callbacks]
    trainer = RunTrainer(run, args, stop, checkpoint, started)
    seconds = folder.read_facts().get("seconds", 0.0)
    try:
        seconds += trainer.fit()
    except FloatingPointError:
        write_loss_curve(folder, f"{folder.path.name}, stopped")
        raise
    folder.note(seconds=seconds)
    trainer.check_finished()
    check_events(model)

    to = folder.model if cfg.method.name == "full" else folder.adapter
    with writable(to, folder.checkpoints):
        stored = save_trained(model, run.tokenizer, to, folder.checkpoints / _INITIAL)
    folder.note(steps=run.steps, stored=stored)
    if split is not None:
        after = evaluate_model(model, run.data, split, cfg, progress=progress)
        folder.write_evaluation(after=after)
    write_loss_curve(folder, title)
    card = write_card(folder, cfg)
    if to == folder.adapter:  # peft's own card does not say what is needed to load this
        write_atomic(folder.adapter / "README.md", card)
    return folder


def training_arguments(cfg: RunConfig, folder: RunFolder) -> TrainingArguments:
    """Return the TrainingArguments of a run; raise ValueError for what a run cannot do."""
    options = dict(cfg.training)
    if options.get("push_to_hub"):
        raise ValueError(
            "training.push_to_hub is true, but would upload without the model card. Upload the "
            "finished adapter/ with: hf upload REPO RUN/adapter"
        )
    baseline = BASELINES.get(cfg.method.name)
    if options.get("load_best_model_at_end") and baseline and baseline.no_best_checkpoint:
        raise ValueError(
            f"training.load_best_model_at_end does not work with {baseline.key}: "
            f"{baseline.no_best_checkpoint}. Set it to false."
        )
    optimizer = OPTIMIZERS.get(cfg.optimizer.name)
    if optimizer is not None and not optimizer.clips:
        norm = options.get("max_grad_norm", TrainingArguments.max_grad_norm)
        if norm:
            warnings.warn(
                f"training.max_grad_norm is {norm:g}, and {optimizer.key} needs the raw gradients: "
                "it is set to 0. The optimizer has a clip of its own.",
                PlaitWarning,
                stacklevel=2,
            )
        options["max_grad_norm"] = 0.0
    best = METRICS.get(str(options.get("metric_for_best_model")).removeprefix("eval_"))
    if best is not None:  # upstream takes every name that does not end in "loss" for a score
        options.setdefault("greater_is_better", best.higher_is_better)
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available())  # else torch warns
    options.setdefault("include_num_input_tokens_seen", "non_padding")  # for tokens per second
    args = TrainingArguments(
        output_dir=str(folder.checkpoints),
        remove_unused_columns=False,  # the collator takes what the model needs, task ids included
        **{**options, "disable_tqdm": True},
    )
    if args.world_size > 1:
        raise ValueError(
            f"training: {args.world_size} processes were started, a run takes one. Start plait "
            "train without a launcher."
        )
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would wrap the model in DataParallel
    return args


def _check_resumable(folder: RunFolder, cfg: RunConfig) -> None:
    """Raise if there is no unfinished run in the folder, or its config differs from this one."""
    path = folder.path
    if not folder.config.is_file():
        raise FileNotFoundError(
            f"{path}: there is no run to resume (config.yaml is missing). Train without --resume."
        )
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
        lines = "".join(f"\n  {line}" for line in changed)
        raise ValueError(
            f"{path}: the config changed since this run began, so the result would be of neither:"
            f"{lines}\nPut the values back, or train to another output.dir."
        )
