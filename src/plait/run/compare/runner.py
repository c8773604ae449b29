"""Run the trials of a comparison: each an ordinary run folder, none of them twice.

A trial's folder is named by a digest of what decides its result, so that trials of an earlier call,
of another study or of a larger one are used again. `rows.json` is written last: a trial has
finished if it is there. A run that was interrupted goes on from its checkpoint.

This module loads torch only where a trial is run.
"""

import json
import multiprocessing as mp
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from plait.core.files import write_atomic
from plait.run.compare.study import Trial
from plait.run.config import config_from_dict, config_to_dict, import_plugin
from plait.run.folder import RunFolder
from plait.run.metrics import Rows, metrics_of_rows

if TYPE_CHECKING:
    from plait.run.compare.warm import Warm

Finished = Callable[[Trial, int, int], None]  # a trial that has finished, how many, of how many

_ROWS = "rows.json"
_FACTS = ("wall", "trained", "measured", "peak_memory", "serves")
_VERSION = 1
_TRIES = 3  # of workers that die one after the other without a finished trial
_PATIENCE = 20.0  # seconds for the runs in hand to write a checkpoint after Ctrl-C
_MOST_WORKERS = 8
# Errors of a run that a change of the file can fix keep their type, which decides how it is shown.
_TOLD = {kind.__name__: kind for kind in (ValueError, TypeError, ImportError, FileNotFoundError)}


class Stopped(Exception):
    """Some trials were not run, for the time was up or nothing may be run."""


# ---------------------------------------------------------------------------------------- a trial


def run_trial(raw: dict[str, Any], path: str, warm: "Warm") -> None:
    """Train one trial, or go on with it, and write what its model says of each held-out row.

    raw: the config without the section `output`. path: of the run folder.
    """
    from plait.run.evaluate import measure_rows
    from plait.run.prepare import load_run
    from plait.run.train import train

    folder, began = RunFolder(path), time.monotonic()
    if (folder.path / _ROWS).is_file():
        return
    _restart_peak()
    warm.measured, warm.seconds = None, 0.0
    if not folder.card.is_file():
        resume = folder.config.is_file()
        if not resume and folder.path.exists():  # killed before anything was known of the run
            shutil.rmtree(folder.path)
        cfg = config_from_dict({**raw, "output": {"dir": path}})
        try:
            train(cfg, resume=resume, loader=warm, measure=warm.measure)
        except FloatingPointError as error:
            _write(folder, {"diverged": str(error)}, began)
            return
    if warm.measured is None:
        run = load_run(path)
        split = run.held_out_split
        assert split is not None
        warm.measured = split, measure_rows(run.model, run.load_data(split), split, run.cfg)
    split, values = warm.measured
    rows = {name: v.tolist() for name, v in values.items()}
    content = {"split": split, "serves": _serves(raw["method"]["name"]), "measured": warm.seconds}
    _write(folder, {**content, "rows": rows}, began)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)  # of no use after the end


def _write(folder: RunFolder, content: dict[str, Any], began: float) -> None:
    """Write the last file of a trial; began: when this process took it up."""
    facts = {
        "wall": time.monotonic() - began,
        "trained": folder.read_facts().get("seconds", 0.0),
        "peak_memory": _peak(),
    }
    text = json.dumps({"schema": "plait.rows", "version": _VERSION, **facts, **content})
    write_atomic(folder.path / _ROWS, text + "\n")


def _serves(method: str) -> str:
    """What it takes to serve a method's adapter."""
    from plait.core.registry import find
    from plait.upstream.table import BASELINES

    if method == "full":
        return "a whole model"
    known = BASELINES.get(method) or find(method)
    if known.exact_export:
        return "a plain LoRA"
    return "merged into the base" if known.mergeable else "by peft alone"


def _restart_peak() -> None:
    """Forget the most memory that was in use so far, on the accelerator or in this process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):  # Linux has it
            Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int | None:
    """Return the most bytes in use since `_restart_peak`; None where this cannot be known."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None


# ---------------------------------------------------------------------------------------- workers


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    trial: Trial | None = None
    began: float = 0.0


