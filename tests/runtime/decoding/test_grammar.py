"""llguidance over the fake's bytes: what comes out always fits, what cannot be used is refused, nothing kills us."""

import json
import re
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.decoding.grammar import KEPT_GRAMMARS, Grammars, GrammarState
from runtime.errors import GrammarFailed, InvalidRequest
from runtime.openai.grammar import MAX_GRAMMAR_BYTES
from runtime.requests import Grammar, GrammarKind
from tests.support.runtime.fakes import BOS, EOS, FakeTokenizer

GRAMMARS = Grammars(FakeTokenizer())
ENDS = FakeTokenizer.end_tokens
TEXTS = st.text(min_size=1, max_size=12)


def grammar(kind: GrammarKind, source: object) -> Grammar:
    text = source if isinstance(source, str) else json.dumps(source)
    return Grammar(kind, text, {"json_schema": "response_format", "lark": "grammar"}.get(kind, kind))


def walk(asked: Grammar, seed: int, *, forcing: bool, limit: int = 4000) -> str:
    """An answer drawn uniformly from what is allowed, with forced tokens taken at once or drawn like the others."""
    state, random, written = GRAMMARS.compile(asked), np.random.default_rng(seed), list[int]()
    while not state.complete:
        assert len(written) < limit
        if forcing and (forced := state.forced()):
            state.accept(forced)
            written += forced
            continue
        token = int(random.choice(np.flatnonzero(state.allowed())))
        if token in ENDS:
            break
        state.accept([token])
        written.append(token)
    return bytes(written).decode()


def scalars() -> st.SearchStrategy[dict[str, Any]]:
    bounds = st.tuples(st.integers(-300, 300), st.integers(0, 500))
    return st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        bounds.map(lambda b: {"type": "integer", "minimum": b[0], "maximum": b[0] + b[1]}),
        st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n}),
        st.lists(TEXTS, min_size=1, max_size=4, unique=True).map(lambda texts: {"enum": texts}),
    )


def nested(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    properties = st.dictionaries(TEXTS, inner, min_size=1, max_size=3)
    counts = st.tuples(st.integers(0, 2), st.integers(0, 2), inner)
    return st.one_of(
        properties.map(
            lambda p: {"type": "object", "properties": p, "required": list(p), "additionalProperties": False}
        ),
        counts.map(lambda c: {"type": "array", "items": c[2], "minItems": c[0], "maxItems": c[0] + c[1]}),
    )


def fits(schema: dict[str, Any], value: Any) -> bool:
    """JSON Schema's meaning of what the strategies above build."""
    if "enum" in schema:
        return value in schema["enum"]
    kinds: dict[str, type] = {"boolean": bool, "integer": int, "string": str, "object": dict, "array": list}
    if schema["type"] == "null" or type(value) is not kinds[schema["type"]]:
        return schema["type"] == "null" and value is None
    if isinstance(value, dict):
        return set(value) == set(schema["required"]) and all(fits(schema["properties"][k], v) for k, v in value.items())
    if isinstance(value, list):
        fine = all(fits(schema["items"], item) for item in value)
        return fine and len(value) in range(schema["minItems"], schema["maxItems"] + 1)
    if isinstance(value, str):
        return len(value) in range(schema["maxLength"] + 1)
    return isinstance(value, bool) or bool(schema["minimum"] <= value <= schema["maximum"])


@settings(max_examples=60)
@given(st.recursive(scalars(), nested, max_leaves=5), st.integers(0, 99), st.booleans())
def test_whatever_is_drawn_under_a_schema_fits_it(schema: dict[str, Any], seed: int, forcing: bool) -> None:
    answer = json.loads(walk(grammar("json_schema", schema), seed, forcing=forcing))
    assert fits(schema, answer), (schema, answer)


@settings(max_examples=60)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.integers(0, 99), st.booleans())
def test_a_choice_is_always_one_of_the_choices(choices: list[str], seed: int, forcing: bool) -> None:
    assert walk(grammar("choice", choices), seed, forcing=forcing) in choices


