"""A run file gets the schedule it asks for, or one message that says why not."""

from typing import Any

import pytest

from meshweave.config import RunConfig, parse_config
from meshweave.errors import ConfigError, ScheduleError
from meshweave.layout import placements
from meshweave.schedule.actions import Kind
from meshweave.schedule.plan import encoder_schedule, plan_schedule
from meshweave.schedule.schedule import Schedule

COLOCATED = {"vision": {"ranks": "0-3"}, "language": {"ranks": "0-3", "pp": 4}}
APART = {"vision": {"ranks": "0-1"}, "language": {"ranks": "2-3", "pp": 2}}
FLAT = {"vision": {"ranks": "0-3"}, "language": {"ranks": "0-3", "tp": 2}}


def run_of(modules: dict[str, Any], microbatches: int = 4, **schedule: Any) -> RunConfig:
    train = {"steps": 1, "batch_size": 16, "microbatches": microbatches}
    return parse_config({"model": "model", "modules": modules, "train": train, "schedule": schedule})


def planned(run: RunConfig, **options: Any) -> Schedule:
    return plan_schedule(run, placements(run), **options)


def kinds(schedule: Schedule, module: str) -> set[Kind]:
    return {action.kind for actions in schedule.actions for action in actions if action.module == module}


@pytest.mark.parametrize(
    ("modules", "kind"),
    [(COLOCATED, "three_phase"), (FLAT, "three_phase"), (APART, "graph_1f1b")],
    ids=["pipeline", "flat", "apart"],
)
def test_the_placement_decides_where_the_run_file_does_not(modules: dict[str, Any], kind: str) -> None:
    run = run_of(modules)
    assert encoder_schedule(run, placements(run)) == kind


def test_encoder_passes_serve_whole_rounds_before_a_pipeline_and_microbatches_elsewhere() -> None:
    assert planned(run_of(COLOCATED)).work.modules["vision"].per_pass == 4
    assert planned(run_of(COLOCATED, macro_batch=2)).work.modules["vision"].per_pass == 2
    assert planned(run_of(FLAT)).work.modules["vision"].per_pass == 1
    assert planned(run_of(APART, macro_batch=2)).work.modules["vision"].per_pass == 2


def test_parameters_are_gathered_once_only_where_ranks_do_different_things() -> None:
    assert Kind.GATHER not in kinds(planned(run_of(FLAT)), "vision")
    assert {Kind.GATHER, Kind.REDUCE} <= kinds(planned(run_of(COLOCATED)), "vision")
    apart = planned(run_of(APART))
    assert Kind.GATHER not in kinds(apart, "vision")
    assert Kind.GATHER in kinds(apart, "language")


def test_a_frozen_encoder_has_no_backward_and_an_evaluation_none_at_all() -> None:
    frozen = planned(run_of({**APART, "vision": {"ranks": "0-1", "frozen": True}}))
    assert kinds(frozen, "vision") == {Kind.FORWARD, Kind.SEND_TOKENS, Kind.RECEIVE_TOKENS}
    assert Kind.BACKWARD in kinds(frozen, "language")
    evaluation = planned(run_of(COLOCATED, language="zero_bubble", encoders="nested"), training=False)
    assert not {Kind.BACKWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT} & (
        kinds(evaluation, "vision") | kinds(evaluation, "language")
    )


@pytest.mark.parametrize(
    ("modules", "schedule", "message"),
    [
        (FLAT, {"language": "interleaved"}, r"schedule.language=interleaved: needs a pipeline; set modules.language.pp"),
        (
            FLAT,
            {"encoders": "nested"},
            r"schedule.encoders=nested: modules.language.pp=1 has no bubbles to fill",
        ),
        (APART, {"encoders": "nested"}, r"modules.vision.ranks \[0, 1\] are no ranks of the language model; use graph_1f1b"),
        (COLOCATED, {"encoders": "nested", "macro_batch": 2}, r"schedule.macro_batch=2: nested works microbatch by microbatch"),
        (COLOCATED, {"macro_batch": 9}, r"schedule.macro_batch=9: more than train.microbatches=4"),
        (FLAT, {"microbatches": 9}, r"train.batch_size=16: fewer samples than language lanes × microbatches \(2 × 9\)"),
        (COLOCATED, {"virtual_stages": 2}, r"schedule.virtual_stages: only `language: interleaved` reads this"),
        (COLOCATED, {"language": "interleaved", "virtual_stages": 1}, r"schedule.virtual_stages=1: nothing to interleave"),
    ],
)
def test_what_cannot_be_is_refused_with_key_value_and_fix(modules: Any, schedule: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(run_of(modules, **schedule))


def test_a_schedule_over_the_activation_budget_is_refused() -> None:
    language = {"ranks": "0-3", "pp": 4, "max_in_flight": 3}
    with pytest.raises(ScheduleError, match=r"rank 0: language holds the activations of 4 .*max_in_flight=3"):
        planned(run_of({**COLOCATED, "language": language}, microbatches=8))


def test_a_language_model_without_a_pipeline_streams_also_beside_an_encoder_on_some_of_its_ranks() -> None:
    """Its parameters must not stay gathered for a step because half of its ranks do something else, too."""
    schedule = planned(run_of({"vision": {"ranks": "0-1"}, "language": {"ranks": "0-3"}}))
    assert len(schedule.work.programs) == 2
    assert Kind.GATHER not in kinds(schedule, "language")
    assert schedule.work.gangs["language", 0] == (0, 1)


def test_pipelines_that_make_every_rank_a_program_of_its_own_are_refused() -> None:
    modules = {"vision": {"ranks": "0-1022", "pp": 3}, "language": {"ranks": "0-1023", "pp": 4}}
    train = {"steps": 1, "batch_size": 1024, "microbatches": 4}
    run = parse_config({"model": "model", "modules": modules, "train": train})
    with pytest.raises(ConfigError, match=r"modules.vision.pp=3, modules.language.pp=4: .* choose sizes that divide one another"):
        planned(run)
