"""The config: strict keys, numbers that YAML reads as text, overrides, the error texts."""

import json
import re
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

import pytest
import yaml
from peft import AdaLoraConfig, LoraConfig, VeraConfig

import plait
from plait.options import check_options, option
from plait.run.config import (
    ChainConfig,
    ColumnsConfig,
    DataConfig,
    EvaluationConfig,
    MethodConfig,
    ModelConfig,
    OutputConfig,
    RunConfig,
    check_method,
    config_from_dict,
    config_to_dict,
    did_you_mean,
    dump_config,
    load_config,
    method_names,
    method_options,
    peft_config,
    schema,
    starter_config,
)
from plait.run.federated.config import FederateConfig
from plait.run.folder import RunFolder, diff_configs, environment, replace_dir, write_atomic
from plait.upstream.table import BASELINES
from tests.support import warm


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(text, *overrides):
    with open("dual.yaml", "w") as file:
        file.write(text)
    return load_config("dual.yaml", overrides)


def error(text, *overrides):
    with pytest.raises(ValueError) as caught:
        check_method(load(text, *overrides))
    return str(caught.value)


# ------------------------------------------------------------------------------------ reading


def test_numbers_that_yaml_reads_as_text_are_numbers():
    config = load("training: {learning_rate: 1e-4}\ndata: {validation: 1e-1}\nmethod: {r: '4'}\n")
    assert yaml.safe_load("1e-4") == "1e-4"
    assert config.training["learning_rate"] == 1e-4
    assert config.data.validation == 0.1
    assert config.method.options == {"r": 4}


def test_an_empty_file_is_all_defaults():
    config = load("")
    assert config.method == MethodConfig(name="lora")
    assert config.model.name == "builtin:tiny"
    assert config.training["seed"] == 42
    assert "eval_strategy" not in config.training
    assert load("data: {validation: v.jsonl}").training["eval_strategy"] == "epoch"


