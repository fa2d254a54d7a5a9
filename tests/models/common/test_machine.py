"""The machine is told in a few words, whatever of it can be found out."""

from pathlib import Path

from models.common.machine import describe_machine


def test_processor_cores_and_backend_are_named(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 7B13\nmodel name\t: other\n")
    told = describe_machine("CPU (AVX2)", tmp_path)
    assert told.startswith("AMD EPYC 7B13, ")
    assert "logical cores" in told
    assert told.endswith(", CPU (AVX2)")


def test_an_unknown_processor_is_no_error(tmp_path: Path) -> None:
    assert describe_machine(root=tmp_path)
