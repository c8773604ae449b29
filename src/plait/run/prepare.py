"""Turn the config of a run into tokenizer, data, base model and method, checked against each other.

    prepare(cfg)                 a run that is to be trained; see also trainer.rehearse
    load_run(path)               a run that was trained
    check_config, method_config  and model.prepare_base: the parts, for a run of many clients

Nothing is written here: a config that is refused leaves no run folder behind.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.integrations.integration_utils import get_reporting_integration_callbacks
from transformers.pytorch_utils import Conv1D

from plait import chain
from plait.chain import ChainPlan
from plait.core.bridge import keep_masters, warn_left_out
from plait.core.config import DeltaConfig
from plait.core.delta import Delta
from plait.core.events import PlaitWarning
from plait.core.registry import find
from plait.gates.alloc import set_development_batch
from plait.options import shown
from plait.run.adapter import (
    check_finite,
    load_adapter,
    load_weights,
    read_config,
    splits_base,
)
from plait.run.config import (
    PATIENCE,
    REMOTE_CODE,
    RunConfig,
    allocates,
    check_method,
    check_remote_code,
    did_you_mean,
    load_config,
    method_options,
    peft_config,
)
from plait.run.data.bundle import DataBundle, Split, load_data
from plait.run.data.packing import PackedRows, packs_apart
from plait.run.folder import CHECKPOINTS, RunFolder
from plait.run.metrics import METRICS, METRICS_OF, measures
from plait.run.model import (
    Base,
    check_ids,
    check_length,
    check_patterns,
    dequantise,
    head_labels,
    head_of,
    ignored_layers,
    load_base,
    load_full,
    load_tokenizer,
    parameter_counts,
    prepare_base,
    quantised_reason,
    set_padding,
    source_of,
    to_device,
)
from plait.run.objectives.arguments import arguments_of, check_objective, grpo_rows
from plait.run.optimizers import OPTIMIZERS
from plait.run.parallel import ranks
from plait.run.parallel.arguments import group_options
from plait.upstream.adalora import check_total_step
from plait.upstream.export import trained_beside
from plait.upstream.layers import targeted
from plait.upstream.starts import check_start, start_from_rows
from plait.upstream.table import BASELINES

_START_ROWS = 1024  # training rows that a start is made from
_SCORED_ROWS = 32  # validation rows that an allocation scores ranks on
# Options that set the rank of a layer, and those that set how many such pairs it has.
_RANKS = ("r", "init_r", "r1", "r2", "shared_r", "common_rank")
_COPIES = ("num_A", "num_B", "num_experts")
_NUMBERS = 2**24  # of an adapter whose ranks exceed its layers


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to be trained.

    model: with the method on it (a plain model for `full`), in training mode. steps: planned
    optimizer steps. chain: the plan of a chain of adapters, None without one.
    """

    cfg: RunConfig
    arguments: TrainingArguments
    tokenizer: PreTrainedTokenizerBase
    data: DataBundle
    model: PeftModel | PreTrainedModel
    steps: int
    chain: ChainPlan | None

    @property
    def seeds(self) -> dict[str, int]:
        """What is seeded -> its seed."""
        return {"training": self.cfg.training["seed"], "data": self.cfg.data.seed}

    @property
    def facts(self) -> dict[str, Any]:
        """What environment.json notes of the data and the model."""
        trainable, total = parameter_counts(self.model)
        return {
            "kind": self.data.kind,
            "form": self.data.form,
            "labels": self.data.labels,
            "tasks": self.data.tasks,
            "train_rows": len(self.data.train),
            "train_tokens": sum(len(ids) for ids in self.data.train["input_ids"]),
            "train_digest": self.data.digest("train"),
            "validation_digest": self.data.digest("validation"),
            "text_pair": "text_pair" in self.data.train.column_names,
            "chat_template": self.cfg.data.chat_template and self.tokenizer.chat_template,
            "trainable": trainable,
            "parameters": total,
        }