def test_overrides_win_over_the_file_and_are_yaml():
    config = load(
        "method: {name: lora, r: 4}\n",
        "method.r=16",
        "training.learning_rate=3e-4",
        "method.target_modules=[q_proj, v_proj]",
        "data.columns.label=1",
        "data.delimiter='||'",
        "data.test=null",
    )
    assert config.method.options == {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    assert config.training["learning_rate"] == 3e-4
    assert config.data.columns.label == 1
    assert config.data.delimiter == "||"


def test_every_training_argument_can_be_given():
    from transformers import TrainingArguments

    config = load("training: {optim: sgd, adam_beta2: 0.95, fsdp: null, dataloader_drop_last: yes}")
    assert config.training["optim"] == "sgd"
    arguments = TrainingArguments(output_dir="x", **config.training)
    assert arguments.adam_beta2 == 0.95
    assert arguments.dataloader_drop_last is True


def test_dump_and_load_are_inverse():
    config = load(
        "method: {name: adalora, r: 4, lr_scale: {A: 2}}\n"
        "data: {validation: 0.2, columns: {label: 1}, delimiter: '||'}\n"
        "training: {lr_scheduler_type: linear, eval_steps: 5}\n"
    )
    assert load(dump_config(config)) == config
    assert config_from_dict(config_to_dict(config)) == config
    assert config.method.lr_scale == {"A": 2.0}


def test_the_starter_config_is_a_valid_run():
    config = load(starter_config())
    assert config.method.name == "dual_module"
    shown = yaml.safe_load(starter_config())
    # Every key of every fixed section is there, so that nobody has to look elsewhere.
    for section in ("model", "data", "evaluation", "output"):
        assert set(shown[section]) == set(vars(vars(RunConfig())[section]))
    # What a comment calls the default is the default.
    default = config_to_dict(RunConfig())
    differing = {"validation", "test"}
    assert {k: v for k, v in shown["data"].items() if k not in differing} == {
        k: v for k, v in default["data"].items() if k not in differing
    }
    for section in ("model", "evaluation"):
        assert shown[section] == default[section]
    assert shown["output"] == default["output"] | {"also": ["lora"]}
    assert plait.find(config.method.name).exact_export  # or it could leave no plain LoRA


def test_the_starter_has_the_help_of_every_key():
    words = "".join(starter_config().replace("#", "").split())
    for section in (ModelConfig, DataConfig, EvaluationConfig, ChainConfig, OutputConfig):
        for f in fields(section):
            assert "".join(f.metadata["help"].replace("#", "").split()) in words, f.name
    assert max(map(len, starter_config().splitlines())) <= 100


def test_every_key_of_every_file_has_a_help():
    sections = [type(vars(RunConfig())[name]) for name in ("model", "method", "optimizer", "data")]
    sections += [ChainConfig, ColumnsConfig, EvaluationConfig, OutputConfig]
    sections += get_type_hints(FederateConfig).values()
    for section in sections:
        for f in fields(section):
            assert f.metadata.get("help"), f"{section.__name__}.{f.name}"


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "training: {learnig_rate: 1}",
            "dual.yaml: training.learnig_rate is not known. Did you mean learning_rate?",
        ),
        ("trainin: {}", "dual.yaml: trainin is not known. Did you mean training?"),
        (
            "data: {columns: {promt: a}}",
            "dual.yaml: data.columns.promt is not known. Did you mean prompt?",
        ),
        (
            "model: {task: causal}",
            "dual.yaml: model.task is 'causal'. It should be 'causal_lm', 'classification' or "
            "'regression'.",
        ),
        (
            "data: {max_length: 0}",
            "dual.yaml: data.max_length is 0. It should be greater than or equal to 1.",
        ),
        (
            "data: {max_length: long}",
            "dual.yaml: data.max_length is 'long'. It should be a valid integer, unable to parse "
            "string as an integer.",
        ),
        (
            "data: {validation: 5}",
            "dual.yaml: data.validation is 5. It should be less than 1 or a valid string or a "
            "valid list.",
        ),
        (
            "training: {warmup_steps: [1]}",
            "dual.yaml: training.warmup_steps is [1]. It should be a valid number.",
        ),
        (
            "training: {eval_strategy: stepz}",
            "dual.yaml: training.eval_strategy is 'stepz'. It should be 'no', 'steps' or 'epoch'.",
        ),
        (
            "training: {output_dir: x}",
            "dual.yaml: training.output_dir cannot be set. Set output.dir, the run folder.",
        ),
        (
            "training: {hub_token: hf_x}",
            "dual.yaml: training.hub_token cannot be set. Set the environment variable HF_TOKEN; a "
            "config is stored with the run.",
        ),
        (
            "method: {name: dual_lara}",
            "dual.yaml: method.name is 'dual_lara', which is not a method. Did you mean dual_lora?",
        ),
        (
            "method: {name: lora, rr: 4}",
            "dual.yaml: method.rr is not an option of lora. Did you mean r?",
        ),
        (
            "method: {name: vera, lora_alpha: 4}",
            "dual.yaml: method.lora_alpha is not an option of vera. `plait methods vera` lists its "
            "options.",
        ),
        ("method: {r: 0}", "dual.yaml: method.r is 0. Give a rank of at least 1."),
        ("method: {name: cola, r: -2}", "dual.yaml: method.r is -2. Give a rank of at least 1."),
        (
            "method: {name: dual_lora, r: 7}",
            "dual.yaml: method: r = 7 cannot be split into two equal ranks. Give an even r, or r1 "
            "and r2 with r1 + r2 = r.",
        ),
        (
            "method: {name: dora, use_dora: false}",
            "dual.yaml: method.use_dora cannot be set: dora means use_dora = True. Remove it.",
        ),
        (
            "method: {name: adalora, r: 4, target_r: 8}",
            "dual.yaml: method.r and method.target_r are the same option of adalora. Give one of "
            "them.",
        ),
        (
            "method: {name: adalora, init_r: 8}",
            "dual.yaml: method: adalora: init_r = 8 leaves nothing to prune to target_r = 8. Give "
            "an init_r above target_r.",
        ),
        (
            "method: {lr_scale: {A: -1}}",
            "dual.yaml: method.lr_scale.A is -1. It should be greater than 0.",
        ),
        (
            "method: {name: full, r: 8}",
            "dual.yaml: method.r is not an option of full. Known: lr_scale.",
        ),
        ("data: [1]", "dual.yaml: data is [1]. It should be keys and values."),
        (
            "- 1",
            "dual.yaml: is a list. Give sections: model, method, optimizer, objective, data, "
            "training, parallel, evaluation, chain, output.",
        ),
        ("a: b: c", "dual.yaml: line 1, column 5: mapping values are not allowed here."),
        (
            "method: {r: 4}\nmethod: {r: 8}\n",
            "dual.yaml: line 2, column 1: the key 'method' is given twice. Correct the YAML there.",
        ),
    ],
)
def test_error_texts(text, expected):
    assert error(text).startswith(expected)


