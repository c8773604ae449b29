"""Building the model of a run, what is refused, and what `plait check` shows."""

import json
import shutil

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import RobertaConfig, RobertaModel, Trainer, TrainingArguments

from plait.run.check import check, masked_pieces
from plait.run.config import config_from_dict, method_names
from plait.run.model import adaptable_layers, load_base, load_tokenizer
from plait.run.prepare import planned_steps, prepare
from plait_cli import main
from tests.support.runs import (
    copy_rows,
    film_rows,
    run_config,
    save_model,
    word_tokenizer,
    write_rows,
)

LLAMA_LAYERS = 14  # seven in each of two blocks


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for kind in ("llama", "gpt2", "bert", "deberta"):
        save_model(kind, folder / kind)
    torch.manual_seed(0)
    roberta = RobertaConfig(
        vocab_size=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=34,
    )  # fmt: skip
    RobertaModel(roberta).save_pretrained(folder / "roberta")
    word_tokenizer().save_pretrained(folder / "roberta")
    return folder


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", copy_rows(20))


@pytest.fixture
def films(tmp_path):
    return write_rows(tmp_path / "films.jsonl", film_rows(16))


def build(config):
    return prepare(config).model


def error(config, kind=ValueError):
    with pytest.raises(kind) as caught:
        build(config)
    return str(caught.value)


# ------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_every_method_goes_on_causal_models(models, rows, tmp_path, kind, name):
    short = {
        "vblora": {"vector_length": 4},
        "alloc": {"rounds": 0},
    }  # for ten steps of small layers
    method = {"name": name, **short.get(name, {})}
    config = run_config(models / kind, rows, tmp_path / "run", method=method)
    prepared = prepare(config)
    model, data = prepared.model, prepared.data
    assert model.training
    batch = data.collator([data.train[i] for i in range(4)])
    model(**batch).loss.backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    if name == "full":
        assert not isinstance(model, PeftModel)
    else:
        assert not any("base_layer" in n or "embed" in n for n in trained)


@pytest.mark.parametrize("kind", ["bert", "roberta", "deberta", "llama", "gpt2"])
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_new_head_is_trained_and_saved(models, films, tmp_path, kind, task):
    config = run_config(
        models / kind, films, tmp_path / "run",
        model={"task": task}, method={"name": "cola", "r": 2},
    )  # fmt: skip
    config.data.columns.label = "score" if task == "regression" else "label"
    prepared = prepare(config)
    model, data = prepared.model, prepared.data
    batch = data.collator([data.train[i] for i in range(4)])
    assert model(**batch).logits.shape == (4, 2 if task == "classification" else 1)
    stored = " ".join(get_peft_model_state_dict(model))
    assert ("score" if kind in ("llama", "gpt2") else "classifier") in stored
    # DeBERTa's checkpoint has no pooler: a new one would be drawn when the adapter is loaded.
    assert ("pooler.dense.weight" in stored) == (kind == "deberta")
    if task == "classification":
        assert model.config.id2label == {0: "no", 1: "yes"}


@pytest.mark.parametrize("kind", ["bert", "deberta"])
def test_a_saved_adapter_gives_the_same_predictions_on_a_base_loaded_anew(
    models, films, tmp_path, kind
):
    config = run_config(models / kind, films, tmp_path / "run", model={"task": "classification"})
    prepared = prepare(config)
    model, data = prepared.model.eval(), prepared.data
    model.save_pretrained(str(tmp_path / "adapter"))
    torch.manual_seed(123)  # another draw of what the checkpoint lacks
    again = PeftModel.from_pretrained(load_base(config.model, 2), str(tmp_path / "adapter")).eval()
    batch = data.collator([data.train[i] for i in range(4)])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, again(**batch).logits)


