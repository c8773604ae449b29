"""benchmarks/federated/study.py: figures of a run, tables, learning rates, pictures, configs."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.federated import study
from plait.run.federated.config import load_federate_config

SETTING = {"score": "accuracy", "grid": [0.004, 0.01]}


def made(
    accuracy: list[float], up: float = 2048.0, cpu: float = 10.0, gain: float = 0.0
) -> dict[str, Any]:
    """A run's figures: clients of these accuracies, loss 1 - accuracy; gain: by local training."""
    clients = {f"c{i}": {"accuracy": a, "loss": 1 - a} for i, a in enumerate(accuracy)}
    mean = sum(accuracy) / len(accuracy)
    return {
        "rate": 0.01,
        "curve": {"0": {"accuracy": 0.0, "loss": 1.0}, "10": {"accuracy": mean, "loss": 1 - mean}},
        "clients": clients,
        "trained": {"curve": {"10": {"accuracy": mean + gain, "loss": 1 - mean - gain}}},
        "up": up,
        "down": 2 * up,
        "frames": 3 * up + 100,
        "aggregation_error": None,
        "rejected": 0,
        "failed": 0,
        "cpu": cpu,
    }


RUNS = {
    "local": {"0": made([0.5, 0.7], 0.0), "1": made([0.4, 0.6], 0.0)},
    "central": {"0": made([0.8], 0.0), "1": made([0.9], 0.0)},
    "fedit": {"0": made([0.6, 0.8], gain=0.1), "1": made([0.7, 0.9], cpu=20.0, gain=-0.1)},
}