def test_all_wrong_keys_of_a_section_are_named_at_once():
    assert error("data: {max_length: a, validaton: 1, limit: 0}").splitlines() == [
        "dual.yaml: data.validaton is not known. Did you mean validation?",
        "dual.yaml: data.max_length is 'a'. It should be a valid integer, unable to parse string "
        "as an integer.",
        "dual.yaml: data.limit is 0. It should be greater than or equal to 1.",
    ]


def test_errors_of_overrides_name_the_command_line():
    assert error("", "training.learnig_rate=1").startswith("command line: training.learnig_rate")
    assert error("", "method.r=0").startswith("command line: method.r is 0")
    assert error("", "learning_rate=1") == (
        "command line: 'learning_rate=1' is not an override. Write section.key=value."
    )
    assert error("model: {name: x}", "model.name.y=1") == (
        "command line: model.name.y is below model.name, which is 'x' and has no keys. Set that "
        "key itself."
    )
    assert error("", "data.train=[a").startswith("command line: 'data.train=[a': line 1, column")


def test_a_missing_file_says_how_to_make_one():
    with pytest.raises(FileNotFoundError) as caught:
        load_config("nowhere.yaml")
    assert str(caught.value) == (
        "nowhere.yaml: there is no such config file. Write one with: plait init nowhere.yaml"
    )


def test_did_you_mean_lists_all_where_nothing_is_near():
    assert did_you_mean("zzz", ["b", "a"]) == "Known: a, b."


def test_a_remedy_shows_five_names_at_most_and_the_nearest_first():
    names = [f"name_{i}" for i in range(9)]
    assert did_you_mean("name_", names) == "Did you mean name_0, name_1, name_2, name_3 or name_4?"
    assert did_you_mean("zzz", names) == (
        "Known: name_0, name_1, name_2, name_3, name_4 and 4 more."
    )
    assert did_you_mean("zzz", names, "See there.") == "See there."
    assert did_you_mean("learnin_rate", ["lr", "learning_rate", "learning_rates"]) == (
        "Did you mean learning_rate or learning_rates?"
    )


