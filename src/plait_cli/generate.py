"""`plait generate RUN --prompt TEXT`: continue prompts with a trained run."""

import argparse

from plait_cli._options import add_sampling, check_sampling


def add_parser(subparsers: "argparse._SubParsersAction") -> argparse.ArgumentParser:
    """Describe the verb."""
    parser = subparsers.add_parser(
        "generate",
        help="continue prompts with a trained run",
        description="Continue a prompt, or several. It gets the template of training: "
        "data.prompt_template, or the tokenizer's chat template where the rows were messages.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="the run folder")
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="the prompt; repeat it for several, which are printed above their continuations",
    )
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=TEXT",
        help="one column of a prompt template that has several; repeat it",
    )
    add_sampling(parser)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="model.trust_remote_code=true, to run code that comes with the base model",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the continuations."""
    fields = {}
    for text in args.field:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ValueError(f"--field {text!r} is not NAME=TEXT. Write --field question=...")
        fields[name] = value
    check_sampling(args)
    from plait.run.generate import generate_all

    prompts = args.prompt or [None]
    texts = generate_all(
        args.run_folder,
        prompts,
        fields=fields,
        task=args.task,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        seed=args.seed,
        overrides=args.overrides,
    )
    for prompt, text in zip(prompts, texts, strict=True):
        if len(prompts) > 1:
            print(f"> {prompt}")
        print(text)
    return 0