@dataclass(frozen=True)
class TrainedRun:
    """A trained run.

    model: in evaluation mode, on its device. source: what the base model is loaded from, a folder
    or a hub id. facts: what training noted in environment.json.
    """

    folder: RunFolder
    cfg: RunConfig
    tokenizer: PreTrainedTokenizerBase
    model: PeftModel | PreTrainedModel
    source: str
    facts: dict[str, Any]

    @property
    def held_out_split(self) -> Split | None:
        """The split that the run is judged on: test, else validation, else None."""
        if self.cfg.data.test is not None:
            return "test"
        return None if self.cfg.data.validation is None else "validation"

    @property
    def routed(self) -> bool:
        """Whether the method routes rows by task."""
        return self.cfg.method.options.get("routing") == "task"

    @property
    def tasks(self) -> list[str]:
        """The tasks that the method routes by, in the order of their indices."""
        return list(self.cfg.method.options.get("tasks") or self.facts["tasks"] or ())

    def set_task(self, task: str | None) -> None:
        """Choose the task of a run that routes by task, for rows that do not name one.

        Raises ValueError, which names --task, for a task that is missing, unknown or of no use.
        """
        path = self.folder.path
        if not self.routed:
            if task is not None:
                raise ValueError(
                    f"{path}: --task {task}: this run does not route. Leave --task out."
                )
            return
        known = ", ".join(self.tasks)
        if task is None:
            raise ValueError(f"{path}: this run routes by task. Give --task, one of {known}.")
        if task not in self.tasks:
            raise ValueError(
                f"{path}: --task {shown(task)} is no task of this run. Give one of {known}."
            )
        choose: Any = self.model.set_task  # a method of the adapter's tuner
        choose(task)

    def load_data(self, split: Split) -> DataBundle:
        """Load one split of the config, with the labels and tasks of the run.

        Raises as `plait.run.data.bundle.load_data` and `check_length` do.
        """
        data = load_data(self.cfg, self.tokenizer, facts=self.facts, split=split)
        check_length(self.model, data.longest)
        check_ids(self.model, data.largest_id, self.tokenizer)
        return data


class Loader:
    """Where a run's tokenizer, rows and base model come from: they are loaded anew.

    A process that trains several runs has one that keeps them: see compare/warm.py.
    """

    def tokenizer(self, cfg: RunConfig) -> PreTrainedTokenizerBase:
        """Return the tokenizer, with the chat template of the config."""
        return load_tokenizer(cfg.model, cfg.data.chat_template)

    def data(self, cfg: RunConfig, tokenizer: PreTrainedTokenizerBase) -> DataBundle:
        """Return the rows of all splits."""
        return load_data(cfg, tokenizer, head=head_labels(cfg.model))

    def base(self, cfg: RunConfig, data: DataBundle) -> Base:
        """Return the base model, for the caller to change; the caller has seeded."""
        return prepare_base(cfg, data)


def prepare(cfg: RunConfig, place: bool = True, loader: Loader | None = None) -> Prepared:
    """Load and check everything that training takes.

    Sets the global seed to `training.seed`, from which new modules and the adapter are drawn.
    place: move the model to its device. loader: of what the run reads; None: a new one.

    Raises:
        FileNotFoundError: a model, weights or rows that are not there.
        ValueError: what the config, the data, the model and the method refuse of each other: rows
            longer than the model reads, target modules that match nothing, a rank or a schedule
            that does not fit.
        ImportError: a quantised base without bitsandbytes.
    """
    arguments = training_arguments(cfg)
    check_config(cfg)
    plan = None if cfg.chain is None else cfg.chain.build()
    loader = Loader() if loader is None else loader
    tokenizer = loader.tokenizer(cfg)
    data = loader.data(cfg, tokenizer)
    if best_metric(cfg) == "exact_match" and data.kind not in ("completion", "messages"):
        raise ValueError(
            "training.metric_for_best_model: exact_match needs rows with a prompt and a "
            f"completion, and the rows of data.train are of the kind {data.kind}. Use loss."
        )
    set_seed(cfg.training["seed"])
    base = loader.base(cfg, data)
    rows = len(training_rows(cfg, data))
    rows = grpo_rows(arguments, rows) if cfg.objective.name == "grpo" else rows
    processes = max(ranks.size(), cfg.parallel.processes or 1)
    steps = planned_steps(cfg.training, rows, processes)
    config = method_config(cfg, base, steps, data.tasks)
    if allocates(config) and data.validation is None:
        raise ValueError(
            f"data.validation is not set, and {cfg.method.name} scores its ranks on validation "
            "rows. Give a source or a fraction of train."
        )
    model = base.model if config is None else get_peft_model(base.model, config)
    if cfg.model.adapter is not None:
        _go_on_from(model, Path(cfg.model.adapter), config)
    if isinstance(model, PeftModel):
        keep_masters(model)
    check_total_step(model, steps)
    everywhere = cfg.method.options.get("target_modules", "all-linear") == "all-linear"
    if everywhere and config is not None and not isinstance(config, DeltaConfig):
        warn_left_out(model)  # plait's own methods warn by themselves
    delta = next((m for m in model.modules() if isinstance(m, Delta)), None)
    if delta is not None and plan is None:  # a chain checks the steps of a link
        delta.check_schedule()
    model = to_device(model, cfg) if place else model
    start_from_rows(model, _first_batches(cfg, data))
    if cfg.data.packing and not packs_apart(model):
        raise ValueError(
            f"data.packing is true, and a {base.model.config.model_type} mixes the rows of a pack "
            "(measured on two rows). Set it to false."
        )
    if allocates(config):
        batch = data.batch("validation", _SCORED_ROWS)
        set_development_batch(model, {k: v.to(model.device) for k, v in batch.items()})
    return Prepared(cfg, arguments, tokenizer, data, model.train(), steps, plan)


