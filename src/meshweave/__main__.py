"""`python -m meshweave`, and `torchrun -m meshweave`."""

from meshweave.cli import app

app()
