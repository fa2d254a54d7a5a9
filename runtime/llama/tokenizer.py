"""Text ↔ token ids by llama.cpp's vocabulary of a loaded model."""

import ctypes
from collections.abc import Sequence
from functools import cached_property

from llama_cpp import llama_cpp

from runtime.errors import InvalidRequest, TokenizeFailed

from .handle import ModelHandle

_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_PIECE_BYTES = 64


class Tokenizer:
    """The vocabulary of one model: immutable, so any thread may use it. It keeps the model's memory alive."""

    def __init__(self, model: ModelHandle) -> None:
        self._model = model
        self._vocab = llama_cpp.llama_model_get_vocab(model.pointer)
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.bos = _token_or_none(llama_cpp.llama_vocab_bos(self._vocab))
        self.eos = _token_or_none(llama_cpp.llama_vocab_eos(self._vocab))
        self.adds_bos: bool = llama_cpp.llama_vocab_get_add_bos(self._vocab)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Every token that ends an answer, ascending."""
        return tuple(token for token in range(self.n_vocab) if self.is_end(token))

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """The texts that `encode(parse_special=True)` reads as control tokens."""
        attributes = (llama_cpp.llama_vocab_get_attr(self._vocab, token) for token in range(self.n_vocab))
        control = [token for token, attribute in enumerate(attributes) if attribute & _CONTROL]
        texts = (llama_cpp.llama_vocab_get_text(self._vocab, token).decode(errors="replace") for token in control)
        return tuple(text for text in texts if text)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. `add_special` adds BOS as the model wants it; `parse_special` reads control tokens.

        Raises InvalidRequest if the text is not valid Unicode, TokenizeFailed if llama.cpp refuses it.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"character {error.start} of the text is half a surrogate pair") from error
        room = len(data) + 2
        for _ in range(2):
            tokens = (llama_cpp.llama_token * room)()
            count = llama_cpp.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
            if count >= 0:
                return list(tokens[:count])
            room = -count
        raise TokenizeFailed(f"llama.cpp cannot tokenise a text of {len(data)} bytes (llama_tokenize: {count})")

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The token's bytes: maybe half a character. Control tokens are empty unless `special`.

        Raises InvalidRequest for an id that is not in the vocabulary.
        """
        if not 0 <= token < self.n_vocab:
            raise InvalidRequest(f"token id {token} is not in the vocabulary of {self.n_vocab}")
        room = _PIECE_BYTES
        for _ in range(2):
            buffer = ctypes.create_string_buffer(room)
            count = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if count >= 0:
                return buffer.raw[:count]
            room = -count
        raise TokenizeFailed(f"llama.cpp cannot spell token {token} (llama_token_to_piece: {count})")

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`, control tokens left out, invalid UTF-8 as U+FFFD."""
        return b"".join(map(self.token_bytes, tokens)).decode(errors="replace")

    def is_end(self, token: int) -> bool:
        """True if `token` ends an answer."""
        return bool(llama_cpp.llama_vocab_is_eog(self._vocab, token))


def _token_or_none(token: int) -> int | None:
    return token if token >= 0 else None