def _first_batches(cfg: RunConfig, data: DataBundle) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of the training rows in their order, for a start that is made from them."""
    size = cfg.training["per_device_train_batch_size"]
    for start in range(0, min(len(data.train), _START_ROWS), size):
        rows = range(start, min(start + size, len(data.train)))
        yield data.collator([data.train[i] for i in rows])


def _go_on_from(model: Any, path: Path, config: PeftConfig | None) -> None:
    """Load a trained adapter of the same method, from which training starts.

    Raises FileNotFoundError for one that is not there, and ValueError for one that does not fit.
    """
    key = "model.adapter"
    if config is None:
        raise ValueError(f"{key} is {path}, and full fine-tuning has no adapter. Remove it.")
    if splits_base(model):
        raise ValueError(
            f"{key} is {path}, and this method is saved on another base than it is trained on, so "
            "it cannot continue. Export the run to a merged model, and start from that."
        )
    folder = path.expanduser()
    folder = folder / "adapter" if (folder / "config.yaml").is_file() else folder
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}: there is no folder {folder}. Correct the path.")
    read_config(folder, config)
    load_weights(model, folder, "Give the adapter of a finished run.")


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> TrainedRun:
    """Load the base model and the trained adapter (or the trained model) of a run folder.

    overrides: `data.x=..`, `evaluation.x=..`: other data than that of training;
    `model.trust_remote_code=true`, which the folder's own config cannot say.

    Raises FileNotFoundError if training has not finished, and ValueError for an adapter that is
    damaged, a pickle, of another method, of another model's shapes or of a newer plait.
    """
    folder = RunFolder.open(path)
    for text in overrides:
        if not text.startswith(("data.", "evaluation.", f"{REMOTE_CODE}=")):
            raise ValueError(
                f"command line: {shown(text)} cannot be changed after training. Override data.* or "
                "evaluation.*."
            )
    cfg = load_config(folder.config, overrides)
    check_remote_code(cfg.model, folder.config, overrides)
    trained = trained_weights(folder, cfg)
    if not trained.is_dir():
        raise FileNotFoundError(
            f"{path}: {trained.name}/ is missing, so training did not finish. Continue it: plait "
            "train FILE --resume"
        )
    check_finite(trained)
    facts = folder.read_facts()
    for name in ("kind", "labels", "tasks"):
        if name not in facts:
            raise ValueError(
                f"{folder.environment}: run.{name} is missing. Put the run's own file back, or "
                "train again."
            )
    asked = any(text.startswith("data.chat_template=") for text in overrides)
    tokenizer = load_tokenizer(cfg.model, cfg.data.chat_template if asked else None)
    if not asked and facts.get("chat_template") is not None:
        tokenizer.chat_template = facts["chat_template"]
    model = load_trained(folder, cfg, tokenizer, facts)
    return TrainedRun(folder, cfg, tokenizer, model, source_of(cfg.model), facts)


def load_trained(
    folder: RunFolder,
    cfg: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    facts: Mapping[str, Any],
    dequantised: bool = False,
) -> PeftModel | PreTrainedModel:
    """Load the model of a run in evaluation mode; arguments as those of TrainedRun.

    dequantised: put the adapter on plain layers with the weights of the quantised ones.
    Raises as load_run.
    """
    trained = trained_weights(folder, cfg)
    expected = peft_config(cfg.method, cfg.model.task, tasks=facts.get("tasks"))
    head = head_of(cfg.model.task, facts.get("labels"))
    model: Any = (
        load_full(cfg.model, *head, trained)[0] if expected is None else load_base(cfg.model, *head)
    )
    if dequantised:
        model = dequantise(model)
    if cfg.model.task != "causal_lm":
        set_padding(model, tokenizer)
    model = to_device(model, cfg)
    if expected is not None:
        check_patterns(cfg.method.options, model)
        model = load_adapter(model, trained, expected)
        if cfg.chain is not None:
            chain.load(model, trained)
    return model.eval()


def trained_weights(folder: RunFolder, cfg: RunConfig) -> Path:
    """Return the folder of what a run trained: an adapter, or the whole model."""
    return folder.model if cfg.method.name == "full" else folder.adapter


# -------------------------------------------------------------------------------------- the parts


def training_arguments(cfg: RunConfig) -> TrainingArguments:
    """Return the TrainingArguments of a run; raise ValueError for what a run cannot do."""
    options = dict(cfg.training)
    if options.get("push_to_hub"):
        raise ValueError(
            "training.push_to_hub is true, but would upload without the model card. Upload the "
            "finished adapter/ with: hf upload REPO RUN/adapter"
        )
    _check_evaluates(cfg)
    if options.pop(PATIENCE, None) is not None:
        _check_early_stopping(cfg)
        options.setdefault("metric_for_best_model", "loss")
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
    best = METRICS.get(best_metric(cfg) or "")
    if best is not None:  # upstream takes every name that does not end in "loss" for a score
        options.setdefault("greater_is_better", best.higher_is_better)
    if max(ranks.size(), cfg.parallel.processes or 1) > 1:
        shared = group_options(cfg)
        options |= shared if ranks.size() > 1 else {}  # else only looked at, as by plait check
    elif cfg.parallel.kind == "fsdp2":
        raise ValueError(
            f"{cfg.source.at('parallel.kind')} is fsdp2, and there is one process. Start several: "
            "plait train FILE --processes N"
        )
    options.setdefault("dataloader_pin_memory", torch.cuda.is_available())  # else torch warns
    counts = "no" if cfg.objective.name == "grpo" else "non_padding"  # its trainer counts itself
    options.setdefault("include_num_input_tokens_seen", counts)  # for tokens per second
    kind, own = arguments_of(cfg)
    with upstream_refuses("training"):
        args = kind(
            output_dir=str(Path(cfg.output.dir, CHECKPOINTS)),
            remove_unused_columns=False,  # the collator takes what the model needs, task ids too
            **{**own, **options, "disable_tqdm": True},
        )
    for callback in get_reporting_integration_callbacks(args.report_to):
        with upstream_refuses("training.report_to"):
            callback()  # raises if its package is not installed
    if args.world_size != ranks.size():
        raise ValueError(
            f"training: {args.world_size} processes were started, and {ranks.size()} joined. Only "
            "plait train runs on several."
        )
    args._n_gpu = min(args.n_gpu, 1)  # the Trainer would wrap the model in DataParallel
    return args


def _check_evaluates(cfg: RunConfig) -> None:
    """Raise ValueError for what needs validation rows where there are none."""
    if cfg.data.validation is not None:
        return
    needs = {
        PATIENCE: cfg.training.get(PATIENCE) is not None,
        "load_best_model_at_end": cfg.training.get("load_best_model_at_end"),
        "eval_strategy": cfg.training.get("eval_strategy", "no") != "no",
        "save_strategy": cfg.training.get("save_strategy") == "best",
        "lr_scheduler_type": cfg.training.get("lr_scheduler_type") == "reduce_lr_on_plateau",
    }
    for key, needed in needs.items():
        if needed:
            raise ValueError(
                f"training.{key} is {shown(cfg.training[key])}, and data.validation is not set. "
                f"Give data.validation a source or a fraction of train, or remove training.{key}."
            )


@contextmanager
def upstream_refuses(section: str) -> Iterator[None]:
    """Raise what upstream refuses of a section as a user's error, on one line that names it."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, ImportError) as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"{section}: {' '.join(str(error).split())}") from error


