"""Render the results of report.measure as one HTML page. Each drawing has a table of its numbers.

page.html has the style sheet, the captions and the script of the interactive view. The colours are
Okabe and Ito's, for colour-blind readers; marks also differ in shape.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

Row = dict[str, Any]
PARTS = re.split(r"<!-- (\w+) -->\n", (Path(__file__).parent / "page.html").read_text("utf-8"))
TEXT = dict(zip(["head", *PARTS[1::2]], PARTS[::2], strict=True))  # part of page.html by its name
SINGULAR = {"thoughts": "thought", "pauses": "pause", "written chain": "word"}


def _fill(name: str, words: Mapping[str, Any]) -> str:
    """Return a part of page.html with each [[word]] replaced."""
    return re.sub(r"\[\[(\w+)\]\]", lambda match: str(words[match[1]]), TEXT[name])


def _cell(fig: Row | None, keys: Sequence[str] = ("lo", "n", "mass")) -> str:
    """Return "91.1 % (89.5 to 92.5, n = 1,400, mass 98.0 %)", without keys that fig lacks."""
    if fig is None:
        return ""
    text = {"lo": "{lo:.1f} to {hi:.1f}", "n": "n\xa0=\xa0{n:,}", "mass": "mass {mass:.1f}\xa0%"}
    values = {k: v if k == "n" else 100 * v for k, v in fig.items() if isinstance(v, int | float)}
    extra = ", ".join(text[key].format(**values) for key in keys if key in values)
    return f"{100 * fig['value']:.1f}\xa0%" + (f" ({extra})" if extra else "")


def sentence(finding: Row) -> str:
    """Return a finding's text with its figures and their intervals filled in."""
    cells = [_cell(fig, ("lo", "n")) for fig in finding["figures"]]
    return re.sub(r"\{(\d)\}", lambda match: cells[int(match[1])], finding["text"])


def _table(lines: Sequence[Sequence[Any]], kind: str = "") -> str:
    """Return a table of lines; the first entry of a line is its header."""
    rows = ""
    for name, *cells in lines:
        values = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
        rows += f"<tr><th>{escape(str(name))}</th>{values}</tr>"
    return f'<div class="wide"><table class="{kind}">{rows}</table></div>'


def _figure(title: str, text: str, drawing: str, lines: Sequence[Sequence[Any]]) -> str:
    return f"""<figure><h2>{escape(title)}</h2><p>{text}</p>{drawing}
<details><summary>Numbers of this figure</summary>{_table(lines)}</details></figure>
"""


def _points(points: Sequence[Row], *ends: str) -> str:
    """Draw fractions with their intervals on scales from 0 to 100 %, one line each."""
    lines = "<div>" + "".join(f"<span>{end}</span>" for end in ends) + "</div>"
    for point in points:
        kind = "dashed" if point.get("mass", 1) < 0.5 else point["id"]
        value, lo, hi = (100 * point.get(key, point["value"]) for key in ("value", "lo", "hi"))
        text = f"<span>{escape(point['label'])}</span> <span>{_cell(point, ('lo',))}</span>"
        interval = f'<i style="left:{lo:.1f}%;width:{hi - lo:.1f}%"></i>'
        lines += f'<div class="{kind}">{text}{interval}<b style="left:{value:.1f}%"></b></div>'
    return f'<div class="points">{lines}</div>'


def _heat(grid: Row, kind: str) -> str:
    """Draw a grid of figures as a table whose colours show the values."""
    names = (f"<b>{x}</b>" if x == grid.get("trained") else x for x in grid["columns"])
    lines = "<tr><th></th>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    for row in grid["rows"]:
        best = max([0.1, *(fig["value"] for fig in row["cells"] if fig)])
        lines += f"<tr><th>{escape(row['label'])}</th>"
        for fig in row["cells"]:
            if fig is None:
                lines += "<td></td>"
                continue
            mark = "dashed" if fig.get("mass", 1) < 0.5 else "best" if fig["value"] == best else ""
            about = f'class="{mark}" style="--v:{fig["value"]}" title="{_cell(fig)}"'
            lines += f"<td {about}>{100 * fig['value']:.0f}</td>"
        lines += "</tr>"
    return f'<table class="heat {kind}">{lines}</table>'


def _heats(title: str, text: str, *grids: tuple[str, Row, str]) -> str:
    """Return heat maps side by side. grids: (heading, grid, CSS class) each."""
    drawing, lines = "", []
    for heading, grid, kind in grids:
        drawing += f"<div><h3>{escape(heading)}</h3>{_heat(grid, kind)}</div>"
        lines.append([heading, *grid["columns"]])
        lines += [[row["label"], *map(_cell, row["cells"])] for row in grid["rows"]]
        lines += [[key, _cell(grid[key])] for key in ("free", "wrote_chain") if grid.get(key)]
    return _figure(title, text, f'<div class="pair">{drawing}</div>', lines)


def _layout(question: Row) -> Row:
    """Add each node's place in its level to a question: x from 0 to 1, and rank."""
    levels, x, rank = question["levels"], {}, {}
    for level in sorted(set(levels)):
        members = [i for i, other in enumerate(levels) if other == level]
        parents = {i: [x[a] for a, b in question["edges"] if b == i and a in x] for i in members}
        members.sort(key=lambda i: mean(parents[i] or [0]))  # place children under their parents
        for j, i in enumerate(members):
            x[i], rank[i] = round((j + 0.5) / len(members), 3), j
    nodes = range(len(levels))
    return question | {"x": [x[i] for i in nodes], "rank": [rank[i] for i in nodes]}


