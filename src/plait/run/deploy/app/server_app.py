"""The server program: all rounds of the run whose config file lies beside it.

Flower starts it once for a run, in the folder that the SuperLink was started in; relative paths of
the config file count from there. Whatever it raises makes the Flower run fail, and the details of
the run's status name the type of the error. Run config: `resume`, a bool.

A reply may be announced before its bytes are there; they are asked for again after 0.05 s, and not
after 1 s as by flwr 1.40 and 1.41.
"""

from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.inflatable.inflatable_utils import pull_objects

from plait.federated.engines.flower import GridExchange
from plait.run.federated.conduct import conduct, load_federate_config

_pull: Any = pull_objects
_pull.__kwdefaults__["initial_backoff"] = 0.05  # seconds, doubled each time

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run it, or what is left of it."""
    try:
        config = load_federate_config(Path(__file__).with_name("run.yaml"))
        exchange = GridExchange(
            grid,
            wait=config.timeouts.online(),
            deadlines=config.timeouts.deadlines(),
            least=config.guard.min_updates,
        )
        resume = bool(context.run_config["resume"])
        conduct(config, exchange, resume=resume, done=lambda record: print(record, flush=True))
    except Exception as error:  # Flower keeps the text alone
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
