"""Ranks share a program exactly if they do the same with ranks that do the same."""

from support.schedules import place

from meshweave.layout import Layout, Placement
from meshweave.schedule.work import ModuleWork, plan_work


def modules(*names: str, **stages: int) -> dict[str, ModuleWork]:
    return {name: ModuleWork(name, stages.get(name, 1)) for name in names}


def test_a_homogeneous_run_is_one_program() -> None:
    work = plan_work({"vision": place(0, dp=8), "language": place(0, tp=2, dp=4)}, modules("vision", "language"), 4)
    assert [program.ranks for program in work.programs] == [tuple(range(8))]
    assert work.gangs["vision", 0] == (0,)


def test_stages_are_programs_and_know_their_neighbours() -> None:
    work = plan_work({"vision": place(0, dp=6), "language": place(0, pp=3, dp=2)}, modules("vision", "language", language=3), 4)
    assert [program.ranks for program in work.programs] == [(0, 1), (2, 3), (4, 5)]
    assert [work.neighbours["language", program] for program in range(3)] == [(2, 1), (0, 2), (1, 0)]
    assert work.holders("language", 1) == (1,)
    assert work.holders("vision", 0) == (0, 1, 2)
    assert work.program_of(3) == 1
    assert work.program_of(9) is None


def test_virtual_stages_lie_round_the_pipeline() -> None:
    work = plan_work({"language": place(0, pp=2)}, modules("language", language=6), 4)
    assert [program.stages["language"] for program in work.programs] == [(0, 2, 4), (1, 3, 5)]


def test_an_encoder_on_half_a_stage_splits_the_stage_and_its_neighbours() -> None:
    """Ranks 1 and 3 exchange activations with 0 and 2, of which 2 encodes audio besides: four kinds of rank."""
    placements = {"audio": place(2), "language": Placement(Layout(pp=2, dp=2), (0, 2, 1, 3))}
    work = plan_work(placements, modules("audio", "language", language=2), 2)
    assert sorted(program.ranks for program in work.programs) == [(0,), (1,), (2,), (3,)]
    ahead = {
        program.ranks[0]: work.programs[work.neighbours["language", number][1]].ranks[0]
        for number, program in enumerate(work.programs)
    }
    assert (ahead[0], ahead[2]) == (1, 3)


def test_lanes_across_programs_are_gangs() -> None:
    work = plan_work({"vision": place(0, tp=2, dp=2), "language": place(0, pp=4)}, modules("vision", "language", language=4), 2)
    assert [work.gangs["vision", program] for program in range(4)] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [work.gangs["language", program] for program in range(4)] == [(0,), (1,), (2,), (3,)]


def test_lanes_that_share_experts_are_gangs_whatever_else_their_ranks_do() -> None:
    placements = {"vision": place(0), "language": place(0, pp=2, dp=2)}
    work = plan_work(placements, modules("vision") | {"language": ModuleWork("language", 2, together=True)}, 2)
    by_rank = {rank: work.gangs["language", number] for number, program in enumerate(work.programs) for rank in program.ranks}
    assert len(work.programs) == 4
    assert by_rank[0] == by_rank[1] != by_rank[2] == by_rank[3]


def test_passes_serve_consecutive_microbatches() -> None:
    module = ModuleWork("vision", per_pass=3)
    assert module.passes(7) == 3
    assert [list(module.served(number, 7)) for number in range(3)] == [[0, 1, 2], [3, 4, 5], [6]]
