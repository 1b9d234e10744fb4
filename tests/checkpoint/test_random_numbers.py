"""Random numbers go on where they were, each rank's own: of one key DCP would keep any rank's."""

from pathlib import Path
from typing import Any

import torch
from support.runs import module

from meshweave.checkpoint.load import load_state
from meshweave.checkpoint.manifest import checkpoint_folder
from meshweave.checkpoint.save import Saver
from meshweave.checkpoint.state import held_state
from meshweave.config import RunConfig, parse_config
from meshweave.parallel.build import LocalModel
from meshweave.world import World, launch


def run_of(output: Path, ranks: int) -> RunConfig:
    tree = {
        "model": "unused",
        "modules": {"vision": module("0"), "language": module(f"0-{ranks - 1}", dp=ranks)},
        "train": {"steps": 9, "batch_size": 6},
        "output": str(output),
        "timeout_seconds": 60,
    }
    return parse_config(tree)


NOTHING: Any = LocalModel(graph=None, modules={}, cuts={}, part=None, context=None)  # type: ignore[arg-type]


def empty_optimizer() -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": []}])


def drawn(world: World) -> list[list[int]]:
    """What each rank would draw next."""
    mine = torch.randint(1 << 30, (4,))
    everyone = [torch.empty_like(mine) for _ in range(world.size)]
    torch.distributed.all_gather(everyone, mine)
    return [its.tolist() for its in everyone]


def saved(world: World, run: RunConfig) -> list[list[int]]:
    torch.manual_seed(100 + world.rank)
    with Saver(world, run, samples=1) as saver:
        saver.save(1, held_state(NOTHING, empty_optimizer(), world), {})
    return drawn(world)


def gone_on(world: World, run: RunConfig) -> list[list[int]]:
    torch.manual_seed(0)
    load_state(world, checkpoint_folder(run.output, 1), NOTHING, empty_optimizer(), {})
    return drawn(world)


def test_each_rank_draws_on(tmp_path: Path) -> None:
    before = launch(run_of(tmp_path, 3), saved)
    assert before is not None
    assert len({tuple(its) for its in before}) == 3
    assert launch(run_of(tmp_path, 3), gone_on) == before


def test_another_number_of_ranks_draws_anew(tmp_path: Path) -> None:
    before = launch(run_of(tmp_path, 3), saved)
    after = launch(run_of(tmp_path, 2), gone_on)
    assert before is not None
    assert after is not None
    assert after[0] == after[1]
    assert after[0] not in before
