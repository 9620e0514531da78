"""The page of an insight row, as text and in a browser."""

import copy
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any
from xml.etree import ElementTree

import pytest

from nanococonut.evaluation.page import render, sentence, view_page

BROWSERS = "chromium-headless-shell", "chromium", "google-chrome"


def fig(value: float, **extra: float) -> dict[str, float]:
    low, high = round(max(0, value - 0.031), 3), round(min(1, value + 0.027), 3)
    return {"value": value, "lo": low, "hi": high, "n": 1171} | extra


def state(step: int, names: str) -> dict[str, Any]:
    """Return the made-up state of a view after `step` thoughts."""
    p = [0.61 if c in names else 0.012 for c in "ABcdefgh"]
    right = 0.5 if step < 2 else 0.93 if names != "f" else 0.04
    answer = [right, round(0.97 - right, 3)]
    if not step:
        return {"p": None, "attention": None, "answer": answer}
    return {"p": p, "attention": [0.2, 0.011, 0, 0.13, 0.4, 0, 0.3], "answer": answer}


ROW: dict[str, Any] = {
    "name": "a run",
    "method": "coconut",
    "task": "prosqa",
    "thoughts": 2,
    "noun": "thoughts",
    "checkpoint": "out/run",
    "provenance": {"commit": "a32b7b1", "seed": 5, "seconds": 41.2},
    "findings": [
        {
            "id": "needed",
            "mark": "yes",
            "title": "The thoughts are needed.",
            "text": "Accuracy falls from {0} to {1}.",
            "figures": [fig(0.911), fig(0.501)],
        },
        {"id": "pairs", "mark": "?", "title": "Open.", "text": "Too few.", "figures": []},
    ],
    "scale": [
        {"id": "mean", "label": "mean thoughts"} | fig(0.493, mass=0.44),
        {"id": "same_other", "label": "same entity, other options"} | fig(0.114),
        {"id": "twin", "label": "the other entity"} | fig(0.997),
    ],
    "accuracy": {
        "columns": [0, 1, 2],
        "trained": 2,
        "rows": [
            {"label": "plain", "cells": [fig(0.471, mass=0.98), fig(0.832), fig(0.978)]},
            {"label": "2 hops", "cells": [fig(0.492, mass=0.31), None, fig(0.969)]},
        ],
        "free": fig(0.908),
        "wrote_chain": fig(0.996),
    },
    "slots": {"columns": [1, 2], "rows": [{"label": "2 hops", "cells": [fig(0.801), fig(0.152)]}]},
    "names": {
        "distances": ["1", "2", "no path"],
        "own": [[0.981, 0.011, 0.008], [0.302, 0.634, 0.064]],
        "other": [[0.041, 0.012, 0.947], [0.031, 0.022, 0.946]],
        "base_own": [0.183, 0.161, 0.656],
        "base_other": [0.184, 0.162, 0.654],
        "mass": [0.613, 0.584],
        "n": 1400,
    },
    "write": {
        "thought": 1,
        "distance": 1,
        "factor": 6,
        "points": [{"id": "other", "label": "children of the other entity"} | fig(0.974)],
        "erase": [{"id": "right", "label": "the right branch erased"} | fig(0.516)],
    },
    "view": [
        {
            "title": title,
            "question": "Is Alice a gggggus or hhhhhus?",
            "nodes": ["Alice", "Bob", *(f"{5 * c}us" for c in "cdefgh")],
            "levels": [0, 0, 1, 1, 1, 2, 2, 2],
            "edges": [[0, 2], [0, 3], [1, 4], [2, 5], [2, 6], [4, 7], [5, 6]],
            "entity": 0,
            "other": 1,
            "candidates": ["gggggus", "hhhhhus"],
            "answer": "gggggus",
            "states": [state(0, ""), state(1, "cd"), state(2, "g")],
            "swapped": [state(0, ""), state(1, "e"), state(2, "f")],
        }
        for title in ("2 hops: Alice", "2 hops: another")
    ],
    "paper": {
        "fig5": {
            "columns": [0, 1],
            "rows": [{"label": "correct path", "cells": [fig(0.853), fig(0.147)]}],
            "note": "raw mass 98.1 %",
        }
    },
}


def numbers(row: Any) -> Iterator[float]:
    """Yield every fraction of a row, except those of the view, whose table the script writes."""
    if isinstance(row, dict):
        for key, value in row.items():
            if key not in ("view", "provenance"):
                yield from numbers(value)
    elif isinstance(row, list):
        for value in row:
            yield from numbers(value)
    elif isinstance(row, float):
        yield row


