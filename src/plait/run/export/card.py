"""The card of a plain LoRA: which readers it suits, what it lost, and a command for each server."""

from dataclasses import replace

from plait.run.export.report import ExportReport
from plait.run.prepare import TrainedRun
from plait.run.serving.gguf import FILE
from plait.upstream.servers import max_lora_rank

_LLAMACPP = "llama.cpp"


def lora_card(run: TrainedRun, report: ExportReport, command: str) -> str:
    """Text of the README.md of an exported folder."""
    ready = [title for title, reasons in report.readers.items() if not reasons]
    commands = _commands(report, run.cfg.model.name, ready)
    return "\n".join([*_facts(run, report, command), "", *commands, ""])


def gguf_card(run: TrainedRun, report: ExportReport, command: str) -> str:
    """Text of the README.md of a folder with a GGUF file."""
    only = {title: reasons for title, reasons in report.readers.items() if title == _LLAMACPP}
    commands = [
        f"llama.cpp loads `{FILE}` beside the base model, converted by its convert_hf_to_gguf.py.",
        "",
        "```text",
        f"llama-server -m base.gguf --lora {FILE}",
        "```",
    ]
    return "\n".join([*_facts(run, replace(report, readers=only), command), "", *commands, ""])


def _facts(run: TrainedRun, report: ExportReport, command: str) -> list[str]:
    """What a folder holds, who reads it, and what it lost."""
    base, builtin = run.cfg.model.name, run.cfg.model.name.startswith("builtin:")
    ready = [title for title, reasons in report.readers.items() if not reasons]
    others = [(title, reasons) for title, reasons in report.readers.items() if reasons]
    lines = ["---", *([] if builtin else [f"base_model: {base}"]), "library_name: peft", "---", ""]
    lines += [f"# A plain LoRA for {base}", ""]
    of_task = f", task {report.task}" if report.task else ""
    lines += [
        f"It holds the update that {run.cfg.method.name} trained{of_task}, and needs no plait.",
        "",
        "| | |",
        "|---|---|",
        f"| read right by | {', '.join(ready)} |",
        *(f"| not by {title} | {'; '.join(reasons)} |" for title, reasons in others),
        f"| largest rank | {report.rank}, in {sum(x.rank > 0 for x in report.layers)} layers |",
        f"| left out of a layer's update, at most | {_share(report.weight_error)} |",
        f"| rounding of a layer's update, at most | {_share(report.rounding)} |",
        f"| logits off by | {report.logit_error:.2e} at most on {report.rows} rows; the adapter "
        f"moves them by up to {report.logit_shift:.2e} |",
    ]
    if report.held_out is not None:
        rows = f"{report.held_out.rows} {report.held_out.split} rows"
        lines += [f"| {text} | on {rows} |" for text in report.held_out.said()]
    lines += [f"| written by | `{command}` |"] if command else []
    if report.losses:
        lines += ["", f"**It is not the model that was trained: {'; '.join(report.losses)}.**"]
    return lines


def _share(value: float) -> str:
    return "nothing" if value == 0 else f"{value:.2%}" if value >= 1e-4 else f"{value:.0e}"


def _commands(report: ExportReport, base: str, ready: list[str]) -> list[str]:
    """A command for each reader that reads the folder right; FOLDER is the folder of the card."""
    base = "BASE_FOLDER" if base.startswith("builtin:") else base
    vllm = max_lora_rank(report.rank)
    commands: dict[str, str] = {
        "vLLM >= 0.33": f"vllm serve {base} --enable-lora --max-lora-rank {vllm} "
        "--lora-modules NAME=FOLDER",
        "SGLang": f"python -m sglang.launch_server --model-path {base} --max-lora-rank "
        f"{report.rank} --lora-paths NAME=FOLDER",
        _LLAMACPP: f"python convert_lora_to_gguf.py --base {base} --outtype f32 FOLDER\n"
        "llama-server -m base.gguf --lora FOLDER/*.gguf",
    }
    said = [text for title, text in commands.items() if title in ready]
    loads = 'model = peft.PeftModel.from_pretrained(base, "FOLDER")'
    lines = [
        "`FOLDER` is this folder, `BASE_FOLDER` the base model's.",
        "",
        "```python",
        loads,
        "```",
    ]
    return [*lines, "", "```text", *said, "```"] if said else lines
