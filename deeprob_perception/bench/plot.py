# SPDX-License-Identifier: Apache-2.0
"""The picture of an engine report: milliseconds a frame by candidate, and where the machine's limits lie."""

from pathlib import Path
from typing import Any

# Readable in grey as well: engines dark, what users would run instead light.
ENGINE, PEER, LIMIT, BYTES = "#1f5f8b", "#b9c4cc", "#d1495b", "#8d6a9f"


def draw(report: dict[str, Any], path: Path) -> Path:
    """Write the plot (format by the suffix): bars to p50, whiskers to p95, marks at both limits of each one's precision."""
    from matplotlib.figure import Figure

    runs = sorted(report["runs"], key=lambda run: -run["p50"])
    several = len(report["models"]) > 1
    limits = {(limit["device"], limit["precision"]): limit for limit in report["limits"]}
    figure = Figure(figsize=(8, 1.3 + 0.36 * len(runs)), layout="constrained")
    axes = figure.subplots()
    widest = max(run["p95"] for run in runs)
    for y, run in enumerate(runs):
        axes.barh(y, run["p50"], color=PEER if run["peer"] else ENGINE, height=0.62, zorder=2)
        axes.plot([run["p50"], run["p95"]], [y, y], color="#444444", linewidth=1.2, zorder=3)
        axes.text(run["p95"] + widest * 0.012, y, f"{run['p50']:.1f} ms, {run['speedup']:.1f} x", va="center", fontsize=8)
        own = limits[run["device"], run["precision"]]
        for key, color in (("flop_ms", LIMIT), ("bytes_ms", BYTES)):
            if own[key] is not None:
                axes.plot([own[key]] * 2, [y - 0.42, y + 0.42], color=color, linewidth=2, zorder=4)
    for key, color, name in (("flop_ms", LIMIT, "FLOP limit"), ("bytes_ms", BYTES, "byte limit")):
        if any(limit[key] is not None for limit in report["limits"]):
            axes.plot([], [], color=color, linewidth=2, label=name)
    axes.barh(0, 0, color=ENGINE, label="engine")
    if any(run["peer"] for run in runs):
        axes.barh(0, 0, color=PEER, label="instead of it")
    names = [(f"{run['model']}, " if several else "") + f"{run['backend']} {run['precision']}" for run in runs]
    axes.set_yticks(range(len(runs)), names, fontsize=8)
    axes.set_xlim(0, widest * 1.22)
    axes.set_xlabel("ms a frame: bar to p50, whisker to p95", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e5e5e5", zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    model = report["models"][0]
    axes.set_title(f"{model['name']} {model['input'][1]}x{model['input'][2]} on {report['machine']['processor']}, "
                   f"{report['threads'] or 'all'} threads, {report['date'][:10]}", fontsize=9, loc="left")
    axes.legend(fontsize=8, frameon=False, loc="best")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None} if path.suffix == ".png" else None)
    return path
