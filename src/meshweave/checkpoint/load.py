"""May a run go on from a checkpoint, and how does its state come back?"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.optim import Optimizer

from meshweave.checkpoint.manifest import Manifest, check_sums
from meshweave.checkpoint.save import said
from meshweave.checkpoint.state import check_parameters, restore_random, wanted_state
from meshweave.checkpoint.storage import LoadPieces, Reader
from meshweave.config import RunConfig
from meshweave.errors import CheckpointError, ConfigError
from meshweave.parallel.build import LocalModel
from meshweave.world import World

_ANYHOW = {"modules", "schedule", "output", "node_size", "idle_ranks", "timeout_seconds", "preemption_seconds"}
"""Sections and keys whose change leaves loss and gradients as they are."""
_ANYHOW_IN_TRAIN = {"microbatches", "pack", "log_every", "checkpoint", "resume"}
_OPTIMIZER = {"steps", "lr", "min_lr_ratio", "warmup_steps", "betas", "eps", "weight_decay", "max_grad_norm", "max_skipped_steps"}
"""Of `train`: what may change on the way, and is said."""
_AROUND = {"eval_path", "eval_samples", "on_error", "max_skipped"}
"""Of `data`: likewise, as the samples that are trained stay the same."""
_DIFFER = {"frozen"}
"""Of a module: what does make a difference."""


def require_same_run(folder: Path, manifest: Manifest, run: RunConfig, samples: int, allowed: Sequence[str] = ()) -> list[str]:
    """Compares the run with the one that wrote the checkpoint. Returns what has changed and may, a line each.

    Args:
        samples: of the training data.
        allowed: keys whose change is asked for, such as `data` or `train.batch_size`.

    Raises:
        ConfigError: something has changed that makes it another run.
    """
    before, now = dict(_leaves(manifest.run)), dict(_leaves(run.model_dump(mode="json", by_alias=True)))
    before["data.samples"], now["data.samples"] = manifest.samples, samples
    known = before.keys() | now.keys()
    for name in allowed:
        if not any(_within(key, name) for key in known):
            raise ConfigError(
                f"--allow-changed {name}: there is no such key in the run file; the keys are those that a refusal names"
            )
    fine: list[tuple[str, str]] = []
    wrong: list[tuple[str, str]] = []
    for key in sorted(before.keys() | now.keys()):
        then, today = before.get(key), now.get(key)
        if then == today or _makes_none(key):
            continue
        line = f"{key}: {then!r} → {today!r}"
        asked = any(_within(key, name) for name in allowed)
        (fine if asked or _may_change(key) else wrong).append((key, line))
    if wrong:
        lines = "\n".join(f"  {line}" for _, line in wrong)
        options = " ".join(f"--allow-changed {key}" for key in dict.fromkeys(_said_as(key) for key, _ in wrong))
        raise ConfigError(
            f"{folder}: this is not the run that wrote it; since then have changed\n{lines}\nput that back, start anew (another "
            f"output), or go on all the same: {options}"
        )
    return [line for _, line in fine]


def load_state(world: World, folder: Path, model: LocalModel, optimizer: Optimizer, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Fills parameters, optimizer state and random numbers from a checkpoint, whatever layout wrote it. A collective.

    Args:
        shapes: of every parameter of the run's modules, whole, tied ones once.

    Returns: bytes of tensors that this rank read.

    Raises:
        CheckpointError: it is of another model, or not readable; on all ranks alike.
    """
    reader = Reader(folder)
    stored = {key: tuple(getattr(tensor, "size", ())) for key, tensor in reader.read_metadata().state_dict_metadata.items()}
    try:
        check_parameters(stored, shapes)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    wanted = wanted_state(model, optimizer, world, stored)
    try:
        dcp.load(dict(wanted), storage_reader=reader, planner=LoadPieces(), process_group=world.data_group)
    except CheckpointException as error:
        raise CheckpointError(f"{folder}: could not be read ({said(error)})") from error
    restore_random(world, wanted)
    return reader.bytes_read


def check_sums_together(world: World, folder: Path, manifest: Manifest) -> None:
    """Reads every file once, each rank its share of them. A collective. Raises CheckpointError on all ranks alike."""
    fault = None
    try:
        check_sums(folder, manifest, list(manifest.files)[world.rank :: world.size])
    except CheckpointError as error:
        fault = str(error)
    faults: list[Any] = [fault]
    if world.size > 1:
        faults = [None] * world.size
        dist.all_gather_object(faults, fault, group=world.data_group)
    if found := [each for each in faults if each is not None]:
        raise CheckpointError("\n".join(found))


def _within(key: str, name: str) -> bool:
    """Whether it is the key of that name, or of that section."""
    return f"{key}.".startswith(f"{name}.")


def _leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _makes_none(key: str) -> bool:
    first, _, rest = key.partition(".")
    if first == "modules":
        return rest.rpartition(".")[2] not in _DIFFER | {"lr"}
    return first in _ANYHOW or (first == "train" and rest.partition(".")[0] in _ANYHOW_IN_TRAIN)


def _may_change(key: str) -> bool:
    first, _, rest = key.partition(".")
    lr = first == "modules" and rest.rpartition(".")[2] == "lr"
    return lr or (first == "train" and rest in _OPTIMIZER) or (first == "data" and rest in _AROUND)


def _said_as(key: str) -> str:
    """The section, of data: a change of the file seldom comes alone."""
    return "data" if key.startswith("data.") else key
