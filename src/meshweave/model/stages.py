"""Which blocks of a module does each of its pipeline stages hold?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf
from operator import add

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import LayoutError
from meshweave.model.flops import product_flops
from meshweave.model.modules import VISION, ModelGraph, media_widths, module_config
from meshweave.model.parts import Parts, parts_of


@dataclass(frozen=True)
class StageCosts:
    """Relative costs of what a cut divides, by forward FLOPs per token (of an encoder: per patch)."""

    blocks: tuple[float, ...]
    first: float
    """Of what runs before the blocks."""
    last: float
    """Of what runs after them: norm and head, or merger and projector."""


def stage_count(run: RunConfig, name: str) -> int:
    """(Virtual) pipeline stages of a module; virtual stage v lies on pipeline position v % pp."""
    pp = run.modules[name].pp
    return pp * run.schedule.virtual_stages if name == LANGUAGE and run.schedule.language == "interleaved" else pp


def stage_cuts(run: RunConfig, graph: ModelGraph) -> dict[str, tuple[range, ...]]:
    """The blocks of every (virtual) stage of every module of a run.

    Raises:
        LayoutError: a module has too few blocks or cannot be cut, its `layers` do not fit, or a cut would separate what
            deepstack or `vision_feature_layer` needs in one place.
    """
    return {name: _cut_module(run, graph, name) for name in run.modules}


def stage_costs(graph: ModelGraph, name: str, parts: Parts) -> StageCosts:
    """What a cut of one module of a (meta or real) unsharded model balances."""

    def cost(paths: Sequence[str]) -> float:
        return sum(product_flops(graph.model.get_submodule(path)) for path in paths)

    merged = 1
    if name != LANGUAGE:
        # What comes after the blocks runs once for each media token, which may be several patches.
        merged = getattr(module_config(graph.model.config, name), "spatial_merge_size", 1) ** 2
    blocks = [cost([path]) for path in parts.blocks]
    for path, number in parts.taps.items():
        blocks[number] += cost([path]) / merged
    return StageCosts(tuple(blocks), cost([*parts.before, *parts.added, *parts.shaped]), cost(parts.after) / merged)


def cut_blocks(
    costs: Sequence[float],
    stages: int,
    *,
    first_cost: float = 0.0,
    last_cost: float = 0.0,
    first_blocks: int = 1,
    last_blocks: int = 1,
) -> tuple[range, ...]:
    """Cuts blocks into contiguous stages so that the most expensive stage is as cheap as can be.

    Of the cuts that reach this, the most even one (least sum of squared costs), the same on every machine.

    Args:
        costs: of each block.
        first_cost, last_cost: what the first and the last stage bear besides.
        first_blocks, last_blocks: the least number of blocks of the first and of the last stage.

    Raises:
        LayoutError: there are too few blocks.
    """
    count = len(costs)
    sums = list(accumulate(costs, initial=0.0))

    def cost(stage: int, blocks: range) -> float:
        first, last = stage == 0, stage == stages - 1
        if len(blocks) < max(first_blocks if first else 1, last_blocks if last else 1):
            return inf
        return sums[blocks.stop] - sums[blocks.start] + (first_cost if first else 0.0) + (last_cost if last else 0.0)

    bound, _ = _cheapest(count, stages, cost, max)
    if bound == inf:
        raise LayoutError(f"{count} blocks do not make {stages} stages")

    def square(stage: int, blocks: range) -> float:
        value = cost(stage, blocks)
        return value**2 if value <= bound else inf

    return _cheapest(count, stages, square, add)[1]


def _cheapest(
    count: int, stages: int, price: Callable[[int, range], float], combine: Callable[[float, float], float]
) -> tuple[float, tuple[range, ...]]:
    """The cut whose combined price is least, by dynamic programming over stages and the blocks that they end at."""
    # Index: blocks used so far.
    best: list[tuple[float, tuple[range, ...]]] = [(0.0, ()), *((inf, ()) for _ in range(count))]
    for stage in range(stages):
        longer: list[tuple[float, tuple[range, ...]]] = [(inf, ())]
        for end in range(1, count + 1):
            value, start = min((combine(best[start][0], price(stage, range(start, end))), start) for start in range(end))
            longer.append((value, (*best[start][1], range(start, end))))
        best = longer
    return best[count]


def _cut_module(run: RunConfig, graph: ModelGraph, name: str) -> tuple[range, ...]:
    stages, layers = stage_count(run, name), run.modules[name].layers
    if layers is not None:
        _check_layers(run, name, layers, stages, len(graph.blocks(name)))
    if stages == 1:
        return (range(len(graph.blocks(name))),)
    parts = parts_of(graph, name)
    count = len(parts.blocks)
    if stages > count:
        raise LayoutError(f"{_cut_text(run, name)}: more stages than the module's {count} blocks; use at most {count}")
    first, last = _least_blocks(graph, name, count)
    if layers is not None:
        cut = tuple(range(start, stop) for start, stop in pairwise(accumulate(layers, initial=0)))
    elif first + last + stages - 2 <= count:
        costs = stage_costs(graph, name, parts)
        cut = cut_blocks(costs.blocks, stages, first_cost=costs.first, last_cost=costs.last, first_blocks=first, last_blocks=last)
    else:
        cut = ()
    if first > (len(cut[0]) if cut else 1):
        raise LayoutError(
            f"{_cut_text(run, name)}: deepstack features are added to the outputs of the first {first} of {count} blocks, which "
            f"must all lie on the first stage; {_fix(layers, 'first', first, count)}"
        )
    if last > (len(cut[-1]) if cut else 1):
        raise LayoutError(
            f"{_cut_text(run, name)}: vision_feature_layer={graph.model.config.vision_feature_layer} selects the input of block "
            f"{count - last} of {count}, so the last stage must hold the last {last} blocks; {_fix(layers, 'last', last, count)}"
        )
    return cut


def _check_layers(run: RunConfig, name: str, layers: tuple[int, ...], stages: int, count: int) -> None:
    if len(layers) != stages:
        raise LayoutError(
            f"modules.{name}.layers={list(layers)}: {len(layers)} numbers for the {stages} stages of {_cut_text(run, name)}; "
            "give one number a stage"
        )
    if sum(layers) != count:
        raise LayoutError(
            f"modules.{name}.layers={list(layers)}: these add up to {sum(layers)}, but the module has {count} blocks; "
            "make the sum agree"
        )


def _cut_text(run: RunConfig, name: str) -> str:
    text = f"modules.{name}.pp={run.modules[name].pp}"
    virtual = stage_count(run, name) // run.modules[name].pp
    return text if virtual == 1 else f"{text} × schedule.virtual_stages={virtual}"


def _fix(layers: tuple[int, ...] | None, end: str, least: int, count: int) -> str:
    if layers is not None:
        return f"make the {end} entry of layers={list(layers)} at least {least}"
    return f"use at most {count - least + 1} stages"


def _least_blocks(graph: ModelGraph, name: str, count: int) -> tuple[int, int]:
    """The least number of blocks of the first and of the last stage."""
    config = graph.model.config
    if name == LANGUAGE:
        widths = media_widths(config).values()  # the embedding, then what is added to the output of one block each
        return max(1, *(len(each) - 1 for each in widths)), 1
    selected = getattr(config, "vision_feature_layer", None) if name == VISION else None
    if selected is None:
        return 1, 1
    # Hidden state i is what block i takes in; the last one is the output of the last block.
    states = [state % (count + 1) for state in ([selected] if isinstance(selected, int) else selected)]
    return 1, max(1, count - min(states))