class Pool:
    """Runs trials, in worker processes that keep what the trials have in common.

    Args:
        folder: of the comparison; a trial's run is in runs/KEY below it.
        workers: processes; 1 runs the trials in this one. None: as StudyConfig.workers says.
        modules: what import_plugin is to import in each worker: they register methods.
        until: the time, by time.monotonic, after which nothing new is begun.

    As a context manager it ends its workers.
    """

    def __init__(
        self,
        folder: Path,
        workers: int | None = 1,
        modules: Sequence[str] = (),
        until: float = float("inf"),
    ) -> None:
        self.folder, self.modules, self.until = folder, list(modules), until
        self._asked, self._workers = workers, list[_Worker]()
        self._warm: Warm | None = None
        self._slowest = 0.0  # seconds of a trial so far

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, KeyboardInterrupt):  # the signal reached the workers, too
            _wait_for([w.pipe for w in self._workers if w.trial is not None])
        for worker in self._workers:
            worker.process.kill()
            worker.process.join()
            worker.pipe.close()
        self._workers = []

    @property
    def count(self) -> int:
        """How many workers there are at most."""
        if self._asked is not None:
            return self._asked
        import torch

        return 1 if torch.cuda.is_available() else max(1, min(_cores(), _MOST_WORKERS))

    def run(self, trials: Sequence[Trial], finished: Finished | None = None) -> None:
        """Run the trials that have not finished yet, in their order.

        finished: called for each trial, those of earlier calls first.

        A loss that is NaN or infinite is a result, see `read_trial`.

        Raises what training raises; what has finished is kept. RuntimeError if workers are killed
        again and again; Stopped when time is up.
        """
        left: dict[str, list[Trial]] = {}
        done = 0
        for trial in trials:
            if has_finished(trial, self.folder):
                done += 1
                if finished is not None:
                    finished(trial, done, len(trials))
            else:
                left.setdefault(trial.key, []).append(trial)
        queue, died = [same[0] for same in left.values()], 0
        while queue or any(w.trial for w in self._workers):
            ended, lost = self._step(queue)
            died = 0 if ended else died + len(lost)
            queue[:0] = lost
            if died >= _TRIES:
                raise RuntimeError(
                    f"{_TRIES} worker processes were killed without a finished run, the last one "
                    f"in a run of {lost[-1].arm}. Give the runs more memory, or fewer workers."
                )
            for trial in ended:
                for same in left[trial.key]:
                    done += 1
                    if finished is not None:
                        finished(same, done, len(trials))
            if queue and not self._may_begin and not any(w.trial for w in self._workers):
                raise Stopped

    @property
    def _may_begin(self) -> bool:
        """Whether a trial that takes as long as the longest so far would end in time."""
        return time.monotonic() + self._slowest <= self.until

    def _step(self, queue: list[Trial]) -> tuple[list[Trial], list[Trial]]:
        """Begin what can be, wait until something happens; return (finished, lost) trials."""
        if not queue and not self._workers:
            return [], []
        if self.count == 1 and not self._workers:
            return ([self._here(queue.pop(0))] if self._may_begin else []), []
        busy = sum(w.trial is not None for w in self._workers)
        wanted = min(self.count, busy + len(queue)) if self._may_begin else 0
        while len(self._workers) < wanted:
            self._workers.append(_start(self.count, self.modules))
        for worker in self._workers:
            if queue and worker.trial is None and self._may_begin:
                worker.trial, worker.began = queue.pop(0), time.monotonic()
                with suppress(OSError):  # it died: noticed below
                    worker.pipe.send((_raw(worker.trial), str(self._run(worker.trial))))
        busy_ones = [w for w in self._workers if w.trial is not None]
        if not busy_ones:
            return [], []
        ready = wait([x for w in busy_ones for x in (w.pipe, w.process.sentinel)])
        ended, lost = [], []
        for worker in busy_ones:
            if worker.pipe not in ready and worker.process.sentinel not in ready:
                continue
            assert worker.trial is not None
            try:
                kind, text = worker.pipe.recv()
            except (EOFError, OSError):
                lost.append(worker.trial)
                worker.process.join()
                self._workers.remove(worker)
                continue
            trial, worker.trial = worker.trial, None
            if kind == "KeyboardInterrupt":
                raise KeyboardInterrupt(text)
            if kind:
                raise _TOLD.get(kind, RuntimeError)(_named(trial, text))
            self._note(worker.began)
            ended.append(trial)
        return ended, lost

    def _here(self, trial: Trial) -> Trial:
        """Run a trial in this process."""
        from plait.run.compare.warm import Warm

        self._warm, began = self._warm or Warm(), time.monotonic()
        run_trial(_raw(trial), str(self._run(trial)), self._warm)
        self._note(began)
        return trial

    def _note(self, began: float) -> None:
        self._slowest = max(self._slowest, time.monotonic() - began)

    def _run(self, trial: Trial) -> Path:
        return run_folder(trial, self.folder).path


def _named(trial: Trial, text: str) -> str:
    return f"{text} (in a run of {trial.arm}, rate {trial.rate:g}, seed {trial.seed})"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _wait_for(pipes: list[Connection]) -> None:
    """Wait until the runs in hand have ended or written a checkpoint, which a worker then says."""
    until = time.monotonic() + _PATIENCE
    while pipes and time.monotonic() < until:
        ready = wait(pipes, max(0.0, until - time.monotonic()))
        pipes = [pipe for pipe in pipes if pipe not in ready]