def test_bounds_hold_wherever_a_config_is_made():
    @dataclass
    class Options:
        share: float = option(0.5, "A share.", above=0, most=1)
        name: str = option("x", "A name.", least=1)
        ratio: float = option(1.0, "A ratio.", least=1, infinite=True)
        names: list[str] = option(list, "No bounds.")

    check_options(Options(ratio=float("inf"), share=1.0), "part")
    for values, text in (
        ({"share": 1.5}, "part.share = 1.5 is out of range. Give more than 0 and 1 or less."),
        ({"share": True}, "part.share = True is not a number. Give one."),
        ({"name": ""}, "the length of part.name = 0 is out of range. Give 1 or more."),
        ({"ratio": float("nan")}, "part.ratio = nan is out of range. Give 1 or more."),
        ({"share": float("inf")}, "part.share = inf is out of range. Give more than 0 and 1 or"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            check_options(Options(**values), "part")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("method: {rank: 4}", "r"),
        ("method: {name: dual_lora, alpha: 4}", "lora_alpha"),
        ("method: {dropout: 0.1}", "lora_dropout"),
        ("training: {lr: 1e-3}", "learning_rate"),
        ("training: {epochs: 2}", "num_train_epochs"),
        ("training: {batch_size: 2}", "per_device_train_batch_size"),
        ("data: {cutoff_len: 64}", "max_length"),
    ],
)
def test_words_of_other_tools_point_at_ours(text, name):
    assert error(text).endswith(f"Did you mean {name}?")


def test_one_out_of_range_is_found_without_the_class():
    assert error("method: {name: dual_lora, lora_dropout: 1.0}") == (
        "dual.yaml: method.lora_dropout is 1.0. It should be less than 1."
    )
    with pytest.raises(ValueError, match=r"method\.lora_dropout is 1\.0"):
        load("method: {name: dual_lora, lora_dropout: 1.0}")  # check_method was not called
    assert load("method: {name: dual_lora, r: 7}").method.options == {"r": 7}


# ------------------------------------------------------------------------------------- schema


def test_the_schema_is_current():
    """Else run: python -m plait.run.config."""
    import peft
    import transformers

    stored = schema.FILE.read_text(encoding="utf-8")
    if json.loads(stored)["written_with"] == {
        "peft": peft.__version__,
        "transformers": transformers.__version__,
    }:
        assert stored == schema.text()
    else:  # the classes are read, so nothing but plait's own part must be the same
        kept = ("methods", "optimizers")
        built = json.loads(json.dumps(schema.build()))
        assert {k: json.loads(stored)[k] for k in kept} == {k: built[k] for k in kept}


@pytest.mark.parametrize(
    "hint",
    [
        int,
        bool | None,
        list[str] | set[str] | str | None,
        list[int] | dict[str, list[int]] | None,
        list[str | dict[str, Any]] | None,
        Literal["none", "all"],
        bool | Literal["pissa_niter_[number of iters]"],
        list[tuple[int, int]] | None,
        tuple[float, float],
        dict | None,
        Any,
        LoraConfig | None,
    ],
)
def test_a_type_survives_the_schema(hint):
    assert schema.read_type(schema.type_text(hint)) == hint


def test_a_type_that_the_schema_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"print\('x'\) is not a type"):
        schema.read_type("print('x')")


def test_the_schema_has_what_the_classes_have(monkeypatch):
    stored = {name: method_options(name) for name in method_names()}
    training = schema.training_types()
    monkeypatch.setattr(schema, "_installed", lambda: {"peft": "9", "transformers": "9"})
    schema._schema.cache_clear()
    try:
        assert {name: method_options(name) for name in method_names()} == stored
        assert schema.training_types() == training
    finally:
        schema._schema.cache_clear()


def test_upstream_classes_are_loaded_for_their_own_options_alone():
    config = load("method: {eva_config: {rho: 3.0}}")
    assert type(config.method.options["eva_config"]).__name__ == "EvaConfig"
    assert peft_config(config.method, "causal_lm").eva_config.rho == 3.0
    assert load(dump_config(config)) == config


# ------------------------------------------------------------------------------------- plugins

TOY = """
from plait.core import FreeConfig, FreeDelta, option, register
from dataclasses import dataclass

@dataclass
class ToyConfig(FreeConfig):
    strength: float = option(1.0, "Factor on nothing.", above=0)

@register("toy_{name}", ToyConfig, paper="none")
class ToyDelta(FreeDelta):
    pass
"""


