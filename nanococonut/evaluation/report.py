"""Run the seven tests on a model, and write down what they show.

page.py says what each part of a row looks like.
"""

from collections.abc import Callable, Iterator
from typing import Any

from nanococonut.evaluation import insight
from nanococonut.evaluation.accuracy import score
from nanococonut.evaluation.insight import Finding, count, decided
from nanococonut.evaluation.interchange import NOUNS, Figure, Figures, fraction, kind_of
from nanococonut.evaluation.pairs import MIN_PAIRS, Pairs
from nanococonut.evaluation.readout import readout, words_by_step
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

Row = dict[str, Any]  # name, verdict, findings, ... of one model
LABELS = {
    "mean": "averaged over questions",
    "unrelated": "of an unrelated question",
    "half": "the first half of the twin's",
    "same_other": "same question, other options",
    "other_other": "the twin, other options",
    "twin": "of the twin",
}


def measure(
    engine: Engine,
    name: str,
    plain: Pairs | None,
    pairs: Pairs,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Row, Figures]:
    """Run the seven tests. Return the row, without what was not measured, and figures of `pairs`.

    plain  pairs as in training, with their shortcuts (None: none)
    """
    kind, n = kind_of(engine), engine.manifest["n_thoughts"]
    extra = 2 * (kind in ("thought", "pause"))
    f = p = pairs.figures(engine, extra=extra, progress=lambda x: progress(0.6 * x))
    if plain:
        options = {"extra": extra, "progress": lambda x: progress(0.6 + 0.2 * x)}
        p = plain.figures(engine, full=False, **options)
    own, trained = f.accuracy("own"), p.accuracy("own", p.every)
    row: Row = {
        "name": name,
        "method": engine.manifest["method"],
        "task": engine.config.task,
        "thoughts": n,
        "noun": NOUNS[kind],
        "parameters": engine.model.n_params(),
        "trained": trained,
        "findings": (findings := []),
        "refused": [],
        "warnings": [],
    }
    q = p if plain and plain.has_twins else f
    one, both = (fraction(x[q.asked]) for x in (q.right ^ q.twin_right, q.right & q.twin_right))
    shortcut = [insight.judge_pairs(trained, one, both)] if pairs.twinned else []
    ignores = bool(shortcut) and shortcut[0]["mark"] == "no"

    if max(trained["lo"], own["lo"]) <= f.chance + 0.05:
        findings.append(insight.judge_unsolved(trained, own, f.chance))
        row["refused"] = ["Nothing else can be asked: there is no answer that could be moved."]
    elif kind == "none":
        findings += shortcut
        row["refused"] = ["There is nothing between question and answer: only test 1 is asked."]
    else:
        findings += shortcut if ignores else []
        findings.append(insight.judge_needed(own, f.accuracy("mean"), f.chance, row["noun"]))
        row |= _tables(f, plain and p, n)
        if ignores:
            row["refused"] = ["Tests 3 to 7 cannot be asked: no answer follows what is asked."]
        else:
            findings += _judge_moved(row, f, pairs)
            findings += _judge_readout(row, engine, f, pairs) if kind == "thought" else []
            findings += shortcut
        if plain and kind != "chain":
            row["accuracy"] |= (free := _left_alone(engine, plain))
            figures = (*free.values(), p.accuracy("k0"))
            findings.append(insight.judge_trap(*figures, row["noun"]))
        row["warnings"] += _warnings(engine, f, pairs)
    first = findings[:1] if ignores or len(findings) < 3 else findings[:3]
    row["verdict"] = ", ".join(x["verdict"] for x in first)
    progress(1.0)
    return row, f


def _left_alone(engine: Engine, plain: Pairs, n: int = 400) -> dict[str, Figure | None]:
    """Return how often texts after no thoughts are right, and how often they start with steps."""
    s = score(engine, plain.examples[:n], 0, 200, engine.config.max_new_tokens)
    wrote_chain = [bool(text.partition("#")[0].strip()) for text in s.texts]
    return {"free": fraction(s.correct), "wrote_chain": fraction(wrote_chain)}


