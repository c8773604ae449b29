"""The sections of a run file: one dataclass each, with help and bounds on every field.

A new key is a line here: reading, errors, `plait init` and the tables on the pages follow.
"""

import os
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plait.options import option, shown

if typing.TYPE_CHECKING:
    from plait.chain import ChainPlan

_NAME = 255  # bytes of a file's name

ModelTask = Literal["causal_lm", "classification", "regression"]
Form = Literal["messages", "conversations", "alpaca", "prompt-completion", "text"]


@dataclass(kw_only=True)
class ModelConfig:
    """The base model."""

    name: str = option("builtin:tiny", "A hub id, a local folder, or the shipped tiny Llama.")
    revision: str | None = option(None, "Branch, tag or commit of a hub model.")
    task: ModelTask = option("causal_lm", "What the model predicts.")
    quantization: Literal["none", "8bit", "4bit"] = option(
        "none", 'Bits of the frozen base weights; needs pip install "plait[quant]".'
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "float32", "Data type of the base weights."
    )
    adapter: str | None = option(
        None,
        "Start from a trained adapter of the same method: a run folder, or the folder of an "
        "adapter; null: start a new one.",
        least=1,
    )
    trust_remote_code: bool = option(False, "True runs code that comes with the model.")


@dataclass(kw_only=True)
class MethodConfig:
    """The fine-tuning method; all other keys of the section are options of that method."""

    name: str = option("lora", "A method of `plait methods`, or `peft` with a `type` of peft's.")
    options: dict[str, Any] = option(dict, "Checked keywords of the method's config class.")
    lr_scale: dict[str, float] | None = option(
        None,
        "Parameter name -> factor on its learning rate; its weight decay is divided by it.",
        above=0,
    )


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer; all other keys of the section are options of that optimizer.

    Learning rate and weight decay are those of `training`.
    """

    name: str = option(
        "default",
        "`default` (training.optim decides), lora_rite, lorsum, loraplus, lorafa or riemannian.",
    )
    options: dict[str, Any] = option(dict, "Checked keywords of the optimizer.")


@dataclass(kw_only=True)
class ColumnsConfig:
    """Where the data keeps what plait needs: the name of a column, or its index from 0."""

    prompt: str | int | None = option(None, "What the model reads, without loss.")
    completion: str | int | None = option(None, "What the model learns to write.")
    chosen: str | int | None = option(None, "dpo, reward: the preferred completion.")
    rejected: str | int | None = option(None, "dpo, reward: the other completion.")
    messages: str | int | None = option(None, "A chat: a list of {role, content}.")
    text: str | int | None = option(None, "The text to learn, or to classify.")
    text_pair: str | int | None = option(None, "The second text of a pair to classify.")
    label: str | int | None = option(
        None, "The class, or the number to predict; kto: whether a completion is desired."
    )
    task: str | int | None = option(None, "Name of the task of a row; metrics are split by it.")
    sample_type: str | int | None = option(None, "0 or 1, for balance losses that tell them apart.")


@dataclass(kw_only=True)
class DataConfig:
    """The rows. Paths are relative to the working folder."""

    train: str | list[str] = option(
        "builtin:shift",
        "Files (jsonl, json, csv, tsv, txt, parquet), a folder of save_to_disk, a hub id, or a "
        "generator, builtin:NAME?key=value. SOURCE#PART names the split of a set, or the key of a "
        "JSON object of lists; `data/*.jsonl` is all files that match.",
    )
    mix: list[float] | None = option(
        None,
        "Weights of the sources of train, in their order: rows are drawn in these proportions "
        "until one source is used up; null: all rows of all sources.",
        above=0,
    )
    validation: float | str | list[str] | None = option(
        None, "A source, or a fraction of train such as 0.1; null: none.", above=0, below=1
    )
    split_by: str | int | None = option(
        None,
        "A column, by name or index: if validation is a fraction of train, rows with an equal "
        "value there stay on the same side; null: rows are drawn one by one.",
    )
    test: str | list[str] | None = option(None, "A source; null: none.")
    split: str = option(
        "train", "Split of a hub set, or key of a JSON object of lists, where train names none."
    )
    subset: str | None = option(None, "Configuration of a hub set.")
    format: Literal["jsonl", "json", "csv", "tsv", "txt", "parquet"] | None = option(
        None, "Format of the files; null: by their endings."
    )
    form: Form | None = option(
        None,
        "Form of the rows of a causal model; null: by their columns, and an error if two forms "
        "fit.",
    )
    delimiter: str | None = option(
        None,
        'null: "," in csv and a tab in tsv; txt: one text a line, or a separator such as "||".',
        least=1,
    )
    header: bool | None = option(
        None, "null: csv and tsv have a header, txt does not. Without one: columns c0, c1, ..."
    )
    quotes: bool | None = option(None, "null: csv has quoted values, tsv and txt do not.")
    columns: ColumnsConfig = option(ColumnsConfig, "plait's names of columns: the data's names.")
    prompt_template: str | None = option(
        None, r'Over the columns, such as "Question: {question}\nAnswer: ".'
    )
    completion_template: str | None = option(None, 'Over the columns, such as "{answer}".')
    chat_template: str | None = option(
        None,
        "For messages: alpaca, chatml, llama, zephyr, or a Jinja file; null: the tokenizer's own.",
    )
    max_length: int = option(
        512, "Largest number of tokens in a row; a longer row is an error.", least=1
    )
    truncate: bool = option(False, "True cuts longer rows to max_length.")
    packing: bool = option(
        False,
        "True packs training rows end to end up to max_length; the loss of each row is unchanged.",
    )
    train_on_prompt: bool = option(False, "False computes the loss on the completion alone.")
    add_eos: bool = option(True, "End each row with the end-of-sequence token.")
    limit: int | None = option(None, "Rows of train, drawn with the seed; null: all.", least=1)
    validation_limit: int | None = option(None, "Rows of validation; null: all.", least=1)
    test_limit: int | None = option(None, "Rows of test; null: all.", least=1)
    label_noise: float | None = option(
        None,
        "Share of the train rows that get a wrong label or completion, drawn with the seed; null: "
        "0.",
        least=0,
        below=1,
    )
    seed: int = option(0, "Seed of the validation split, the limits and the generators.")


@dataclass(kw_only=True)
class EvaluationConfig:
    """How a model is evaluated."""

    generate: bool = option(
        True, "Measure the exact match of greedy generation on rows with a completion."
    )
    max_new_tokens: int = option(64, "Largest number of tokens to generate.", least=1)
    batch_size: int = option(32, "Rows per batch.", least=1)
    repetition_penalty: float | None = option(
        None, "Generation: divides the scores of tokens that occur already; null: 1.", above=0
    )
    no_repeat_ngram_size: int | None = option(
        None, "Generation: no n-gram of this size occurs twice; null: no limit.", least=1
    )
    min_new_tokens: int | None = option(
        None, "Generation: smallest number of tokens; null: 0.", least=1
    )
    num_beams: int | None = option(
        None,
        "Generation: number of beams in beam search; null: 1, greedy.",
        least=1,
        most=1024,
    )
    length_penalty: float | None = option(
        None, "Generation: exponent of the length in a beam's score; null: 1."
    )

    @property
    def decoding(self) -> dict[str, Any]:
        """What this section changes of greedy generation, as GenerationConfig names it."""
        values = {name: getattr(self, name) for name in DECODING}
        return {name: value for name, value in values.items() if value is not None}


# Keys of EvaluationConfig that change which tokens are generated.
DECODING = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "min_new_tokens",
    "num_beams",
    "length_penalty",
)


@dataclass(kw_only=True)
class ParallelConfig:
    """The processes that train one run together; see docs/scale.md."""

    kind: Literal["auto", "ddp", "fsdp2", "deepspeed"] = option(
        "auto",
        "ddp: each process holds the whole model; fsdp2: each holds a shard of it, on GPUs; auto: "
        "ddp. deepspeed is refused.",
    )
    processes: int | None = option(
        None,
        "Number of processes. `plait train` starts them on this machine unless a launcher such as "
        "torchrun did; null: one, or those of the launcher.",
        least=1,
        most=65_536,
    )

    def __post_init__(self) -> None:
        if self.kind == "deepspeed":
            raise ValueError(
                "parallel.kind is deepspeed, which hides its optimizer steps from the schedules "
                "and penalties of methods. Set it to ddp, or to fsdp2 for a model that does "
                "not fit on one GPU."
            )


@dataclass(kw_only=True)
class OutputConfig:
    """Where the run goes."""

    dir: str = option("runs/first", "The run folder; it must be new or empty.", least=1)
    also: list[Literal["lora"]] = option(
        list,
        "What else to write after training: lora, the adapter as a plain LoRA that loads without "
        "plait, in the folder lora; []: nothing.",
    )

    def __post_init__(self) -> None:
        longest = max(Path(self.dir).parts, key=lambda part: len(os.fsencode(part)))
        size = len(os.fsencode(longest))
        if size > _NAME:
            raise ValueError(
                f"output.dir has the name {shown(longest)} of {size:,} bytes. Give names of up to "
                f"{_NAME}."
            )


@dataclass(kw_only=True)
class ChainConfig:
    """A chain of adapters; an option that is null takes the default of the recipe."""

    plan: str = option("chain", "The recipe: chain, rac or xgb.")
    links: int | None = option(
        None, "Number of links; give this or steps_per_link.", least=1, most=65_536
    )
    steps_per_link: int | None = option(None, "Optimizer steps per link.", least=1)
    ranks: int | list[int] | None = option(
        None, "One rank for all links, or one per link.", least=1, most=65_536
    )
    lr: Literal["restart", "global"] | None = option(
        None, "Whether the learning rate's schedule restarts with each link."
    )
    warmup_steps: int | None = option(None, "Warm-up steps of a link that restarts.", least=0)
    reset_optimizer: bool | None = option(None, "Whether a link starts with new optimizer state.")
    storage: Literal["stack", "merge"] | None = option(
        None, "Keep all links as one stacked adapter, or merge them into the base."
    )
    freeze: Literal["A", "B"] | None = option(None, "rac: the factor that is a frozen sketch.")
    sketch: Literal["orthonormal", "gaussian"] | None = option(
        None, "rac: how the sketch is drawn."
    )
    sketch_std: float | None = option(
        None, "rac: standard deviation of a Gaussian sketch.", least=0
    )
    blocks_per_link: int | float | None = option(
        None, "xgb: number or share of the blocks that a link trains."
    )
    rank: int | None = option(None, "xgb: rank of a link.", least=1, most=65_536)
    seed: int | None = option(
        None, "Seed of the links' starts, the sketches and the choice of blocks."
    )

    def build(self) -> "ChainPlan":
        """Return the plan.

        Raises:
            ValueError: an option of another recipe, or one out of range.
        """
        from plait.chain import ChainPlan

        options = {k: v for k, v in vars(self).items() if v is not None and k != "plan"}
        return ChainPlan.of(self.plan, **options)
