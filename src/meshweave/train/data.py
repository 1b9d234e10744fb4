"""Which dataset does a run file name, and how does this rank load it?"""

from transformers import AutoProcessor, PreTrainedConfig

from meshweave.config import LANGUAGE, DataConfig, RunConfig
from meshweave.data.dataset import Dataset, Source
from meshweave.data.loader import Loader
from meshweave.data.processed import ProcessedDataset
from meshweave.data.synthetic import SyntheticDataset
from meshweave.errors import ConfigError
from meshweave.train.world import World


def build_loader(run: RunConfig, dataset: Dataset, world: World, *, training: bool = True) -> Loader:
    """Loader of this rank's part of every step; without `training`, one ordered pass over everything."""
    language = world.placements[LANGUAGE]
    encoders = {name: world.placements[name] for name in run.encoders}
    return Loader(
        dataset,
        batch_size=run.train.batch_size,
        microbatches=run.train.microbatches,
        language_lanes=language.layout.dp,
        encoder_lanes={name: placement.layout.dp for name, placement in encoders.items()},
        language_lane=language.lane(world.rank),
        encoder_lane={name: placement.lane(world.rank) for name, placement in encoders.items()},
        rank=world.rank,
        world=world.size,
        group=world.data_group,
        seed=run.seed,
        shuffle=training,
        on_error=run.data.on_error if run.data else "stop",
        drop_last=training,
    )
