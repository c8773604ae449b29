"""The options of every export of a plain LoRA: of a run, and of a federated run's clients."""

import argparse
from typing import Any


def add_form(parser: argparse.ArgumentParser, size: Any = None) -> None:
    """Add them; size: a group of options that exclude --max-rank."""
    parser.add_argument(
        "--for",
        dest="server",
        choices=("peft", "vllm", "sglang", "llamacpp", "all"),
        default="all",
        help="refuse what this reader would read wrong; default all: say what each makes of it",
    )
    (parser if size is None else size).add_argument(
        "--max-rank", type=int, metavar="N", help="largest rank that the server takes"
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="keep each layer's own rank and scale: smaller, for stock peft and vLLM >= 0.33",
    )
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), help="of the file; default: of the factors"
    )
    parser.add_argument(
        "--lossy", action="store_true", help="write an export that loses more than it may"
    )
