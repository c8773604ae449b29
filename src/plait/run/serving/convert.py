"""Convert a run folder or an adapter folder to a plain LoRA, in a process of its own.

    python -m plait.run.serving.convert FOLDER OUT

A server calls this through plait.run.serving.resolve. The process needs the base model, so nothing
of it stays in the server's memory, and it runs no code that a folder brings along. Its last line on
standard error says what is wrong with the folder; the exit code is then 2.
"""

import sys
from pathlib import Path
from typing import Any

from peft import PeftConfig

from plait import chain
from plait.chain.ledger import TABLE
from plait.core.config import DeltaConfig
from plait.run.adapter import check_finite, load_adapter
from plait.run.config import ModelConfig
from plait.run.export import export_run, mark_export
from plait.run.folder import RunFolder, replace_dir
from plait.run.model import load_base
from plait.upstream.export import LoraExport, to_lora, upstream_to_lora

LARGEST_ERROR = 0.01  # of a layer's update that a server may be handed without


def convert(folder: Path, out: Path) -> None:
    """Write the adapter of a folder to `out` as a plain LoRA.

    Args:
        folder: of a finished run, or of an adapter (adapter_config.json names its base model).
        out: replaced if an earlier call wrote it.

    Raises:
        NotMergeable: the update depends on the input.
        ValueError: a plain LoRA leaves out more than LARGEST_ERROR of a layer's update; a damaged
            file or a pickle.
        FileNotFoundError: a missing file or base model.
    """
    if RunFolder(folder).config.is_file():
        _, report = export_run(folder, "lora", out, force=True, announce=_check_error)
        return
    lora = adapter_as_lora(folder)
    _check_error(lora)

    def write(new: Path) -> None:
        lora.write(new)
        mark_export(new, to="lora")

    replace_dir(out, write)


def adapter_as_lora(folder: Path) -> LoraExport:
    """Return the adapter of an adapter folder as a plain LoRA.

    Raises what convert raises.
    """
    check_finite(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if config.task_type != "CAUSAL_LM":
        raise ValueError(
            f"{folder}: task_type is {config.task_type}. A server takes adapters of CAUSAL_LM."
        )
    if config.base_model_name_or_path is None:
        raise ValueError(f"{folder}: adapter_config.json names no base_model_name_or_path.")
    base = ModelConfig(
        name=config.base_model_name_or_path, revision=config.revision, dtype="auto"
    )
    model = load_adapter(load_base(base), folder, config).eval()
    if (folder / TABLE).is_file():
        chain.load(model, folder)
    if isinstance(config, DeltaConfig) or chain.chain_of(model) is not None:
        return to_lora(model)
    return upstream_to_lora(model)


def _check_error(lora: Any) -> None:
    """Raise ValueError for a conversion (a LoraExport or a report) that loses too much."""
    error = max((layer.error for layer in lora.layers), default=0.0)
    if error > LARGEST_ERROR:
        raise ValueError(
            f"a plain LoRA leaves out {error:.0%} of a layer's update. Merge it into its base "
            "model and serve that: plait export RUN --to merged"
        )


def main(arguments: list[str]) -> int:
    """Convert and return the exit code."""
    folder, out = map(Path, arguments)
    try:
        convert(folder, out)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
