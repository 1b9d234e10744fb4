"""Does each rank read only its part, do all ranks drop the same samples, and is every step reproducible?"""

import logging
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from support.ranks import run_ranks

from meshweave.batch.plan import EncoderPasses, MediaMeta, SampleMeta
from meshweave.batch.slots import Packing
from meshweave.data.faults import Fault, FaultLog
from meshweave.data.loader import EncoderRole, Loader, LocalStep
from meshweave.errors import DataError, LayoutError

LANGUAGE_LANES, ENCODER_LANES = 2, {"vision": 3, "audio": 1}
# Where each of four ranks stands: its language lane (rank 3 has none), and its lane in each encoder.
LANES = [
    (0, {"vision": 0, "audio": None}),
    (0, {"vision": 1, "audio": None}),
    (1, {"vision": 2, "audio": None}),
    (None, {"vision": None, "audio": 0}),
]
WORLD = len(LANES)


@dataclass
class Ragged:
    """Sample n has n % 5 media items, every third of them audio. Some are missing or broken."""

    samples: int = 64
    missing: frozenset[int] = frozenset()
    broken: frozenset[int] = frozenset()
    reads: dict[str, list] = field(default_factory=lambda: {"meta": [], "text": [], "media": []})

    def __len__(self) -> int:
        return self.samples

    def modules(self, index: int) -> list[str]:
        return ["audio" if slot % 3 == 2 else "vision" for slot in range(index % 5)]

    def meta(self, index: int) -> SampleMeta:
        self.reads["meta"].append(index)
        if index in self.missing:
            raise DataError(f"{index}.png: no such image")
        media = tuple(MediaMeta(module, 2, 1.0 + index) for module in self.modules(index))
        return SampleMeta(index, 1 + index % 7, media)

    def text(self, index: int):
        self.reads["text"].append(index)
        ids = torch.full((1 + index % 7,), 1 + index)
        return ids, ids.clone()

    def media(self, index: int, slot: int):
        self.reads["media"].append((index, slot))
        if index in self.broken and slot == 0:
            raise DataError(f"{index}.png: broken")
        return {"pixel_values": torch.tensor([[float(index), float(slot)]])}

    def dummy_media(self, module: str):
        return {"pixel_values": torch.zeros(1, 2)}

    def dummy_meta(self, module: str) -> MediaMeta:
        return MediaMeta(module, 2, 1.0)


def loader(dataset, rank: int = 0, grouped: bool = True, **options) -> Loader:
    language_lane, encoder_lane = LANES[rank]
    role = options.pop("role", {})
    options = {"batch_size": 16, "microbatches": 2, "seed": 3} | options
    if grouped:  # its own group, as a trainer gives it
        options |= {"rank": rank, "world": WORLD, "group": dist.new_group(backend="gloo")}
    return Loader(
        dataset,
        language_lanes=LANGUAGE_LANES,
        language_lane=language_lane,
        encoders={name: EncoderRole(count, encoder_lane[name], **role.get(name, {})) for name, count in ENCODER_LANES.items()},
        **options,
    )


def same(a: LocalStep, b: LocalStep) -> bool:
    def flat(step):
        for language in step.language:
            if language is not None:
                yield from (language.input_ids, language.labels)
        yield from (t for passes in step.media.values() for m in passes if m is not None for t in m.inputs.values())

    left, right = list(flat(a)), list(flat(b))
    return (
        (a.plan, a.skipped, len(left)) == (b.plan, b.skipped, len(right))
        and all(map(torch.equal, left, right))
        and [text and text.grid.places for text in a.language] == [text and text.grid.places for text in b.language]
    )


