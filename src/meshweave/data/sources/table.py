"""How is a parquet file, or a folder that `datasets` saved, read? By Hugging Face `datasets`, mapped into memory, row by row."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from meshweave.errors import ConfigError, DataError, cause

_INSTALL = "pip install 'meshweave[datasets]'"


class Table:
    """The rows of a `datasets.Dataset`. Columns of pictures are read as they are stored, path or bytes: nothing is decoded."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name, self._rows = name, rows.with_format("arrow")

    @classmethod
    def parquet(cls, files: Sequence[Path]) -> "Table":
        """One file, or several one after another. Raises ConfigError without `datasets`, DataError if a file cannot be read."""
        name = str(files[0] if len(files) == 1 else files[0].parent)
        datasets = _datasets(name)
        return cls(name, _read(name, lambda: datasets.Dataset.from_parquet([str(file) for file in files])))

    @classmethod
    def saved(cls, folder: Path) -> "Table":
        """What `save_to_disk` wrote; of several splits `train`, or the only one. Raises as `parquet`."""
        datasets = _datasets(str(folder))
        found = _read(str(folder), lambda: datasets.load_from_disk(str(folder)))
        if isinstance(found, datasets.DatasetDict):
            split = "train" if "train" in found else next(iter(found)) if len(found) == 1 else None
            if split is None:
                names = ", ".join(found)
                raise DataError(f"{folder}: holds the splits {names}, and none is 'train'; name the folder of one of them")
            found = found[split]
        return cls(str(folder), found)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """`file: row i`."""
        return f"{self.name}: row {index}"

    def record(self, index: int) -> Any:
        """A row as a dict. Raises DataError."""
        return _read(self.where(index), lambda: self._rows[index].to_pylist()[0])


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets` wrote the folder."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def _datasets(name: str) -> Any:
    try:
        import datasets  # an extra
    except ImportError as error:
        raise ConfigError(f"data: {name} is read with Hugging Face datasets, which is not here; {_INSTALL}") from error
    datasets.disable_progress_bars()
    return datasets


def _read(name: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception as error:  # of arrow, of the file system, of a file that is no parquet
        raise DataError(f"{name}: datasets cannot read it ({cause(error)})", "broken file") from error
