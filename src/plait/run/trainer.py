"""transformers' Trainer, made safe: checkpoints that are whole or absent, and a stop at NaN.

The Trainer's own files stay what they are: adapter or model weights as safetensors; optimizer,
scheduler and RNG states as torch files, which the Trainer reads with `weights_only=True`. Its
pickled training arguments are left out: the run folder's config.yaml holds them.
"""

import copy
import functools
import inspect
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import EarlyStoppingCallback, PrinterCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from plait.chain import ChainCallback, chain_schedule, load
from plait.chain.plan import SHAPES
from plait.core.events import EventNeverFired
from plait.core.files import put_back, unwritten
from plait.run.adapter import (
    first_line,
    load_weights,
    name_base,
    readable,
    save_trained,
)
from plait.run.callbacks import StopOnSignal
from plait.run.config import PATIENCE, RunConfig, did_you_mean
from plait.run.data.packing import PackCollator
from plait.run.data.tokens import IGNORED
from plait.run.evaluate import evaluate_model
from plait.run.folder import RunFolder, replace_dir
from plait.run.model import recomputes
from plait.run.optimizers import DEFAULT, make_optimizer
from plait.run.parallel import ranks
from plait.run.parallel.rows import IDLE, Idling, share
from plait.run.parallel.sharded import (
    OPTIMIZER,
    WEIGHTS,
    CheckSharded,
    all_finite,
    check_kind,
    forget_earlier,
    is_sharded,
    whole_state,
)
from plait.run.prepare import Loader, Prepared, prepare, training_rows, upstream_refuses
from plait.upstream.adalora import adalora_of, load_adalora, save_adalora, upstream_noise

_REMEDY = "Remove that checkpoint to resume from the one before it."
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
# What reading a damaged file may raise besides errors that tell of damage.
_UNEXPECTED = (KeyError, IndexError, AttributeError, TypeError, AssertionError)
_STATES = (TRAINER_STATE_NAME, "scheduler.pt")
_OPTIMIZERS = ("optimizer.pt", OPTIMIZER)


MANY_LOGITS = 2**20  # with fewer numbers in a batch there is nothing to save


def only_targets(
    inputs: Mapping[str, Any], vocabulary: int = 0, least: int | None = None
) -> dict[str, Any] | None:
    """Inputs that make a causal model compute logits for positions before a target alone.

    The loss is the same number: other positions have no part in it. The positions are those where
    any row of the batch has a target, so rows of unlike prompts keep some that others need.

    Args:
        inputs: of a forward, with labels (batch, tokens).
        vocabulary: numbers of logits at a position.
        least: logits of the whole batch from which on it is done; None: MANY_LOGITS.

    Returns:
        New inputs with `logits_to_keep` and `shift_labels`; None where nothing would be saved.
    """
    labels = inputs.get("labels")
    least = MANY_LOGITS if least is None else least
    if labels is None or labels.ndim != 2 or labels.numel() * vocabulary < least:
        return None
    if "logits_to_keep" in inputs or "shift_labels" in inputs:
        return None
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    keep = (targets != IGNORED).any(0).nonzero()[:, 0]
    if not 0 < len(keep) < labels.shape[1] - 1:
        return None
    shown = {"logits_to_keep": keep, "shift_labels": targets[:, keep], "labels": labels[:, keep]}
    return {**inputs, **shown}