def all_same(a: list[LocalStep], b: list[LocalStep]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


def test_every_rank_holds_exactly_what_the_plan_gives_it():
    for rank, (language_lane, encoder_lane) in enumerate(LANES):
        step = loader(Ragged(), rank, grouped=False).step(0)
        for number, (plan, language) in enumerate(zip(step.plan.microbatches, step.language, strict=True)):
            if language_lane is None:
                assert language is None
            else:
                lane = plan.lanes[language_lane]
                longest = max(s.tokens for s in lane)
                assert language.grid.places == tuple((row, 0, s.tokens) for row, s in enumerate(lane))
                for row, labels, sample in zip(language.input_ids, language.labels, lane, strict=True):
                    padding = longest - sample.tokens
                    assert row.tolist() == [1 + sample.sample] * sample.tokens + [0] * padding
                    assert labels.tolist() == [-100] + [1 + sample.sample] * (sample.tokens - 1) + [-100] * padding
            for encoder, lane in encoder_lane.items():
                media = step.media[encoder][number]
                if lane is None:
                    assert media is None
                else:
                    items = tuple(plan.items[encoder][item] for item in plan.encoder_lanes[encoder][lane])
                    assert not media.dummy
                    assert media.items == tuple(item.meta for item in items)
                    assert media.tokens == (sum(item.meta.tokens for item in items),)
                    assert media.inputs["pixel_values"].tolist() == [[item.sample, item.slot] for item in items]


def test_a_lane_without_items_holds_a_dummy_if_and_only_if_another_lane_has_some():
    def media(dataset, **options):
        step = loader(dataset, 2, grouped=False, batch_size=2, microbatches=1, shuffle=False, **options).step(0)
        return step.media["vision"][0]

    class OneImage(Ragged):
        def modules(self, index):
            return ["vision"] if index == 1 else []

    class TextOnly(Ragged):
        def modules(self, index):
            return []

    assert media(OneImage()).dummy
    assert media(OneImage()).inputs["pixel_values"].tolist() == [[0, 0]]
    assert media(TextOnly()) is None


def test_without_gathers_in_every_pass_a_lane_holds_a_dummy_only_if_it_has_no_items_all_step():
    class Some(Ragged):
        def modules(self, index):
            return ["vision"] if index in self.with_image else []

    def dummies(with_image, **role):
        Some.with_image = with_image
        options = {"batch_size": 4, "microbatches": 4, "shuffle": False, "role": {"vision": {"together": False, **role}}}
        step = loader(Some(), 2, grouped=False, **options).step(0)
        assert step.plan.microbatches[0].encoder_lanes["vision"]
        return [media and media.dummy for media in step.media["vision"]]

    assert dummies({3}) == [True, None, None, None]
    assert dummies(set()) == [None] * 4
    late = tuple((1.0, 1.0, float(number > 1)) for number in range(4))
    assert dummies({3}, passes=EncoderPasses(shares=late)) == [None, None, True, None]


def test_a_pass_brings_the_items_of_its_microbatches_one_after_the_other():
    role = {"vision": {"passes": EncoderPasses(per_pass=2)}}
    step = loader(Ragged(), 0, grouped=False, role=role).step(0)
    (media,) = step.media["vision"]
    lane = LANES[0][1]["vision"]
    mine = [[plan.items["vision"][item] for item in plan.encoder_lanes["vision"][lane]] for plan in step.plan.microbatches]
    items = (*mine[0], *mine[1])
    assert media.items == tuple(item.meta for item in items)
    assert media.tokens == tuple(sum(item.meta.tokens for item in items) for items in mine)
    assert media.inputs["pixel_values"].tolist() == [[item.sample, item.slot] for item in items]


def test_later_pipeline_stages_read_no_pixels():
    dataset = Ragged()
    step = loader(dataset, 0, grouped=False, role={"vision": {"reads": False}}).step(0)
    assert step.media["vision"][0].inputs == {}
    assert step.media["vision"][0].items
    assert not dataset.reads["media"]


def test_a_lane_without_samples_holds_one_padding_token():
    step = loader(Ragged(), 2, grouped=False, batch_size=1, microbatches=1).step(0)
    language = step.language[0]
    assert step.plan.microbatches[0].lanes[1] == ()
    assert (language.input_ids.tolist(), language.labels.tolist()) == ([[0]], [[-100]])
    assert (language.grid.rows, language.grid.length, language.grid.places) == (1, 1, ())


def test_an_epoch_visits_every_sample_once_and_epochs_differ():
    load = loader(Ragged(), grouped=False)
    epochs = [[s for n in range(4 * e, 4 * e + 4) for s in load.sample_ids(n)] for e in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(64))] * 2
    assert epochs[0] != epochs[1]
    assert load.sample_ids(1) == epochs[0][16:32]
    in_order = loader(Ragged(), grouped=False, shuffle=False)
    assert in_order.sample_ids(1) == list(range(16, 32))


