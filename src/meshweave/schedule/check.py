"""Can a schedule run? Proven on the list itself, whatever made it, before anything starts.

Semantics are the hardest a backend may have: a send blocks until its receive is reached (rendezvous), a swap until every rank of
the program is there, a computation of a gang until all its members are. What runs under these, runs under any buffering.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping

from meshweave.errors import ScheduleError
from meshweave.layout import format_ranks
from meshweave.schedule.actions import COMPUTE, Action, Kind
from meshweave.schedule.schedule import Schedule, emits, kinds_of, needs, tasks

Peaks = tuple[Mapping[str, int], ...]
"""Program → module → most microbatches (of an encoder: of the language model's, too) whose activations it holds at once."""


def check(schedule: Schedule, budget: Mapping[str, int] | None = None) -> Peaks:
    """Proves that a schedule does every action once, nothing before what it needs, and cannot deadlock.

    Args:
        budget: module to the most microbatches whose activations one of its ranks may hold at once.

    Raises:
        ScheduleError: naming ranks and action, and for a deadlock the cycle.
    """
    _check_actions(schedule)
    for program in range(len(schedule.actions)):
        _check_order(schedule, program)
    _check_channels(schedule)
    _check_rendezvous(schedule)
    peaks = activation_peaks(schedule)
    for program, held in enumerate(peaks):
        for module, count in held.items():
            if budget and count > budget.get(module, count):
                raise ScheduleError(
                    f"{_who(schedule, program)}: {module} holds the activations of {count} microbatches at once, "
                    f"modules.{module}.max_in_flight={budget[module]} allows fewer; raise it, or use a schedule that holds less"
                )
    return peaks


def activation_peaks(schedule: Schedule) -> Peaks:
    """How many microbatches' activations each program holds at once; a frozen module's forward keeps none."""
    work, found = schedule.work, []
    for actions in schedule.actions:
        held: Counter[str] = Counter()
        most: dict[str, int] = defaultdict(int)
        for action in actions:
            module = work.modules.get(action.module)
            if action.kind not in COMPUTE or module is None or not module.backward:
                continue
            served = len(module.served(action.microbatch, work.microbatches))
            if action.kind == Kind.FORWARD:
                held[module.name] += served
                most[module.name] = max(most[module.name], held[module.name])
            elif action.kind == kinds_of(work, module.name)[-1]:
                held[module.name] -= served
        found.append(dict(most))
    return tuple(found)


def expected_actions(schedule: Schedule) -> list[Counter[Action]]:
    """Program to every action it must have, from the work alone."""
    work, shares = schedule.work, schedule.shares
    expected: list[Counter[Action]] = [Counter() for _ in work.programs]
    for program, its in enumerate(work.programs):
        for task in tasks(work, shares, program):
            expected[program][task] += 1
            for message in emits(work, shares, program, task):
                expected[program][message] += 1
                if message.sends:
                    expected[message.peer][message.received_by(program)] += 1
        for name, stages in its.stages.items():
            if not schedule.streams(name):
                expected[program][Action(Kind.GATHER, name, stages[0], -1)] += 1
                expected[program][Action(Kind.REDUCE, name, stages[0], -1)] += 1
    return expected


def _who(schedule: Schedule, program: int) -> str:
    ranks = schedule.work.programs[program].ranks
    return f"rank{'s' if len(ranks) > 1 else ''} {format_ranks(ranks)}"


def _check_actions(schedule: Schedule) -> None:
    if len(schedule.actions) != len(schedule.work.programs):
        raise ScheduleError(f"{len(schedule.actions)} lists of actions for {len(schedule.work.programs)} programs")
    for program, expected in enumerate(expected_actions(schedule)):
        found = Counter(schedule.actions[program])
        if found == expected:
            continue
        missing, extra = expected - found, found - expected
        who = _who(schedule, program)
        if missing:
            raise ScheduleError(f"{who}: {next(iter(missing))} is missing from the schedule")
        action = next(iter(extra))
        times = f"stands {found[action]} times in the schedule" if expected[action] else "has no place in the schedule"
        raise ScheduleError(f"{who}: {action} {times}")


def _check_order(schedule: Schedule, program: int) -> None:
    work, shares = schedule.work, schedule.shares
    done: set[Action] = set()
    due: set[Action] = set()
    opened: set[str] = set()
    closed: set[str] = set()
    for action in schedule.actions[program]:
        module = action.module
        if action.kind in COMPUTE:
            for need in needs(work, shares, program, action):
                if need not in done:
                    raise ScheduleError(f"{_who(schedule, program)}: {action} stands before {need}, which it needs")
            if not schedule.streams(module) and (module not in opened or module in closed):
                where = "before its GATHER" if module not in opened else "after its REDUCE"
                raise ScheduleError(f"{_who(schedule, program)}: {action} stands {where}")
            due.update(emits(work, shares, program, action))
        elif action.kind == Kind.GATHER:
            opened.add(module)
        elif action.kind == Kind.REDUCE:
            closed.add(module)
        elif not action.receives and action not in due:
            raise ScheduleError(f"{_who(schedule, program)}: {action} stands before the computation whose result it sends")
        done.add(action)


def _check_channels(schedule: Schedule) -> None:
    """Messages from one program to another arrive in the order in which they are awaited: backends without tags rely on it."""
    sent: dict[tuple[int, int], list[Action]] = defaultdict(list)
    awaited: dict[tuple[int, int], list[Action]] = defaultdict(list)
    for program, actions in enumerate(schedule.actions):
        for action in actions:
            if action.sends:
                sent[program, action.peer].append(action.received_by(program))
            elif action.receives:
                awaited[action.peer, program].append(action)
    for (sender, receiver), messages in sent.items():
        for message, expected in zip(messages, awaited[sender, receiver], strict=True):
            if message != expected:
                raise ScheduleError(
                    f"{_who(schedule, receiver)}: {expected} comes next, but {_who(schedule, sender)} sends for {message} first"
                )


def _check_rendezvous(schedule: Schedule) -> None:
    lists = schedule.actions
    at = [0] * len(lists)
    ready = list(range(len(lists)))
    while ready:
        program = ready.pop()
        while at[program] < len(lists[program]):
            action = lists[program][at[program]]
            partners = _partners(schedule, program, action)
            if any(_at(lists, other, at) != its for other, its in partners.items()):
                break
            at[program] += 1
            for other in partners:
                at[other] += 1
                ready.append(other)
    stuck = [program for program in range(len(lists)) if at[program] < len(lists[program])]
    if stuck:
        raise ScheduleError(f"deadlock: {_cycle(schedule, stuck[0], at)}")


def _at(lists: tuple[tuple[Action, ...], ...], program: int, at: list[int]) -> Action | None:
    return lists[program][at[program]] if at[program] < len(lists[program]) else None


def _partners(schedule: Schedule, program: int, action: Action) -> dict[int, Action]:
    """Programs that must be at a certain action for this one to happen."""
    if action.sends:
        return {action.peer: action.received_by(program)}
    if action.receives:
        return {action.peer: action.sent_by(program)}
    if action.kind in COMPUTE:
        return {other: action for other in schedule.work.gangs[action.module, program] if other != program}
    if action.kind in (Kind.GATHER, Kind.REDUCE):
        return {other: action for other in schedule.work.holders(action.module, action.stage) if other != program}
    return {}


def _cycle(schedule: Schedule, start: int, at: list[int]) -> str:
    """Who waits for whom, from a stuck program on, until one comes up again."""
    lists, path = schedule.actions, [start]
    while True:
        program = path[-1]
        action = lists[program][at[program]]
        partners = _partners(schedule, program, action)
        following = next(other for other, its in partners.items() if _at(lists, other, at) != its)
        if _at(lists, following, at) is None or following in path:
            break
        path.append(following)
    first = path.index(following) if following in path else 0
    steps = [f"{_who(schedule, program)} at {lists[program][at[program]]}" for program in path[first:]]
    end = steps[0] if following in path else f"{_who(schedule, following)} at the end of its list"
    return " waits for ".join([*steps, end])
