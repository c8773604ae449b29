"""Convert a run folder or an adapter folder to a plain LoRA, in a process of its own.

    python -m plait.run.serving.convert FOLDER OUT

A server calls this through plait.run.serving.resolve. The process needs the base model, so nothing
of it stays in the server's memory, and it runs no code that a folder brings along. Its last line on
standard error says what is wrong with the folder; the exit code is then 2.
"""

import sys
from pathlib import Path

from peft import PeftConfig

from plait import chain
from plait.chain.ledger import TABLE
from plait.run.adapter import check_finite, load_adapter
from plait.run.config import ModelConfig
from plait.run.export import export_run, mark_export, name_base, readers_of, refuse_misread
from plait.run.folder import RunFolder, replace_dir
from plait.run.model import check_patterns, load_base
from plait.upstream.export import LoraExport, to_lora

VLLM = "vllm"  # whose rules are checked


def convert(folder: Path, out: Path) -> None:
    """Write the adapter of a folder to `out` as a plain LoRA.

    Args:
        folder: of a finished run, or of an adapter (adapter_config.json names its base model).
        out: replaced if an earlier call wrote it.

    Raises:
        NotMergeable: the update depends on the input.
        ValueError: a plain LoRA leaves out more than 1 % of a layer's update, or moves a held-out
            metric of the run; vLLM would read it wrong; a damaged file or a pickle.
        FileNotFoundError: a missing file or base model.
    """
    if RunFolder(folder).config.is_file():
        export_run(folder, "lora", out, server=VLLM, force=True)
        return
    lora = adapter_as_lora(folder)

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
    if getattr(config, "megatron_config", None) is not None:
        raise ValueError(
            f"{folder}: megatron_config makes peft import a module that the folder names, and a "
            "folder runs no code. Remove it from adapter_config.json."
        )
    base = ModelConfig(name=config.base_model_name_or_path, revision=config.revision, dtype="auto")
    loaded = load_base(base)
    check_patterns(config.to_dict(), loaded)
    model = load_adapter(loaded, folder, config).eval()
    if (folder / TABLE).is_file():
        chain.load(model, folder)
    lora = to_lora(model)
    name_base(lora, base)
    refuse_misread(lora, readers_of(model, lora), VLLM, compact=False)
    return lora


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