def test_the_head_comes_from_the_seed(models, films, tmp_path):
    def head(seed):
        config = run_config(
            models / "bert", films, tmp_path / "run",
            model={"task": "classification"}, training={"seed": seed},
        )  # fmt: skip
        return build(config).base_model.model.classifier.modules_to_save["default"].weight

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("deberta", "classification")])
def test_quantized_bases(models, rows, films, tmp_path, quantization, kind, task):
    pytest.importorskip("bitsandbytes")
    data = rows if task == "causal_lm" else films
    config = run_config(
        models / kind, data, tmp_path / "run",
        model={"task": task, "quantization": quantization},
        method={"name": "dual_module", "r": 4},
    )  # fmt: skip
    prepared = prepare(config)
    model, bundle = prepared.model, prepared.data
    model(**bundle.collator([bundle.train[0], bundle.train[1]])).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    for name in ("pissa", "unilora", "full"):
        config.method = config_from_dict({"method": {"name": name}}).method
        assert error(config).startswith(
            f"method.name: {name} does not work on a {quantization} base: "
        )


def test_quantization_without_bitsandbytes_names_the_extra(models, rows, tmp_path, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "bitsandbytes" else real(name)
    )
    config = run_config(models / "llama", rows, tmp_path / "run", model={"quantization": "4bit"})
    assert error(config, ImportError) == (
        "model.quantization is 4bit, which needs bitsandbytes. Install it with: "
        'pip install "plait[quant]"'
    )


def test_half_precision(models, rows, tmp_path):
    config = run_config(models / "llama", rows, tmp_path / "run", model={"dtype": "bfloat16"})
    assert load_base(config.model).dtype == torch.bfloat16


# ------------------------------------------------------------------------------ what is refused


def test_folders_that_are_no_model(models, rows, tmp_path):
    def message(kind, folder):
        return error(run_config(folder, rows, tmp_path / "run"), kind)

    missing = tmp_path / "no"
    assert message(FileNotFoundError, missing) == (
        f"model.name: {missing} is no folder here. Correct the path, or give a hub id."
    )
    bare = tmp_path / "bare"
    shutil.copytree(models / "llama", bare, ignore=shutil.ignore_patterns("*.safetensors"))
    assert message(FileNotFoundError, bare) == (
        f"model.name: {bare} has no weights (no .safetensors file). "
        "Give a folder written by save_pretrained."
    )
    torch.save({"x": torch.ones(1)}, bare / "pytorch_model.bin")
    assert message(ValueError, bare) == (
        f"model.name: {bare} holds its weights as a pickle (pytorch_model.bin), which can run any "
        "code when it is read. Convert it to safetensors."
    )


def test_a_model_cut_off_or_incomplete(models, rows, tmp_path):
    copy = shutil.copytree(models / "llama", tmp_path / "copy")
    weights = copy / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}  # unmap
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert error(run_config(copy, rows, tmp_path / "run")) == (
        f"{weights}: damaged or cut off (Error while deserializing header: incomplete metadata, "
        "file not fully covered). Copy it again."
    )
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    assert error(run_config(copy, rows, tmp_path / "run")) == (
        f"{copy}: the weights of model.layers.1.mlp.up_proj and 0 more modules are missing. "
        "Give a complete causal language model."
    )


def test_a_hub_model_that_cannot_be_loaded(rows, tmp_path, monkeypatch):
    from plait.run.model import tokenizer

    def offline(*args, **kwargs):
        raise OSError("We couldn't connect to the hub.\nMore lines.")

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", offline)
    config = run_config(tmp_path, rows, tmp_path / "run", model={"name": "owner/model"})
    assert error(config, FileNotFoundError) == (
        "model.name: the tokenizer of owner/model cannot be loaded (We couldn't connect to the "
        "hub). Correct the path or the hub id."
    )
    config.model.name = "builtin:huge"
    assert error(config) == (
        "model.name is 'builtin:huge'. The only built-in model is builtin:tiny."
    )


def test_an_encoder_is_no_causal_model(models, rows, tmp_path):
    config = run_config(models / "bert", rows, tmp_path / "run")
    assert error(config) == (
        f"model.task is causal_lm, but {models / 'bert'} is an encoder (bert). Set model.task: "
        "classification or regression, or give a decoder."
    )


