"""What may a run file say, and what does a wrong one get told? One file a section."""

from meshweave.config.data import DataConfig
from meshweave.config.fields import LANGUAGE
from meshweave.config.module import ModuleConfig
from meshweave.config.read import load_config, parse_config
from meshweave.config.run import RunConfig
from meshweave.config.schedule import ScheduleConfig
from meshweave.config.train import TrainConfig

__all__ = [
    "LANGUAGE",
    "DataConfig",
    "ModuleConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "load_config",
    "parse_config",
]
