"""The exchange on real processes: values and gradients bitwise equal to gathering everything everywhere."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle

import pytest
import torch
import torch.distributed as dist
from support.lanes import zigzag_positions
from support.ranks import run_ranks
from torch import Tensor

from meshweave.boundary import (
    Arrival,
    Ownership,
    Share,
    exchange,
    lane_ownership,
    outgoing,
    plan_transfer,
    slice_ownership,
    split_positions,
    transfer,
)
from meshweave.boundary.ownership import Array
from meshweave.errors import LayoutError

WIDTHS = (5, 3)  # two tensors a token, as with deepstack


@dataclass(frozen=True)
class Side:
    """One module's lanes: rank = first + lane · tp + position, tp innermost."""

    tp: int
    dp: int
    first: int = 0

    @property
    def stop(self) -> int:
        return self.first + self.tp * self.dp

    def ranks(self, lane: int) -> list[int]:
        return list(range(self.first + lane * self.tp, self.first + (lane + 1) * self.tp))


@dataclass(frozen=True)
class Batch:
    """Media items in destination order, by the lanes of both modules; `samples` names each item's sample."""

    item_tokens: list[int]
    samples: list[int]
    encoder_lanes: list[list[int]]
    language_lanes: list[list[int]]

    def tokens(self, items: Sequence[int]) -> list["Token"]:
        """(sample, item, position in the item) of each token, by plain counting."""
        return [(self.samples[item], item, at) for item in items for at in range(self.item_tokens[item])]


def ragged(seed: int, encoder: Side, language: Side, items_of_a_sample: Sequence[int]) -> Batch:
    """Samples with these numbers of items, dealt to the language lanes; items go to any encoder lane."""
    rng = random.Random(seed)
    item_tokens: list[int] = []
    samples: list[int] = []
    language_lanes: list[list[int]] = [[] for _ in range(language.dp)]
    encoder_lanes: list[list[int]] = [[] for _ in range(encoder.dp)]
    for sample, items in enumerate(items_of_a_sample):
        lane = sample * language.dp // len(items_of_a_sample)
        for _ in range(items):
            language_lanes[lane].append(len(samples))
            encoder_lanes[rng.randrange(encoder.dp)].append(len(samples))
            samples.append(sample)
            item_tokens.append(rng.choice([0, 1, 2, 3, 7, 12]))
    return Batch(item_tokens, samples, encoder_lanes, language_lanes)


def batches(encoder: Side, language: Side) -> Iterator[Batch]:
    """Ragged items; text-only lanes at either end; an idle encoder lane; a single item; nothing at all."""
    yield ragged(0, encoder, language, [1, 0, 7, 2, 0, 3, 1, 1])
    yield ragged(1, encoder, language, [0] * 8 + [7])
    yield ragged(2, encoder, language, [7] + [0] * 8)
    uneven = ragged(3, encoder, language, [2, 2, 1, 7, 1])
    everything = sorted(item for lane in uneven.encoder_lanes for item in lane)
    yield Batch(uneven.item_tokens, uneven.samples, [[]] * (encoder.dp - 1) + [everything], uneven.language_lanes)
    yield ragged(4, encoder, language, [0, 0, 1, 0])
    yield ragged(5, encoder, language, [0, 0, 0])


Token = tuple[int, int, int]
"""Sample, item, position in the item."""


def token_values(tokens: Sequence[Token], dtype: torch.dtype, salt: int) -> list[Tensor]:
    """[tokens, width] for each width: sample, item, position and noise, all exact even in bfloat16."""
    tag = torch.tensor(tokens, dtype=dtype).reshape(-1, 3)
    noise = [[hash((salt, *token, column)) % 251 - 125 for column in range(5)] for token in tokens]
    values = torch.cat([tag, torch.tensor(noise, dtype=dtype).reshape(-1, 5)], dim=1)
    return [part.contiguous() for part in torch.split(values, list(WIDTHS), dim=1)]


@dataclass(frozen=True)
class Case:
    """One exchange; `have` and `need`: the tokens of each rank's rows before and after, by plain counting."""

    source: Ownership
    destination: Ownership
    have: list[list[Token]]
    need: list[list[Token]]
    dtype: torch.dtype = torch.float32
    node_size: int | None = None


