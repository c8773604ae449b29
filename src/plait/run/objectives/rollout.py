"""Completions that another engine draws: it gets the adapter as a plain LoRA at each step.

The base weights stay where they are: sending merged weights instead needs the whole model for each
step (https://github.com/huggingface/trl/issues/5975).
"""

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel

from plait.run.prepare import Prepared
from plait.upstream.export import to_lora
from plait.upstream.servers import VLLM_RANKS, max_lora_rank


class Engine(Protocol):
    """What draws completions."""

    def draw(
        self, prompts: Sequence[Sequence[int]], lora: Path | None, version: int
    ) -> list[list[int]]:
        """Return the ids of one completion of each prompt, with their end token.

        Args:
            prompts: ids of each. lora: the folder of the adapter as a plain LoRA; None: the base
                model. version: differs for each adapter.
        """
        ...


class Rollout:
    """Keeps the adapter of an engine at that of the model.

    Args:
        engine: draws the completions. model: with the adapter. unchanged: whether that adapter
            changes nothing, so that no plain LoRA holds it.
    """

    def __init__(self, engine: Engine, model: PeftModel, unchanged: Callable[[], bool]) -> None:
        self.engine, self.model, self.unchanged = engine, model, unchanged
        self.step: int | None = None
        self.folder = tempfile.TemporaryDirectory(prefix="plait-policy-")
        self.lora: Path | None = None

    def draw(self, prompts: Sequence[Sequence[int]], step: int) -> list[list[int]]:
        """Return a completion of each prompt by the model after so many optimizer steps."""
        if step != self.step:
            self.lora = None if self.unchanged() else self._write(step)
            self.step = step
        return self.engine.draw(prompts, self.lora, step + 1)

    def _write(self, step: int) -> Path:
        if self.lora is not None:
            shutil.rmtree(self.lora)
        folder = Path(self.folder.name, str(step))
        to_lora(self.model).write(folder)
        return folder


def open_vllm(run: Prepared) -> Engine:
    """Start vLLM with the base model of a run.

    Raises ImportError without vLLM.
    """
    from plait.run.model import source_of

    return VllmEngine(
        source_of(run.cfg.model),
        rank=run.cfg.method.options.get("r", 8),
        options=run.cfg.objective.options,
        seed=run.cfg.training["seed"],
    )


class VllmEngine:
    """vLLM in this process; not tested without a GPU.

    Args:
        source: folder or hub id of the base model. rank: of the plain LoRA. options: of the
            objective. seed: of the draws.
    """

    def __init__(self, source: str, rank: int, options: dict[str, Any], seed: int) -> None:
        try:
            import vllm  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError(
                f'objective.vllm needs vLLM ({error}): pip install "plait[vllm]"'
            ) from error
        largest = max_lora_rank(2 * rank) or VLLM_RANKS[-1]  # a plain LoRA may have twice the rank
        self.model = vllm.LLM(
            model=source, enable_lora=True, max_loras=1, max_lora_rank=largest, seed=seed
        )
        self.sampling = vllm.SamplingParams(
            temperature=options["temperature"],
            top_p=options["top_p"],
            max_tokens=options["max_completion_length"],
        )

    def draw(
        self, prompts: Sequence[Sequence[int]], lora: Path | None, version: int
    ) -> list[list[int]]:
        """Return the ids of one completion of each prompt."""
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        request = None if lora is None else LoRARequest(f"policy-{version}", version, str(lora))
        made = self.model.generate(
            [{"prompt_token_ids": list(ids)} for ids in prompts],
            self.sampling,
            lora_request=request,
            use_tqdm=False,
        )
        return [list(one.outputs[0].token_ids) for one in made]
