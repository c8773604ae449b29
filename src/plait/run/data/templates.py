"""Chat templates for models that come without one: well-known forms by name, or a Jinja file.

The forms are written for tokenizers without special tokens of their own for a chat: the assistant's
turn ends with the end-of-sequence token, which stops generation, and a text starts with the
beginning-of-sequence token if the tokenizer puts it in front of other texts.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from plait.options import did_you_mean, shown
from plait.run.data.tokens import start_ids

_BYTES = 256 * 1024  # largest template file
_TEXT = "(message['content'] or '')"

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' ~ message['role'] ~ '\\n' ~ " + _TEXT + " }}"
    "{{ eos_token if message['role'] == 'assistant' else '<|im_end|>' }}{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' ~ message['role'] ~ '|>\\n' ~ " + _TEXT + " ~ eos_token ~ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_OTHER_ROLE = (
    "{% else %}{{ raise_exception(message['role'] ~ ' is no role here: a system message may come "
    "first, then user and assistant') }}{% endif %}{% endfor %}"
)
_LLAMA = (
    "{% set turn = namespace(system='') %}{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}"
    "{% set turn.system = '<<SYS>>\\n' ~ " + _TEXT + " ~ '\\n<</SYS>>\\n\\n' %}"
    "{% elif message['role'] == 'user' %}"
    "{{ '[INST] ' ~ turn.system ~ " + _TEXT + " ~ ' [/INST]' }}{% set turn.system = '' %}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' ~ " + _TEXT + " ~ ' ' ~ eos_token }}" + _OTHER_ROLE
)
_ALPACA = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' and loop.first %}{{ " + _TEXT + " ~ '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}"
    "{{ '### Instruction:\\n' ~ " + _TEXT + " ~ '\\n\\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '### Response:\\n' ~ "
    + _TEXT
    + " ~ eos_token ~ '\\n\\n' }}"
    + _OTHER_ROLE
    + "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
TEMPLATES = {"alpaca": _ALPACA, "chatml": _CHATML, "llama": _LLAMA, "zephyr": _ZEPHYR}


def set_chat_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give a tokenizer a chat template: one of TEMPLATES, or that of a file.

    Raises FileNotFoundError for a name that is neither, and ValueError for a file that is too
    large, not UTF-8, or no Jinja template, with the line.
    """
    if name in TEMPLATES:
        start = "{{ bos_token }}" if start_ids(tokenizer) else ""
        tokenizer.chat_template = start + TEMPLATES[name]
        return
    path = Path(name).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"data.chat_template is {shown(name)}, which is neither a file nor a template of "
            f"plait's. {did_you_mean(name, TEMPLATES)}"
        )
    size = path.stat().st_size
    if size > _BYTES:
        raise ValueError(f"{path}: has {size:,} bytes. A chat template has up to {_BYTES:,}.")
    try:
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {error.object[error.start]:#x} is not UTF-8 text. Convert the file to "
            "UTF-8."
        ) from None
    _check(tokenizer, path)


def _check(tokenizer: Any, path: Path) -> None:
    """Raise ValueError for a file that does not compile; it may refuse these messages."""
    import jinja2

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise ValueError(
            f"{path}: line {error.lineno}: {error.message}. Correct the Jinja there."
        ) from None
    except jinja2.TemplateError:  # it may refuse this conversation
        return
