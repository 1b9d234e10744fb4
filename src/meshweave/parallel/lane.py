"""With whom does this rank share a lane's sequence, or the patches of a pass? Makes the process groups for it."""

from datetime import timedelta

from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.layout import Placement
from meshweave.model.masks import kv_head_counts
from meshweave.model.slicing import LanePart
from meshweave.parallel.context import ContextGroups, context_groups
from meshweave.parallel.mesh import axis_mesh
from meshweave.sequence.grid import SequenceRule


def build_context(run: RunConfig, config: PreTrainedConfig, name: str, placement: Placement, rank: int) -> ContextGroups | None:
    """With whom this rank attends in one module; None where it does alone, or is not of the module.

    Every rank of the world must call it, for the same modules in the same order: it makes process groups.
    """
    layout = placement.layout
    if layout.cp == 1:
        return None
    lanes = list(dict.fromkeys(placement.group(member, "cp") for member in placement.ranks))
    timeout = timedelta(seconds=run.timeout_seconds)
    if name != LANGUAGE:
        return context_groups("ulysses", lanes, [layout.cp], rank, timeout)  # the heads are as many that each rank gets some
    heads = [count // layout.tp for count in kv_head_counts(config.get_text_config())]
    return context_groups(run.modules[name].context_parallel, lanes, heads, rank, timeout)


def lane_part(rule: SequenceRule, placement: Placement, mesh: DeviceMesh, groups: ContextGroups | None, rank: int) -> LanePart:
    """What this rank holds of its language-model lane's sequences; of no lane, `rule` alone.

    Args:
        placement, mesh, groups: those of the language model.
    """
    coordinate = placement.coordinate(rank)
    if coordinate is None:
        return LanePart(rule)
    u = min({**groups.ulysses, **groups.ring}) if groups is not None else 1
    found = [group[u] for group in (groups.ulysses, groups.ring) if u in group] if groups is not None else []
    tp = axis_mesh(mesh, "tp")
    own = coordinate["tp"] if rule.tp > 1 else 0
    return LanePart(rule, coordinate["cp"], own, tuple(found), tp.get_group() if tp is not None else None)
