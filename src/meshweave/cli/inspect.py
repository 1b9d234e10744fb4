"""`meshweave inspect`: what would a run look like?"""

from rich.console import Console

from meshweave.cli.common import Overrides, RunFile, load_run, run_command


def inspect_command(run_file: RunFile, overrides: Overrides = None) -> None:
    """Print which rank holds which part of which module, lanes, groups, boundary bytes, parameters. Starts no process."""
    from meshweave.preview.inspect import inspect_run

    def work() -> None:
        inspect_run(load_run(run_file, overrides, "config"), Console())

    run_command(work)
