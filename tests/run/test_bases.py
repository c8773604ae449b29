"""Base models whose head, padding or context differs from what the rows or the tokenizer say."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetForSequenceClassification,
    XLNetLMHeadModel,
)

from plait.core.events import PlaitWarning
from plait.run.config import RunConfig
from plait.run.data.bundle import load_data
from plait.run.evaluate import evaluate_model, evaluate_run
from plait.run.generate import generate_ids
from plait.run.model import load_base, load_tokenizer, pads_left
from plait.run.prepare import prepare
from plait.run.train import train
from plait.testing import tiny
from tests.support.runs import (
    SPECIAL,
    WORDS,
    character_tokenizer,
    copy_rows,
    film_rows,
    run_config,
    save_model,
    word_tokenizer,
    write_rows,
)

SIZE = len(SPECIAL) + len(WORDS)
SMALL: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 24, "num_hidden_layers": 2, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def save(model: Any, to: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(to)
    tokenizer.save_pretrained(to)
    return to


def bert(to: Path, names: list[str] | None = None, **options: Any) -> Path:
    """An encoder with a trained head."""
    torch.manual_seed(0)
    if names is not None:
        options |= {"id2label": dict(enumerate(names)), "num_labels": len(names)}
    config = BertConfig(
        vocab_size=SIZE, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=40, max_position_embeddings=64, pad_token_id=0, **options,
    )  # fmt: skip
    return save(BertForSequenceClassification(config), to, word_tokenizer())


def films(base: Path, tmp_path: Path, task: str = "classification", **sections: Any) -> RunConfig:
    rows = write_rows(tmp_path / "films.jsonl", film_rows())
    return run_config(base, rows, tmp_path / "run", model={"task": task}, **sections)


# ---------------------------------------------------------------------------------------- heads


def test_a_head_keeps_its_classes_where_the_names_match(tmp_path: Path) -> None:
    cfg = films(bert(tmp_path / "bert", ["yes", "unsure", "no"]), tmp_path)
    run = prepare(cfg)
    assert run.data.labels == ["yes", "unsure", "no"]
    assert run.model.config.id2label == {0: "yes", 1: "unsure", 2: "no"}
    assert run.data.train["labels"][0] == (0 if run.data.train["label"][0] == "yes" else 2)
    folder = train(cfg)
    again = evaluate_run(folder.path)
    assert again["accuracy"] == folder.read_evaluation()["after"]["accuracy"]


@pytest.mark.parametrize(
    ("names", "shown"), [(["good", "bad"], "has the classes good, bad"), (None, "does not name")]
)
def test_a_head_with_other_classes_is_shown(
    names: list[str] | None, shown: str, tmp_path: Path
) -> None:
    with pytest.warns(PlaitWarning, match=f"the model's head {shown}.* the rows have no, yes"):
        run = prepare(films(bert(tmp_path / "bert", names), tmp_path))
    assert run.data.labels == ["no", "yes"]


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    base = bert(tmp_path / "bert", ["a", "b", "c"])
    with pytest.warns(PlaitWarning), pytest.raises(ValueError) as caught:
        prepare(films(base, tmp_path))
    assert str(caught.value) == (
        f"model.name: the head of {base} has 3 outputs (classifier.bias), and model.task "
        "classification with these rows needs 2. Give rows with its classes, or a model without a "
        "head."
    )
    columns = {"columns": {"label": "score"}}
    with pytest.raises(ValueError, match=r"has 3 outputs .* regression with these rows needs 1"):
        prepare(films(base, tmp_path, "regression", data=columns))


def test_the_loss_is_that_of_the_task_whatever_the_head_was_trained_for(tmp_path: Path) -> None:
    base = bert(tmp_path / "bert", ["no", "yes"], problem_type="regression")
    run = prepare(films(base, tmp_path))
    logits = run.model.eval()(**run.data.batch("train", 8)).logits
    labels = torch.tensor(run.data.train["labels"][:8])
    expected = torch.nn.functional.cross_entropy(logits, labels)
    again = run.model(**run.data.batch("train", 8)).loss
    assert again.item() == pytest.approx(expected.item())


# -------------------------------------------------------------------------------------- padding


def unlike_batches(cfg: RunConfig) -> list[dict[str, Any]]:
    """Metrics of an untrained model with rows in batches of 8 and one by one."""
    run = prepare(cfg)
    metrics = []
    for size in (8, 1):
        cfg.evaluation.batch_size = size
        metrics.append(evaluate_model(run.model, run.data, "validation", cfg))
    return metrics


def long_films(tmp_path: Path) -> Path:
    rows = film_rows()
    for i, row in enumerate(rows):
        row["text"] += " film" * (i % 5)
    return write_rows(tmp_path / "films.jsonl", rows)


@pytest.mark.parametrize("pad", ["<pad>", None])
def test_a_decoder_with_a_head_reads_its_last_token_in_every_batch(
    pad: str | None, tmp_path: Path
) -> None:
    """The model's config calls another token padding than the tokenizer does."""
    torch.manual_seed(0)
    config = tiny.llama().config
    config.pad_token_id, config.initializer_range = (3 if pad else 0), 0.5
    tokenizer = word_tokenizer()
    tokenizer.pad_token = pad
    base = save(LlamaForSequenceClassification(config), tmp_path / "llama", tokenizer)
    cfg = run_config(
        base, long_films(tmp_path), tmp_path / "run", model={"task": "classification"},
        training={"max_steps": 2},
    )  # fmt: skip
    with pytest.warns(PlaitWarning, match="does not name its classes"):
        together, alone = unlike_batches(cfg)
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    with pytest.warns(PlaitWarning, match="does not name its classes"):
        after = train(cfg).read_evaluation()["after"]
    assert evaluate_run(tmp_path / "run")["loss"] == pytest.approx(after["loss"], abs=1e-5)
    assert load_tokenizer(cfg.model).pad_token == (pad or "</s>")


