"""How are the language model's sequences cut, and what does one rank hold of its lane's?"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, ModuleConfig, RunConfig
from meshweave.errors import LayoutError
from meshweave.model.families import patch_plan, sliceable, tensor_plans
from meshweave.model.families.plan import SEQUENCE_STYLES, of_experts
from meshweave.model.masks import masks_of
from meshweave.model.modules import VISION, ModelGraph
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


def sequence_faults(run: RunConfig, graph: ModelGraph) -> list[str]:
    """What is wrong with how a run cuts sequences, or shares out the patches of encoders."""
    faults = []
    for name, module in run.modules.items():
        if name not in graph.children:
            continue
        faults += _language_faults(run, graph) if name == LANGUAGE else _encoder_faults(name, module, graph)
    return faults


def _language_faults(run: RunConfig, graph: ModelGraph) -> list[str]:
    module, text = run.modules[LANGUAGE], graph.model.config.get_text_config()
    faults = []
    if module.replicas > 1:
        faults.append(f"modules.language.replicas={module.replicas}: only encoders may repeat their work; set it to 1")
    if module.context_parallel != "ring" and module.cp == 1:
        faults.append(f"modules.language.context_parallel={module.context_parallel}: cp is 1, so nothing reads this; take it out")
    sliced = module.tp > 1 and module.sequence_parallel
    if not run.packed:
        return faults
    asks = f"modules.language.cp={module.cp}" if module.cp > 1 else "train.pack=true"
    fix = "set it to 1" if module.cp > 1 else "set it to false"
    if sliced and module.cp == 1:
        asks, fix = f"modules.language.tp={module.tp}", "set modules.language.sequence_parallel to false"
    try:
        masks_of(text)
    except LayoutError as error:
        faults.append(f"{asks}: {sliceable(text) or error}; {fix}")
    if dropout := getattr(text, "attention_dropout", 0.0):
        faults.append(
            f"{asks}: attention_dropout={dropout} of {text.model_type}: dropout over a cut sequence is not built; set it to 0"
        )
    for child, plan in tensor_plans(graph, LANGUAGE).items() if sliced else ():
        for pattern, style in plan.rules.items():
            if style not in SEQUENCE_STYLES and not of_experts(pattern, style):
                faults.append(
                    f"modules.language.tp={module.tp}: the tensor-parallel plan of {child} has style {style!r} for {pattern!r}, "
                    "which is not built for a sequence that is cut; set modules.language.sequence_parallel to false"
                )
    return faults


def _encoder_faults(name: str, module: ModuleConfig, graph: ModelGraph) -> list[str]:
    faults = [
        f"modules.{name}.{key}: only the language model reads this; take it out"
        for key in sorted({"sequence_parallel", "context_parallel"} & module.model_fields_set)
    ]
    if module.cp == 1:
        return faults
    try:
        child, _ = patch_plan(graph, name)
    except LayoutError as error:
        return [*faults, str(error)]
    tower: Any = graph.model.get_submodule(child)
    heads = tower.config.num_heads
    if module.pp > 1:
        faults.append(
            f"modules.{name}: cp={module.cp} × pp={module.pp}: patches are shared out over one stage; set one of them to 1"
        )
    if heads % (module.cp * module.tp):
        faults.append(
            f"modules.{name}: cp={module.cp} × tp={module.tp} does not divide the {heads} attention heads of the encoder; use a "
            "divisor"
        )
    return faults


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
