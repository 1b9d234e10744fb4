"""How do numbers and ranks read? Short text for people, the same in every report."""

from collections.abc import Sequence

from meshweave.layout import format_ranks


def count_text(count: float) -> str:
    """Three digits and a decimal unit: `8,812`, `31.2 K`, `0.14 M`, `7.06 B`."""
    # M begins below one million: the numbers of one table then mostly read in the same unit.
    for least, size, unit in ((1e12, 1e12, "T"), (1e9, 1e9, "B"), (1e5, 1e6, "M"), (1e4, 1e3, "K")):
        if count >= least:
            return f"{_digits(count / size)} {unit}"
    return f"{count:,.0f}"


def bytes_text(size: float) -> str:
    """Three digits and a binary unit: `812 B`, `1.50 MiB`."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1000 * 1024 ** (power - 1):
            return f"{_digits(size / 1024**power)} {unit}"
    return f"{size:.0f} B"


def flops_text(flops: float) -> str:
    """Three digits and a decimal unit: `3.20 GFLOP`."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if flops >= size:
            return f"{_digits(flops / size)} {unit}FLOP"
    return f"{_digits(flops / 1e6)} MFLOP"


def seconds_text(seconds: float) -> str:
    """`0.42 s`, `48 s`, `3 min 05 s`, `2 h 11 min`."""
    if seconds < 60:
        return f"{_digits(seconds)} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def time_text(seconds: float) -> str:
    """Three digits and a unit that fits: `33.0 s`, `4.20 ms`, `812 µs`."""
    size, unit = time_unit(seconds)
    return f"{_digits(seconds / size) if seconds else 0} {unit}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Seconds and name of the unit in which a time reads best."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= 0.9995 * size:
            return size, unit
    return (1e-6, "µs") if seconds else (1.0, "s")


def ranks_text(ranks: Sequence[int], width: int = 24) -> str:
    """Ranks in order, shortened in the middle where their list would be longer than `width`: `0,8,…,504`."""
    text = format_ranks(tuple(ranks))
    return text if len(text) <= width else f"{ranks[0]},{ranks[1]},…,{ranks[-1]}"


def listing(parts: Sequence[str], most: int, separator: str = " │ ") -> str:
    """At most `most` of `parts`; the middle gives way, and the text says how many are left out."""
    if len(parts) > most:
        left_out = len(parts) - most + 1
        parts = [*parts[: most - 2], f"… {left_out} more …", parts[-1]]
    return separator.join(parts)


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
