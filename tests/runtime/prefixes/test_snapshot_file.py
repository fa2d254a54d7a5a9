"""A snapshot's file gives back what was written, or nothing: not one bit may differ."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.prefixes import snapshot_file
from runtime.prefixes.snapshot_file import (
    NO_ADAPTER,
    BadSnapshot,
    SnapshotHead,
    opened,
    read_head,
    read_payload,
    write_snapshot,
)
from tests.support.runtime.prefixes import payload, tokens

IDENTITY, ADAPTER = bytes(range(32)), bytes(range(100, 132))
TOKEN_IDS = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=40)


def written(head: SnapshotHead, content: np.ndarray) -> bytes:
    file = io.BytesIO()
    write_snapshot(file, head, content)
    return file.getvalue()


def read(path: Path) -> tuple[SnapshotHead, np.ndarray]:
    with opened(path) as file:
        head = read_head(file)
        return head, read_payload(file, head)


def a_snapshot() -> tuple[SnapshotHead, np.ndarray]:
    content = payload(tokens(1), 300)
    return SnapshotHead(IDENTITY, ADAPTER, tokens(1), len(content)), content


@settings(max_examples=60, deadline=None)
@given(ids=TOKEN_IDS, content=st.binary(max_size=200), adapter=st.sampled_from([NO_ADAPTER, ADAPTER]))
def test_a_file_gives_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], content: bytes, adapter: bytes
) -> None:
    head = SnapshotHead(IDENTITY, adapter, np.array(ids, np.int32), len(content))
    path = tmp_path_factory.mktemp("files") / "x"
    path.write_bytes(written(head, np.frombuffer(content, np.uint8)))
    found, data = read(path)
    assert path.stat().st_size == head.file_bytes
    assert found.same(head)
    assert (found.key, found.n_bytes, found.tokens.dtype.name) == (head.key, len(content), "int32")
    assert data.tobytes() == content


def test_a_flipped_bit_anywhere_is_seen(tmp_path: Path) -> None:
    """One in each byte of header, tokens, payload and both checksums."""
    whole = written(*a_snapshot())
    path = tmp_path / "x"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(BadSnapshot):
            read(path)


def test_a_file_of_another_length_is_seen_before_its_tokens_are_read(tmp_path: Path) -> None:
    whole = written(*a_snapshot())
    path = tmp_path / "x"
    for content in (whole[:0], whole[:50], whole[:96], whole[:200], whole[:-1], whole + b"\0"):
        path.write_bytes(content)
        with opened(path) as file, pytest.raises(BadSnapshot):
            read_head(file)


def test_a_header_of_absurd_sizes_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    whole = written(*a_snapshot())
    path.write_bytes(whole[:80] + (1 << 62).to_bytes(8, "little") + whole[88:])
    with pytest.raises(BadSnapshot, match="bytes, not"):
        read(path)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(written(*a_snapshot()))
    monkeypatch.setattr(snapshot_file, "VERSION", 2)
    with pytest.raises(BadSnapshot, match="format 1, not 2"):
        read(path)


def test_what_is_no_snapshot_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"GGUF" * 100)
    with pytest.raises(BadSnapshot, match="begin"):
        read(path)


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x"
    path.write_bytes(written(*a_snapshot()))
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(BadSnapshot, match="another user"):
        read(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(written(*a_snapshot()))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(OSError, match="link"):
        read(tmp_path / "link")


def test_the_key_follows_from_identity_adapter_and_tokens() -> None:
    heads = [
        SnapshotHead(identity, adapter, ids, 10)
        for identity in (IDENTITY, ADAPTER)
        for adapter in (NO_ADAPTER, ADAPTER)
        for ids in (tokens(1), tokens(2), tokens(1, 49))
    ]
    assert len({head.key for head in heads}) == len(heads)
    assert [left.same(right) for left in heads for right in heads] == [
        left is right for left in heads for right in heads
    ]
    assert SnapshotHead(IDENTITY, ADAPTER, tokens(1), 99).key == SnapshotHead(IDENTITY, ADAPTER, tokens(1), 10).key
