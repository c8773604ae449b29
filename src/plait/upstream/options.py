"""What single rows of the table fill in and check: functions of options and layer sizes alone.

Pure Python: a config is checked without torch and peft.
"""

import math
from collections.abc import Mapping
from typing import Any

Sizes = Mapping[str, tuple[int, int]]  # layer name -> (out_features, in_features)


def fill_adalora(options: dict[str, Any], total_steps: int | None) -> None:
    """Complete AdaLoRA's ranks and schedule, in place.

    init_r becomes 1.5 target_r; total_step the planned optimizer steps, with a tinit of a tenth and
    a tfinal of three tenths of it. While the steps are unknown, total_step is 2**31 - 1.

    Raises:
        ValueError: an init_r that leaves nothing to prune; peft would fail during training.
    """
    options.setdefault("init_r", math.ceil(1.5 * options["target_r"]))
    if options["init_r"] <= options["target_r"]:
        raise ValueError(
            f"adalora: init_r = {options['init_r']} leaves nothing to prune to target_r = "
            f"{options['target_r']}. Give an init_r above target_r."
        )
    if options.get("total_step") is None:
        options["total_step"] = total_steps or 2**31 - 1
        if total_steps:
            options.setdefault("tinit", total_steps // 10)
            options.setdefault("tfinal", total_steps * 3 // 10)


def check_pissa(options: Mapping[str, Any], layers: Sizes) -> None:
    """Raise ValueError if a layer has fewer singular vectors than the rank."""
    for name, sizes in layers.items():
        if options["r"] > min(sizes):
            raise ValueError(
                f"method.r is {options['r']}, but pissa takes singular vectors of {name}, which "
                f"has {min(sizes)}. Give r: {min(sizes)} or less, or leave that layer out."
            )


def check_vblora(options: Mapping[str, Any], layers: Sizes) -> None:
    """Raise ValueError if the vectors of the bank do not divide the sides of a layer."""
    length = options["vector_length"]
    for name, (out_features, in_features) in layers.items():
        if in_features % length or out_features % length:
            divisor = math.gcd(*(side for sides in layers.values() for side in sides))
            raise ValueError(
                f"method.vector_length is {length}, which does not divide {name} "
                f"({out_features} x {in_features}). Give a common divisor of all layers, "
                f"such as {divisor}."
            )
