"""Does the picture of a layout show every lane, every idle rank, and every band?"""

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from meshweave.layout import Layout, Placement
from meshweave.report.layout_picture import COLOURS, IDLE, draw_layout_map


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)


def _share(pixels, colour):
    wanted = np.round(np.array(to_rgb(colour)) * 255).astype(int)
    return (np.abs(pixels.astype(int) - wanted).max(axis=1) <= 1).mean()


@pytest.fixture
def texts(monkeypatch):
    """The texts of the figures that are written."""
    found = []
    save = Figure.savefig

    def remember(figure, *args, **kwargs):
        found.extend(text.get_text() for axes in figure.axes for text in axes.texts)
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return found


def test_every_lane_has_its_colour_and_every_rank_its_place_in_it(tmp_path, texts):
    placed = {
        "vision": Placement(Layout(dp=4), (0, 1, 2, 3)),
        "language": Placement(Layout(dp=2, tp=2), (0, 1, 2, 3)),
    }
    path = tmp_path / "map.png"
    draw_layout_map(placed, 4, path, "four ranks")
    pixels = _pixels(path)
    shares = [_share(pixels, colour) for colour in COLOURS]
    assert min(shares[:4]) > 0.02
    assert max(shares[4:]) < 0.001
    assert shares[0] > 2 * shares[2]  # lane 0 of both modules, against lane 2 of vision alone
    assert _share(pixels, IDLE) < 0.001
    assert texts.count("lane 0") == texts.count("lane 1") == 2
    assert texts.count("tp 0") == texts.count("tp 1") == 2
    assert {"four ranks", "rank 3", "vision", "dp 4", "language", "dp 2 × tp 2"} <= set(texts)


def test_ranks_outside_a_module_are_grey(tmp_path, texts):
    placed = {"vision": Placement(Layout(), (0,)), "language": Placement(Layout(tp=2), (1, 2))}
    path = tmp_path / "map.png"
    draw_layout_map(placed, 4, path)
    assert _share(_pixels(path), IDLE) > 0.1
    assert texts.count("lane 0") == 2


def test_ranks_go_on_in_bands_and_the_middle_of_a_large_world_gives_way(tmp_path, texts):
    placed = {"language": Placement(Layout(dp=512, tp=8), tuple(range(4096)))}
    path = tmp_path / "map.png"
    draw_layout_map(placed, 4096, path)
    assert {"0", "159", "4064", "4095", "lane 0", "lane 511"} <= set(texts)
    assert "160" not in texts
    assert "… ranks 160 to 4063 …" in texts
    width, height = Image.open(path).size
    assert width < 4000
    assert height < 4000


def test_a_lane_on_scattered_ranks_is_drawn_in_every_place(tmp_path, texts):
    placed = {"language": Placement(Layout(dp=2, tp=2), (0, 2, 1, 3))}
    draw_layout_map(placed, 4, tmp_path / "map.png")
    assert texts.count("lane 0") == texts.count("lane 1") == 2
