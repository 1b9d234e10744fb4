"""How did a run end? The short summary printed after training."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from rich.text import Text

from meshweave.errors import FaultKind
from meshweave.report.text import bytes_text, count_text, flops_text, seconds_text


@dataclass(frozen=True)
class Crossing:
    """Mean bytes of one step over the links of one boundary, all ranks together."""

    forward_bytes: float
    backward_bytes: float


@dataclass(frozen=True)
class Summary:
    """What a finished run has to say; whatever a run does not have is left out of the table."""

    steps: int
    seconds: float
    """Of training, without start-up, first steps (their number counts, at the others' mean) and evaluation."""
    loss: float
    """Of the last step that had one, per target token."""
    tokens_per_second: float
    """Tokens of the language model's sequences, text and media, over all ranks; mean of the run."""
    flops: Mapping[str, float] = field(default_factory=dict)
    """Module to the model FLOPs of one step, forward and backward; mean of the run."""
    crossings: Mapping[str, Crossing] = field(default_factory=dict)
    """Encoder to what crosses from it to the language model and back."""
    skipped: int = 0
    """Samples that could not be read."""
    left_out: int = 0
    """Samples that limits left out, or that had nothing to learn from."""
    faults: Mapping[FaultKind, int] = field(default_factory=dict)
    """Why, by kind."""
    exact: int | None = None
    """Held-out samples answered exactly."""
    evaluated: int | None = None
    """Held-out samples; None without an evaluation."""
    eval_loss: float | None = None
    """Of the held-out samples, per target token."""
    loss_curve: Path | None = None
    timeline: Path | None = None
    """Of the traced step."""
    metrics: Path | None = None
    tensorboard: Path | None = None
    model: Path | None = None
    """Folder of the final model."""

    @property
    def accuracy(self) -> float | None:
        """Share of the held-out samples answered exactly; None without an evaluation."""
        return self.exact / self.evaluated if self.exact is not None and self.evaluated else None

    def flops_per_second(self, module: str) -> float:
        """Model FLOPs that the module does in one second of the run, over all ranks."""
        return self.flops[module] * self.steps / self.seconds if self.seconds else 0.0


def render_summary(summary: Summary) -> Table:
    """The summary, for `rich.console.Console.print`: one line a fact."""
    table = Table(box=None, show_header=False, pad_edge=False, title="Run finished", title_justify="left")
    table.title_style = "bold"
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    if summary.accuracy is not None:
        text = Text.assemble((f"{summary.accuracy:.1%}", "bold green"), f" exact ({summary.exact} of {summary.evaluated})")
        table.add_row("held-out answers", text)
    if summary.eval_loss is not None:
        table.add_row("held-out loss", f"{summary.eval_loss:.4f}")
    steps = f"{summary.steps:,} {'step' if summary.steps == 1 else 'steps'}"
    table.add_row("training", f"{steps} in {seconds_text(summary.seconds)}, last loss {summary.loss:.4f}")
    table.add_row("speed", f"{count_text(summary.tokens_per_second)} tokens/s")
    for name, flops in summary.flops.items():
        rate = flops_text(summary.flops_per_second(name))
        table.add_row(f"model FLOPs, {name}", f"{flops_text(flops)} a step, {rate}/s")
    for encoder, crossing in summary.crossings.items():
        there, back = bytes_text(crossing.forward_bytes), bytes_text(crossing.backward_bytes)
        table.add_row(f"boundary, {encoder}", f"{there} forward, {back} backward a step over links")
    kinds = ", ".join(f"{count:,} × {kind}" for kind, count in sorted(summary.faults.items(), key=lambda pair: -pair[1]))
    table.add_row("skipped samples", Text(f"{summary.skipped:,}", style="yellow" if summary.skipped else ""))
    if summary.left_out:
        table.add_row("left-out samples", f"{summary.left_out:,}")
    if kinds:
        table.add_row("why", kinds)
    places = (
        ("loss curve", summary.loss_curve),
        ("traced step", summary.timeline),
        ("metrics", summary.metrics),
        ("TensorBoard", summary.tensorboard),
        ("final model", summary.model),
    )
    for name, place in places:
        if place is not None:
            table.add_row(name, str(place))
    return table
