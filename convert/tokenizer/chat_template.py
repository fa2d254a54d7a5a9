"""Choose the chat template and the end-of-turn token of a converted model.

A fine-tune must be prompted with the text format it was trained on, and must stop at the token it was trained to stop
at, or it babbles. Both are decided here and written into the GGUF.
"""

import json
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from convert.errors import TemplateInvalid, json_fault
from models.gguf.header import Header
from runtime.prompt.template import GenerationTag

TEMPLATE_FIELD = "tokenizer.chat_template"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_CONFIGS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Files with a template at the key "chat_template"; a processor's may be text beside a model of text and images."""
END_OF_TURN_FIELD = "tokenizer.ggml.eot_token_id"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_CONFIG_BYTES = 1 << 24  # Gemma's tokenizer_config.json lists 6,000 tokens in more than a megabyte
END_OF_TURN_MARKS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")


@dataclass(frozen=True)
class ChatFormat:
    """A chat template, None for a model that only completes text, and the id of the token that ends a turn.

    `origin` names the template's source for messages.
    """

    template: str | None
    end_of_turn: int | None
    origin: str
    warnings: tuple[str, ...] = ()


def choose_format(header: Header, adapter: Path | None) -> ChatFormat:
    """The adapter's own template, else the source's, else Gemma's. Raises TemplateInvalid naming the file."""
    chosen = folder_format(adapter) if adapter is not None else None
    if chosen is None and TEMPLATE_FIELD in header.fields:
        chosen = ChatFormat(header.text(TEMPLATE_FIELD), None, "the source GGUF")
    if chosen is None and all(header.token_id(mark) is not None for mark in _GEMMA_TURNS):
        chosen = ChatFormat(gemma_turns(), None, "Gemma's turns (neither the adapter nor the source has a template)")
    if chosen is None or chosen.template is None:
        warning = "no chat template was found: the model can complete text, but not answer chat messages"
        return ChatFormat(None, _known_end(header), "nowhere", (warning,))
    _check_syntax(chosen.template, chosen.origin)
    return replace(chosen, end_of_turn=_end_of_turn(header, chosen.template))


def gemma_turns() -> str:
    """The chat template for a Gemma model that has none.

    Neighbours of one role share a turn, and a system text is part of the user's turn that it precedes.
    """
    return files("convert").joinpath("templates/gemma.jinja").read_text(encoding="utf-8").strip()


def template_environment() -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates."""
    extensions = ("jinja2.ext.loopcontrols", GenerationTag)
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)


def folder_format(folder: Path) -> ChatFormat | None:
    """The chat template in a tokenizer's folder, None if it has none.

    chat_template.jinja comes before tokenizer_config.json, as in transformers, and that before the two files in which a
    processor has it. Raises TemplateInvalid naming the file.
    """
    found: dict[str, str] = {}
    others = {path.stem for path in (folder / "additional_chat_templates").glob("*.jinja")}
    if (file := folder / TEMPLATE_FILE).is_file():
        found[TEMPLATE_FILE] = _read(file).removesuffix("\n")  # as Jinja does
    for name in TEMPLATE_CONFIGS:
        named = _configured(folder / name) if (folder / name).is_file() else {}
        others |= set(named) - {"default"}
        if "default" in named:
            found[name] = named["default"]
    left_out = (
        (f"chat templates of other names are left out, a GGUF has one: {', '.join(sorted(others))}",) if others else ()
    )
    if not found:
        return None
    first, text = next(iter(found.items()))
    disagree = [name for name, other in found.items() if other.strip() != text.strip()]
    warnings = [f"{first!r} and {name!r} hold different chat templates; the first is used" for name in disagree]
    return ChatFormat(text, None, str(folder / first), (*warnings, *left_out))


def _configured(config: Path) -> dict[str, str]:
    """Name -> template in one of TEMPLATE_CONFIGS; a single template is called "default"."""
    try:
        raw = json.loads(_read(config, MAX_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise TemplateInvalid(json_fault(config, error)) from error
    template: Any = raw.get("chat_template") if isinstance(raw, dict) else None
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
    if not isinstance(template, dict):
        return {}
    return {name: text for name, text in template.items() if isinstance(name, str) and isinstance(text, str)}


def _read(file: Path, limit: int = MAX_TEMPLATE_BYTES) -> str:
    try:
        if (size := file.stat().st_size) > limit:
            raise TemplateInvalid(f"{str(file)!r} has {size} bytes, the limit is {limit}")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TemplateInvalid(f"{str(file)!r} cannot be read: {error}") from error


def _check_syntax(template: str, origin: str) -> None:
    try:
        template_environment().parse(template)
    except (TemplateSyntaxError, RecursionError) as error:
        raise TemplateInvalid(f"the chat template from {origin} is malformed: {error}") from error


def _end_of_turn(header: Header, template: str) -> int | None:
    """The id of the end-of-turn mark that the template writes, else the id that the source GGUF names."""
    for mark in END_OF_TURN_MARKS:
        if mark in template and (token := header.token_id(mark)) is not None:
            return token
    return _known_end(header)


def _known_end(header: Header) -> int | None:
    field = header.fields.get(END_OF_TURN_FIELD)
    return field.value if field is not None and isinstance(field.value, int) else None
