"""Which chat template and which end-of-turn token a converted model gets.

A fine-tune is asked with the very text it was trained on, and stops at the token it was trained to stop at. Lost on
the way, these are what make a good fine-tune babble, so they are decided here and written into the GGUF.
"""

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from models.gguf_header import Header

from .errors import TemplateInvalid

TEMPLATE_FIELD = "tokenizer.chat_template"
END_OF_TURN_FIELD = "tokenizer.ggml.eot_token_id"
MAX_TEMPLATE_BYTES = 1 << 20

_GEMMA_TURNS = (b"<start_of_turn>", b"<end_of_turn>")
_END_OF_TURN_MARKS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")


@dataclass(frozen=True)
class ChatFormat:
    """`template` is None for a model that only continues text; `origin` says where it came from."""

    template: str | None
    end_of_turn: int | None
    origin: str
    warnings: tuple[str, ...] = ()


def choose_format(header: Header, adapter: Path | None) -> ChatFormat:
    """The adapter's own template, else the source's, else the family's. Raises TemplateInvalid naming the file."""
    chosen = _beside_adapter(adapter) if adapter is not None else None
    if chosen is None and TEMPLATE_FIELD in header.fields:
        chosen = ChatFormat(header.text(TEMPLATE_FIELD), None, "the source GGUF")
    if chosen is None and all(mark in header.vocabulary for mark in _GEMMA_TURNS):
        gemma = files("convert").joinpath("templates/gemma.jinja").read_text(encoding="utf-8").strip()
        chosen = ChatFormat(gemma, None, "Gemma's turns (neither the adapter nor the source has a template)")
    if chosen is None or chosen.template is None:
        warning = "no chat template was found: the model can complete text, but not answer chat messages"
        return ChatFormat(None, _known_end(header), "nowhere", (warning,))
    _check_syntax(chosen.template, chosen.origin)
    return replace(chosen, end_of_turn=_end_of_turn(header, chosen.template))


def _beside_adapter(adapter: Path) -> ChatFormat | None:
    """PEFT saves the tokenizer's template beside the adapter, in one or both of two places."""
    file, config = adapter / "chat_template.jinja", adapter / "tokenizer_config.json"
    configured = _configured(config) if config.is_file() else None
    if not file.is_file():
        return None if configured is None else ChatFormat(configured, None, str(config))
    text = _read(file).strip()
    disagree = configured is not None and configured.strip() != text
    warning = f"{file.name!r} and {config.name!r} hold different chat templates; the first is used"
    return ChatFormat(text, None, str(file), (warning,) if disagree else ())


def _configured(config: Path) -> str | None:
    try:
        raw = json.loads(_read(config))
    except (ValueError, RecursionError) as error:
        raise TemplateInvalid(f"{str(config)!r} is no JSON: {error}") from error
    template: Any = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read(file: Path) -> str:
    try:
        if (size := file.stat().st_size) > MAX_TEMPLATE_BYTES:
            raise TemplateInvalid(f"{str(file)!r} has {size} bytes, the limit is {MAX_TEMPLATE_BYTES}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateInvalid(f"{str(file)!r} cannot be read: {error}") from error


def _check_syntax(template: str, origin: str) -> None:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        environment.parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise TemplateInvalid(f"the chat template from {origin} is malformed: {error}") from error


def _end_of_turn(header: Header, template: str) -> int | None:
    """The vocabulary's end-of-turn mark that the template writes; else what the source says."""
    for mark in _END_OF_TURN_MARKS:
        if mark in template and mark.encode() in header.vocabulary:
            return header.vocabulary[mark.encode()]
    return _known_end(header)


def _known_end(header: Header) -> int | None:
    field = header.fields.get(END_OF_TURN_FIELD)
    return field.value if field is not None and isinstance(field.value, int) else None
