"""Does a rate that is carried over from LoRA hit the best rate of another method? A small check.

    OMP_NUM_THREADS=1 python -m benchmarks.quality.rates

The anchor, LoRA, and each method train for 60 steps at every rate of one grid with a factor of 2,
which grows until the best rate is inside. The best rate is the top of a parabola through the best
point and its neighbours, in the logarithm of the rate. It is compared with the rate that is carried
over from the anchor's best one, and with that of the anchor itself. One model of 340,000
parameters, one task, one seed: this checks the machinery and is no evidence for other models.
Arms that stand in the results are not swept again; the rates are carried over anew.
"""

import itertools
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from benchmarks._common import parser, read_results, table, write_results
from plait.run.compare.runner import Pool, value_of
from plait.run.compare.study import read_study
from plait.run.compare.transfer import predicted
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results" / "rates.json"
ANCHOR = "lora"
ARMS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora", "r": 4},
    "lora alpha 64": {"name": "lora", "r": 4, "lora_alpha": 64},
    "dual_lora": {"name": "dual_lora", "r": 4},
    "cola": {"name": "cola", "r": 4},
    "hydra": {"name": "hydra", "r": 4},
    "pissa": {"name": "pissa", "r": 4},
    "dora": {"name": "dora", "r": 4},
    "vera": {"name": "vera"},
    "sora": {"name": "sora", "r": 4},
    "dual_module": {"name": "dual_module", "r": 4},
    "shared_b": {"name": "shared_b"},
    "molora": {"name": "molora", "r": 4},
    "droplora": {"name": "droplora", "r": 4},
    "full": {"name": "full"},
}
BASE: dict[str, Any] = {
    "model": {"name": "builtin:tiny"},
    "data": {
        "train": "builtin:shift?n=400",
        "validation": "builtin:shift?n=200",
        "test": "builtin:shift?n=10",
    },
    "training": {
        "max_steps": 60,
        "per_device_train_batch_size": 8,
        "logging_steps": 20,
        "save_strategy": "no",
        "eval_strategy": "no",
        "use_cpu": True,
    },
    "evaluation": {"generate": False, "batch_size": 100},
}
GRID = [5e-4 * 2**k for k in range(6)]
MOST = 14  # rates of an arm


def sweep(measure: Any) -> dict[float, float | None]:
    """Return rate -> loss over the grid, grown by factors of 2 until the least is inside."""
    values = {rate: measure(rate) for rate in GRID}
    while len(values) < MOST:
        known = {rate: value for rate, value in values.items() if value is not None}
        best, rates = min(known, key=lambda rate: known[rate]), sorted(values)
        if best not in (rates[0], rates[-1]):
            break
        more = best / 2 if best == rates[0] else best * 2
        values[more] = measure(more)
    return dict(sorted(values.items()))


def top(values: dict[float, float | None]) -> float:
    """Return the rate at the least of a parabola through the least value and its neighbours."""
    rates = sorted(values)
    best = min((r for r in rates if values[r] is not None), key=lambda r: values[r] or 0.0)
    place = rates.index(best)
    if not 0 < place < len(rates) - 1:
        return best
    left, middle, right = (values[r] for r in rates[place - 1 : place + 2])
    if left is None or middle is None or right is None:
        return best
    return best * 2 ** (0.5 * (left - right) / (left - 2 * middle + right))


def regret(values: dict[float, float | None], rate: float, before: float) -> float:
    """Return the loss at a rate above the least, as a share of what training gains at best.

    The loss between two rates of the grid is interpolated in the logarithm of the rate.
    """
    known = [(math.log(r), v) for r, v in values.items() if v is not None]
    least, at = min(v for _, v in known), math.log(rate)
    inside = min(max(at, known[0][0]), known[-1][0])
    for (a, low), (b, high) in itertools.pairwise(known):
        if a <= inside <= b:
            loss = low + (high - low) * (inside - a) / (b - a)
            return (loss - least) / (before - least)
    raise AssertionError("inside the grid")


def main() -> None:
    """Sweep the arms that have no results yet; write what is found, with new predictions."""
    parser(__doc__).parse_args()
    results = read_results(RESULTS)
    rows: dict[str, Any] = results.get("arms", {})
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "study.yaml")
        file.write_text(json.dumps({"base": BASE, "arms": ARMS, "dir": f"{scratch}/out"}))
        study = read_study(file)
        study.folder.mkdir()
        with Pool(study.folder, 1) as pool:

            def measure(arm: str, rate: float) -> float | None:
                trials = study.tuning(arm, "", rate)
                pool.run(trials)
                return value_of(trials[0], study.folder, "loss")

            before = results.get("before") or measure(ANCHOR, 1e-12)
            for arm in ARMS:
                if arm not in rows:
                    losses = sweep(lambda rate, arm=arm: measure(arm, rate))
                    best = top(losses)
                    losses = {f"{rate:.6g}": loss for rate, loss in losses.items()}
                    rows[arm] = {"method": ARMS[arm], "best": best, "losses": losses}
                    print(arm, best, flush=True)
        assert before is not None
        rates = predicted(study, "", rows[ANCHOR]["best"])
    for arm, carried in rates.items():
        row = rows[arm]
        losses = {float(rate): loss for rate, loss in row["losses"].items()}
        row["carried"] = carried
        for name, rate in (("carried", carried), ("anchor", rows[ANCHOR]["best"])):
            row[f"octaves_{name}"] = math.log2(rate / row["best"])
            row[f"regret_{name}"] = regret(losses, rate, before)
    results = {"base": BASE, "before": before, "arms": rows, "environment": environment()}
    write_results(RESULTS, results, tables(results))


def tables(results: dict[str, Any]) -> str:
    """Return the table of the arms as Markdown."""
    head = ["method", "best rate", "carried over", "octaves off", "regret"]
    head += ["LoRA's own rate: octaves off", "regret"]
    rows = [
        (
            arm,
            f"{row['best']:.3g}",
            f"{row['carried']:.3g}",
            f"{row['octaves_carried']:+.1f}",
            f"{100 * row['regret_carried']:.1f} %",
            f"{row['octaves_anchor']:+.1f}",
            f"{100 * row['regret_anchor']:.1f} %",
        )
        for arm, row in results["arms"].items()
        if arm != ANCHOR
    ]
    return table(head, rows, "|---|" + "---:|" * (len(head) - 1))


if __name__ == "__main__":
    main()
