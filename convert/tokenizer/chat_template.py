"""Choose the chat template and the end-of-turn token of a converted model, and write the template as it is served.

A fine-tune must be prompted with the text format it was trained on, and must stop at the token it was trained to stop
at, or it babbles. Both are decided here and written into the GGUF, so that the template renders there what it renders
in transformers. Two things get lost on the way. transformers gives a template the special tokens that the tokenizer
names, and nothing for those that it does not name; a GGUF always has a BOS and an EOS. And a tokenizer may put a space
before a text but not after a special token, which llama.cpp cannot: a prompt that begins with plain text begins with
that space instead.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from convert.errors import TemplateInvalid, json_fault
from models.gguf.header import Header
from runtime.prompt.template import GenerationTag

from .special import token_text

TEMPLATE_FIELD = "tokenizer.chat_template"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_CONFIGS = ("tokenizer_config.json", "chat_template.json", "processor_config.json")
"""Files with a template at the key "chat_template"; a processor's may be text beside a model of text and images."""
END_OF_TURN_FIELD = "tokenizer.ggml.eot_token_id"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_CONFIG_BYTES = 1 << 24  # Gemma's tokenizer_config.json lists 6,000 tokens in more than a megabyte
END_OF_TURN_MARKS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end|>", "<|end_of_text|>", "<|endoftext|>")
_GEMMA_TURNS = ("<start_of_turn>", "<end_of_turn>")
ChatMessages = Sequence[Mapping[str, Any]]

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# The tokens that a tokenizer's class has where the config does not say: for classes by the beginning of their name.
_OF_CLASS: Mapping[str, Mapping[str, str]] = {
    "Llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "CodeLlama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "Gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "GPT2": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
    "Qwen2": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
}
SPACE_FIRST = "{{ ' ' }}"
"""What a written template begins with where its prompts begin with plain text, and the tokenizer's space is missing."""
_NOTHING = "{{ '' }}"  # keeps Jinja from dropping a line break after a tag
_USER = {"role": "user", "content": "Hello"}
_PROBES: Sequence[ChatMessages] = (
    (_USER,),
    ({"role": "system", "content": "Be brief."}, _USER),
    (_USER, {"role": "assistant", "content": "Hi"}, _USER),
)


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


@dataclass(frozen=True)
class TemplateRules:
    """Requirements of a template that is served. The defaults leave it as it is.

    `named`: the special tokens that transformers gives it, by name; `served`: those that serving gives it. `special`:
    the texts before which no space goes; None if the tokenizer has no such rule.
    """

    named: Mapping[str, str] = field(default_factory=dict)
    served: Mapping[str, str] = field(default_factory=dict)
    special: frozenset[str] | None = None

    def written(self, template: str) -> str:
        """`template` as it is written; one that does not parse stays as it is."""
        try:
            used = meta.find_undeclared_variables(template_environment().parse(template))
            begins_plain = self.special is not None and self._begins_plain(template, self.special)
        except (TemplateError, RecursionError):
            return template
        settings = [
            f"{{% set {name} = {json.dumps(self.named.get(name, ''), ensure_ascii=False)} %}}"
            for name in NAMED_TOKENS
            if name in used and self.named.get(name, "") != self.served.get(name, "")
        ]
        head = "".join(settings) + (SPACE_FIRST if begins_plain else _NOTHING if settings else "")
        return head + template

    def _begins_plain(self, template: str, special: frozenset[str]) -> bool:
        """True if every prompt begins with plain text."""
        render = renderer(template, self.named)
        prompts = [prompt for probe in _PROBES if (prompt := render(probe))]
        return bool(prompts) and not any(prompt.startswith(tuple(special)) for prompt in prompts)


def named_tokens(described: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that transformers gives a template, by name, for a tokenizer_config.json."""
    kind = str(described.get("tokenizer_class", ""))
    of_class = next((tokens for start, tokens in _OF_CLASS.items() if kind.startswith(start)), {})
    found = {name: token_text(described.get(name, of_class.get(name))) for name in NAMED_TOKENS}
    return {name: text for name, text in found.items() if text}


AS_IT_IS = TemplateRules()
"""The rules that change no template."""


def renderer(template: str, named: Mapping[str, str]) -> Callable[[ChatMessages], str | None]:
    """A function from a conversation to its prompt as transformers renders it, None if the template refuses it."""
    environment = template_environment()
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False} | options)
    environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    compiled = environment.from_string(template)

    def render(conversation: ChatMessages) -> str | None:
        try:
            # transformers passes these two to every template, as None
            given = {"messages": conversation, "tools": None, "documents": None, **named}
            return compiled.render(add_generation_prompt=True, **given)
        except (TemplateError, TypeError):
            return None

    return render


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