@pytest.fixture
def registry(monkeypatch):
    """What a test registers, and the modules it imports, are gone after it."""
    from plait.core import registry

    monkeypatch.setattr(registry, "_methods", dict(registry._methods))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_plugin_makes_a_method_known(registry, monkeypatch, tmp_path):
    (tmp_path / "toy_one.py").write_text(TOY.replace("{name}", "one"))
    monkeypatch.syspath_prepend(tmp_path)
    text = "plugins: [toy_one]\nmethod: {name: toy_one, strength: 2}\n"
    with pytest.raises(ValueError) as caught:
        load(text)
    assert str(caught.value) == (
        "dual.yaml: plugins names toy_one, which is not imported: the config of a run folder runs "
        "no code. If you trust it, name it: plait --import toy_one VERB ..."
    )
    assert "toy_one" not in sys.modules
    config = load_config("dual.yaml", import_plugins=True)
    assert config.plugins == ["toy_one"]
    assert config.method.options == {"strength": 2.0}
    check_method(config)
    assert "toy_one" in method_names()
    assert load(dump_config(config)) == config  # imported by now
    assert error(text.replace("strength: 2", "strenght: 2")).endswith("Did you mean strength?")
    assert error(text.replace("strength: 2", "strength: 0")) == (
        "dual.yaml: method.strength is 0. It should be greater than 0."
    )


def test_the_command_line_imports_a_file(registry, capsys, tmp_path):
    from plait_cli import main

    (tmp_path / "toy_two.py").write_text(TOY.replace("{name}", "two"))
    with open("run.yaml", "w") as file:
        file.write("method: {name: toy_two, strength: -1}\n")
    assert main(["check", "run.yaml"]) == 2
    assert "method.name is 'toy_two', which is not a method." in capsys.readouterr().err
    assert main(["--import", "toy_two.py", "check", "run.yaml"]) == 2
    assert capsys.readouterr().err == (
        "plait check: run.yaml: method.strength is -1. It should be greater than 0.\n"
    )
    assert main(["--import", "toy_two.py", "methods", "toy_two"]) == 0
    assert "Factor on nothing." in capsys.readouterr().out
    assert main(["--import", "nowhere.py", "methods"]) == 2
    assert capsys.readouterr().err == (
        "plait methods: plugin nowhere.py: there is no such file. Correct the path.\n"
    )
    assert main(["--import", "no_such_module", "methods"]) == 2
    assert "plugin no_such_module: cannot be imported" in capsys.readouterr().err


def test_a_plugin_is_a_module_and_no_path():
    with pytest.raises(ValueError, match=r"plugins has 'a/b\.py', which is not a module name"):
        config_from_dict({"plugins": ["a/b.py"]}, import_plugins=True)
    with pytest.raises(ValueError, match=r"config: plugins is 'json'\. It should be a valid list"):
        config_from_dict({"plugins": "json"})
    assert config_from_dict({"plugins": ["json"]}).plugins == ["json"]
    assert "plugins" not in config_to_dict(config_from_dict({}))


@pytest.mark.slow
def test_a_run_with_a_plugin_is_read_again_with_it_alone(tmp_path, capfd):
    (tmp_path / "toy_three.py").write_text(TOY.replace("{name}", "three"))
    with open("run.yaml", "w") as file:
        file.write(
            "method: {name: toy_three, r: 2, target_modules: [q_proj]}\n"
            "data: {train: 'builtin:shift?n=8', test: 'builtin:shift?n=4'}\n"
            "training: {max_steps: 1}\nevaluation: {generate: false}\noutput: {dir: run}\n"
            "plugins: [toy_three]\n"
        )

    def plait_(*words):
        code = "import sys, plait_cli; sys.exit(plait_cli.main(sys.argv[1:]))"
        done = warm.python(*words, code=code, peft=True)
        return done.returncode, done.stderr

    assert plait_("--import", "toy_three.py", "train", "run.yaml")[0] == 0
    code, text = plait_("evaluate", "run")
    assert code == 2
    assert "run/config.yaml: plugins names toy_three, which is not imported" in text
    assert plait_("--import", "toy_three.py", "evaluate", "run")[0] == 0


