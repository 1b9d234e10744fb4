"""Which schedule does a run file ask for? Chooses the generator, lowers what it makes, and proves it."""

from collections.abc import Callable, Mapping

from meshweave.config import LANGUAGE, RunConfig
from meshweave.errors import ConfigError
from meshweave.layout import Placement
from meshweave.schedule.actions import Action
from meshweave.schedule.check import check
from meshweave.schedule.durations import Durations, equal_durations
from meshweave.schedule.generators.graph_1f1b import graph_1f1b, run_ahead
from meshweave.schedule.generators.nested import nested
from meshweave.schedule.generators.three_phase import three_phase
from meshweave.schedule.lower import lower
from meshweave.schedule.schedule import Schedule, Shares
from meshweave.schedule.work import ModuleWork, StepWork, plan_work

_MOST_PROGRAMS = 256
"""More kinds of rank than these are no layout that anybody means, and would take minutes to plan."""


def plan_schedule(
    run: RunConfig,
    placements: Mapping[str, Placement],
    durations: Callable[[StepWork], Durations] = equal_durations,
    *,
    training: bool = True,
) -> Schedule:
    """The schedule of every step of a run; of forward passes alone where it is not `training`. It has passed `check`.

    Args:
        durations: seconds of the actions of some work; they decide where there is a choice.

    Raises:
        ConfigError: the run file asks for a schedule that its placements do not allow.
        ScheduleError: the schedule cannot run.
    """
    check_choice(run, placements)
    pipeline = placements[LANGUAGE].layout.pp
    kind = encoder_schedule(run, placements)
    # Rounds of several microbatches keep a pipeline full; without one they would only hold more activations.
    keeps_full = kind == "three_phase" and pipeline > 1
    rounds = run.schedule.macro_batch or (run.train.microbatches if keeps_full else 1)
    modules = {name: _module(run, placement.layout.pp, name, kind, rounds, training) for name, placement in placements.items()}
    work = plan_work(placements, modules, run.train.microbatches)
    if len(work.programs) > _MOST_PROGRAMS:
        sizes = ", ".join(f"modules.{name}.pp={placement.layout.pp}" for name, placement in placements.items())
        raise ConfigError(
            f"{sizes}: these pipelines cut the ranks so differently that {len(work.programs)} kinds of rank do different things "
            f"(at most {_MOST_PROGRAMS}); choose sizes that divide one another"
        )
    times = durations(work)
    shares: Shares = {}
    queues: list[list[list[Action]]]
    ahead: dict[str, int] = {}
    match kind:
        case "three_phase":
            queues = [[order] for order in three_phase(work, pipeline, rounds)]
        case "graph_1f1b":
            queues, ahead = graph_1f1b(work, pipeline), run_ahead(work, pipeline)
        case _:
            queues, shares = nested(work, pipeline, times)
    schedule = lower(work, queues, times, shares, ahead)
    check(schedule, {name: module.max_in_flight for name, module in run.modules.items() if module.max_in_flight is not None})
    return schedule


def encoder_schedule(run: RunConfig, placements: Mapping[str, Placement]) -> str:
    """How encoders join the language model's pipeline, with `auto` decided."""
    if run.schedule.encoders != "auto":
        return run.schedule.encoders
    language = set(placements[LANGUAGE].ranks)
    colocated = all(set(placements[name].ranks) == language for name in run.encoders)
    return "three_phase" if colocated else "graph_1f1b"


def check_choice(run: RunConfig, placements: Mapping[str, Placement]) -> None:
    """Raises `ConfigError` where the run file asks for a schedule that its placements do not allow."""
    chosen, pipeline = run.schedule, placements[LANGUAGE].layout.pp
    wrong = []
    if chosen.language != "1f1b" and pipeline == 1:
        wrong.append(f"schedule.language={chosen.language}: needs a pipeline; set modules.{LANGUAGE}.pp above 1, or take it out")
    if chosen.language == "interleaved" and chosen.virtual_stages == 1:
        wrong.append("schedule.virtual_stages=1: nothing to interleave; set it to 2 or more")
    if "virtual_stages" in chosen.model_fields_set and chosen.language != "interleaved":
        wrong.append(f"schedule.virtual_stages: only `language: interleaved` reads this, not {chosen.language}; take it out")
    if chosen.encoders == "nested":
        if pipeline == 1:
            wrong.append(
                f"schedule.encoders=nested: modules.{LANGUAGE}.pp=1 has no bubbles to fill; use three_phase, or set pp above 1"
            )
        outside = {name: sorted(set(placements[name].ranks) - set(placements[LANGUAGE].ranks)) for name in run.encoders}
        wrong += [
            f"schedule.encoders=nested: modules.{name}.ranks {ranks} are no ranks of the language model; use graph_1f1b"
            for name, ranks in outside.items()
            if ranks
        ]
        if chosen.macro_batch is not None:
            wrong.append(f"schedule.macro_batch={chosen.macro_batch}: nested works microbatch by microbatch; take it out")
    if chosen.macro_batch is not None and chosen.macro_batch > run.train.microbatches:
        wrong.append(
            f"schedule.macro_batch={chosen.macro_batch}: more than train.microbatches={run.train.microbatches}; lower it, or "
            "leave it out"
        )
    lanes, train = run.modules[LANGUAGE].dp, run.train
    if train.batch_size < lanes * train.microbatches:
        wrong.append(
            f"train.batch_size={train.batch_size}: fewer samples than language lanes × microbatches "
            f"({lanes} × {train.microbatches}), so some would always be empty; raise it to at least {lanes * train.microbatches}"
        )
    if wrong:
        raise ConfigError("\n".join(["this schedule cannot be:", *(f"  {line}" for line in wrong)]))


def _module(run: RunConfig, pipeline: int, name: str, kind: str, rounds: int, training: bool) -> ModuleWork:
    if name == LANGUAGE:
        pieces = run.schedule.virtual_stages if run.schedule.language == "interleaved" else 1
        split = training and run.schedule.language == "zero_bubble"
        module = run.modules[name]
        # Tokens travel between lanes to their experts; a loss over all lanes sums over them.
        together = module.ep * module.etp > 1 or run.train.router_aux_scope == "microbatch"
        return ModuleWork(name, pipeline * pieces, backward=training, split=split, together=together)
    # An encoder that is a pipeline itself takes a macro-batch one microbatch at a time.
    per_pass = rounds if kind != "nested" and pipeline == 1 else 1
    return ModuleWork(name, pipeline, per_pass, backward=training and run.modules[name].frozen is not True)
