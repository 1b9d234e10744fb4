"""How long does it take four ranks to open a million records, and what memory of their own does each need?

    python benchmarks/data_index.py [--records 1000000]

Writes records as JSONL and as one JSON list to a temporary folder. Four forked processes open each and read one record, by the
index (`meshweave.data.sources`), with an empty cache and with a kept one, and by the peer: a reader that parses every record
when it opens and keeps each as JSON, as meshweave's did before. Private memory is what only that process has
(`/proc/self/smaps_rollup`), less what it had before it opened.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from meshweave.data.records import read_record
from meshweave.data.sources import open_records

RANKS = 4


def write(folder: Path, records: int) -> tuple[Path, Path]:
    lines, listed = folder / "data.jsonl", folder / "data.json"
    with lines.open("w") as file, listed.open("w") as other:
        for number in range(records):
            asked = {"from": "human", "value": f"<image>\nWhat is in picture {number}? Say it in one sentence, please."}
            said = {"from": "gpt", "value": f'A "cat" that sits on table {number % 97}, beside a window.\nNothing else.'}
            record = json.dumps({"id": str(number), "image": f"coco/{number:09d}.jpg", "conversations": [asked, said]})
            file.write(record + "\n")
            other.write(("[" if not number else ",\n") + record)
        other.write("]")
    return lines, listed


def by_index(path: Path) -> Any:
    records = open_records(path)
    return lambda index: read_record(records.record(index), "auto", path.parent)


def by_parsing(path: Path) -> Any:
    """The peer: every record parsed and checked at once, and kept as the bytes of its JSON."""
    text = path.read_text(encoding="utf-8")
    kept = []
    if text.lstrip().startswith("["):
        entries = ((json.dumps(entry), entry) for entry in json.loads(text))
    else:
        entries = ((line, json.loads(line)) for line in text.split("\n") if line.strip())
    for written, entry in entries:
        read_record(entry, "auto", path.parent)
        kept.append(written.encode())
    return lambda index: read_record(json.loads(kept[index]), "auto", path.parent)


def private_bytes() -> int:
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Private_Clean", "Private_Dirty")))


def rank(way: Callable[[Path], Any], path: Path, index: int, results: Any) -> None:
    before, began = private_bytes(), time.perf_counter()
    read = way(path)
    read(index)
    results.put((time.perf_counter() - began, private_bytes() - before))
    del read


def measured(way: Callable[[Path], Any], path: Path, records: int) -> tuple[float, float]:
    """Seconds of the slowest of `RANKS` ranks, and MiB of private memory of the one that needs most."""
    context = get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=rank, args=(way, path, records // 2 + number, results)) for number in range(RANKS)]
    for process in ranks:
        process.start()
    found = [results.get() for _ in ranks]
    for process in ranks:
        process.join()
    return max(seconds for seconds, _ in found), max(size for _, size in found) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--records", type=int, default=1_000_000)
    records = parser.parse_args().records
    table = Table(title=f"{records:,} records, {RANKS} ranks on {os.cpu_count()} cores", title_justify="left")
    for heading in ("file", "MiB", "reader", "seconds", "of the peer's", "private MiB", "of the peer's"):
        table.add_column(heading, justify="left" if heading in ("file", "reader") else "right")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for path in write(folder, records):
            seconds, size = measured(by_parsing, path, records)
            mebibytes = f"{path.stat().st_size / 2**20:.0f}"
            table.add_row(path.name, mebibytes, "parses all (peer)", f"{seconds:.1f}", "", f"{size:.0f}", "")
            for reader in ("index, empty cache", "index, kept"):
                mine, own = measured(by_index, path, records)
                table.add_row("", "", reader, f"{mine:.2f}", f"{mine / seconds:.3f}", f"{own:.1f}", f"{own / size:.3f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
