"""Which sub-module of a module belongs to which of its blocks? What a pipeline cut divides."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from meshweave.model.families import cut_plan
from meshweave.model.modules import ModelGraph


@dataclass(frozen=True)
class Parts:
    """The sub-modules of one module with parameters, by full name."""

    blocks: tuple[str, ...]
    before: tuple[str, ...]
    """What runs before the blocks; their output is the hidden state."""
    added: tuple[str, ...]
    """What runs before the blocks; their output is added to the hidden state."""
    shaped: tuple[str, ...]
    """What runs before these; later stages need the shape of its output alone."""
    taps: Mapping[str, int]
    """What turns the output of a block into a further feature, and the number of that block; in the order of the features."""
    tupled: bool
    """Whether a block returns the hidden state as the first of a tuple."""
    after: tuple[str, ...]
    """Everything else: what runs after the blocks."""

    def owners(self) -> dict[str, int]:
        """Full name of each part to the number of the block on whose stage it lies."""
        return (
            {name: number for number, name in enumerate(self.blocks)}
            | dict.fromkeys((*self.before, *self.added, *self.shaped), 0)
            | dict(self.taps)
            | dict.fromkeys(self.after, len(self.blocks) - 1)
        )


def parts_of(graph: ModelGraph, name: str) -> Parts:
    """The parts of one module.

    Raises:
        LayoutError: it is not known where the module may be cut.
    """
    child, plan = cut_plan(graph, name)
    model = graph.model.get_submodule(child)
    blocks = tuple(f"{child}.{plan.blocks}.{number}" for number, _ in enumerate(model.get_submodule(plan.blocks).children()))
    before, added, shaped = (tuple(f"{child}.{key}" for key in keys) for keys in (plan.before, plan.added, plan.shaped))
    tapped = getattr(model.config, plan.tapped) if plan.tapped else ()
    numbers = sorted(range(len(tapped)), key=lambda number: tapped[number])
    taps = {f"{child}.{plan.taps}.{number}": tapped[number] for number in numbers}
    known = {*blocks, *before, *added, *shaped, *taps}
    after = tuple(rest for path, module in graph.of_module(name).items() for rest in _rest(path, module, known))
    return Parts(blocks, before, added, shaped, taps, plan.tupled, after)


def _rest(path: str, module: nn.Module, known: set[str]) -> Iterator[str]:
    """The largest sub-modules with parameters that neither are nor hold a known one."""
    if path in known or next(module.parameters(), None) is None:
        return
    if any(name.startswith(f"{path}.") for name in known):
        for key, child in module.named_children():
            yield from _rest(f"{path}.{key}", child, known)
    else:
        yield path
