"""JSON schemas, grammars, regular expressions and choices → allowed and forced tokens: the door to llguidance.

`Grammars.compile` gives a `GrammarState` for one answer; the state says which tokens are `allowed` or `forced` next and
`accept`s those that follow. llguidance walks the grammar over its own form of the model's vocabulary, which takes a
second or two to make for 262k tokens: the thread that compiles the first grammar makes it. The latest compiled grammars
are kept, so that the check at the edge and the answers themselves cost one compilation, and then a copy (3 us).

Grammars come from clients. Their size is bounded at the edge, the work and memory they may cause by the limits here,
and they are compiled on a large stack. Nothing is fetched: a `$ref` to another document is refused.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property, lru_cache
from threading import Lock
from typing import TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from runtime.errors import GrammarFailed, InvalidRequest
from runtime.llama.interface import TokenizerLike
from runtime.requests import Grammar

KEPT_GRAMMARS = 32
# A state of the lexer takes 1-2 kB, and each answer has its own.
MAX_LEXER_STATES = 1 << 14
_REASON_CHARS = 300
# Marks the start of a text for tokenizers that put a space there.
_MARK = "\x02"
# Measured: 6,000 Lark rules that each name the next, or 5,000 schema references, compile within 64 MiB; an accepted
# grammar is too small in bytes for more than about 8,000. Only the used part of the stack takes memory.
STACK_BYTES = 256 << 20
# The size is one setting of the whole process.
_STACK_SIZE_LOCK = threading.Lock()
_NAMES = {
    "json_schema": "a JSON schema",
    "lark": "a Lark grammar",
    "regex": "a regular expression",
    "choice": "a list of choices",
}

# What llguidance says of a token that it was given and does not allow; its other errors on the way are limits met.
_NOT_ALLOWED = "doesn't satisfy the grammar"
# Tokens that a new grammar is tried with: one that grows without end shows it, before an answer is begun.
TRIED_TOKENS = 64

# Regular expressions as schemas' patterns read them: `\d`, `\w` and `\s` are ASCII, not any script's.
_CLASSES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[0-9A-Za-z_]",
    "W": "[^0-9A-Za-z_]",
    "s": r"[ \t\n\r\f\v]",
    "S": r"[^ \t\n\r\f\v]",
}
# A string, a comment or a regular expression of a Lark grammar.
_LARK = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|(/(?:\\.|[^/\\])+/)', re.DOTALL)

T = TypeVar("T")


# The name of a Lark grammar's rule for an answer that is text, where another grammar says what that is.
TEXT_RULE = "text"


class Grammars:
    """Compiled grammars over the vocabulary of one model. Any thread may use it."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._source = tokenizer
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, grammar: Grammar) -> "GrammarState":
        """The grammar at its beginning, for one answer. Raises InvalidRequest, with its `param`, if it is unusable."""
        matcher = self._matcher(grammar).deep_copy()
        closers = self._vocabulary[1] if grammar.kind == "json_schema" else None
        return GrammarState(matcher, self._source, grammar.param, closers)

    def not_enforced(self, grammar: Grammar) -> tuple[str, ...]:
        """The parts of a compiled grammar that llguidance cannot enforce, in its words."""
        return tuple(self._matcher(grammar).get_grammar_warnings())

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        with self._lock:
            if grammar in self._compiled:
                self._compiled.move_to_end(grammar)
                return self._compiled[grammar]
            tokenizer, _ = self._vocabulary
        matcher = on_large_stack(lambda: _compile(grammar, tokenizer, self._source.end_tokens))
        with self._lock:
            self._compiled[grammar] = matcher
            while len(self._compiled) > KEPT_GRAMMARS:
                self._compiled.popitem(last=False)
        return matcher

    @cached_property
    def _vocabulary(self) -> "tuple[LLTokenizer, JsonClosers]":
        """The vocabulary as grammars use it, spelled once for both."""
        source, spelled = self._source, _Vocabulary(self._source)
        tokenizer = LLTokenizer(TokenizerWrapper(spelled), source.n_vocab, list(source.end_tokens))
        return tokenizer, JsonClosers(spelled.tokens, source.end_tokens)


