"""How is one record of a JSON list or a JSONL file found without reading the others? By an index of where each begins and ends.

The file is mapped into memory and so is the index, which is kept in the user's cache: all ranks of a node share both.
"""

import codecs
import json
import mmap
import os
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from meshweave.errors import DataError

_AT_ONCE = 1 << 21
"""Bytes that are looked through together: what is found in more would be memory that a process keeps."""
_QUOTE, _BACKSLASH, _COMMA, _OPEN, _CLOSE, _LINE = b'"\\,[]\n'
_NEWLINE = b"\n"
_SHORT = 16
"""Bytes up to which a line may be blank; a longer one that is would be a record that cannot be parsed."""
Array = np.ndarray


class JsonText:
    """The records of a file, one a line (JSONL) or elements of one list, which begins with `[`.

    Raises DataError if the file cannot be mapped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                empty = os.fstat(file.fileno()).st_size == 0
                self._text: mmap.mmap | bytes = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check data.path") from error
        head = bytes(self._text[:4096])
        self._first = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        self.listed = head[self._first :].lstrip().startswith(b"[")
        self._spans = self._index()

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, index: int) -> str:
        """`file:line`, or `file: entry i` of a list."""
        if self.listed:
            return f"{self.path}: entry {index}"
        start = int(self._spans[index, 0])
        pieces = (self._text[first : min(first + _AT_ONCE, start)] for first in range(0, start, _AT_ONCE))
        return f"{self.path}:{1 + sum(piece.count(_NEWLINE) for piece in pieces)}"

    def record(self, index: int) -> Any:
        """A record, parsed. Raises DataError."""
        first, last = self._spans[index].tolist()
        try:
            return json.loads(self._text[first:last].decode())
        except UnicodeDecodeError as error:
            raise DataError(f"not valid UTF-8 at byte {error.start} of it; save the file as UTF-8", "form") from None
        except json.JSONDecodeError as error:
            why = f"not valid JSON at column {error.pos + 1} of it ({error.msg})"
            raise DataError(f"{why}; expected a JSON list of records, or JSONL with one record a line", "form") from None
        except RecursionError:
            raise DataError("its JSON is nested too deeply to be a record", "form") from None

    def _index(self) -> Array:
        """[records, 2] int64: first byte, and the byte after the last."""
        if not self._text:
            return np.zeros((0, 2), dtype=np.int64)
        kept = _kept(self.path)
        if kept is None or not kept.exists():
            data = np.frombuffer(self._text, dtype=np.uint8)
            spans = _elements(data, self._first) if self.listed else _lines(data, self._first)
            del data
            if isinstance(self._text, mmap.mmap):
                self._text.madvise(mmap.MADV_DONTNEED)  # what was looked through once need not stay mapped
            if kept is None or not len(spans) or not _keep(spans, kept):
                return spans
        return np.load(kept, mmap_mode="r")


def _lines(data: Array, first: int) -> Array:
    """Lines that are not blank."""
    ends = np.concatenate([*(np.flatnonzero(chunk == _LINE) + start for start, chunk in _chunks(data)), [len(data)]])
    starts = np.concatenate([[first], ends[:-1] + 1])
    spans = np.stack([starts, ends], axis=1).astype(np.int64)
    blank = np.zeros(len(spans), dtype=bool)
    for line in np.flatnonzero(ends - starts <= _SHORT):
        blank[line] = not bytes(data[spans[line, 0] : spans[line, 1]]).strip()
    return spans[~blank]


def _elements(data: Array, first: int) -> Array:
    """Elements of the outermost list: what commas part that stand in no string and no inner list or object."""
    deeper = np.zeros(256, dtype=np.int8)
    deeper[[_OPEN, ord("{")]], deeper[[_CLOSE, ord("}")]] = 1, -1
    marks = deeper != 0
    marks[_COMMA] = True
    borders: list[Array] = []
    quotes_so_far = depth = 0
    for start, chunk in _chunks(data):
        quotes = np.flatnonzero(chunk == _QUOTE) + start
        quotes = quotes[~_escaped(data, quotes)]
        places = np.flatnonzero(marks[chunk]) + start
        places = places[(np.searchsorted(quotes, places) + quotes_so_far) % 2 == 0]
        steps = deeper[data[places]].astype(np.int64)
        depths = depth + np.cumsum(steps)
        outer = ((steps == 0) & (depths == 1)) | ((steps == 1) & (depths == 1)) | ((steps == -1) & (depths == 0))
        borders.append(places[outer])
        quotes_so_far += len(quotes)
        depth = int(depths[-1]) if len(depths) else depth
    found = np.concatenate(borders).astype(np.int64)
    if depth > 0:  # the list does not end: its last element is what there is of it
        found = np.append(found, len(data))
    spans = np.stack([found[:-1] + 1, found[1:]], axis=1)
    if len(spans) == 1 and not bytes(data[spans[0, 0] : spans[0, 1]]).strip():
        return spans[:0]
    return spans


def _escaped(data: Array, quotes: Array) -> Array:
    """Whether an odd number of backslashes stands before each of these places."""
    odd = np.zeros(len(quotes), dtype=bool)
    left = np.arange(len(quotes))
    back = 1
    while len(left):
        left = left[(quotes[left] >= back) & (data[np.maximum(quotes[left] - back, 0)] == _BACKSLASH)]
        odd[left] ^= True
        back += 1
    return odd


def _chunks(data: Array) -> Iterator[tuple[int, Array]]:
    for start in range(0, len(data), _AT_ONCE):
        yield start, data[start : start + _AT_ONCE]


def _kept(path: Path) -> Path | None:
    """Where the index of a file is kept, by the file's place, size and time; None where there is no place for it."""
    state = path.stat()
    name = sha256(f"{path.resolve()}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()[:32]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meshweave" / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{name}.npy"


def _keep(spans: Array, kept: Path) -> bool:
    """Writes an index at once, so that no other rank reads half of one; False where that cannot be done."""
    try:
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            np.save(file, spans)
        Path(file.name).replace(kept)
    except OSError:
        return False
    return True
