"""Which checkpoints does a run have, and what does one say of itself?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import yaml
from rich.console import Group
from rich.syntax import Syntax
from rich.table import Column, Table
from rich.text import Text

from meshweave.layout import Layout
from meshweave.report.text import bytes_text, ranks_text, seconds_text


@dataclass(frozen=True)
class CheckpointRow:
    """A checkpoint, as far as it can be read."""

    name: str
    fault: str | None = None
    """What is wrong with it."""
    step: int | None = None
    bytes: int | None = None
    saved: datetime | None = None
    modules: Mapping[str, Mapping[str, Any]] | None = None
    """Module to its section of the run file."""


def render_checkpoints(rows: Sequence[CheckpointRow]) -> Table:
    """The rows, for `rich.console.Console.print`."""
    table = Table("step", "size", "age", "state", "layout", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(
            "?" if row.step is None else f"{row.step:,}",
            "" if row.bytes is None else bytes_text(row.bytes),
            "" if row.saved is None else seconds_text((datetime.now(UTC) - row.saved).total_seconds()),
            Text("whole", "green") if row.fault is None else Text(row.fault, "red"),
            layout_text(row.modules or {}),
        )
    return table


def layout_text(modules: Mapping[str, Mapping[str, Any]]) -> str:
    """Ranks and layout of every module, from its section of a run file with all defaults written out."""
    parts = []
    for name, module in modules.items():
        layout = Layout(**{axis.name: module[axis.name] for axis in fields(Layout)})
        parts.append(f"{name} {layout} on {ranks_text(module['ranks'])}")
    return "\n".join(parts)


def render_manifest(said: Mapping[str, Any], files: Mapping[str, int]) -> Group:
    """What one checkpoint says of itself, and its files with their sizes, for `rich.console.Console.print`."""
    table = Table("file", Column("size", justify="right"), box=None, pad_edge=False, header_style="bold")
    for name, size in files.items():
        table.add_row(name, bytes_text(size))
    return Group(Syntax(yaml.safe_dump(dict(said), sort_keys=False), "yaml", background_color="default"), table)
