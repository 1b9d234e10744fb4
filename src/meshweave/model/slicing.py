"""How are the language model's sequences cut, and what does one rank hold of its lane's?"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.model.masks import masks_of
from meshweave.model.modules import VISION
from meshweave.sequence.grid import UNCUT, LaneGrid, SequenceRule


def sequence_rule(run: RunConfig, config: PreTrainedConfig) -> SequenceRule:
    """How a run lays out and cuts its sequences.

    Raises:
        LayoutError: they are packed or cut, and the model has a layer that cannot work on that.
    """
    language = run.modules[LANGUAGE]
    if not run.packed:
        return UNCUT
    tp = language.tp if language.sequence_parallel else 1
    masks = masks_of(config.get_text_config())
    two_way = VISION if any(mask.two_way for mask in masks) else None
    return SequenceRule(True, language.cp, tp, masks, two_way)


@dataclass(frozen=True)
class LanePart:
    """What one rank holds of its lane's sequences, and who holds the rest."""

    rule: SequenceRule = UNCUT
    cp: int = 0
    """Its index among the ranks that share a sequence."""
    tp: int = 0
    """Its index among those that hold slices of one `cp` rank's part."""
    cp_groups: tuple[dist.ProcessGroup, ...] = ()
    """Groups that together make the ranks that share a sequence."""
    tp_group: dist.ProcessGroup | None = None
    """Ranks that share one layer's matrices, if there are several."""

    def held(self, grid: LaneGrid) -> Tensor:
        """[columns] int64: those of its `cp` part, which attention and position ids are about."""
        return torch.cat([torch.arange(start, stop) for start, stop in grid.parts[self.cp].tolist()])

    def own(self, grid: LaneGrid) -> Tensor:
        """[columns] int64: those that it embeds, and holds between blocks."""
        return self.held(grid).chunk(self.rule.tp)[self.tp]

    def own_length(self, grid: LaneGrid) -> int:
        """Columns that it holds between blocks."""
        return grid.part_length // self.rule.tp


WHOLE_LANE = LanePart()
"""All of it."""
