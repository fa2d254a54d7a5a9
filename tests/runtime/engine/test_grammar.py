"""The engine under grammars, on the fake: answers fit, forced tokens cost no step, a broken grammar harms no other."""

import json
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from runtime.decoding.grammar import Grammars, GrammarState
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.errors import BatchInvalid, GrammarFailed, InvalidRequest, NoKvSlot
from runtime.requests import Event, Failed, Finished, Grammar, Request, SamplingParams, TextDelta
from tests.support.runtime.fakes import EOS, FakeLlama, FakeTokenizer

GRAMMARS = Grammars(FakeTokenizer())
LISTS = Grammar("choice", '["exmh-users", "exmh-workers"]', "choice")
SCHEMA = {
    "type": "object",
    "properties": {
        "label": {"enum": ["spam", "exmh-users", "exmh-workers"]},
        "urgent": {"type": "boolean"},
        "reason": {"type": "string", "maxLength": 5},
    },
    "required": ["label", "urgent", "reason"],
    "additionalProperties": False,
}
LABEL = Grammar("json_schema", json.dumps(SCHEMA), "response_format")
YES_NO = Grammar("regex", "(yes|no)!*", "regex")


def asked(name: str, params: SamplingParams, text: str = "a mail") -> Request:
    return Request(name, tuple(FakeTokenizer().encode(text, add_special=True, parse_special=False)), params)


def run(llama: FakeLlama, *requests: Request, options: EngineOptions | None = None) -> list[Event]:
    engine = Engine(llama, options or EngineOptions(keep_prefixes=False), GRAMMARS)
    for request in requests:
        engine.add(request)
    events: list[Event] = []
    for _ in range(5000):
        if not engine.has_work:
            break
        events += engine.step()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_cells_used, llama.used_cells) == (0, 0, 0, 0)
    ended = [event.request_id for event in events if not isinstance(event, TextDelta)]
    assert sorted(ended) == sorted(request.id for request in requests)
    return events


def said(events: Sequence[Event], name: str) -> tuple[str, str | None]:
    """The text of an answer and why it ended (None: it failed)."""
    mine = [event for event in events if event.request_id == name]
    text = "".join(event.text for event in mine if isinstance(event, TextDelta))
    tokens = [token for event in mine if isinstance(event, TextDelta) for token in event.token_ids]
    end = mine[-1]
    if isinstance(end, Finished) and not asks_to_stop(end):
        assert FakeTokenizer().decode(tokens).startswith(text)
        assert end.usage.completion_tokens - len(tokens) in (0, 1)
    return text, end.reason if isinstance(end, Finished) else None


def asks_to_stop(end: Finished) -> bool:
    return end.request_id.startswith("stop")


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.7, 2.0]), st.integers(0, 40), st.booleans())
def test_an_answer_under_a_schema_parses_whatever_the_logits(
    seed: int, temperature: float, top_k: int, logprobs: bool
) -> None:
    params = SamplingParams(
        300, temperature, seed=seed, top_k=top_k, top_p=0.9, logprobs=2 if logprobs else None, grammar=LABEL
    )
    text, reason = said(run(FakeLlama(n_ctx=1024), asked("a", params, f"mail {seed}")), "a")
    answer = json.loads(text)
    assert reason == "stop"
    assert answer.keys() == SCHEMA["properties"].keys()  # type: ignore[attr-defined]
    assert answer["label"] in ("spam", "exmh-users", "exmh-workers")
    assert isinstance(answer["urgent"], bool)
    assert len(answer["reason"]) <= 5


OPEN = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "user": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]},
        "tags": {"type": "array", "items": {"type": "string"}},
        "price": {"type": "number"},
    },
    "required": ["name", "user", "tags", "price"],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_model_that_wants_to_end_closes_what_is_open(temperature: float, seed: int) -> None:
    """Strings and lists have no bound here: without closing, their content would be noise until the length limit."""
    params = SamplingParams(300, temperature, seed=seed, grammar=Grammar("json_schema", json.dumps(OPEN), "format"))
    llama = FakeLlama(n_ctx=1024, script=lambda history: EOS)
    text, reason = said(run(llama, asked("a", params, f"mail {seed}")), "a")
    answer = json.loads(text)
    assert reason == "stop"
    assert (answer["name"], answer["tags"]) == ("", [])
    assert len(text) < 100


def test_an_answer_that_may_end_is_left_to_its_model() -> None:
    written = '{"name": "Anna, ]} or", "user": {"id": 31}, "tags": ["a", "b"], "price": 2.5}'
    params = SamplingParams(300, 0, grammar=Grammar("json_schema", json.dumps(OPEN), "format"))
    assert said(run(FakeLlama(n_ctx=1024, script=written), asked("a", params)), "a") == (written, "stop")