def tables(page: str) -> str:
    root = ElementTree.fromstring(page)
    return " ".join(" ".join(table.itertext()) for table in root.iter("table"))


def test_page_is_well_formed_and_refers_to_nothing() -> None:
    """A page is a single file that can be opened without a network."""
    page = render(ROW | {"against": ROW | {"name": "control"}})
    root = ElementTree.fromstring(page)
    assert not re.findall(r"https?://|//cdn|@import|url\((?!#)", page)
    for element in root.iter():
        assert element.tag not in ("link", "img", "iframe", "object")
        assert not {"src", "href"} & set(element.keys())
        if element.tag == "svg" and "aria-hidden" not in element.keys():
            assert element.attrib["role"] == "img" and element.attrib["aria-label"]
    assert len(page.encode()) < 200 * 1024


def test_page_has_every_number_in_a_table() -> None:
    """The numbers of a drawing must be readable without it."""
    text = tables(render(ROW)).replace("\xa0", " ") + sentence(ROW["findings"][0])
    for value in numbers(ROW):
        assert f"{100 * value:.1f}" in text, value
    assert "raw mass 98.1 %" in render(ROW) and "a32b7b1" in text


def test_page_fills_in_figures_with_intervals() -> None:
    text = sentence(ROW["findings"][0]).replace("\xa0", " ")
    assert text.startswith("Accuracy falls from 91.1 % (88.0 to 93.8, n = 1,171) to 50.1 %")
    assert "<small>(88.0 to 93.8, n\xa0=\xa01,171)</small>" in render(ROW)


def test_page_draws_cells_without_mass_hollow() -> None:
    """Accuracy between two unlikely options decides nothing."""
    page = render(ROW)
    assert page.count('class="dashed"') == 2  # a point and a cell
    cell = page[page.rindex('class="dashed"') :].partition("</td>")[0]
    assert 'title="49.2' in cell and "mass 31.0" in cell


def test_page_escapes_names() -> None:
    """A run's name and a task's words are users' texts; the words are also part of the script."""
    evil = "</script><b>&\"'"
    row = json.loads(json.dumps(ROW).replace("Alice", json.dumps(evil)[1:-1]))
    row["name"] = row["checkpoint"] = row["scale"][0]["label"] = row["findings"][0]["title"] = evil
    row["refused"] = row["warnings"] = [evil]
    control = copy.deepcopy(row)
    page = render(row | {"against": control})
    ElementTree.fromstring(page)
    assert evil not in page and page.count("</script>") == 2


@pytest.mark.parametrize("noun", ["thoughts", "pauses", "written chain"])
def test_page_needs_only_findings(noun: str) -> None:
    """If no test applies, the row has only a verdict, and the page must have no empty figure."""
    row = {key: ROW[key] for key in ("name", "findings", "provenance")}
    page = render(row | {"noun": noun, "refused": ["Does not solve these questions."]})
    root = ElementTree.fromstring(page)
    assert not [x for x in root.iter() if x.tag in ("svg", "figure", "script")]
    assert noun in "".join(root.find("head/title").itertext())  # type: ignore[union-attr]
    assert "[[" not in page and "Does not solve" in page


def test_page_shows_the_control_in_grey() -> None:
    control = copy.deepcopy(ROW) | {"name": "pause run"}
    control["findings"][0]["title"] = "The pauses are not needed."
    control["scale"][2] |= fig(0.0)
    page = render(ROW | {"against": control})
    assert "pause run: The pauses are not needed." in page
    assert "… of pause run" in tables(page) and 'class="heat slots grey"' in page


# ---- in a browser


