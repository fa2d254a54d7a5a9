"""The bar: of 48 labels planted wrong in email-triage's 952 train mails at least 44 are among the 100 most suspicious.

Measured over twelve seeds that were not used for tuning: 45.75 on average, 44 at the least. Two others are tried here.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[4]
BAR, SEEDS = 44, ("0", "1")


def test_planted_errors_are_among_the_most_suspicious() -> None:
    # One thread, as `deskside task` has it.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "tests.support.models.planted", *SEEDS]
    ran = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    found = [int(line) for line in ran.stdout.split()]
    assert len(found) == len(SEEDS)
    assert sum(found) / len(found) >= BAR, found
