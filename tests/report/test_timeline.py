"""Does the picture of a timeline show every computation where and when it ran, and every number in its block?"""

import time

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from meshweave.layout import Layout, Placement
from meshweave.report.layout_picture import COLOURS, IDLE
from meshweave.report.timeline import MOST_ROWS, draw_timeline, draw_timelines
from meshweave.schedule.actions import Kind
from meshweave.schedule.durations import Durations, equal_durations
from meshweave.schedule.generators.three_phase import three_phase
from meshweave.schedule.lower import lower
from meshweave.schedule.simulate import Timeline, simulate
from meshweave.schedule.work import ModuleWork, plan_work


def _timeline(pp=4, microbatches=8, stages=None, split=False, vision=False, unit=1.0):
    """A language model over `pp` ranks, with a vision encoder beside it if wanted."""
    placed = {"language": Placement(Layout(pp=pp), tuple(range(pp)))}
    modules = {"language": ModuleWork("language", stages or pp, split=split)}
    if vision:
        placed = {"vision": Placement(Layout(dp=pp), tuple(range(pp)))} | placed
        modules = {"vision": ModuleWork("vision", per_pass=4)} | modules
    work = plan_work(placed, modules, microbatches)
    table = {key: seconds * unit for key, seconds in equal_durations(work).table.items()}
    if vision:
        table |= {(Kind.GATHER, "vision", 0): 2 * unit, (Kind.REDUCE, "vision", 0): 2 * unit}
    durations = Durations(table)
    return simulate(lower(work, [[order] for order in three_phase(work, pp, microbatches)], durations), durations)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are written."""
    found = []
    save = Figure.savefig

    def remember(figure, *args, **kwargs):
        found.append(figure)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return found


def _texts(figure):
    return [text.get_text() for text in [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]]


def _legend(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def _numbers(axes):
    return [text for text in axes.texts if text.get_text().isdigit()]


def _boxes(axes):
    """Each drawn block: left, right and top, and its colour."""
    found = []
    for collection in axes.collections:
        assert isinstance(collection, PolyCollection)
        for path, colour in zip(collection.get_paths(), collection.get_facecolors(), strict=True):
            (left, top), (right, _) = path.vertices[:2]
            found.append((left, right, top, tuple(colour[:3])))
    return found


def test_every_span_is_a_block_at_its_time_in_its_row(tmp_path, figures):
    timeline = _timeline(vision=True, unit=1e-3)
    draw_timeline(timeline, tmp_path / "t.png", "four ranks")
    axes = figures[0].axes[0]
    drawn = sorted((int(top), round(left, 6), round(right, 6)) for left, right, top, _ in _boxes(axes))
    spans = [(row, span) for row, its in enumerate(timeline.spans) for span in its if span.stop > span.start]
    assert drawn == sorted((row, round(span.start * 1e3, 6), round(span.stop * 1e3, 6)) for row, span in spans)
    assert axes.get_xlabel() == "time (ms)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["rank 0", "rank 1", "rank 2", "rank 3"]
    assert {"four ranks", f"step {timeline.seconds * 1e3:.1f} ms · bubble {timeline.bubble:.1%}"} <= set(_texts(figures[0]))


@pytest.mark.parametrize(
    "case",
    [{}, {"stages": 8}, {"split": True}, {"vision": True}, {"pp": 16, "microbatches": 32}, {"pp": 1}],
    ids=str,
)
def test_numbers_lie_inside_their_blocks(tmp_path, figures, case):
    timeline = _timeline(**case)
    draw_timeline(timeline, tmp_path / "t.png")
    axes = figures[0].axes[0]
    numbers = _numbers(axes)
    assert numbers
    boxes = _boxes(axes)
    for text in numbers:
        extent = text.get_window_extent().transformed(axes.transData.inverted())
        assert any(
            left < extent.x0 and extent.x1 < right and top < min(extent.y0, extent.y1) and max(extent.y0, extent.y1) < top + 0.84
            for left, right, top, _ in boxes
        )


def test_every_block_has_its_microbatch_where_there_is_room(tmp_path, figures):
    timeline = _timeline(vision=True)
    draw_timeline(timeline, tmp_path / "t.png")
    written = sorted(int(text.get_text()) for text in _numbers(figures[0].axes[0]))
    assert written == sorted(span.action.microbatch for spans in timeline.spans for span in spans if span.action.microbatch >= 0)
    assert "numbers: microbatches (of encoders: passes)" in _texts(figures[0])


def test_modules_have_their_colours_and_forwards_are_lighter(tmp_path, figures):
    draw_timeline(_timeline(vision=True), tmp_path / "t.png")
    assert _legend(figures[0]) == [
        "vision forward",
        "vision backward",
        "language forward",
        "language backward",
        "gather, reduce",
    ]
    colours = {colour for *_, colour in _boxes(figures[0].axes[0])}
    assert len(colours) == 5
    for base in COLOURS[:2]:
        backward = min(colours, key=lambda colour: np.abs(np.subtract(colour, to_rgb(base))).sum())
        assert np.abs(np.subtract(backward, to_rgb(base))).max() < 0.03


@pytest.mark.parametrize(
    ("case", "labels", "shades"),
    [
        ({"split": True}, ["language forward", "language input gradient", "language weight gradient"], 3),
        ({"stages": 8}, ["language forward, by virtual stage", "language backward, by virtual stage"], 4),
        ({"stages": 12}, ["language forward, by virtual stage", "language backward, by virtual stage"], 6),
    ],
)
def test_halves_and_virtual_stages_have_shades_of_their_own(tmp_path, figures, case, labels, shades):
    draw_timeline(_timeline(**case), tmp_path / "t.png")
    assert _legend(figures[0]) == labels
    assert len({colour for *_, colour in _boxes(figures[0].axes[0])}) == shades


def test_idle_time_stays_visible(tmp_path):
    path = tmp_path / "t.png"
    draw_timeline(_timeline(microbatches=1), path)
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    wanted = np.round(np.array(to_rgb(IDLE)) * 255)
    assert (np.abs(pixels - wanted).max(axis=1) <= 1).mean() > 0.15


@pytest.mark.parametrize(("unit", "name"), [(1e-6, "µs"), (2e-3, "ms"), (0.9, "s"), (100.0, "s")])
def test_the_axis_has_a_sensible_unit_and_round_ticks(tmp_path, figures, unit, name):
    draw_timeline(_timeline(unit=unit), tmp_path / "t.png")
    axes = figures[0].axes[0]
    assert axes.get_xlabel() == f"time ({name})"
    step = np.diff(axes.get_xticks())[0]
    assert round(step / 10 ** np.floor(np.log10(step) + 1e-9), 6) in (1, 2, 2.5, 5)


@pytest.mark.parametrize(("ranks", "labels"), [((), []), (((0, 1, 2, 3), (5,)), ["ranks 0-3", "rank 5"])])
def test_a_timeline_without_spans_is_drawn_empty(tmp_path, figures, ranks, labels):
    path = tmp_path / "t.svg"
    draw_timeline(Timeline(ranks, ((),) * len(ranks)), path, "empty")
    assert path.read_text().startswith("<?xml")
    assert "step 0 s · bubble 0.0%" in _texts(figures[0])
    assert [label.get_text() for label in figures[0].axes[0].get_yticklabels()] == labels


def test_many_rows_and_microbatches_thin_out(tmp_path, figures):
    timeline = _timeline(pp=72, microbatches=256)
    began = time.perf_counter()
    draw_timeline(timeline, tmp_path / "t.png")
    assert time.perf_counter() - began < 8
    axes = figures[0].axes[0]
    assert not _numbers(axes)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) == MOST_ROWS + 1
    assert (labels[0], labels[23], labels[24], labels[25], labels[-1]) == ("rank 0", "rank 23", "", "rank 48", "rank 71")
    assert "… 24 rows left out: ranks 24-47 …" in _texts(figures[0])
    assert max(Image.open(tmp_path / "t.png").size) < 4000


def test_several_timelines_share_one_axis_and_one_legend(tmp_path, figures):
    fast, slow = _timeline(split=True), _timeline(vision=True)
    draw_timelines({"fast": fast, "slow": slow}, tmp_path / "t.png")
    (figure,) = figures
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim() == (0, slow.seconds)
    assert above.get_position().y0 > below.get_position().y1
    assert (above.get_xlabel(), below.get_xlabel()) == ("", "time (s)")
    assert {"fast", "slow"} <= set(_texts(figure))
    assert len(_legend(figure)) == 7
    assert max(right for _, right, _, _ in _boxes(above)) == fast.seconds
