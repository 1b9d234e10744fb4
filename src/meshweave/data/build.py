"""Which dataset does a run file name?"""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from meshweave.config import DataConfig, RunConfig
from meshweave.data.dataset import Dataset, Source
from meshweave.data.loader import require_full_step
from meshweave.data.processed import ProcessedDataset
from meshweave.data.processor import load_processor
from meshweave.data.quickstart import DigitsSource
from meshweave.data.sources import RecordSource, open_records
from meshweave.data.synthetic import SyntheticDataset
from meshweave.data.targets import Answers
from meshweave.errors import ConfigError, DataError


def build_datasets(run: RunConfig, config: PreTrainedConfig) -> tuple[Dataset, Dataset | None]:
    """Training data and, where the run file names any, held-out data.

    Raises:
        ConfigError: the run file names no data, or the model folder has no processor.
        DataError: a data file cannot be opened, or there are fewer training samples than a step takes.
    """
    if run.data is None:
        raise ConfigError("data: missing; a run that trains needs to know what to read")
    data = run.data
    training: Dataset
    held_out: Dataset | None
    if data.source == "synthetic":
        training = SyntheticDataset(config, data.samples or run.train.batch_size * run.train.steps, run.seed)
        held_out = SyntheticDataset(config, data.eval_samples, run.seed + 1) if data.eval_samples else None
    else:
        source, held_out_source = _sources(data, run.train.batch_size * run.train.steps)
        training, *others = processed(run, data, config, [source, *([held_out_source] if held_out_source else [])])
        held_out = others[0] if others else None
    require_full_step(training, run.train.batch_size)
    return training, held_out


def processed(run: RunConfig, data: DataConfig, config: PreTrainedConfig, sources: Sequence[Source]) -> list[ProcessedDataset]:
    """Sources seen through the processor of the run's model. Raises ConfigError if it has none."""
    processor = load_processor(run.model)
    answers = Answers.of(processor, run.model, train_on=data.train_on, reasoning=data.reasoning)
    vocabulary = config.get_text_config().vocab_size
    return [ProcessedDataset(source, processor, answers, data, vocabulary) for source in sources]


def data_to_check(run: RunConfig, config: PreTrainedConfig) -> tuple[ProcessedDataset, str]:
    """A run's training data, and what to call it. Raises as `build_datasets`, and ConfigError for random samples."""
    if run.data is None or run.data.source == "synthetic":
        raise ConfigError("data: the run file names no data that could be checked; give data.path")
    source, _ = _sources(run.data, run.train.batch_size * run.train.steps)
    return processed(run, run.data, config, [source])[0], str(run.data.path or run.data.source)


def dataset_of(run: RunConfig, config: PreTrainedConfig) -> Dataset:
    """A run's training data, or a step of random samples where the run file names none; raises as `build_datasets`."""
    if run.data is None:
        return SyntheticDataset(config, run.train.batch_size, run.seed)
    return build_datasets(run, config)[0]


def data_or_random(run: RunConfig, config: PreTrainedConfig) -> tuple[Dataset, str | None]:
    """A run's training data, or random samples with the reason: for what is asked of a run whose data is not here (yet)."""
    try:
        return dataset_of(run, config), None
    except (ConfigError, DataError) as error:
        return SyntheticDataset(config, run.train.batch_size, run.seed), f"random samples stand in for the run's data: {error}"


def _sources(data: DataConfig, needed: int) -> tuple[Source, Source | None]:
    if data.source == "digits":
        held_out = DigitsSource("held_out", data.eval_samples) if data.eval_samples else None
        return DigitsSource("train", data.samples or needed), held_out
    assert data.path is not None  # the config has checked it
    return open_source(data, data.path), open_source(data, data.eval_path) if data.eval_path else None


def open_source(data: DataConfig, path: Path) -> RecordSource:
    """The records of a file or folder, read as the run file says. Raises DataError if it cannot be opened."""
    if data.images is not None and not data.images.is_dir():
        raise DataError(f"{data.images}: no such folder of images (looked in {Path.cwd()}); check data.images", "missing file")
    return RecordSource(open_records(path), data.form, data.images or (path if path.is_dir() else path.parent), data.ignore_keys)
