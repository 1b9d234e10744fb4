"""What does a rank's attention need to know of one microbatch? The sequence, who holds what, and the tiles of each mask."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from meshweave.errors import LayoutError
from meshweave.parallel.context.groups import ContextGroups, ulysses_size
from meshweave.parallel.context.kernels import bias_of
from meshweave.parallel.context.ring import ReadyTile, Ring
from meshweave.sequence import Kind, LaneSequence, Mask, Sight, Tile, ring_part, sight
from meshweave.sequence.lane import Array
from meshweave.sequence.tiles import rows_of

Made = TypeVar("Made")


class SequencePlan:
    """How the ranks of one lane attend in one microbatch; give it to the model's forward as `sequence=`.

    State: what the layers asked for so far (tiles, index tensors), made once and kept. No dataclass, mapping or sequence, so
    that whoever walks through a forward's arguments leaves it alone.
    """

    def __init__(
        self, sequence: LaneSequence, cut: Sequence[Array], masks: Iterable[Mask], groups: ContextGroups | None = None
    ) -> None:
        """
        Args:
            cut: per index along cp, the positions it holds: `[intervals, 2]`, ascending, equally many for each.
            masks: those of the model's layers, repeated or not.
            groups: None for cp 1, where one rank holds all.

        Raises LayoutError: the cut is not one for cp ranks, or two masks differ by `two_way` only.
        """
        cp = groups.cp if groups else 1
        counts = {int((held[:, 1] - held[:, 0]).sum()) for held in cut}
        if len(cut) != cp or len(counts) != 1:
            raise LayoutError(
                f"a sequence cut into {len(cut)} parts of {sorted(counts)} positions, for cp={cp}: give each as many"
            )
        self.rows = counts.pop()
        """Positions that each rank holds."""
        self._index = groups.index if groups else 0
        self._groups, self._sequence, self._cut = groups, sequence, tuple(cut)
        self._masks: dict[int | None, Mask] = {}
        for mask in masks:
            if self._masks.setdefault(mask.window, mask) != mask:
                raise LayoutError(f"layers with window {mask.window} differ in two_way: a layer's window must tell its mask")
        self._made: dict[Any, Any] = {}

    @property
    def held(self) -> Array:
        """`[intervals, 2]`: the positions that this rank holds, in the order of its rows."""
        return self._cut[self._index]

    def mask(self, window: int | None) -> Mask:
        """The mask of the layers with this sliding window.

        Raises LayoutError: no layer has it.
        """
        if window not in self._masks:
            known = ", ".join(str(each) for each in self._masks)
            raise LayoutError(f"a layer asks for sliding_window={window}, but the masks planned for have windows {known}")
        return self._masks[window]

    def ulysses_size(self, kv_heads: int) -> int:
        """With how many ranks a layer of so many key-value heads trades heads for rows."""
        return ulysses_size(self._groups.kind, self._groups.cp, kv_heads) if self._groups else 1

    def ulysses(self, u: int, device: torch.device) -> tuple[Tensor, Tensor, Any]:
        """For u > 1: the order that brings the rows of the Ulysses group into that of their positions, its inverse, the group."""

        def make() -> tuple[Tensor, Tensor, Any]:
            assert self._groups is not None
            order = np.argsort(np.concatenate([rows_of(held) for held in self._of_ulysses(self._index // u, u)]))
            back = np.argsort(order)
            return torch.from_numpy(order).to(device), torch.from_numpy(back).to(device), self._groups.ulysses[u]

        return self._once(("ulysses", u, device), make)

    def ring(self, mask: Mask, u: int, device: torch.device, dtype: torch.dtype) -> Ring:
        """This rank's part in the ring, between sets of u ranks."""

        def make() -> Ring:
            participants = range(len(self._cut) // u)
            held = [_united(self._of_ulysses(index, u)) for index in participants]
            me, view = self._index // u, self._once(("sight", mask), lambda: sight(self._sequence, mask))
            part = ring_part(view, held, me)
            mine = rows_of(held[me])
            tiles = []
            for visit, its in zip(part.visits, held, strict=True):
                keys = rows_of(its)[rows_of(visit.keys)]
                tiles.append([self._tile(tile, view, mine, keys, device, dtype) for tile in visit.tiles])
            lent = [torch.from_numpy(rows_of(rows)).to(device) for rows in part.lent]
            group = self._groups.ring[u] if self._groups and len(participants) > 1 else None
            return Ring(group, me, tiles, [visit.rows for visit in part.visits], lent)

        return self._once(("ring", mask, u, device, dtype), make)

    def _of_ulysses(self, ring_index: int, u: int) -> tuple[Array, ...]:
        return self._cut[ring_index * u : (ring_index + 1) * u]

    def _tile(self, tile: Tile, view: Sight, queries: Array, keys: Array, device: torch.device, dtype: torch.dtype) -> ReadyTile:
        query, key = slice(*tile.query), slice(*tile.keys)
        bias = None
        if tile.kind is Kind.PARTIAL:
            seen = view.seen(queries[query], keys[key])
            # Most tiles along the edge of a window, and those of documents of one length, are alike.
            alike = ("bias", seen.shape, np.packbits(seen).tobytes(), device, dtype)
            bias = self._once(alike, lambda: bias_of(torch.from_numpy(seen), dtype, device))
        return ReadyTile(query, key, tile.kind is Kind.CAUSAL, bias)

    def _once(self, key: Any, make: Callable[[], Made]) -> Made:
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made


def _united(parts: Sequence[Array]) -> Array:
    joined = np.concatenate(list(parts))
    return joined[np.argsort(joined[:, 0], kind="stable")]
