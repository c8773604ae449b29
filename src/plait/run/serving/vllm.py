"""A resolver for vLLM: a server that is asked for an unknown adapter finds it in a run folder.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 PLAIT_ADAPTERS=runs vllm serve BASE --enable-lora

`model: first` in a request then serves runs/first: a run folder, an adapter folder or an exported
folder. vLLM finds `register` by the entry point group vllm.general_plugins and calls it in each of
its processes. The interface is that of vLLM 0.33 (vllm/lora/resolver.py); this module is imported
by vLLM alone.
"""

import asyncio
import hashlib
import os
from pathlib import Path

from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
from vllm.lora.resolver import (  # type: ignore[import-not-found]
    LoRAResolver,
    LoRAResolverRegistry,
)

from plait.run.serving.resolve import find, plain_lora

ROOT, CACHE = "PLAIT_ADAPTERS", "PLAIT_ADAPTERS_CACHE"


class PlaitResolver(LoRAResolver):
    """Resolves the folders below one root.

    Args:
        root: folder of runs and adapters.
        cache: where converted adapters are kept.
    """

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.cache = root, cache

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request for an adapter; None if no folder has this name.

        Args:
            base_model_name: the model that the server was started with.
            lora_name: path of a folder below the root.

        Raises:
            AdapterError: the folder is there and cannot be served; says why and what to do.
        """
        folder = find(self.root, lora_name)
        if folder is None:
            return None
        served = await asyncio.to_thread(plain_lora, folder, self.cache, base_model_name)
        return LoRARequest(
            lora_name=lora_name, lora_int_id=_number(lora_name), lora_path=str(served)
        )


def register() -> None:
    """Register the resolver if PLAIT_ADAPTERS names its folder; it may be called several times.

    Raises:
        NotADirectoryError: that folder is not there.
    """
    root = os.environ.get(ROOT)
    if not root:
        return
    if not Path(root).is_dir():
        raise NotADirectoryError(f"{ROOT} = {root}: there is no such folder. Correct the path.")
    cache = os.environ.get(CACHE) or Path.home() / ".cache" / "plait" / "adapters"
    LoRAResolverRegistry.register_resolver("plait", PlaitResolver(Path(root), Path(cache)))


def _number(name: str) -> int:
    """A positive number for a name, the same in every process."""
    return 1 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % (2**31 - 1)