def run_cases(rank: int, cases: Sequence[Case]) -> list[tuple[list[Tensor], list[Tensor | None]]]:
    """On a rank: outputs and input gradients of every case."""
    results = []
    for case in cases:
        plan = plan_transfer(case.source, case.destination, case.node_size)
        tensors = [value.requires_grad_() for value in token_values(case.have[rank], case.dtype, salt=1)]
        outputs = exchange(tensors, plan, rank)
        gradients = token_values(case.need[rank], case.dtype, salt=2)
        torch.autograd.backward(outputs, gradients)
        results.append(([output.detach() for output in outputs], [tensor.grad for tensor in tensors]))
    return results


def gather_everything(held: Sequence[Sequence[Token]], wanted: Sequence[Token], dtype: torch.dtype, salt: int) -> list[Tensor]:
    """The reference: collect every rank's rows, then take the wanted tokens' ones."""
    known: dict[Token, int] = {}
    for token in chain.from_iterable(held):
        known.setdefault(token, len(known))
    everything = token_values(list(known), dtype, salt)
    return [values[[known[token] for token in wanted]] for values in everything]


def assert_equals_gathering_everything(cases: Sequence[Case]) -> None:
    world = len(cases[0].have)
    for rank, results in enumerate(run_ranks(world, run_cases, cases)):
        for case, (outputs, gradients) in zip(cases, results, strict=True):
            forward = gather_everything(case.have, case.need[rank], case.dtype, salt=1)
            backward = gather_everything(case.need, case.have[rank], case.dtype, salt=2)
            for actual, expected in zip([*outputs, *gradients], [*forward, *backward], strict=True):
                assert actual is not None
                assert actual.dtype == expected.dtype
                assert actual.shape == expected.shape
                assert torch.equal(actual, expected), (rank, case)


def layout_cases(encoder: Side, language: Side) -> Iterator[Case]:
    world = max(encoder.stop, language.stop)
    dtypes = cycle([torch.float32, torch.bfloat16, torch.float64])
    for batch, dtype in zip(batches(encoder, language), dtypes, strict=False):
        sides = [(encoder, batch.encoder_lanes), (language, batch.language_lanes)]
        source, destination = (
            lane_ownership(batch.item_tokens, lanes, [side.ranks(lane) for lane in range(side.dp)]) for side, lanes in sides
        )
        have: list[list[Token]] = [[]] * world
        need = have.copy()
        for (side, lanes), held in zip(sides, (have, need), strict=True):
            for lane, items in enumerate(lanes):
                for rank in side.ranks(lane):
                    held[rank] = batch.tokens(items)
        for node_size in (None, 2, 4):
            yield Case(source, destination, have, need, dtype, node_size)


IDENTICAL = [
    ((1, 8), (4, 2)),
    ((2, 4), (4, 2)),
    ((4, 2), (2, 4)),
    ((1, 4), (4, 1)),
    ((4, 1), (1, 4)),
    ((2, 2), (2, 2)),
    ((1, 3), (3, 1)),
    ((1, 2), (2, 1)),
]
ELSEWHERE = [
    (Side(1, 3), Side(1, 2)),  # three lanes onto two of the three ranks
    (Side(1, 3), Side(1, 2, first=3)),
    (Side(1, 2), Side(3, 2, first=2)),
    (Side(1, 5), Side(3, 1, first=5)),
    (Side(4, 1), Side(1, 2, first=4)),
    (Side(2, 2), Side(4, 1, first=2)),  # overlapping
    (Side(3, 1, first=1), Side(1, 4, first=2)),
    (Side(1, 1, first=1), Side(1, 1)),
]


@pytest.mark.parametrize(
    ("encoder", "language"),
    [(Side(*encoder), Side(*language)) for encoder, language in IDENTICAL] + ELSEWHERE,
    ids=str,
)
def test_exchange_equals_gathering_everything_bit_for_bit(encoder: Side, language: Side) -> None:
    assert_equals_gathering_everything(list(layout_cases(encoder, language)))


def contiguous(length: int, parts: int) -> list[list[int]]:
    size = length // parts
    return [list(range(part * size, (part + 1) * size)) for part in range(parts)]


def zigzag(length: int, parts: int) -> list[list[int]]:
    chunks = contiguous(length, 2 * parts)
    return [chunks[part] + chunks[-1 - part] for part in range(parts)]


