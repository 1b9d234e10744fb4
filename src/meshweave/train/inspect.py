"""What would this run look like? Prints its layout map; starts no process."""

from rich.console import Console
from transformers import PreTrainedConfig

from meshweave.batch import SampleMeta, StepPlan, plan_step
from meshweave.config import LANGUAGE, RunConfig
from meshweave.data.dataset import Dataset
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import DataError
from meshweave.layout import placements
from meshweave.model.blueprint import STORED, TRAVELS_AS, blueprint_of, read_model_config
from meshweave.model.check import check_model
from meshweave.model.footprint import footprints
from meshweave.model.modules import graph_of, media_widths
from meshweave.report.layout_map import render_layout_map, title
from meshweave.report.layout_picture import draw_layout_map
from meshweave.report.traffic import boundary_traffic
from meshweave.train.data import build_datasets


def inspect_run(run: RunConfig, console: Console) -> None:
    """Prints the layout map of a run and draws it as `layout.png` in its run folder.

    The boundary's bytes are those of the first samples of the run's data, or of random samples where it names none.

    Raises:
        ConfigError, CheckpointError, DataError, LayoutError: whatever would also keep the run from starting.
    """
    config = read_model_config(run.model)
    check_model(run, config)
    where = placements(run)
    graph = graph_of(blueprint_of(config, STORED[run.dtype]))
    held = footprints(graph, where, {name: module.data_parallel for name, module in run.modules.items()})
    token_bytes = sum(media_widths(config)) * TRAVELS_AS[run.dtype].itemsize
    traffic = boundary_traffic(_first_step(run, config), where, token_bytes, run.node_size)
    console.print(render_layout_map(run, where, held, traffic))
    picture = run.output / "layout.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_layout_map(where, run.world_size, picture, title(run, where))
    console.print(f"picture: {picture}", highlight=False)


def _first_step(run: RunConfig, config: PreTrainedConfig) -> StepPlan:
    dataset: Dataset
    if run.data is None:
        dataset = SyntheticDataset(config, run.train.batch_size, run.seed)
    else:
        dataset, _ = build_datasets(run, config)
    metas: list[SampleMeta] = []
    for index in range(min(run.train.batch_size, len(dataset))):
        try:
            metas.append(dataset.meta(index))
        except DataError:
            continue  # a run skips it, too
    return plan_step(
        metas,
        microbatches=run.train.microbatches,
        language_lanes=run.modules[LANGUAGE].dp,
        encoder_lanes={name: run.modules[name].dp for name in run.encoders},
    )