def test_forced_tokens_take_no_step_and_count_as_completion_tokens() -> None:
    """`exmh-` before the draw and `sers` after it are forced: one decode tells all ten tokens."""
    llama = FakeLlama(script="users")
    events = run(llama, asked("a", SamplingParams(50, 0, grammar=LISTS)))
    assert said(events, "a") == ("exmh-users", "stop")
    assert llama.decodes == 1
    end = events[-1]
    assert isinstance(end, Finished)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (7, 10)


def test_forced_tokens_in_the_midst_are_computed_in_one_step() -> None:
    llama = FakeLlama()
    text, _ = said(run(llama, asked("a", SamplingParams(300, 0, grammar=LABEL))), "a")
    n_forced = len('{"label":"') + len('","urgent":') + len(',"reason":"')
    assert llama.decodes <= len(text) - n_forced
    assert max(len(batch.tokens) for batch in llama.batches[1:]) >= len('","urgent":')


def test_with_logprobs_each_token_has_its_own_and_the_answer_is_the_same() -> None:
    params = SamplingParams(300, 1.0, seed=5, grammar=LABEL, frequency_penalty=0.5)
    plain = run(FakeLlama(), asked("a", params))
    llama = FakeLlama()
    events = run(llama, asked("a", replace(params, logprobs=1)))
    assert said(events, "a") == said(plain, "a")
    deltas = [event for event in events if isinstance(event, TextDelta)]
    assert all(len(delta.logprobs) == len(delta.token_ids) == 1 for delta in deltas)
    raw = llama.logits(asked("a", params).prompt)
    first = deltas[0].logprobs[0]
    assert first.token == ord("{")
    assert first.logprob == pytest.approx(float(raw[ord("{")] - np.log(np.exp(raw.astype(float)).sum())), abs=1e-4)


@pytest.mark.parametrize("limit", [1, 3, 5, 6, 9, 10, 11])
def test_max_tokens_cuts_forced_tokens_too(limit: int) -> None:
    events = run(FakeLlama(script="users"), asked("a", SamplingParams(limit, 0, grammar=LISTS)))
    assert said(events, "a") == ("exmh-users"[:limit], "stop" if limit >= 10 else "length")
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.completion_tokens == min(limit, 10)


@pytest.mark.parametrize(
    ("stop", "text", "n_tokens"), [("mh", "ex", 4), ("h-u", "exm", 6), ("ser", "exmh-u", 9), ("exmh-users", "", 10)]
)
def test_a_stop_string_ends_the_answer_inside_forced_tokens(stop: str, text: str, n_tokens: int) -> None:
    events = run(FakeLlama(script="users"), asked("stop", SamplingParams(50, 0, stop=(stop,), grammar=LISTS)))
    assert said(events, "stop") == (text, "stop")
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.completion_tokens == n_tokens


def test_an_answer_with_only_one_possibility_is_that() -> None:
    only = Grammar("choice", '["spam"]', "choice")
    events = run(FakeLlama(), asked("a", SamplingParams(50, 0, grammar=only)))
    assert said(events, "a") == ("spam", "stop")
    end = events[-1]
    assert isinstance(end, Finished)
    assert end.usage.completion_tokens == 4


def test_the_model_may_end_where_the_grammar_lets_it() -> None:
    events = run(FakeLlama(script="no"), asked("a", SamplingParams(9, 0, grammar=YES_NO)))
    assert said(events, "a") == ("no", "stop")
    events = run(FakeLlama(script="no!!!!!!!!!!!!!"), asked("a", SamplingParams(9, 0, grammar=YES_NO)))
    assert said(events, "a") == ("no!!!!!!!", "length")


def test_together_in_small_steps_and_few_cells_as_each_alone() -> None:
    kinds = [LABEL, None, YES_NO, LISTS]
    params = [
        SamplingParams(60, (i % 3) / 2, seed=i, grammar=kinds[i % 4], logprobs=1 if i % 5 == 0 else None)
        for i in range(12)
    ]
    requests = [asked(str(i), one, "mail " * (i % 4)) for i, one in enumerate(params)]
    crowded = EngineOptions(step_tokens=16, max_running=5, keep_prefixes=False)
    together = run(FakeLlama(n_ctx=160), *requests, options=crowded)
    for request in requests:
        assert said(together, request.id) == said(run(FakeLlama(), request), request.id)