def _check_early_stopping(cfg: RunConfig) -> None:
    """Raise ValueError if a run cannot stop early: it measures nothing, or is amid its schedule."""
    key, baseline = f"training.{PATIENCE}", BASELINES.get(cfg.method.name)
    if str(cfg.training.get("eval_strategy")) == "no":
        raise ValueError(
            f"{key} is {cfg.training[PATIENCE]}, and training.eval_strategy is no, so nothing is "
            "measured. Set it to epoch or steps."
        )
    if cfg.chain is not None:
        raise ValueError(
            f"{key} does not work with a chain, whose later links would not be trained. Leave it "
            "out, or lower chain.links."
        )
    if baseline is not None and baseline.no_early_stopping:
        raise ValueError(
            f"{key} does not work with {baseline.key}: {baseline.no_early_stopping}. Leave it out."
        )


def best_metric(cfg: RunConfig) -> str | None:
    """Return the metric that decides which step is best, by its name in METRICS; None without one.

    It is training.metric_for_best_model, and for early stopping the loss if that is not set.
    """
    early = cfg.training.get(PATIENCE) is not None
    name = cfg.training.get("metric_for_best_model") or ("loss" if early else None)
    return None if name is None else str(name).removeprefix("eval_")


def check_config(cfg: RunConfig) -> None:
    """Raise ValueError for what a config says wrong by itself, before anything is loaded."""
    check_method(cfg)
    best, known = best_metric(cfg), METRICS_OF[measures(cfg)]
    if best is not None and best not in known:
        raise ValueError(
            f"training.metric_for_best_model: {best} is not measured by a {measures(cfg)} run. "
            f"{did_you_mean(best, known)}"
        )
    split_by, validation = cfg.data.split_by, cfg.data.validation
    if split_by is not None and not isinstance(validation, int | float):
        raise ValueError(
            f"data.split_by is {shown(split_by)}, and data.validation is no fraction of train. Set "
            "data.validation to one, such as 0.1, or remove data.split_by."
        )
    check_objective(cfg)
    if cfg.data.packing:
        _check_packing(cfg)
    if cfg.output.also:
        _check_exact(cfg, "output.also", "[]")
    if cfg.objective.options.get("vllm"):  # which gets the adapter as a plain LoRA
        _check_exact(cfg, "objective.vllm", "false")
    name, quantization = cfg.method.name, cfg.model.quantization
    reason = quantised_reason(name, quantization)
    if reason is not None:
        raise ValueError(
            f"method.name: {name} does not work on a {quantization} base: {reason}. Set "
            "model.quantization: none, or use another method."
        )


