"""Render the results of report.measure as one HTML page. Each drawing has a table of its numbers.

page.html is its Jinja template: style sheet, drawings, captions and the script of the interactive
view. The colours are Okabe and Ito's, for colour-blind readers; marks also differ in shape.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

Row = dict[str, Any]
SINGULAR = {"thoughts": "thought", "pauses": "pause", "written chain": "word"}


def cell(fig: Row | None, keys: Sequence[str] = ("lo", "n", "mass")) -> str:
    """Return "91.1 % (89.5 to 92.5, n = 1,400, mass 98.0 %)", without keys that fig lacks."""
    if fig is None:
        return ""
    text = {"lo": "{lo:.1f} to {hi:.1f}", "n": "n\xa0=\xa0{n:,}", "mass": "mass {mass:.1f}\xa0%"}
    values = {k: v if k == "n" else 100 * v for k, v in fig.items() if isinstance(v, int | float)}
    extra = ", ".join(text[key].format(**values) for key in keys if key in values)
    return f"{100 * fig['value']:.1f}\xa0%" + (f" ({extra})" if extra else "")


def sentence(finding: Row) -> str:
    """Return a finding's text with its figures and their intervals filled in."""
    cells = [cell(fig, ("lo", "n")) for fig in finding["figures"]]
    return re.sub(r"\{(\d)\}", lambda match: cells[int(match[1])], finding["text"])


def small(text: str) -> Markup:
    """Return the text as HTML, with intervals in small print."""
    return Markup(re.sub(r"(\([^()]*n\xa0=[^()]*\))", r"<small>\1</small>", str(escape(text))))


def layout(question: Row) -> Row:
    """Return the question with each node's place in its level: x from 0 to 1, and rank."""
    levels, x, rank = question["levels"], {}, {}
    for level in sorted(set(levels)):
        members = [i for i, other in enumerate(levels) if other == level]
        parents = {i: [x[a] for a, b in question["edges"] if b == i and a in x] for i in members}
        members.sort(key=lambda i: mean(parents[i] or [0]))  # place children under their parents
        for j, i in enumerate(members):
            x[i], rank[i] = round((j + 0.5) / len(members), 3), j
    nodes = range(len(levels))
    return question | {"x": [x[i] for i in nodes], "rank": [rank[i] for i in nodes]}


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def name_grids(names: Row) -> list[tuple[str, Row, str]]:
    """Return two grids of what the LM head reads: by steps from the entity, and from the twin's."""
    grids = []
    for side, entity in (("own", "the entity"), ("other", "the twin’s entity")):
        values = [[*row, mass] for row, mass in zip(names[side], names["mass"], strict=True)]
        values = dict(enumerate(values, 1)) | {"nodes": names[f"base_{side}"]}
        rows = [{"label": str(x), "cells": [{"value": v} for v in values[x]]} for x in values]
        grid = {"columns": [*names["distances"], "mass"], "rows": rows}
        grids.append((f"steps from {entity}", grid, "names"))
    return grids


def _render(row: Row, title: str, **variables: Any) -> str:
    folder = FileSystemLoader(Path(__file__).parent)
    env = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.policies["json.dumps_kwargs"] = {"separators": (",", ":")}  # not with sorted keys
    filters = (cell, sentence, small, percent, layout, name_grids)
    env.filters |= {fn.__name__: fn for fn in filters}
    env.tests["undecided"] = lambda fig: fig.get("mass", 1) < 0.5  # drawn dashed
    words = {"title": title, "one": SINGULAR[row["noun"]]}
    # the macros leave empty lines before <!DOCTYPE>
    return env.get_template("page.html").render(row, **words, **variables).lstrip()


def view_page(row: Row) -> str:
    """Return a page with only the interactive view. row: name, noun and view.

    PNG: chromium --headless --hide-scrollbars --window-size=1240,740 --screenshot FILE#0,1,0,all
    """
    return _render(row, f"The {row['noun']} of {row['name']}", view_only=True)


def render(row: Row) -> str:
    """Return the page of a model's results as HTML. row["against"]: a control's, drawn in grey."""
    verb = "Does" if row["noun"] == "written chain" else "Do"
    about = [row.get("method"), row.get("task")]
    about += [f"{row[key]:,} {key}" for key in ("thoughts", "parameters") if row.get(key)]
    control = row.get("against") or {}
    titles = {finding["id"]: finding["title"] for finding in control.get("findings", ())}
    label = f"… of {control.get('name')}"
    points = {p["id"]: p | {"id": "control", "label": label} for p in control.get("scale") or ()}
    grids = {}  # (heading, grid, CSS class) each
    for key in ("accuracy", "slots"):
        grids[key] = [(row["name"] if control else "", row.get(key), key)]
        if control.get(key):
            grids[key].append((control["name"], control[key], f"{key} grey"))
    return _render(
        row,
        f"{verb} the {row['noun']} of {row['name']} do anything?",
        about=" · ".join(filter(None, about)),
        findings=[finding | {"control": titles.get(finding["id"])} for finding in row["findings"]],
        scale=[x for p in row.get("scale") or () for x in (p, points.get(p["id"])) if x],
        grids=grids,
    )