def test_targets_that_match_nothing_list_the_candidates(models, rows, tmp_path):
    def targets(value):
        return run_config(
            models / "llama", rows, tmp_path / "run",
            method={"name": "dual_lora", "target_modules": value},
        )  # fmt: skip

    rest = (
        " matches no linear layer of this model. It has down_proj, gate_proj, k_proj, o_proj, "
        "q_proj, up_proj, v_proj; or use all-linear."
    )
    assert error(targets(["query"])) == f"method.target_modules: 'query'{rest}"
    assert error(targets(["q_proj", "v_porj"])) == f"method.target_modules: 'v_porj'{rest}"
    assert error(targets(r".*attn\.c_attn")) == f"method.target_modules: '.*attn\\\\.c_attn'{rest}"
    assert check(targets(["q_proj", "v_proj"])).adapted == 4


def test_ranks_and_lengths_that_the_layers_do_not_allow(models, rows, tmp_path):
    def message(**method):
        return error(run_config(models / "llama", rows, tmp_path / "run", method=method))

    assert message(name="pissa", r=13) == (
        "method.r is 13, but pissa takes singular vectors of model.layers.0.self_attn.k_proj, "
        "which has 12. Give r: 12 or less, or leave that layer out."
    )
    assert message(name="vblora") == (
        "method.vector_length is 256, which does not divide model.layers.0.self_attn.q_proj "
        "(24 x 24). Give a common divisor of all layers, such as 4."
    )


@pytest.mark.parametrize(("kind", "limit"), [("bert", 64), ("roberta", 32)])
def test_rows_longer_than_the_model_reads(models, films, tmp_path, kind, limit):
    config = run_config(models / kind, films, tmp_path / "run", model={"task": "classification"})
    for length, fits in ((limit, True), (limit + 1, False)):
        texts = [{"text": "good " * length, "label": x} for x in ("yes", "no", "yes", "no")]
        write_rows(films, texts)
        if fits:  # and the model reads it
            prepared = prepare(config)
            prepared.model(**prepared.data.collator([prepared.data.train[0]]))
    assert error(config) == (
        f"data: the longest row has {limit + 1} tokens, the model reads {limit}. Set "
        f"data.max_length: {limit} and data.truncate: true."
    )


def test_a_tokenizer_that_cannot_pad(models, rows, tmp_path):
    copy = shutil.copytree(models / "llama", tmp_path / "copy")
    tokenizer = load_tokenizer(run_config(copy, rows, tmp_path / "run").model)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copy)
    config = run_config(copy, rows, tmp_path / "run")
    assert load_tokenizer(config.model).pad_token == "</s>"
    tokenizer.eos_token = tokenizer.unk_token = None
    tokenizer.save_pretrained(copy)
    assert error(config) == (
        f"model.name: the tokenizer of {copy} has no pad, eos or unk token to pad with. Add a pad "
        "token to its tokenizer_config.json."
    )


# -------------------------------------------------------------------------------------- check


@pytest.mark.parametrize(
    "training",
    [
        {"max_steps": 7},
        {"num_train_epochs": 2.5, "gradient_accumulation_steps": 3},
        {"num_train_epochs": 2, "dataloader_drop_last": True},
        {"num_train_epochs": 1, "per_device_train_batch_size": 100},
    ],
)
def test_planned_steps_are_the_trainers(models, rows, tmp_path, training):
    training = {"max_steps": -1, **training}
    config = run_config(models / "llama", rows, tmp_path / "run", training=training)
    prepared = prepare(config)
    data = prepared.data
    arguments = TrainingArguments(
        output_dir=str(tmp_path), remove_unused_columns=False, **config.training
    )
    trainer = Trainer(
        prepared.model, arguments, data_collator=data.collator, train_dataset=data.train
    )
    loader = trainer.get_train_dataloader()
    steps = trainer.set_initial_training_values(arguments, loader)[-1]
    assert planned_steps(config.training, len(data.train)) == steps


def test_adalora_knows_its_schedule(models, rows, tmp_path):
    config = run_config(
        models / "llama", rows, tmp_path / "run",
        method={"name": "adalora", "r": 4}, training={"max_steps": 50},
    )  # fmt: skip
    made = build(config).peft_config["default"]
    assert (made.total_step, made.tinit, made.tfinal) == (50, 5, 15)


