"""The types of a tokenizer on its way into a GGUF, the table of its tokens, and the reading of its files.

Token types as in SentencePiece: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from pydantic_core import from_json

from convert.errors import TokenizerInvalid, json_fault

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_MODEL = "tokenizer.model"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")
MAX_FILE_BYTES = 256 << 20
MAX_TOKENS = 1 << 21
MAX_MERGES = 1 << 22
MAX_TOKEN_BYTES = 1 << 16
SPACE_MARK = "▁"
_UNUSED_SCORE = -10_000.0


class TokenizerKind(StrEnum):
    """Kinds of tokenizer that can be converted and trimmed, as `tokenizer.ggml.model` spells them."""

    SENTENCEPIECE = "llama"
    BPE = "gpt2"
    UNIGRAM = "t5"


class TokenType(IntEnum):
    """The values of `tokenizer.ggml.token_type`, which are SentencePiece's."""

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
    kind: TokenType = TokenType.NORMAL
    score: float = 0.0


@dataclass(frozen=True)
class AddedToken:
    """A token that the tokenizer matches in the text before it normalizes and splits the rest."""

    id: int
    text: str
    special: bool
    normalized: bool = False
    strips_left: bool = False
    strips_right: bool = False
    single_word: bool = False


@dataclass(frozen=True)
class ParsedTokenizer:
    """A tokenizer in llama.cpp's terms. `pre` names the pre-tokenizer; only byte-level BPE has `merges`.

    A vocabulary has hundreds of thousands of tokens, nearly all of them normal: `texts` maps their ids to texts, and
    `scores` (float32, by id) is set where the model has scores. `odd` holds the other tokens in full and takes
    precedence over `texts`. `add_space_prefix`: llama.cpp puts a space before each run of text. `spaces_first`: the
    original puts it only where a text begins. `nfc`: the original
    tokenizer composes Unicode (NFC) first, which llama.cpp leaves to the caller.
    """

    model: TokenizerKind
    pre: str
    texts: Mapping[int, str]
    odd: Mapping[int, Piece]
    scores: np.ndarray | None = None
    merges: Sequence[bytes] | None = None
    add_space_prefix: bool | None = None
    spaces_first: bool = False
    remove_extra_whitespaces: bool | None = None
    charsmap: bytes = b""
    added: Sequence[AddedToken] = ()
    nfc: bool = False
    warnings: Sequence[str] = field(default=())


@dataclass(frozen=True)
class TokenTable:
    """One token for each row of the embedding, in columns: texts, int32 kinds, float32 scores; and text -> id."""

    texts: Sequence[str]
    kinds: np.ndarray
    scores: np.ndarray
    ids: Mapping[str, int]


def token_table(parsed: ParsedTokenizer, n_rows: int, source: str) -> TokenTable:
    """The tokens of `parsed`, padded to `n_rows`: an id without a token becomes an unused one, named after its id.

    Raises TokenizerInvalid for a vocabulary that is empty or larger than the embedding, and for two tokens of the same
    text, on which llama.cpp aborts.
    """
    last = max(chain(parsed.texts, parsed.odd), default=-1)
    if last < 0:
        raise TokenizerInvalid(f"{source} holds no tokens")
    if last >= n_rows:
        added = parsed.odd[last].text if last in parsed.odd else parsed.texts[last]
        raise TokenizerInvalid(
            f"the tokenizer is larger than the embedding: {source} has token ids up to {last}, "
            f"the model has {n_rows} rows. A token was added ({added!r}) without resizing the model: call "
            "`model.resize_token_embeddings(len(tokenizer))` and save both, or, if it was never trained (a pad token), "
            "save the base's tokenizer beside the model"
        )
    unused = [index for index in range(n_rows) if index not in parsed.texts]
    odd = {index: Piece(f"[PAD{index}]", TokenType.UNUSED, _UNUSED_SCORE) for index in unused} | dict(parsed.odd)
    texts = [parsed.texts.get(index, "") for index in range(n_rows)]
    kinds = np.full(n_rows, TokenType.NORMAL, np.int32)
    scores = np.zeros(n_rows, np.float32)
    if parsed.scores is not None:
        scores[: len(parsed.scores)] = parsed.scores
    for index, piece in odd.items():
        texts[index], kinds[index], scores[index] = piece.text, piece.kind, piece.score
    return TokenTable(texts, kinds, scores, _ids(texts, source))


