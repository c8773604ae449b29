"""Every type of the installed peft as a method: `method: {name: peft, type: MISS, ...}`.

The types are read from peft itself. Prompt types are left out: they change the inputs, and a run
measures and exports layers. The key of such a method is `peft:MISS`.
"""

import functools

PREFIX = "peft:"
# Types that adapt something else than linear layers: peft's own targets for the architecture.
_OWN_TARGETS = {"ADAPTION_PROMPT", "BEFT", "IA3", "LN_TUNING", "SHADOW", "TRAINABLE_TOKENS"}


@functools.cache
def peft_types() -> dict[str, str]:
    """Return the types of the installed peft and the names of their config classes."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PromptLearningConfig

    return {
        str(kind).removeprefix("PeftType."): cls.__name__
        for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if not issubclass(cls, PromptLearningConfig) and cls.__module__.startswith("peft.")
    }


def type_of(key: object) -> str | None:
    """Return the type that a key names; None for the key of another method."""
    if not isinstance(key, str) or not key.startswith(PREFIX):
        return None
    kind = key.removeprefix(PREFIX)
    return kind if kind in peft_types() else None


def own_targets(kind: str) -> bool:
    """Whether peft chooses the targets of a type itself, where none are named."""
    return kind in _OWN_TARGETS