def rows_of(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table: first cell -> column -> cell."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    head, rule, *body = lines
    assert set(rule) == {"---"}
    return {row[0]: dict(zip(head, row, strict=True)) for row in body}


def test_table_shows_means_deviations_gaps_and_bytes() -> None:
    rows = rows_of(study.table({"setting": SETTING, "runs": RUNS}))
    assert list(rows) == ["central", "fedit", "local"]  # the best first
    # fedit: means 0.7 and 0.8; against local 0.6, 0.5: +0.1, +0.3; against central -0.1, -0.1.
    assert rows["fedit"] == {
        "method": "fedit",
        "seeds": "2",
        "rate": "0.01",
        "accuracy": "0.750 ± 0.071",
        "loss": "0.250 ± 0.071",
        "worst client": "0.650 ± 0.071",
        "s.d. over clients": "0.141",
        "accuracy - local": "+0.200 ± 0.141",
        "accuracy - central": "-0.100 ± 0.000",
        "accuracy after training": "0.750 ± 0.071",
        "after training - local": "+0.200 ± 0.000",
        "up KiB": "2",
        "down KiB": "4",
        "CPU s": "15",
    }
    assert rows["local"]["accuracy - local"] == rows["local"]["after training - local"] == "-"
    assert rows["local"]["accuracy after training"] == "0.550 ± 0.071"
    assert rows["central"]["worst client"] == rows["central"]["s.d. over clients"] == "-"


def test_table_pairs_only_the_seeds_that_both_have() -> None:
    runs = RUNS | {"ffa": {"1": made([0.6, 0.6])}, "fedsa": {"0": made([0.6]) | {"trained": {}}}}
    rows = rows_of(study.table({"setting": SETTING, "runs": runs}))
    assert rows["ffa"]["accuracy - local"] == rows["ffa"]["after training - local"] == "+0.100"
    assert rows["ffa"]["accuracy"] == "0.600"
    half = {"fedalora": {"0": made([0.6]), "1": made([0.8]) | {"trained": {}}}}
    row = rows_of(study.table({"setting": SETTING, "runs": RUNS | half}))["fedalora"]
    assert row["accuracy after training"] == "0.600 (1 of 2 seeds)"
    assert row["after training - local"] == "+0.000"
    assert rows["fedsa"]["accuracy after training"] == "-"
    assert rows["fedsa"]["after training - local"] == "-"


def test_table_by_loss_puts_the_lowest_first_and_the_largest_is_the_worst() -> None:
    rows = rows_of(study.table({"setting": SETTING | {"score": "loss"}, "runs": RUNS}))
    assert list(rows) == ["central", "fedit", "local"]
    assert rows["fedit"]["worst client"] == "0.350 ± 0.071"
    assert "accuracy" not in rows["fedit"]


def test_the_grid_grows_while_its_end_is_the_best() -> None:
    grid = (0.004, 0.01)

    def after(**losses: float) -> float | None:
        tried = {key.strip("_").replace("_", "."): {"loss": x} for key, x in losses.items()}
        return study.untried(tried, grid)

    assert after() == 0.004
    assert after(**{"0_004": 2.0}) == 0.01
    assert after(**{"0_004": 2.0, "0_01": 3.0}) == 0.0016
    assert after(**{"0_004": 3.0, "0_01": 2.0}) == 0.025
    assert after(**{"0_004": 3.0, "0_01": 2.0, "0_025": 2.5}) is None


def test_rates_table_marks_the_chosen_rate() -> None:
    rates = {"a": {"0.004": {"loss": 2.0}, "0.01": {"loss": 1.0}}, "b": {"0.004": {"loss": 1.0}}}
    rows = rows_of(study.rates_table({"rates": rates}))
    assert rows["a"] == {"method": "a", "0.004": "2.000", "0.01": "**1.000**"}
    assert rows["b"]["0.01"] == "-"


def test_figures_are_means_over_clients_and_rounds() -> None:
    def traffic(up: int, down: int) -> dict[str, int]:
        return {"up": up, "down": down, "up_frame": up + 1, "down_frame": down + 1}

    def evaluation(number: int, *accuracy: float) -> dict[str, Any]:
        clients = {f"c{i}": {"accuracy": a, "loss": 2 * a} for i, a in enumerate(accuracy)}
        return {"kind": "evaluation", "round": number, "clients": clients}

    common = {"rejected": [], "failed": {}, "aggregation_error": {}}
    found = study.figures(
        [
            evaluation(0, 0.0, 0.0),
            {
                "kind": "round",
                "round": 1,
                "held_out": {},
                "traffic": {"c0": traffic(4, 0), "c1": traffic(4, 0)},
                **common,
            },
            {
                "kind": "round",
                "round": 2,
                "held_out": {"c0": {"loss": 1.0, "rows": 3}, "c1": {"loss": 2.0}},
                "traffic": {"c0": traffic(4, 8), "c1": traffic(8, 8)},
                "rejected": [["c1", "norm_outlier", ""]],
                "failed": {},
                "aggregation_error": {"l0": 0.5, "l1": 0.25},
            },
            evaluation(2, 0.5, 1.0),
        ],
        cpu=1.26,
    )
    assert found["curve"] == {
        "0": {"accuracy": 0.0, "loss": 0.0},
        "2": {"accuracy": 0.75, "loss": 1.5},
    }
    assert found["clients"]["c1"] == {"accuracy": 1.0, "loss": 2.0}
    assert found["trained"] == {
        "curve": {"2": {"loss": 1.5}},
        "clients": {"c0": {"loss": 1.0}, "c1": {"loss": 2.0}},
    }
    assert (found["up"], found["down"], found["frames"]) == (5.0, 4.0, 11.0)
    assert (found["rejected"], found["failed"], found["aggregation_error"]) == (1, 0, 0.5)
    assert found["cpu"] == 1.3


def test_pictures_are_png_of_every_kind() -> None:
    found = study.pictures({"setting": SETTING, "runs": RUNS})
    assert set(found) == {"rounds", "bytes"}
    assert all(picture.startswith(b"\x89PNG") for picture in found.values())


@pytest.mark.parametrize("label", study.VARIANTS)
@pytest.mark.parametrize("name", study.SETTINGS)
def test_every_config_is_one_that_the_runner_takes(tmp_path: Path, name: str, label: str) -> None:
    setting, variant = study.SETTINGS[name], study.VARIANTS[label]
    wanted = study.config(setting, variant, tmp_path, tmp_path, tmp_path / "out", 1, 0.01)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(wanted))
    config = load_federate_config(file)
    assert config.algorithm().seed == config.sampling.seed == 1
    assert config.local.learning_rate == 0.01
    assert config.evaluation.after_training


def test_a_variant_takes_its_learning_rate_from_one_that_has_its_own() -> None:
    for variant in study.VARIANTS.values():
        assert not variant.rate_of or not study.VARIANTS[variant.rate_of].rate_of


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "file", "sizes"),
    [
        ("clinc", "clinc150/data_full.json", (150, 45, 75)),
        ("dolly", "dolly15k_fedit10/local_training_0.json", (150, 30, 40)),
    ],
)
def test_rows_are_of_eight_clients_and_disjoint(
    real_data: Callable[[str], Path], name: str, file: str, sizes: tuple[int, int, int]
) -> None:
    data = real_data(file).parent.parent
    rows = study.SETTINGS[name].rows(data, 0)
    for split, size in zip(("train", "dev", "test"), sizes, strict=True):
        assert set(Counter(row["task"] for row in rows[split]).values()) == {size}
        assert len({row["task"] for row in rows[split]}) == 8
    keys = [{tuple(row.values()) for row in rows[split]} for split in ("train", "dev")]
    assert not keys[0] & keys[1]
    assert rows == study.SETTINGS[name].rows(data, 0)
    assert rows["train"] != study.SETTINGS[name].rows(data, 1)["train"]
