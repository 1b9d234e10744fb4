"""Which process groups does context-parallel attention need? Of cp ranks, u trade heads for rows, and cp / u of these sets
form rings: the rank with index c along cp has index c % u in its Ulysses group and c // u in its ring."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeAlias

import torch.distributed as dist

ContextKind: TypeAlias = Literal["ring", "ulysses"]


@dataclass(frozen=True)
class ContextGroups:
    """This rank's place in the context parallelism of its lane."""

    kind: ContextKind
    cp: int
    index: int
    """Of this rank along cp."""
    ulysses: Mapping[int, dist.ProcessGroup]
    """By u, above 1 only: the ranks to trade heads with."""
    ring: Mapping[int, dist.ProcessGroup]
    """By u, below cp only: the participants of the ring."""


def ulysses_size(kind: ContextKind, cp: int, kv_heads: int) -> int:
    """How many ranks trade heads: "ring" 1, "ulysses" the most that divide both cp and the key-value heads that a rank has."""
    return 1 if kind == "ring" else max(u for u in range(1, cp + 1) if cp % u == 0 and kv_heads % u == 0)


def context_groups(
    kind: ContextKind,
    lanes: Sequence[Sequence[int]],
    kv_heads: Iterable[int],
    rank: int,
    timeout: timedelta | None = None,
) -> ContextGroups | None:
    """Makes the process groups; every rank of the world must call it with the same arguments (but `rank`), in the same order.

    Args:
        lanes: every set of ranks that share sequences (all lanes, stages and tp indices), each in the order of cp, ascending,
            all of one size.
        timeout: how long a rank waits in one of them; torch's own where left out.
        kv_heads: the numbers of key-value heads that a rank may have in a layer, after tensor parallelism.

    Returns None on a rank that is in no lane. On NCCL the world must have been initialised with `device_id`, which connects every
    group at once: the first messages of a ring need not involve all of its participants.
    """
    mine = None
    for ranks in lanes:
        cp = len(ranks)
        ulysses: dict[int, dist.ProcessGroup] = {}
        ring: dict[int, dist.ProcessGroup] = {}
        for u in sorted({ulysses_size(kind, cp, heads) for heads in kv_heads}):
            sets = [ranks[first : first + u] for first in range(0, cp, u)]
            for found, members in ((ulysses, sets), (ring, [ranks[offset::u] for offset in range(u)])):
                for each in members:
                    if len(each) > 1:
                        group = dist.new_group(list(each), timeout=timeout)
                        if rank in each:
                            found[u] = group
        if rank in ranks:
            mine = ContextGroups(kind, cp, list(ranks).index(rank), ulysses, ring)
    return mine
