"""Which rank holds which part of which module? The layout map that `meshweave inspect` prints."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from meshweave.config import LANGUAGE, RunConfig
from meshweave.layout import AXES, EXPERT_AXES, Placement, relation
from meshweave.model.footprint import ModuleFootprint
from meshweave.report.text import bytes_text, count_text, listing, ranks_text
from meshweave.report.traffic import BoundaryTraffic

EVERY_RANK = 32
"""Up to this world size every rank has its own row; above, ranks that share a lane share a row."""

INDEX_NAMES = {"pp": "stage", "replicas": "replica", "cp": "cp", "tp": "tp"}


def render_layout_map(
    run: RunConfig,
    placements: Mapping[str, Placement],
    footprints: Mapping[str, ModuleFootprint],
    traffic: Sequence[BoundaryTraffic] = (),
) -> RenderableType:
    """The whole layout map, for `rich.console.Console.print`; readable from 80 columns on.

    Args:
        placements: module to where it runs.
        footprints: module to what its ranks hold.
        traffic: what one step moves over each boundary, if known.
    """
    parts: list[RenderableType] = [Text(title(run, placements), style="bold"), ""]
    parts += [_rank_table(run.world_size, placements, footprints), ""]
    for name, placement in placements.items():
        parts += [_module_heading(name, placement), _module_table(run, name, placement, footprints[name]), ""]
    parts += [_fullest_rank(run, footprints)]
    for crossing in traffic:
        parts += ["", _traffic_heading(crossing), _traffic_table(crossing, run.node_size)]
    return Group(*parts)


def title(run: RunConfig, placements: Mapping[str, Placement]) -> str:
    """World size, how the modules lie to one another, and idle ranks: one line."""
    language = placements[LANGUAGE]
    parts = [_plural(run.world_size, "rank")]
    for name in run.encoders:
        found = relation(placements[name], language)
        same = found == "colocated" and placements[name] == language
        parts.append(f"{name} and {LANGUAGE} {found}" + (" and homogeneous" if same else ""))
    idle = _idle(run.world_size, placements)
    if idle:
        parts.append(f"idle: {ranks_text(idle)}")
    return " · ".join(parts)


def _rank_table(world: int, placements: Mapping[str, Placement], footprints: Mapping[str, ModuleFootprint]) -> Table:
    table = _table()
    table.add_column("rank" if world <= EVERY_RANK else "ranks", style="bold", no_wrap=True)
    for name in placements:
        table.add_column(name)
        table.add_column("parameters", justify="right", style="dim", header_style="dim")
    for ranks in _rows(world, placements):
        if isinstance(ranks, str):
            table.add_row("⋮", Text(ranks, style="dim"))
            continue
        cells: list[Text | str] = []
        for name, placement in placements.items():
            if ranks[0] in placement:
                cells += [_role(placement, ranks), _held_text(footprints[name], ranks)]
            else:
                cells += [Text("–" if _members(ranks[0], placements) else "idle", style="dim"), ""]
        table.add_row(ranks_text(ranks), *cells)
    return table


def _rows(world: int, placements: Mapping[str, Placement]) -> Iterable[tuple[int, ...] | str]:
    """Ranks of each row of the rank table; a text stands for rows that are left out."""
    if world <= EVERY_RANK:
        return [(rank,) for rank in range(world)]
    blocks = _blocks(world, placements)
    rows: list[tuple[int, ...] | str] = []
    for _, same in groupby(blocks, key=lambda ranks: (_members(ranks[0], placements), len(ranks))):
        group = list(same)
        if len(blocks) > EVERY_RANK and len(group) > 4:
            rows += [*group[:2], f"{len(group) - 3} more like these", group[-1]]
        else:
            rows += group
    return rows


def _blocks(world: int, placements: Mapping[str, Placement]) -> list[tuple[int, ...]]:
    """Ranks of the same modules that share a lane of the module with the largest lanes, by modules."""
    blocks: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
    for rank in range(world):
        members = _members(rank, placements)
        widest = max(members, key=lambda name: placements[name].layout.lane_size, default=None)
        lane: tuple[int, ...] = ()
        if widest is not None:
            coordinate = placements[widest].coordinate(rank)
            assert coordinate is not None
            lane = coordinate["pp"], coordinate["dp"]
        blocks.setdefault((members, lane), []).append(rank)
    first_of: dict[tuple[str, ...], int] = {}
    for (members, _), ranks in blocks.items():
        first_of.setdefault(members, ranks[0])
    ordered = sorted(blocks.items(), key=lambda entry: (first_of[entry[0][0]], entry[1][0]))
    return [tuple(ranks) for _, ranks in ordered]


def _members(rank: int, placements: Mapping[str, Placement]) -> tuple[str, ...]:
    return tuple(name for name, placement in placements.items() if rank in placement)


def _role(placement: Placement, ranks: Sequence[int]) -> Text:
    """`lane 1 · tp 0/2`, for one rank or for several that have much in common."""
    coordinates = [found for rank in ranks if (found := placement.coordinate(rank)) is not None]
    lanes = sorted({coordinate["dp"] for coordinate in coordinates})
    text = Text(f"{'lane' if len(lanes) == 1 else 'lanes'} {ranks_text(lanes)}", style=_lane_style(lanes[0]))
    for axis, size in zip(AXES, placement.layout.sizes(), strict=True):
        if axis != "dp" and size > 1:
            indices = sorted({coordinate[axis] for coordinate in coordinates})
            text.append(f" · {INDEX_NAMES[axis]} {ranks_text(indices)}/{size}")
    return text


def _held_text(footprint: ModuleFootprint, ranks: Sequence[int]) -> str:
    """Parameters that each of `ranks` holds."""
    held = [footprint.local[rank] for rank in ranks]
    fewest, most = count_text(min(held)), count_text(max(held))
    return most if fewest == most else f"{fewest} to {most}"


def _module_heading(name: str, placement: Placement) -> Text:
    return Text.assemble((name, "bold"), f"  {placement.layout} on ranks {ranks_text(placement.ranks, 60)}")


def _module_table(run: RunConfig, name: str, placement: Placement, footprint: ModuleFootprint) -> Table:
    layout = placement.layout
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True, min_width=12)
    table.add_column()
    for stage in range(layout.pp):
        table.add_row("lanes" if layout.pp == 1 else f"lanes, stage {stage}", _groups_text(placement.lanes(stage)))
    for axis, size in zip(AXES, layout.sizes(), strict=True):
        if size > 1:
            table.add_row(f"{axis} groups", _groups_text(_groups(placement, axis)))
    for axis, size in zip(EXPERT_AXES, layout.sizes(EXPERT_AXES), strict=True):
        if layout.ep * layout.etp > 1 and size > 1 and axis != "pp":
            table.add_row(f"{axis} groups", _groups_text(_groups(placement, axis, EXPERT_AXES)))
    whole = f"{count_text(footprint.parameters)} in all"
    kept = {"shard": "sharded", "replicate": "replicated"}[run.modules[name].data_parallel]
    how = f", {kept} over dp{' × cp' if layout.cp > 1 else ''}"
    held = f"{_held_text(footprint, placement.ranks)} a rank{how if layout.dp * layout.cp > 1 else ''}"
    most = max(footprint.local_bytes(rank) for rank in placement.ranks)
    table.add_row("parameters", f"{whole}, {held}")
    table.add_row("memory", f"{bytes_text(most)} a rank for parameters, gradients and AdamW")
    return table


def _groups_text(groups: Sequence[Sequence[int]]) -> str:
    """`4 of 2 ranks: 0-1 │ 2-3 │ 4-5 │ 6-7`"""
    if len(groups[0]) == 1:
        return f"{len(groups)} of 1 rank: {ranks_text([rank for (rank,) in groups], 60)}"
    shown = listing([ranks_text(group) for group in groups], 6)
    return f"{len(groups)} of {len(groups[0])} ranks: {shown}"


def _groups(placement: Placement, axis: str, axes: tuple[str, ...] = AXES) -> list[tuple[int, ...]]:
    """All groups along one axis (of the dense or expert view), ordered by their first position in the layout."""
    groups = []
    for rank in placement.ranks:
        coordinate = placement.coordinate(rank, axes)
        if coordinate is not None and coordinate[axis] == 0:
            groups.append(placement.group(rank, axis, axes))
    return groups


def _fullest_rank(run: RunConfig, footprints: Mapping[str, ModuleFootprint]) -> Text:
    totals = [sum(part.local_bytes(rank) for part in footprints.values()) for rank in range(run.world_size)]
    fullest = max(range(run.world_size), key=totals.__getitem__)
    return Text(f"Fullest rank: {fullest}, {bytes_text(totals[fullest])}; activations come on top.")


def _traffic_heading(crossing: BoundaryTraffic) -> Text:
    return Text.assemble(
        (f"{crossing.encoder} → {LANGUAGE}", "bold"),
        f", a step of {_plural(crossing.samples, 'sample')}: {_plural(crossing.items, 'media item')}, "
        f"{_plural(crossing.tokens, 'token')} of {bytes_text(crossing.token_bytes)}",
    )


def _traffic_table(crossing: BoundaryTraffic, node_size: int | None) -> Table:
    table = _table()
    table.add_column("", no_wrap=True)
    between = ["between\nnodes"] if node_size is not None else []
    for column in ("over\nlinks", "lower\nbound", *between, "local\ncopies", "most\nsent", "most\nreceived"):
        table.add_column(column, justify="right")
    for name, direction in (("forward", crossing.forward), ("backward", crossing.backward)):
        crossed = [direction.between_nodes] if node_size is not None else []
        counts = [direction.moved, direction.lower_bound, *crossed, direction.copied]
        sizes = [bytes_text(count * crossing.token_bytes) for count in counts]
        ends = [_largest(tokens, crossing.token_bytes) for tokens in (direction.sent, direction.received)]
        table.add_row(name, *sizes, *ends)
    return table


def _largest(tokens: Mapping[int, int], token_bytes: int) -> str:
    """`148 KiB (r0)`: the rank with the most tokens."""
    if not tokens:
        return "–"
    rank = max(tokens, key=tokens.__getitem__)
    return f"{bytes_text(tokens[rank] * token_bytes)} (r{rank})"


def _table() -> Table:
    return Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)


def _idle(world: int, placements: Mapping[str, Placement]) -> tuple[int, ...]:
    return tuple(rank for rank in range(world) if not _members(rank, placements))


def _lane_style(lane: int) -> str:
    return ("cyan", "yellow", "green", "magenta", "blue", "red")[lane % 6]


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
