"""The engine: starts, ties and restarts links as optimizer steps complete.

`start` attaches a Chain to a model. From then on it follows the optimizer through plait's events:
it counts completed steps of the optimizer that holds the links, so a step that a gradient scaler
skips does not count. At a boundary the live link is recorded in the ledger, the trunk is rebuilt
from the ledger, a new link starts, and the optimizer's state of the old link is dropped.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import Optimizer

from plait.chain.ledger import Ledger, Record
from plait.chain.links import Link, find_links
from plait.chain.plan import ChainPlan
from plait.core import events
from plait.core.events import EventNeverFired, PlaitWarning
from plait.core.trunk import Trunk, trunk_of
from plait.upstream.export import to_lora

WIDE = 256  # a trunk of more ranks costs more than merging would

_ATTRIBUTE = "plait_chain"


class Chain(events.Listener):
    """A plan at work on one adapter of one model.

    Attributes:
        plan: the plan. ledger: the finished links and the progress of the chain.
        lengths: optimizer steps of each link. links: the live link of each layer.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, links: list[Link]) -> None:
        self.plan, self.ledger, self.links = ledger.plan, ledger, links
        self.lengths = self.plan.lengths(ledger.total_steps)
        self.blocks = list(dict.fromkeys(link.block for link in links))
        self.follows = False  # an optimizer; not after loading for inference
        self.seen = 0  # steps since the start or the resume
        self.checked: int | None = None  # id of the optimizer that was checked
        setattr(model, _ATTRIBUTE, self)

    # Progress -----------------------------------------------------------------------------------

    @property
    def boundaries(self) -> list[int]:
        """Numbers of completed steps at which a link is tied."""
        ends = [sum(self.lengths[: k + 1]) for k in range(len(self.lengths))]
        return ends[:-1]

    @property
    def ties(self) -> int:
        """Links finished so far."""
        return self.ledger.link

    def selected(self) -> list[Link]:
        """The layers that the live link trains."""
        if not self.plan.by_block:
            return self.links
        chosen = self.plan.chosen(self.ledger.link, self.blocks)
        return [link for link in self.links if link.block in chosen]

    # Events -------------------------------------------------------------------------------------

    def parameters(self) -> Iterable[nn.Parameter]:
        """Parameters of the live links; none while the chain follows no optimizer."""
        return [p for link in self.links for p in link.parameters()] if self.follows else []

    def before_step(self, optimizer: Optimizer) -> None:
        """Check an optimizer when it is first seen; drop the gradients of inactive links."""
        if self.checked != id(optimizer):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for link in self.links:
                if any(id(p) not in held for p in link.trained(self.plan)):
                    raise ValueError(
                        f"chain: this optimizer holds only a part of the adapter ({link.name} is "
                        "missing). Give all its parameters to one optimizer; if the plan switches "
                        "blocks off, make it before the chain starts."
                    )
            self.checked = id(optimizer)
        if self.plan.by_block:
            on = {link.name for link in self.selected()}
            for link in self.links:
                if link.name not in on:
                    for p in link.parameters():  # AdamW would decay what it has a gradient for
                        p.grad = None

    def after_step(self, optimizer: Optimizer) -> None:
        """Count the step; tie the link at a boundary."""
        self.ledger.step += 1
        self.seen += 1
        boundaries = self.boundaries
        if self.ties < len(boundaries) and self.ledger.step == boundaries[self.ties]:
            self.tie(optimizer)

    @torch.no_grad()
    def tie(self, optimizer: Any = None) -> None:
        """Finish the live link and start the next one.

        Args:
            optimizer: holds the links; its state of them is dropped.

        Raises:
            ValueError: an adapter is merged, or there is no optimizer to reset.
        """
        number = self.ledger.link
        if optimizer is None and self.plan.reset_optimizer:
            raise ValueError(
                "chain: reset_optimizer is true and no optimizer is known. Call "
                "plait.after_step(model, optimizer), or set reset_optimizer to false."
            )
        for link in self.selected():
            if link.layer.merged:
                raise ValueError(
                    f"chain: {link.name} is merged, so the link cannot be tied. Call "
                    "unmerge_adapter() before training."
                )
            A, B, s = link.read(self.plan.rank(number, link.r))
            steps = self.lengths[number]
            self.ledger.records.append(Record(number, link.name, A, B, s, steps))
        self.ledger.link = number + 1
        self._set_trunks()
        for link in self.links:
            link.start(self.plan, self.ledger.link, self.lengths[self.ledger.link])
            for p in link.parameters():
                p.grad = None
                if optimizer is not None and self.plan.reset_optimizer:
                    for part in events.parts(optimizer):
                        part.state.pop(p, None)
        self._open()

    def finish(self, steps: int | None = None) -> None:
        """Check at the end of training that every planned tie happened.

        Args:
            steps: optimizer steps since the start or the resume, if training stopped early.

        Raises:
            EventNeverFired: fewer ties than planned.
        """
        planned = len(self.boundaries)
        if self.ties >= planned or (steps is not None and (self.seen or not steps)):
            return
        raise EventNeverFired(
            f"chain: training ended after {self.ledger.step} completed optimizer steps with "
            f"{self.ties} of {planned} ties. Train {self.ledger.total_steps} steps with a torch "
            "optimizer that holds the adapter, or call plait.after_step(model, optimizer)."
        )

    # State ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write the ledger, chain.safetensors and chain.json, into a folder."""
        frozen = {link.name: link.frozen(self.plan) for link in self.links}
        self.ledger.frozen = {n: p.detach().clone() for n, p in frozen.items() if p is not None}
        self.ledger.save(folder)

    @torch.no_grad()
    def restore(self, ledger: Ledger) -> None:
        """Continue from a ledger. The live link's weights are loaded with the adapter."""
        self.ledger = ledger
        for link in self.links:
            frozen = link.frozen(self.plan)
            if frozen is not None and link.name in ledger.frozen:
                frozen.copy_(ledger.frozen[link.name])
            if self.follows:
                link.resume(self.plan, ledger.link, self.lengths[ledger.link])
        self._set_trunks()
        self._open()

    def _set_trunks(self) -> None:
        for link in self.links:
            stacked = self.ledger.stacked(link.name)
            trunk = trunk_of(link.layer)
            if stacked is not None:
                if trunk is None:
                    trunk = Trunk(link.layer, link.adapter, self.plan.storage)
                trunk.set(*stacked)
            elif trunk is not None:
                trunk.remove()

    def _open(self) -> None:
        """Turn on the gradients of what the live link trains, and no others."""
        if not self.follows:
            return
        on = {link.name for link in self.selected()}
        # DDP's reducer counts on every parameter that it was made with.
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        for link in self.links:
            for p in link.trained(self.plan):
                p.requires_grad_(parallel or link.name in on)
            frozen = link.frozen(self.plan)
            if frozen is not None:
                frozen.requires_grad_(False)
            if self.plan.by_block:
                link.switch(link.name in on or not parallel)

    def close(self) -> None:
        """Remove the trunk and stop following the optimizer; the live link stays."""
        for link in self.links:
            if self.follows:
                for p in link.trained(self.plan):
                    p.requires_grad_(True)
            trunk = trunk_of(link.layer)
            if trunk is not None:
                trunk.remove()
            if self.plan.by_block:
                link.switch(True)
        self.follows = False


