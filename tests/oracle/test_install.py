"""The oracle's installer takes the converter out of an archive, and nothing else. These run without the oracle."""

import io
import tarfile
from pathlib import Path

import pytest

from tests.oracle import install

LLAMA = "llama_cpp_python-0.3.36/vendor/llama.cpp/"


def archive(path: Path, *members: tuple[str, bytes | str]) -> Path:
    """A tar of files (bytes) and symbolic links (the text they lead to)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return path


def test_the_converter_is_unpacked_and_nothing_else(tmp_path: Path) -> None:
    packed = archive(
        tmp_path / "sdist.tar.gz",
        (f"{LLAMA}convert_hf_to_gguf.py", b"one"),
        (f"{LLAMA}conversion/base.py", b"two"),
        (f"{LLAMA}gguf-py/gguf/__init__.py", b"three"),
        (f"{LLAMA}src/llama.cpp", b"not needed"),
        (f"{LLAMA}conversion/link.py", "/etc/passwd"),
        ("llama_cpp_python-0.3.36/setup.py", b"not needed"),
    )
    install.unpack(packed, tmp_path / "out")
    found = sorted(
        str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*") if file.is_file()
    )
    assert found == ["conversion/base.py", "convert_hf_to_gguf.py", "gguf-py/gguf/__init__.py"]


def test_a_path_that_leads_out_is_refused(tmp_path: Path) -> None:
    packed = archive(tmp_path / "sdist.tar.gz", (f"{LLAMA}conversion/../../outside.py", b"bad"))
    with pytest.raises(tarfile.OutsideDestinationError):
        install.unpack(packed, tmp_path / "out")
    assert not (tmp_path / "outside.py").exists()


def test_an_archive_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "MAX_UNPACKED_BYTES", 4)
    packed = archive(tmp_path / "sdist.tar.gz", (f"{LLAMA}conversion/base.py", b"12345"))
    with pytest.raises(ValueError, match="5 bytes of converter, the limit is 4"):
        install.unpack(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_converter_is_the_one_of_the_pinned_llama_cpp() -> None:
    lock = install.PRODUCT_LOCK.read_text(encoding="utf-8")
    found = install.entry(lock, install.SHIPS_CONVERTER)
    assert found.startswith("llama-cpp-python==")
    assert "--hash=sha256:" in found
    assert found.count("==") == 1
    with pytest.raises(ValueError, match="no entry of 'no-such-thing'"):
        install.entry(lock, "no-such-thing")


def test_the_oracle_is_locked_by_hash_and_names_no_index() -> None:
    here = Path(install.__file__).parent
    lock = (here / "requirements.lock").read_text(encoding="utf-8")
    names = [line.partition("==")[0] for line in lock.splitlines() if "==" in line.partition(";")[0]]
    assert {"transformers", "peft", "sentencepiece"} <= set(names)
    assert "torch" not in names, "its builds differ in hash; torch.txt pins its version"
    assert "://" not in lock
