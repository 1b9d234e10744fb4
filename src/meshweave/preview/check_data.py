"""What would a run read? Goes through all of its data, in parallel, without a model."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from meshweave.data.dataset import IGNORE
from meshweave.data.faults import Fault
from meshweave.data.processed import ProcessedDataset
from meshweave.errors import DataError
from meshweave.report.data import SampleFacts

_AT_ONCE = 64
"""Samples whose facts a process sends together."""


def sample_facts(dataset: ProcessedDataset, index: int, decode: bool) -> SampleFacts:
    """What is known of a sample once everything a step would read of it has been read.

    Args:
        decode: whether pictures are decoded and processed, too.
    """
    effects: tuple[str, ...] = ()
    try:
        meta = dataset.meta(index)
        effects = dataset.effects(index)
        _, labels = dataset.text(index)
        sizes = tuple(item.size() for item in dataset.pictures(index))
        for slot in range(len(meta.media) if decode else 0):
            dataset.media(index, slot)
    except DataError as error:
        return SampleFacts(index, effects=effects, fault=Fault.of(error))
    media_tokens = sum(item.tokens for item in meta.media)
    return SampleFacts(index, meta.tokens, int((labels[1:] != IGNORE).sum()), media_tokens, sizes, effects)


def check_samples(
    dataset: ProcessedDataset, count: int, workers: int, decode: bool, done: Callable[[int], None] = lambda count: None
) -> Iterator[SampleFacts]:
    """Facts of the first `count` samples, in no order, by as many forked processes as `workers` says.

    Args:
        done: is told how many samples more are through.

    Raises:
        DataError: a process died, as decoders in C may die of a file; names the samples it was at.
    """
    context = get_context("fork")
    readers: dict[Connection, _Share] = {}
    for number in range(min(workers, count)):
        reader, writer = context.Pipe(duplex=False)
        indices = range(number, count, workers)
        process = context.Process(target=_work, args=(dataset, indices, decode, writer), daemon=True)
        process.start()
        writer.close()
        readers[reader] = _Share(process, indices)
    while readers:
        for ready in wait(list(readers)):
            assert isinstance(ready, Connection)
            share = readers[ready]
            try:
                facts: list[SampleFacts] = ready.recv()
            except EOFError:
                share.process.join()
                if share.through < len(share.indices):
                    raise DataError(share.lost(), "broken file") from None
                del readers[ready]
                continue
            share.through += len(facts)
            done(len(facts))
            yield from facts


@dataclass
class _Share:
    """What one process goes through. State: how many of its samples are through."""

    process: Any
    indices: range
    through: int = 0

    def lost(self) -> str:
        left = self.indices[self.through : self.through + _AT_ONCE]
        return (
            f"a process that read samples ended with exit code {self.process.exitcode} at one of samples {left[0]} to {left[-1]} "
            f"(every {left.step}th); try them alone to find the file that it died of"
        )


def _work(dataset: ProcessedDataset, indices: range, decode: bool, writer: Connection) -> None:
    # A process of its own for each core: threads of the libraries would only wait for one another.
    os.environ["OMP_NUM_THREADS"] = "1"
    for first in range(0, len(indices), _AT_ONCE):
        writer.send([sample_facts(dataset, index, decode) for index in indices[first : first + _AT_ONCE]])
    writer.close()
