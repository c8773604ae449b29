"""Generation is the argmax unless the run file says otherwise, and several prompts at a time."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from plait.run.evaluate import evaluate_model
from plait.run.generate import generate_ids
from plait.run.model import load_tokenizer
from plait.run.prepare import prepare
from plait.run.train import train
from plait.testing import tiny
from plait_cli import main
from tests.support.runs import character_tokenizer, copy_rows, run_config, save_model, write_rows

PROMPTS = [[4, 9, 7], [5, 5, 6, 8], [10, 4]]
# A value for every key of GenerationConfig that would change what is generated, or how.
LEAKS: dict[str, Any] = {
    "max_length": 5, "min_length": 40, "min_new_tokens": 30, "early_stopping": True,
    "max_time": 1e-9, "stop_strings": ["a"], "do_sample": True, "num_beams": 3, "use_mtp": True,
    "use_cache": False, "cache_implementation": "static", "cache_config": {"a": 1},
    "max_cache_len": 3, "temperature": 9.0, "top_k": 2, "top_p": 0.3, "min_p": 0.9, "top_h": 0.5,
    "typical_p": 0.2, "epsilon_cutoff": 0.2, "eta_cutoff": 0.2, "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 3.0, "length_penalty": -3.0, "no_repeat_ngram_size": 1,
    "bad_words_ids": [[k] for k in range(4, 20)], "renormalize_logits": True,
    "forced_bos_token_id": 7, "forced_eos_token_id": 7, "remove_invalid_values": True,
    "exponential_decay_length_penalty": (1, 9.0), "suppress_tokens": [*range(4, 20)],
    "begin_suppress_tokens": [*range(4, 20)], "sequence_bias": [[[8], 99.0]],
    "token_healing": True, "guidance_scale": 4.0,
    "watermarking_config": {"greenlist_ratio": 0.1, "bias": 50.0},
    "num_return_sequences": 2, "output_attentions": True, "output_hidden_states": True,
    "output_scores": True, "output_logits": True, "return_dict_in_generate": True,
    "encoder_no_repeat_ngram_size": 1, "is_assistant": True, "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2, "assistant_early_exit": 1,
    "assistant_lookbehind": 2, "target_lookbehind": 2, "assistant_ensemble_weight": 0.5,
    "speculation_type": "dflash", "compile_config": {"a": 1}, "disable_compile": True,
    "continuous_batching_config": {"a": 1}, "low_memory": True, "penalty_alpha": 0.5,
    "dola_layers": "low", "diversity_penalty": 3.0, "num_beam_groups": 3, "constraints": [1],
    "force_words_ids": [[9]], "prefill_chunk_size": 1, "max_new_tokens": 2, "custom": 3,
}  # fmt: skip
SPECIAL = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"}
LABELS = {"transformers_version", "_from_model_config"}
# Of these upstream's own generate shows that they change the tokens.
CHANGES = (
    "num_beams", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id",
    "exponential_decay_length_penalty", "sequence_bias", "encoder_repetition_penalty",
    "guidance_scale", "watermarking_config",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llama()


@pytest.fixture(scope="module")
def greedy(model: Any) -> list[list[int]]:
    """The argmax, one token and one forward after the other."""
    continued = []
    for prompt in PROMPTS:
        ids = [*prompt]
        while len(ids) < len(prompt) + 12 and ids[-1] != 2:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        continued.append([i for i in ids[len(prompt) :] if i != 2])
    return continued


def leaking(model: Any, **values: Any) -> Any:
    """The model, with values in its generation_config that no file has to justify."""
    config = GenerationConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for name, value in values.items():
        setattr(config, name, value)
    model.generation_config = config
    return model


def test_every_key_of_transformers_is_tried() -> None:
    assert {*vars(GenerationConfig())} - SPECIAL - LABELS <= {*LEAKS}


@pytest.mark.parametrize("name", LEAKS)
def test_no_key_of_the_models_generation_config_leaks(
    name: str, model: Any, greedy: list[list[int]]
) -> None:
    tokenizer = character_tokenizer()
    saved = leaking(model, **{name: LEAKS[name]}).generation_config
    assert generate_ids(model, tokenizer, PROMPTS, 12) == greedy
    assert model.generation_config is saved
    assert getattr(saved, name) == LEAKS[name]


def test_all_keys_together_and_after_an_error(model: Any, greedy: list[list[int]]) -> None:
    saved = leaking(model, **LEAKS).generation_config
    with pytest.raises(ValueError, match="unknown"):
        generate_ids(model, character_tokenizer(), PROMPTS, 12, unknown=torch.ones(3))
    assert model.generation_config is saved
    assert generate_ids(model, character_tokenizer(), PROMPTS, 12) == greedy


def test_the_values_do_change_what_upstream_generates(model: Any, greedy: list[list[int]]) -> None:
    """So the test above can fail."""
    inputs = {"input_ids": torch.tensor(PROMPTS[:1]), "attention_mask": torch.ones(1, 3).long()}
    same = []
    for name in CHANGES:
        asked = GenerationConfig(max_new_tokens=12, do_sample=False)
        row = leaking(model, **{name: LEAKS[name]}).generate(**inputs, generation_config=asked)[0]
        if row[3:].tolist()[: len(greedy[0])] == greedy[0]:
            same.append(name)
    assert not same


def test_the_models_end_tokens_hold(model: Any, greedy: list[list[int]]) -> None:
    end = greedy[1][3]
    leaking(model, eos_token_id=[2, end])
    made = generate_ids(model, character_tokenizer(), PROMPTS, 12)
    assert made[1] == [*itertools.takewhile(lambda i: i != end, greedy[1])]


# ------------------------------------------------------------------------------- the run file


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", copy_rows())


def test_what_the_run_file_says_holds(base: Path, rows: Path, tmp_path: Path) -> None:
    section = {
        "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 8, "num_beams": 2,
        "length_penalty": 0.5,
    }  # fmt: skip
    cfg = run_config(base, rows, tmp_path / "run", evaluation=section)
    assert cfg.evaluation.decoding == section
    run = prepare(cfg)
    asked: dict[str, Any] = {}
    generate = type(run.model).generate

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked.update(kwargs["generation_config"].to_dict())
        return generate(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(run.model), "generate", watched)
        evaluate_model(run.model, run.data, "validation", cfg)
    assert {name: asked[name] for name in section} == section
    tokenizer = load_tokenizer(cfg.model)
    made = generate_ids(run.model, tokenizer, PROMPTS, 8, decoding={"no_repeat_ngram_size": 1})
    assert all(len({*ids}) == len(ids) for ids in made)


@pytest.mark.parametrize(
    ("key", "value"),
    [("repetition_penalty", 0), ("no_repeat_ngram_size", 0), ("num_beams", 0), ("num_beam", 2)],
)
def test_values_out_of_range_are_refused(key: str, value: Any, base: Path, rows: Path) -> None:
    with pytest.raises(ValueError, match=rf"evaluation\.{key}"):
        run_config(base, rows, base, evaluation={key: value})


def test_several_prompts(
    base: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = run_config(
        base, rows, tmp_path / "run", training={"max_steps": 10, "save_strategy": "no"}
    )
    train(cfg)
    capsys.readouterr()
    arguments = ["--prompt", "ab>", "--prompt", "c", "--prompt", "cd>", "evaluation.batch_size=2"]
    assert main(["generate", str(tmp_path / "run"), *arguments]) == 0
    for prompt in ("ab>", "c", "cd>"):
        assert main(["generate", str(tmp_path / "run"), "--prompt", prompt]) == 0
    out = capsys.readouterr().out.splitlines()
    texts = out[-3:]
    assert out[:-3] == [
        line for p, t in zip(("ab>", "c", "cd>"), texts, strict=True) for line in (f"> {p}", t)
    ]
