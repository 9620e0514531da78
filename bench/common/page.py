"""One HTML page about a row of insight.py. Used by insight.py and sample.py; nothing is measured.

The page is one file without network or libraries: inline SVG, a short script for the view, and a
table with the numbers of every figure. Colours are Okabe and Ito's; marks differ in shape too.
"""

import json
import re
from collections.abc import Sequence
from html import escape
from statistics import mean
from typing import Any

Row = dict[str, Any]
MARKS = {"yes": "yes", "part": "in part", "no": "no", "?": "?", "note": "note"}
ONE = {"thoughts": "thought", "pauses": "pause", "written chain": "word"}
OUTLINES = {"t": "M0-7L7 0 0 7-7 0Z", "s": "M-5-5H5V5H-5Z", "x": "M-5 0A5 5 0 0 1 5 0A5 5 0 0 1-5 0"}
SHAPES = {"twin": "t", "other_other": "t", "other": "t", "same_other": "s"}  # else a control
TEXT = {
    "scale": """Share of answers that change to the other option if only the {noun} are replaced
and the question stays: 0&#160;% if they are ignored, 50&#160;% (a coin’s toss) if what they held is
destroyed, 100&#160;% if they carry the answer. Lines: 95&#160;% intervals.""",
    "accuracy": """Accuracy (%) if the answer must follow after so many {noun}. White is chance,
50&#160;%. Hollow: the two options have less than half of the probability, so the cell decides
nothing. “plain”: questions as in training, which a shortcut can answer too.""",
    "slots": """Answers (%) that change if the cached state of this one {one} is replaced by the
other entity’s. Framed: the largest of a row.""",
    "names": """What the LM head names when it reads a {one} directly: shares of the probability on
nodes of the graph, by steps from the entity. Right: the raw probability on all nodes, for a share
of little is little. Last bar: how many of the nodes are that far.""",
    "write": """Answers that change if {one} {thought} is replaced by the mean {one} plus {factor}
times the mean embedding of some nodes {distance} step away.""",
    "erase": "Answers that stay right if one branch is projected out of {one} {thought}.",
    "view": """Area of a circle: raw probability that the {one} names this node, read by the LM
head. Width of an edge: first-layer attention to this fact. Orange square: the entity whose {noun}
these are. Rings: the two options. Questions are the first of each depth and the first wrong ones;
none was chosen by its looks.""",
    "paper": """These figures show what a model would say, not what it uses: a model with pauses
instead of thoughts, which cannot search, draws the same frontier.""",
    "reading": """Each test replaces the {noun} of a question and looks at its answer only. The
<i>twin</i> of a question is the same text asked about the other entity: one word differs, and the
other option is right. Answers are forced: the model has to choose one of the two options at once,
for if left to itself it can write the steps that the {noun} should hold. Questions of one step are
kept apart; they need no {noun}. Intervals are Wilson’s, 95&#160;%, and a verdict needs the whole
interval on its side (rules: nanococonut/evaluation/insight.py).""",
    "limits": """One checkpoint is one training run; another seed can differ. What can be read from
{noun} need not be used. With two options, an answer that changes in half of the cases is destroyed,
not moved. Left out, because they mislead: single {noun} removed (redundancy hides their use), their
cached order permuted (attention has none), noise (it measures margin), and probes.""",
}
CSS = """
:root{--bg:#fff;--ink:#222;--dim:#666;--line:#c8c8c8;--soft:#f3f4f6;--s:#0072b2;--t:#d55e00;
--edge:#e69f00;--on:#fff;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--bg:#16181c;--ink:#e6e6e6;--dim:#a0a4ab;
--line:#50545b;--soft:#24272d;--s:#56b4e9;--t:#ff8a3d;--on:#111}}
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:0 auto;padding:1rem;
color:var(--ink);background:var(--bg);overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0}h2{font-size:1.15rem;margin:2rem 0 .25rem}
h3{font-size:.95rem;margin:.5rem 0 0}p{margin:.25rem 0 .5rem}small,.dim{color:var(--dim)}
figure,section{margin:0;min-width:0;break-inside:avoid}figure>p{font-size:.92rem}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:0 2rem}
svg{display:block;width:100%;height:auto;font-size:12px;fill:var(--ink)}figure svg{max-width:27rem}
ol{list-style:none;padding:0}li{display:flex;gap:.75rem;margin:.6rem 0;break-inside:avoid}
.m{flex:none;width:3.6rem;height:1.5em;border-radius:.3rem;font-size:.8rem;font-weight:bold;
text-align:center;color:#000;margin-top:.2em;print-color-adjust:exact}.yes{background:#009e73}
.part{background:#e69f00}.no{background:#d55e00}.q{background:#bbb}.note{background:#56b4e9}
.d,.x{fill:var(--dim)}.g{stroke:var(--line)}.b{font-weight:bold}.s{fill:var(--s)}.t{fill:var(--t)}
.on{fill:var(--on)}.f{stroke:var(--ink);fill:none;stroke-width:1.5}.o{stroke:var(--dim);fill:none;
stroke-dasharray:3 3}.n{fill:var(--line)}.e{text-anchor:end}.c{text-anchor:middle}
.halo{paint-order:stroke;stroke:var(--bg);stroke-width:3px}.ci{stroke-width:3}.sl{stroke:var(--s)}.tl{stroke:var(--t)}.xl{stroke:var(--dim)}

details{font-size:.85rem;margin:.25rem 0 1rem}summary{cursor:pointer;color:var(--dim)}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.1rem .5rem;text-align:right;
border-bottom:1px solid var(--line);white-space:nowrap;font-weight:normal}
th:first-child{text-align:left}#bar{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;background:
var(--soft);align-items:center;padding:.5rem .75rem;border-radius:.4rem}#bar label{display:flex;
gap:.4rem;align-items:center}#q{max-width:100%;font:inherit}#k{width:9rem}#say{min-height:3em}
#all{display:none;grid-template-columns:repeat(auto-fill,minmax(17rem,1fr));gap:.5rem 1.5rem;
font-size:.85rem}.all #all{display:grid}.all #one,.all #bar,.all #say,.all details{display:none}
@media print{body{max-width:none;padding:0;font-size:10pt}#all{display:grid}#one,#bar,#say,
details{display:none}h2{break-after:avoid}#all div{break-inside:avoid}@page{margin:1.5cm}}
"""
SCRIPT = """
const {one, noun, view} = JSON.parse(document.getElementById('data').textContent);
const $ = id => document.getElementById(id), pc = p => (100 * p).toFixed(1) + '\\u00a0%';
const esc = text => new Option(text).innerHTML;
let q, k, swap, mode;
function picture(Q, S, W) {
  const R = W < 500 ? 22 : 28, count = [], top = [], root = i => i === Q.entity || i === Q.other;
  Q.levels.forEach(l => count[l] = (count[l] || 0) + 1);
  const crowded = count.map(n => n * 70 > W - 40);  // two lines, so that names do not collide
  const H = count.reduce((y, n, l) => (top[l] = y, y + 2.9 * R + 44 * crowded[l]), 28);
  const X = i => 36 + Q.x[i] * (W - 72), p = i => S.p ? S.p[i] : 0;
  const Y = i => top[Q.levels[i]] + 44 * (crowded[Q.levels[i]] && Q.rank[i] % 2);
  const r = i => root(i) ? 6 : Math.max(3, R * Math.sqrt(p(i)));
  const edges = Q.edges.map(([a, b], e) => {
    const w = S.attention ? S.attention[e] : 0, dx = X(b) - X(a), dy = Y(b) - Y(a);
    const bend = Q.levels[a] === Q.levels[b] ? .25 : .06;
    const cx = X(a) + dx / 2 + bend * dy, cy = Y(a) + dy / 2 - bend * Math.abs(dx);
    const end = (r(b) + 4) / (Math.hypot(X(b) - cx, Y(b) - cy) || 1);
    const to = [X(b) - end * (X(b) - cx), Y(b) - end * (Y(b) - cy)].map(Math.round);
    return `<path d="M${X(a)} ${Y(a)}Q${cx} ${cy} ${to}" fill="none" marker-end="url(#tip)" `
      + `stroke="var(--${w < .02 ? 'line' : 'edge'})" stroke-width="${1 + 9 * w}">`
      + `<title>${esc(Q.nodes[a])} to ${esc(Q.nodes[b])}: ${pc(w)}</title></path>`;
  });
  const nodes = Q.nodes.map((name, i) => {
    const x = X(i), y = Y(i), whose = i === (swap ? Q.other : Q.entity);
    const option = Q.candidates.includes(name), value = p(i) < .005 ? '' :
      `<tspan x="${x}" dy="13" class="d">${Math.round(100 * p(i))} %</tspan>`;
    return `<g><title>${esc(name)}: ${pc(p(i))}</title>` + (root(i)
      ? `<rect x="${x - 6}" y="${y - 6}" width="12" height="12" class="${whose ? 't' : 'x'}"/>`
      : `<circle cx="${x}" cy="${y}" r="${r(i)}" class="${value ? 's' : 'x'}"/>`)
      + (option ? `<circle cx="${x}" cy="${y}" r="${r(i) + 3}" class="f"/>` : '')
      + `<text x="${x}" y="${root(i) ? y - 12 : y + r(i) + 15}" class="c halo `
      + `${option || whose ? 'b' : ''}">${esc(name)}${value}</text></g>`;
  });
  const label = Q.nodes.map((name, i) => `${name} ${pc(p(i))}`).join(', ');
  return `<svg viewBox="0 0 ${W} ${H}" role="img" aria-label="${esc(label)}">`
    + edges.join('') + nodes.join('') + '</svg>';
}
function answer(Q, S) {
  const best = Q.candidates[S.answer[0] < S.answer[1] ? 1 : 0];
  return `<b>${esc(best)}</b> (${best === Q.answer ? 'right' : 'wrong'}; `
    + Q.candidates.map((c, i) => `${esc(c)} ${pc(S.answer[i])}`).join(', ') + ')'
    + (S.says ? `. Left to itself it writes: ${esc(S.says)}` : '');
}
function show() {
  const Q = view[q] || view[q = 0];
  swap = Q.swapped ? +swap : 0;
  const states = swap ? Q.swapped : Q.states, whose = swap ? ` of ${esc(Q.nodes[Q.other])}` : '';
  k = Math.max(0, Math.min(k || 0, states.length - 1));
  const after = i => `After ${i} ${i === 1 ? one : noun}${whose}: ${answer(Q, states[i])}`;
  Object.assign($('k'), {max: states.length - 1, value: k});
  Object.assign($('swap'), {checked: swap, disabled: !Q.swapped});
  $('q').value = q;
  $('of').textContent = `${k} of ${states.length - 1}`;
  $('one').innerHTML = picture(Q, states[k], Math.max(320, $('one').clientWidth));
  $('say').innerHTML = `${esc(Q.question)} ${after(k)}`;
  $('all').innerHTML = states.map((S, i) => `<div>${after(i)}${picture(Q, S, 320)}</div>`).join('');
  const line = (name, f) => `<tr><th>${esc(name)}</th>` + states.map(
    S => `<td>${f(S) === undefined ? '' : pc(f(S))}</td>`).join('') + '</tr>';
  $('numbers').innerHTML = `<tr><th>after</th>${states.map((S, i) => `<th>${i}</th>`).join('')}</tr>`
    + Q.candidates.map((c, i) => line(`answer ${c}`, S => S.answer[i])).join('')
    + Q.nodes.map((name, i) => line(name, S => S.p?.[i])).join('')
    + Q.edges.map(([a, b], e) => line(`${Q.nodes[a]} to ${Q.nodes[b]}`, S => S.attention?.[e])).join('');
  document.body.className = mode || '';
  history.replaceState(null, '', '#' + [q, k, swap, ...mode ? [mode] : []]);
}
function read() {
  [q, k, swap, mode] = (location.hash.slice(1) || '0,1,0').split(',').map(v => +v + 1 ? +v : v);
  show();
}
$('q').onchange = e => (q = +e.target.value, show());
$('k').oninput = e => (k = +e.target.value, show());
$('swap').onchange = e => (swap = +e.target.checked, show());
document.onkeydown = e => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[e.key];
  if (step && !e.target.closest('select, #k')) (k += step, show());
};
onhashchange = read;
onresize = show;
read();
"""