@pytest.mark.parametrize(
    ("cut", "positions", "parts"),
    [
        (lambda length, parts: split_positions([(0, length)], parts), contiguous, 2),
        (zigzag_positions, zigzag, 3),
    ],
    ids=["contiguous", "zigzag"],
)
def test_context_parallel_slices_get_their_own_tokens_only(
    cut: Callable[[int, int], list[Array]], positions: Callable[[int, int], list[list[int]]], parts: int
) -> None:
    """Two lanes of `parts` context-parallel ranks; the reference slices plain lists of positions."""
    encoder, language = Side(1, 4), Side(parts, 2)
    batch = ragged(6, encoder, language, [3, 0, 7, 1, 2, 2])
    rng = random.Random(0)
    runs: list[list[tuple[int, int]]] = [[], []]
    slices, need = [], []
    for lane, items in enumerate(batch.language_lanes):
        sequence: list[Token | None] = []  # None: a text token
        for item in items:
            sequence += [None] * rng.randrange(4)
            runs[lane].append((len(sequence), batch.item_tokens[item]))
            sequence += batch.tokens([item])
        sequence += [None] * (-len(sequence) % (2 * parts))
        rows = cut(len(sequence), parts)
        slices.append([Share((rank,), part) for rank, part in zip(language.ranks(lane), rows, strict=True)])
        for wanted in positions(len(sequence), parts):
            need.append([token for at in wanted if (token := sequence[at]) is not None])
    source = lane_ownership(batch.item_tokens, batch.encoder_lanes, [encoder.ranks(lane) for lane in range(4)])
    have = [batch.tokens(items) for items in batch.encoder_lanes] + [[]] * (language.stop - encoder.stop)
    destination = slice_ownership(runs, slices)
    sizes = (None, 2)
    assert_equals_gathering_everything([Case(source, destination, have, need, node_size=node_size) for node_size in sizes])


