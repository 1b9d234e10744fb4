"""A run's numbers survive a full disk, as the run does."""

import json
import logging
import resource
from pathlib import Path

import pytest

from meshweave.train.metrics import MetricsLog


# TensorBoard's thread ends by it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_is_one_line_and_no_record_is_lost_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # No file may grow beyond it: a write that does is cut short, the next one fails.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        with caplog.at_level(logging.WARNING):
            for step in range(400):
                log.add({"step": step, "loss": 1.5, "lr": {"language": 0.1}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: cannot be written (File too large); the run goes on"
    ]
    log.add({"step": 400, "loss": None})
    assert [record["step"] for record in log.records()] == list(range(401))
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 400, "loss": None}
