"""What does a model see of a sample? Its text with targets marked, media as what they are."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text


@dataclass(frozen=True)
class Piece:
    """A run of tokens of one sort."""

    text: str
    target: bool = False
    media_tokens: int = 0
    """Of one run of placeholders; 0 is text."""


def render_sample(name: str, pieces: Sequence[Piece], colour: bool) -> Text:
    """A sample for `rich.console.Console.print`: targets green, media blue; without colour, targets stand in ⟦ ⟧."""
    text = Text(f"{name}\n", style="bold", end="\n\n")
    for piece in pieces:
        if piece.media_tokens:
            text.append(f"[{piece.text} × {piece.media_tokens}]", style="bold blue")
        elif piece.target:
            text.append(piece.text if colour else f"⟦{piece.text}⟧", style="black on green")
        else:
            text.append(piece.text, style="not bold")
    return text
