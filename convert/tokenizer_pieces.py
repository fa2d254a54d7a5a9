"""The nouns of a vocabulary on its way into a GGUF, and the rules that hold for each kind of tokenizer.

Types as in SentencePiece: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

from .errors import TokenizerInvalid
from .tokenizer_files import MAX_TOKEN_BYTES

SPACE_MARK = "▁"
_UNUSED_SCORE = -10_000.0

Model = Literal["gpt2", "llama", "t5"]


class Kind(IntEnum):
    """What a token is, by its number in the file."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Piece:
    """One token as the GGUF spells it."""

    text: str
    kind: Kind = Kind.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class AddedToken:
    """A token that is cut out of the text before anything else happens to it."""

    id: int
    text: str
    special: bool
    normalized: bool = False
    strips_left: bool = False
    strips_right: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class Pieces:
    """A tokenizer as llama.cpp understands it. `pre` names the pre-tokenizer, `merges` are of byte-level BPE only.

    `add_space_prefix` puts a space before each run of text. `nfc` says that Hugging Face's tokenizer brings text to
    Unicode's composed form first, which llama.cpp leaves to whoever sends the text.
    """

    model: Model
    pre: str
    by_id: dict[int, Piece]
    merges: Sequence[str] | None = None
    add_space_prefix: bool | None = None
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""
    added: Sequence[AddedToken] = ()
    nfc: bool = False
    warnings: Sequence[str] = field(default=())


def looks_special(text: str) -> bool:
    """Whether a token that is not marked special is one all the same: some tokenizers forget the mark."""
    return (
        text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def added_piece(token: AddedToken, score: float, *, unknown: bool) -> Piece:
    """How llama.cpp is told about an added token: control ones are not seen in a user's text."""
    if unknown:
        return Piece(token.text, Kind.UNKNOWN, score)
    if token.special or looks_special(token.text):
        return Piece(token.text, Kind.CONTROL, score)
    # llama.cpp looks for these in the text as it came, before spaces become marks
    return Piece(token.text.replace(SPACE_MARK, " "), Kind.USER_DEFINED, score)


def padded(by_id: dict[int, Piece], n_rows: int, source: str) -> list[Piece]:
    """One piece for each row of the embedding. Ids that no token has are unused ones, named after their place.

    Raises TokenizerInvalid for a vocabulary that is empty, larger than the embedding, or spells two tokens alike,
    on which llama.cpp aborts.
    """
    if not by_id:
        raise TokenizerInvalid(f"{source} holds no tokens")
    size = max(by_id) + 1
    if size > n_rows:
        raise TokenizerInvalid(
            f"the tokenizer is larger than the embedding: {source} has token ids up to {size - 1}, "
            f"the model has {n_rows} rows; was a token added without resizing the model?"
        )
    pieces = [by_id.get(index) or Piece(f"[PAD{index}]", Kind.UNUSED, _UNUSED_SCORE) for index in range(n_rows)]
    first: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        spelled = piece.text or f"[EMPTY_{index}]"  # llama.cpp's own name for an empty one
        if spelled in first:
            raise TokenizerInvalid(f"{source} spells token {first[spelled]} and token {index} alike: {spelled[:64]!r}")
        if len(spelled) > MAX_TOKEN_BYTES:
            raise TokenizerInvalid(f"{source}: token {index} has {len(spelled)} characters, limit {MAX_TOKEN_BYTES}")
        first[spelled] = index
    return pieces