class JsonClosers:
    """The tokens that end a JSON value which a model has nothing more to write in.

    A model that was trained on other answers wants to end before the JSON is complete. If it may not, its next choices
    mean nothing, and it fills a string with them until the answer is too long.
    """

    def __init__(self, spelled: Sequence[bytes], end_tokens: Sequence[int]) -> None:
        self._ends = np.asarray(end_tokens, np.int64)
        first = np.frombuffer(b"".join(raw[:1] or b"\0" for raw in spelled), np.uint8)
        self._quotes = first == ord('"')
        self._brackets = (first == ord("}")) | (first == ord("]"))
        self._commas = first == ord(",")
        self._letters = first == ord("z")  # begins no value and no literal: only a string takes it

    def narrow(self, allowed: np.ndarray, logits: np.ndarray) -> np.ndarray:
        """The allowed tokens; only those that close what is open if the likeliest token would end the answer.

        Both are of shape (n_vocab,), bool and float32. Where nothing can be closed, all allowed tokens stay.
        """
        likeliest = int(logits.argmax())
        if likeliest not in self._ends or allowed[likeliest]:
            return allowed
        wanted = (self._quotes,) if (allowed & self._letters).any() else (self._brackets, self._commas)
        narrowed = (np.logical_and(allowed, closing) for closing in wanted)
        return next((closing for closing in narrowed if closing.any()), allowed)


class GrammarState:
    """One answer's place in its grammar. Not thread-safe: one thread at a time."""

    def __init__(
        self, matcher: LLMatcher, tokenizer: TokenizerLike, param: str, closers: JsonClosers | None = None
    ) -> None:
        self._param = param
        self._matcher = matcher
        self.closers = closers
        self._n_vocab = tokenizer.n_vocab
        self._is_end = tokenizer.is_end

    @property
    def complete(self) -> bool:
        """True if the answer is complete and only its end may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def allowed(self) -> np.ndarray:
        """The tokens that may come next, bool of shape (n_vocab,); end tokens among them where the answer may end.

        Raises InvalidRequest if the grammar is too large to be followed further, or leaves no token.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._raise_if_failed()
        allowed = np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(np.bool_)
        if not allowed.any():
            message = f"{self._param}: no token of this model can follow what was written so far"
            raise InvalidRequest(message, param=self._param, code="invalid_grammar")
        return allowed

    def forced(self) -> list[int]:
        """The only tokens that the grammar allows next, in order; often none. Does not accept them."""
        tokens = self._matcher.compute_ff_tokens()
        ends = next((place for place, token in enumerate(tokens) if self._is_end(token)), len(tokens))
        return tokens[:ends]

    def accept(self, tokens: Sequence[int]) -> None:
        """Advance by `tokens`.

        Raises GrammarFailed if the grammar does not allow them, InvalidRequest if it is too large to be followed.
        """
        if not self._matcher.consume_tokens(list(tokens)):
            self._raise_if_failed()
            raise GrammarFailed(f"the grammar does not allow the tokens {tokens!r}")

    def _raise_if_failed(self) -> None:
        if not self._matcher.is_error():
            return
        if _NOT_ALLOWED in self._matcher.get_error():
            raise GrammarFailed(f"the grammar failed while the answer was written: {_reason(self._matcher)}")
        raise _too_large(self._param, self._matcher)


