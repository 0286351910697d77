# SPDX-License-Identifier: Apache-2.0
"""`deeprob doctor`"""

import json
from pathlib import Path
from typing import Annotated

import typer

from deeprob_perception.cli import app


@app.command()
def doctor(
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the findings here, for a bug report.")] = None,
) -> None:
    """Look at everything that this package needs; exit status 1 when something needed is broken."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from deeprob_perception.doctor import models, ros, system
    from deeprob_perception.doctor.check import FAIL, OFF, OK, WARN, redacted, run

    console = Console()
    with console.status("looking"):
        checks = run([
            system.python, system.packages, ros.distribution, ros.middleware, ros.discovery, system.shared_memory,
            system.precisions, system.gpu, system.cuda, system.jetson, models.tensorrt, models.backends, models.models,
            models.cache, system.rendering, ros.optional,
        ])  # fmt: skip
    style = {OK: "green", OFF: "dim", WARN: "yellow", FAIL: "bold red"}
    table = Table("", "what", "found", show_header=False, box=None)
    for check in checks:
        advice = f"\n[{style[check.level]}]-> {escape(check.advice)}[/]" if check.advice else ""
        table.add_row(f"[{style[check.level]}]{check.level}[/]", check.name, escape(check.text) + advice)
    console.print(table)
    if json_out is not None:
        rows = [{key: redacted(value) for key, value in asdict(check).items()} for check in checks]
        json_out.write_text(json.dumps({"format": 1, "checks": rows}, indent=2) + "\n")
    if any(check.level == FAIL for check in checks):
        raise typer.Exit(1)
