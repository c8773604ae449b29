"""Errors speak of the command line, and normal output is plait's own."""

import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers

from plait.core.events import PlaitWarning
from plait.run.config import dump_config
from plait.run.train import train
from plait_cli import main
from plait_cli._quiet import quiet
from tests.support.runs import copy_rows, run_config, save_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    save_model("llama", folder / "llama")
    write_rows(folder / "rows.jsonl", copy_rows(tasks=True))
    return folder


def config(place: Path, to: str, **method: Any) -> Any:
    return run_config(
        place / "llama",
        place / "rows.jsonl",
        place / to,
        method=method,
        training={"max_steps": 1},
        evaluation={"generate": False},
    )


@pytest.fixture(scope="module")
def routed(place: Path) -> Path:
    return train(config(place, "routed", name="shared_b", r=2, routing="task")).path


@pytest.fixture(scope="module")
def tokens(place: Path) -> Path:
    return train(config(place, "tokens", name="hydra", r=2, num_B=2)).path


# --------------------------------------------------------------------------------------- errors


def said(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    return err


def test_a_run_that_routes_asks_for_the_option(
    routed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asks = f"{routed}: this run routes by task. Give --task, one of copy, turn.\n"
    export = ["export", str(routed), "--out", str(tmp_path / "out"), "--to"]
    for to in ("lora", "merged"):
        assert said([*export, to], capsys) == (
            "plait export: shared_b has an update for each task, and a plain LoRA or a merged "
            "model holds one. Give --task NAME (copy, turn), or --task all for a folder each.\n"
        )
        assert said([*export, to, "--task", "cpoy"], capsys).endswith(
            f"{routed}: --task 'cpoy' is no task of this run. Give one of copy, turn.\n"
        )
    for arguments in (
        ["generate", str(routed), "--prompt", "a"],
        ["chat", str(routed), "data.chat_template=chatml"],
    ):
        assert said(arguments, capsys) == f"plait {arguments[0]}: {asks}"
        assert said([*arguments, "--task", "cpoy"], capsys).endswith(
            f"{routed}: --task 'cpoy' is no task of this run. Give one of copy, turn.\n"
        )
    assert not (tmp_path / "out").exists()
    assert "belong to --harness" in said(["evaluate", str(routed), "--task", "copy"], capsys)


def test_a_router_of_tokens_asks_for_the_option(
    tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for to in ("lora", "merged"):
        arguments = ["export", str(tokens), "--to", to, "--out", str(tmp_path / "out")]
        err = said(arguments, capsys)
        assert err.startswith("plait export: hydra weighs its parts for each token, so no ")
        assert "--approx mean" in err
        assert "does not route" in said([*arguments, "--task", "copy"], capsys)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ("export RUN --to lora --rank 0", "--rank 0 is below 1. Give 1 or more."),
        (
            "export RUN --to lora --energy 2",
            "--energy 2.0 is no share. Give more than 0 and up to 1.",
        ),
        ("evaluate RUN --harness a --limit -1", "--limit -1 is below 1. Give 1 or more."),
        ("demo RUN --steps 0", "--steps 0 is below 1. Give 1 or more."),
        (
            "generate RUN --prompt a --max-new-tokens 0",
            "--max-new-tokens 0 is below 1. Give 1 or more.",
        ),
        ("chat RUN --max-new-tokens -3", "--max-new-tokens -3 is below 1. Give 1 or more."),
        ("federate certs RUN --days 0", "--days 0 is below 1. Give 1 or more."),
    ],
)
def test_numbers_out_of_range_name_their_option(
    arguments: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(tmp_path / "run") if word == "RUN" else word for word in arguments.split()]
    assert said(words, capsys) == f"plait {words[0]}: {text}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", ["check", "train", "evaluate", "predict", "federate report"])
def test_an_error_of_a_library_is_one_line(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = verb.partition(" ")[0]
    library: dict[str, Any] = {"__name__": "library"}
    text = "def fail(*args):\n    raise kind('first\\n\\n  second ' + 'x' * 1000)\n"
    eval(compile(text, "library.py", "exec"), library)
    monkeypatch.setattr(f"plait_cli.{name}.run", library["fail"])
    words = {"predict": ["--input", "a", "--output", "b"]}.get(verb, [])
    for kind, code in ((ValueError, 2), (RuntimeError, 1)):
        library["kind"] = kind
        capsys.readouterr()
        assert main([*verb.split(), "x", *words]) == code
        first, *rest = capsys.readouterr().err.splitlines()
        assert "first second xxx" in first
        assert len(first) < 500
        assert rest == ([] if code == 2 else ["Run it with --debug to see where."])


# ---------------------------------------------------------------------------------------- noise


def noise() -> None:
    """What libraries do."""
    warnings.warn("soon gone", FutureWarning, stacklevel=1)
    warnings.warn("take care", UserWarning, stacklevel=1)
    logging.getLogger("bitsandbytes.cextension").warning("Failed to load")
    logging.getLogger("some.library").info("details")
    transformers.utils.logging.get_logger("transformers.x").warning("a long advice")
    for _ in transformers.utils.logging.tqdm(range(2), desc="Loading weights"):
        pass
    warnings.warn("ours", PlaitWarning, stacklevel=1)


def test_only_our_warnings_are_shown(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    before = dict(os.environ)
    with quiet():
        noise()
        assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"  # for the processes that follow
    assert capsys.readouterr().err == "warning: ours\n"
    assert not caplog.records
    assert dict(os.environ) == before
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_verbose_shows_all(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    seen: list[str] = []
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: seen.append(str(message))
        with quiet(verbose=True):
            noise()
    assert seen == ["soon gone", "take care"]
    err = capsys.readouterr().err
    assert "Loading weights" in err
    assert "warning: ours\n" in err
    assert "Failed to load" in caplog.text


def test_every_verb_takes_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("check", "chat", "predict", "train", "evaluate", "generate", "export", "inspect",
                 "demo", "init", "methods", "federate simulate", "federate run"):  # fmt: skip
        with pytest.raises(SystemExit):
            main([*verb.split(), "--help"])
        assert "--verbose" in capsys.readouterr().out, verb


@pytest.mark.slow
def test_a_fresh_process_says_nothing_of_its_libraries(place: Path, tmp_path: Path) -> None:
    """Warnings and logs of imports, too."""
    cfg = config(place, "fresh", name="lora", r=2)
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(cfg), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "plait", "train", str(file)], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0].startswith("rows: train 32")
    assert lines[1].startswith("step 1/1")
    assert len(lines) < 16
