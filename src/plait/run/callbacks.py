"""Callbacks of the Trainer: metrics.jsonl, the progress bar, stopping on Ctrl-C."""

import math
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from plait.run.folder import RunFolder
from plait.run.parallel.ranks import any_of

_SILENT_LINES = 20  # lines that a whole run prints without a terminal


class MetricsFile(TrainerCallback):
    """Appends every log to metrics.jsonl: one JSON object a line, flushed at once.

    Numbers that are not finite become null. A resumed run drops the lines after its checkpoint and
    writes them again.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the lines up to the step that training starts from, without earlier summaries."""
        kept = [
            row
            for row in self.folder.read_metrics()
            if row["step"] <= state.global_step and "train_loss" not in row
        ]
        if state.is_world_process_zero:
            self.folder.write_metrics(kept)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write one line."""
        if state.is_world_process_zero:
            row = {"step": state.global_step, **kwargs["logs"]}
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            self.folder.append_metrics(finite)


class StopOnSignal(TrainerCallback):
    """Turns Ctrl-C (and SIGTERM) into a checkpoint at the end of the running step.

    A context manager around training. Signals can only be caught in the main thread; in any other
    it does nothing. A second Ctrl-C interrupts at once. A signal to one of several processes stops
    all of them.

    Attributes:
        requested: whether this process caught a signal.
        stopping: whether training ends with this step, on all processes.
    """

    def __init__(self) -> None:
        self.requested = self.stopping = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._caught)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt("training: stopped in the middle of a step.")
        self.requested = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if a signal came during this step."""
        self.stopping = any_of(self.requested)
        if self.stopping:
            control.should_save = True
            control.should_training_stop = True


class ProgressBar(TrainerCallback):
    """Loss, learning rate, tokens per second and time left.

    A rich progress bar in a terminal; elsewhere about twenty plain lines over the whole run.
    """

    def __init__(self, console: Console | None = None):
        self.console = console or Console()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.next_line = 0.0
        self.started = 0.0
        self.first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step that training starts from."""
        self.started, self.first = time.monotonic(), state.global_step
        self.next_line = 0.0
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self.console,
            )
            self.task = self.bar.add_task(
                "", total=state.max_steps, completed=state.global_step, numbers=""
            )
            self.bar.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show new numbers."""
        logs, step = kwargs["logs"], state.global_step
        if "eval_loss" in logs:
            self._print(f"step {step}: held-out loss {logs['eval_loss']:.4f}")
        if "loss" not in logs:
            return
        numbers = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        if "train_tokens_per_second" in logs:
            numbers.append(f"{logs['train_tokens_per_second']:,.0f} tokens/s")
        if self.bar is not None:
            self.bar.update(self.task, numbers="  ".join(numbers))
        elif step >= self.next_line or step == state.max_steps:
            self.next_line = step + state.max_steps / _SILENT_LINES
            left = (
                (time.monotonic() - self.started) / (step - self.first) * (state.max_steps - step)
            )
            self._print(
                "  ".join([f"step {step}/{state.max_steps}", *numbers, f"{_clock(left)} left"])
            )

    def close(self) -> None:
        """Take the bar off the terminal's last line, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        self.close()

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