def _view(row: Row) -> str:
    questions = [_layout(question) for question in row["view"]]
    words = row | {"one": SINGULAR[row["noun"]]}
    data = json.dumps({"one": words["one"], "view": questions}, separators=(",", ":"))
    for sign in "<>&":  # a name must not end the script
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    titles = (escape(question["title"]) for question in questions)
    menu = "".join(f'<option value="{i}">{title}</option>' for i, title in enumerate(titles))
    caption = _fill("caption", words) + TEXT["chosen"] * (len(questions) > 1)
    return _fill("view", words | {"caption": caption, "menu": menu, "data": data})


def view_page(row: Row) -> str:
    """Return a page with only the interactive view. row: name, noun and view.

    PNG: chromium --headless --hide-scrollbars --window-size=1240,740 --screenshot FILE#0,1,0,all
    """
    title = f"The {row['noun']} of {escape(row['name'])}"
    return _fill("head", {"title": title}) + _view(row) + TEXT["tail"]


def _findings(row: Row, against: Row) -> str:
    """Return the findings as a list, each with the control's title for the same test."""
    controls = {finding["id"]: finding["title"] for finding in against.get("findings", ())}
    items = ""
    for f in row["findings"]:
        text = re.sub(r"(\([^()]*n\xa0=[^()]*\))", r"<small>\1</small>", escape(sentence(f)))
        if f["id"] in controls:
            text += f"<br /><small>{escape(against['name'])}: {escape(controls[f['id']])}</small>"
        mark = f["mark"].replace("part", "in part")  # of class part
        text = f"<b>{escape(f['title'])}</b> {text}"
        items += f'<li><span class="m {mark}">{mark}</span><div>{text}</div></li>'
    return f"<ol>{items}</ol>\n"


def _scale(row: Row, against: Row) -> str:
    label = f"… of {against.get('name')}"
    controls = {p["id"]: p | {"id": "control", "label": label} for p in against.get("scale") or ()}
    points = [x for p in row["scale"] for x in (p, controls.get(p["id"])) if x]
    drawing = _points(points, "0\xa0%: ignored", "50\xa0%: destroyed", "100\xa0%: carried")
    lines = [(point["label"], _cell(point)) for point in points]
    title = f"Does the answer change with the {row['noun']}?"
    return _figure(title, _fill("scale", row), drawing, lines)


def _write(row: Row) -> str:
    write, erase, words = row["write"], row["write"].get("erase") or [], row | row["write"]
    drawing = _points(write["points"], "0\xa0%: no change", "50\xa0%", "100\xa0%: all change")
    if erase:
        drawing += f"<p>{_fill('erase', words)}</p>"
        drawing += _points(erase, "0\xa0%", "50\xa0%: chance", "100\xa0%: no change")
    lines = [[point["label"], _cell(point)] for point in (*write["points"], *erase)]
    title = f"Can writing into a {row['one']} steer the answer?"
    return _figure(title, _fill("write", words), drawing, lines)


def _names(row: Row) -> str:
    names, grids = row["names"], []
    for side, who in (("own", "the entity"), ("other", "the twin’s entity")):
        bars = [[*bar, mass] for bar, mass in zip(names[side], names["mass"], strict=True)]
        bars = dict(enumerate(bars, 1)) | {"nodes": names[f"base_{side}"]}
        rows = [{"label": str(x), "cells": [{"value": v} for v in bars[x]]} for x in bars]
        grid = {"columns": [*names["distances"], "mass"], "rows": rows}
        grids.append((f"steps from {who}", grid, "names"))
    title = f"What does the LM head read in the {row['noun']}?"
    return _heats(title, _fill("names", row | {"n": f"{names['n']:,}"}), *grids)


def render(row: Row) -> str:
    """Return the page of a model's results as HTML. row["against"]: a control's, drawn in grey."""
    against, noun = row.get("against") or {}, row["noun"]
    row = row | {"one": SINGULAR[noun]}  # for the captions, like noun
    do = "Does" if noun == "written chain" else "Do"
    title = f"{do} the {noun} of {escape(row['name'])} do anything?"
    about = [row.get("method"), row.get("task")]
    about += [f"{row[key]:,} {key}" for key in ("thoughts", "parameters") if row.get(key)]
    body = [_fill("head", {"title": title}), f"<h1>{title}</h1>"]
    body.append(f'<p class="dim">{escape(" · ".join(filter(None, about)))}</p>')
    body += [f"<p><b>{escape(line)}</b></p>" for line in row.get("refused") or ()]
    body.append(_findings(row, against))
    body += [f'<p class="dim">{escape(line)}</p>' for line in row.get("warnings") or ()]
    body.append('<div class="pair">')
    body += [_scale(row, against)] if row.get("scale") else []
    titles = {"accuracy": f"How many {noun} are needed?", "slots": f"Which {row['one']} matters?"}
    for key, title in titles.items():
        if grid := row.get(key):
            text = _fill(key, row)
            if grid.get("free"):
                free = {name: _cell(grid[name], ("lo", "n")) for name in ("free", "wrote_chain")}
                text += _fill("free", row | free)
            grids = [(row["name"] if against else "", grid, key)]
            if against.get(key):
                grids.append((against["name"], against[key], f"{key} grey"))
            body.append(_heats(title, text, *grids))
    body += [_write(row)] if row.get("write") else []
    body.append("</div>\n")
    body += [draw(row) for key, draw in (("names", _names), ("view", _view)) if row.get(key)]
    if paper := row.get("paper"):
        body.append(TEXT["paper"] + '<div class="pair">')
        for key, grid in paper.items():
            text = f"{TEXT[key]} {escape(grid.get('note') or '')}"
            body.append(_heats(f"Figure {key[-1]}", text, ("", grid, "")))
        body.append("</div>\n")
    lines = [["checkpoint", row.get("checkpoint")], *row["provenance"].items()]
    return "".join([*body, _fill("reading", row), _table(lines, "about"), TEXT["tail"]])
