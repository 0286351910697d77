# SPDX-License-Identifier: Apache-2.0
"""`deeprob ...`: one file a command group. Importing this package imports neither torch nor rclpy."""

import os
import sys

import typer
from rich.console import Console
from rich.markup import escape

from deeprob_perception.errors import PerceptionError

app = typer.Typer(
    name="deeprob",
    help="Swin segmentation for ROS 2: train, export, replay, run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def main() -> None:
    """Run the command line; a PerceptionError becomes one line on stderr and exit status 2."""
    from deeprob_perception.cli import commands  # noqa: F401  registers every command on `app`

    try:
        app()
    except PerceptionError as error:
        if os.environ.get("DEEPROB_TRACEBACK"):
            raise
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
