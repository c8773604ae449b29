"""The bridge to peft: a tuner model and a tuner layer that host any Delta.

`host` gives a method its own peft type (`PLAIT_<KEY>`), parameter prefix and layer class, so that
checkpoints describe themselves. The base weight is edited by merge alone. This file knows how peft
hosts a method, `plait/upstream` what peft's own methods look like; nothing else uses what is
private to peft.
"""

import copy
import functools
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import constants, file_exists, try_to_load_from_cache
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    SAFETENSORS_WEIGHTS_NAME,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    WEIGHTS_NAME,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.other import (
    AuxiliaryTrainingWrapper,
    ModulesToSaveWrapper,
    TrainableTokensWrapper,
    get_pattern_key,
)
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from plait.core import combine, events
from plait.core.config import DeltaConfig
from plait.core.delta import Delta, FrozenLinear, NotMergeable
from plait.core.init import seeded
from plait.core.mix import task_index
from plait.core.precision import keep_wide
from plait.core.route import BASE, NOWHERE, Route, Rows, split_bias, split_saved
from plait.core.sharding import refuse_sharded
from plait.kernels.grouped import segments


def add_peft_type(name: str) -> PeftType:
    """Add a member to peft's closed enum of methods; idempotent.

    `register_peft_method` refuses a name that the enum lacks, and peft has no entry points. This is
    all that plait changes in peft, and a test checks it against the installed version.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def host(key: str, config: type[DeltaConfig], delta: type[Delta]) -> None:
    """Register a method with peft: its type, prefix, layer class and tuner class.

    Args:
        key: of the registry. config, delta: the method's classes.

    Raises:
        ValueError: peft has a method of this type already.
    """
    name = f"plait_{key}"
    peft_type = add_peft_type(name.upper())
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"peft already hosts a method of type {peft_type.value}. Choose another key."
        )
    shared = {"prefix": f"{name}_", "__module__": delta.__module__}
    layer = type(f"{delta.__name__}Linear", (PlaitLayer,), {**shared, "delta_cls": delta})
    layer.adapter_layer_names = (f"{name}_delta",)
    facts = {"tuner_layer_cls": layer, "uses_shared_state": bool(delta.shared)}
    tuner = type(f"{delta.__name__}Model", (PlaitModel,), {**shared, **facts})
    for cls in (layer, tuner):  # where pickle looks for them
        setattr(sys.modules[delta.__module__], cls.__name__, cls)
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=f"{name}_")


def _watch_peft_model(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    """Prepare a PeftModel that takes a PlaitModel as its base_model.

    It captures task_ids from the forward: PeftModelFor* names `task_ids` and drops it for every
    method but Poly. Saving and loading refuse pickles. The tuner is made before its PeftModel, so
    torch's public registration hook is the first chance to see it.
    """
    if isinstance(child, PlaitModel) and isinstance(parent, PeftModel):
        parent.register_forward_pre_hook(child.plait_route.capture_args, with_kwargs=True)
        parent.register_forward_hook(child.plait_route.clear_args, always_call=True)
        parent.save_pretrained = partial(_save_pretrained, parent)
        parent.load_adapter = partial(_load_adapter, parent)


register_module_module_registration_hook(_watch_peft_model)


class PlaitLayer(nn.Module, BaseTunerLayer):
    """A frozen linear layer with its Deltas, one for each adapter.

    `plait_delta[adapter]` is the Delta; in the state dict it has the prefix of its method.
    """

    prefix: str
    delta_cls: type[Delta]
    plait_trunk: Any = None  # the finished links of a chain, see core/trunk.py

    def __init__(self, base_layer: nn.Module, name: str, route: Route, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.route = name, route
        base: Any = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(base, **quantization)
        self.transposed = isinstance(base, Conv1D)  # GPT-2 stores (in, out)
        if self.transposed:
            self.in_features, self.out_features = base.weight.shape
        elif isinstance(base, nn.Linear) or self.quantization_backend is not None:
            self.in_features, self.out_features = base.in_features, base.out_features
        else:
            raise ValueError(
                f"Target module {name} is a {type(base).__name__}; plait adapts torch.nn.Linear, "
                "transformers' Conv1D and quantised linear layers. Leave it out of target_modules."
            )
        self.add_module(self.adapter_layer_names[0], nn.ModuleDict())
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.unmerged: Tensor | None = None  # the base weight while adapters are merged
        self.train(base.training)

    @property
    def plait_delta(self) -> nn.ModuleDict:
        """Adapter name -> Delta."""
        return self._modules[self.adapter_layer_names[0]]  # type: ignore[return-value]

    def base_weight(self) -> Tensor:
        """The base weight as (out, in), dequantised, with the finished links of a chain."""
        weight = self.get_base_weight()
        weight = weight.T if self.transposed else weight
        return weight if self.plait_trunk is None else self.plait_trunk.effective(weight)

    def add_delta(self, adapter: str, config: DeltaConfig, siblings: Iterable[Any] = ()) -> None:
        """Create the Delta of an adapter with this layer's rank and scale.

        Args:
            adapter: its name.
            config: its config.
            siblings: Deltas of the same adapter that were made before, for shared tensors.

        Raises:
            ValueError: the layer is sharded (FSDP2).
        """
        resolved = copy.copy(config)
        resolved.r = config.rank_pattern.get(
            get_pattern_key(list(config.rank_pattern), self.name), config.r
        )
        resolved.lora_alpha = config.alpha_pattern.get(
            get_pattern_key(list(config.alpha_pattern), self.name), config.lora_alpha
        )
        remedy = "Add adapters first, then call fully_shard."
        refuse_sharded(self.get_base_layer(), f"adapter {adapter!r} on {self.name}", remedy)
        weight: Any = self.get_base_layer().weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        base = FrozenLinear(
            name=self.name,
            in_features=self.in_features,
            out_features=self.out_features,
            dtype=wide,
            read=self.base_weight,
            blank=config.awaits_weights or not config.init_weights,
        )
        delta = self._start(adapter, base, resolved)
        delta.adapter = config
        delta.awaits_weights = config.awaits_weights
        alike = (resolved.r, self.in_features, self.out_features)
        owner = next((d for d in siblings if d.alike == alike and not d.owner), None)
        empty = any(p.is_meta for p in delta.parameters())  # low_cpu_mem_usage: filled on load
        if weight.is_meta or not empty:
            delta.to(device=weight.device, dtype=wide)
        if owner is not None:
            delta.borrow(owner)
        self.route.wants_mask |= delta.wants_mask
        self.plait_delta[adapter] = delta.train(self.training)
        events.watch(delta)

    def _start(self, adapter: str, base: FrozenLinear, config: DeltaConfig) -> Delta:
        """A Delta as its config starts it; `base` and `config` are this layer's."""
        delta = self.delta_cls(base, config, seeded(config.seed, self.name))
        if not config.init_weights:
            delta.randomize(seeded(config.seed, self.name, adapter))
        return delta

    def _untouched(self, adapter: str) -> bool:
        """Whether the parameters of an adapter are those of its start."""
        delta: Any = self.plait_delta[adapter]
        start = self._start(adapter, delta.base, delta.config)
        return all(
            p.is_meta or torch.equal(p, start.get_parameter(name).to(p))
            for name, p in delta.named_parameters()
        )

    def _weights_came(self, delta: Any) -> bool:
        """Whether a Delta that waits for its weights got them in place, and has no other state."""
        name = next(n for n, d in self.plait_delta.items() if d is delta)
        if any(value is not None for value in delta.state().values()) or self._untouched(name):
            return False
        delta.awaits_weights = False
        return True

    def complete_copies(self, *used: Any) -> None:
        """Give an adapter whose parameters were copied from another one that one's state, too.

        Libraries copy an adapter by `add_adapter(name, config)` and its parameters alone, such as
        TRL for the reference model. State is in buffers (steps, live ranks, starts). It is copied
        before the first step after that changes the original, and whenever the copy is used.

        Args:
            used: the Deltas that are about to be used.

        Raises:
            RuntimeError: the original is a chain, whose finished links no adapter can hold.
        """
        deltas: Any = self.plait_delta
        if len(deltas) < 2 or torch.compiler.is_compiling():
            return
        for name, delta in deltas.items():
            if not self._may_copy(delta):
                continue
            for source, original in deltas.items():
                again = delta.state_from == "copy" and not any(delta is one for one in used)
                if delta is original or again or not delta.copies(original):
                    continue
                if delta.awaits_weights and not original.lived and self._untouched(name):
                    continue  # equal because both are at the same start
                if self.plait_trunk is not None and self.plait_trunk.adapter == source:
                    raise RuntimeError(
                        f"{self.name}: adapter {name!r} is a copy of {source!r}, which is a chain: "
                        "its finished links were not copied. Stack it first, "
                        "plait.chain.save_stacked, and load that adapter."
                    )
                delta.adopt(original)
                break

    def _may_copy(self, delta: Any) -> bool:
        """Whether an adapter may be a copy, with something to copy beside its parameters."""
        if delta.stepped or delta.state_from == "file":
            return False
        return bool(
            self.plait_trunk is not None
            or delta.awaits_weights
            or delta._modules
            or any(b is not None for b in delta._buffers.values())
        )

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the layer's device; factors stay fp32 whatever the base is."""
        if adapter_name in self.plait_delta:
            base: Any = self.get_base_layer()
            self.plait_delta[adapter_name].to(device or base.weight.device)

    def _apply(self, fn: Any, recurse: bool = True) -> "PlaitLayer":
        """Move or cast; while adapters are merged, the kept base weight, too."""
        super()._apply(fn, recurse)
        if self.unmerged is not None:
            self.unmerged = fn(self.unmerged)
        return self

    def cast(self, adapter: str, keep_wide: bool) -> None:
        """Cast the factors to fp32 (fp64 on an fp64 base), or to the base weight's dtype."""
        base: Any = self.get_base_layer()
        dtype = base.weight.dtype
        if keep_wide or not dtype.is_floating_point:
            dtype = (
                torch.promote_types(dtype, torch.float32)
                if dtype.is_floating_point
                else torch.float32
            )
        self.plait_delta[adapter].to(dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus the updates of the active adapters, (.., out)."""
        own = self.__dict__
        if own["_disable_adapters"]:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        route, modules = own["route"], own["_modules"]
        rows = route.current_rows(x.shape[0]) if route.used else NOWHERE
        if rows.names is not None:
            return self._mixed(x, rows, *args, **kwargs)
        base: Any = modules["base_layer"]
        if own["merged_adapters"]:
            return base(x, *args, **kwargs)
        deltas: Any = modules[self.adapter_layer_names[0]]._modules
        names = self.active_adapters
        if len(names) == 1 and names[0] in deltas:
            active = [deltas[names[0]]]
        else:
            active = [deltas[a] for a in names if a in deltas]
        for delta in active:
            self._begin(delta, deltas)
        if not active:
            return base(x, *args, **kwargs)
        if route.default_task is not None or not x.is_floating_point():
            rows = self._checked(x, rows)
        if not (args or kwargs) and self._can_join(active[0], base, x):
            # Nobody else has the sum, so that the next updates are added to it in place.
            parameters = base._parameters
            weight = parameters["weight"].t() if self.transposed else parameters["weight"]
            y = active[0].joint(x, weight, parameters["bias"], rows)
            for delta in active[1:]:
                y = self._added(delta, x, rows, y)
            return y
        y = base(x, *args, **kwargs)
        for delta in active:
            y = y + delta(x, rows).to(y.dtype)
        return y

    def _added(self, delta: Any, x: Tensor, rows: Rows, y: Tensor) -> Tensor:
        """The sum y (.., out) with one more update, in place where the Delta can."""
        if delta.adds and delta.joint_is_forward and _unwatched(delta):
            return delta.joint(x, None, None, rows, y)
        return y + delta(x, rows).to(y.dtype)

    def _checked(self, x: Tensor, rows: Rows) -> Rows:
        """The rows of the batch, with the default task in evaluation.

        Raises:
            TypeError: the input is not floating.
        """
        if not torch.is_floating_point(x):
            raise TypeError(
                f"{self.name}: the input has dtype {x.dtype}; plait needs a floating one."
            )
        default = self.route.default_task
        if default is not None and rows.task_ids is None and not self.training:
            ids = torch.full(x.shape[:1], default, device=x.device)
            rows = replace(rows, task_ids=ids)
        return rows

    def _update(self, delta: Any, x: Tensor, rows: Rows) -> Tensor:
        """The update (.., out) of one Delta on its rows of the batch."""
        return delta(x, self._checked(x, rows))

    def _begin(self, delta: Any, deltas: Any) -> None:
        """Count a training forward for the guard; refuse a Delta whose weights were not loaded."""
        if len(deltas) > 1:
            self.complete_copies(delta)
        if delta.awaits_weights and not self._weights_came(delta):
            raise RuntimeError(
                f"{self.name}: this adapter was made from a saved config and its weights were not "
                "loaded. Use PeftModel.from_pretrained(base, path), or a new config to train."
            )
        if delta.training and torch.is_grad_enabled():
            delta.__dict__["forwards"] += 1  # nn.Module's way takes ten times as long

    def _mixed(self, x: Tensor, rows: Rows, *args: Any, **kwargs: Any) -> Tensor:
        """A batch with an adapter for each row; rows of BASE keep the base layer's output."""
        names = rows.names or ()
        if self.plait_trunk is not None:
            self.plait_trunk.refuse_mixed()
        if self.merged:
            raise ValueError(
                "adapter_names cannot be used while adapters are merged. Call unmerge_adapter()."
            )
        if len(names) != x.shape[0]:
            raise ValueError(
                f"adapter_names has {len(names)} entries, the batch at {self.name} has "
                f"{x.shape[0]} rows. Give one name for each row; leave layers without rows, such "
                "as those of relative positions, out of target_modules."
            )
        deltas: Any = self.plait_delta._modules
        parts = segments(names, frozenset(deltas))  # the other rows: BASE, or not of this layer
        used = [deltas[name] for name in parts.adapters]
        self.complete_copies(*used)
        for delta in used:
            self._begin(delta, {})
        grouped: Any = _one_kind(used, x)
        joins = grouped and not (args or kwargs) and self._can_join(used[0], self.base_layer, x)
        if joins:
            base: Any = self.base_layer._parameters
            weight = base["weight"].t() if self.transposed else base["weight"]
            y = grouped.together(used, parts, x, weight, base["bias"])
            if y is not None:
                return y
        y = self.base_layer(x, *args, **kwargs)
        if grouped and not joins:
            own = y.clone(memory_format=torch.contiguous_format)  # others may hold y
            summed = grouped.together(used, parts, x, None, None, own)
            if summed is not None:
                return summed
        for delta, own in zip(used, parts.rows, strict=True):
            index = torch.tensor(own, device=x.device)
            with delta.drawing(x.device):
                update = self._update(delta, x[index], rows.of(index))
            y = y.index_add(0, index, update.to(y.dtype))
        return y

    def _can_join(self, delta: Any, base: Any, x: Tensor) -> bool:
        """Whether a Delta may compute the base layer's product with its own.

        The base is a plain linear layer that nobody watches, its weight whole, frozen and of the
        dtype in which the product is computed; the Delta is not watched either.
        """
        weight = base._parameters.get("weight")
        return (
            (type(base) is nn.Linear or (self.transposed and type(base) is Conv1D))
            and type(weight) in (nn.Parameter, FakeTensor)  # no sharded or packed one
            and not weight.requires_grad
            and "_is_fsdp_managed_module" not in self.__dict__
            and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
            and _unwatched(base)
            and delta.joint_is_forward
            and _unwatched(delta)
            and delta.joins(x, self.transposed)
        )

    def get_delta_weight(self, adapter: str, **choice: Any) -> Tensor:
        """dW of an adapter in the base weight's own layout, on its device.

        Args:
            adapter: name.
            choice: `task=` for a task table, `approx="mean"` for a token router.

        Raises:
            NotMergeable: the update depends on the input.
            ValueError: the adapter is sharded (FSDP2).
        """
        delta: Any = self.plait_delta[adapter]
        self.complete_copies(delta)
        weight = delta.weight(**choice)
        return weight.T.contiguous() if self.transposed else weight

    def merge(
        self,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        task: str | None = None,
        approx: Literal["mean"] | None = None,
    ) -> None:
        """Add the updates to the base weight; a copy of it is kept for unmerge.

        Args:
            safe_merge: raise and leave the weight unchanged if the result is not finite.
            adapter_names: None: the active ones.
            task: which task of a task table.
            approx: "mean" for a token router.

        Raises:
            NotMergeable: the update depends on the input, or the base is quantised.
            ValueError: with safe_merge, the result is not finite; or the model is sharded.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.plait_delta]
        if not names:
            return
        base: Any = self.get_base_layer()
        if self.quantization_backend is not None:
            raise NotMergeable(
                f"{self.name} is {type(base).__name__}: merging needs a dequantised base. "
                "Export to plain LoRA instead (--to lora)."
            )
        before = base.weight.detach()
        merged = before.to(torch.promote_types(before.dtype, torch.float32))
        for name in names:
            events.check_fired(self.plait_delta[name])  # type: ignore[arg-type]
            merged = merged + self.get_delta_weight(name, task=task, approx=approx).to(merged)
        merged = merged.to(before.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(
                f"{self.name}: NaNs detected in the merged weights. The adapter "
                f"{', '.join(names)} seems to be broken; the base weight is unchanged."
            )
        if self.unmerged is None:
            self.unmerged = before
        base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restore the base weight bit for bit."""
        if self.unmerged is None:
            return
        base: Any = self.get_base_layer()
        base.weight = nn.Parameter(
            self.unmerged.to(base.weight.device), requires_grad=base.weight.requires_grad
        )
        self.unmerged = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether dW does not depend on the input."""
        return self.delta_cls.mergeable

    def __repr__(self) -> str:
        """Prefix the name, as peft's own layers do."""
        return "plait." + super().__repr__()


class PlaitModel(BaseTuner):
    """The tuner of every method: injects PlaitLayers, routes batches, merges."""

    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def __init__(
        self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        inner = dict(model.peft_config) if isinstance(model, PeftModel) else None
        # adapter that trains biases -> (name, module, bias before it) of each
        self.plait_biases: dict[str, list[tuple[str, nn.Module, Tensor]]] = {}
        self.plait_split: set[str] = set()  # the adapters that mixed batches were prepared for
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if inner is not None:  # upstream adds our config to the inner model's, which breaks saving
            names = [adapter_name] if isinstance(peft_config, DeltaConfig) else list(peft_config)
            self.peft_config = {name: self.peft_config[name] for name in names}
            model.peft_config = inner

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        keep_trainable_on_cpu(model)
        layers = (m for m in model.modules() if isinstance(m, PlaitLayer))
        first = next(layers, None)  # adapters added without a tuner object share the first route
        self.plait_route = first.route if first is not None else Route()
        if first is None:
            self.plait_route.install(model)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """As upstream; if no target matches, the error lists the model's linear layers.

        The adapter gets a config of its own: schedules and the grouping of layers depend on it, so
        one object that makes two adapters must not be shared.
        """
        config: Any = copy.deepcopy(self.peft_config[adapter_name])
        self.peft_config[adapter_name] = config
        targets = config.target_modules
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if type(error).__name__ != "NoMatchingPeftModuleError":
                raise
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if _linear(m)}
            raise type(error)(
                f"{error} Linear layers of this model: {', '.join(sorted(linear))}."
            ) from None
        config.awaits_weights = False  # its Deltas wait; an adapter made from it later does not
        if config.bias != "none":
            self.plait_biases[adapter_name] = list(_biases(model, config.bias))
        if isinstance(targets, str) and targets.lower() == "all-linear":
            warn_left_out(model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        earlier: list[Any] = []
        if self.uses_shared_state:
            layers = (layer for layer in self.plait_layers() if adapter_name in layer.plait_delta)
            earlier = [layer.plait_delta[adapter_name] for layer in layers]
        if isinstance(target, self.tuner_layer_cls):
            target.add_delta(adapter_name, peft_config, earlier)  # type: ignore[operator]
            return
        make: Any = self.tuner_layer_cls
        layer = make(target, current_key, self.plait_route, **get_quantization_kwargs(self.model))
        layer.add_delta(adapter_name, peft_config, earlier)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast to fp32, or with `autocast_adapter_dtype=False` to the base's dtype.

        Trained tokens, and in fp32 saved modules and biases, too, which upstream leaves in half.
        """
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for layer in self.plait_layers():
            if adapter_name in layer.plait_delta:
                layer.cast(adapter_name, keep_wide=autocast_adapter_dtype)
        if autocast_adapter_dtype:
            keep_masters(self)

    def plait_layers(self) -> Iterator[PlaitLayer]:
        """The adapted layers, in the order of the model."""
        return (m for m in self.model.modules() if isinstance(m, self.tuner_layer_cls))  # type: ignore[misc]

    def set_task(self, task: str | None) -> None:
        """Choose the task of evaluation forwards that have no task_ids; None: no task.

        Raises:
            ValueError: no adapter has tasks, or none has a task of this name.
        """
        deltas: Any = (d for layer in self.plait_layers() for d in layer.plait_delta.values())
        tasks = next((delta.tasks for delta in deltas if delta.tasks), None)
        if tasks is None:
            raise ValueError(f"set_task({task!r}): no adapter of this model has tasks.")
        self.plait_route.default_task = None if task is None else task_index(tasks, task)
        self.plait_route.used = True

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Route the rows of this call; upstream enters it around forward and generate."""
        names, ids = kwargs.get("adapter_names"), kwargs.get("task_ids")
        if names is None and ids is None:
            yield
            return
        if names is not None:
            known = {*self.peft_config, BASE}
            unknown = sorted(set(names) - known)
            if unknown:
                raise ValueError(
                    f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                    f"This model has: {', '.join(sorted(known))}."
                )
            self._split_saved_modules()
            self._split_biases()
        model, generates = self.model, ids is not None and hasattr(self.model, "generate")
        if generates:  # generate() refuses arguments that the base model's forward does not name
            model.generate = functools.partial(_generate, type(model).generate, model)  # type: ignore
        try:
            with self.plait_route.routing(tuple(names) if names is not None else None, ids):
                yield
        finally:
            if generates:
                del model.generate

    def _split_saved_modules(self) -> None:
        """Let saved modules and trained tokens serve mixed batches from now on."""
        if self.plait_split == set(self.peft_config):
            return  # a walk over the modules of many adapters takes longer than a forward
        self.plait_split = set(self.peft_config)
        layer = next(self.plait_layers())
        for name, module in self.model.named_modules():
            if isinstance(module, AuxiliaryTrainingWrapper) and "plait_splits" not in vars(module):
                hook = partial(split_saved, layer, name, _run_saved)
                module.register_forward_hook(hook, with_kwargs=True)
                module.plait_splits = True  # type: ignore[assignment]

    def _split_biases(self) -> None:
        """Let rows, and forwards, without the adapter that trains biases use those before it."""
        for adapter, biases in self.plait_biases.items():
            layer = next(self.plait_layers())
            for name, module, bias in biases:
                hook = partial(split_bias, layer, adapter, name, bias)
                module.register_forward_hook(hook, with_kwargs=True)
            biases.clear()

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """As upstream; an adapter that trains biases takes them with it."""
        self._split_biases()
        super().set_adapter(*args, **kwargs)

    def disable_adapter_layers(self) -> None:
        """As upstream, and trained biases are disabled, too."""
        self._split_biases()
        self._enable_adapter_layers(enabled=False)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str
    ) -> None:
        """Add the frozen adapter sum_i w_i dW_i, exact for every method; see core/combine.py.

        Args:
            adapters: names of the adapters to add up.
            weights: one for each.
            adapter_name: of the new adapter. Activate it with set_adapter; save it by exporting it,
                `plait.to_lora(model, adapter_name)`.

        Raises:
            ValueError: an unknown adapter, not one weight for each, a name that is taken, a
                sharded model (FSDP2), or adapters with unlike heads, saved modules, trained
                tokens or biases, which no sum of updates holds.
        """
        combine.check(adapters, weights, list(self.peft_config), adapter_name)
        refuse_sharded(self, "add_weighted_adapter")
        self._share_saved_modules(adapters, adapter_name)
        self.peft_config[adapter_name] = copy.copy(self.peft_config[adapters[0]])
        for layer in self.plait_layers():
            here = [
                (a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.plait_delta
            ]
            if here:
                parts: Any = [layer.plait_delta[a] for a, _ in here]
                total: Any = combine.WeightedSum(parts, [w for _, w in here])
                total.adapter = self.peft_config[adapter_name]
                layer.plait_delta[adapter_name] = total.train(layer.training)

    def _share_saved_modules(self, adapters: list[str], adapter_name: str) -> None:
        """Give a weighted sum the saved modules that its adapters have in common."""
        named = ", ".join(adapters)
        biased = [a for a in adapters if getattr(self.peft_config[a], "bias", "none") != "none"]
        if biased:
            raise ValueError(
                f"add_weighted_adapter: {biased[0]} trains biases of the base model, which a sum "
                'of updates does not hold. Train it with bias="none".'
            )
        shared: list[tuple[Any, nn.Module]] = []
        for name, module in self.model.named_modules():
            if not isinstance(module, AuxiliaryTrainingWrapper):
                continue
            if not module._get_available_adapters() & set(adapters):
                continue
            if not isinstance(module, ModulesToSaveWrapper):
                raise ValueError(
                    f"add_weighted_adapter: {named} train tokens of {name}, which a sum of updates "
                    "does not hold. Train them without trainable_token_indices."
                )
            heads = [_saved(module, adapter) for adapter in adapters]
            if any(not _equal(heads[0], head) for head in heads[1:]):
                raise ValueError(
                    f"add_weighted_adapter: {name} is in modules_to_save and differs between "
                    f"{named}; a sum of updates cannot hold it. Train them with one {name}."
                )
            shared.append((module, heads[0]))
        for module, head in shared:
            module.update(adapter_name)
            module.modules_to_save[adapter_name].load_state_dict(head.state_dict())
            module.modules_to_save[adapter_name].requires_grad_(False)

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """As upstream; raise ValueError for a weighted sum, which has no file format."""
        name = kwargs.get("adapter_name", "default")
        for layer in model.modules():
            if isinstance(layer, PlaitLayer) and name in layer.plait_delta:
                layer.complete_copies(layer.plait_delta[name])
                if isinstance(layer.plait_delta[name], combine.WeightedSum):
                    raise ValueError(
                        f"Adapter {name!r} is a weighted sum and has no file format of its own. "
                        f"Export it: plait.to_lora(model, {name!r}).write(folder)."
                    )
        return super()._get_adapter_state_dict(model, *args, **kwargs)

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        **choice: Any,
    ) -> None:
        """Merge into the base weights.

        Args and errors are those of PlaitLayer.merge, `task=` and `approx=` included.
        """
        self._check(adapter_names, choice)
        self._check_merge_allowed()
        for layer in self.plait_layers():
            layer.merge(safe_merge, adapter_names, **choice)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        **choice: Any,
    ) -> nn.Module:
        """Merge and return the base model.

        Args and errors are those of PlaitLayer.merge, `task=` and `approx=` included.
        """
        self._check(adapter_names, choice)
        if choice:
            for layer in self.plait_layers():
                layer.merge(safe_merge, adapter_names, **choice)
            return self.unload()
        return super().merge_and_unload(progressbar, safe_merge, adapter_names)

    def _check(self, adapter_names: Sequence[str] | None, choice: dict[str, Any]) -> None:
        """Raise NotMergeable before the first weight changes."""
        for layer in self.plait_layers():
            for name in adapter_names or layer.active_adapters:
                delta: Any = dict(layer.plait_delta.items()).get(name)
                if delta is not None and delta.depends_on is not None:
                    delta.folded(**choice)
                    return

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether dW does not depend on the input."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in self.plait_layers())


