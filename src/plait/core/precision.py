"""fp32 weights that train on a half-precision base, and compute in the base's dtype.

bfloat16 keeps 8 bits of a number, so an update of less than 1/512 of a weight is lost in rounding.
`keep_wide` holds weights in fp32 (master weights: Micikevicius et al. 2018, 1710.03740, section
3.1) and computes with them in the dtype of the module's input: a forward equals that of the rounded
weights. `compute_in` does the same for a whole fp32 model, by torch's autocast.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

HALF = (torch.float16, torch.bfloat16)


def keep_wide(
    module: nn.Module, names: Iterable[str], memo: dict[int, nn.Parameter] | None = None
) -> list[str]:
    """Replace half-precision parameters of a module by fp32 ones; return the names of these.

    Args:
        module: its forward computes in the dtype of its input from now on, an embedding's rounds
            the rows that it looks up.
        names: of its direct parameters.
        memo: id of a parameter -> its replacement; one for several modules keeps weights tied.
    """
    memo, widened = {} if memo is None else memo, []
    for name in names:
        parameter = module._parameters.get(name)
        if parameter is None or parameter.dtype not in HALF:
            continue
        if id(parameter) not in memo:
            memo[id(parameter)] = nn.Parameter(
                parameter.detach().float(), requires_grad=parameter.requires_grad
            )
        setattr(module, name, memo[id(parameter)])
        widened.append(name)
        if "plait_dtype" not in vars(module):
            module.plait_dtype = parameter.dtype  # type: ignore[assignment]
            module.register_forward_pre_hook(_narrow, with_kwargs=True)
            module.register_forward_hook(_restore, always_call=True)
    return widened


@contextmanager
def narrowed(module: nn.Module, inputs: Sequence[Any]) -> Iterator[None]:
    """Within the context `module.forward(*inputs)` works as a call of the module does."""
    if "plait_dtype" not in vars(module):
        yield
        return
    _narrow(module, tuple(inputs), {})
    try:
        yield
    finally:
        _restore(module, (), None)


def _narrow(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook: let the module's forward read its parameters in the dtype of its input.

    An attribute hides the parameter of its name until `_restore`. Autograd goes through the cast.
    """
    if isinstance(module, nn.Embedding):
        return
    inputs = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    dtype = next((x.dtype for x in inputs if x.is_floating_point()), module.plait_dtype)
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
            vars(module)[name] = parameter.to(dtype)


def _restore(module: Any, args: Any, output: Any) -> Any:
    """Hook: the parameters are visible again; what an embedding looked up is rounded."""
    for name in module._parameters:
        vars(module).pop(name, None)
    dtype: Any = module.plait_dtype
    rounds = isinstance(module, nn.Embedding) and isinstance(output, Tensor)
    return output.to(dtype) if rounds else None


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the forward of an fp32 model compute in a half precision; other dtypes change nothing."""
    if dtype in HALF:
        model.register_forward_pre_hook(partial(_enter, dtype))
        model.register_forward_hook(_leave, always_call=True)


def _enter(dtype: torch.dtype, model: nn.Module, args: Any) -> None:
    context = torch.autocast(next(model.parameters()).device.type, dtype)
    context.__enter__()
    vars(model).setdefault("plait_autocasts", []).append(context)


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    contexts = vars(model).get("plait_autocasts")
    if contexts:
        contexts.pop().__exit__(None, None, None)
