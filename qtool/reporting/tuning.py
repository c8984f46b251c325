"""What tuning found, for people: the console's table, and one HTML page with the plot of bits against drift."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from markupsafe import Markup
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qtool.calibration.tune import Tuned
from qtool.calibration.tuned_recipe import RECIPE, TENSOR_TYPES
from qtool.console import unwrapped
from qtool.progress import duration
from qtool.reporting.plots import LEFT, RIGHT, WIDTH, Frame, drawing, line, path, ring, text

if TYPE_CHECKING:
    from qtool.calibration.held_out import Measured

_HEIGHT: Final = 300
_SHOWN: Final = 12


def bits_and_drift(result: Tuned) -> Markup:
    """Bits across, drift up: what was measured as rings, the prediction for `max` as a line, the floor of bf16 as another."""
    floor, *others = result.measured
    drifts = [each.centred for each in result.measured] + [drift for _, drift in result.predicted]
    bits = [each.bits for each in others] + [bits for bits, _ in result.predicted]
    frame = Frame.around((min(bits), max(bits)), (0, max(drifts) * 1.08 or 1.0), _HEIGHT)
    height = frame.y.at(floor.centred)
    parts = [
        frame.axes("bits per weight of the linears", f"drift of the {result.unit}, centred"),
        path([(frame.x.at(x), frame.y.at(y)) for x, y in result.predicted], "bound"),
        line((LEFT, height), (WIDTH - RIGHT, height), "zero"),
        text(WIDTH - RIGHT, height - 4, "bf16", "end"),
    ]
    for each in others:
        x, y = frame.x.at(each.bits), frame.y.at(each.centred)
        kind = "value pass" if each is others[-1] else "worst"
        parts += [ring(x, y, kind, f"{each.name}: {each.bits:.2f} bits, {each.centred:.4g}"), _label(x, y, each)]
    described = "; ".join(f"{each.name}, {each.bits:.2f} bits: {each.centred:.4g}" for each in result.measured)
    return drawing("Bits per weight and drift", described, _HEIGHT, *parts)


def _label(x: float, y: float, each: Measured) -> Markup:
    return text(x + 8, y + 4, each.name, "start") if x < WIDTH / 2 else text(x - 8, y + 4, each.name, "end")


def page(result: Tuned) -> str:
    """The page, which loads nothing."""
    groups = sorted(result.groups, key=lambda each: -each.centred)
    rows = Markup("").join(
        Markup("<tr><td>{}</td><td>{}</td><td>{:.4g}</td><td>{:.4g}</td><td>{}</td><td>{}</td></tr>").format(
            each.group,
            f"{each.weights:,}",
            each.centred,
            each.raw,
            "kept" if each.kept else "NVFP4",
            each.gguf_type or "",
        )
        for each in groups
    )
    measured = Markup("").join(
        Markup("<tr><td>{}</td><td>{:.2f}</td><td>{:.4g}</td><td>{:.4g}</td><td>{:.4g}</td></tr>").format(
            each.name, each.bits, each.centred, each.raw, each.bias
        )
        for each in result.measured
    )
    style = Markup(Path(__file__).with_name("report.css").read_text(encoding="utf-8"))  # noqa: S704 - our own file
    return str(
        _PAGE.format(
            title=result.name,
            style=style,
            headline=result.headline,
            plot=bits_and_drift(result),
            measured=measured,
            rows=rows,
            unit=result.unit,
            held_out=result.held_out,
            data=result.data,
            prompts=result.prompts,
        )
    )


_PAGE: Final = Markup("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body><main>
<h1>{title}</h1><p>{headline}</p>
<figure>{plot}<figcaption>Rings were measured on {held_out} held-out queries of {data}; the last one is the recipe found.
The line is the first-order prediction for <code>max</code> rounding with ever more groups kept; the level is the reference
in bf16.</figcaption></figure>
<h2>Measured</h2><table><thead><tr><th>recipe</th><th>bits</th><th>drift, centred</th><th>raw</th><th>bias</th></tr></thead>
<tbody>{measured}</tbody></table>
<h2>Fused groups, each rounded alone</h2><p>Change of the {unit} on {prompts} prompts, to first order, under
<code>max</code>.</p><table><thead><tr><th>group</th><th>weights</th><th>centred</th><th>raw</th><th>becomes</th>
<th>llama.cpp</th></tr></thead><tbody>{rows}</tbody></table>
</main></body></html>
""")


def pages(result: Tuned) -> Mapping[str, str]:
    """The files for people beside the recipe."""
    return {"tune.html": page(result)}


def tuning_table(result: Tuned, model: str) -> RenderableType:
    """The groups that matter most, what was measured, and what to do next with `model`."""
    if not result.measured:
        return Text(f"{result.headline}\nDry run: nothing was written.")
    return Group(_groups(result), Text(""), _measured(result), Text(""), *map(unwrapped, _closing(result, model)))


def _groups(result: Tuned) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("group, rounded alone", overflow="fold")
    for heading in ("weights", "centred", "raw", "becomes", "llama.cpp"):
        table.add_column(heading, justify="right", no_wrap=True)
    order = sorted(result.groups, key=lambda each: (not each.kept, -each.centred))
    for each in order[: max(_SHOWN, len(result.kept))]:
        name = each.group[max(each.group.find("layers."), 0) :]
        becomes = "kept" if each.kept else "NVFP4"
        numbers = (f"{each.weights:,}", f"{each.centred:.4g}", f"{each.raw:.4g}", becomes, each.gguf_type or "")
        table.add_row(*map(Text, (name, *numbers)))
    return table


def _measured(result: Tuned) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"drift of the {result.unit}, {result.held_out} queries held out", overflow="fold")
    for heading in ("bits", "centred", "raw", "bias"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in result.measured:
        table.add_row(
            *map(Text, (each.name, f"{each.bits:.2f}", *(f"{x:.4g}" for x in (each.centred, each.raw, each.bias))))
        )
    return table


def _closing(result: Tuned, model: str) -> Iterator[str]:
    yield result.headline
    yield from (f"WARNING: {warning}" for warning in result.warnings)
    if not result.met:
        yield f"WARNING: A drift of {result.max_drift:g} was not reached; {RECIPE} is the closest that was measured."
    if result.output is None:
        return
    next_one = shlex.join(["qtool", "quantize", model, "--recipe", str(result.output / RECIPE), "-o", "OUT"])
    yield f"Wrote {result.output} in {duration(result.seconds)}. Next: {next_one}"
    if any(each.gguf_type for each in result.groups):
        types = str(result.output / TENSOR_TYPES)
        gguf = ["qtool", "convert-gguf", model, "-o", "OUT.gguf", "--outtype", "q4_k_m", "--tensor-type-file", types]
        yield f"For llama.cpp: {shlex.join(gguf)}"
