# SPDX-License-Identifier: Apache-2.0
"""Reports of `deeprob bench` as Markdown sections, and their place in docs/benchmarks.md."""

from pathlib import Path
from typing import Any


def cell(value: float | None, form: str) -> str:
    """Return a figure as text; nothing for what was not measured."""
    return "" if value is None else form.format(value)


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]


def measured_on(report: dict[str, Any]) -> str:
    """Return when, on what machine and with which versions a report was taken."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    facts = report["machine"]
    machine = ", ".join(f"{value} cores" if key == "cores" else value for key, value in facts.items())
    return f"{report['date']}, {machine}; {versions}."


def bag_name(report: dict[str, Any]) -> str:
    return f"{report['bag']['name']} (sha256 {report['bag']['sha256'][:16]})"


def engine_section(report: dict[str, Any], picture: str | None = None) -> str:
    """Return an engine report as a Markdown section.

    :param picture: the path of its plot, relative to the page.
    """
    model, several = report["models"][0], len(report["models"]) > 1
    work = report["work"]
    files = ", ".join(f"{m['name']} (sha256 {m['sha256'][:16]}, {m['precision']})" for m in report["models"])
    how = "mean cosine of features with those of" if report.get("agreement_of") == "features" else "labels equal to those of"
    lines = [
        f"### {model['name']}, {model['input'][1]}x{model['input'][2]}, {report['threads'] or 'all'} threads",
        "",
        measured_on(report),
        f"Model: {files}; {work['gflop']:.1f} GFLOP a frame, {work['weights'] / 1e6:.1f} M weights, "
        f"{work['activations'] / 1e6:.1f} M activations. Pictures: {bag_name(report)}.",
        f"{report['rounds']} rounds of {report['frames_a_turn']} frames, the candidates taking turns, each in a process of its "
        f"own. x: times faster than {report['baseline']}. Agreement: {how} {report['reference']}.",
        "",
    ]
    if picture:
        lines += [f"![Milliseconds a frame of {model['name']} by engine]({picture})", ""]
    heads = ["engine", "precision", "p50 ms", "p95", "p99", "x", "of FLOP limit", "of byte limit", "agreement",
             "first frame s", "cached", "MB", "peak MB"]
    rows = [engine_row(run, several) for run in report["runs"]]
    lines += table(["model", *heads] if several else heads, rows)
    lines += ["", "The limits, from what torch's large matrix product, the better of this and a large convolution (GFLOP/s), "
              "and a large copy reached between the turns:", ""]
    heads = ["device", "precision", "matmul GFLOP/s", "GFLOP/s", "FLOP limit ms", "MB a frame", "GB/s", "byte limit ms"]
    lines += table(heads, [limit_row(limit) for limit in report["limits"]])
    notes = [f"{device} in {precision}: no rate, {why}" for device, reasons in report["no_rate"].items()
             for precision, why in reasons.items()]
    notes += [f"{name}: {why}" for name, why in report["skipped"].items()]
    if notes:
        lines += ["", "Not measured:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def engine_row(run: dict[str, Any], several: bool) -> list[str]:
    cells = [run["model"]] * several + [run["backend"], run["precision"]]
    cells += [cell(run[key], "{:.1f}") for key in ("p50", "p95", "p99")]
    cells += [cell(run["speedup"], "{:.2f}"), cell(run["of_flop_limit"], "{:.2f} x"), cell(run["of_byte_limit"], "{:.2f} x")]
    cells += [cell(run["agreement"], "{:.3%}")]
    cells += [cell(run[key], "{:.2f}") for key in ("first_frame_s", "cached_first_frame_s")]
    return [*cells, *(cell(run[key], "{:.0f}") for key in ("memory_mb", "peak_mb"))]


def limit_row(limit: dict[str, Any]) -> list[str]:
    forms = {"matmul_gflops": "{:.0f}", "gflops": "{:.0f}", "flop_ms": "{:.1f}"}
    forms |= {"megabytes": "{:.0f}", "gb_per_s": "{:.1f}", "bytes_ms": "{:.1f}"}
    return [limit["device"], limit["precision"], *(cell(limit[key], form) or "n/a" for key, form in forms.items())]


def percentiles(summary: dict[str, float] | None) -> str:
    """Return `p50 / p95 / p99` of a summary in ms."""
    return " / ".join(f"{summary[key]:.1f}" for key in ("p50", "p95", "p99")) if summary and "p50" in summary else ""


def node_section(report: dict[str, Any]) -> str:
    """Return a node report as a Markdown section."""
    model, camera = report["model"], report["camera"]
    rows = [node_row(f"{run['rate_hz']:g} Hz, {run['seconds']:g} s", run) for run in report["rates"]]
    search = report["search"]
    if search and search["confirmed"]:
        confirmed = search["confirmed"]
        rows.append(node_row(f"**{search['highest_hz']:.1f} Hz** (highest), {confirmed['seconds']:g} s", confirmed))
    lines = [
        f"### The node: {model['name']}, {camera['width']}x{camera['height']} {camera['transport']}",
        "",
        measured_on(report),
        f"Model sha256 {model['sha256'][:16]}, {model['backend']} {model['precision']}, "
        f"{report['threads'] or 'all'} threads; {report['rmw']}. "
        f"Frames of {bag_name(report)}, published from memory.",
        "",
        *table(
            ["in", "sent", "masks", "overtaken", "lost", "loss", "stamp to publish ms, p50 / p95 / p99",
             "stamp to subscriber, p50 / p95 / p99", "engine, p50 / p95 / p99", "rest of the node, p50 / p95 / p99", "node MB"],
            rows,
        ),
        "",
        "A camera, the node and a subscriber are processes of their own, with real DDS between them. Overtaken: a newer frame "
        "came before the node had time. Lost: DDS reported it. Loss: of the frames sent, those without a mask.",
    ]  # fmt: skip
    if search:
        tried = ", ".join(f"{step['sent_hz']:.1f} ({step['loss']:.0%})" for step in search["steps"])
        lines += ["", f"Highest rate with less than {search['allowed_loss']:.0%} loss, by bisection in runs of "
                      f"{search['seconds']:g} s: {highest(search)}. Tried, Hz (loss): {tried}."]
    return "\n".join(lines) + "\n"


def highest(search: dict[str, Any]) -> str:
    return "none of those tried" if search["highest_hz"] is None else f"{search['highest_hz']:.1f} Hz"


def node_row(name: str, run: dict[str, Any]) -> list[str]:
    return [
        name, *(str(run[key]) for key in ("sent", "masks", "dropped", "lost_in_transport")), f"{run['loss']:.1%}",
        percentiles(run["stamp_to_publish"]), percentiles(run["stamp_to_receipt"]), percentiles(run["stages"].get("infer")),
        percentiles(run["stages"].get("overhead")), cell(run["node_memory_mb"], "{:.0f}"),
    ]  # fmt: skip


def write_section(path: Path, name: str, section: str) -> None:
    """Put a section between its markers in a Markdown file, in place of its last version."""
    begin, end = f"<!-- deeprob bench: {name} -->", f"<!-- end: {name} -->"
    block = f"{begin}\n{section}{end}\n"
    text = path.read_text() if path.is_file() else "# Benchmarks\n\nWritten by `deeprob bench ... --write-docs`.\n"
    if begin in text and end in text:
        head, _, rest = text.partition(begin)
        text = head + block + rest.partition(end)[2].lstrip("\n")
    else:
        text = text.rstrip("\n") + "\n\n" + block
    path.write_text(text)