def keep_masters(model: Any) -> list[str]:
    """Hold in fp32 what adapters train outside their layers: saved modules and biases.

    Upstream casts factors and trained tokens to fp32, and leaves these in the base's half
    precision, where small updates are lost in rounding. Their forwards compute as before.

    Args:
        model: a PeftModel, or its tuner.

    Returns:
        Names of the parameters that were in half precision.
    """
    named, memo = dict(model.named_modules()), {}
    trained: dict[str, list[str]] = {}
    for name, module in named.items():
        if isinstance(module, ModulesToSaveWrapper):
            inside = module.modules_to_save.named_modules(prefix=f"{name}.modules_to_save")
            trained |= {part: list(m._parameters) for part, m in inside}
    biases = {str(getattr(config, "bias", "none")) for config in model.peft_config.values()}
    bases = {m.get_base_layer() for m in named.values() if isinstance(m, BaseTunerLayer)}
    for name, module in named.items():
        if "all" in biases or (module in bases and any(b.endswith("_only") for b in biases)):
            trained.setdefault(name, []).append("bias")
    return [
        f"{name}.{parameter}"
        for name, parameters in trained.items()
        for parameter in keep_wide(named[name], parameters, memo)
    ]


def _one_kind(deltas: Sequence[Any], x: Tensor) -> type[Delta] | None:
    """The class of Deltas that `together` may compute for x (rows, .., in); None: one by one."""
    cls: Any = type(deltas[0]) if deltas else None
    if cls is None or not cls.joint_is_forward or not x.is_floating_point() or not x.numel():
        return None
    return cls if all(type(d) is cls and _unwatched(d) for d in deltas) else None


