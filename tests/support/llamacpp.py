"""llama.cpp in tests: its converters, and its runtime on the CPU in full precision."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import llamacpp_convert

# Where `make test-servers` unpacks the source of llama-cpp-python.
SOURCE = Path(os.environ.get("LLAMA_CPP_SRC", Path(sys.prefix) / "llama-cpp-python"))
MEASURED: list[str] = []  # printed at the end of the test session
Job = Sequence[str | Path]


def require() -> None:
    """Skip the calling test module without llama.cpp."""
    if not os.environ.get("PLAIT_SERVERS"):
        pytest.skip("runs real servers: make test-servers", allow_module_level=True)
    pytest.importorskip("llama_cpp", reason="install plait[serve-test]: make test-servers")
    if not converters().is_dir():
        pytest.skip(f"{SOURCE} holds no source of llama.cpp: make test-servers")


def converters() -> Path:
    """The folder of llama.cpp's converters."""
    return SOURCE / "vendor" / "llama.cpp"


def base_job(model: Path, to: Path) -> Job:
    """The job that converts a checkpoint of transformers."""
    return ["convert_hf_to_gguf.py", model, "--outtype", "f32", "--outfile", to]


def lora_job(base: Path, adapter: Path, to: Path) -> Job:
    """The job that converts an adapter of peft."""
    return ["convert_lora_to_gguf.py", "--base", base, "--outfile", to, adapter]


def convert(jobs: Iterable[Job], scratch: Path) -> list[str | None]:
    """Run converters; return the message of each job that failed, else None."""
    file = scratch / "jobs.json"
    file.write_text(json.dumps([[str(part) for part in job] for job in jobs]), encoding="utf-8")
    command = [sys.executable, "-P", llamacpp_convert.__file__, converters(), file]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text(encoding="utf-8"))


class LlamaCpp:
    """A model in llama.cpp, with adapters.

    Weights, activations and the cache of keys and values are float32 (the cache is float16 unless
    it is told), on one thread.
    """

    def __init__(self, model: Path, context: int = 128) -> None:
        import llama_cpp

        self.library: Any = llama_cpp
        self.llama: Any = llama_cpp.Llama(
            str(model), n_ctx=context, n_batch=context, n_ubatch=context, n_threads=1,
            n_threads_batch=1, logits_all=True, type_k=0, type_v=0, verbose=False,
        )  # fmt: skip

    def load(self, adapter: Path) -> Any:
        """An adapter, not yet in use; None if llama.cpp refuses it."""
        # Llama(lora_path=...) does not look at the result and crashes.
        loaded = self.library.llama_adapter_lora_init(self.llama.model, str(adapter).encode())
        return loaded or None

    def use(self, *adapters: Any, scales: Sequence[float] = ()) -> None:
        """Use these loaded adapters from now on, at scale 1 unless other scales are given."""
        ctypes = self.library.llama_cpp.ctypes
        scales = scales or [1.0] * len(adapters)
        loaded = (self.library.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
        factors = (ctypes.c_float * len(adapters))(*scales)
        set_adapters = self.library.llama_set_adapters_lora
        assert set_adapters(self.llama.ctx, loaded, len(adapters), factors) == 0

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (tokens, vocabulary) after each token."""
        self.llama.reset()
        self.llama.eval(list(tokens))
        return np.array(self.llama.scores[: len(tokens)])

    def close(self) -> None:
        """Free the model, and its adapters."""
        self.llama.close()
