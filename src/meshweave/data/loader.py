"""What does a rank read for a step? The pixels it encodes and the text it embeds, by one shared plan."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from meshweave.batch.plan import EVEN, EncoderPasses, MediaMeta, MicrobatchPlan, SampleMeta, StepPlan, plan_step
from meshweave.batch.slots import PADDED, Packing
from meshweave.boundary.transfer import TransferPlan
from meshweave.data.dataset import IGNORE, Dataset
from meshweave.data.faults import Fault, FaultLog, unreadable
from meshweave.data.join import join_media
from meshweave.errors import DataError
from meshweave.sequence.grid import UNCUT, LaneGrid, SequenceRule, lay_out

Value = TypeVar("Value")


@dataclass(frozen=True)
class LanguageBatch:
    """The text of one language-model lane in a microbatch, in full on each of its ranks. A lane without samples is padding."""

    input_ids: Tensor
    """[rows, length] int64, 0 where there is no sample."""
    labels: Tensor
    """[rows, length] int64, not shifted, -100 where there is no target: padding, and the first token of every sample."""
    grid: LaneGrid
    """Where the samples lie, and which rank holds which columns."""


@dataclass(frozen=True)
class MediaBatch:
    """The media of one encoder lane in one pass."""

    inputs: dict[str, Tensor]
    """The encoder's inputs, the lane's items concatenated along dim 0: microbatch by microbatch, each in ascending item number.
    Empty on ranks of later pipeline stages, which see no pixels."""
    items: tuple[MediaMeta, ...]
    """The lane's items in that order, or the blank one."""
    tokens: tuple[int, ...]
    """Media tokens that the lane yields for each microbatch of the pass."""
    dummy: bool = False
    """Whether it is one blank item in a lane without any: collectives need every rank."""


@dataclass(frozen=True)
class LocalStep:
    """What one rank holds of a step, on the CPU."""

    plan: StepPlan
    faults: Mapping[int, Fault]
    """Samples of this step that are not trained, on all ranks alike, and why."""
    language: tuple[LanguageBatch | None, ...]
    """Microbatch → this rank's lane; None on ranks outside the language model."""
    media: Mapping[str, tuple[MediaBatch | None, ...]]
    """Encoder → pass → this rank's lane; None on ranks outside the encoder, and where the lane has nothing to do."""
    crossings: Mapping[tuple[str, int], TransferPlan]
    """(encoder, microbatch) → who sends its media tokens to whom, where the microbatch has any."""
    seconds: float = field(default=0.0, compare=False)
    """What this rank took to prepare it, without waits for the others."""

    @property
    def skipped(self) -> int:
        """Samples of this step that cannot be read."""
        return unreadable(self.faults)

    @property
    def left_out(self) -> int:
        """Samples of this step that limits leave out, or that have nothing to learn from."""
        return len(self.faults) - self.skipped


@dataclass(frozen=True)
class EncoderRole:
    """How a rank takes part in one encoder."""

    lanes: int
    lane: int | None = None
    """This rank's; None outside the encoder."""
    reads: bool = True
    """Whether it reads media: ranks of the first pipeline stage do."""
    passes: EncoderPasses = EVEN
    together: bool = True
    """Whether all lanes must work in a pass in which any does, because every pass gathers parameters. Otherwise each must work
    at least once in a step in which any does, because gradients are summed at its end."""


def require_full_step(dataset: Dataset, batch_size: int) -> None:
    """Raises `DataError` if the dataset is smaller than one step."""
    if len(dataset) < batch_size:
        raise DataError(f"the data holds {len(dataset)} samples, a step takes {batch_size}; lower `train.batch_size`")