def test_what_is_over_after_the_last_full_batch_is_dropped_or_makes_a_small_step():
    dropped, kept = (loader(Ragged(20), grouped=False, drop_last=drop) for drop in (True, False))
    assert (dropped.steps_per_epoch, kept.steps_per_epoch) == (1, 2)
    assert len(kept.sample_ids(1)) == 4
    with pytest.raises(DataError, match=r"holds 20 samples, a step takes 21; lower `train\.batch_size`"):
        loader(Ragged(20), grouped=False, batch_size=21)


def test_resuming_at_a_step_equals_running_through_and_prefetch_changes_nothing():
    def fresh():
        return loader(Ragged(missing=frozenset({5, 6}), broken=frozenset({8, 9, 33})), 1, grouped=False)

    through = list(fresh().steps(0, 9, prefetch=False))
    assert sum(step.skipped for step in through) > 4
    assert all_same(through, list(fresh().steps(0, 9)))
    assert all_same(through[5:], list(fresh().steps(5, 9)))
    assert not same(through[0], through[1])
    assert list(fresh().steps(3, 3)) == []


@pytest.mark.parametrize(("prefetch", "samples_read"), [(True, 32), (False, 16)])
def test_the_next_step_is_prepared_while_one_is_used_if_prefetch_is_on(prefetch, samples_read):
    dataset = Ragged()
    steps = loader(dataset, grouped=False).steps(0, 4, prefetch=prefetch)
    next(steps)
    deadline = time.monotonic() + 5
    while len(dataset.reads["meta"]) < samples_read and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(dataset.reads["meta"]) == samples_read
    steps.close()


def test_a_step_whose_samples_are_all_unreadable_is_an_ordinary_empty_step():
    step = loader(Ragged(missing=frozenset(range(64))), grouped=False).step(0)
    assert step.skipped == 16
    assert step.language[1].input_ids.tolist() == [[0]]
    assert step.media == {"vision": (None, None), "audio": (None, None)}


def reads_of_a_rank(rank: int):
    dataset = Ragged()
    step = loader(dataset, rank).step(0)
    language_lane, encoder_lane = LANES[rank]
    texts = [] if language_lane is None else [s.sample for m in step.plan.microbatches for s in m.lanes[language_lane]]
    items = [
        (m.items[encoder][number].sample, m.items[encoder][number].slot)
        for m in step.plan.microbatches
        for encoder, lane in encoder_lane.items()
        if lane is not None
        for number in m.encoder_lanes[encoder][lane]
    ]
    return step.plan, dataset.reads, {"text": texts, "media": items}


def test_a_rank_opens_only_the_files_it_encodes_or_embeds():
    results = run_ranks(WORLD, reads_of_a_rank)
    plans, reads, expected = zip(*results, strict=True)
    assert all(plan == plans[0] for plan in plans)
    for rank in range(WORLD):
        assert len(reads[rank]["meta"]) == 16 / WORLD
        assert sorted(reads[rank]["text"]) == sorted(expected[rank]["text"])
        assert sorted(reads[rank]["media"]) == sorted(expected[rank]["media"])
    assert sorted(sample for read in reads for sample in read["meta"]) == sorted(loader(Ragged(), grouped=False).sample_ids(0))
    everything = [item for read in reads for item in read["media"]]
    assert len(everything) == len(set(everything)) == sum(len(m.items[e]) for m in plans[0].microbatches for e in m.items)


