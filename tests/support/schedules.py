"""Which schedules do tests look at? Small works in every placement, and how to make them."""

from dataclasses import dataclass, field

from meshweave.layout import Layout, Placement
from meshweave.schedule.durations import Durations, equal_durations
from meshweave.schedule.generators.graph_1f1b import graph_1f1b, run_ahead
from meshweave.schedule.generators.nested import nested
from meshweave.schedule.generators.three_phase import three_phase
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.work import ModuleWork, StepWork, plan_work


def place(first: int, **sizes: int) -> Placement:
    layout = Layout(**sizes)
    return Placement(layout, tuple(range(first, first + layout.size)))


@dataclass(frozen=True)
class Case:
    """Placements, and what the modules' work looks like."""

    placements: dict[str, Placement]
    encoders: str = "three_phase"
    microbatches: int = 4
    macro_batch: int = 1
    pieces: int = 1
    split: bool = False
    backward: bool = True
    together: bool = False
    frozen: frozenset[str] = field(default_factory=frozenset)

    @property
    def pipeline(self) -> int:
        return self.placements["language"].layout.pp

    def work(self) -> StepWork:
        modules = {}
        for name, placement in self.placements.items():
            pp = placement.layout.pp
            if name == "language":
                split = self.split and self.backward
                modules[name] = ModuleWork(name, pp * self.pieces, backward=self.backward, split=split, together=self.together)
            else:
                per_pass = self.macro_batch if pp == 1 else 1
                modules[name] = ModuleWork(name, pp, per_pass, backward=self.backward and name not in self.frozen)
        return plan_work(self.placements, modules, self.microbatches)

    def schedule(self, durations: Durations | None = None) -> Schedule:
        work = self.work()
        durations = durations or equal_durations(work)
        if self.encoders == "three_phase":
            return lower(work, [[order] for order in three_phase(work, self.pipeline, self.macro_batch)], durations)
        if self.encoders == "graph_1f1b":
            return lower(work, graph_1f1b(work, self.pipeline), durations, ahead=run_ahead(work, self.pipeline))
        queues, shares = nested(work, self.pipeline, durations)
        return lower(work, queues, durations, shares)


CASES = {
    "experts, vision on one rank of a stage": Case(
        {"vision": place(1), "language": place(0, pp=2, dp=2)}, "graph_1f1b", together=True
    ),
    "experts, vision across stages, nested": Case(
        {"vision": place(1, dp=2), "language": place(0, pp=2, dp=2)}, "nested", split=True, together=True
    ),
    "plain": Case({"vision": place(0, dp=4), "language": place(0, tp=2, dp=2)}),
    "colocated pp4, k 1": Case({"vision": place(0, dp=4), "language": place(0, pp=4)}),
    "colocated pp4, k 2": Case({"vision": place(0, dp=4), "language": place(0, pp=4)}, macro_batch=2),
    "colocated pp4, all": Case({"vision": place(0, dp=4), "language": place(0, pp=4)}, macro_batch=4),
    "colocated pp2 dp2, vision tp2 across stages": Case(
        {"vision": Placement(Layout(tp=2, dp=2), (0, 1, 2, 3)), "language": place(0, pp=2, dp=2)}, macro_batch=2
    ),
    "colocated pp2, vision tp over both stages": Case({"vision": place(0, tp=2), "language": place(0, pp=2)}),
    "colocated, vision a pipeline": Case({"vision": place(0, pp=2), "language": place(0, pp=2)}, macro_batch=2),
    "interleaved": Case({"vision": place(0, dp=2), "language": place(0, pp=2)}, pieces=2, macro_batch=4),
    "zero bubble": Case({"vision": place(0, dp=4), "language": place(0, pp=4)}, split=True, macro_batch=4),
    "non-colocated": Case({"vision": place(0, dp=3), "language": place(3, pp=2)}, "graph_1f1b"),
    "non-colocated pipelines": Case(
        {"vision": place(4, pp=2, dp=2, tp=2), "language": place(0, pp=2, tp=2)}, "graph_1f1b", microbatches=5
    ),
    "macro-batches into a pipeline": Case(
        {"vision": place(0, dp=2), "language": place(2, pp=3)}, "graph_1f1b", microbatches=7, macro_batch=3
    ),
    "two encoders, one overlapping": Case(
        {"vision": place(0, pp=2), "audio": place(3), "language": place(2, pp=2)}, "graph_1f1b", microbatches=5
    ),
    "non-colocated interleaved": Case({"vision": place(0, dp=2), "language": place(2, pp=2)}, "graph_1f1b", pieces=2),
    "non-colocated zero bubble": Case({"vision": place(0), "language": place(1, pp=3)}, "graph_1f1b", split=True),
    "frozen vision": Case(
        {"vision": place(0, dp=2), "language": place(2, pp=2)}, "graph_1f1b", frozen=frozenset({"vision"}), microbatches=8
    ),
    "evaluation": Case({"vision": place(0, dp=2), "language": place(2, pp=2)}, "graph_1f1b", backward=False),
    "nested": Case({"vision": place(0, dp=4), "language": place(0, pp=4)}, "nested", microbatches=8),
    "nested, vision tp across stages": Case({"vision": place(0, tp=2, dp=2), "language": place(0, pp=4)}, "nested"),
    "nested zero bubble": Case({"vision": place(0, dp=4), "language": place(0, pp=4)}, "nested", split=True),
}
