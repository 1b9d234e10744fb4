"""Where do records come from? One file a kind of container, each opened without reading what it holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from meshweave.data.dataset import RawSample
from meshweave.data.records import read_record
from meshweave.data.sources.json_text import JsonText
from meshweave.data.sources.table import Table, is_saved_dataset
from meshweave.errors import DataError


class Records(Protocol):
    """A finite, indexable collection of records."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """What messages call the place of a record: `file:line`, or `file: entry i`."""
        ...

    def record(self, index: int) -> Any:
        """A record as it was written. Raises `DataError` if it cannot be parsed."""
        ...


class RecordSource:
    """A `Source`: the records of a container, read in a form (`records.FORMS`, or "auto")."""

    def __init__(self, records: Records, form: str, media: Path, ignored: Sequence[str] = ()) -> None:
        self.records, self.form, self.media, self.ignored = records, form, media, ignored

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> RawSample:
        try:
            return read_record(self.records.record(index), self.form, self.media, self.ignored)
        except DataError as error:
            raise DataError(f"{self.records.where(index)}: {error}", error.kind) from None

    def where(self, index: int) -> str:
        """What messages call the place of a record."""
        return self.records.where(index)


def open_records(path: Path) -> Records:
    """The records of a JSON list, JSONL or parquet file, of a folder of such files, or of one that `datasets` saved.

    Raises:
        DataError: there is no such file, it cannot be opened, or holds nothing.
    """
    if not path.exists():
        raise DataError(f"{path}: no such data file (looked in {Path.cwd()}); check data.path")
    records: Records
    if path.is_dir() and is_saved_dataset(path):
        records = Table.saved(path)
    elif path.is_dir():
        records = _folder(path)
    elif path.suffix == ".parquet":
        records = Table.parquet([path])
    else:
        records = JsonText(path)
    if not len(records):
        raise DataError(f"{path}: holds no records; give it at least one conversation")
    return records


def _folder(path: Path) -> Records:
    """Of one kind of files, in the order of their names."""
    found = {suffix: sorted(path.glob(f"*{suffix}")) for suffix in (".parquet", ".jsonl", ".json")}
    kinds = [suffix for suffix, files in found.items() if files]
    if len(kinds) != 1:
        what = f"files of several kinds ({', '.join(kinds)})" if kinds else "no .parquet, .jsonl or .json file"
        raise DataError(f"{path}: this folder holds {what}; name one file, or a folder of one kind")
    if kinds == [".parquet"]:
        return Table.parquet(found[".parquet"])
    return _OneAfterAnother([JsonText(file) for file in found[kinds[0]]])


class _OneAfterAnother:
    """The records of several files."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self._parts = parts

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def where(self, index: int) -> str:
        part, place = self._place(index)
        return part.where(place)

    def record(self, index: int) -> Any:
        part, place = self._place(index)
        return part.record(place)

    def _place(self, index: int) -> tuple[Records, int]:
        for part in self._parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)
