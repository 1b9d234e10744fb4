"""What has to be done in a step, and by whom? Modules in stages and passes; ranks that do the same, as programs."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from meshweave.config import LANGUAGE
from meshweave.layout import Placement


@dataclass(frozen=True)
class ModuleWork:
    """One module, as a schedule sees it."""

    name: str
    stages: int = 1
    """Virtual stages; stage v lies on pipeline position v % pp."""
    per_pass: int = 1
    """Language-model microbatches that one pass serves (a macro-batch); 1 for the language model."""
    backward: bool = True
    """Whether gradients flow through it: not in an evaluation, and not through a frozen encoder."""
    split: bool = False
    """Whether its backward comes in two halves, of the input and of the weights."""
    together: bool = False
    """Whether all ranks of a stage must work a pass together, because its computations hold collectives over lanes (experts)."""

    def passes(self, microbatches: int) -> int:
        """Passes of a step of so many language-model microbatches."""
        return -(-microbatches // self.per_pass)

    def served(self, number: int, microbatches: int) -> range:
        """Language-model microbatches that a pass serves."""
        return range(number * self.per_pass, min((number + 1) * self.per_pass, microbatches))


@dataclass(frozen=True)
class Program:
    """Ranks that run the same list of actions."""

    ranks: tuple[int, ...]
    stages: Mapping[str, tuple[int, ...]]
    """Module to its virtual stages here."""


@dataclass(frozen=True)
class StepWork:
    """One step's work and who does it; the rest of the schedule is about when."""

    modules: Mapping[str, ModuleWork]
    """The language model and the encoders."""
    microbatches: int
    """Of the language model."""
    programs: tuple[Program, ...]
    neighbours: Mapping[tuple[str, int], tuple[int, int]]
    """(module, program) to the programs at the pipeline positions before and after it, ends joined."""
    gangs: Mapping[tuple[str, int], tuple[int, ...]]
    """(module, program) to the programs that work together, itself included: they share lanes or experts or, of a language model
    without a pipeline, gather parameters block by block."""

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the modules other than the language model."""
        return tuple(name for name in self.modules if name != LANGUAGE)

    @cached_property
    def _holders(self) -> dict[tuple[str, int], tuple[int, ...]]:
        found: dict[tuple[str, int], list[int]] = {}
        for number, program in enumerate(self.programs):
            for name, stages in program.stages.items():
                for stage in stages:
                    found.setdefault((name, stage), []).append(number)
        return {key: tuple(programs) for key, programs in found.items()}

    def holders(self, module: str, stage: int) -> tuple[int, ...]:
        """Programs that hold a (virtual) stage of a module."""
        return self._holders[module, stage]

    def last(self, module: str) -> int:
        """Number of the module's last stage."""
        return self.modules[module].stages - 1

    def program_of(self, rank: int) -> int | None:
        """The program of a rank; None for an idle one."""
        return self._program_by_rank.get(rank)

    @cached_property
    def _program_by_rank(self) -> dict[int, int]:
        return {rank: number for number, program in enumerate(self.programs) for rank in program.ranks}


def plan_work(placements: Mapping[str, Placement], modules: Mapping[str, ModuleWork], microbatches: int) -> StepWork:
    """Groups ranks into programs and says how these depend on one another.

    Two ranks share a program if they hold the same stages and so do, throughout, the ranks they exchange activations with.
    `modules` must name every placed module; a module's stages are a multiple of its placement's `pp`.
    """
    ranks = sorted({rank for placement in placements.values() for rank in placement.ranks})
    kinds = _refine(placements, ranks)
    members: dict[int, list[int]] = {}
    for rank in ranks:
        members.setdefault(kinds[rank], []).append(rank)
    number_of = {kind: number for number, kind in enumerate(members)}
    program_of = {rank: number_of[kinds[rank]] for rank in ranks}
    programs, neighbours = [], {}
    for number, its in enumerate(members.values()):
        stages = {}
        for name, placement in placements.items():
            if its[0] not in placement:
                continue
            position = _position(placement, its[0])
            stages[name] = tuple(range(position, modules[name].stages, placement.layout.pp))
            before, after = _pipeline_neighbours(placement, its[0])
            neighbours[name, number] = program_of[before], program_of[after]
        programs.append(Program(tuple(its), stages))
    gangs = _gangs(placements, modules, program_of)
    if LANGUAGE in placements and placements[LANGUAGE].layout.pp == 1:
        everyone = tuple(number for number, program in enumerate(programs) if LANGUAGE in program.stages)
        gangs |= {(LANGUAGE, number): everyone for number in everyone}
    return StepWork(modules, microbatches, tuple(programs), neighbours, gangs)


def _position(placement: Placement, rank: int) -> int:
    coordinate = placement.coordinate(rank)
    assert coordinate is not None
    return coordinate["pp"]


def _pipeline_neighbours(placement: Placement, rank: int) -> tuple[int, int]:
    pipeline = placement.group(rank, "pp")
    at = pipeline.index(rank)
    return pipeline[at - 1], pipeline[(at + 1) % len(pipeline)]


def _refine(placements: Mapping[str, Placement], ranks: list[int]) -> dict[int, int]:
    """Rank to the number of its kind: the coarsest partition in which kinds also agree on the kinds of their neighbours."""
    around = {
        rank: tuple(
            (name, _position(placement, rank), _pipeline_neighbours(placement, rank))
            for name, placement in placements.items()
            if rank in placement
        )
        for rank in ranks
    }
    keys: dict[int, object] = {rank: tuple((name, stage) for name, stage, _ in around[rank]) for rank in ranks}
    kinds: dict[int, int] = {}
    while True:
        numbers: dict[object, int] = {}
        refined = {rank: numbers.setdefault(keys[rank], len(numbers)) for rank in ranks}
        if len(set(refined.values())) == len(set(kinds.values())):
            return refined
        kinds = refined
        keys = {rank: (kinds[rank], tuple((kinds[a], kinds[b]) for _, _, (a, b) in around[rank])) for rank in ranks}


def _gangs(
    placements: Mapping[str, Placement], modules: Mapping[str, ModuleWork], program_of: Mapping[int, int]
) -> dict[tuple[str, int], tuple[int, ...]]:
    gangs: dict[tuple[str, int], tuple[int, ...]] = {}
    for name, placement in placements.items():
        for stage in range(placement.layout.pp):
            groups: list[set[int]] = []
            lanes = placement.lanes(stage)
            coupled = (tuple(rank for lane in lanes for rank in lane),) if modules[name].together else lanes
            for lane in {tuple(sorted({program_of[rank] for rank in lane})) for lane in coupled}:
                joined = set(lane)
                apart = []
                for group in groups:
                    if group & joined:
                        joined |= group
                    else:
                        apart.append(group)
                groups = [*apart, joined]
            gangs |= {(name, program): tuple(sorted(group)) for group in groups for program in group}
    return gangs