@pytest.mark.parametrize(
    "pattern", ["a+b?", "[0-9]{4}-[0-9]{2}", "(spam|ham)(, (spam|ham)){0,3}", "h[éè]llo|wörld", "x?"]
)
@pytest.mark.parametrize("forcing", [True, False])
def test_an_answer_matches_the_whole_regex(pattern: str, forcing: bool) -> None:
    answers = {walk(grammar("regex", pattern), seed, forcing=forcing) for seed in range(20)}
    assert all(re.fullmatch(pattern, answer) for answer in answers)
    assert len(answers) > 1


def test_a_lark_grammar_allows_what_it_says() -> None:
    rules = 'start: "from " NAME (" to " NAME)?\nNAME: /[A-Z][a-z]{2,4}/'
    answers = {walk(grammar("lark", rules), seed, forcing=True) for seed in range(20)}
    assert all(re.fullmatch("from [A-Z][a-z]{2,4}( to [A-Z][a-z]{2,4})?", answer) for answer in answers)


def test_the_end_is_allowed_where_the_answer_may_end_and_control_tokens_never_are() -> None:
    state = GRAMMARS.compile(grammar("choice", ["a", "ab"]))
    assert np.flatnonzero(state.allowed()).tolist() == [ord("a")]
    state.accept([ord("a")])
    assert np.flatnonzero(state.allowed()).tolist() == [ord("b"), *ENDS]
    assert not state.complete
    state.accept([ord("b")])
    assert state.complete
    string = GRAMMARS.compile(grammar("regex", "(?s).*"))
    assert not string.allowed()[BOS]
    assert string.allowed()[EOS]


def test_forced_tokens_are_named_without_being_taken() -> None:
    state = GRAMMARS.compile(grammar("choice", ["exmh-users", "exmh-workers"]))
    assert bytes(state.forced()) == bytes(state.forced()) == b"exmh-"
    state.accept([*b"exmh-w"])
    assert bytes(state.forced()) == b"orkers"


def test_a_token_that_is_not_allowed_breaks_this_answer_only() -> None:
    asked = grammar("regex", "ab")
    broken, fine = GRAMMARS.compile(asked), GRAMMARS.compile(asked)
    with pytest.raises(GrammarFailed, match="grammar"):
        broken.accept([ord("x")])
    assert not broken.complete
    with pytest.raises(GrammarFailed):
        broken.allowed()
    fine.accept([*b"ab"])
    assert fine.complete


