"""A conversation with a finished run, through the chat template of its tokenizer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TextStreamer

from plait.run.data.tokens import encode_chat
from plait.run.generate import check_generates, decode, generate_ids, seed_sampling
from plait.run.prepare import TrainedRun, load_run


class Chat:
    """The turns so far, and the model that answers.

    messages: as the chat template takes them.
    """

    def __init__(
        self,
        run: TrainedRun,
        system: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> None:
        """Begin a conversation.

        system: the first message; None: none. max_new_tokens: of an answer; None:
        evaluation.max_new_tokens. temperature: as in generate_ids.

        Raises ValueError for a run without a chat template, or one that generates no text.
        """
        path = run.folder.path
        check_generates(run, f"Use: plait predict {path}")
        if run.tokenizer.chat_template is None:
            raise ValueError(
                f"{path}: the tokenizer of this run has no chat template. Add one to the command, "
                "such as data.chat_template=chatml."
            )
        most = run.cfg.evaluation.max_new_tokens if max_new_tokens is None else max_new_tokens
        self.run, self.system, self.most, self.temperature = run, system, most, temperature
        self.messages: list[dict[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns but the system message."""
        system = {"role": "system", "content": self.system}
        self.messages = [] if self.system is None else [system]

    def say(self, text: str, write: Callable[[str], None]) -> str:
        """Return the answer to a message; `write` gets it piece by piece as it is generated.

        Raises ValueError, and leaves the conversation as it was, if it has become too long or if
        the chat template refuses the message.
        """
        tokenizer, decoding = self.run.tokenizer, self.run.cfg.evaluation.decoding
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = encode_chat(tokenizer, messages)
        # Beam search decides on a text at its end.
        streams = decoding.get("num_beams", 1) == 1
        (ids,) = generate_ids(
            self.run.model,
            tokenizer,
            [prompt],
            self.most,
            self.temperature,
            decoding,
            _Streamer(tokenizer, write) if streams else None,
        )
        answer = decode(tokenizer, ids)
        if not streams:
            write(answer)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return answer


def open_chat(
    path: str | Path,
    system: str | None = None,
    task: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> Chat:
    """Load a run to chat with.

    task: for a run that routes by task. seed: of sampling. overrides: as in load_run. The others
    are those of Chat.

    Raises what load_run and Chat raise, and ValueError for a task that is missing or unknown.
    """
    run = load_run(path, overrides)
    chat = Chat(run, system, max_new_tokens, temperature)
    run.set_task(task)
    seed_sampling(seed)
    return chat


class _Streamer(TextStreamer):
    """Hands on the text of new tokens, in pieces that later tokens do not change."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Write a piece."""
        if text:
            self.write(text)
