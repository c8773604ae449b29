"""`plait generate RUN --prompt TEXT`: continue a prompt with a trained run."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="continue a prompt with a trained run",
        description="Continue a prompt. It gets the template of training: data.prompt_template, "
        "or the tokenizer's chat template where the rows were messages.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="one column of a prompt template that has several; repeat it",
    )
    parser.add_argument("--task", help="the task, for a run with routing: task")
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="without it evaluation.max_new_tokens"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default): the likeliest token each time"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling, with --temperature")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="model.trust_remote_code=true, to run code that the base model brings along",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the continuation."""
    fields = {}
    for text in args.field:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ValueError(f"--field {text!r} is not NAME=TEXT. Write --field question=...")
        fields[name] = value
    if args.temperature < 0:
        raise ValueError(f"--temperature {args.temperature} is below 0. Give 0 or more.")
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens} is below 1. Give 1 or more.")
    from plait.run.generate import generate_run
    from plait_cli._show import quiet

    with quiet():
        text = generate_run(
            args.run_folder,
            args.prompt,
            fields=fields,
            task=args.task,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            seed=args.seed,
            overrides=args.overrides,
        )
    print(text)
    return 0