def _unwatched(module: nn.Module) -> bool:
    """Whether calling a module does what its class says: it has no hooks and no other forward."""
    own = module.__dict__
    return not (
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        or "forward" in own
    )


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Keep gradients flowing through 4-bit layers on a CPU after an evaluation.

    On a CPU with AVX512 bf16, bitsandbytes 0.50 repacks these layers for inference at the first
    evaluation and never undoes it: from then on gradients silently stop. Its own switch prevents
    that.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            layer: Any = module
            state = getattr(layer.weight, "quant_state", None)
            if getattr(state, "packing_format_for_cpu", False):
                layer.state_dict()  # unpacks
            layer.support_avx512bf16_for_cpu = False


def _generate(generate: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    kwargs.pop("task_ids", None)  # the route has them
    return generate(model, *args, **kwargs)


def _linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D) or "in_features" in vars(module)


def _run_saved(module: Any, adapter: str, x: Any) -> Any:
    """The output of a saved module or of trained tokens, for rows of one adapter."""
    if isinstance(module, TrainableTokensWrapper):
        tokens = module.token_adapter
        if tokens.merged:
            raise ValueError(
                "adapter_names cannot be used while adapters are merged. Call unmerge_adapter()."
            )
        names = [adapter] if adapter in tokens.trainable_tokens_delta else []
        # peft disables it if the active adapter has no tokens.
        disabled, tokens._disable_adapters = tokens._disable_adapters, False
        try:
            return tokens.forward_adapters(x, names)
        finally:
            tokens._disable_adapters = disabled
    return _saved(module, adapter)(x)


