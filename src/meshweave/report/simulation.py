"""How would a schedule run? Step time, bubbles and activations held, row by row, as `meshweave simulate` prints them."""

from collections.abc import Callable, Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshweave.layout import format_ranks
from meshweave.report.text import ranks_text, time_text
from meshweave.schedule.check import Peaks
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import Timeline

EVERY_ROW = 32
"""Up to this many rows each is printed; above, rows with the same modules give way to the first two and the last."""


def render_simulation(schedule: Schedule, timeline: Timeline, peaks: Peaks) -> RenderableType:
    """What a simulated or measured step looks like, for `rich.console.Console.print`; readable from 80 columns on.

    Args:
        timeline: of this schedule; its rows may be programs or single ranks.
        peaks: as `check` returns them.
    """
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("ranks", style="bold", no_wrap=True)
    table.add_column("busy", justify="right", no_wrap=True)
    table.add_column("bubble", justify="right", no_wrap=True)
    for name in schedule.work.modules:
        table.add_column(name, overflow="fold")
        table.add_column("held", justify="right", style="dim", header_style="dim", no_wrap=True)
    bubbles = timeline.bubbles
    for rows in _shown(schedule, timeline):
        ranks = ranks_text(timeline.ranks[rows[0]], 20) if len(rows) == 1 else f"⋮ {len(rows)} rows"
        busy = _between([timeline.busy[row] for row in rows], time_text)
        bubble = _between([bubbles[row] for row in rows], _percent)
        table.add_row(ranks, busy, bubble, *_module_cells(schedule, peaks, [_program(schedule, timeline, row) for row in rows]))
    explained = "held: most microbatches whose activations a rank keeps at once (virtual stages: each counted)"
    return Group(_heading(schedule, timeline), "", table, "", Text(explained, style="dim"))


def _percent(share: float) -> str:
    return f"{abs(share):.1%}"


def _heading(schedule: Schedule, timeline: Timeline) -> Text:
    ranks, microbatches = sum(map(len, timeline.ranks)), schedule.work.microbatches
    return Text.assemble(
        (f"step {time_text(timeline.seconds)} · bubble {_percent(timeline.bubble)}", "bold"),
        f" · {microbatches:,} microbatch{'' if microbatches == 1 else 'es'} · {ranks:,} rank{'' if ranks == 1 else 's'}",
    )


def _shown(schedule: Schedule, timeline: Timeline) -> list[Sequence[int]]:
    """Rows of the timeline behind each printed row; several where they give way to one line."""
    count = len(timeline.ranks)
    if count <= EVERY_ROW:
        return [(row,) for row in range(count)]
    alike: dict[tuple[str, ...], list[int]] = {}
    for row in range(count):
        alike.setdefault(tuple(schedule.work.programs[_program(schedule, timeline, row)].stages), []).append(row)
    shown: list[Sequence[int]] = []
    for rows in alike.values():
        parts: Iterable[Sequence[int]] = ((row,) for row in rows)
        shown += parts if len(rows) <= 4 else [rows[:1], rows[1:2], rows[2:-1], rows[-1:]]
    return shown


def _program(schedule: Schedule, timeline: Timeline, row: int) -> int:
    program = schedule.work.program_of(timeline.ranks[row][0])
    assert program is not None, "a timeline of another schedule"
    return program


def _module_cells(schedule: Schedule, peaks: Peaks, programs: Sequence[int]) -> list[Text | str]:
    """For each module the stages that these programs hold, and the activations."""
    cells: list[Text | str] = []
    for name, module in schedule.work.modules.items():
        stages = sorted({stage for program in programs for stage in schedule.work.programs[program].stages.get(name, ())})
        if not stages:
            cells += [Text("–", style="dim"), ""]
            continue
        numbers = f"stage{'s' if len(stages) > 1 else ''} {format_ranks(stages)}"
        held = [peaks[program].get(name, 0) for program in programs]
        cells += ["whole" if module.stages == 1 else numbers, _between(held, str)]
    return cells


def _between(values: Sequence[float], text: Callable[[float], str]) -> str:
    """The text of values if it is one, or of the least and the most."""
    least, most = text(min(values)), text(max(values))
    return least if least == most else f"{least} to {most}"
