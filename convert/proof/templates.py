"""Prove that a converted model gets the checkpoint's prompts: the same rendered text, the same token ids.

Hugging Face's rule is: render the template, then tokenize the text without adding special tokens, so that BOS does not
occur twice. It is followed here with plain Jinja and the reference tokenizer, and compared with the prompts as served.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from convert.errors import VerifyFailed
from convert.tokenizer.chat_template import TEMPLATE_FIELD, folder_format
from convert.tokenizer.pieces import read_tokenizer_config
from convert.tokenizer.served_template import SPACE_FIRST, ChatMessages, named_tokens, renderer
from runtime.errors import EngineError, RequestError
from runtime.prompt.prompter import Prompter

from .parity import Mismatch, TokenizerPair
from .reference import ReferenceTokenizer
from .torture import CONVERSATIONS

_CONTEXT_TOKENS = 1 << 24


@dataclass(frozen=True)
class TemplateParity:
    """The number of conversations with equal prompts, and warnings for the user.

    `skipped`: in words, which of the user's conversations were not compared, and why.
    """

    n_compared: int
    warnings: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def check_template(
    pair: TokenizerPair, conversations: Sequence[ChatMessages], template_folder: Path | None = None
) -> TemplateParity:
    """Compare prompts as served with those of the folder's template and tokenizer, built-in conversations included.

    `template_folder`: the chat template's, if it is not the tokenizer's.

    A conversation ends with the user's turn. Skips conversations that the folder's template refuses, and those in which
    a message spells a control token: serving treats that as text. A model without a template compares nothing. Raises
    VerifyFailed with the first prompt that differs.
    """
    chat, tokenizer, reference = folder_format(template_folder or pair.folder), pair.tokenizer, pair.reference
    template = pair.fields.get(TEMPLATE_FIELD)
    text = template.value if template is not None and isinstance(template.value, str) else None
    if chat is None or chat.template is None or text is None:
        return TemplateParity(0)
    special = set(tokenizer.special_texts)
    prompter = Prompter(tokenizer, text, _CONTEXT_TOKENS)
    render = renderer(chat.template, named_tokens(read_tokenizer_config(pair.folder)))
    lead = " " if text.endswith(SPACE_FIRST + chat.template) else ""
    compared, extra_bos = 0, False
    refused, spelled = 0, list[str]()
    for place, conversation in enumerate((*conversations, *CONVERSATIONS)):
        plain = [{**message, "content": reference.comparable(str(message.get("content")))} for message in conversation]
        if found := [mark for message in plain for mark in special if mark in str(message.get("content"))]:
            spelled.append(found[0])
            continue
        if (expected := render(plain)) is None:
            refused += place < len(conversations)
            continue
        try:
            ours = prompter.render(plain)
            tokens = list(prompter.chat(plain))
        except (EngineError, RequestError) as error:
            raise VerifyFailed(f"the template as served refuses a conversation: {error}") from error
        # transformers does not write the space: its tokenizer puts it there
        extra_bos |= _compare(ours.removeprefix(lead), tokens, expected, reference, tokenizer.bos)
        compared += 1
    warning = "the template writes no BOS: llama.cpp adds it, as to any text; training may not have had it"
    return TemplateParity(
        compared, (warning,) if extra_bos else (), tuple(_skipped(len(conversations), refused, spelled))
    )


def _skipped(n_given: int, n_refused: int, spelled: Sequence[str]) -> Iterator[str]:
    """The user's conversations that were not compared."""
    if n_refused:
        yield f"{n_refused} of {n_given} conversations are not compared: the chat template refuses them"
    if spelled:
        yield (
            f"{len(spelled)} of {n_given} conversations are not compared: a message spells a control token "
            f"({spelled[0]!r}), which is read as text when it is served"
        )


def _compare(ours: str, tokens: list[int], expected: str, reference: ReferenceTokenizer, bos: int | None) -> bool:
    """Raise VerifyFailed unless text and ids are Hugging Face's. True if only ours start with a BOS."""
    if ours != expected:
        raise VerifyFailed(f"the rendered prompt is {ours!r:.200}, Hugging Face's is {expected!r:.200}")
    theirs = reference.encode_rendered(ours)
    extra = tokens[:1] == [bos] and theirs[:1] != [bos]
    if tokens[extra:] != theirs:
        raise VerifyFailed(
            f"a prompt gets other tokens than Hugging Face's: {Mismatch(ours, tuple(tokens), tuple(theirs))}"
        )
    return extra