# ------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("name", [m.key for m in plait.list_methods()] + list(BASELINES))
def test_every_method_has_a_config(name):
    config = load(f"method: {{name: {name}}}")
    made = peft_config(config.method, "classification", total_steps=100)
    assert name in method_names()
    if name == "full":
        assert made is None
        assert method_options(name) == {}
    else:
        assert made.task_type == "SEQ_CLS"
        assert made.target_modules == "all-linear"
        assert all(option.help for option in method_options(name).values())


def test_baselines_are_upstream_configs_with_the_common_defaults():
    def made(**raw):
        return peft_config(config_from_dict({"method": raw}).method, "causal_lm", total_steps=100)

    lora = made(name="lora")
    assert type(lora) is LoraConfig
    assert (lora.r, lora.lora_alpha) == (8, 16)
    assert made(name="rslora").use_rslora
    assert made(name="dora").use_dora
    assert made(name="pissa").init_lora_weights == "pissa_niter_4"
    assert made(name="pissa", init_lora_weights="pissa").init_lora_weights == "pissa"
    vera = made(name="vera", lora_dropout=0.1)
    assert type(vera) is VeraConfig
    assert vera.vera_dropout == 0.1
    adalora = made(name="adalora", r=4)
    assert type(adalora) is AdaLoraConfig
    assert (adalora.target_r, adalora.init_r) == (4, 6)
    assert (adalora.total_step, adalora.tinit, adalora.tfinal) == (100, 10, 30)
    assert made(name="adalora", total_step=50, tinit=1).total_step == 50


def test_plait_configs_get_the_number_of_steps_and_the_tasks():
    config = config_from_dict({"method": {"name": "shared_b", "routing": "task"}})
    made = peft_config(config.method, "causal_lm", total_steps=7, tasks=["a", "b"])
    assert (made.total_steps, made.tasks) == (7, ["a", "b"])
    given = config_from_dict({"method": {"name": "dual_module", "total_steps": 9}})
    assert peft_config(given.method, "causal_lm", total_steps=7).total_steps == 9


# ------------------------------------------------------------------------------------- folder