def narrowed(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """As `only_targets`; None also where the model, adapted or not, takes no `logits_to_keep`."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not _takes_positions(type(base)):
        return None
    return only_targets(inputs, getattr(base.config, "vocab_size", 0))


@functools.cache
def _takes_positions(kind: type) -> bool:
    """Whether a class of models takes `logits_to_keep`; asked in every micro-batch."""
    forward: Any = kind.forward  # type: ignore[attr-defined]
    return "logits_to_keep" in inspect.signature(forward).parameters


def training_collator(run: Prepared) -> Any:
    """Return what makes the batches of training: the run's collator, or one of packs."""
    if not run.cfg.data.packing:
        return run.data.collator
    pad: Any = run.tokenizer.pad_token_id
    return PackCollator(pad, run.data.collator.task_ids)


class RunTrainer(Trainer):
    """Trains one run; see plait.run.train. Its checkpoints lie in `checkpoints`."""

    def __init__(
        self,
        run: Prepared,
        folder: RunFolder,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        """Make the Trainer of a run; it starts from the folder's last complete checkpoint."""
        self.cfg, self.data, self.trained, self.steps = run.cfg, run.data, run.model, run.steps
        self.folder, self.checkpoints = folder, folder.checkpoints
        self.checkpoint = latest_checkpoint(self.checkpoints)
        if self.checkpoint is not None:
            check_state(self.checkpoint)
        self.stop = StopOnSignal()
        self.patience = early_stopping(run.cfg.training.get(PATIENCE), self.checkpoint)
        self._staging: Path | None = None
        self._bad_loss: str | None = None  # of a micro-batch of this step
        self.chain: ChainCallback | None = None
        if run.chain is not None:
            self.chain = ChainCallback(run.chain, checkpoint=self.checkpoint)
        collator, rows = training_collator(run), training_rows(run.cfg, run.data)
        if ranks.size() > 1:
            collator = Idling(collator, rows)
            forget_earlier()
        with upstream_refuses("training"):
            super().__init__(
                model=run.model,
                args=run.arguments,
                data_collator=collator,
                train_dataset=rows,
                eval_dataset=run.data.validation,
                processing_class=run.tokenizer,
                callbacks=[
                    self.stop,
                    *callbacks,
                    *([] if self.chain is None else [self.chain]),
                    *([] if self.patience is None else [self.patience]),
                    *([CheckSharded()] if run.cfg.parallel.kind == "fsdp2" else []),
                ],
            )
        if ranks.size() > 1:
            check_kind(self.accelerator, run.cfg)
        self.remove_callback(PrinterCallback)
        # Whether the model divides its loss by the number of items that it is given; None: unknown.
        self._divides_loss: bool | None = None if self.model_accepts_loss_kwargs else False
        # Whether the output layer can run on target positions alone; None: unknown.
        self._narrows: bool | None = None
        self.model_accepts_loss_kwargs = True  # compute_loss scales the loss, the Trainer must not

    # -------------------------------------------------------------------------------- training

    def fit(self) -> None:
        """Train from the checkpoint to the last step; note the seconds of all training so far.

        Raises KeyboardInterrupt after a signal, and FloatingPointError for a loss or a weight that
        is NaN or infinite.
        """
        start = 0 if self.checkpoint is None else int(self.checkpoint.name.rpartition("-")[2])
        if self.checkpoint is not None and (start >= self.steps or self.stopped_early):
            # The Trainer would make one step too many from its last checkpoint.
            self.state = TrainerState.load_from_json(str(self.checkpoint / TRAINER_STATE_NAME))
            self.load_weights(self._best_checkpoint() or self.checkpoint)
        else:
            earlier, began = self.folder.read_facts().get("seconds", 0.0), time.monotonic()
            if self.checkpoint is not None and self.is_fsdp_enabled:
                self.load_weights(self.checkpoint)  # before the model is shared out
            with self.stop:
                self.train(resume_from_checkpoint=self.checkpoint and str(self.checkpoint))
            if ranks.is_first():
                self.folder.note(seconds=earlier + time.monotonic() - began)
            done = self.state.global_step >= self.steps or self.stopped_early
            if self.stop.stopping and not done:
                raise KeyboardInterrupt(
                    f"training: stopped after step {self.state.global_step} of {self.steps}; "
                    f"{latest_checkpoint(self.checkpoints)} is complete."
                )
        self.check_finite()

    @property
    def stopped_early(self) -> bool:
        """Whether no validation was better than the best one for as long as the config allows."""
        stop = self.patience
        return stop is not None and (
            stop.early_stopping_patience_counter >= stop.early_stopping_patience
        )

    def save(self) -> None:
        """Save the trained adapter, or the whole model, and note its size and the steps."""
        # Off with the autocast of mixed precision: the model is measured as it will be loaded.
        self.accelerator.unwrap_model(self.trained, keep_fp32_wrapper=False)
        state = whole_state(self.trained) if is_sharded(self.trained) else None
        with ranks.agreed():
            if ranks.is_first():
                self._save_trained(state)

    def _save_trained(self, state: dict[str, Any] | None) -> None:
        """Write them; state: what is gathered of a model that is shared out."""
        full = not isinstance(self.trained, PeftModel)
        to = self.folder.model if full else self.folder.adapter
        with writable(to, self.checkpoints):
            stored = save_trained(
                self.trained, self.data.tokenizer, to, self.folder.start, self.cfg.model, state
            )
        early = {}
        if self.stopped_early:
            early = {"planned_steps": self.steps, "best_step": self.state.best_global_step}
        self.folder.note(steps=self.state.global_step, stored=stored, **early, **self._kept())

    def _best_checkpoint(self) -> Path | None:
        """The checkpoint of the best validation metric, if its weights are to be kept."""
        best = self.state.best_model_checkpoint
        if not self.args.load_best_model_at_end or best is None:
            return None
        return self.checkpoints / Path(best).name  # the run folder may have moved

    def _kept(self) -> dict[str, Any]:
        """The fact `kept`: step, metric and value of the best checkpoint; {} without one."""
        best = self._best_checkpoint()
        if best is None:
            return {}
        metric = str(self.args.metric_for_best_model).removeprefix("eval_")
        step = int(best.name.rpartition("-")[2])
        return {"kept": {"step": step, "metric": metric, "value": self.state.best_metric}}

    # ------------------------------------------------------------------------ optimizer, loss

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the optimizer that the config names, or upstream's; then apply method.lr_scale."""
        first = self.optimizer is None
        chosen = self.cfg.optimizer
        if first and chosen.name != DEFAULT:
            self.optimizer = make_optimizer(
                chosen.name, chosen.options, self.trained, self.cfg.training
            )
        with upstream_refuses("training"):
            optimizer = super().create_optimizer(model)
        if first and self.cfg.method.lr_scale:
            scale_learning_rates(optimizer, self.trained, self.cfg.method.lr_scale)
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Make upstream's schedule, or one that restarts with the links of a chain."""
        plan = None if self.chain is None else self.chain.plan
        if self.lr_scheduler is None and plan is not None and plan.lr == "restart":
            scheduled: Any = self.optimizer if optimizer is None else optimizer
            shape: Any = restarting_shape(self.args)
            self.lr_scheduler = chain_schedule(plan, scheduled, num_training_steps, shape)
            return self.lr_scheduler
        with upstream_refuses("training"):
            return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader:
        """Load the training rows; of several processes each gets a part of those of every step."""
        loader = super().get_train_dataloader()
        return share(loader, ranks.size(), ranks.rank()) if ranks.size() > 1 else loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return the micro-batches of an optimizer step and the number of items in all of them.

        An item is what the loss is a mean over: a target token, or a row of a classifier. Those of
        the other processes count, too.
        """
        samples = list(islice(epoch_iterator, num_batches))
        items = ranks.total(sum(map(self._items, samples)))
        return samples, torch.tensor(items, device=device)

    def _items(self, inputs: Mapping[str, Any]) -> int:
        if IDLE in inputs:
            return 0
        labels = inputs["labels"]
        causal = self.cfg.model.task == "causal_lm"
        return int(labels[..., 1:].ne(IGNORED).sum()) if causal else len(labels)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the micro-batch's part of the mean loss over all items of an optimizer step.

        Upstream leaves that to the model's loss. Those of most encoders and of all regressions
        ignore the number of items, so their gradients would be a sum over the micro-batches.
        """
        if num_items_in_batch is None or return_outputs:
            return super().compute_loss(model, inputs, return_outputs)
        items, total = self._items(inputs), int(num_items_in_batch)
        inputs = {name: value for name, value in inputs.items() if name != IDLE}
        inputs = self._narrowed(model, inputs)
        if self._divides_loss is None and (ranks.size() > 1 or (items and items != total)):
            found = ranks.gather(self._measure_division(self.trained, inputs, max(1, items)))
            self._divides_loss = next((one for one in found if one is not None), None)
        if items and (self._divides_loss or (items == total and self._divides_loss is None)):
            return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        parent: Any = super()
        loss, outputs = parent.compute_loss(model, inputs, return_outputs=True)
        if not items:  # a loss of 0 that the gradients of all processes still meet in
            return outputs.logits.sum() * 0.0
        # Gradients are averaged over the processes, and theirs are to be added up.
        return loss * (items * ranks.size() / total)

    def _narrowed(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
        """Inputs for which the output layer runs on target positions only, where that pays.

        A model may take `logits_to_keep` and compute its loss in a way of its own, so the losses of
        one row with and without it are compared once.
        """
        causal = self.cfg.model.task == "causal_lm"
        narrow = narrowed(self.trained, inputs) if causal else None
        if self._narrows is False or narrow is None or self.label_smoother is not None:
            return inputs
        if self.accelerator.num_processes > 1:  # one that compares alone would wait for the others
            return inputs
        if self._narrows is None:
            self._narrows = self._measure_narrowing(model, inputs)
        return narrow if self._narrows else inputs

    @torch.no_grad()
    def _measure_narrowing(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the loss of one row is the same on its target positions only."""
        row = int(inputs["labels"][:, 1:].ne(IGNORED).any(1).nonzero()[0])
        one = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in inputs.items()}
        narrow = only_targets(one, least=0)
        if narrow is None:
            return True
        model.eval()
        try:
            parent: Any = super()
            losses = [float(parent.compute_loss(model, i)) for i in (one, narrow)]
        except (TypeError, ValueError):  # an argument that some part of the model refuses
            return False
        finally:
            model.train()
        return math.isclose(*losses, rel_tol=1e-3)

    @torch.no_grad()
    def _measure_division(
        self, model: nn.Module, inputs: dict[str, Any], items: int
    ) -> bool | None:
        """Whether the loss halves with twice the number of items; None if it is zero."""
        model.eval()
        losses: list[Any] = [
            super(RunTrainer, self).compute_loss(model, dict(inputs), False, number)
            for number in (torch.tensor(2 * items), torch.tensor(items))
        ]
        half, whole = map(float, losses)
        model.train()
        known = whole and math.isfinite(whole)
        return math.isclose(2 * half, whole, rel_tol=1e-3) if known else None

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Do upstream's step; raise FloatingPointError if the loss is NaN or infinite.

        Processes meet once in an optimizer step, at its last micro-batch, and all raise.
        """
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self._bad_loss = f"{loss.item()}"
        if self.accelerator.sync_gradients and ranks.any_of(self._bad_loss is not None):
            step = self.state.global_step + 1
            bad = self._bad_loss or "not finite in another process"
            error = FloatingPointError(self._broken(f"the loss is {bad} in step {step}"))
            raise ranks.told(error)
        return loss

    def _broken(self, what: str) -> str:
        last = latest_checkpoint(self.checkpoints)
        kept = f"{last} is kept" if last else "there is no checkpoint yet"
        return (
            f"training: {what}; {kept}. Lower training.learning_rate, or look for rows that are "
            "wrong."
        )

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure the validation rows as `plait evaluate` does, and log the metrics.

        Exact match takes long and is measured only if metric_for_best_model asks for it.
        """
        self.check_finite()
        wants = (self.args.metric_for_best_model or "").endswith("exact_match")
        measured = evaluate_model(self.trained, self.data, "validation", self.cfg, generate=wants)
        metrics = {
            f"{metric_key_prefix}_{name}": value
            for name, value in measured.items()
            if isinstance(value, float)
        }
        if f"{metric_key_prefix}_mse" in metrics:  # the Trainer's own name for what it minimises
            metrics[f"{metric_key_prefix}_loss"] = metrics[f"{metric_key_prefix}_mse"]
        self.log(metrics)
        best = self.args.metric_for_best_model
        if best is not None:
            undefined = -math.inf if self.args.greater_is_better else math.inf  # the worst value
            metrics = {f"{metric_key_prefix}_{best.removeprefix('eval_')}": undefined, **metrics}
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save a checkpoint at each new best value: only what is saved can be loaded at the end."""
        improved = super()._determine_best_metric(metrics, trial)
        if improved:  # upstream notes it only where checkpoints are saved
            self.state.best_global_step = self.state.global_step
        if improved and self.args.load_best_model_at_end:
            self.control.should_save = True
        return improved

    # ---------------------------------------------------------------------------- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))

    def check_finite(self) -> None:
        """Raise FloatingPointError if a trained weight is not finite: it is never saved."""
        step = self.state.global_step
        trained = (pair for pair in self.trained.named_parameters() if pair[1].requires_grad)
        broken = next((name for name, p in trained if not all_finite(p)), None)
        found = [name for name in ranks.gather(broken) if name is not None]
        if found:
            text = self._broken(f"{found[0]} is not finite any more after step {step}")
            raise ranks.told(FloatingPointError(text))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name and rename it: it is whole or absent."""
        step = self.state.global_step
        self.check_finite()
        if self.stop.stopping:  # a checkpoint without optimizer state cannot be resumed
            self.args.save_only_model = False
        target = self.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if ranks.is_first():
            with writable(target, self.checkpoints):
                replace_dir(target, lambda folder: self._fill(folder, model, trial))
            rotate_checkpoints(
                output_dir=str(self.checkpoints),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )
        else:
            self._fill(None, model, trial)
        self.state.best_model_checkpoint = ranks.of_first(self.state.best_model_checkpoint)

    def _fill(self, folder: Path | None, model: nn.Module, trial: Any) -> None:
        """Let the Trainer write its checkpoint into `folder`, which the first process knows."""
        step = self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        self._staging = Path(ranks.of_first(str(folder)))
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        ranks.gather(None)  # all have written
        if folder is None:
            return
        best = self.checkpoints / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.name == name or best.is_dir():  # upstream looked for it below the temporary name
            self.state.best_model_checkpoint = str(best)
            self.state.save_to_json(str(folder / name / TRAINER_STATE_NAME))
        (folder / name / WEIGHTS).unlink(missing_ok=True)
        for file in list((folder / name).iterdir()):
            file.rename(folder / file.name)
        (folder / name).rmdir()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights of a checkpoint; those that are shared out are gathered first."""
        if is_sharded(self.trained):
            self._save(output_dir, whole_state(self.trained))
        else:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with upstream_noise():
            super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = self.checkpoints if output_dir is None else Path(output_dir)
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if isinstance(self.trained, PeftModel):
            name_base(folder, self.cfg.model)
        tuner = adalora_of(self.trained)
        if tuner is not None:
            save_adalora(tuner, folder)
        if self.chain is not None and self.chain.chain is not None:
            self.chain.chain.save(folder)  # before the checkpoint gets its name: whole or absent

    def load_weights(self, checkpoint: Path) -> None:
        """Load all weights of a checkpoint and the links of a chain, or raise ValueError."""
        self._load_from_checkpoint(str(checkpoint))
        if self.chain is not None:
            load(self.trained, checkpoint)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if is_sharded(self.trained):  # its weights were loaded before
            return
        tuner = adalora_of(self.trained)
        with undamaged(folder, *_UNEXPECTED):
            if tuner is not None:
                load_adalora(tuner, folder)
            elif isinstance(self.trained, PeftModel):
                load_weights(self.trained, folder, _REMEDY)
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with undamaged(Path(checkpoint or "."), *_UNEXPECTED, ValueError):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with undamaged(Path(checkpoint or "."), *_UNEXPECTED, ValueError):
            super()._load_rng_state(checkpoint)


def rehearse(
    cfg: RunConfig, place: bool = True, loader: Loader | None = None
) -> tuple[Prepared, torch.optim.Optimizer]:
    """Prepare a run, and make its Trainer, batches, optimizer and schedule once, to refuse early.

    `plait train` and `plait check` both begin here, so that one refuses what the other does.
    Nothing is written but a temporary folder. The model keeps no trace, and the optimizer is for
    looking at: training makes its own.

    place, loader: as for `prepare`.

    Raises what `prepare` raises, and ValueError or ImportError for values of `training`,
    `optimizer` and `method.lr_scale` that upstream or the optimizer refuse.
    """
    run = prepare(cfg, place, loader)
    before = [(p, p.requires_grad, p._post_accumulate_grad_hooks) for p in run.model.parameters()]
    with TemporaryDirectory(prefix="plait-") as folder:
        arguments = copy.copy(run.arguments)
        arguments.output_dir = folder
        trainer = _Rehearsal(replace(run, arguments=arguments), RunFolder(folder))
        with upstream_refuses("training"):
            trainer.get_train_dataloader()
            if arguments.use_liger_kernel:
                apply_liger_kernel(run.model, arguments.liger_kernel_config)
        if recomputes(cfg.training):
            _check_checkpointing(run.model)
        trainer.create_optimizer_and_scheduler(run.steps)
    optimizer: Any = trainer.optimizer
    if hasattr(optimizer, "remove"):  # its hooks on the model
        optimizer.remove()
    for parameter, trains, hooks in before:  # an optimizer may freeze some, or step in hooks
        parameter.requires_grad_(trains)
        parameter._post_accumulate_grad_hooks = hooks
    return run, optimizer


class _Rehearsal(RunTrainer):
    """Leaves the model where `prepare` placed it."""

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        pass


def _check_checkpointing(model: Any) -> None:
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not base.supports_gradient_checkpointing:
        raise ValueError(
            f"training.gradient_checkpointing is true, and a {base.config.model_type} cannot "
            "recompute its blocks. Set it to false."
        )


@contextmanager
def undamaged(checkpoint: Path, *errors: type[Exception]) -> Iterator[None]:
    """Turn errors from reading a damaged checkpoint, and those of these types, into ValueErrors."""
    try:
        with readable(checkpoint, _REMEDY):
            yield
    except errors as error:
        if str(error).startswith(f"{checkpoint}: "):  # said already
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{checkpoint}: damaged or cut off ({reason}). {_REMEDY}") from error


def early_stopping(patience: int | None, checkpoint: Path | None) -> EarlyStoppingCallback | None:
    """Return upstream's callback, which goes on counting from a checkpoint; None without patience.

    Upstream restores it only together with its whole control, which says to stop after a signal.
    """
    if patience is None:
        return None
    stop = EarlyStoppingCallback(patience)
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        saved: Any = state.stateful_callbacks or {}
        attributes = saved.get(EarlyStoppingCallback.__name__, {}).get("attributes", {})
        vars(stop).update(attributes)
    return stop


def check_state(checkpoint: Path) -> None:
    """Raise ValueError if the Trainer's notes in a checkpoint are damaged."""
    file = checkpoint / TRAINER_STATE_NAME
    try:
        step = TrainerState.load_from_json(str(file)).global_step
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(f"{file}: damaged ({first_line(error)}). {_REMEDY}") from None
    if checkpoint.name != f"{PREFIX_CHECKPOINT_DIR}-{step}":
        raise ValueError(f"{file}: damaged (global_step is {step!r:.60}). {_REMEDY}")


@contextmanager
def writable(target: Path, checkpoints: Path) -> Iterator[None]:
    """Report what could not be written (disk full, ..) and which checkpoint to resume from."""
    try:
        yield
    except EventNeverFired:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save: RuntimeError
        last = latest_checkpoint(checkpoints)
        kept = f"{last} is kept: make room and resume." if last else "Make room and start again."
        reason = first_line(error)
        if isinstance(error, OSError) and error.strerror:  # the file is named already
            reason = f"[Errno {error.errno}] {error.strerror}"
        text = f"{target}: could not be written ({reason}). {kept}"
        raise unwritten(text, error) from error


def clear_unfinished(checkpoints: Path) -> None:
    """Put back or remove what a killed process left while it wrote a checkpoint."""
    for unfinished in checkpoints.glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
        put_back(checkpoints / unfinished.name.split(".")[1])
        shutil.rmtree(unfinished, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint with the highest step; None if there is none."""
    steps = {}
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if number.isdigit() and is_complete(path):
            steps[int(number)] = path
    return steps[max(steps)] if steps else None


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint has all the files that resuming needs."""
    weights = [checkpoint / name for name in _WEIGHTS if (checkpoint / name).is_file()]
    states = [checkpoint / name for name in _STATES]
    states += sorted(checkpoint.glob("rng_state*.pth"))
    if not weights or not all(file.is_file() for file in states):
        return False
    if not any((checkpoint / name).is_file() for name in _OPTIMIZERS):
        return False
    return len(states) > len(_STATES)


# ------------------------------------------------------------------------------- learning rates


def restarting_shape(args: TrainingArguments) -> str:
    """Return the shape of each link's learning rate; ValueError if the schedule cannot restart."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    shape = name.removesuffix("_with_warmup")
    if shape not in SHAPES:
        raise ValueError(
            f"training.lr_scheduler_type is {name}, which cannot restart with each link of a "
            f"chain. Use one of {', '.join(SHAPES)}, or set chain.lr: global."
        )
    return shape


def scale_learning_rates(
    optimizer: torch.optim.Optimizer, model: nn.Module, factors: Mapping[str, float]
) -> None:
    """Split the parameter groups: learning rate times the factor, weight decay divided by it.

    factors: parameter name -> factor. A name is one part of the dotted name, `A` also means
    `lora_A`. Decoupled weight decay (learning rate times decay) stays what it was.
    Raises ValueError for a name that no trained parameter has.
    """
    parts = {id(p): name.split(".") for name, p in model.named_parameters() if p.requires_grad}
    for key in factors:
        if not any(_named(names, key) for names in parts.values()):
            known = {part.removeprefix("lora_") for names in parts.values() for part in names}
            raise ValueError(
                f"method.lr_scale: no trained parameter is named {key}. {did_you_mean(key, known)}"
            )
    for group in list(optimizer.param_groups):
        for key, factor in factors.items():
            moved = [p for p in group["params"] if _named(parts[id(p)], key)]
            if not moved:
                continue
            chosen = {id(p) for p in moved}
            group["params"] = [p for p in group["params"] if id(p) not in chosen]
            scaled = {
                "params": moved,
                "lr": group["lr"] * factor,
                "weight_decay": group["weight_decay"] / factor,
            }
            optimizer.add_param_group({**group, **scaled})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]


def _named(parts: list[str], key: str) -> bool:
    return key in parts or f"lora_{key}" in parts
