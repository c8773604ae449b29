"""The bridge to peft: a tuner model and a tuner layer that host any Delta.

`host` gives a method its own peft type (`PLAIT_<KEY>`), parameter prefix and layer class, so that
checkpoints describe themselves. The base weight is edited by merge alone. This file knows how peft
hosts a method, `plait/upstream` what peft's own methods look like; nothing else uses what is
private to peft.
"""

import copy
import functools
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
from peft import PeftModel, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.other import get_pattern_key
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers.pytorch_utils import Conv1D

from plait.core import combine, events
from plait.core.config import DeltaConfig
from plait.core.delta import Delta, FrozenLinear, NotMergeable
from plait.core.init import seeded
from plait.core.mix import task_index
from plait.core.route import Route, Rows
from plait.core.sharding import refuse_sharded

BASE = "__base__"  # peft's name for "no adapter" in a mixed batch


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
    """Capture task_ids from the forward of a PeftModel that takes a PlaitModel as its base_model.

    The forward of PeftModelFor* names `task_ids` and drops it for every method but Poly. The tuner
    is made before its PeftModel, so torch's public registration hook is the first chance to see it.
    """
    if isinstance(child, PlaitModel) and isinstance(parent, PeftModel):
        parent.register_forward_pre_hook(child.plait_route.capture_args, with_kwargs=True)
        parent.register_forward_hook(child.plait_route.clear_args, always_call=True)


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
        return self.get_submodule(self.adapter_layer_names[0])  # type: ignore[return-value]

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
        delta = self.delta_cls(base, resolved, seeded(config.seed, self.name))
        if not config.init_weights:
            delta.randomize(seeded(config.seed, self.name, adapter))
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

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to the layer's device; factors stay fp32 whatever the base is."""
        if adapter_name in self.plait_delta:
            base: Any = self.get_base_layer()
            self.plait_delta[adapter_name].to(device or base.weight.device)

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
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        rows = self.route.current_rows(x.shape[0])
        if rows.names is not None:
            return self._mixed(x, rows, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        active: list[Any] = [
            self.plait_delta[a] for a in self.active_adapters if a in self.plait_delta
        ]
        if len(active) == 1 and self._can_join(active[0]):
            self._begin(active[0])
            return active[0].joint(x, self.base_layer.weight, self.base_layer.bias)
        y = self.base_layer(x, *args, **kwargs)
        for delta in active:
            y = y + self._update(delta, x, rows).to(y.dtype)
        return y

    def _update(self, delta: Any, x: Tensor, rows: Rows) -> Tensor:
        """The update (.., out) of one Delta on its rows of the batch."""
        self._begin(delta)
        if not torch.is_floating_point(x):
            raise TypeError(
                f"{self.name}: the input has dtype {x.dtype}; plait needs a floating one."
            )
        if self.route.default_task is not None and rows.task_ids is None and not delta.training:
            ids = torch.full(x.shape[:1], self.route.default_task, device=x.device)
            rows = replace(rows, task_ids=ids)
        return delta(x, rows)

    def _begin(self, delta: Any) -> None:
        """Count a training forward for the guard; refuse a Delta whose weights were not loaded."""
        if delta.awaits_weights:
            raise RuntimeError(
                f"{self.name}: this adapter was made from a saved config and its weights were not "
                "loaded. Use PeftModel.from_pretrained(base, path), or a new config to train."
            )
        if delta.needs_events and delta.training and torch.is_grad_enabled():
            delta.forwards += 1

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
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(names):
            if name not in self.plait_delta:  # BASE, or an adapter that leaves this layer alone
                continue
            index = torch.tensor([i for i, n in enumerate(names) if n == name], device=x.device)
            update = self._update(self.plait_delta[name], x[index], rows.of(index))
            y = y.index_add(0, index, update.to(y.dtype))
        return y

    def _can_join(self, delta: Any) -> bool:
        """Whether the joint form applies: a plain, unwrapped nn.Linear and no dropout."""
        base = self.base_layer
        return (
            delta.joins
            and type(base) is nn.Linear
            and type(base.weight) is nn.Parameter
            and not (delta.training and delta.dropout)
            # Computed apart, a zero update leaves the base's output bit for bit.
            and (delta.training or not delta.fresh)
            and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks)
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
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)
        if inner is not None:  # upstream adds our config to the inner model's, which breaks saving
            single = isinstance(peft_config, DeltaConfig)
            self.peft_config = {adapter_name: peft_config} if single else dict(peft_config)
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
        """As upstream; if no target matches, the error lists the model's linear layers."""
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except ValueError as error:
            if type(error).__name__ != "NoMatchingPeftModuleError":
                raise
            linear = {n.rpartition(".")[2] for n, m in model.named_modules() if _linear(m)}
            raise type(error)(
                f"{error} Linear layers of this model: {', '.join(sorted(linear))}."
            ) from None

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
        """Cast to fp32, or with `autocast_adapter_dtype=False` to the base's dtype."""
        for layer in self.plait_layers():
            if adapter_name in layer.plait_delta:
                layer.cast(adapter_name, keep_wide=autocast_adapter_dtype)

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
            known = {a for layer in self.plait_layers() for a in layer.plait_delta} | {BASE}
            unknown = sorted(set(names) - known)
            if unknown:
                raise ValueError(
                    f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                    f"This model has: {', '.join(sorted(known))}."
                )
        model, generates = self.model, ids is not None and hasattr(self.model, "generate")
        if generates:  # generate() refuses arguments that the base model's forward does not name
            model.generate = functools.partial(_generate, type(model).generate, model)  # type: ignore
        try:
            with self.plait_route.routing(tuple(names) if names is not None else None, ids):
                yield
        finally:
            if generates:
                del model.generate

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
            ValueError: an unknown adapter, not one weight for each, a name that is taken, or a
                sharded model (FSDP2).
        """
        combine.check(adapters, weights, list(self.peft_config), adapter_name)
        refuse_sharded(self, "add_weighted_adapter")
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

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """As upstream; raise ValueError for a weighted sum, which has no file format."""
        name = kwargs.get("adapter_name", "default")
        for layer in model.modules():
            if isinstance(layer, PlaitLayer) and name in layer.plait_delta:
                if isinstance(layer.plait_delta[name], combine.WeightedSum):
                    raise ValueError(
                        f"Adapter {name!r} is a weighted sum and has no file format of its own. "
                        f"Export it: plait.to_lora(model, {name!r}).write(folder)."
                    )
                break
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