def test_failed_decodes_lose_nothing_of_the_grammar() -> None:
    faults = {0: BatchInvalid("ordered"), 3: NoKvSlot("ordered"), 5: NoKvSlot("ordered")}
    requests = [asked(str(i), SamplingParams(60, 1, seed=i, grammar=LABEL)) for i in range(3)]
    events = run(FakeLlama(fail_at=faults), *requests)
    assert {r.id: said(events, r.id) for r in requests} == {r.id: said(run(FakeLlama(), r), r.id) for r in requests}


class Breaking(Grammars):
    """Breaks the grammars of kind regex at the n-th question of one kind."""

    def __init__(self, where: str, after: int) -> None:
        super().__init__(FakeTokenizer())
        self.where, self.after = where, after

    def compile(self, grammar: Grammar) -> GrammarState:
        state = super().compile(grammar)
        if grammar.kind == "regex":
            self._break(state)
        return state

    def _break(self, state: GrammarState) -> None:
        answer, left = getattr(state, self.where), iter(range(self.after))

        def asked(*arguments: object) -> object:
            if next(left, None) is None:
                raise GrammarFailed("ordered by the test")
            return answer(*arguments)

        setattr(state, self.where, asked)


@pytest.mark.parametrize(
    ("where", "after", "heard"),
    [("allowed", 0, ""), ("allowed", 1, "no"), ("allowed", 3, "no!!"), ("accept", 1, ""), ("accept", 3, "no!")],
)
def test_a_grammar_that_fails_ends_its_answer_and_no_other(where: str, after: int, heard: str) -> None:
    llama = FakeLlama(script="no!!!!!!!!")
    engine = Engine(llama, EngineOptions(keep_prefixes=False), Breaking(where, after))
    broken = asked("broken", SamplingParams(20, 0, grammar=YES_NO))
    neighbours = [asked("plain", SamplingParams(8, 0)), asked("label", SamplingParams(60, 1, grammar=LABEL))]
    for request in (neighbours[0], broken, neighbours[1]):
        engine.add(request)
    events: list[Event] = []
    while engine.has_work:
        events += engine.step()
    failed = [event for event in events if isinstance(event, Failed)]
    assert [(event.request_id, type(event.error)) for event in failed] == [("broken", GrammarFailed)]
    assert said(events, "broken")[0] == heard
    for request in neighbours:
        alone = run(FakeLlama(script="no!!!!!!!!"), request)
        assert said(events, request.id) == said(alone, request.id)
    assert (engine.stats().kv_cells_used, llama.used_cells) == (0, 0)


def test_cancelling_in_the_midst_frees_everything() -> None:
    llama = FakeLlama()
    engine = Engine(llama, EngineOptions(keep_prefixes=False), GRAMMARS)
    engine.add(asked("a", SamplingParams(300, 1, grammar=LABEL)))
    engine.step()
    assert [type(event) for event in engine.cancel("a")] == [Failed]
    assert (engine.has_work, llama.used_cells) == (False, 0)


def test_cached_prompt_tokens_are_told_although_tokens_were_forced() -> None:
    engine = Engine(FakeLlama(script="users"), EngineOptions(), GRAMMARS)
    usages = []
    for name in "ab":
        engine.add(asked(name, SamplingParams(50, 0, grammar=LISTS), "a rather long mail"))
        while engine.has_work:
            usages += [event.usage for event in engine.step() if isinstance(event, Finished)]
    assert [(usage.prompt_tokens, usage.cached_tokens) for usage in usages] == [(19, 0), (19, 19)]
    stats = engine.stats()
    assert (stats.prompt_tokens_total, stats.cached_tokens_total, stats.generated_tokens_total) == (38, 19, 20)


def test_what_cannot_be_used_is_refused_by_add_and_leaves_nothing() -> None:
    with pytest.raises(InvalidRequest, match="no grammars") as caught:
        Engine(FakeLlama()).add(asked("a", SamplingParams(5, grammar=LISTS)))
    assert caught.value.param == "choice"
    engine = Engine(FakeLlama(), grammars=GRAMMARS)
    with pytest.raises(InvalidRequest, match="regular expression"):
        engine.add(asked("a", SamplingParams(5, grammar=Grammar("regex", "(", "regex"))))
    assert not engine.has_work


def test_a_grammar_that_was_prepared_is_not_compiled_when_the_request_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(FakeLlama(), grammars=Grammars(FakeTokenizer()))
    request = asked("a", SamplingParams(5, grammar=YES_NO))
    engine.prepare(request)

    def compile_again(*_: object) -> None:
        raise AssertionError("compiled in the engine's own thread")

    monkeypatch.setattr("runtime.decoding.grammar.on_large_stack", compile_again)
    engine.add(request)
    assert engine.has_work
    with pytest.raises(AssertionError):
        engine.add(asked("b", SamplingParams(5, grammar=LISTS)))
