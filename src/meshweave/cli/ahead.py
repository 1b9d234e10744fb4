"""What can be known to be wrong with a run before its processes start?"""

import logging
import os
from collections import Counter

from transformers import PreTrainedConfig

from meshweave.config import LANGUAGE, DataConfig, RunConfig
from meshweave.data.dataset import Dataset
from meshweave.data.faults import described, too_many
from meshweave.data.processed import ProcessedDataset
from meshweave.errors import DataError, FaultKind
from meshweave.layout import placements
from meshweave.model.blueprint import STORED, blueprint_of
from meshweave.model.flops import count_flops
from meshweave.model.modules import graph_of
from meshweave.step.loading import build_planner
from meshweave.step.schedules import run_schedule

logger = logging.getLogger(__name__)

_LOOKED_AT = 200
"""Records whose form is looked at before a run starts."""


def plan_ahead(run: RunConfig, config: PreTrainedConfig, dataset: Dataset) -> None:
    """Plans the run's schedule, and its first step where that has to fit a budget, for what is wrong with them; in a world that a
    launcher made, its ranks do, later."""
    if "RANK" not in os.environ:
        if isinstance(dataset, ProcessedDataset) and run.data is not None:
            _look_into(dataset, run.data)
        where = placements(run)
        schedule = run_schedule(run, config, where, dataset)
        if run.train.max_tokens is not None:
            flops = count_flops(graph_of(blueprint_of(config, STORED[run.dtype])), LANGUAGE)
            build_planner(run, dataset, where, schedule, flops).plan(0)


def _look_into(dataset: ProcessedDataset, data: DataConfig) -> None:
    """Reads some records, all over the data, without their pictures.

    Raises:
        DataError: too many cannot be read (`data.max_skipped`), or one, where that stops a run.
    """
    if (notice := dataset.answers.notice()) is not None:
        logger.warning("%s", notice)
    counts: Counter[FaultKind] = Counter()
    examples: dict[FaultKind, str] = {}
    looked_at = range(0, len(dataset), max(1, len(dataset) // _LOOKED_AT))
    for index in looked_at:
        try:
            dataset.source[index]
        except DataError as error:
            if data.on_error == "stop":
                raise DataError(f"{error} (or set `data.on_error: skip` to leave it out)", error.kind) from None
            counts[error.kind] += 1
            examples.setdefault(error.kind, str(error))
    bad = counts.total()
    if bad == len(looked_at) or too_many(bad, len(looked_at), data.max_skipped):
        raise DataError(
            f"{bad} of {len(looked_at)} records that were looked at cannot be read, more than data.max_skipped="
            f"{data.max_skipped:g} allows (`meshweave data check` goes through all):\n{described(counts, examples)}"
        )
    if bad:
        logger.warning("%d of %d records that were looked at cannot be read and are left out", bad, len(looked_at))
