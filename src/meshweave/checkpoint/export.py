"""How does a trained model leave? As an ordinary Hugging Face folder, streamed through rank 0."""

from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from meshweave.checkpoint.collect import parameter_reader
from meshweave.checkpoint.folder import SHARD_BYTES, FolderPlan, ReadValue, plan_folder, write_folder
from meshweave.config import RunConfig
from meshweave.errors import CheckpointError
from meshweave.model.blueprint import STORED
from meshweave.parallel.build import LocalModel
from meshweave.world import World

Agreed = TypeVar("Agreed")


def export_model(
    world: World, model: LocalModel, config: PreTrainedConfig, run: RunConfig, folder: Path, shard_bytes: int = SHARD_BYTES
) -> None:
    """Rank 0 writes `folder`, like the run's model folder; a collective over all ranks, which send it one parameter at a time.

    What an earlier part of the run left there is there until the new one is whole.

    Raises:
        CheckpointError: as `plan_folder` and `write_folder`; on all ranks alike.
    """
    read = parameter_reader(model, world)
    plan: FolderPlan | None = None
    names: list[str] = []
    fault: str | None = None
    if world.rank == 0:
        try:
            seed = run.seed if run.weights == "seeded" else None
            plan = plan_folder(run.model, config, seed=seed, seeded_dtype=STORED[run.dtype], shard_bytes=shard_bytes)
            names = plan.names
        except CheckpointError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{run.model}: not readable any more ({error})"
    names, fault = _from_first(world, (names, fault))
    if fault is None:
        if plan is not None:
            fault = _write(plan, read, iter(names), folder)
        else:
            for name in names:
                read(name)
        fault = _from_first(world, fault)
    if fault is not None:
        raise CheckpointError(fault)


def _write(plan: FolderPlan, read: ReadValue, names: Iterator[str], folder: Path) -> str | None:
    """What went wrong, if anything did; the others' parameters are then received all the same, so that none of them waits."""

    def next_value(name: str) -> Tensor | None:
        return read(next(names))

    try:
        write_folder(plan, next_value, folder, replace=True)
    except CheckpointError as error:
        for name in names:
            read(name)
        return str(error)
    return None


def _from_first(world: World, value: Agreed) -> Agreed:
    """Rank 0's value; a collective over all ranks."""
    values = [value]
    if world.size > 1:
        dist.broadcast_object_list(values, src=0, group=world.data_group)
    return values[0]