def start(
    model: nn.Module,
    plan: ChainPlan,
    total_steps: int,
    *,
    adapter: str | None = None,
    resume: str | Path | None = None,
) -> Chain:
    """Start a chain on a model's adapter; from now on it follows the optimizer.

    Example:
        >>> import plait
        >>> plan = plait.ChainPlan.chain(links=3)
        >>> chain = plait.chain.start(model, plan, total_steps=300)  # doctest: +SKIP
        >>> ...  # any training loop with a torch optimizer  # doctest: +SKIP
        >>> chain.finish()  # doctest: +SKIP

    Args:
        model: with an adapter that trains. If the plan freezes a side, wrap it in DDP afterwards.
        plan: the links and their schedule.
        total_steps: planned optimizer steps.
        adapter: its name; None: the active one.
        resume: folder that `Chain.save` wrote. The caller loads the adapter's weights and the
            optimizer's state.

    Raises:
        ValueError: model, adapter or ledger do not fit the plan, with the reason; the model
            carries a chain already.
        FileNotFoundError: no ledger to resume from.
    """
    model = unwrap(model)
    if chain_of(model) is not None:
        raise ValueError(
            "chain: the model carries a chain already. Save it (plait.chain.save_stacked) and take "
            "it off with plait.chain.remove(model)."
        )
    adapter = _active(model) if adapter is None else adapter
    links = find_links(model, plan, adapter)
    lengths = plan.lengths(total_steps)
    for link in links:
        if any(not p.requires_grad for p in link.trained(plan)):
            raise ValueError(
                f"chain: the adapter of {link.name} is frozen. Load it with is_trainable=True."
            )
        link.check(lengths)
    names = [link.name for link in links]
    if resume is not None:
        ledger = Ledger.load(resume)
        ledger.check(plan, total_steps, resume)
        ledger.check_model({link.name: link.shape for link in links}, resume)
    else:
        ledger = Ledger(plan, total_steps, adapter, names)
    _warn(plan, links, len(lengths))
    if resume is None:
        for link in links:
            link.start(plan, 0, lengths[0])
    chain = Chain(model, ledger, links)
    chain.follows = True
    if plan.by_block:
        plan.chosen(0, chain.blocks)
    chain.restore(ledger)
    events.listen(chain)
    return chain