# ---- text and tables


def _percent(value: float) -> str:
    return f"{100 * value:.1f}\xa0%"


def _interval(fig: Row) -> str:
    """Return "89.5 to 92.5, n = 1,400", or what the figure has of it."""
    ends = f"{100 * fig['lo']:.1f} to {100 * fig['hi']:.1f}" if fig.get("lo") is not None else ""
    return ", ".join(filter(None, (ends, f"n\xa0=\xa0{fig['n']:,}" if fig.get("n") else "")))


def _cell(fig: Row | None) -> str:
    """Return a figure as one cell of a table: value, interval, n and mass."""
    if fig is None:
        return ""
    mass = f"mass {_percent(fig['mass'])}" if fig.get("mass") is not None else ""
    extra = "; ".join(filter(None, (_interval(fig), mass)))
    return _percent(fig["value"]) + (f" ({extra})" if extra else "")


def sentence(finding: Row, *, html: bool = False) -> str:
    """Return a finding as text, its figures filled in with their intervals."""

    def fill(match: re.Match[str]) -> str:
        fig = finding["figures"][int(match[1])]
        value, extra = _percent(fig["value"]), _interval(fig)
        extra = f" <small>({extra})</small>" if html and extra else f" ({extra})" if extra else ""
        return (f"<b>{value}</b>" if html else value) + extra

    title, text = (escape(t) if html else t for t in (finding["title"], finding["text"]))
    return f"<b>{title}</b> " * html + f"{title} " * (not html) + re.sub(r"\{(\d)\}", fill, text)


