"""The command line: one file a command."""

import typer

from meshweave.cli.balance import balance_command
from meshweave.cli.checkpoint import checkpoint_app
from meshweave.cli.data import data_app
from meshweave.cli.export import export_command
from meshweave.cli.init import init_command
from meshweave.cli.inspect import inspect_command
from meshweave.cli.simulate import simulate_command
from meshweave.cli.train import TrainCommand, train_command
from meshweave.cli.verify import verify_command

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    help="Train one multimodal model whose modules each have their own parallel layout and their own ranks.",
)

app.command("init")(init_command)
app.command("train", cls=TrainCommand)(train_command)
app.command("inspect")(inspect_command)
app.command("simulate")(simulate_command)
app.command("balance")(balance_command)
app.command("verify")(verify_command)
app.command("export")(export_command)
app.add_typer(data_app, name="data")
app.add_typer(checkpoint_app, name="checkpoint")