def test_several_encoders_can_be_under_way_at_once() -> None:
    """Vision on ranks 0-3, audio on 2-3, both into (tp 2, dp 2), two-level; both start before either ends."""
    language = Side(2, 2)

    def check(rank: int) -> None:
        pending = []
        for seed, encoder in enumerate([Side(1, 4), Side(2, 1, first=2)]):
            batch = ragged(seed, encoder, language, [2, 7, 0, 1, 3, 1])
            source, destination = (
                lane_ownership(batch.item_tokens, lanes, [side.ranks(lane) for lane in range(side.dp)])
                for side, lanes in ((encoder, batch.encoder_lanes), (language, batch.language_lanes))
            )
            lane = (rank - encoder.first) // encoder.tp
            have = batch.tokens(batch.encoder_lanes[lane]) if lane >= 0 else []
            need = batch.tokens(batch.language_lanes[rank // 2])
            values = torch.cat(token_values(have, torch.float32, seed), dim=1)
            expected = torch.cat(token_values(need, torch.float32, seed), dim=1)
            plan = plan_transfer(source, destination, node_size=2)
            arrival = Arrival(plan.for_rank(rank), values)
            works = [dist.isend(tensor, peer) for peer, tensor in outgoing(plan.for_rank(rank), values)]
            works += [dist.irecv(buffer, peer) for peer, buffer in arrival.expect()]
            arrival.copy(values)
            pending.append((arrival, works, expected))
        for arrival, works, expected in pending:
            for work in works:
                work.wait()
            assert torch.equal(arrival.result(), expected)

    run_ranks(4, check)


def test_one_plan_serves_many_exchanges() -> None:
    """Index tensors are cached on the plan: calls with other widths and dtypes must not see stale ones."""

    def check(rank: int) -> None:
        source = lane_ownership([3, 1, 4, 2], [[0, 3], [2, 1]], [[0], [1]])
        destination = lane_ownership([3, 1, 4, 2], [[0, 1, 2, 3]], [[0, 1]])
        plan = plan_transfer(source, destination)
        tokens = [[0, 1, 2, 8, 9], [4, 5, 6, 7, 3]][rank]
        for width, dtype in zip((1, 4, 2), (torch.float64, torch.float32, torch.bfloat16), strict=True):
            everything = torch.arange(10 * width).reshape(10, width).to(dtype)
            assert torch.equal(transfer(plan, everything[tokens], rank), everything)
            back = transfer(plan.transpose(), everything, rank)
            assert torch.equal(back, everything[tokens])

    run_ranks(2, check)


def test_megabytes_both_ways_between_all_ranks_do_not_deadlock() -> None:
    def check(rank: int) -> None:
        everything = torch.arange(4 * 4096, dtype=torch.float32)[:, None].repeat(1, 128)
        parts = [range(lane, 16, 4) for lane in range(4)]  # every lane has some of every lane's tokens
        source = lane_ownership([1024] * 16, parts, [[0], [1], [2], [3]])
        plan = plan_transfer(source, lane_ownership([1024] * 16, [range(16)], [range(4)]))
        mine = torch.cat([everything[item * 1024 : (item + 1) * 1024] for item in parts[rank]])
        assert torch.equal(transfer(plan, mine, rank), everything)

    run_ranks(4, check)


def test_strided_inputs_and_expanded_gradients_are_carried() -> None:
    def check(rank: int) -> None:
        plan = plan_transfer(Ownership(4, (Share((0,), [(0, 4)]),)), Ownership(4, (Share((1,), [(1, 4), (0, 1)]),)))
        tokens = torch.arange(12.0).reshape(3, 4).T if rank == 0 else torch.empty(0, 3)
        tokens.requires_grad_()
        (out,) = exchange([tokens], plan, rank)
        if rank == 1:
            assert out.tolist() == [[1, 5, 9], [2, 6, 10], [3, 7, 11], [0, 4, 8]]
        out.sum().backward()
        assert tokens.grad is not None
        assert torch.equal(tokens.grad, torch.ones_like(tokens))

    run_ranks(2, check)


def test_a_rank_without_messages_needs_no_process_group() -> None:
    plan = plan_transfer(Ownership(3, (Share((1,), [(0, 3)]),)), Ownership(3, (Share((1,), [(2, 3), (0, 2)]),)))
    assert transfer(plan, torch.arange(3.0)[:, None], rank=1).flatten().tolist() == [2, 0, 1]
    assert transfer(plan, torch.empty(0, 7), rank=0).shape == (0, 7)


@pytest.mark.parametrize("shape", [(4, 8), (2, 8), (3,), (3, 2, 4)])
def test_a_tensor_that_does_not_fit_the_plan_is_refused_by_name(shape: tuple[int, ...]) -> None:
    plan = plan_transfer(Ownership(3, (Share((1,), [(0, 3)]),)), Ownership(3, (Share((0,), [(0, 3)]),)))
    with pytest.raises(LayoutError, match=rf"rank 1 .* shape \[{', '.join(map(str, shape))}\].* has 3 tokens"):
        transfer(plan, torch.zeros(shape), rank=1)
    with pytest.raises(LayoutError, match=rf"rank 1 .* shape \[{', '.join(map(str, shape))}\].* has 3 tokens"):
        exchange([torch.zeros(3, 8), torch.zeros(shape)], plan, rank=1)


def test_tensors_of_several_dtypes_are_refused_instead_of_promoted() -> None:
    plan = plan_transfer(Ownership(3, (Share((1,), [(0, 3)]),)), Ownership(3, (Share((0,), [(0, 3)]),)))
    with pytest.raises(LayoutError, match=r"rank 1 .* one dtype.* got torch\.float32, torch\.bfloat16"):
        exchange([torch.zeros(3, 8), torch.zeros(3, 8, dtype=torch.bfloat16)], plan, rank=1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_current_stream_sees_finished_values() -> None:
    """The input is still being computed when the exchange is queued, and the output is used at once."""
    rows = 1 << 16
    order = range(rows - 1024, -1, -1024)
    plan = plan_transfer(
        Ownership(rows, (Share((0,), [(0, rows)]),)),
        Ownership(rows, (Share((0,), [(start, start + 1024) for start in order]),)),
    )
    base = torch.randn(rows, 256, device="cuda", requires_grad=True)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(5):
        for _ in range(10):
            busy = (busy @ busy).clamp(-1, 1)
        tokens = base * 2 + busy.sum() * 0
        (out,) = exchange([tokens], plan, rank=0)
        expected = (base * 2).reshape(-1, 1024, 256).flip(0).reshape(rows, 256)
        assert torch.equal(out, expected)
        (gradient,) = torch.autograd.grad(out, base, expected)
        assert torch.equal(gradient, base * 4)
