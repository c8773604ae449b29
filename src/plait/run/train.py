"""Train one run into its run folder, and continue it after an interruption.

The held-out metric is taken before and after. A run that is stopped (Ctrl-C, a full disk, NaN in
the loss) keeps its last complete checkpoint; `resume=True` continues from there to the same
weights, bit for bit on the CPU, as a run that was never stopped.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import TrainerCallback, set_seed

from plait.callback import PlaitCallback
from plait.core.events import PlaitWarning, check_events
from plait.core.files import lock
from plait.run.adapter import keep_start, splits_base
from plait.run.callbacks import MetricsFile
from plait.run.card import write_card, write_loss_curve
from plait.run.config import RunConfig, config_to_dict, dump_config
from plait.run.data.bundle import Split
from plait.run.evaluate import Progress, evaluate_model
from plait.run.export import export_trained
from plait.run.folder import RunFolder, with_absolute_paths, write_atomic
from plait.run.model import source_of
from plait.run.objectives.trainers import trainer_class
from plait.run.parallel import ranks
from plait.run.parallel.ranks import agreed, check_same
from plait.run.parallel.sharded import is_sharded
from plait.run.prepare import Loader, Prepared, TrainedRun, load_run
from plait.run.trainer import clear_unfinished, latest_checkpoint, rehearse

# Measures a prepared run: (occasion, the run, split, progress) -> metrics.
Measure = Callable[[str, Prepared, Split, Progress | None], dict[str, Any]]


def measure(
    occasion: str, run: Prepared, split: Split, progress: Progress | None
) -> dict[str, Any]:
    """Return the metrics of a run's model on a split. occasion: before or after training."""
    return evaluate_model(run.model, run.data, split, run.cfg, progress=progress)


def train(
    cfg: RunConfig,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
    announce: Callable[[str], None] = lambda line: None,
    loader: Loader | None = None,
    measure: Measure = measure,
) -> RunFolder:
    """Train a run; return its folder, with the adapter (or model/), metrics, picture and card.

    Nothing is written before all checks have passed. The folder is locked meanwhile. Where a
    launcher started several processes, all call this: they train together, the first one writes,
    and an error of one before training is raised by all.

    Args:
        cfg: the run.
        resume: continue the run in output.dir from its last complete checkpoint, or from the start
            if there is none yet.
        callbacks: further Trainer callbacks, such as a progress bar.
        progress: called while the held-out metric is taken, with (rows done, rows in all).
        announce: called before training with a line on the rows, and one on packs.
        loader: of what the run reads; None: everything is loaded anew.
        measure: takes the held-out metric.

    Raises:
        FileExistsError: output.dir holds something and resume is False, or another process writes
            there.
        ValueError: a resumed config or its data differ in what decides the weights; and what
            `rehearse` raises.
        FloatingPointError: the loss or a weight is NaN or infinite.
        OSError: a file cannot be written.
        KeyboardInterrupt: after a signal, when the checkpoint is written.
    """
    ranks.join(cfg)
    absolute, path = with_absolute_paths(cfg), cfg.output.dir
    config, text = config_to_dict(absolute), dump_config(absolute)
    with ExitStack() as stack:
        with agreed():
            if ranks.is_first():
                stack.enter_context(lock(path))
                _ = RunFolder.unfinished(path, config) if resume else RunFolder.free(path)
        folder = RunFolder(path)
        with agreed():
            run, _ = rehearse(cfg, loader=loader)
        if ranks.is_first():
            announce(run.data.summary)
            if cfg.data.packing:
                size = run.arguments.per_device_train_batch_size
                announce(run.data.packed(cfg.data.max_length, size))
        with _undone(folder, resume):
            return _train(run, folder, text, callbacks, progress, measure)


@contextmanager
def _undone(folder: RunFolder, resume: bool) -> Iterator[None]:
    """Empty the folder of a new run if a mistake of the user's stops it before it has trained."""
    try:
        yield
    except (ValueError, TypeError, ImportError):
        trained = latest_checkpoint(folder.checkpoints) is not None or folder.read_metrics()
        if ranks.is_first() and not resume and not trained:
            folder.discard()
        raise


def _train(
    run: Prepared,
    folder: RunFolder,
    config: str,
    callbacks: Sequence[TrainerCallback],
    progress: Progress | None,
    measure: Measure,
) -> RunFolder:
    """Train a prepared run; config: the YAML that the folder keeps."""
    cfg = run.cfg
    first = ranks.is_first()
    with agreed():
        if first:
            folder.begin(config, run.seeds, {**run.facts, **_processes(folder)})
            keep_start(run.model, folder.start)
            clear_unfinished(folder.checkpoints)
    checkpoint = latest_checkpoint(folder.checkpoints)
    check_same(
        "the last checkpoint",
        checkpoint and checkpoint.name,
        "Give an output.dir on a file system that all machines share.",
    )

    split = run.data.held_out_split
    if split is not None and ranks.of_first("before" not in folder.read_evaluation()):
        before = measure("before", run, split, progress)
        if first:
            folder.write_evaluation(split=split, before=before)

    # Made after the first evaluation: the Trainer seeds all generators.
    make = trainer_class(cfg.objective.name)
    trainer = make(run, folder, [MetricsFile(folder), PlaitCallback(), *callbacks])
    if ranks.size() > 1:  # dropout is drawn for the own rows; the rest comes from generators
        set_seed((run.seeds["training"] + 1_000_003 * ranks.rank()) % 2**32)
    try:
        trainer.fit()
    except FloatingPointError:
        if first:
            write_loss_curve(folder, f"{folder.path.name}, stopped")
        raise
    check_events(run.model)
    trainer.save()

    if split is not None:
        after = measure("after", run, split, progress)
        if first:
            folder.write_evaluation(after=after)
    with agreed():
        if first:
            _finish(run, folder)
    return folder


def _finish(run: Prepared, folder: RunFolder) -> None:
    """Write what is made of a trained adapter: the plain LoRA, the picture, the card."""
    cfg = run.cfg
    if cfg.output.also:
        _write_lora(run, folder)
    write_loss_curve(folder, f"{cfg.method.name} on {cfg.model.name.rpartition('/')[2]}")
    card = write_card(folder, cfg)
    if folder.adapter.is_dir():  # peft's own card does not say what is needed to load this
        write_atomic(folder.adapter / "README.md", card)


def _processes(folder: RunFolder) -> dict[str, int]:
    """The fact `processes`; ValueError if a run began with another number of them."""
    count = ranks.size()
    began = folder.read_facts().get("processes", count if not folder.config.is_file() else 1)
    if began != count:
        raise ValueError(
            f"{folder.path}: this run began with {began} processes, and {count} were started. Each "
            "has random states and a share of the rows of its own. Resume with "
            + ("one process" if began == 1 else f"--processes {began}")
            + ", or train to another output.dir."
        )
    return {"processes": count} if count > 1 else {}


def _write_lora(run: Prepared, folder: RunFolder) -> None:
    """Write the adapter as a plain LoRA, too; where that fails, warn and keep the run."""
    if splits_base(run.model) or is_sharded(run.model):  # its live base is not the base model
        trained = load_run(folder.path)
    else:
        facts, source = folder.read_facts(), source_of(run.cfg.model)
        trained = TrainedRun(folder, run.cfg, run.tokenizer, run.model, source, facts)
    try:
        export_trained(trained)
    except ValueError as error:
        text = f"output.also: the adapter is trained and saved, and lora/ was not written. {error}"
        warnings.warn(text, PlaitWarning, stacklevel=2)