def test_a_run_folder_is_never_overwritten(tmp_path):
    folder = RunFolder.create(tmp_path / "a" / "run")
    assert RunFolder.create(folder.path).path == folder.path  # empty: nothing to lose
    write_atomic(folder.config, "x: 1")
    with pytest.raises(FileExistsError) as caught:
        RunFolder.create(folder.path)
    assert str(caught.value) == (
        f"{folder.path}: this run folder exists and is not empty. Continue it with --resume, "
        "remove it, or give another output.dir."
    )
    assert RunFolder.open(folder.path) == folder
    with pytest.raises(FileNotFoundError, match="no run is here"):
        RunFolder.open(tmp_path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "eval.json"
    write_atomic(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["eval.json"]


def test_written_files_have_the_usual_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    write_atomic(tmp_path / "atomic", b"x")
    assert (tmp_path / "atomic").stat().st_mode == plain.stat().st_mode


def test_replace_dir_keeps_the_old_folder_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "adapter"
    replace_dir(target, lambda folder: (folder / "a").write_text("1"))

    def broken(folder):
        (folder / "a").write_text("2")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_dir(target, broken)
    assert (target / "a").read_text() == "1"
    replace_dir(target, lambda folder: (folder / "b").write_text("3"))
    assert [p.name for p in target.iterdir()] == ["b"]
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_replace_dir_puts_the_old_folder_back_when_the_last_rename_fails(tmp_path, monkeypatch):
    import os

    # As on file systems where two names cannot be exchanged in one step.
    monkeypatch.setattr("plait.core.files._exchange", lambda one, other: False)
    target = tmp_path / "adapter"
    replace_dir(target, lambda folder: (folder / "a").write_text("1"))
    real, calls = os.replace, []

    def second_fails(source, to):
        calls.append(to)
        if len(calls) == 2:
            raise OSError("injected")
        real(source, to)

    monkeypatch.setattr("os.replace", second_fails)
    with pytest.raises(OSError, match="injected"):
        replace_dir(target, lambda folder: (folder / "b").write_text("2"))
    assert (target / "a").read_text() == "1"


def test_environment_says_nothing_of_the_machine_but_its_kind():
    found = environment()
    assert found["packages"]["peft"]
    assert found["cpu_count"] >= 1
    import platform

    assert platform.node() not in str(found)


def test_differences_of_configs_are_listed_by_key():
    old = {"a": 1, "b": {"c": 2, "d": None}}
    new = {"a": 1, "b": {"c": 3}, "e": "x"}
    assert diff_configs(old, new) == [
        "b.c: 2 -> 3",
        "b.d: None -> (not set)",
        "e: (not set) -> 'x'",
    ]


# ------------------------------------------------------------------------------- command line


def test_init_writes_a_config_and_refuses_to_overwrite(capsys):
    from plait_cli import main

    assert main(["init", "a.yaml"]) == 0
    assert capsys.readouterr().out == "a.yaml written. Look at it with: plait check a.yaml\n"
    assert load_config("a.yaml").method.name == "dual_module"
    assert main(["init", "a.yaml"]) == 2
    assert capsys.readouterr().err == (
        "plait init: a.yaml: exists already. Give another name, or remove it.\n"
    )
    assert main(["init", "no/a.yaml"]) == 2


def test_methods_lists_all_and_shows_one(capsys):
    from plait_cli import main

    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    for name in method_names():
        assert f"\n{name} " in f"\n{out}"
    assert main(["methods", "dual_lora"]) == 0
    out = capsys.readouterr().out
    assert "relu(B A) * sgn(D C)" in out
    assert "2512.03402" in out
    assert "gate_steps" in out


def test_methods_resolves_names_that_clash(capsys):
    from plait_cli import main

    assert main(["methods", "ALoRA"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "shared_b: ALoRA (asymmetric)" in out
    assert "alloc: Allocating LoRA (ALoRA, AB-LoRA)" in out
    assert "activated LoRA: upstream's lora with alora_invocation_tokens" in out
    assert main(["methods", "CoLA"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "cola: CoLA (collaborative)" in out
    assert "chain of LoRA (COLA, 2401.04151)" in out
    assert main(["methods", "dual_lara"]) == 2
    assert capsys.readouterr().err == (
        "plait methods: 'dual_lara' is not a method. Did you mean dual_lora?\n"
    )


def test_failures_and_user_errors_have_their_own_exit_codes(capsys, monkeypatch):
    from plait_cli import init, main

    def fails(args):
        raise RuntimeError("boom")

    monkeypatch.setattr(init, "run", fails)
    assert main(["init", "x"]) == 1
    assert capsys.readouterr().err == (
        "plait init: RuntimeError: boom\nRun it with --debug to see where.\n"
    )
    assert main(["init", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(init, "run", interrupted)
    assert main(["init", "x"]) == 130


def test_help_loads_nothing_heavy():
    """Torch and peft take seconds; a parser of all verbs needs neither."""
    code = (
        "import sys, plait_cli\n"
        "try: plait_cli.main(['federate', 'simulate', '--help'])\n"
        "except SystemExit: pass\n"
        "print({'plait', 'torch', 'peft', 'rich'} & set(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("usage: plait federate simulate"), done.stderr
    assert done.stderr == "set()\n"


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "plait", "check", "nowhere.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    # On some processors bitsandbytes says at import which of its kernels it does without.
    assert done.stderr.splitlines()[-1] == (
        "plait check: nowhere.yaml: there is no such config file. Write one with: plait init "
        "nowhere.yaml"
    )
