"""`modules:` what may a run file say of one module?"""

from collections import Counter
from typing import Any, Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from meshweave.config.fields import Ranks, Strict, ranks_from_text


class ModuleConfig(Strict):
    """Layout, ranks and training options of one module."""

    ranks: Ranks
    """Ranks the module runs on, ascending, e.g. `0-7` or `0-3,8-11`; `tp` neighbours are adjacent in this list."""
    pp: PositiveInt = 1
    """Pipeline stages."""
    dp: PositiveInt
    """Lanes (data parallelism); left out, it fills the ranks that the other sizes leave."""
    cp: PositiveInt = 1
    """Context parallelism."""
    tp: PositiveInt = 1
    """Tensor parallelism."""
    ep: PositiveInt = 1
    """Expert parallelism."""
    etp: PositiveInt = 1
    """Tensor parallelism inside one expert."""
    replicas: PositiveInt = 1
    """Ranks that repeat the same work."""
    sequence_parallel: bool = True
    """`language` with `tp` above 1: shard activations between blocks over `tp` along the sequence."""
    context_parallel: Literal["ring", "ulysses"] = "ring"
    """How `cp` ranks attend to one another's tokens: keys and values go round, or heads are dealt out (as far as there are
    heads for every rank; the rest goes round)."""
    data_parallel: Literal["shard", "replicate"] = "shard"
    """Over `dp`: shard parameters, gradients and optimizer state (FSDP2), or keep a replica on every lane."""
    lr: PositiveFloat | None = None
    """Peak learning rate of this module; the run's `train.lr` if left out."""
    layers: tuple[PositiveInt, ...] | None = None
    """Transformer blocks of each pipeline stage (with virtual stages: of each of those), first to last; balanced by cost if
    left out."""
    max_in_flight: PositiveInt | None = None
    """Most microbatches whose activations a rank of this module may hold at once; a schedule that would hold more is refused."""
    frozen: bool | tuple[str, ...] = False
    """Not trained: the whole module, or its parameters whose full name contains one of these texts."""

    @model_validator(mode="before")
    @classmethod
    def _fill_dp(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "dp" in data:
            return data
        try:
            ranks = len(ranks_from_text(data["ranks"]))
            others = 1
            for axis in ("pp", "cp", "tp", "replicas"):
                others *= int(data.get(axis, 1))
        except (KeyError, TypeError, ValueError):
            return data | {"dp": 1}  # the wrong key gets its own message
        return data | {"dp": max(1, ranks // max(1, others))}

    @model_validator(mode="after")
    def _sizes_fill_ranks(self) -> "ModuleConfig":
        twice = sorted(rank for rank, count in Counter(self.ranks).items() if count > 1)
        if twice:
            raise ValueError(f"ranks {twice} are listed twice; every rank holds one position of a module's layout")
        if list(self.ranks) != sorted(self.ranks):
            # torch numbers a process group's ranks in ascending order, whatever order a mesh lists them in.
            raise ValueError(f"ranks {list(self.ranks)} must ascend; write {sorted(self.ranks)}")
        sizes = {axis: getattr(self, axis) for axis in ("pp", "dp", "replicas", "cp", "tp")}
        product = 1
        for size in sizes.values():
            product *= size
        if product != len(self.ranks):
            shown = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1 or axis == "dp")
            raise ValueError(
                f"{shown} = {product} ranks, but `ranks` lists {len(self.ranks)}; change a size or the ranks so that they agree"
            )
        return self