def steps_of_a_rank(rank: int, missing: frozenset[int], broken: frozenset[int], start: int, prefetch: bool):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("meshweave.data.faults").addHandler(handler)
    dataset = Ragged(missing=missing, broken=broken)
    return list(loader(dataset, rank).steps(start, 8, prefetch=prefetch)), lines, dataset.reads["media"]


def test_missing_and_broken_images_are_skipped_on_all_ranks_alike_and_named_once():
    missing, broken = frozenset({3, 11, 20}), frozenset({7, 12, 13, 39, 40})  # 20 and 40 have no media
    first = run_ranks(WORLD, steps_of_a_rank, missing, broken, 0, True)
    steps, lines, reads = zip(*first, strict=True)
    assert all(max(Counter(read).values()) <= 2 for read in reads)  # two epochs: nothing twice in a step
    bad = (missing | broken) - {40}
    for step in zip(*steps, strict=True):
        assert all(local.plan == step[0].plan and local.skipped == step[0].skipped for local in step)
    planned = [[s.sample for m in step.plan.microbatches for lane in m.lanes for s in lane] for step in steps[0]]
    for epoch in (planned[:4], planned[4:]):
        assert sorted(chain.from_iterable(epoch)) == sorted(set(range(64)) - bad)
    assert [sum(step.skipped for step in steps[0][at : at + 4]) for at in (0, 4)] == [len(bad)] * 2
    assert sorted(lines[0]) == sorted(
        [f"sample {n} is skipped: {n}.png: no such image" for n in missing]
        + [f"sample {n} is skipped: {n}.png: broken" for n in broken - {40}]
    )
    assert lines[1:] == ([],) * (WORLD - 1)

    for rank in range(WORLD):  # as if the samples found bad while decoding had been known as bad from the start
        known = loader(Ragged(missing=bad), rank, grouped=False)
        assert all_same(steps[rank], list(known.steps(0, 8)))

    resumed = run_ranks(WORLD, steps_of_a_rank, missing, broken, 5, False)
    assert all(all_same(steps[rank][5:], resumed[rank][0]) for rank in range(WORLD))


def stop_of_a_rank(rank: int, missing: frozenset[int], broken: frozenset[int]) -> str:
    load = loader(Ragged(missing=missing, broken=broken), rank, on_error="stop")
    with pytest.raises(DataError) as raised:
        list(load.steps(0, 8))
    return str(raised.value)


@pytest.mark.parametrize(
    ("missing", "broken", "message"),
    [({9}, set(), "sample 9: 9.png: no such image"), (set(), {22}, "sample 22: 22.png: broken")],
)
def test_stop_raises_the_same_message_on_every_rank(missing, broken, message):
    messages = run_ranks(WORLD, stop_of_a_rank, frozenset(missing), frozenset(broken))
    assert set(messages) == {f"{message} (or set `data.on_error: skip` to leave it out)"}


def budget_of_a_rank(rank: int, on_error: str):
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("meshweave.data.faults").addHandler(handler)
    load = loader(Ragged(), rank, packing=Packing(packed=True, max_tokens=6), on_error=on_error, microbatches=8)
    try:
        step = load.step(0)
    except DataError as error:
        return str(error)
    return step.plan, step.skipped, load.sample_ids(0), lines


