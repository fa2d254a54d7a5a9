"""The bare loop makes the engine's own calls again, and no others; on the toy model, so nothing is timed."""

from benchmarks.peers.scripts.bare_loop import RecordingLlama, compare
from runtime.engine.engine import Engine
from runtime.engine.options import EngineOptions
from runtime.requests import Finished, Request, SamplingParams
from tests.support.runtime.fakes import FakeLlama

PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
REQUESTS = [Request(str(n), tuple(f"prompt {n % 3} and more".encode()), PARAMS) for n in range(20)]


def test_a_replay_leaves_the_model_as_the_engine_did() -> None:
    first, again = FakeLlama(), FakeLlama()
    recorder = RecordingLlama(first)
    engine = Engine(recorder, EngineOptions())
    for request in REQUESTS[:4]:
        engine.add(request)
    while engine.has_work:
        engine.step()
    own_batches = list(first.batches)
    recorder.calls = [(getattr(again, call.__name__), arguments) for call, arguments in recorder.calls]
    recorder.replay()
    assert [batch.tokens.tolist() for batch in again.batches] == [batch.tokens.tolist() for batch in own_batches]
    assert again.used_cells == first.used_cells > 0


def test_every_request_is_answered_and_counted_once() -> None:
    llama = FakeLlama()
    made = compare(llama, EngineOptions(), REQUESTS, 2)
    engine = Engine(FakeLlama(), EngineOptions())
    usages = []
    for request in REQUESTS:
        engine.add(request)
        while engine.has_work:
            usages += [event.usage for event in engine.step() if isinstance(event, Finished)]
    assert len(made["engine_s"]) == len(made["bare_s"]) == 2
    assert len(usages) == len(REQUESTS)
    answered = sum(usage.completion_tokens for usage in usages)
    assert answered < made["tokens"] <= sum(len(request.prompt) for request in REQUESTS) + answered