class _Vocabulary:
    """A tokenizer in llguidance's form: every token's bytes, control tokens marked by a byte that no text holds."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._source = tokenizer
        self.eos_token_id = tokenizer.eos if tokenizer.eos is not None else tokenizer.end_tokens[0]
        self.bos_token_id = tokenizer.bos
        self.tokens = [self._spelled(token) for token in range(tokenizer.n_vocab)]
        self.special_token_ids = [token for token, raw in enumerate(self.tokens) if raw.startswith(b"\xff")]

    def _spelled(self, token: int) -> bytes:
        raw = self._source.token_bytes(token)
        control = b"" if raw else self._source.token_bytes(token, special=True)
        return b"\xff" + control if control else raw

    def __call__(self, text: str | bytes) -> list[int]:
        """Token ids of exactly this text, with no space or BOS in front."""
        plain = text.decode() if isinstance(text, bytes) else text
        tokens = self._encode(plain)
        if b"".join(self.tokens[token] for token in tokens) == plain.encode():
            return tokens
        return self._encode(_MARK + plain)[len(self._encode(_MARK)) :]

    def _encode(self, text: str) -> list[int]:
        return self._source.encode(text, add_special=False, parse_special=False)


def _compile(grammar: Grammar, tokenizer: LLTokenizer, ends: Sequence[int]) -> LLMatcher:
    limits = LLParserLimits(max_lexer_states=MAX_LEXER_STATES, verbose_errors=False)
    try:
        matcher = LLMatcher(tokenizer, _translated(grammar), log_level=0, limits=limits)
        matcher.compute_bitmask()  # the first mask is the most work: here it delays no step of the engine
    except ValueError as error:
        raise InvalidRequest(f"{grammar.param}: {str(error)[:_REASON_CHARS]}", param=grammar.param) from None
    if matcher.is_error():
        message = f"{grammar.param} cannot be used as {_NAMES[grammar.kind]}: {_reason(matcher)}"
        raise InvalidRequest(message, param=grammar.param, code="invalid_grammar")
    if grammar.kind != "choice":
        _try(grammar, matcher.deep_copy(), ends)
    return matcher


def _try(grammar: Grammar, matcher: LLMatcher, ends: Sequence[int]) -> None:
    """Write the beginning of an answer. Raises InvalidRequest if the grammar becomes too large meanwhile."""
    for _ in range(TRIED_TOKENS):
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        if matcher.is_error():
            raise _too_large(grammar.param, matcher)
        allowed[list(ends)] = 0
        token = int(allowed.argmax())
        if not allowed[token] or not matcher.consume_token(token):
            return


def _too_large(param: str, matcher: LLMatcher) -> InvalidRequest:
    message = f"{param} is too large to be followed while an answer is written: {_reason(matcher)}; make it smaller"
    return InvalidRequest(message, param=param, code="grammar_too_large")


@lru_cache(KEPT_GRAMMARS)
def judge_schema(schema: str) -> tuple[str | None, tuple[str, ...]]:
    """The reason why a schema cannot be used, or None; and the parts that cannot be enforced, in llguidance's words."""

    def judge() -> tuple[bool, list[str]]:
        return LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(schema))

    refused, said = on_large_stack(judge)
    return (said[0].split("<state>")[0].strip()[:_REASON_CHARS], ()) if refused else (None, tuple(said))


def is_regex(pattern: str) -> bool:
    """True if the pattern can be enforced."""
    refused, _ = judge_schema(json.dumps({"type": "string", "pattern": pattern}))
    return refused is None


def _translated(grammar: Grammar) -> str:
    """The grammar in llguidance's own form."""
    if grammar.kind == "lark":
        lark = LLMatcher.grammar_from_lark(_ascii_lark(_lark(grammar)))
        if grammar.text is None:
            return lark
        text = _translated(grammar.text)
        part = {"lark_grammar": text} if grammar.text.kind in ("lark", "choice") else json.loads(text)["grammars"][0]
        return json.dumps({"grammars": [{"lark_grammar": lark}, part | {"name": TEXT_RULE}]})
    if grammar.kind == "regex":
        return LLMatcher.grammar_from_regex(_ascii_regex(grammar.source))
    if grammar.kind == "choice":
        texts = json.loads(grammar.source)
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, texts)))
    # White space as in json.dumps, unless the schema asks for another form: free, a small model fills its answer
    # with blanks, and without any it leaves the form that it was trained on.
    return LLMatcher.grammar_from_json_schema(
        grammar.source, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    )


def _lark(grammar: Grammar) -> str:
    """The source in Lark, also where the client wrote it in llama.cpp's form (GBNF). Raises InvalidRequest."""
    if "::=" not in grammar.source:
        return grammar.source
    try:
        return any_to_lark(grammar.source)
    except (GbnfToLarkError, RecursionError, ValueError) as error:
        message = f"{grammar.param} cannot be read as GBNF: {str(error)[:_REASON_CHARS]}"
        raise InvalidRequest(message, param=grammar.param, code="invalid_grammar") from None


def _reason(matcher: LLMatcher) -> str:
    return matcher.get_error().split("<state>")[0].replace("<non-verbose/>", "").strip()[:_REASON_CHARS]


def on_large_stack(call: Callable[[], T]) -> T:
    """`call()`, in a thread of its own with STACK_BYTES of stack. Raises the errors of `call`."""
    done: Future[T] = Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # noqa: BLE001 - handed over to the caller
            done.set_exception(error)

    thread = threading.Thread(target=work, name="deskside-grammar", daemon=True)
    with _STACK_SIZE_LOCK:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread.start()
        finally:
            threading.stack_size(before)
    return done.result()


def _ascii_regex(pattern: str) -> str:
    """The pattern with ASCII classes. They nest in brackets too, as the dialect allows."""
    return re.sub(r"\\(.)", lambda found: _CLASSES.get(found[1], found[0]), pattern, flags=re.DOTALL)


def _ascii_lark(source: str) -> str:
    """A Lark grammar with ASCII classes in its regular expressions."""
    return _LARK.sub(lambda found: _ascii_regex(found[0]) if found[1] else found[0], source)
