"""A conversion that is killed: the store is as before, and the next run works and clears up behind the dead one."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.store.store import Store
from tests.support.convert.tiny import write_adapter, write_model

ROOT = Path(__file__).parents[2]

# Reports where it is and waits for a line at the stage it was told, so that the test decides when to strike.
CHILD = """
import sys
from pathlib import Path
from convert.planning.request import ConvertRequest
from convert.pipeline import convert
from models.common.console import LineReporter
from models.store.store import Store

class Waiting(LineReporter):
    def stage(self, name, total=None):
        if name.startswith(sys.argv[4]):
            print(name, flush=True)
            sys.stdin.readline()

request = ConvertRequest(source=sys.argv[2], name="tiny", adapter=Path(sys.argv[3]))
print(convert(request, Store(Path(sys.argv[1])), Waiting()).gguf, flush=True)
"""


def start(tmp_path: Path, stage: str) -> "subprocess.Popen[str]":
    arguments = [str(tmp_path / name) for name in ("home", "base.gguf", "adapter")]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments, stage],
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize(
    ("sent", "stage"), [(signal.SIGKILL, "merge"), (signal.SIGKILL, "verify"), (signal.SIGINT, "quantize")]
)
def test_a_killed_conversion_installs_nothing_and_the_next_one_works(
    tmp_path: Path, sent: signal.Signals, stage: str
) -> None:
    write_model(tmp_path / "base.gguf")
    write_adapter(tmp_path / "adapter")
    store = Store(tmp_path / "home")
    with start(tmp_path, stage) as child:
        assert child.stdout is not None
        assert child.stdout.readline().startswith(stage)
        child.send_signal(sent)
        child.wait(timeout=600)
    assert child.returncode == -sent
    assert store.names() == []
    left = [path for path in (tmp_path / "home" / "staging").iterdir() if path.is_dir()]
    assert len(left) == (1 if sent == signal.SIGKILL else 0)
    with start(tmp_path, "no stage") as again:
        output, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    assert output.strip().endswith("tiny-Q8_0.gguf")
    assert store.names() == ["tiny"]
    store.verify("tiny")
    assert not [path for path in (tmp_path / "home" / "staging").iterdir() if path.is_dir()]