def added_piece(token: AddedToken, score: float, *, unknown: bool) -> Piece:
    """An added token as llama.cpp needs it: control tokens are not recognised in a user's text, user-defined ones are.

    `unknown`: it is the token for unknown text.
    """
    if unknown:
        return Piece(token.text, TokenType.UNKNOWN, score)
    if token.special or _looks_special(token.text):
        return Piece(token.text, TokenType.CONTROL, score)
    # llama.cpp matches these in the raw text, before spaces become marks
    return Piece(token.text.replace(SPACE_MARK, " "), TokenType.USER_DEFINED, score)


def read_bytes(file: Path) -> bytes:
    """The whole file. Raises TokenizerInvalid when it is too large or cannot be read."""
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise TokenizerInvalid(f"{str(file)!r} has {size} bytes, the limit is {MAX_FILE_BYTES}")
        return file.read_bytes()
    except OSError as error:
        raise TokenizerInvalid(f"{str(file)!r} cannot be read: {error.strerror or error}") from error


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, empty if the file does not exist. Raises TokenizerInvalid."""
    if not file.exists():
        return {}
    try:
        # cached strings would keep the memory of the whole parse alive
        found = from_json(read_bytes(file), cache_strings="none")
    except ValueError as error:
        raise TokenizerInvalid(json_fault(file, error)) from error
    if not isinstance(found, dict):
        raise TokenizerInvalid(f"{str(file)!r} holds a {type(found).__name__}, a JSON object is needed")
    return found


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of special_tokens_map.json where transformers reads that, too.

    It does so for a config without `added_tokens_decoder`, as versions before 4.34 wrote it: the map then overrides.
    Raises TokenizerInvalid.
    """
    config = read_object(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        return config
    return config | {role: token for role, token in read_object(folder / SPECIAL_TOKENS_MAP).items() if token}


def with_config_tokens(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """tokenizer.json with the added tokens that tokenizer_config.json has beyond it, or with other flags.

    transformers adds them when it loads the two. Raises TokenizerInvalid for an entry that is no token.
    """
    given = entries(tokenizer, "added_tokens")
    extra = config_tokens(given, config)
    if not extra:
        return dict(tokenizer)
    spelled = {entry["content"] for entry in extra}
    kept = [
        entry for entry in entries(tokenizer, "added_tokens") if not is_token(entry) or entry["content"] not in spelled
    ]
    return {**tokenizer, "added_tokens": kept + extra}


def config_tokens(added: Sequence[Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The added tokens of tokenizer_config.json that are not in `added`, as tokenizer.json has them, or not like that.

    Raises TokenizerInvalid for an entry that is no token.
    """
    listed = {entry["content"]: entry for entry in added if is_token(entry)}
    extra: dict[str, dict[str, Any]] = {}
    for number, entry in part(config, "added_tokens_decoder").items():
        if not number.isdecimal() or not is_token(entry):
            raise TokenizerInvalid(f"{TOKENIZER_CONFIG!r} has the added token {number!r}: {entry!r:.120}")
        known = listed.get(entry["content"])
        if known is None or any(entry.get(flag, known.get(flag)) != known.get(flag) for flag in TOKEN_FLAGS):
            place = known.get("id") if known is not None else int(number)
            extra[entry["content"]] = {**(known or {}), **entry, "id": place}
    return list(extra.values())


def is_token(entry: object) -> TypeGuard[dict[str, Any]]:
    """True for an added token as the JSON files write it."""
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and bool(entry["content"])


def part(parent: object, key: str) -> dict[str, Any]:
    """The object at `key`, empty if there is none."""
    found = parent.get(key) if isinstance(parent, dict) else None
    return found if isinstance(found, dict) else {}


def entries(parent: object, key: str) -> list[Any]:
    """The list at `key`, empty if there is none."""
    found = parent.get(key) if isinstance(parent, dict) else None
    return found if isinstance(found, list) else []


def is_id(value: object) -> TypeGuard[int]:
    """True for a value that can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _looks_special(text: str) -> bool:
    """True for texts of special tokens that some tokenizers do not mark as special."""
    return (
        text in {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
        or (text.startswith("<|") and text.endswith("|>"))
        or (text.startswith("<｜") and text.endswith("｜>"))
        or (text.startswith("<unused") and text.endswith(">"))
    )


def _ids(texts: Sequence[str], source: str) -> dict[str, int]:
    ids: dict[str, int] = {}
    for index, text in enumerate(texts):
        spelled = text or f"[EMPTY_{index}]"  # llama.cpp's own name for an empty one
        if (first := ids.setdefault(spelled, index)) != index:
            raise TokenizerInvalid(f"{source} spells token {first} and token {index} alike: {spelled[:64]!r}")
        if len(spelled) > MAX_TOKEN_BYTES:
            raise TokenizerInvalid(f"{source}: token {index} has {len(spelled)} characters, limit {MAX_TOKEN_BYTES}")
    return ids
