"""Which tests are quick? Those that took under half a second when the whole suite was last measured: `make check` runs them.

`pytest --quick` leaves out what `slow.txt` lists; `pytest --measure` writes that list from a whole run. A new test counts as
quick until then.
"""

from collections import Counter
from pathlib import Path

import pytest

SLOW = Path(__file__).parent / "slow.txt"
_SECONDS = 0.5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out the tests that slow.txt lists")
    parser.addoption("--measure", action="store_true", help=f"write slow.txt: the tests that took over {_SECONDS:g} s")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--measure"):
        config.pluginmanager.register(_Clock())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        slow = set(SLOW.read_text().splitlines())
        left = [item for item in items if item.nodeid in slow]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item.nodeid not in slow]


class _Clock:
    """State: seconds of every test so far, setup and teardown included."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def pytest_sessionfinish(self) -> None:
        slow = sorted(test for test, seconds in self.seconds.items() if seconds >= _SECONDS)
        SLOW.write_text("".join(f"{test}\n" for test in slow))
