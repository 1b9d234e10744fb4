"""Do the curves show every record as it is, on an axis that fits it?"""

import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from meshweave.report.curves import SMOOTH_FROM, draw_loss_curve


@pytest.fixture
def axes(monkeypatch):
    """Filled with the axes of the figure that would be written: loss, learning rate, speed."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **kwargs: found.extend(figure.axes))
    return found


def _records(losses, **rates):
    return [
        {
            "step": step,
            "loss": loss,
            "grad_norm": 1.0,
            "lr": {name: rate / step for name, rate in (rates or {"vision": 1e-3, "language": 1e-3}).items()},
            "tokens_per_second": 30_000.0 if step > 1 else 200.0,
            "seconds": 0.1,
        }
        for step, loss in enumerate(losses, 1)
    ]


def _drawn(line):
    return np.asarray(line.get_ydata(), dtype=float)


def test_the_picture_is_a_png_of_a_fixed_size(tmp_path):
    draw_loss_curve(_records([3.0, 2.0, 1.0]), tmp_path / "loss.png", "a run")
    picture = Image.open(tmp_path / "loss.png")
    assert picture.format == "PNG"
    assert picture.size == (1290, 810)


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([3.0, 1.0, 0.2], "linear"),
        ([3.0, 0.5, 0.02], "log"),
        ([3.0, 0.5, 0.0], "linear"),
        ([3.0, 0.5, -1], "linear"),
    ],
)
def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis(tmp_path, axes, losses, scale):
    draw_loss_curve(_records(losses), tmp_path / "loss.png")
    assert axes[0].get_yscale() == scale
    assert _drawn(axes[0].lines[0]).tolist() == losses


@pytest.mark.parametrize("missing", [math.nan, math.inf, None])
def test_a_loss_that_is_not_finite_leaves_a_gap(tmp_path, axes, missing):
    draw_loss_curve(_records([3.0, missing, 1.0]), tmp_path / "loss.png")
    assert np.isnan(_drawn(axes[0].lines[0])).tolist() == [False, True, False]
    assert [text.get_text() for text in axes[0].texts] == ["1"]


def test_a_long_run_shows_its_single_values_and_their_moving_mean(tmp_path, axes):
    losses = [2.0 + (-1) ** step * 0.5 for step in range(SMOOTH_FROM + 1)]
    draw_loss_curve(_records(losses), tmp_path / "loss.png")
    single, mean = (_drawn(line) for line in axes[0].lines)
    assert single.tolist() == losses
    assert np.abs(mean[1:-1] - 2.0).max() < 0.2


def test_a_moving_mean_follows_a_slope_without_lag(tmp_path, axes):
    losses = [10.0 - 0.05 * step for step in range(120)]
    draw_loss_curve(_records(losses), tmp_path / "loss.png")
    mean = _drawn(axes[0].lines[1])
    assert np.abs(mean[5:-5] - losses[5:-5]).max() < 1e-9


def test_modules_with_one_learning_rate_share_a_line(tmp_path, axes):
    draw_loss_curve(_records([3.0, 2.0], vision=1e-3, audio=2e-3, language=1e-3), tmp_path / "loss.png")
    assert [line.get_label() for line in axes[1].lines] == ["vision, language", "audio"]
    assert _drawn(axes[1].lines[1]).tolist() == [2e-3, 1e-3]


def test_the_first_step_does_not_squeeze_the_speed_of_the_others(tmp_path, axes):
    draw_loss_curve(_records([3.0, 2.0, 1.0]), tmp_path / "loss.png")
    assert _drawn(axes[2].lines[0]).tolist() == [30_000.0, 30_000.0]


@pytest.mark.parametrize("losses", [[], [2.5], [math.nan]])
def test_runs_of_hardly_any_steps_are_drawn_too(tmp_path, losses):
    draw_loss_curve(_records(losses), tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size == (1290, 810)