def _judge_moved(row: Row, f: Figures, pairs: Pairs) -> list[Finding]:
    """Return the findings of tests 3 to 5."""
    noun, twin, stays = row["noun"], f.flips("twin"), f.stays("twin")
    findings = [insight.judge_carried(twin, f.flips("unrelated"), stays, noun, pairs.twinned)]
    if not twin or twin["n"] < MIN_PAIRS:
        row["refused"].append("There are too few pairs with both answers right for tests 3 to 7.")
    if "same_other" in f.cells:
        asked = "other options"
        if not pairs.is_prosqa:  # ProntoQA
            asked = "the opposite query"
            for point in row["scale"]:
                point["label"] = point["label"].replace("other options", asked)
        other, same = f.flips("other_other"), f.flips("same_other")
        findings.append(insight.judge_search(twin, other, same, noun, asked))
    if "accuracy" not in row:  # a written chain
        return findings
    last = row["accuracy"]["rows"][-len(f.steps) :]  # without the plain one
    cells = {h: x["cells"] for h, x in zip(f.steps, last, strict=True)}
    slots = {h: x["cells"] for h, x in zip(f.steps, row["slots"]["rows"], strict=True)}
    solved = [h for h, c in cells.items() if decided(c[row["thoughts"]]) and c[-1]["lo"] > 0.55]
    if len(solved) > 1:
        deep = {h: slots[h] for h in solved if h > 1 and all(slots[h])}
        findings.append(insight.judge_depth({h: cells[h] for h in solved}, deep, noun))
    return findings


def _judge_readout(row: Row, engine: Engine, f: Figures, pairs: Pairs) -> list[Finding]:
    """Return the findings of tests 6 and 7."""
    if not pairs.is_prosqa or not pairs.twinned:
        row["warnings"].append("Test 7 was left out: it needs ProsQA's graphs and twins.")
        words = words_by_step(engine, f, pairs, row["thoughts"])
        return [insight.judge_words(words)] if words else []
    try:
        row["names"], best, row["write"] = readout(engine, f, pairs, row["thoughts"])
    except UserError as e:
        row["warnings"].append(f"Tests 6 and 7 were left out: {str(e).splitlines()[0]}")
        return []
    return [insight.judge_read(best), insight.judge_write(row["write"])]


def _warnings(engine: Engine, f: Figures, pairs: Pairs) -> Iterator[str]:
    """Yield what a reader has to know about how it was measured."""
    if not pairs.twinned:
        yield "Without twins, only the donor's answer tells moved from destroyed."
    if f.cells["by_inputs"].nanmean() > 0:
        yield "Twins of another length: inputs were exchanged, not keys and values."
    if engine.model.config.stop:
        n = engine.manifest["n_thoughts"]
        yield f"The stop classifier was not asked: all questions have {n} thoughts."


def _tables(f: Figures, plain: Figures | None, trained: int) -> dict[str, Any]:
    """Return scale: flips by donor. Of thoughts also accuracy by their number, and flips by slot.

    plain    figures of questions as in training (None: none)
    trained  thoughts in training
    """
    labels = LABELS | ({"mean": "none at all"} if "half" in f.cells else {})  # a written chain
    flips = {name: f.flips(name) for name in LABELS}
    tables = {"scale": [{"id": k, "label": labels[k]} | x for k, x in flips.items() if x]}
    numbers = [k for k in range(len(f.cells)) if f"k{k}" in f.cells]
    slots = [j for j in range(1, len(f.cells)) if f"slot{j}" in f.cells]
    if len(numbers) < 2:
        return tables
    accuracy, moved = [], []
    if plain is not None:
        cells = [plain.accuracy(f"k{k}") for k in numbers]
        accuracy.append({"label": "plain", "cells": cells})
    for h in f.steps:
        label, same = count(h, "step"), f.groups == h
        cells = [f.accuracy(f"k{k}", same) for k in numbers]
        accuracy.append({"label": label, "cells": cells})
        moved.append({"label": label, "cells": [f.flips(f"slot{j}", same) for j in slots]})
    tables["accuracy"] = {"columns": numbers, "trained": trained, "rows": accuracy}
    return tables | {"slots": {"columns": slots, "rows": moved}}