def _saved(module: Any, adapter: str) -> nn.Module:
    """An adapter's copy of a module in modules_to_save, or the base model's."""
    return dict(module.modules_to_save.items()).get(adapter, module.original_module)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same tensors."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def _biases(model: nn.Module, which: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, module and a copy of the bias of the base model's modules that `bias` trains."""
    named = dict(model.named_modules())
    if which == "all":
        layers = [m for m in named.values() if isinstance(m, PlaitLayer)]
        inside = {id(m) for layer in layers for m in layer.plait_delta.modules()}
        base = {
            n: m
            for n, m in named.items()
            if id(m) not in inside and ".modules_to_save." not in f".{n}."
        }
    else:
        base = {n: m.get_base_layer() for n, m in named.items() if isinstance(m, PlaitLayer)}
    for name, module in base.items():
        bias = module._parameters.get("bias")
        if bias is not None:
            yield name, module, bias.detach().clone()


def warn_left_out(model: nn.Module) -> None:
    """Warn of the fused experts that `target_modules="all-linear"` leaves out.

    Mixtures of experts hold the weights of all experts of a block in one tensor (experts, .., ..).
    It is no linear layer, so neither upstream nor plait finds it.
    """
    layers = [
        m
        for m in model.modules()
        if isinstance(m, BaseTunerLayer) and not isinstance(m, TrainableTokensLayer)
    ]
    adapted = {id(m) for layer in layers for m in layer.modules()}  # type: ignore[attr-defined]
    fused = {
        f"{name}.{key}": p
        for name, module in model.named_modules()
        for key, p in module.named_parameters(recurse=False)
        if p.ndim == 3 and min(p.shape) > 1 and id(module) not in adapted and not _convolves(module)
    }
    if fused:
        left, total = (
            sum(p.numel() for p in part) for part in (fused.values(), model.parameters())
        )
        warnings.warn(
            f'target_modules = "all-linear" adapts {len(layers)} linear layers and leaves out '
            f"{len(fused)} fused expert weights with {left:,} of the model's {total:,} parameters, "
            f"such as {next(iter(fused))}: they are no linear layers. Upstream's lora adapts them "
            "by target_parameters.",
            events.PlaitWarning,
            stacklevel=2,
        )


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.conv._ConvNd)