def test_check_counts_what_is_trained(models, rows, tmp_path):
    report = check(run_config(models / "llama", rows, tmp_path / "run"))
    base = load_base(report.config.model)
    expected = sum(4 * (m.in_features + m.out_features) for m in adaptable_layers(base).values())
    assert report.adapted == LLAMA_LAYERS
    assert report.trainable == report.stored == expected
    assert report.total == expected + sum(p.numel() for p in base.parameters())
    assert report.rows == {"train": 16, "validation": 4}
    assert report.steps == 10
    assert report.memory.gradients == 4 * expected
    steps = 4 * len([p for p in build(report.config).parameters() if p.requires_grad])
    assert report.memory.optimizer == 8 * expected + steps  # AdamW counts the steps of each
    assert not (tmp_path / "run").exists()
    full = check(run_config(models / "llama", rows, tmp_path / "run", method={"name": "full"}))
    assert (full.trainable, full.stored) == (full.total, None)


def test_the_example_shows_where_loss_is_taken(models):
    tokenizer = load_tokenizer(config_from_dict({"model": {"name": str(models / "llama")}}).model)
    ids = tokenizer("ab>ba</s>")["input_ids"]
    labels = [-100, -100, -100, *ids[3:]]
    assert masked_pieces(ids, labels, tokenizer) == [("ab>", False), ("ba</s>", True)]
    assert masked_pieces(ids, None, tokenizer) == [("ab>ba</s>", False)]


def test_check_prints_mask_overlap_and_counts(models, rows, tmp_path, capsys):
    taken = tmp_path / "run"
    taken.mkdir()
    config = tmp_path / "a.yaml"
    config.write_text(
        json.dumps(
            {
                "model": {"name": str(models / "llama")},
                "data": {"train": str(rows), "test": str(rows)},
                "output": {"dir": str(taken)},
            }
        )
    )
    assert main(["check", str(config), "method.r=2", "data.test_limit=5"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"lora on {LLAMA_LAYERS} layers" in out
    assert "train 20, test 5" in out
    assert "in evaluation, in batches of 32 rows (evaluation.batch_size)" in out
    assert "First training row, tokens with loss in [[...]]: aa>[[aa</s>]]" in out
    assert (
        "5 of 5 test rows (100.0 %) also occur in train, 5 of them with the same answer. Remove "
        "them from train for an honest metric." in out
    )
    assert (
        f"The run folder will be {taken}, which exists: train with --resume, or elsewhere." in out
    )


def test_check_prints_labels_and_no_overlap(models, films, tmp_path, capsys):
    config = tmp_path / "a.yaml"
    fresh = write_rows(tmp_path / "v.jsonl", [{"text": "very not", "label": "yes"}])
    config.write_text(
        json.dumps(
            {
                "model": {"name": str(models / "bert"), "task": "classification"},
                "data": {"train": str(films), "validation": str(fresh)},
            }
        )
    )
    assert main(["check", str(config)]) == 0
    captured = capsys.readouterr()
    assert "MISSING" not in captured.err
    out = " ".join(captured.out.split())
    assert "also trained classifier, saved with the adapter" in out
    assert "labels 2: no (8), yes (8)" in out
    assert "First training row, to predict yes: film very good" in out
    assert "None of the 1 validation rows occurs in train." in out


def test_check_reports_an_error_and_exits_with_2(models, rows, tmp_path, capsys):
    config = tmp_path / "a.yaml"
    config.write_text(
        json.dumps({"model": {"name": str(models / "llama")}, "data": {"train": str(rows)}})
    )
    assert main(["check", str(config), "data.max_length=5"]) == 2
    assert capsys.readouterr().err == (
        "plait check: data.max_length is 5 tokens: 20 of 20 train rows (100.0 %) are longer, the "
        "longest 6. Raise data.max_length, or cut them with data.truncate: true.\n"
    )


@pytest.mark.parametrize("name", ["cola", "lora"])
def test_layers_to_adapt_are_named(name, models, rows):
    method = {"name": name, "r": 2, "target_modules": None}
    text = error(run_config(models / "llama", rows, rows.parent / "run", method=method))
    assert text == (
        "method.target_modules is null. Name the layers to adapt, such as [q_proj, v_proj], or "
        "give all-linear."
    )