def test_samples_longer_than_the_budget_are_skipped_on_all_ranks_alike_and_named_or_stop_the_run():
    plans, skipped, ids, lines = zip(*run_ranks(WORLD, budget_of_a_rank, "skip"), strict=True)
    long = sorted(n for n in ids[0] if n % 7 == 6)  # of 7 tokens
    assert long
    assert all(plan == plans[0] for plan in plans)
    assert set(skipped) == {len(long)}
    assert sorted(s.sample for m in plans[0].microbatches for lane in m.lanes for s in lane) == sorted(set(ids[0]) - set(long))
    assert [line.split(":")[0] for line in lines[0]] == [f"sample {n} is skipped" for n in long]
    assert "its 7 tokens are more than train.max_tokens=6 lets a sequence hold" in lines[0][0]
    assert lines[1:] == ([],) * (WORLD - 1)
    messages = run_ranks(WORLD, budget_of_a_rank, "stop")
    assert set(messages) == {messages[0]}
    assert messages[0].startswith(f"sample {long[0]}: its 7 tokens are more than train.max_tokens=6")


def test_a_step_that_does_not_fit_the_budget_is_refused_and_a_plan_shows_it_without_reading():
    dataset = Ragged()
    load = loader(dataset, grouped=False, packing=Packing(packed=True, max_tokens=8))
    with pytest.raises(LayoutError, match=r"train.max_tokens=8: a step of 16 samples has .* 4 slots"):
        load.plan(0)
    roomy = loader(dataset, grouped=False, packing=Packing(packed=True, max_tokens=20))
    assert roomy.plan(1) == roomy.step(1).plan
    fresh = Ragged()
    loader(fresh, grouped=False).plan(0)
    assert fresh.reads["text"] == fresh.reads["media"] == []


def test_a_run_in_which_nothing_can_be_read_stops():
    broken = loader(Ragged(missing=frozenset(range(64))), grouped=False)
    broken.step(0)
    with pytest.raises(DataError, match=r"not one of 32 samples can be trained; of all so far:\n  32 × "):
        broken.step(1)


def test_a_sample_whose_text_is_not_as_long_as_its_metadata_says_is_skipped_by_name(caplog):
    class Longer(Ragged):
        def text(self, index: int):
            ids, labels = super().text(index)
            return (torch.cat([ids, ids[:1]]), torch.cat([labels, labels[:1]])) if index == odd else (ids, labels)

    odd = loader(Ragged(), 0, grouped=False).step(0).plan.microbatches[0].lanes[0][0].sample
    assert loader(Longer(), 0, grouped=False, on_error="skip").step(0).skipped == 1
    assert f"sample {odd} is skipped: its text has" in caplog.text
    with pytest.raises(DataError, match=f"sample {odd}: its text has"):
        loader(Longer(), 0, grouped=False, on_error="stop").step(0)


def faults_of(kinds: str) -> dict[int, Fault]:
    """A fault a letter: b(roken), f(orm), o(n purpose)."""
    names = {"b": ("broken file", False), "f": ("form", False), "o": ("too long", True)}
    return {number: Fault(names[kind][0], f"{number}: {kind}", names[kind][1]) for number, kind in enumerate(kinds)}


def test_more_unreadable_samples_of_a_window_than_the_bound_stop_a_run_with_the_reasons_counted():
    log = FaultLog(most=0.05)
    for _ in range(50):
        log.count(100, faults_of("bbff"))  # 4 %
    with pytest.raises(DataError, match=r"52 of the last 1000 .*max_skipped=0.05") as error:
        for _ in range(10):
            log.count(100, faults_of("bbbbbff"))
    lines = str(error.value).splitlines()
    assert lines[1] == "  120 × broken file, e.g. 0: b"
    assert lines[2] == "  108 × form, e.g. 2: f"


def test_a_few_bad_samples_at_the_start_do_not_stop_a_run():
    log = FaultLog(most=0.05)
    log.count(4, faults_of("bf"))
    log.count(4, faults_of("b"))


def test_what_is_left_out_on_purpose_stops_a_run_only_where_nothing_else_is_there():
    log = FaultLog(stop=True, most=0.0)
    for _ in range(20):
        log.name(faults_of("ooo"))
        log.count(4, faults_of("ooo"))
    log = FaultLog()
    with pytest.raises(DataError, match="not one of 20 samples can be trained"):
        for _ in range(5):
            log.count(4, faults_of("oooo"))
