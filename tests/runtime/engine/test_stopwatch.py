"""The account of the engine's time, on a clock that moves only when something is done."""

import numpy as np
import pytest

from runtime.engine.engine import Engine, Stopwatch
from runtime.errors import DecodeFailed, NoKvSlot
from runtime.llama.interface import Batch
from runtime.requests import Request, SamplingParams
from tests.support.runtime.fakes import BOS, FakeLlama, FakeTokenizer

DECODE_S, LOOK_UP_S = 2.0, 0.25


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class SlowLlama(FakeLlama):
    """Each decode takes `DECODE_S`, also one that fails; to spell a drawn token takes `LOOK_UP_S`."""

    def __init__(self, clock: Clock, fail_at: dict[int, Exception] | None = None) -> None:
        super().__init__(script="abc", fail_at=fail_at)
        self.clock = clock
        self.tokenizer = SlowTokenizer(clock)

    def decode(self, batch: Batch) -> np.ndarray:
        self.clock.now_s += DECODE_S
        return super().decode(batch)


class SlowTokenizer(FakeTokenizer):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        self.clock.now_s += LOOK_UP_S
        return super().token_bytes(token, special=special)


def engine(fail_at: dict[int, Exception] | None = None) -> tuple[Engine, Clock]:
    clock = Clock()
    made = Engine(SlowLlama(clock, fail_at), clock=clock)
    made.add(Request("r", (BOS, *b"hello"), SamplingParams(8, temperature=0)))
    return made, clock


def seconds(engine: Engine) -> tuple[float, float]:
    stats = engine.stats()
    return stats.decode_seconds_total, stats.step_seconds_total


def test_decode_seconds_are_a_part_of_the_steps_seconds() -> None:
    slow, clock = engine()
    assert seconds(slow) == (0, 0)
    while slow.has_work:
        slow.step()
        clock.now_s += 50  # between steps: nobody's
    assert seconds(slow) == (4 * DECODE_S, 4 * DECODE_S + 3 * LOOK_UP_S), "three letters and the end of the turn"


@pytest.mark.parametrize("error", [NoKvSlot("1"), DecodeFailed("-3")])
def test_a_decode_that_fails_has_taken_its_time_too(error: Exception) -> None:
    slow, _ = engine({0: error})
    slow.step()
    assert seconds(slow) == (DECODE_S, DECODE_S)


def test_a_stopwatch_adds_up_blocks_and_nothing_between_them() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    for _ in range(2):
        with watch:
            clock.now_s += 1.5
        clock.now_s += 10
    assert watch.total_s == 3.0