def _start(count: int, modules: list[str]) -> _Worker:
    """Start a worker, forked from a server process that has imported torch and plait."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["plait.run.compare.preload"])
    here, there = context.Pipe()
    threads = max(1, _cores() // count)
    process = context.Process(target=_work, args=(there, threads, modules), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _work(pipe: Connection, threads: int, modules: list[str]) -> None:
    """Run trial after trial until the pipe closes; end at once when the parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # training has a handler of its own
    threading.Thread(target=_end_with_parent, daemon=True).start()

    import gc
    import logging
    import warnings

    import torch

    from plait.core.events import PlaitWarning
    from plait.run.compare.warm import Warm

    logging.disable(logging.WARNING)  # what libraries say is said by each run again
    warnings.simplefilter("ignore")
    warnings.simplefilter("once", PlaitWarning)
    warnings.formatwarning = _plainly
    torch.set_num_threads(threads)
    for module in modules:
        import_plugin(module)
    warm, first = Warm(), True
    while True:
        try:
            raw, path = pipe.recv()
        except EOFError:
            return
        try:
            for module in raw.get("plugins") or ():
                import_plugin(module)
            run_trial(raw, path, warm)
        except KeyboardInterrupt as stopped:
            pipe.send(("KeyboardInterrupt", str(stopped)))
            return
        except Exception as error:
            pipe.send((type(error).__name__, str(error)))
        else:
            pipe.send(("", ""))
        if first:  # the Trainer collects garbage at its end: among what came later alone
            gc.collect()
            gc.freeze()
            first = False


def _plainly(message: Warning | str, *_: object) -> str:
    return f"warning: {message}\n"


def _end_with_parent() -> None:
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


# ---------------------------------------------------------------------------------------- results


def run_folder(trial: Trial, folder: Path) -> RunFolder:
    """Return the run folder of a trial."""
    return RunFolder(folder / "runs" / trial.key)


def has_finished(trial: Trial, folder: Path) -> bool:
    """Whether a trial has a result."""
    return (run_folder(trial, folder).path / _ROWS).is_file()


def read_result(trial: Trial, folder: Path) -> dict[str, Any]:
    """Return what a finished trial left: rows (None if it diverged), and what it took.

    wall, trained, measured: seconds of all, of training, of the last measurement. peak_memory:
    bytes. serves: what it takes to serve the adapter. diverged: why; None if it did not.

    Raises ValueError for a damaged file, and FileNotFoundError for a trial that has not finished.
    """
    file = run_folder(trial, folder).path / _ROWS
    if not file.is_file():
        raise FileNotFoundError(f"{file}: is missing, so this run has not finished. Run it.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        rows = content.get("rows")
        if "diverged" not in content:
            rows = {str(name): np.array(v, dtype=float) for name, v in rows.items()}
        facts = {
            key: content.get(key)
            for key in ("wall", "trained", "measured", "peak_memory", "serves")
        }
        return {**facts, "rows": rows, "diverged": content.get("diverged")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file}: damaged ({error}). Remove it; the run is kept.") from None


def read_trial(trial: Trial, folder: Path) -> Rows | None:
    """Return what a finished trial's model said of each held-out row; None if it diverged.

    Raises as `read_result` does.
    """
    return read_result(trial, folder)["rows"]


def value_of(trial: Trial, folder: Path, metric: str) -> float | None:
    """Return a metric of a finished trial; None if it diverged or is not defined on these rows."""
    rows = read_trial(trial, folder)
    return None if rows is None else metrics_of_rows(trial.config.model.task, rows).get(metric)


def parts_of(task: str, metric: str, rows: Rows) -> NDArray[np.float64]:
    """Return numbers whose mean is a metric: one for each row, or the metric itself, alone.

    A mean over target tokens is cut into the rows' parts of it. Metrics of all rows together, such
    as F1 and correlations, have no parts.
    """
    if metric in ("loss", "token_accuracy") and "tokens" in rows:
        whole = rows["nll"] if metric == "loss" else rows["correct"]
        return whole * len(whole) / rows["tokens"].sum()
    if metric == "loss" and "nll" in rows:
        return rows["nll"]
    if metric == "exact_match":
        return rows["exact_match"]
    if metric == "accuracy":
        return (rows["predicted"] == rows["label"]).astype(float)
    if metric in ("mse", "loss"):
        return np.square(rows["predicted"] - rows["label"])
    value = metrics_of_rows(task, rows)[metric]
    return np.array([np.nan if value is None else value])


def _raw(trial: Trial) -> dict[str, Any]:
    raw = config_to_dict(trial.config)
    del raw["output"]
    return raw
