"""Run the seven tests of insight.py on a model. page.py draws the row that measure() returns."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanococonut.evaluation import insight
from nanococonut.evaluation.accuracy import score, wrote_steps
from nanococonut.evaluation.insight import Finding, count, decided, finding
from nanococonut.evaluation.interchange import NOUNS, Figure, Figures, fraction, grid, kind_of
from nanococonut.evaluation.pairs import MIN_PAIRS, Pairs
from nanococonut.evaluation.readout import readout, words_by_step
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError

Row = dict[str, Any]  # the results of one model, as JSON
SUMMARY = ("solves", "pairs", "needed", "carried", "search")  # tests whose verdicts sum it up


def measure(engine: Engine, name: str, plain: Pairs | None, pairs: Pairs) -> tuple[Row, Figures]:
    """Return (results of the tests, statistics of `pairs`). Tests that do not apply are left out.

    plain  pairs as in training, which shortcuts can solve (None: not available)
    pairs  pairs that no shortcut solves, by number of steps
    """
    kind = kind_of(engine)
    f = pairs.figures(engine)
    p = plain.figures(engine) if plain else f
    own, trained = f.accuracy("own"), p.accuracy("own", p.every)
    questions, twins = (plain or pairs).questions()
    q = p if questions != twins else f  # ProntoQA as in training has no twins
    one, both = (fraction(x[q.deep]) for x in (q.correct ^ q.twin_correct, q.both_correct))
    about = "questions as in training" if plain else "these questions"
    shortcut = [insight.judge_pairs(trained, one, both, about, q.which)] if pairs.twinned else []
    ignores = bool(shortcut) and shortcut[0]["mark"] == "no"
    row: Row = {
        "name": name,
        "method": engine.manifest["method"],
        # what it was trained on: a task's examples, or a file
        "task": Path(engine.config.data).name if engine.config.data else engine.config.task,
        "thoughts": engine.manifest["n_thoughts"],
        "noun": (noun := NOUNS[kind]),
        "parameters": engine.model.n_params(),
        "trained": trained,
        "candidates": f.outcomes["own"].shape[1],  # among which the model chooses
        "refused": [],
        "warnings": [],
    }
    if max(trained["lo"], own["lo"]) <= f.chance + 0.05:
        findings = [insight.judge_unsolved(trained, own, f.chance, plain is not None)]
        row["refused"] = ["No other test applies: the model is hardly better than guessing."]
    elif kind == "none":
        findings = shortcut
        row["refused"] = ["There is nothing between question and answer to replace."]
    else:
        others = {"none": None if kind == "chain" else f.ablated("k0")}
        others["unrelated"] = f.ablated("unrelated")
        needed = insight.judge_needed(own, f.ablated("mean"), f.chance, noun, f.which, **others)
        interchanged = _judge_interchange(row, f, plain and p, pairs)
        if ignores:
            findings = [*shortcut, needed]
            row["refused"] = ["No other test applies: the answer ignores what is asked."]
        else:
            read = _judge_readout(row, engine, f, pairs) if kind == "thought" else []
            findings = [*shortcut, needed, *interchanged, *read]
        if plain and kind != "chain":
            findings.append(_judge_free(row, engine, plain, p.accuracy("k0", p.every)))
        row["warnings"] += _warnings(engine, f, pairs)
    shown = [x for x in findings if x["id"] in SUMMARY][: 1 if ignores else None]
    if len(shown) > 1 and shown[0]["verdict"] == "looks at what is asked":  # others say more
        del shown[0]
    verdicts = [f"{x['id']} undecided" if x["mark"] == "?" else x["verdict"] for x in shown]
    return row | {"findings": findings, "verdict": ", ".join(verdicts) or "nothing to test"}, f


def _judge_free(row: Row, engine: Engine, plain: Pairs, forced: Figure) -> Finding:
    """Return the accuracy of free and forced answers without thoughts, and add it to the row."""
    s = score(engine, plain.examples[:400], 0, 200, engine.config.max_new_tokens)
    wrote_chain = fraction(list(map(wrote_steps, s.texts)))
    row["accuracy"] |= {"free": fraction(s.correct), "wrote_chain": wrote_chain}
    free, noun = row["accuracy"]["free"], row["noun"]
    return finding(
        "trap",
        f"Free generation without {noun} is correct in {{0}}, and writes steps before the answer "
        "in {1}. With the answer forced, as in all tests here, {2} are correct.",
        [free, wrote_chain, forced],
        (free["lo"] > forced["hi"], "note", "", f"Free generation can bypass the {noun}."),
        (True, "note", "", f"No sign that free generation bypasses the {noun}."),
    )


def _judge_interchange(row: Row, f: Figures, plain: Figures | None, pairs: Pairs) -> list[Finding]:
    """Return the findings of tests 3 to 5, and add their figures to the row.

    plain  statistics of pairs as in training (None: not available)
    """
    noun, twin, n = row["noun"], f.flips("twin"), row["thoughts"]
    query = "other options" if pairs.is_prosqa else "the opposite query"  # of ProntoQA
    labels = {
        "mean": "none at all" if "half" in f.outcomes else "averaged over questions",
        "unrelated": "of an unrelated question",
        "half": "the first half of the twin's",
        "same_other": f"of the question itself, {query}",
        "other_other": f"of the twin, {query}",
        "renamed": "of the question itself, names exchanged",
        "retargeted": "of itself, options exchanged in the facts",
        "twin": "of the twin",
    }
    flips = {name: f.flips(name) for name in labels}
    row["scale"] = [{"id": k, "label": labels[k]} | x for k, x in flips.items() if x]
    if not twin or twin["n"] < MIN_PAIRS:
        row["refused"].append("Too few pairs have both answers correct for more tests.")
    stays, kept = (f.flips(name, candidate=0) for name in ("twin", "unrelated"))
    carried = twin, flips["unrelated"], stays, kept
    findings = [insight.judge_carried(*carried, noun, pairs.twinned)]
    if "same_other" in f.outcomes:
        other, same = flips["other_other"], flips["same_other"]
        controls = flips["renamed"], flips["retargeted"]
        whole = f.flips("twin_inputs") or twin  # replaced in the same way
        findings.append(insight.judge_search(whole, other, same, noun, query, *controls))
    if "slot1" not in f.outcomes:  # a written chain
        return findings

    numbers = [k for k in range(len(f.outcomes)) if f"k{k}" in f.outcomes]
    slots = [j for j in range(1, len(f.outcomes)) if f"slot{j}" in f.outcomes]
    accuracy = {h: [f.accuracy(f"k{k}", f.groups == h) for k in numbers] for h in f.steps}
    moved = {h: [f.flips(f"slot{j}", f.groups == h) for j in slots] for h in f.steps}
    rows = {"plain": [plain.accuracy(f"k{k}", plain.every) for k in numbers]} if plain else {}
    rows |= {count(h, "step"): figures for h, figures in accuracy.items()}
    row["accuracy"] = grid(numbers, rows) | {"trained": n}
    row["slots"] = grid(slots, {count(h, "step"): figures for h, figures in moved.items()})
    best = {h: max(figure["lo"] for figure in x[n:]) for h, x in accuracy.items()}
    solved = {h: x for h, x in accuracy.items() if decided(x[n]) and best[h] > f.chance + 0.05}
    if len(solved) > 1:
        deep = {h: moved[h] for h in solved if h > 1 and all(moved[h])}
        findings.append(insight.judge_depth(solved, deep, noun))
    return findings


def _judge_readout(row: Row, engine: Engine, f: Figures, pairs: Pairs) -> list[Finding]:
    """Return the findings of tests 6 and 7, and add their figures to the row."""
    if not pairs.is_prosqa or not pairs.twinned:
        row["warnings"].append("No steering: it needs ProsQA's graphs and twins.")
        words = words_by_step(engine, f, pairs, row["thoughts"])
        return [insight.judge_words(words)] if words else []
    try:
        row["names"], best, row["write"] = readout(engine, f, pairs, row["thoughts"])
    except UserError as e:
        row["warnings"].append(f"No logit lens, no steering: {str(e).splitlines()[0]}")
        return []
    return [insight.judge_read(best), insight.judge_write(row["write"])]


def _warnings(engine: Engine, f: Figures, pairs: Pairs) -> Iterator[str]:
    """Yield what a reader of the results has to know about the measurement."""
    if not pairs.twinned:
        yield "Without twins, it was not tested whether the answer depends on what is asked."
        yield "Without twins, only an answer that changes to the donor's counts as moved."
    if f.outcomes["by_inputs"].nanmean() > 0:
        yield "Some twins have another length: their inputs were exchanged, not keys and values."
    if f.outcomes["twin"].isnan().any():
        yield "Pauses were not exchanged between twins of another length."
    n = engine.manifest["n_thoughts"]
    if engine.model.config.stop:
        yield f"The stop classifier was not used: every question has {n} thoughts."
    if not engine.curriculum.pad_latent_to_max:
        yield f"Every question has {n} thoughts, also those that had fewer in training."
