"""What a rank keeps of a sequence falls with the number of ranks that share it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import torch
from support.models import llava, write_model_folder
from support.runs import module, run_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from meshweave.batch.plan import SampleMeta
from meshweave.config import RunConfig
from meshweave.model.blueprint import read_model_config
from meshweave.parallel.build import build_model
from meshweave.parallel.context import SequencePlan
from meshweave.sequence.grid import lay_out
from meshweave.world import World, launch

LENGTH = 512
HIDDEN, WORDS = 32, 96


class Kept(NamedTuple):
    """What one rank, the one that keeps most, has of a forward and backward of one document."""

    saved: int
    """Bytes that autograd saves, parameters included."""
    between: int
    """Bytes of those that norms save: what lies between attention and MLPs."""
    largest: int
    """Numbers in the largest tensor that any operation made."""
    parameters: int
    """Bytes of all parameters, of which those in use are saved, too."""


class _Saved:
    """State: what autograd has saved, each storage once, kept alive so that none is taken for another; if a norm runs."""

    def __init__(self, stage: nn.Module) -> None:
        self.storages: dict[int, torch.UntypedStorage] = {}
        self.of_norms: dict[int, torch.UntypedStorage] = {}
        self._in_norm = False
        for name, part in stage.named_modules():
            if name.endswith(("layernorm", ".norm")):
                part.register_forward_pre_hook(lambda module, args: self._enter(True))
                part.register_forward_hook(lambda module, args, output: self._enter(False))

    def _enter(self, norm: bool) -> None:
        self._in_norm = norm

    def _pack(self, tensor: Tensor) -> Tensor:
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        for storages in (self.storages, *([self.of_norms] if self._in_norm else [])):
            storages[local.untyped_storage()._cdata] = local.untyped_storage()
        return tensor

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.storages.clear()
        self.of_norms.clear()
        with saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield


def _bytes(storages: Mapping[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())


class _Largest(TorchDispatchMode):
    """State: the numbers in the largest tensor so far."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
                self.numbers = max(self.numbers, local.numel())
        return result


def measure(world: World, run: RunConfig) -> tuple[Kept, Kept]:
    """Of a document of `LENGTH` tokens, and of one of twice as many; the most that any rank keeps."""
    config = read_model_config(run.model)
    model = build_model(run, config, world.placements, world.meshes, world.rank, world.device, world.expert_meshes)
    stage = model.modules["language"].stages[0]
    parameters = sum(parameter.nbytes for parameter in stage.parameters())
    found, saved = [], _Saved(stage)
    for length in (LENGTH, 2 * LENGTH):
        grid = lay_out([SampleMeta(0, length)], model.part.rule)
        assert grid.sequence is not None
        sequence = SequencePlan(grid.sequence, grid.parts, model.part.rule.masks, model.context)
        ids = torch.arange(length)[None] % (WORDS - 8) + 8
        largest = _Largest()
        with largest, saved.recording():
            loss, _ = stage(ids, grid, labels=ids, sequence=sequence)
            kept = _bytes(saved.storages), _bytes(saved.of_norms)
            loss.backward()
        mine = torch.tensor([*kept, largest.numbers, parameters])
        if world.size > 1:
            torch.distributed.all_reduce(mine, torch.distributed.ReduceOp.MAX)
        found.append(Kept(*mine.tolist()))
    return found[0], found[1]


@cache
def kept(cp: int, tp: int = 1, kind: str = "ring", tied: bool = False) -> tuple[Kept, Kept]:
    with TemporaryDirectory() as folder:
        write_model_folder(llava(tied=tied), Path(folder))
        language = module(f"0-{cp * tp - 1}", cp=cp, tp=tp, context_parallel=kind)
        found = launch(run_of(Path(folder), module("0"), language, train={"pack": True}, dtype="float32"), measure)
    assert found is not None
    return found


def per_token(its: tuple[Kept, Kept]) -> float:
    """Bytes saved for every token more; parameters, which do not grow with the sequence, are left out."""
    return (its[1].saved - its[0].saved) / LENGTH


@pytest.mark.parametrize(("cp", "kind"), [(2, "ring"), (4, "ring"), (4, "ulysses")])
def test_activations_of_a_rank_fall_as_one_over_cp(cp: int, kind: str) -> None:
    whole = kept(1)
    for ranks, (small, large) in ((1, whole), (cp, kept(cp, kind=kind))):
        share = per_token(whole) / ranks
        assert per_token((small, large)) == pytest.approx(share, rel=0.02)
        assert 0 <= small.saved - LENGTH * share <= whole[0].parameters


def test_no_rank_of_cp_makes_a_tensor_of_all_tokens() -> None:
    assert kept(1)[0].largest >= LENGTH * WORDS
    for kind in ("ring", "ulysses"):
        small, large = kept(4, kind=kind)
        assert small.largest < LENGTH * HIDDEN
        assert large.largest < 2 * LENGTH * HIDDEN


@pytest.mark.parametrize(("cp", "tp"), [(1, 2), (1, 4), (2, 2)])
def test_what_lies_between_blocks_falls_as_one_over_tp(cp: int, tp: int) -> None:
    (small, large), (whole, whole_large) = kept(cp, tp), kept(cp)
    assert large.between - small.between == (whole_large.between - whole.between) // tp


@pytest.mark.parametrize("tied", [False, True])
def test_no_rank_of_tp_has_all_logits(tied: bool) -> None:
    """Of an untied head each rank has its words; of a tied one, which is whole on every rank, its tokens."""
    assert kept(1, 2, tied=tied)[0].largest < LENGTH * WORDS
