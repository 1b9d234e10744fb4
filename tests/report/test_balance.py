"""Does the report on balance say what a person needs, in a terminal of 80 columns and as JSON?"""

import json
from io import StringIO

from rich.console import Console

from meshweave.batch.plan import MediaMeta, SampleMeta, deal_step, plan_step
from meshweave.batch.slots import Packing
from meshweave.report.balance import BalanceReport, Spread, Variant, render_balance
from meshweave.report.imbalance import imbalance


def report(**changes) -> BalanceReport:
    samples = [SampleMeta(n, 10 + 40 * (n % 5), (MediaMeta("vision", 4, 1.0),) * (n % 4)) for n in range(40)]
    lanes = {"microbatches": 2, "language_lanes": 2, "encoder_lanes": {"vision": 4}}
    rows, packed = Packing(), Packing(packed=True)
    steps = {
        "in order": (imbalance(deal_step(samples, **lanes), rows), 4.0),
        "planned": (imbalance(plan_step(samples, **lanes), rows), 2.0),
        "packed": (imbalance(plan_step(samples, **lanes, packing=packed), packed), 1.0),
    }
    values = {
        "samples": 40,
        "skipped": 0,
        "tokens": Spread.of([sample.tokens for sample in samples]),
        "media": {"vision": Spread.of([len(sample.media) for sample in samples])},
        "items": {"vision": 60},
        "microbatches": 2,
        "lanes": {"vision": 4, "language": 2},
        "passes": {"vision": 2},
        "max_tokens": 1000,
        "variants": tuple(Variant(name, name == "packed", (step, step), work) for name, (step, work) in steps.items()),
    }
    return BalanceReport(**values | changes)


def printed(found: BalanceReport, width: int = 80) -> str:
    console = Console(width=width, record=True, file=StringIO())
    console.print(render_balance(found))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    return text


def test_the_report_fits_80_columns_and_marks_what_the_run_file_asks_for():
    text = printed(report())
    assert "2 steps · 40 samples · 7,200 tokens · 60 vision items" in text
    assert "packed ◂" in text
    assert "4.00 ×" in text
    assert "vision passes" in text
    assert "fullest sequence 900 of train.max_tokens=1000 tokens (90%)" in text
    assert "left out" not in text


def test_what_a_run_does_not_have_is_left_out_and_what_it_skips_is_said():
    text = printed(report(passes={"vision": 1}, max_tokens=None, skipped=3))
    assert "vision passes" not in text
    assert "max_tokens" not in text
    assert "3 samples left out: unreadable, or too long" in text
    assert "vision" not in printed(report(media={}, items={}, passes={}, lanes={"language": 2}))


def test_json_holds_the_same_numbers():
    found = json.loads(json.dumps(report().as_dict()))
    assert (found["steps"], found["samples"], found["tokens"]) == (2, 40, 7200)
    assert found["tokens_per_sample"] == {"median": 90, "p90": 170, "most": 170}
    assert [variant["times_as_fast"] for variant in found["variants"]] == [1.0, 2.0, 4.0]
    assert found["variants"][2]["chosen"]
    assert found["variants"][2]["imbalance"]["language slots"] == {"ratio": 1.0, "at_least": 1.0}


def test_a_spread_names_values_that_occur():
    assert Spread.of([5, 1, 1, 1, 1, 1, 1, 1, 1, 9]) == Spread(1, 9, 9)
    assert Spread.of([]) == Spread(0, 0, 0)