def load(model: nn.Module, folder: str | Path, *, adapter: str | None = None) -> Chain:
    """Put the finished links of a saved chain on a model that has its live link.

    Example:
        >>> model = PeftModel.from_pretrained(base, folder)  # doctest: +SKIP
        >>> chain = plait.chain.load(model, folder)  # doctest: +SKIP

    Args:
        model: with the adapter of the same folder.
        folder: that `Chain.save` wrote.
        adapter: its name; None: the active one.

    Raises:
        ValueError: a damaged ledger, or one of another model.
        FileNotFoundError: no ledger there.
    """
    model = unwrap(model)
    if chain_of(model) is not None:
        remove(model)
    ledger = Ledger.load(folder)
    links = find_links(model, ledger.plan, _active(model) if adapter is None else adapter)
    ledger.check_model({link.name: link.shape for link in links}, folder)
    chain = Chain(model, ledger, links)
    chain.restore(ledger)
    return chain


def chain_of(model: nn.Module) -> Chain | None:
    """The chain of a model, if it carries one."""
    return vars(unwrap(model)).get(_ATTRIBUTE)


def remove(model: nn.Module) -> None:
    """Remove a chain's finished links from a model; the live link stays as its adapter.

    Raises:
        ValueError: the model carries no chain.
    """
    _carried(model).close()
    delattr(unwrap(model), _ATTRIBUTE)


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the ledger of a model's chain beside its adapter; `load` reads it.

    Raises:
        ValueError: the model carries no chain.
    """
    _carried(model).save(folder)


def save_stacked(
    model: nn.Module,
    folder: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    compact: bool = False,
    lossy: bool = False,
) -> None:
    """Write a chain, the live link included, as one plain LoRA that stock peft loads.

    `[s_1 B_1 | .. | s_K B_K] [A_1; ..; A_K]` with lora_alpha = rank, so with scaling 1. A layer
    whose ranks exceed min(in, out) is compressed to that, which is exact.

    Args:
        model: a PeftModel with a chain.
        folder: to write.
        rank, energy, compact: as in plait.to_lora; the first two lose a part of the update.
        lossy: write even where more than 1 % of a layer's update is lost.

    Raises:
        ValueError: the model carries no chain, or so much is lost and lossy is not given.
    """
    chain = _carried(model)
    base: Any = unwrap(model)
    export = to_lora(base, chain.ledger.adapter, rank=rank, energy=energy, compact=compact)
    export.write(folder, lossy=lossy)


def merge(model: nn.Module) -> nn.Module:
    """Merge all links, the live one included, into the base weights; returns the base model.

    Raises:
        ValueError: the model carries no chain, or a merged weight is not finite.
        NotMergeable: a quantised base.
    """
    _carried(model)
    tuner: Any = unwrap(model)
    merged = tuner.merge_and_unload(safe_merge=True)
    delattr(tuner, _ATTRIBUTE)
    return merged


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside data-parallel wrappers."""
    while isinstance(model, DistributedDataParallel | DataParallel):
        model = model.module
    return model


def _carried(model: nn.Module) -> Chain:
    chain = chain_of(model)
    if chain is None:
        raise ValueError("chain: the model carries no chain. Start or load one first.")
    return chain


def _active(model: nn.Module) -> str:
    names = list(model.active_adapters) if isinstance(model, PeftModel) else ["default"]
    if len(names) != 1:
        raise ValueError(f"chain: {len(names)} adapters are active. Name one: adapter=...")
    return names[0]


def _warn(plan: ChainPlan, links: list[Link], count: int) -> None:
    """Warn if the other storage would be cheaper or more precise."""
    if plan.storage == "merge" and any(link.half for link in links):
        text = (
            'chain: storage = "merge" rounds the sum of the finished links to the type of the '
            'base, which is half precision. storage="stack" keeps them in fp32.'
        )
        warnings.warn(text, PlaitWarning, stacklevel=3)
    finished = sum(plan.rank(k, min(link.r for link in links)) for k in range(count - 1))
    if plan.by_block:
        chosen = plan.blocks_per_link
        share = chosen if isinstance(chosen, float) else chosen / len({x.block for x in links})
        finished = round(finished * share)
    if plan.storage == "stack" and finished > WIDE:
        text = (
            f"chain: the finished links will have {finished} ranks a layer, which every forward "
            f'pays for. On a single-precision base storage="merge" costs nothing a step.'
        )
        warnings.warn(text, PlaitWarning, stacklevel=3)
