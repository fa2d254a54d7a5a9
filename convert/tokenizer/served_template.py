"""The chat template as it is written into a GGUF, so that it renders there what it renders in transformers.

Two things get lost on the way. transformers gives a template the special tokens that the tokenizer names, and nothing
for those that it does not name; a GGUF always has a BOS and an EOS. And a tokenizer may put a space before a text but
not after a special token, which llama.cpp cannot: a prompt that begins with plain text begins with that space instead.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, meta

from .chat_template import template_environment
from .special import token_text

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