class Browser:
    """A headless Chromium, controlled over a pipe with JSON messages that end in a zero byte."""

    def __init__(self, program: str, folder: str) -> None:
        read, self.write = os.pipe()
        self.read, write = os.pipe()
        flags = ["--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', program, *flags]
            + [f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(read, write),
            stderr=subprocess.DEVNULL,
        )
        os.close(read)
        os.close(write)
        self.events: list[dict[str, Any]] = []
        self.buffer, self.n, self.session = b"", 0, {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def message(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            data = os.read(self.read, 1 << 20)
            assert data, "the browser ended"
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(line)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.n += 1
        command = {"id": self.n, "method": method, "params": params} | self.session
        os.write(self.write, json.dumps(command).encode() + b"\0")
        while (answer := self.message()).get("id") != self.n:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        self.events.clear()
        self.call("Page.navigate", url=url)
        page = "document.readyState + location.href.split('#')[0]"
        while self.js(page) != "complete" + url.partition("#")[0]:
            pass

    def js(self, code: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int, **extra: str) -> None:
        for kind in ("keyDown", "keyUp"):
            event = {"key": key, "code": key, "windowsVirtualKeyCode": code} | extra
            self.call("Input.dispatchKeyEvent", type=kind, **event)

    def width(self, pixels: int) -> None:
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.read)
        os.close(self.write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    programs = [p for p in map(shutil.which, BROWSERS) if p]
    if not programs:
        pytest.skip("no Chromium: apt-get install chromium-headless-shell")
    browser = Browser(programs[0], str(tmp_path_factory.mktemp("profile")))
    yield browser
    browser.close()


# number of pairs of names in the drawing that overlap
COLLISIONS = """(() => {
  const boxes = [...document.querySelectorAll('#one text')].map(t => t.getBoundingClientRect());
  return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right
    && b.left < a.right && a.top < b.bottom - 1 && b.top < a.bottom - 1)).length;
})()"""


def test_page_works_in_a_browser(browser: Browser, tmp_path: Any) -> None:
    """The slider, arrow keys and swap box change drawing and text; nothing is fetched."""
    path = tmp_path / "insight.html"
    path.write_text(render(ROW), encoding="utf-8")
    browser.open(path.as_uri())
    seen = []

    def look(place: str) -> None:
        assert browser.js("location.hash") == place
        seen.append(browser.js("[$('one'), $('say')].map(x => x.innerHTML)"))
        assert all(seen[-1][i] not in [s[i] for s in seen[:-1]] for i in (0, 1))

    look("#0,1,0")
    browser.js("document.getElementById('k').focus()")
    browser.press("ArrowRight", 39)  # of the slider itself
    look("#0,2,0")
    assert "gggggus</b> (right; gggggus 93.0" in seen[-1][1].replace("\xa0", " ")
    browser.js("document.getElementById('swap').focus()")
    browser.press(" ", 32, text=" ")
    look("#0,2,1")
    assert "of Bob" in seen[-1][1] and "hhhhhus</b> (wrong" in seen[-1][1]
    browser.press("ArrowLeft", 37)  # of the page
    look("#0,1,1")
    browser.js("location.hash = '#1,9,0'")  # beyond the last thought
    browser.call(
        "Runtime.evaluate", expression="new Promise(r => setTimeout(r))", awaitPromise=True
    )
    assert browser.js("[q, k, swap, $('q').value, $('k').value].join()") == "1,2,0,1,2"

    rows = browser.js("[...numbers.rows].map(r => r.textContent)")
    assert len(rows) == 1 + 2 + 8 + 7 and any("61.0" in line for line in rows)
    for width in (1280, 800, 400):
        browser.width(width)
        assert browser.js("document.documentElement.scrollWidth") <= width
        assert browser.js(COLLISIONS) == 0, width
    browser.call("Emulation.setEmulatedMedia", media="print")
    shown = "x => getComputedStyle(document.getElementById(x)).display"
    assert browser.js(f"['one', 'all'].map({shown}).join()") == "none,grid"
    assert browser.js("document.querySelectorAll('#all svg').length") == 3

    requests = [
        e["params"]["request"]["url"] for e in browser.events if "request" in e.get("params", {})
    ]
    assert set(requests) == {path.as_uri()}
    assert not [
        e for e in browser.events if e["method"] in ("Runtime.exceptionThrown", "Log.entryAdded")
    ]


def test_view_page_draws_all_thoughts(browser: Browser, tmp_path: Any) -> None:
    """The README's picture is a screenshot of the small multiples."""
    path = tmp_path / "view.html"
    path.write_text(view_page({key: ROW[key] for key in ("name", "noun", "view")}), "utf-8")
    ElementTree.fromstring(path.read_text("utf-8"))
    browser.call("Emulation.setEmulatedMedia", media="")
    browser.open(path.as_uri() + "#0,2,1,all")
    shown = "x => getComputedStyle(document.getElementById(x)).display"
    assert browser.js(f"['one', 'bar', 'all'].map({shown}).join()") == "none,none,grid"
    assert browser.js("location.hash") == "#0,2,1,all"
    assert "(wrong; " in browser.js("$('say').textContent")
    browser.js("view[0].answer = null, show()")  # a question of the user's own
    assert "hhhhhus (gggggus" in browser.js("$('say').textContent")
