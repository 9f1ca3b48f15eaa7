import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_guided_step_takes_at_most_9_files_and_90_calls():
    command = [sys.executable, str(ROOT / "benchmarks" / "step.py"), "--package", str(ROOT), "--worker", "calls"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    for name, counts in json.loads(done.stdout.splitlines()[-1]).items():
        assert len(counts) <= 9, (name, counts)
        assert sum(counts.values()) <= 90, (name, counts)
