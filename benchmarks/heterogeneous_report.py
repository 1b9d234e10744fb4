"""How do the figures of `heterogeneous.py` read? Tables for a terminal or a README, and where heterogeneity paid."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median

from rich.console import Console
from rich.table import Table

from meshweave.report.text import bytes_text, flops_text


class Kind(Enum):
    """What a layout is an example of, in the order of the tables."""

    HOMOGENEOUS = "homogeneous, cp"
    """What the encoder can be under the language model's layout."""
    COLOCATED = "colocated"
    """The encoder has lanes of its own."""
    CUT_ALIKE = "cp for both"
    """Homogeneous, too, but only for towers that can be cut."""
    APART = "non-colocated"
    """The encoder has ranks of its own."""
    UNCUT = "homogeneous, no cp"
    """Where memory, nodes and key-value heads allow it."""


@dataclass(frozen=True)
class Step:
    """One measured step of one layout."""

    seconds: float
    """From the start of the first rank to the end of the last."""
    cpu_seconds: tuple[float, ...]
    """Of each rank's process."""
    boundary_bytes: int
    """Media tokens and their gradients from rank to rank, by the plan."""
    link_bytes: int | None
    """Of all messages between ranks, as the system counts them; None where it does not."""
    loss: float


@dataclass(frozen=True)
class Row:
    """A layout in one case."""

    kind: Kind
    label: str
    turns: tuple[tuple[int, ...], ...]
    """Sets of ranks that work on a microbatch one after another: all at once, or the encoder's and then the language model's."""
    microbatches: int
    allocated_ranks: int
    steps: tuple[Step, ...]
    """Of round after round; those of one round, of all rows, were taken one right after the other."""

    @property
    def used_ranks(self) -> int:
        """Ranks that work at all."""
        return len({rank for ranks in self.turns for rank in ranks})


@dataclass(frozen=True)
class Case:
    """What all layouts of a case work on in a step."""

    length: int
    share: float
    images: int
    """Of a sequence."""
    sequences: int
    encoder_flops: int
    """Model FLOPs of a step, done once."""
    language_flops: int

    @property
    def title(self) -> str:
        """Length and share of media tokens."""
        return f"{self.length:,} tokens, {self.share:.0%} media"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.length * self.sequences


@dataclass(frozen=True)
class Result:
    """A case and its rows."""

    case: Case
    rows: tuple[Row, ...]

    def of(self, *kinds: Kind) -> list[Row]:
        """Rows of these kinds."""
        return [row for row in self.rows if row.kind in kinds]

    @property
    def disagreement(self) -> float:
        """How much losses of the same step differ between layouts, relative."""
        rounds = zip(*(row.steps for row in self.rows), strict=True)
        losses = [[step.loss for step in steps] for steps in rounds]
        return max((max(its) - min(its)) / abs(min(its)) for its in losses)


Clock = Callable[[Row, Step], float]
"""What counts as the time of a step."""


def wall(row: Row, step: Step) -> float:
    """Seconds by the clock on the wall."""
    return step.seconds


def least(row: Row, step: Step) -> float:
    """Seconds where every rank has a core and messages cost but their CPU time; microbatches are all alike."""
    busy = sorted(max(step.cpu_seconds[rank] for rank in ranks) for ranks in row.turns)
    return busy[-1] + sum(busy[:-1]) / row.microbatches


def all_work(row: Row, step: Step) -> float:
    """CPU seconds of all ranks."""
    return sum(step.cpu_seconds)


def typical(row: Row, clock: Clock) -> float:
    """The median step."""
    return median(clock(row, step) for step in row.steps)


def fastest(rows: Iterable[Row], clock: Clock) -> Row:
    """The row whose median step is shortest."""
    return min(rows, key=lambda row: typical(row, clock))


@dataclass(frozen=True)
class Gain:
    """How much faster one layout is than another: 0.1 is 10 %. Compared round by round, so that drift cancels."""

    median: float
    least: float
    most: float

    @property
    def sure(self) -> bool:
        """Whether every round says the same."""
        return self.least > 0 or self.most < 0

    def __str__(self) -> str:
        return f"{self.median:+.0%} ({self.least:+.0%} … {self.most:+.0%})"


def gain(row: Row, over: Row, clock: Clock) -> Gain:
    """Of `row` over `over`."""
    ratios = [clock(over, other) / clock(row, step) - 1 for step, other in zip(row.steps, over.steps, strict=True)]
    return Gain(median(ratios), min(ratios), max(ratios))


HEADERS = (
    "median step",
    "tokens/s",
    "per used / allocated rank",
    "speed (best homogeneous, cp = 1)",
    "CPU s, all ranks",
    "least step, a core a rank",
    "boundary",
    "all messages",
)


def cells(row: Row, result: Result) -> tuple[str, ...]:
    """What a table says of a row, after its label."""
    seconds = typical(row, wall)
    best = fastest(result.of(Kind.HOMOGENEOUS), wall)
    rate = result.case.tokens / seconds
    links = [step.link_bytes for step in row.steps if step.link_bytes is not None]
    return (
        f"{seconds:.3f} s",
        f"{rate:,.0f}",
        f"{rate / row.used_ranks:,.0f} / {rate / row.allocated_ranks:,.0f}",
        "1" if row is best else f"{1 + gain(row, best, wall).median:.2f}",
        f"{typical(row, all_work):.2f}",
        f"{typical(row, least):.2f} s",
        bytes_text(row.steps[0].boundary_bytes),
        bytes_text(min(links)) if links else "?",
    )


