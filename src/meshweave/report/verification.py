"""How far is a layout from the single process? The table that `meshweave verify` prints."""

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text


def render_verification(report: Mapping[str, Any]) -> RenderableType:
    """A verification report (`VerifyReport.as_dict()`) for `rich.console.Console.print`."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    for heading in ("compared", "worst relative error", "where", "step"):
        table.add_column(heading, justify="right" if heading in ("worst relative error", "step") else "left", overflow="fold")
    for kind in ("loss", "gradient", "weight"):
        worst = report[kind]
        good = worst["error"] <= report["tolerance"]
        table.add_row(
            kind, Text(f"{worst['error']:.1e}", style="green" if good else "bold red"), worst["name"], str(worst["step"])
        )
    compared = (
        f"{report['parameters']} parameters, {report['steps']} steps, {report['samples']} samples, "
        f"{report['media_items']} media items, {report['dtype']}, tolerance {report['tolerance']:g}"
    )
    verdict = (
        Text("same as the single process", style="bold green")
        if report["passed"]
        else Text("NOT the same as the single process", style="bold red")
    )
    shared = Text(f"shared by both sides, so not compared: {report['shared']}", style="dim")
    return Group(table, Text(compared), shared, verdict)