def _check_packing(cfg: RunConfig) -> None:
    """Raise ValueError for what knows rows and no packs of them."""
    reason = None
    if cfg.model.task != "causal_lm" or cfg.objective.name != "sft":
        reason = f"only the rows of a causal model are packed, for sft; this is {measures(cfg)}"
    elif cfg.method.options.get("balance") not in (None, "none"):
        reason = f"the balance loss of {cfg.method.name} is a mean over rows"
    elif cfg.training.get("train_sampling_strategy") == "group_by_length":
        reason = "the packs have about one length, so there is nothing to group"
    if reason is not None:
        raise ValueError(f"{cfg.source.at('data.packing')}: {reason}. Set it to false.")


def _check_exact(cfg: RunConfig, key: str, off: str) -> None:
    """Raise ValueError for a run that can have no exact plain LoRA; key: what needs one."""
    name, options = cfg.method.name, cfg.method.options
    method = BASELINES.get(name) or find(name)
    reason = None
    if name == "full":
        reason = "full fine-tuning has no adapter; model/ loads everywhere as it is"
    elif not method.exact_export and options.get("routing") != "task":
        reason = f"no plain LoRA holds the update of {name}"
        reason += "; plait export RUN --to merged writes it whole" if method.mergeable else ""
    else:
        trained = trained_beside(options)
        if trained:
            reason = (
                f"the adapter trains {' and '.join(trained)}, which no plain LoRA for servers holds"
            )
    if reason is not None:
        raise ValueError(f"{cfg.source.at(key)}: {reason}. Set {key}: {off}.")


def method_config(
    cfg: RunConfig, base: Base, total_steps: int | None, tasks: list[str] | None
) -> PeftConfig | None:
    """Return the peft config of the method on this base model; None for `full`.

    total_steps: planned optimizer steps, None if unknown. tasks: names of the data's tasks.

    Raises ValueError for options that do not fit the base model's layers.
    """
    options = dict(cfg.method.options)
    check_patterns(options, base.model)
    _check_targets(options.get("target_modules", "all-linear"), base.layers)
    _check_saved(options.get("modules_to_save"), base.model)
    sizes = {name: _sizes(layer) for name, layer in base.layers.items()}
    _check_ranks(options, sizes)
    if base.missing:
        options["modules_to_save"] = [*(options.get("modules_to_save") or ()), *base.missing]
    if "fan_in_fan_out" in method_options(cfg.method.name):  # how GPT-2 stores its weights
        stored = any(isinstance(layer, Conv1D) for layer in base.layers.values())
        options.setdefault("fan_in_fan_out", stored)
    method = replace(cfg.method, options=options)
    try:
        config = peft_config(method, cfg.model.task, total_steps, tasks)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{cfg.source.at('method')}: {error}") from error
    if config is not None:
        check_start(config)
        baseline, values = BASELINES.get(cfg.method.name), config.to_dict()
        everywhere = values.get("target_modules") == "all-linear"
        chosen = baseline is not None and baseline.defaults.get("target_modules", "") is None
        if chosen and not cfg.method.options.get("target_modules"):
            return config  # peft knows the targets of the architecture
        if values["target_modules"] is None and not values.get("target_parameters"):
            raise ValueError(
                "method.target_modules is null. Name the layers to adapt, such as "
                "[q_proj, v_proj], or give all-linear."
            )
        targets = list(sizes) if everywhere else targeted(config, sizes)
        _check_called(base, targets)
        if baseline is not None and baseline.check_layers is not None:
            baseline.check_layers(values, {name: sizes[name] for name in targets})
    return config