def _save_pretrained(
    model: Any, save_directory: Any, safe_serialization: bool = True, *args: Any, **kwargs: Any
) -> None:
    """PeftModel.save_pretrained; refuse to write a pickle, which may run any code when read."""
    if not safe_serialization:
        raise ValueError(
            f"save_pretrained({str(save_directory)!r}, safe_serialization=False) writes a pickle, "
            "which can run any code when it is read. Leave safe_serialization out."
        )
    type(model).save_pretrained(model, save_directory, safe_serialization, *args, **kwargs)


def _load_adapter(model: Any, model_id: Any, *args: Any, **kwargs: Any) -> Any:
    """PeftModel.load_adapter; refuse an adapter whose weights are a pickle."""
    subfolder = kwargs.get("subfolder") or ""
    options = {k: kwargs[k] for k in ("revision", "token") if kwargs.get(k) is not None}

    def has(name: str) -> bool:
        if Path(model_id).is_dir():
            return Path(model_id, subfolder, name).exists()
        path = f"{subfolder}/{name}" if subfolder else name
        revision = options.get("revision")
        if isinstance(try_to_load_from_cache(model_id, path, revision=revision), str):
            return True
        return not constants.HF_HUB_OFFLINE and file_exists(model_id, path, **options)

    if not has(SAFETENSORS_WEIGHTS_NAME) and has(WEIGHTS_NAME):
        raise ValueError(
            f"{model_id}: {WEIGHTS_NAME} is a pickle, which can run any code when it is read. Load "
            f"the adapter where you trust it and save it again as {SAFETENSORS_WEIGHTS_NAME}."
        )
    return type(model).load_adapter(model, model_id, *args, **kwargs)
