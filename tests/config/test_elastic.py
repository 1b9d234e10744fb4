"""A run file may have several layouts: the one that fits the ranks that are there is taken, and all are checked."""

from pathlib import Path

import pytest

from meshweave.config import RunConfig, load_config
from meshweave.errors import ConfigError

RUN = """
model: folder
modules:
  vision: {ranks: 0-7, dp: 8, lr: 1.0e-5}
  language: {ranks: 0-7, tp: 4, frozen: [embed_tokens]}
schedule: {macro_batch: 4}
layouts:
  - modules:
      vision: {ranks: 0-3, dp: 4}
      language: {ranks: 0-3, tp: 2, frozen: false}
  - modules:
      vision: {ranks: 0}
      language: {ranks: 0-1, pp: 2}
    schedule: {encoders: nested}
train: {steps: 4, batch_size: 8}
"""


def loaded(folder: Path, ranks: int | None, text: str = RUN, overrides: tuple[str, ...] = ()) -> RunConfig:
    (folder / "run.yaml").write_text(text)
    return load_config(folder / "run.yaml", overrides, ranks)


@pytest.mark.parametrize(
    ("ranks", "tp", "world"), [(None, 4, 8), (8, 4, 8), (4, 2, 4), (2, 1, 2), (9, 4, 9), (7, 2, 7), (3, 1, 3)]
)
def test_the_layout_that_fits_is_taken_and_ranks_that_are_over_idle(
    ranks: int | None, tp: int, world: int, tmp_path: Path
) -> None:
    run = loaded(tmp_path, ranks)
    assert run.modules["language"].tp == tp
    assert run.world_size == world
    used = {rank for module in run.modules.values() for rank in module.ranks}
    assert set(run.idle_ranks) == set(range(world)) - used


def test_what_is_no_matter_of_layout_holds_in_all_of_them(tmp_path: Path) -> None:
    first, second, third = (loaded(tmp_path, ranks) for ranks in (8, 4, 2))
    assert second.modules["vision"].lr == third.modules["vision"].lr == first.modules["vision"].lr == 1e-5
    assert (second.modules["language"].frozen, third.modules["language"].frozen) == (False, ("embed_tokens",))
    assert (first.schedule.macro_batch, second.schedule.macro_batch, third.schedule.macro_batch) == (4, None, None)
    assert second.train == third.train == first.train


def test_an_override_of_the_run_is_one_of_every_layout(tmp_path: Path) -> None:
    assert loaded(tmp_path, 4, overrides=("train.batch_size=16",)).train.batch_size == 16


def test_too_few_ranks_are_said_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are 1 ranks, and the run file's layouts need 8, 4, 2; add one for 1"):
        loaded(tmp_path, 1)


def test_a_layout_that_is_not_taken_is_checked_all_the_same(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.yaml, layouts\[1\]:\n  modules\.language: .*"):
        loaded(tmp_path, 8, RUN.replace("pp: 2", "pp: 3"))
    with pytest.raises(ConfigError, match=r"layouts: a list of sections with `modules`"):
        loaded(tmp_path, 8, RUN.replace("layouts:", "layouts: 3\nother:"))
    with pytest.raises(ConfigError, match=r"layouts: a list of sections with `modules`"):
        loaded(tmp_path, 8, RUN.replace("layouts:", "layouts: {}\nother:"))
    with pytest.raises(
        ConfigError, match=r"layouts\[0\]\.train: a layout has modules, schedule, idle_ranks, node_size; the rest"
    ):
        loaded(
            tmp_path,
            8,
            RUN.replace("  - modules:\n      vision: {ranks: 0-3", "  - train: {}\n    modules:\n      vision: {ranks: 0-3"),
        )
