"""The soak's short form: a few kills, and the weights of a run that was let be."""

from pathlib import Path

from soak import run_of, soak


def test_killed_at_random_moments_a_run_reaches_the_weights_of_one_that_was_let_be(tmp_path: Path) -> None:
    report = soak(run_of(tmp_path, ranks=2), kills=3, seed=5)
    assert not report.faults
    assert sum(report.kills.values()) == 3
    assert report.finished >= 1