def _table(head: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a folded table; the first entry of a row names it."""
    lines = ["".join(f"<th>{escape(str(h))}</th>" for h in head)]
    for name, *cells in rows:
        values = (c if isinstance(c, str) else _percent(c) for c in cells)
        row = "".join(f"<td>{escape(v)}</td>" for v in values)
        lines.append(f"<th>{escape(str(name))}</th>{row}")
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    summary = "<summary>Numbers of this figure</summary>"
    return f'<details>{summary}<div class="wide"><table>{body}</table></div></details>'


def _figure(title: str, text: str, drawing: str, table: str) -> str:
    head = f"<h2>{title}</h2>" if title else ""
    return f"<figure>{head}<p>{text}</p>{drawing}{table}</figure>"


# ---- drawings, 400 units wide so that text stays readable on a phone


def _text(x: float, y: float, text: object, kind: str = "") -> str:
    return f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}">{escape(str(text))}</text>'


def _svg(height: float, label: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 400 {height:.0f}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _points(rows: Sequence[Row], ends: Sequence[str]) -> str:
    """Draw shares from 0 to 100 % with their intervals, a line each."""
    height, parts = 40 * len(rows) + 24, []
    for x, side, end in zip((10, 200, 390), ("", "c", "e"), ends, strict=True):
        parts += [_text(x, 12, end, f"d {side}"), f'<path d="M{x} 18V{height}" class="g"/>']
    for y, row in zip(range(38, height, 40), rows, strict=True):
        kind = SHAPES.get(row["id"], "x")
        x, lo, hi = (10 + 380 * row.get(key, row["value"]) for key in ("value", "lo", "hi"))
        parts += [
            _text(16, y, row["label"], "halo"),
            _text(384, y, _cell(row).partition(", n")[0] + ")" * ("lo" in row), f"halo e {kind}"),
            f'<path d="M{lo:.1f} {y + 12}H{hi:.1f}" class="ci {kind}l"/>',
            f'<path transform="translate({x:.1f} {y + 12})" d="{OUTLINES[kind]}" class="{kind}"/>',
        ]
    return _svg(height, "; ".join(f"{r['label']} {_percent(r['value'])}" for r in rows), parts)


def _heat(grid: Row, label: str, kind: str, zero: float = 0.0, frame: bool = False) -> str:
    """Draw a grid of figures, from white at `zero` to full colour at 100 %."""
    left = 12 + 6.5 * max(len(row["label"]) for row in grid["rows"])
    width, parts = (400 - left) / len(grid["columns"]), []
    for j, column in enumerate(grid["columns"]):
        bold = "b" if column == grid.get("trained") else "d"
        parts.append(_text(left + width * (j + 0.5), 12, column, f"c {bold}"))
    for y, row in zip(range(20, 9999, 28), grid["rows"], strict=False):
        parts.append(_text(left - 8, y + 17, row["label"], "e"))
        best = max((fig["value"] for fig in row["cells"] if fig), default=0)
        for j, fig in enumerate(row["cells"]):
            if fig is None:
                continue
            hollow = fig.get("mass") is not None and fig["mass"] < 0.5
            shade = 0 if hollow else max(0, (fig["value"] - zero) / (1 - zero))
            where = f'x="{left + width * j + 1:.1f}" y="{y + 1}" width="{width - 2:.1f}" height="25"'
            fill = 'class="o"' if hollow else f'class="{kind}" fill-opacity="{shade:.2f}"'
            value = _text(left + width * (j + 0.5), y + 17, f"{100 * fig['value']:.0f}",
                          "c d" if hollow else "c on" if shade > 0.6 else "c")  # fmt: skip
            edge = f'<rect {where} class="f"/>' if frame and 0.1 < best == fig["value"] else ""
            parts.append(f"<g><title>{_cell(fig)}</title><rect {where} {fill}/>{edge}{value}</g>")
    return _svg(22 + 28 * len(grid["rows"]), f"{label}; the numbers are in the table", parts)


def _stack(rows: Sequence[tuple[str, Sequence[float], str]], names: Sequence[str]) -> str:
    """Draw a bar of shares for each row: its label, shares and a note at the right."""
    parts = []
    for y, (label, shares, note) in zip(range(0, 9999, 26), rows, strict=False):
        parts += [_text(44, y + 16, label, "e"), _text(352, y + 16, note, "d")]
        x = 50.0
        for i, (name, share) in enumerate(zip(names, shares, strict=True)):
            width, last = 296 * share, i == len(names) - 1
            shade = 1 if last else (1, 0.75, 0.5, 0.32, 0.2, 0.12)[min(i, 5)]
            fits = width > 7 * len(name) + 2
            tone = "c on" if shade > 0.6 and not last else "c"
            parts.append(
                f'<g><title>{escape(name)}: {_percent(share)}</title><rect x="{x:.1f}" y="{y + 1}" '
                f'width="{max(0, width - 1):.1f}" height="22" class="{"n" if last else "s"}" '
                f'fill-opacity="{shade}"/>'
                + _text(x + width / 2, y + 16, name, tone) * fits + "</g>"
            )  # fmt: skip
            x += width
    return _svg(26 * len(rows), f"shares by {', '.join(names)}; see the table", parts)


def _curves(fig: Row) -> str:
    """Draw Figure 8: the three cumulative values by percentile."""
    parts = [_text(24, y + 4, f"{v:g}", "e d") for y, v in ((10, 1), (85, 0.5), (160, 0))]
    parts += [f'<path d="M30 {y}H395" class="g"/>' for y in (10, 85, 160)]
    parts += [_text(x, 176, f"{p} %", "c d") for x, p in ((45, 0), (212, 50), (380, 100))]
    for key, dash, colour in (("top1", "", "t"), ("top2", "6 3", "s"), ("top3", "2 3", "x")):
        points = " ".join(
            f"{30 + 3.65 * x:.0f},{160 - 150 * y:.1f}"
            for x, y in zip(fig["percentiles"], fig[key], strict=True)
        )
        line = f'stroke-dasharray="{dash}" stroke-width="2" fill="none"'
        parts.append(f'<polyline points="{points}" class="{colour}l" {line}/>')
    return _svg(180, f"values {fig['label']} by percentile; see the table", parts)


# ---- the view


def _layout(question: Row) -> Row:
    """Return the question with each node's place in its level: x from 0 to 1, and rank."""
    levels, n = question["levels"], len(question["nodes"])
    x, rank = [0.5] * n, [0] * n
    for level in sorted(set(levels)):
        members = [i for i in range(n) if levels[i] == level]
        for i in members:  # below its parents
            x[i] = mean([x[a] for a, b in question["edges"] if b == i and levels[a] < level] or [i / n])
        members.sort(key=x.__getitem__)
        for j, i in enumerate(members):
            x[i], rank[i] = round(0.75 * (j + 0.5) / len(members) + 0.25 * x[i], 3), j
    return question | {"x": x, "rank": rank}


def _view(row: Row, words: Row) -> str:
    data = json.dumps(words | {"view": [_layout(q) for q in row["view"]]}, separators=(",", ":"))
    for sign in "<>&":  # so that no name ends the script
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    menu = "".join(
        f'<option value="{i}">{escape(q["title"])}</option>' for i, q in enumerate(row["view"])
    )
    return f"""<section><h2>See it search</h2><p class="dim">{TEXT["view"].format(**words)}</p>
<div id="bar"><select id="q" aria-label="question">{menu}</select>
<label>{words["one"]} <input type="range" id="k" min="0" max="9" /> <output id="of"></output></label>
<label><input type="checkbox" id="swap" /> with the other entity’s {words["noun"]}</label></div>
<p id="say" aria-live="polite"></p><div id="one"></div><div id="all"></div>
<svg style="position:absolute;width:0;height:0" aria-hidden="true"><defs><marker id="tip"
viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse"
orient="auto"><path class="x" d="M0 0L8 4L0 8z"/></marker></defs></svg>
<details><summary>Numbers of this figure</summary><div class="wide"><table id="numbers"></table>
</div></details><noscript><p>The view needs JavaScript; nothing else does.</p></noscript></section>
<script type="application/json" id="data">{data}</script>
<script>//<![CDATA[{SCRIPT}//]]></script>"""


# ---- the page


def _words(row: Row) -> Row:
    return {"noun": row["noun"], "one": ONE[row["noun"]]}


def _html(title: str, body: Sequence[str]) -> str:
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8" /><meta name="viewport" content="width=device-width" />
<title>{title}</title><style>{CSS}</style></head><body>
{"".join(body)}</body></html>
"""


def view_page(row: Row) -> str:
    """Return a page with the interactive view alone; row: name, noun and view."""
    return _html(f"The {row['noun']} of {escape(row['name'])}", [_view(row, _words(row))])


def _findings(row: Row, against: Row | None) -> str:
    """Return the verdicts as a list; below each, the control's verdict of the same test."""
    other = {f["id"]: f["title"] for f in (against or {}).get("findings", [])}
    lines = []
    for f in row["findings"]:
        control = f"{against['name']}: {other[f['id']]}" if against and f["id"] in other else ""
        lines.append(
            f'<li><span class="m {"q" if f["mark"] == "?" else f["mark"]}">{MARKS[f["mark"]]}</span>'
            f'<div>{sentence(f, html=True)}'
            + f'<br /><span class="dim">{escape(control)}</span>' * bool(control) + "</div></li>"
        )  # fmt: skip
    return f"<ol>{''.join(lines)}</ol>"


def _grids(key: str, title: str, text: str, row: Row, against: Row | None) -> str:
    """Return the heat map `key` and, in grey, the control's."""
    style = {"accuracy": ("s", 0.5), "slots": ("t", 0.0, True)}[key]
    drawing, lines = "", []
    for source in filter(None, (row, against)):
        if grid := source.get(key):
            name = f"<h3>{escape(source['name'])}</h3>" if against else ""
            kind = style if source is row else ("x", *style[1:])
            drawing += name + _heat(grid, title, *kind)
            lines += [
                [f"{line['label']}" + f", {source['name']}" * (source is against),
                 *map(_cell, line["cells"])] for line in grid["rows"]
            ]  # fmt: skip
    return _figure(title, text, drawing, _table(["", *row[key]["columns"]], lines))


def _scale(row: Row, against: Row | None) -> list[Row]:
    control = {p["id"]: p for p in (against or {}).get("scale") or ()}
    points = []
    for point in row["scale"]:
        points.append(point)
        if grey := control.get(point["id"]):
            points.append(grey | {"id": "x", "label": f"{point['label']}: {against['name']}"})
    return points


def render(row: Row, against: Row | None = None) -> str:
    """Return the page of a row as HTML; against: a control's row, drawn in grey beside it."""
    words = _words(row)
    noun, name = row["noun"], escape(row["name"])
    text = {key: t.format(**words) for key, t in TEXT.items() if key not in ("write", "erase")}
    title = f"Do{'es' * (noun == 'written chain')} the {noun} of {name} do anything?"
    about = [row.get("method"), row.get("task"), f"{row['thoughts']} {noun}" if row.get("thoughts") else ""]
    about += [f"{row['parameters']:,} parameters" if row.get("parameters") else ""]
    body = [f"<h1>{title}</h1>", f'<p class="dim">{escape(" · ".join(filter(None, about)))}</p>']
    body += [f"<p><b>{escape(line)}</b></p>" for line in row.get("refused") or ()]
    body.append(_findings(row, against))
    body += [f'<p class="dim">{escape(line)}</p>' for line in row.get("warnings") or ()]

    if row.get("scale"):
        points = _scale(row, against)
        ends = ("0 %: ignored", "50 %: destroyed", "100 %: carried")
        table = _table(["", "answers that change"], [[p["label"], _cell(p)] for p in points])
        body.append(_figure(f"Whose {noun} decide?", text["scale"], _points(points, ends), table))
    body.append('<div class="pair">')
    if row.get("accuracy"):
        free = row["accuracy"].get("free")
        extra = f" Left to itself without {noun} it is right in {_cell(free)}" if free else ""
        if chain := row["accuracy"].get("wrote_chain"):
            extra += f", for it writes the steps in {_cell(chain)}"
        heading = f"How many {noun}?" if noun != "written chain" else "How much of it?"
        body.append(_grids("accuracy", heading, text["accuracy"] + extra + "." * bool(extra), row, against))
    if row.get("slots"):
        body.append(_grids("slots", "Which one carries it?", text["slots"], row, against))
    body.append("</div>")
    if names := row.get("names"):
        mass = [*map(_percent, names["mass"]), "of nodes"]
        labels = [*(str(i + 1) for i in range(len(mass) - 1)), "nodes"]
        drawing, table = "", []
        for side, head in (("own", "from the entity asked about"), ("other", "from the other one")):
            shares = [*names[side], names[f"base_{side}"]]
            drawing += f"<div><h3>counted {head}</h3>"
            drawing += _stack(list(zip(labels, shares, mass, strict=True)), names["distances"]) + "</div>"
            table += [[f"{label}, {head}", *s, m] for label, s, m in zip(labels, shares, mass, strict=True)]
        head = [words["one"], *names["distances"], "raw mass"]
        body.append(_figure("What do they name?", text["names"], f'<div class="pair">{drawing}</div>', _table(head, table)))
    if write := row.get("write"):
        drawing, table = "", []
        for key, part, ends in (
            ("write", "points", ("0 %: no change", "50 %", "100 %: rewritten")),
            ("erase", "erase", ("0 %", "50 %: chance", "100 %: unharmed")),
        ):
            if points := write.get(part):
                caption = TEXT[key].format(**words, **{k: write.get(k) for k in ("thought", "factor", "distance")})
                drawing += f"<figure><p>{caption}</p>{_points(points, ends)}</figure>"
                table += [[p["label"], _cell(p)] for p in points]
        body.append(_figure("Can they be written by hand?", "", f'<div class="pair">{drawing}</div>', _table(["", "share of answers"], table)))
    if row.get("view"):
        body.append(_view(row, words))
    body += _paper(row.get("paper") or {}, text["paper"])
    body.append(f"<h2>How to read this page</h2><p>{text['reading']}</p>")
    body.append(f"<h2>What it does not show</h2><p>{text['limits']}</p>")
    lines = [[k, str(v)] for k, v in row["provenance"].items()]
    body.append("<h2>Provenance</h2>" + _table(["", ""], lines).replace("<details>", '<details open="">'))
    return _html(title, body)


def _paper(paper: Row, text: str) -> list[str]:
    """Return the paper's Figures 5, 7, 8 and 9, as far as they were measured."""
    if not paper:
        return []
    body = [f"<h2>The paper’s figures</h2><p>{text}</p>", '<div class="pair">']
    if fig := paper.get("fig5"):
        names = [str(i + 1) for i in range(len(fig["categories"]))]
        notes = [f"{_percent(a['value'])}" for a in fig["accuracy"]]
        rows = list(zip(map(str, fig["columns"]), fig["shares"], notes, strict=True))
        legend = "; ".join(f"{n} {escape(c)}" for n, c in zip(names, fig["categories"], strict=True))
        table = [[c, *s, _cell(a)] for (c, s, _), a in zip(rows, fig["accuracy"], strict=True)]
        body.append(_figure("Figure 5", f"Answers by category: {legend}. Right: accuracy.", _stack(rows, names), _table(["", *fig["categories"], "accuracy"], table)))
    if fig := paper.get("fig7"):
        mass = ", ".join(map(_percent, fig["mass"]))
        table = [[r["label"], *map(_cell, r["cells"])] for r in fig["rows"]]
        body.append(_figure("Figure 7", f"{escape(fig['question'])} Value of each node if the model had to speak; raw mass {mass}.", _heat(fig, "Figure 7", "s"), _table(["", *fig["columns"]], table)))
    for fig in paper.get("fig8") or ():
        head = ["percentile", *(f"{p} %" for p in fig["percentiles"])]
        table = [[k, *fig[k]] for k in ("top1", "top2", "top3")]
        body.append(_figure(f"Figure 8, {escape(fig['label'])}", f"Sum of the largest value (line), the two (dashed) and the three largest (dotted), by percentile of {fig['n']:,} questions; raw mass {_percent(fig['mass'])}.", _curves(fig), _table(head, table)))
    if fig := paper.get("fig9"):
        labels = {"right": "right", "wrong": "wrong", "right_longest": "right, longest", "wrong_longest": "wrong, longest"}
        grid = {"columns": fig["heights"], "rows": [{"label": t, "cells": fig[k]} for k, t in labels.items() if fig.get(k)]}
        table = [[r["label"], *map(_cell, r["cells"])] for r in grid["rows"]]
        body.append(_figure("Figure 9", f"Value of right and wrong nodes by height, the distance to the nearest or farthest leaf; raw mass {_percent(fig['mass'])}.", _heat(grid, "Figure 9", "s"), _table(["height", *fig["heights"]], table)))
    return [*body, "</div>"]
