"""A data check's report counts every sample once, names the first faults of a kind, and says whether a run would go through."""

import io
from pathlib import Path

from PIL import Image
from rich.console import Console

from meshweave.report.data import MOST_EXAMPLES, DataReport, Fault, SampleFacts, draw_data, render_data, summed
from meshweave.report.sample import Piece, render_sample


def text_of(renderable) -> str:
    out = io.StringIO()
    Console(file=out, width=100).print(renderable)
    return out.getvalue()


def good(sample: int, **changes) -> SampleFacts:
    return SampleFacts(sample, tokens=30, targets=5, media_tokens=16, sizes=((40, 60),), **changes)


def broken(sample: int) -> SampleFacts:
    return SampleFacts(sample, fault=Fault("broken file", f"{sample}.png [cut off]", left_out=False))


def long(sample: int) -> SampleFacts:
    return SampleFacts(sample, fault=Fault("too long", f"sample {sample} is too long", left_out=True))


def report(*facts: SampleFacts, **changes) -> DataReport:
    return summed(facts, "mix.jsonl", **{"decoded": True, "max_skipped": 0.05, "max_length": None} | changes)


def test_every_sample_is_counted_once() -> None:
    found = report(good(0), broken(1), long(2), good(3, effects=("reduced",)), broken(4))
    assert found.samples == 5
    assert found.tokens == [30, 30]
    assert found.pixels == [2400, 2400]
    assert found.faults == {"unreadable": {"broken file": 2}, "left out": {"too long": 1}}
    assert found.effects == {"reduced": 1}
    assert found.as_dict()["total"] == {"tokens": 60, "targets": 10, "media_tokens": 32}


def test_the_first_faults_of_a_kind_are_named_in_whatever_order_they_come() -> None:
    found = report(*(broken(sample) for sample in (9, 2, 7, 1, 5)))
    assert found.examples["broken file"] == ["1.png [cut off]", "2.png [cut off]", "5.png [cut off]"]
    shown = text_of(render_data(found))
    assert shown.count("[cut off]") == MOST_EXAMPLES
    assert "broken file" in shown


def test_what_is_left_out_on_purpose_does_not_stop_a_run_but_faults_do() -> None:
    assert report(*(good(sample) for sample in range(10)), *(long(sample) for sample in range(10, 20))).passed
    bad = [broken(sample) for sample in range(11)]
    assert not report(*(good(sample) for sample in range(100)), *bad).passed
    assert report(*(good(sample) for sample in range(100)), *bad, max_skipped=0.1).passed
    few = report(*(good(sample) for sample in range(10)), *bad[:2])
    assert few.passed
    assert "16.7% unreadable; a run goes on: of fewer than 200 samples" in text_of(render_data(few))
    assert not report(long(0), long(1)).passed
    assert "nothing is left to train on" in text_of(render_data(report(long(0))))


def test_headers_alone_are_said_to_be_headers_alone() -> None:
    assert "headers alone" in text_of(render_data(report(good(0), decoded=False)))


def test_histograms_are_drawn_also_of_nothing(tmp_path: Path) -> None:
    for number, found in enumerate((report(good(0), good(1), max_length=100), report(broken(0)))):
        path = tmp_path / f"{number}.png"
        draw_data(found, path)
        with Image.open(path) as picture:
            assert picture.width > 1000


def test_targets_are_marked_with_and_without_colour() -> None:
    pieces = [Piece("What [is] this? "), Piece("<image>", media_tokens=576), Piece("A cat.", target=True)]
    assert text_of(render_sample("sample 3", pieces, colour=False)).splitlines()[:2] == [
        "sample 3",
        "What [is] this? [<image> × 576]⟦A cat.⟧",
    ]
    assert "⟦" not in text_of(render_sample("sample 3", pieces, colour=True))
