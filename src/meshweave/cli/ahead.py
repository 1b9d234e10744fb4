"""What can be known to be wrong with a run before its processes start?"""

import os

from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.dataset import Dataset
from meshweave.layout import placements
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.flops import count_flops
from meshweave.model.modules import graph_of
from meshweave.step.loading import build_planner
from meshweave.step.schedules import run_schedule


def plan_ahead(run: RunConfig, config: PreTrainedConfig, dataset: Dataset) -> None:
    """Plans the run's schedule, and its first step where that has to fit a budget, for what is wrong with them; in a world that a
    launcher made, its ranks do, later."""
    if "RANK" not in os.environ:
        where = placements(run)
        schedule = run_schedule(run, config, where, dataset)
        if run.train.max_tokens is not None:
            flops = count_flops(graph_of(blueprint_of(config, STORED[run.dtype])), LANGUAGE)
            build_planner(run, dataset, where, schedule, flops).plan(0)