def _check_called(base: Base, targets: Iterable[str]) -> None:
    """Raise ValueError for a target whose update the model would ignore."""
    ignored = ignored_layers(base.model, targets)
    if ignored:
        left_out = ignored_layers(base.model, base.layers)
        others = sorted({n.rpartition(".")[2] for n in base.layers if n not in left_out})
        raise ValueError(
            f"method.target_modules: {ignored[0]} cannot be adapted, because a "
            f"{base.model.config.model_type} reads its weight without calling the layer: an update "
            f"would have no effect. Set method.target_modules: [{', '.join(others)}]."
        )


def training_rows(cfg: RunConfig, data: DataBundle) -> Any:
    """Return what a run draws its batches of: the rows, or packs of them."""
    return PackedRows(data.train, cfg.data.max_length) if cfg.data.packing else data.train


def planned_steps(training: dict[str, Any], rows: int, processes: int = 1) -> int:
    """Return the optimizer steps that the Trainer will make in so many processes."""
    if training.get("max_steps", -1) > 0:
        return training["max_steps"]
    batches = rows / (training["per_device_train_batch_size"] * processes)
    batches = math.floor(batches) if training.get("dataloader_drop_last") else math.ceil(batches)
    per_epoch = max(1, math.ceil(batches / training.get("gradient_accumulation_steps", 1)))
    return math.ceil(per_epoch * training["num_train_epochs"])


def _check_targets(targets: Any, layers: Iterable[str]) -> None:
    """Raise when a target (the end of a name, or one regular expression) matches no layer."""
    if targets == "all-linear":
        return
    if isinstance(targets, str):
        patterns = {targets: targets}
    else:
        patterns = {name: rf"(.*\.)?{re.escape(name)}" for name in sorted(targets or ())}
    unmatched = [
        target
        for target, pattern in patterns.items()
        if not any(re.fullmatch(pattern, name) for name in layers)
    ]
    if unmatched:
        candidates = sorted({name.rpartition(".")[2] for name in layers})
        raise ValueError(
            f"method.target_modules: {', '.join(map(shown, unmatched[:5]))} matches no linear "
            f"layer of this model. It has {', '.join(candidates)}; or use all-linear."
        )


def _check_saved(names: Iterable[str] | None, model: nn.Module) -> None:
    """Raise when a name in modules_to_save is the end of no module's name."""
    modules = [name for name, _ in model.named_modules()]
    for name in names or ():
        if not any(module.endswith(name) or re.search(rf"(^|\.){name}($|\.)", module)
                   for module in modules):  # fmt: skip
            ends = sorted({module.rpartition(".")[2] for module in modules if module})
            raise ValueError(
                f"method.modules_to_save: {shown(name)} matches no module of this model. "
                f"{did_you_mean(name, ends)}"
            )


def _check_ranks(options: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]]) -> None:
    """Raise when ranks that exceed every layer would fill the memory."""
    widest, total = max(map(max, sizes.values()), default=0), sum(map(sum, sizes.values()))
    copies = [options.get(name) for name in _COPIES]
    most = max([1, *(n for n in copies if isinstance(n, int))])
    for name in _RANKS:
        rank = options.get(name)
        if isinstance(rank, int) and rank * most > widest and rank * most * total > _NUMBERS:
            raise ValueError(
                f"method.{name} is {rank}, and the widest layer of this model has {widest} rows or "
                f"columns; the adapter would have {rank * most * total:,} numbers. Lower it."
            )


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """Return (out_features, in_features), of a bitsandbytes layer too."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features
