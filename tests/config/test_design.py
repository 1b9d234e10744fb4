"""docs/design.md lists the rooms that there are."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_design_lists_every_room_and_no_other() -> None:
    package = ROOT / "src" / "meshweave"
    page = (ROOT / "docs" / "design.md").read_text()
    rooms = {f"{entry.name}/" for entry in package.iterdir() if (entry / "__init__.py").exists()}
    files = {entry.name for entry in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    assert set(re.findall(r"^\| `([\w./]+)` \|", page, re.MULTILINE)) == rooms | files