def work_line(case: Case) -> str:
    """What a step of a case is, in model FLOPs."""
    return (
        f"{case.title} ({case.images} images a sequence): model FLOPs of a step, done once: encoder "
        f"{flops_text(case.encoder_flops)}, language model {flops_text(case.language_flops)} "
        f"(encoder / language model {case.encoder_flops / case.language_flops:.2f})"
    )


NOTES = (
    "Fewer cores than processes: a step takes as long as the work of all ranks together, on both sides of every comparison "
    "alike. Repeated work shows in full, and a rank that waits costs nothing, which flatters uneven and non-colocated layouts.",
    "CPU seconds do not depend on who waits for whom. The least step with a core a rank follows from them: the busiest rank's; "
    "where modules lie apart, the busier module's and the other's for one microbatch. Messages cost but CPU time in it.",
    "Without cp: dp 4 holds a whole sequence on one rank, which is what rules it out where sequences are long (one's "
    "activations exceed a GPU's memory); tp 4 ends at the GPUs of a node and at the key-value heads; from there on cp is needed. "
    "Both fit here.",
    "cp for both is one layout for both modules, too, but asks for a tower whose patches can be cut, and heads for every rank.",
    "Messages go through the loopback device, which makes tp, with the most and the most urgent of them, dearer than inside "
    "a node of GPUs: where a tp layout is the best homogeneous one, gains over it are too large, not too small.",
    "Messages: over the boundary by the plan, media tokens forward and their gradients back; all of them as the loopback device "
    "counts, with those of cp, tp, parameters and gradients.",
)


def report(console: Console, results: Sequence[Result], machine: str, command: str, markdown: bool) -> None:
    """Prints all cases and the verdict."""
    show = _markdown if markdown else _terminal
    show(console, results, machine, command)


def _terminal(console: Console, results: Sequence[Result], machine: str, command: str) -> None:
    console.print(machine)
    for result in results:
        console.print(f"\n{work_line(result.case)}")
        table = Table("", "layout", *HEADERS)
        for column in table.columns[2:]:
            column.justify = "right"
        for column in table.columns[:2]:
            column.no_wrap = True
        for kind in Kind:
            table.add_section()
            for number, row in enumerate(result.of(kind)):
                table.add_row("" if number else kind.value, row.label, *cells(row, result))
        console.print(table)
    console.print("\nVerdict", *(f"- {line}" for line in verdict(results)), sep="\n")
    console.print("\nHow to read it", *(f"- {line}" for line in NOTES), sep="\n")
    console.print(f"\nreproduce: {command}", soft_wrap=True)


def _markdown(console: Console, results: Sequence[Result], machine: str, command: str) -> None:
    lines = [f"Measured with `{command}` ({machine})."]
    for result in results:
        lines += ["", f"{work_line(result.case)}", ""]
        lines += [f"| | layout | {' | '.join(HEADERS)} |", f"| --- | --- |{' ---: |' * len(HEADERS)}"]
        for kind in Kind:
            for number, row in enumerate(result.of(kind)):
                group = "" if number else f" {kind.value}"
                lines.append(f"|{group} | {row.label} | {' | '.join(cells(row, result))} |")
    lines += ["", *(f"- {line}" for line in verdict(results)), "", *NOTES]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def verdict(results: Sequence[Result]) -> list[str]:
    """Where heterogeneity paid and where it did not, from these figures alone."""
    lines = []
    for kind, name in ((Kind.COLOCATED, "colocated"), (Kind.APART, "non-colocated")):
        for clock, how in ((wall, "by the clock"), (least, "with a core a rank")):
            found = [(result.case.title, _over_homogeneous(result, [kind], clock)) for result in results]
            lines.append(f"{name} over the best homogeneous with a cut sequence, {how}: {_judged(found)}")
    for result in results:
        best, colocated = fastest(result.rows, wall), fastest(result.of(Kind.COLOCATED), wall)
        over = "" if best is colocated else f", {gain(best, colocated, wall)} over the best colocated one"
        lines.append(f"{result.case.title}: fastest of all is {best.label} ({best.kind.value}){over}")
    worst = max(result.disagreement for result in results)
    lines.append(f"same samples, same weights: losses of all layouts agree to {worst:.0e}")
    return lines


def _over_homogeneous(result: Result, kinds: Sequence[Kind], clock: Clock) -> Gain:
    return gain(fastest(result.of(*kinds), clock), fastest(result.of(Kind.HOMOGENEOUS), clock), clock)


def _judged(found: Sequence[tuple[str, Gain]]) -> str:
    """Cases by what every round of them says, and the largest gain first."""
    ordered = sorted(found, key=lambda pair: -pair[1].median)
    parts = [
        (title, [f"{case} {its}" for case, its in ordered if test(its)])
        for title, test in (
            ("pays at", lambda its: its.sure and its.median > 0),
            ("does not pay at", lambda its: its.sure and its.median <= 0),
            ("undecided, rounds differ, at", lambda its: not its.sure),
        )
    ]
    return "; ".join(f"{title} {', '.join(cases)}" for title, cases in parts if cases)
