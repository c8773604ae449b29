"""The server program: all rounds of the run whose config file lies beside it.

Flower starts it once for a run, in the folder in which the SuperLink was started; relative paths of
the config file count from there. Any exception makes the Flower run fail, and the details of the
run's status name its type. Run config: `resume`, a bool.
"""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from plait.federated.engines.flower.exchange import GridExchange
from plait.run.federated.conduct import conduct, open_folder
from plait.run.federated.config import load_federate_config
from plait.run.federated.setup import prepare_federation

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds, or those that are left."""
    try:
        config = load_federate_config(Path(__file__).with_name("run.yaml"))
        resume = bool(context.run_config["resume"])
        open_folder(config, resume)  # refuses before anything is loaded
        exchange = GridExchange(
            grid,
            wait=config.timeouts.online(),
            deadlines=config.timeouts.deadlines(),
            least=config.guard.min_updates,
        )
        setup = prepare_federation(config)
        conduct(setup, exchange, resume=resume, done=lambda record: print(record, flush=True))
    except Exception as error:  # Flower keeps the text alone
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
