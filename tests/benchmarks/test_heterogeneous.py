"""What the benchmark of heterogeneous layouts says follows from what it measures."""

from dataclasses import replace

import heterogeneous
import pytest
from heterogeneous import CONTENDERS, LongDataset, bench_model
from heterogeneous_report import Case, Kind, Result, Row, Step, gain, least, verdict, wall

CASE = Case(length=64, share=0.5, images=8, sequences=4, encoder_flops=10, language_flops=20)


def row(kind: Kind, *seconds: float, turns: tuple[tuple[int, ...], ...] = ((0, 1),)) -> Row:
    """A layout on two ranks, the second of which works half as long."""
    steps = tuple(Step(each, (each, each / 2), boundary_bytes=1, link_bytes=None, loss=2.0) for each in seconds)
    return Row(kind, kind.value, turns, 4, 2, steps)


def said(*rows: Row) -> str:
    return "\n".join(verdict([Result(CASE, rows)]))


def test_the_smallest_case_runs_and_prints_every_layout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = {contender.kind: contender for contender in reversed(CONTENDERS)}
    monkeypatch.setattr(heterogeneous, "CONTENDERS", tuple(first.values()))
    heterogeneous.main([64], [0.5], rounds=1, width=32, image_side=2, markdown=True)
    lines = capsys.readouterr().out.splitlines()
    cells = {kind: line.split(" | ") for kind in Kind for line in lines if line.startswith(f"| {kind.value} |")}
    assert list(cells) == list(Kind)
    for kind, its in cells.items():
        assert its[1] == first[kind].label
        assert float(its[2].removesuffix(" s")) > 0
    (agreed,) = [line for line in lines if "losses of all layouts agree" in line]
    assert float(agreed.rpartition(" ")[2]) < 1e-5
    assert "colocated over the best homogeneous with a cut sequence, by the clock: " in "\n".join(lines)


@pytest.mark.parametrize(("length", "share", "images"), [(1024, 0.2, 3), (1024, 0.5, 8), (256, 0.8, 3)])
def test_sequences_have_the_length_and_the_share_asked_for(length: int, share: float, images: int) -> None:
    dataset = LongDataset(bench_model(32, 2), 4, length, share, 8)
    meta, (ids, labels) = dataset.meta(1), dataset.text(1)
    assert (meta.tokens, len(ids), len(meta.media)) == (length, length, images)
    assert int((labels == -100).sum()) == 64 * images == round(dataset.share * length)


def test_gains_are_taken_round_by_round() -> None:
    drifting, faster = row(Kind.HOMOGENEOUS, 1.0, 2.0, 4.0), row(Kind.COLOCATED, 0.8, 1.6, 3.2)
    its = gain(faster, drifting, wall)
    assert (its.median, its.least, its.most) == pytest.approx((0.25, 0.25, 0.25))


def test_the_least_step_of_modules_apart_holds_the_first_microbatch_of_both() -> None:
    together, apart = row(Kind.COLOCATED, 1.0), row(Kind.APART, 1.0, turns=((0,), (1,)))
    assert least(together, together.steps[0]) == 1.0
    assert least(apart, apart.steps[0]) == 1.0 + 0.5 / 4


@pytest.mark.parametrize(
    ("colocated", "words"),
    [
        ((1.0, 1.0), "by the clock: pays at 64 tokens, 50% media +100% (+100% … +100%)"),
        ((4.0, 4.0), "by the clock: does not pay at 64 tokens, 50% media -50% (-50% … -50%)"),
        ((1.0, 4.0), "by the clock: undecided, rounds differ, at 64 tokens, 50% media +25% (-50% … +100%)"),
    ],
)
def test_the_verdict_says_what_every_round_says(colocated: tuple[float, ...], words: str) -> None:
    text = said(
        row(Kind.HOMOGENEOUS, 3.0, 3.0),
        row(Kind.HOMOGENEOUS, 2.0, 2.0),
        row(Kind.COLOCATED, *colocated),
        row(Kind.APART, 2.0, 2.0),
    )
    assert f"\ncolocated over the best homogeneous with a cut sequence, {words}" in f"\n{text}"


def test_the_verdict_names_a_faster_homogeneous_layout_without_cp() -> None:
    rows = [row(kind, seconds) for kind, seconds in ((Kind.HOMOGENEOUS, 3.0), (Kind.COLOCATED, 2.0), (Kind.APART, 2.5))]
    assert "fastest of all is colocated (colocated)" in said(*rows)
    text = said(*rows, row(Kind.UNCUT, 1.0))
    assert "fastest of all is homogeneous, no cp (homogeneous, no cp), +100% (+100% … +100%) over the best colocated one" in text


def test_layouts_that_disagree_on_the_loss_are_found_out() -> None:
    rows = [row(kind, 1.0) for kind in (Kind.HOMOGENEOUS, Kind.COLOCATED, Kind.APART)]
    wrong = replace(rows[1], steps=(replace(rows[1].steps[0], loss=2.2),))
    assert "agree to 1e-01" in said(rows[0], wrong, rows[2])
