"""Large buffers of the CPU that give their pages back, made by ggml itself."""

import ctypes
from collections.abc import Iterator

import psutil
import pytest
from llama_cpp import llama_cpp

from runtime.llama import ggml
from runtime.llama.ggml import LARGE_BYTES, lazy_buffers

pytestmark = pytest.mark.skipif(not psutil.LINUX, reason="pages are given back on Linux only")

HALF = LARGE_BYTES // 2


class Buffer:
    """A buffer of ggml's CPU backend."""

    def __init__(self, n_bytes: int) -> None:
        self._lib = llama_cpp._lib
        kind = ctypes.c_void_p(self._lib.ggml_backend_cpu_buffer_type())
        self._pointer = self._lib.ggml_backend_buft_alloc_buffer(kind, ctypes.c_size_t(n_bytes))
        self.n_bytes = n_bytes
        self.base: int = self._lib.ggml_backend_buffer_get_base(self._pointer)

    def clear(self, value: int = 0) -> None:
        self._lib.ggml_backend_buffer_clear(self._pointer, value)

    def fill(self) -> None:
        ctypes.memset(self.base, 7, self.n_bytes)

    def holds_only(self, value: int) -> bool:
        return ctypes.string_at(self.base, self.n_bytes) == bytes([value]) * self.n_bytes

    def free(self) -> None:
        self._lib.ggml_backend_buffer_free(self._pointer)


@pytest.fixture
def lazy() -> Iterator[Buffer]:
    with lazy_buffers(wanted=True) as works:
        assert works
        buffer = Buffer(LARGE_BYTES + 100)
    yield buffer
    buffer.free()


def resident() -> int:
    n_bytes: int = psutil.Process().memory_info().rss
    return n_bytes


def test_clearing_gives_the_memory_back_and_leaves_zeros(lazy: Buffer) -> None:
    before = resident()
    lazy.fill()
    assert resident() > before + HALF
    lazy.clear()
    assert resident() < before + HALF
    assert lazy.holds_only(0)


def test_clearing_a_new_buffer_takes_no_memory(lazy: Buffer) -> None:
    before = resident()
    lazy.clear()
    assert resident() < before + HALF


def test_another_value_is_written(lazy: Buffer) -> None:
    lazy.clear(3)
    assert lazy.holds_only(3)


def test_buffers_made_before_after_or_small_are_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Buffer(LARGE_BYTES)
    with lazy_buffers(wanted=True):
        small = Buffer(1000)
    after = Buffer(LARGE_BYTES)
    tables = ggml._buffer_tables()
    assert tables is not None
    monkeypatch.setattr(tables, "_madvise", lambda *_: pytest.fail("no lazy buffer was made"))
    for buffer in (before, small, after):
        buffer.fill()
        buffer.clear()
        assert buffer.holds_only(0)
        buffer.free()


def test_where_it_is_not_wanted_or_the_tables_differ_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    with lazy_buffers(wanted=False) as works:
        assert not works
    monkeypatch.setattr(ggml, "_CLEAR_PLACES", (1,))
    with pytest.raises(LookupError):
        ggml._BufferTables(llama_cpp._lib)