def test_xlnet_is_padded_on_the_left(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=SIZE, d_model=24, n_layer=2, n_head=2, d_inner=40, pad_token_id=0,
        initializer_range=0.5, id2label={0: "no", 1: "yes"},
    )  # fmt: skip
    base = save(XLNetForSequenceClassification(config), tmp_path / "xlnet", word_tokenizer())
    cfg = run_config(base, long_films(tmp_path), tmp_path / "run", model={"task": "classification"})
    together, alone = unlike_batches(cfg)
    assert together["loss"] == pytest.approx(alone["loss"], abs=1e-5)


def test_a_padding_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    base = save_model("llama", tmp_path / "llama")
    model = load_base(run_config(base, base, base).model)
    count = model.get_input_embeddings().num_embeddings
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [f"<{i}>" for i in range(count - len(tokenizer))]}
    )
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    tokenizer.save_pretrained(base)
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows())
    with pytest.raises(ValueError) as caught:
        prepare(run_config(base, rows, tmp_path / "run"))
    assert str(caught.value) == (
        f"model.name: the tokenizer pads with '<new>', id {count}, but the model has {count} "
        f"embeddings, ids 0 to {count - 1}. Set another pad_token in its tokenizer_config.json, or "
        "resize the model's embeddings."
    )
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(base)
    write_rows(rows, [*copy_rows(), {"prompt": "a", "completion": "b<new>"}])
    with pytest.raises(ValueError, match=f"the token '<new>', id {count}, but the model has"):
        prepare(run_config(base, rows, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------- kinds of architecture


def test_decoders_that_predict_the_token_itself_are_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows())
    bart = BartForCausalLM(
        BartConfig(
            vocab_size=24, d_model=24, decoder_layers=1, decoder_attention_heads=2,
            decoder_ffn_dim=40, is_decoder=True, is_encoder_decoder=False,
        )
    )  # fmt: skip
    xlnet = XLNetLMHeadModel(
        XLNetConfig(vocab_size=24, d_model=24, n_layer=1, n_head=2, d_inner=40)
    )
    for name, model in {"bart": bart, "xlnet": xlnet}.items():
        base = save(model, tmp_path / name, character_tokenizer())
        with pytest.raises(ValueError, match=rf"{name}\) was not made to predict the next token"):
            prepare(run_config(base, rows, tmp_path / "run"))


def rwkv(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = RwkvConfig(
        **SMALL, attention_hidden_size=24, intermediate_size=40, context_length=64, rescale_every=1
    )
    return save(RwkvForCausalLM(config), tmp_path / "rwkv", character_tokenizer())


def test_rwkv_is_the_same_model_in_training_and_evaluation(tmp_path: Path) -> None:
    """Upstream divides some weights for evaluation, and their updates not."""
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows())
    method = {"name": "lora", "r": 2, "target_modules": ["output", "value"], "lora_dropout": 0.0}
    run = prepare(run_config(rwkv(tmp_path), rows, tmp_path / "run", method=method))
    for name, parameter in run.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = run.data.batch("train", 4)
    trained = run.model.train()(**batch).logits
    assert torch.allclose(run.model.eval()(**batch).logits, trained, atol=1e-5)


def test_generation_of_a_model_without_positions_does_not_depend_on_the_batch(
    tmp_path: Path,
) -> None:
    base = rwkv(tmp_path)
    cfg = run_config(base, base, base)
    model, tokenizer = load_base(cfg.model).eval(), load_tokenizer(cfg.model)
    assert not pads_left(model)
    prompts = [[5, 6, 7, 8], [9], [10, 11], [12]]
    together = generate_ids(model, tokenizer, prompts, 6)
    assert together == [generate_ids(model, tokenizer, [ids], 6)[0] for ids in prompts]


def test_a_layer_that_mamba_does_not_call_is_refused(tmp_path: Path) -> None:
    base = save(
        MambaForCausalLM(MambaConfig(**SMALL, state_size=4)), tmp_path / "mamba",
        character_tokenizer(),
    )  # fmt: skip
    rows = write_rows(tmp_path / "rows.jsonl", copy_rows())

    def config(targets: Any) -> RunConfig:
        method = {"name": "dual_lora", "r": 2, "gate_steps": 1, "target_modules": targets}
        return run_config(base, rows, tmp_path / "run", method=method)

    for targets in ("all-linear", ["in_proj", "dt_proj"]):
        with pytest.raises(ValueError) as caught:
            prepare(config(targets))
        assert "dt_proj cannot be adapted, because a mamba reads its weight" in str(caught.value)
        assert "Set method.target_modules: [in_proj, out_proj, x_proj]." in str(caught.value)
    prepare(config(["in_proj", "x_proj"]))


# -------------------------------------------------------------------------------------- context


def test_rows_longer_than_the_context_of_gpt2_are_refused(tmp_path: Path) -> None:
    """Its config says n_positions."""
    base = save_model("gpt2", tmp_path / "gpt2")
    file = base / "config.json"
    content = json.loads(file.read_text())
    limit = content["n_positions"]
    assert "max_position_embeddings" not in content
    rows = write_rows(
        tmp_path / "rows.jsonl", [{"prompt": "ab" * limit, "completion": "a"}, *copy_rows()]
    )
    with pytest.raises(ValueError) as caught:
        prepare(run_config(base, rows, tmp_path / "run"))
    assert str(caught.value) == (
        f"data: the longest row has {2 * limit + 2} tokens, the model reads {limit}. "
        f"Set data.max_length: {limit} and data.truncate: true."
    )
    cfg = run_config(base, rows, tmp_path / "run")
    model, tokenizer = load_base(cfg.model).eval(), load_tokenizer(cfg.model)
    assert len(generate_ids(model, tokenizer, [[5] * (limit - 2)], 64)[0]) <= 2
    assert load_data(cfg, tokenizer).longest > limit
