"""How does docs/families.md come about? From records of tests that ran.

MESHWEAVE_RECORDS=runs/families python -m pytest tests/families && python tests/families/table.py runs/families
"""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from families.cases import COLUMNS

DOCS = Path(__file__).parents[2] / "docs"
HEAD = """# Families

Each number is the worst relative error of any parameter's gradient against the plain Hugging Face model in float64, over all
layouts of its column that the tests run (`tests/families`), at tiny size with random weights and ragged samples: text alone,
one item, several; images of several sizes, videos where the family takes them, sounds. "refused" is one message, before anything
starts; where there is no entry, no test says anything (`ep`: families with experts). `make families` writes this file from what
ran.
"""


def record(family: str, form: str, columns: tuple[str, ...], media: list[str], error: float | None) -> None:
    """Notes what a test case has shown, if the environment asks for it; an error of None is a refusal."""
    folder = os.environ.get("MESHWEAVE_RECORDS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        found = {"family": family, "columns": columns, "media": media, "error": error}
        (Path(folder) / f"{family}-{form}.json".replace(" ", "_")).write_text(json.dumps(found))


def gather(folder: Path) -> dict[str, Any]:
    """Family to its media, and to the worst error of each column (None: refused)."""
    table: dict[str, Any] = {}
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        entry = table.setdefault(found["family"], {"media": [], "columns": {}})
        entry["media"] = sorted({*entry["media"], *found["media"]}, key=("image", "video", "audio").index)
        for column in found["columns"]:
            if found["error"] is None:
                entry["columns"].setdefault(column, None)
            else:
                entry["columns"][column] = max(found["error"], entry["columns"].get(column) or 0.0)
    return table


def markdown(table: Mapping[str, Any], columns: tuple[str, ...]) -> str:
    """The table as docs/families.md shows it."""
    lines = [f"| family | media | {' | '.join(columns)} |", "| --- " * (len(columns) + 2) + "|"]
    for family, entry in sorted(table.items()):
        cells = [_cell(entry["columns"], column) for column in columns]
        lines.append(f"| {family} | {', '.join(entry['media'])} | {' | '.join(cells)} |")
    return HEAD + "\n" + "\n".join(lines) + "\n"


def _cell(found: Mapping[str, float | None], column: str) -> str:
    if column not in found:
        return ""
    error = found[column]
    return "refused" if error is None else f"{error:.0e}"


if __name__ == "__main__":
    gathered = gather(Path(sys.argv[1]))
    (DOCS / "families.json").write_text(json.dumps(gathered, indent=1, sort_keys=True) + "\n")
    (DOCS / "families.md").write_text(markdown(gathered, COLUMNS))
