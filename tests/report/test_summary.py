"""Does the summary say everything a run has, and nothing it has not?"""

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from meshweave.report.summary import Crossing, Summary, render_summary

WHOLE = Summary(
    steps=400,
    seconds=80.0,
    loss=0.0213,
    tokens_per_second=30_912.3,
    flops={"vision": 2.1e9, "language": 8.4e9},
    crossings={"vision": Crossing(580 * 1024, 192 * 1024)},
    skipped=3,
    exact=287,
    evaluated=300,
    eval_loss=0.03,
    loss_curve=Path("runs/demo/loss.png"),
    metrics=Path("runs/demo/metrics.jsonl"),
    tensorboard=Path("runs/demo/tensorboard"),
    model=Path("runs/demo/model"),
)


def _lines(summary, width=80):
    out = StringIO()
    Console(file=out, width=width).print(render_summary(summary))
    return [re.sub(r"\s+", " ", line).strip() for line in out.getvalue().splitlines()]


def test_a_whole_run_reads_as_one_line_a_fact():
    assert _lines(WHOLE) == [
        "Run finished",
        "held-out answers 95.7% exact (287 of 300)",
        "held-out loss 0.0300",
        "training 400 steps in 1 min 20 s, last loss 0.0213",
        "speed 30.9 K tokens/s",
        "model FLOPs, vision 2.10 GFLOP a step, 10.5 GFLOP/s",
        "model FLOPs, language 8.40 GFLOP a step, 42.0 GFLOP/s",
        "boundary, vision 580 KiB forward, 192 KiB backward a step over links",
        "skipped samples 3",
        "loss curve runs/demo/loss.png",
        "metrics runs/demo/metrics.jsonl",
        "TensorBoard runs/demo/tensorboard",
        "final model runs/demo/model",
    ]


def test_what_a_run_does_not_have_is_left_out():
    bare = Summary(steps=1, seconds=2.0, loss=3.0, tokens_per_second=10.0)
    assert _lines(bare) == [
        "Run finished",
        "training 1 step in 2.00 s, last loss 3.0000",
        "speed 10 tokens/s",
        "skipped samples 0",
    ]
    assert bare.accuracy is None


def test_no_exact_answer_is_an_accuracy_of_zero_and_no_held_out_samples_are_none():
    assert Summary(1, 1.0, 1.0, 1.0, exact=0, evaluated=10).accuracy == 0.0
    assert Summary(1, 1.0, 1.0, 1.0, exact=0, evaluated=0).accuracy is None


def test_a_path_is_never_cut():
    deep = Path("/very" + "/long" * 20 + "/model")
    printed = "".join(line.replace("final model", "").strip() for line in _lines(Summary(1, 1.0, 1.0, 1.0, model=deep))[4:])
    assert printed == str(deep)


def test_a_run_without_measured_time_has_no_rate_instead_of_a_division_by_zero():
    assert Summary(1, 0.0, 1.0, 0.0, flops={"vision": 1.0}).flops_per_second("vision") == 0.0
