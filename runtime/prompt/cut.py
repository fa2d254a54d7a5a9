"""Long texts cut to their first tokens: the one rule, for training, measuring and serving.

A text of more tokens than the model's prompt allows is cut where its last allowed token ends, and what is left has no
more tokens than that when it is read again. So a text that was cut once is not cut again, and a model is trained on the
very tokens that it is served. Tokens are those of the text by itself, without the template around it.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from models.manifest import Prompt
from runtime.llama.interface import TokenizerLike

# Tokenising can take time quadratic in the text's length: only a beginning is read, which grows until it is enough.
_CHARS_PER_TOKEN = 8
# A token at the end of a beginning may be another one in the whole text.
_UNSETTLED = 8
# Fewer tokens are tried if those that are kept are read as more; characters are counted out after that.
_TRIES = 8


@dataclass(frozen=True, slots=True)
class CutMessages:
    """Messages as the model reads them. `n_cut` counts those of the user's that were cut."""

    messages: Sequence[Mapping[str, object]]
    n_cut: int = 0


def cut_messages(messages: Sequence[Mapping[str, object]], prompt: Prompt, tokenizer: TokenizerLike) -> CutMessages:
    """Cut the text in each of the user's messages to the length that `prompt` allows; its template stays around it."""
    if prompt.max_text_tokens is None:
        return CutMessages(messages)
    cut: list[Mapping[str, object]] = []
    n_cut = 0
    for message in messages:
        content = message["content"]
        if message["role"] == "user" and isinstance(content, str):
            before, text, after = prompt.parts(content)
            kept = cut_text(text, prompt.max_text_tokens, tokenizer)
            if len(kept) < len(text):
                message, n_cut = {**message, "content": before + kept + after}, n_cut + 1
        cut.append(message)
    return CutMessages(cut, n_cut)


def cut_text(text: str, max_tokens: int, tokenizer: TokenizerLike) -> str:
    """The beginning of `text` that has at most `max_tokens` tokens; all of it if it is no longer."""

    def encode(piece: str) -> list[int]:
        return tokenizer.encode(piece, add_special=False, parse_special=False)

    n_chars = _CHARS_PER_TOKEN * max_tokens
    tokens = encode(text[:n_chars])
    while n_chars < len(text) and len(tokens) <= max_tokens + _UNSETTLED:
        n_chars *= 2
        tokens = encode(text[:n_chars])
    if len(tokens) <= max_tokens:
        return text
    head = text[:n_chars]
    for n_tokens in range(max_tokens, max(0, max_tokens - _TRIES), -1):
        kept = _beginning(head, tokens[:n_tokens], tokenizer)
        if kept is not None and len(encode(kept)) <= max_tokens:
            return kept
    # The tokenizer does not spell the text as it is written, so the end of a token is no place in it.
    n_chars = bisect_right(range(len(head)), max_tokens, key=lambda n: len(encode(head[:n]))) - 1
    while len(encode(head[:n_chars])) > max_tokens:
        n_chars -= 1
    return head[:n_chars]


def spoken(messages: Sequence[Mapping[str, object]]) -> list[tuple[str, str]]:
    """The messages as (role, text) pairs."""
    return [(str(message["role"]), str(message["content"])) for message in messages]


def _beginning(text: str, tokens: Sequence[int], tokenizer: TokenizerLike) -> str | None:
    """The whole characters that `tokens` spell; None if the text does not begin with them."""
    spelled = b"".join(tokenizer.token_bytes(token, special=True) for token in tokens).decode(errors="ignore")
    # Some tokenizers put a space before every text.
    return next((one for one in (spelled, spelled.removeprefix(" ")) if text.startswith(one)), None)
