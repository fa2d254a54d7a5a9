"""Toy vocabularies of each kind, and deliberately simple tokenizers for them as independent judges."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from models.gguf.fields import Field
from models.gguf.header import Header

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE, NORMAL = 2, 3, 4, 5, 6, 1
SPECIAL = (b"<unk>", b"<s>", b"</s>")
SPECIAL_TYPES = (UNKNOWN, CONTROL, CONTROL)
BYTES = tuple(b"<0x%02X>" % byte for byte in range(256))


def header(model: str, tokens: Sequence[bytes], types: Sequence[int], **more: Field) -> Header:
    """A header that llama.cpp can read a vocabulary from; `more` are fields below `tokenizer.ggml.`."""
    fields = {
        "general.architecture": Field.string("llama"),
        "tokenizer.ggml.model": Field.string(model),
        "tokenizer.ggml.tokens": Field.string_array(tokens),
        "tokenizer.ggml.token_type": Field.int32_array(types),
        "llama.vocab_size": Field.uint32(len(tokens)),
    }
    fields |= {f"tokenizer.ggml.{key}": field for key, field in more.items()}
    return Header(Path("toy.gguf"), fields, {}, 32)


def sentencepiece(scores: Mapping[str, float], *, controls: Sequence[bytes] = ()) -> Header:
    """Special and byte tokens, then `scores`' tokens, then more control tokens."""
    tokens = [*SPECIAL, *BYTES, *(text.encode() for text in scores), *controls]
    types = [*SPECIAL_TYPES, *[BYTE] * 256, *[NORMAL] * len(scores), *[CONTROL] * len(controls)]
    numbers = [*[0.0] * 259, *scores.values(), *[0.0] * len(controls)]
    more = {"scores": Field.float32_array(numbers), "add_space_prefix": Field.boolean(False)}
    ids = {"bos_token_id": Field.uint32(1), "eos_token_id": Field.uint32(2), "unknown_token_id": Field.uint32(0)}
    return header("llama", tokens, types, **more, **ids)


def byte_level(
    merges: Sequence[tuple[str, str]], *, pre: str = "gpt-2", nameless: Sequence[str] = (), extra: Sequence[str] = ()
) -> Header:
    """The 256 bytes, the merges' results except `nameless`, the `extra` tokens that no merge makes, one end token."""
    plain = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    chars = [chr(code) for code in (*plain, *range(0x100, 0x100 + 256 - len(plain)))]
    made = [left + right for left, right in merges if left + right not in nameless]
    tokens = [text.encode() for text in dict.fromkeys([*chars, *made, *extra])]
    types = [*[NORMAL] * len(tokens), CONTROL]
    lines = Field.string_array([f"{left} {right}".encode() for left, right in merges])
    ids = {"bos_token_id": Field.uint32(len(tokens)), "eos_token_id": Field.uint32(len(tokens))}
    return header("gpt2", [*tokens, b"<|end|>"], types, merges=lines, pre=Field.string(pre), **ids)


def unigram(scores: Mapping[str, float], *, user_defined: Sequence[str] = (), unused: Mapping[str, float]) -> Header:
    """Padding, end and unknown as T5 has them, then the tokens."""
    tokens = [b"<pad>", b"</s>", b"<unk>", *(text.encode() for text in (*scores, *user_defined, *unused))]
    types = [CONTROL, CONTROL, UNKNOWN, *[NORMAL] * len(scores)]
    types += [*[USER_DEFINED] * len(user_defined), *[UNUSED] * len(unused)]
    numbers = [0.0, 0.0, 0.0, *scores.values(), *[0.0] * len(user_defined), *unused.values()]
    more = {"scores": Field.float32_array(numbers), "add_space_prefix": Field.boolean(False)}
    ids = {"eos_token_id": Field.uint32(1), "unknown_token_id": Field.uint32(2)}
    return header("t5", tokens, types, **more, **ids)


def tokens_of(given: Header) -> list[bytes]:
    """The vocabulary's tokens by id."""
    return given.fields["tokenizer.ggml.tokens"].strings or []


def scores_of(given: Header) -> dict[bytes, float]:
    """Token -> score."""
    numbers = given.fields["tokenizer.ggml.scores"].numbers or ()
    return dict(zip(tokens_of(given), map(float, numbers), strict=True))


def simple_sentencepiece(given: Header, text: str) -> list[bytes]:
    """Merge the best pair, leftmost of equals, again and again."""
    scores = scores_of(given)
    pieces = [char.encode() for char in text]
    while pairs := [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]:
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return [part for piece in pieces for part in ([piece] if piece in scores else [b"<0x%02X>" % b for b in piece])]


def simple_byte_level(given: Header, word: str) -> list[bytes]:
    """One word of ASCII letters: as above, by rank; a piece that is not a token is spelled in bytes."""
    lines = given.fields["tokenizer.ggml.merges"].strings or []
    ranks = {line: rank for rank, line in reversed(list(enumerate(lines)))}
    pieces = [char.encode() for char in word]
    while pairs := [(ranks[a + b" " + b], i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b" " + b in ranks]:
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    known = set(tokens_of(given))
    return [part for piece in pieces for part in ([piece] if piece in known else [bytes([b]) for b in piece])]


def simple_unigram(given: Header, text: str) -> list[bytes]:
    """Every way to cut a short text, the best one: the sum of scores decides, the first found of equals.

    Of equal sums the cut whose last token begins first wins, as in the usual search from left to right.
    """
    scores = scores_of(given)
    kinds = dict(zip(tokens_of(given), given.fields["tokenizer.ggml.token_type"].numbers or (), strict=True))
    usable = {token: scores[token] if kinds[token] != USER_DEFINED else 0.0 for token in scores}
    usable = {token: score for token, score in usable.items() if kinds[token] in {NORMAL, USER_DEFINED, UNUSED}}
    lowest = min(scores[token] for token in scores if kinds[token] == NORMAL)
    best: list[tuple[float, list[bytes]]] = [(0.0, [])]
    for end in range(1, len(text) + 1):
        found: list[tuple[float, list[bytes]]] = []
        for start in range(end):
            token = text[start:end].encode()
            if token in usable:
                found.append((best[start][0] + usable[token], [*best[start][1], token]))
            elif end - start == 1:
                found.append((best[start][0] + lowest - 10, [*best[start][1], b"<unk>"]))
        best.append(max(found, key=lambda one: one[0]))
    cut = best[-1][1]
    return [token for i, token in enumerate(cut) if not (token == b"<unk>" and i and cut[i - 1] == b"<unk>")]