class Loader:
    """Prepares any step of a training run from its number alone, so a resumed run reads the same samples.

    Args:
        batch_size: samples of a step, over all ranks and microbatches.
        language_lane: this rank's lane in the language model; None if outside.
        encoders: this rank's part in each encoder.
        rule: how sequences of the language model are laid out and cut.
        packing: how a slot's samples lie in memory. A sample longer than its token budget counts as unreadable.
        crossing: plans who sends a microbatch's tokens of an encoder to whom, by every lane's grid; without it, nothing crosses.
        rank, world, group: this process among those that plan together, and a gloo group of them for the
            loader's own use (it talks from a background thread). Without a group this process plans alone.
        on_error: what an unreadable sample does, on all ranks alike: "skip" names it once in the log of rank
            0 and leaves it out, "stop" raises the same `DataError` everywhere.
        max_skipped: the share of unreadable samples from which "skip" stops, too.
        drop_last: leave out what is over after the last full batch of an epoch.

    State: the faults met so far, one epoch's order, and the seconds that it has waited for other ranks.
    Raises `DataError` if the dataset is smaller than one batch, and from `step` if too little can be read; `LayoutError` from
    `step` where samples do not fit into the token budget of their slots.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        microbatches: int,
        language_lanes: int,
        language_lane: int | None,
        encoders: Mapping[str, EncoderRole],
        rule: SequenceRule = UNCUT,
        packing: Packing = PADDED,
        crossing: Callable[[MicrobatchPlan, Sequence[LaneGrid], str], TransferPlan] | None = None,
        rank: int = 0,
        world: int = 1,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        shuffle: bool = True,
        on_error: Literal["skip", "stop"] = "skip",
        max_skipped: float = 1.0,
        drop_last: bool = True,
    ) -> None:
        if drop_last or not len(dataset):
            require_full_step(dataset, batch_size)
        self.dataset, self.batch_size, self.microbatches = dataset, batch_size, microbatches
        self.language_lanes, self.language_lane, self.encoders = language_lanes, language_lane, dict(encoders)
        self.rank, self.world = (rank, world) if group is not None else (0, 1)
        self.rule, self.packing, self.crossing = rule, packing, crossing
        self.group, self.seed, self.shuffle = group, seed, shuffle
        self.log = FaultLog(on_error == "stop", max_skipped, named=self.rank == 0)
        self.steps_per_epoch = len(dataset) // batch_size if drop_last else -(-len(dataset) // batch_size)
        self._order: tuple[int, np.ndarray] | None = None
        self._waited = 0.0

    def steps(self, start: int, stop: int, *, prefetch: bool = True) -> Generator[LocalStep, None, None]:
        """Steps `start` … `stop` - 1; with `prefetch`, a thread prepares the one after the caller's. Whoever stops early, on all
        ranks alike, closes it: that waits for the thread."""
        if not prefetch or start >= stop:
            yield from (self.step(number) for number in range(start, stop))
            return
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as background:
            upcoming = background.submit(self.step, start)
            for number in range(start + 1, stop):
                ready = upcoming.result()
                upcoming = background.submit(self.step, number)
                yield ready
            yield upcoming.result()

    def step(self, number: int) -> LocalStep:
        """This rank's part of step `number`. A collective call if there is a group."""
        started, waited = time.perf_counter(), self._waited
        samples = self.sample_ids(number)
        metas, bad = self._agreed_metas(samples)
        reader = _Reader(self.dataset)
        while True:
            self.log.name(bad)
            plan = self._planned([metas[sample] for sample in samples if sample not in bad])
            grids = [tuple(lay_out(lane, self.rule) for lane in microbatch.lanes) for microbatch in plan.microbatches]
            language = tuple(map(partial(self._load_language, reader), plan.microbatches, grids))
            media = {name: self._load_encoder(plan, name, role, reader) for name, role in self.encoders.items()}
            # Decoding may still fail where a header was fine; all ranks then drop the sample and plan again.
            failed = self._agreed_failures({sample: why for sample, why in reader.failed.items() if sample not in bad})
            if not failed:
                self.log.count(len(samples), bad)
                crossings = self._crossings(plan, grids)
                seconds = time.perf_counter() - started - (self._waited - waited)
                return LocalStep(plan, bad, language, media, crossings, seconds)
            bad |= failed

    def plan(self, number: int) -> StepPlan:
        """Where the samples of step `number` would go, from metadata alone. A collective call if there is a group."""
        samples = self.sample_ids(number)
        metas, bad = self._agreed_metas(samples)
        self.log.name(bad)
        return self._planned([metas[sample] for sample in samples if sample not in bad])

    def _planned(self, metas: Sequence[SampleMeta]) -> StepPlan:
        return plan_step(
            metas,
            microbatches=self.microbatches,
            language_lanes=self.language_lanes,
            encoder_lanes={name: role.lanes for name, role in self.encoders.items()},
            passes={name: role.passes for name, role in self.encoders.items()},
            packing=self.packing,
        )

    def sample_ids(self, number: int) -> list[int]:
        """The dataset indices of step `number`, before any is found unreadable."""
        epoch, position = divmod(number, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            count = len(self.dataset)
            self._order = epoch, random.permutation(count) if self.shuffle else np.arange(count)
        first = position * self.batch_size
        return [int(sample) for sample in self._order[1][first : first + self.batch_size]]

    def _agreed_metas(self, samples: Sequence[int]) -> tuple[dict[int, SampleMeta], dict[int, Fault]]:
        """Metadata of all samples, and why others have none; each rank looks at its share of them only."""
        metas: dict[int, SampleMeta] = {}
        bad: dict[int, Fault] = {}
        for sample in samples[self.rank :: self.world]:
            try:
                meta = self.dataset.meta(sample)
                self.packing.require_fit(meta.tokens)
                metas[sample] = meta
            except DataError as error:
                bad[sample] = Fault.of(error)
        if self.group is None:
            return metas, bad
        shares = self._gathered((metas, bad))
        return _union([share[0] for share in shares]), _union([share[1] for share in shares])

    def _agreed_failures(self, failed: dict[int, Fault]) -> dict[int, Fault]:
        if self.group is None:
            return failed
        any_failed = torch.tensor(len(failed))
        with self._waiting():
            dist.all_reduce(any_failed, group=self.group)
        return _union(self._gathered(failed)) if any_failed else {}

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        with self._waiting():
            dist.all_gather_object(values, value, group=self.group)
        return values

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def _crossings(self, plan: StepPlan, grids: Sequence[Sequence[LaneGrid]]) -> dict[tuple[str, int], TransferPlan]:
        if self.crossing is None:
            return {}
        return {
            (encoder, number): self.crossing(microbatch, grids[number], encoder)
            for number, microbatch in enumerate(plan.microbatches)
            for encoder, items in microbatch.items.items()
            if items
        }

    def _load_language(self, reader: "_Reader", plan: MicrobatchPlan, grids: Sequence[LaneGrid]) -> LanguageBatch | None:
        lane = self.language_lane
        if lane is None:
            return None
        grid = grids[lane]
        input_ids = torch.zeros(grid.rows, grid.length, dtype=torch.int64)
        labels = torch.full_like(input_ids, IGNORE)
        for sample, (row, start, stop) in zip(plan.lanes[lane], grid.places, strict=True):
            text = reader.text(sample.sample)
            if text is None:
                continue  # all ranks will drop the sample and plan again
            if len(text[0]) != stop - start:
                why = f"its text has {len(text[0])} tokens, but its metadata counts {stop - start}"
                reader.failed.setdefault(sample.sample, Fault("unreadable", why, left_out=False))
                continue
            input_ids[row, start:stop], labels[row, start:stop] = text
            labels[row, start] = IGNORE  # the sample before it shall not predict it
        return LanguageBatch(input_ids, labels, grid)

    def _load_encoder(self, plan: StepPlan, encoder: str, role: EncoderRole, reader: "_Reader") -> tuple[MediaBatch | None, ...]:
        lane, passes = role.lane, plan.passes(encoder)
        if lane is None:
            return (None,) * len(passes)
        loaded = [self._load_media(served, encoder, lane, role.reads, reader) for served in passes]
        for number in _dummy_passes(passes, encoder, lane, role):
            inputs = self.dataset.dummy_media(encoder) if role.reads else {}
            blank = self.dataset.dummy_meta(encoder)
            loaded[number] = MediaBatch(inputs, (blank,), (0,) * len(passes[number]), dummy=True)
        return tuple(loaded)

    def _load_media(
        self, served: Sequence[MicrobatchPlan], encoder: str, lane: int, reads: bool, reader: "_Reader"
    ) -> MediaBatch | None:
        mine = [[part.items[encoder][number] for number in part.encoder_lanes[encoder][lane]] for part in served]
        items = tuple(item for part in mine for item in part)
        if not items:
            return None
        inputs: dict[str, Tensor] = {}
        if reads:
            read = [found for item in items if (found := reader.media(item.sample, item.slot)) is not None]
            inputs = join_media(read)
        return MediaBatch(
            inputs, tuple(item.meta for item in items), tuple(sum(item.meta.tokens for item in part) for part in mine)
        )


def _dummy_passes(passes: Sequence[Sequence[MicrobatchPlan]], encoder: str, lane: int, role: EncoderRole) -> list[int]:
    """Passes in which a lane without items must work on a blank one."""
    mine = [any(part.encoder_lanes[encoder][lane] for part in served) for served in passes]
    anyone = [any(part.items[encoder] for part in served) for served in passes]
    if role.together:
        return [number for number, (its, works) in enumerate(zip(mine, anyone, strict=True)) if works and not its]
    if any(mine) or not any(anyone):
        return []
    shares = role.passes.shares
    return [next(number for number in range(len(passes)) if shares is None or shares[number][lane])]


@dataclass
class _Reader:
    """Reads nothing twice in a step. State: what was read (None: unreadable), and why samples failed."""

    dataset: Dataset
    failed: dict[int, Fault] = field(default_factory=dict)
    texts: dict[int, tuple[Tensor, Tensor] | None] = field(default_factory=dict)
    items: dict[tuple[int, int], dict[str, Tensor] | None] = field(default_factory=dict)

    def text(self, sample: int) -> tuple[Tensor, Tensor] | None:
        if sample not in self.texts:
            self.texts[sample] = self._try(sample, lambda: self.dataset.text(sample))
        return self.texts[sample]

    def media(self, sample: int, slot: int) -> dict[str, Tensor] | None:
        if (sample, slot) not in self.items:
            self.items[sample, slot] = self._try(sample, lambda: self.dataset.media(sample, slot))
        return self.items[sample, slot]

    def _try(self, sample: int, read: Callable[[], Value]) -> Value | None:
        try:
            return read()
        except DataError as error:
            self.failed.setdefault(sample, Fault.of(error))
            return None


def _union(parts: Sequence[Mapping[int, Value]]) -> dict[int, Value]:
    """One mapping of all ranks' mappings, the same on every rank."""
    return {sample: value for part in parts for sample, value in part.items()}
