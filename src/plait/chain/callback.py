"""A Trainer callback that starts, resumes and saves a chain, and checks that its ties happened.

Plait's optimizer events make the ties, so they do not depend on the Trainer's step count.
"""

from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from plait.chain.engine import Chain, chain_of, remove, start
from plait.chain.ledger import Ledger
from plait.chain.links import find_links
from plait.chain.plan import ChainPlan, ChainSchedule, signature


class ChainCallback(TrainerCallback):
    """Runs a plan over one training run of Trainer or TRL.

    Example:
        >>> import plait
        >>> plan = plait.ChainPlan.chain(links=3)
        >>> callback = plait.ChainCallback(plan)

    With `lr="restart"` give the Trainer the schedule as well:
    `optimizers=(optimizer, plait.chain_schedule(plan, optimizer, total_steps))`.

    Each checkpoint holds the ledger, from which a resumed run continues. `load_best_model_at_end`
    restores the finished links of the best checkpoint.

    Args:
        plan: the links and their schedule.
        adapter: name of the adapter; None: the active one.
        checkpoint: folder to resume from; None: `checkpoint-STEP` in the Trainer's output folder.
    """

    def __init__(
        self, plan: ChainPlan, adapter: str | None = None, checkpoint: str | Path | None = None
    ) -> None:
        self.plan, self.adapter, self.checkpoint = plan, adapter, checkpoint
        self.chain: Chain | None = None
        self.first = 0

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Freeze the sketched side before the optimizer and DDP see the parameters."""
        model = kwargs.get("model")
        if model is None or self.plan.freeze is None or chain_of(model) is not None:
            return
        name = self.adapter or model.active_adapters[0]
        for link in find_links(model, self.plan, name):
            frozen = link.frozen(self.plan)
            if frozen is not None:
                frozen.requires_grad_(False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the chain, or continue from the checkpoint's ledger.

        Raises:
            ValueError: the plan does not fit the model, the optimizer, the schedule or the ledger.
            FileNotFoundError: a resumed checkpoint without a ledger.
        """
        model, resume = kwargs["model"], None
        self._check_schedule(kwargs.get("lr_scheduler"), state.max_steps)
        if state.global_step:
            resume = self.checkpoint or _checkpoint(args, state.global_step)
            if chain_of(model) is not None:
                remove(model)
        self.chain = start(model, self.plan, state.max_steps, adapter=self.adapter, resume=resume)
        self.first = state.global_step
        optimizer = kwargs.get("optimizer")
        if optimizer is not None:
            self._check_optimizer(vars(optimizer).get("optimizer", optimizer))

    def _check_schedule(self, scheduler: Any, total_steps: int) -> None:
        """Raise ValueError if schedule and plan do not restart at the same steps."""
        lengths = self.plan.lengths(total_steps)
        scheduler = None if scheduler is None else vars(scheduler).get("scheduler", scheduler)
        if isinstance(scheduler, ChainSchedule):
            planned = signature(self.plan, total_steps)
            if scheduler.signature != planned:
                raise ValueError(
                    f"chain: the schedule was made for links of {scheduler.signature}, the plan "
                    f"has {planned}. Make both from one plan and one number of steps."
                )
        elif self.plan.lr == "restart" and len(lengths) > 1:
            raise ValueError(
                'chain: lr = "restart", but the Trainer\'s schedule does not restart. Pass '
                f"optimizers=(optimizer, plait.chain_schedule(plan, optimizer, {total_steps})), or "
                'set lr="global".'
            )

    def _check_optimizer(self, optimizer: Optimizer) -> None:
        """Raise ValueError if the optimizer does not hold the adapter's own parameters."""
        assert self.chain is not None
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in self.chain.parameters()):
            raise ValueError(
                "chain: the optimizer holds none of the adapter's parameters, but flattened or "
                "sharded copies (DeepSpeed ZeRO, FSDP), or another model's. There is no state of a "
                "parameter to reset. Train in one process or with DDP."
            )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the ledger into the checkpoint."""
        if self.chain is not None and args.should_save:
            self.chain.save(_checkpoint(args, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check that the ties happened; restore the links of the best checkpoint if asked for.

        Raises:
            EventNeverFired: fewer ties than planned.
        """
        if self.chain is None:
            return
        done = state.global_step >= state.max_steps
        self.chain.finish(None if done else state.global_step - self.first)
        self.chain.follows = False
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.chain.restore(Ledger.load(state.best_model_checkpoint))


def _checkpoint(args: Any, step: int) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
