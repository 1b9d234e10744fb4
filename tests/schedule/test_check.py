"""Good schedules pass; whatever is removed from, doubled in, or moved in one, is caught and named."""

import random
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
from support.schedules import CASES, Case, place

from meshweave.errors import ScheduleError
from meshweave.schedule.actions import COMPUTE, Action, Kind, parse_action
from meshweave.schedule.check import check
from meshweave.schedule.durations import Durations, equal_durations
from meshweave.schedule.generators.one_f_one_b import one_f_one_b
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Schedule
from meshweave.schedule.simulate import simulate


@pytest.mark.parametrize("name", CASES)
def test_every_generated_schedule_passes(name: str) -> None:
    for microbatches in (1, 2, 5, 8):
        case = CASES[name]
        case = replace(case, microbatches=microbatches, macro_batch=min(case.macro_batch, microbatches))
        schedule = case.schedule(equal_durations(case.work(), link=0.1))
        check(schedule)
        assert simulate(schedule, equal_durations(schedule.work, link=0.1)).seconds > 0


def changed(schedule: Schedule, program: int, actions: list[Action]) -> Schedule:
    lists = list(schedule.actions)
    lists[program] = tuple(actions)
    return replace(schedule, actions=tuple(lists))


def positions(schedule: Schedule, count: int) -> Iterator[tuple[int, int]]:
    every = [(program, at) for program, actions in enumerate(schedule.actions) for at in range(len(actions))]
    yield from random.Random(0).sample(every, min(count, len(every)))


@pytest.mark.parametrize("name", CASES)
def test_a_missing_or_doubled_action_is_caught_by_name(name: str) -> None:
    schedule = CASES[name].schedule()
    for program, at in positions(schedule, 25):
        actions = list(schedule.actions[program])
        action = actions[at]
        with pytest.raises(ScheduleError, match=re.escape(f"{action} is missing from the schedule")):
            check(changed(schedule, program, actions[:at] + actions[at + 1 :]))
        with pytest.raises(ScheduleError, match=re.escape(f"{action} stands 2 times in the schedule")):
            check(changed(schedule, program, [*actions[: at + 1], action, *actions[at + 1 :]]))


@pytest.mark.parametrize("name", CASES)
def test_a_computation_moved_before_what_it_needs_is_caught(name: str) -> None:
    schedule = CASES[name].schedule()
    for program, at in positions(schedule, 60):
        actions = list(schedule.actions[program])
        action = actions[at]
        if action.kind in COMPUTE and action.kind != Kind.FORWARD:
            moved = [action, *actions[:at], *actions[at + 1 :]]
            with pytest.raises(ScheduleError, match=re.escape(str(action))):
                check(changed(schedule, program, moved))


@pytest.mark.parametrize("name", CASES)
def test_a_swap_of_neighbours_either_still_runs_or_is_caught(name: str) -> None:
    """The simulator, which never looks at what `check` says, gets stuck or goes wrong in no schedule that passed."""
    schedule = CASES[name].schedule()
    durations = equal_durations(schedule.work)
    caught = 0
    for program, at in positions(schedule, 60):
        actions = list(schedule.actions[program])
        if at + 1 == len(actions):
            continue
        actions[at], actions[at + 1] = actions[at + 1], actions[at]
        mutant = changed(schedule, program, actions)
        try:
            check(mutant)
        except ScheduleError:
            caught += 1
        else:
            simulate(mutant, durations)
    assert caught


def parsed(case: Case, *lists: str) -> Schedule:
    return Schedule(case.work(), tuple(tuple(map(parse_action, text.split())) for text in lists))


def test_a_deadlock_is_shown_as_its_cycle() -> None:
    """Both stages send before they receive: harmless with buffers, a deadlock where sends block."""
    case = Case({"language": place(0, pp=2)}, microbatches=2, macro_batch=2)
    good = case.schedule()
    first, second = (" ".join(map(str, actions)) for actions in good.actions)
    assert "language.0RECV_B0<1 language.0SEND_F1>1" not in first
    bad = first.replace("language.0SEND_F1>1 language.0RECV_B0<1", "language.0RECV_B0<1 language.0SEND_F1>1")
    assert bad != first
    with pytest.raises(ScheduleError, match=r"deadlock: .*waits for .*language\.") as error:
        check(parsed(case, bad, second))
    assert "rank 0 at language.0RECV_B0<1" in str(error.value)
    assert "rank 1 at language.1RECV_F1<0" in str(error.value)


def test_messages_that_overtake_one_another_are_caught() -> None:
    case = Case({"vision": place(0), "language": place(1)}, "graph_1f1b", microbatches=2)
    good = case.schedule()
    language = " ".join(map(str, good.actions[1]))
    swapped = language.replace("X0", "X?").replace("X1", "X0").replace("X?", "X1")
    with pytest.raises(ScheduleError, match=r"rank 1: .* stands before vision.0RECV_X0<0|comes next"):
        check(parsed(case, " ".join(map(str, good.actions[0])), swapped))


def test_the_activation_peak_of_1f1b_is_what_the_budget_bounds() -> None:
    schedule = Case({"language": place(0, pp=4)}, microbatches=8, macro_batch=8).schedule()
    assert [held["language"] for held in check(schedule, {"language": 4})] == [4, 3, 2, 1]
    with pytest.raises(ScheduleError, match=r"rank 0: language holds the activations of 4 .*max_in_flight=3"):
        check(schedule, {"language": 3})


def test_queues_that_contradict_one_another_are_refused() -> None:
    case = Case({"language": place(0, pp=2)}, microbatches=2)
    work = case.work()
    first, second = (one_f_one_b("language", stage, 2, 1 - stage) for stage in (0, 1))
    with pytest.raises(ScheduleError, match="contradicts itself"):
        lower(work, [[[*first[2:], *first[:2]]], [second]], equal_durations(work))


@pytest.mark.parametrize("backward", [True, False], ids=["frozen", "evaluation"])
def test_an_encoder_without_backward_runs_ahead_by_a_bounded_number_of_passes(backward: bool) -> None:
    """Ten times as fast as the language model, it could be done before the first microbatch is; its tokens would pile up."""
    placements = {"vision": place(0), "language": place(1, pp=2)}
    case = Case(placements, "graph_1f1b", 100, backward=backward, frozen=frozenset({"vision"}))
    table = {key: seconds / (10 if key[1] == "vision" else 1) for key, seconds in equal_durations(case.work()).table.items()}
    held = most = 0
    for action in case.schedule(Durations(table)).actions[1]:
        held += action.kind == Kind.RECEIVE_TOKENS
        held -= action.kind == Kind.FORWARD
        most = max(most, held)
    assert 1 < most <= 3
