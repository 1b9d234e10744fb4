"""The example of a boundary without the rest of meshweave must keep working."""

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_the_boundary_alone_example_trains_like_one_process() -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("RANK", None)
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "examples" / "boundary_alone.py"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "r1 -> r0: [3,8)" in ended.stdout
    assert "worst gradient error against one process" in ended.stdout