@pytest.mark.parametrize(
    ("kind", "source", "said"),
    [
        ("json_schema", {"type": "objekt"}, "objekt"),
        ("json_schema", {"not": {"type": "string"}}, "not"),
        ("json_schema", {"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ("json_schema", {"$ref": "http://localhost/other"}, "localhost"),
        ("json_schema", {"type": "string", "pattern": "("}, "regex"),
        ("regex", "(a", "unclosed"),
        ("regex", "(?=a)b", "look-around"),
        ("lark", "start: missing", "missing"),
        ("lark", "begin: 'a'", ""),
        ("lark", "start: (((", ""),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_field_and_the_reason(
    kind: GrammarKind, source: object, said: str
) -> None:
    asked = grammar(kind, source)
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.compile(asked)
    assert caught.value.param == asked.param
    assert str(caught.value).startswith(asked.param)
    assert said in str(caught.value)


def chain(count: int) -> str:
    return "start: r0\n" + "".join(f"r{i}:r{i + 1}\n" for i in range(count)) + f'r{count}: "x"'


def references(count: int) -> str:
    middle = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(count)}
    return json.dumps({"$defs": {**middle, f"d{count}": {"enum": ["x"]}}, "$ref": "#/$defs/d0"})


@pytest.mark.parametrize(("kind", "source"), [("lark", chain(5200)), ("json_schema", references(1300))])
def test_rules_as_deep_as_the_size_allows_do_not_exhaust_a_small_stack(kind: GrammarKind, source: str) -> None:
    """Without a stack of its own, compiling these kills the process."""
    assert MAX_GRAMMAR_BYTES * 0.85 < len(source) <= MAX_GRAMMAR_BYTES
    said: list[str] = []
    threading.stack_size(512 << 10)
    try:
        thread = threading.Thread(target=lambda: said.append(walk(grammar(kind, source), 0, forcing=True)))
        thread.start()
    finally:
        threading.stack_size(0)
    thread.join()
    assert said == ["x" if kind == "lark" else '"x"']


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", "(" * 30000 + "a" + ")" * 30000),
        ("regex", "(a{1000}){1000}b"),
        ("regex", "(a|aa){1000,5000}(a|aa){1000,5000}b"),
        ("lark", 'start: ("a"~1000000)~1000000'),
        ("lark", "start: a{1000}\na: b{1000}\nb: /c/{1000}"),
    ],
)
def test_a_hostile_grammar_meets_a_limit_at_the_door_or_on_its_way(kind: GrammarKind, source: str) -> None:
    with pytest.raises((InvalidRequest, GrammarFailed)):
        walk(grammar(kind, source), 0, forcing=True)


def test_the_vocabulary_is_made_once_however_many_ask_first() -> None:
    spelled: list[int] = []

    class Counting(FakeTokenizer):
        def token_bytes(self, token: int, *, special: bool = False) -> bytes:
            spelled.append(token)
            return super().token_bytes(token, special=special)

    grammars = Grammars(Counting())
    assert not spelled
    asked = [grammar("choice", [str(i)]) for i in range(8)]
    threads = [threading.Thread(target=grammars.compile, args=(one,)) for one in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert spelled.count(65) == 1


def test_a_grammar_that_was_let_go_is_compiled_again() -> None:
    grammars = Grammars(FakeTokenizer())
    for i in range(KEPT_GRAMMARS + 2):
        grammars.compile(grammar("choice", [f"{i}!"]))
    assert bytes(grammars.compile(grammar("choice", ["0!"])).forced()) == b"0!"


def test_a_tokenizer_that_puts_a_space_in_front_is_seen_through() -> None:
    class Spaced(FakeTokenizer):
        def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
            return super().encode(" " + text, add_special=add_special, parse_special=parse_special)

    state: GrammarState = Grammars(Spaced()).compile(grammar("choice", ["spam"]))
    assert bytes(state.forced()) == b"spam"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("regex", r"\d\w[\s\d]"),
        ("regex", r"[\d-]\w[^\S]"),
        ("lark", 'start: "//" /\\d\\w[\\s\\d]/ // "a /\\d/'),
        ("lark", 'start: D "\\\\d"\nD: /\\d/'),
        ("json_schema", {"type": "string", "pattern": r"^\d\w$"}),
    ],
)
def test_classes_are_ascii_as_in_a_schemas_pattern(kind: GrammarKind, source: object) -> None:
    answers = [walk(grammar(kind, source), seed, forcing=True) for seed in range(30)]
    assert all(answer.isascii() for answer in answers)
    assert len(set(answers)) > 5


def test_scripts_that_are_asked_for_are_not_taken_away() -> None:
    answers = {walk(grammar("regex", r"[\p{Greek}\D]"), seed, forcing=True) for seed in range(30)}
    assert not all(answer.isascii() for answer in answers)
    assert walk(grammar("lark", 'start: "\\\\d é"'), 0, forcing=True) == "\\d é"


@pytest.mark.parametrize(
    "source",
    ["((a{1,100}){1,100}){1,100}", "x((a{1,100}){1,100}){1,100}"],
)
def test_a_grammar_that_becomes_too_large_is_refused_at_the_door(source: str) -> None:
    for kind, text in (("regex", source), ("lark", f"start: /{source}/")):
        with pytest.raises(InvalidRequest) as caught:
            GRAMMARS.compile(grammar(kind, text))  # type: ignore[arg-type]
        assert caught.value.param == ("regex" if kind == "regex" else "grammar")


def test_a_grammar_that_becomes_too_large_later_is_the_requests_fault() -> None:
    asked = grammar("regex", "x{70}((a{1,100}){1,100}){1,100}")
    state = GRAMMARS.compile(asked)

    def write() -> None:
        for character in b"x" * 70 + b"a" * 100:
            state.accept([character])
            state.allowed()

    with pytest.raises(InvalidRequest, match="too large") as caught:
        write()
    assert caught.value.param == "regex"


def test_gbnf_is_read_too() -> None:
    asked = grammar("lark", 'root ::= "a" word\nword ::= "b" | "c"')
    assert {walk(asked, seed, forcing=True) for seed in range(9)} == {"ab", "ac"}
    with pytest.raises(InvalidRequest) as caught:
        GRAMMARS.compile(grammar("lark", "root ::= ((("))
    assert caught.value.param == "grammar"
