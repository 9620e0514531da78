"""Run the seven tests on a model, and write down what they show."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from nanococonut.evaluation import insight
from nanococonut.evaluation.insight import Finding, decided
from nanococonut.evaluation.interchange import NOUNS, Figure, Figures, figure, kind_of, tables
from nanococonut.evaluation.pairs import MIN_PAIRS, Pairs, left_alone
from nanococonut.evaluation.readout import readout, words_by_step
from nanococonut.inference.engine import Engine
from nanococonut.runtime.errors import UserError


@dataclass
class Report:
    """The row of one model; bench/common/page.py says what each part looks like."""

    name: str
    method: str
    task: str
    thoughts: int
    noun: str
    parameters: int
    trained: Figure = field(default_factory=dict)  # accuracy as in training
    verdict: str = ""
    findings: list[Finding] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    scale: list[Figure] | None = None
    accuracy: dict[str, Any] | None = None
    slots: dict[str, Any] | None = None
    names: dict[str, Any] | None = None
    write: dict[str, Any] | None = None

    def row(self) -> dict[str, Any]:
        """Return it as JSON, without what was not measured."""
        return {k: v for k, v in asdict(self).items() if v is not None}


def measure(
    engine: Engine,
    name: str,
    plain: Pairs | None,
    pairs: Pairs,
    progress: Callable[[float], None] = lambda fraction: None,
) -> tuple[Report, Figures]:
    """Run the seven tests. Return the report and the figures of `pairs`.

    plain  pairs as in training, with their shortcuts (None: none)
    """
    kind, manifest, model = kind_of(engine), engine.manifest, engine.model
    n, extra = manifest["n_thoughts"], 2 * (kind in ("thought", "pause"))
    r = Report(name, manifest["method"], engine.config.task, n, NOUNS[kind], model.n_params())
    f = p = pairs.figures(engine, extra=extra, progress=lambda x: progress(0.6 * x))
    if plain is not None:
        options = {"full": False, "extra": extra, "progress": lambda x: progress(0.6 + 0.2 * x)}
        p = plain.figures(engine, **options)
    own, r.trained = f.accuracy("own"), p.accuracy("own", p.every)
    q = p if plain is not None and plain.has_twins else f
    one, both = figure(q.right ^ q.twin_right, q.asked), figure(q.right & q.twin_right, q.asked)
    shortcut = insight.judge_pairs(r.trained, one, both) if pairs.twinned else None
    ignores = shortcut is not None and shortcut["mark"] == "no"

    if max(r.trained["lo"], own["lo"]) <= f.chance + 0.05:
        r.findings = [insight.judge_unsolved(r.trained, own, f.chance)]
        r.refused = ["Nothing else can be asked: there is no answer that could be moved."]
    elif kind == "none":
        r.findings = [shortcut] if shortcut else []
        r.refused = ["There is nothing between question and answer: only test 1 is asked."]
    else:
        r.findings = [shortcut] if ignores else []
        r.findings.append(insight.judge_needed(own, f.accuracy("mean"), f.chance, r.noun))
        r.scale, r.accuracy, r.slots = tables(f, p if plain is not None else None, n)
        if ignores:
            r.refused = ["Tests 3 to 7 cannot be asked: no answer follows what is asked."]
        else:
            _judge_moved(r, f, pairs)
            if kind == "thought":
                _judge_readout(r, engine, f, pairs)
                progress(0.95)
            r.findings += [shortcut] if shortcut else []
        if kind != "chain" and plain is not None:
            free, chain = left_alone(engine, plain)
            r.accuracy |= {"free": free, "wrote_chain": chain}
            forced = p.accuracy("k0", p.every)
            r.findings.append(insight.judge_trap(free, chain, forced, r.noun))
        _warn(r, engine, f, pairs)
    first = r.findings[:1] if ignores or len(r.findings) < 3 else r.findings[:3]
    r.verdict = ", ".join(x["verdict"] for x in first)
    progress(1.0)
    return r, f


def _judge_moved(r: Report, f: Figures, pairs: Pairs) -> None:
    """Add the findings of tests 3 to 5."""
    twin = f.flips("twin")
    unrelated, stays = f.flips("unrelated"), f.stays("twin")
    r.findings.append(insight.judge_carried(twin, unrelated, stays, r.noun, pairs.twinned))
    if not twin or twin["n"] < MIN_PAIRS:
        r.refused.append("There are too few pairs with both answers right for tests 3 to 7.")
    if "same_other" in f.cells:
        other, same = f.flips("other_other"), f.flips("same_other")
        asked = "other options"
        if not pairs.is_prosqa:  # ProntoQA
            asked = "the opposite query"
            for point in r.scale or ():
                point["label"] = point["label"].replace("other options", asked)
        r.findings.append(insight.judge_search(twin, other, same, r.noun, asked))
    if r.accuracy is None:
        return
    offset = len(r.accuracy["rows"]) - len(f.steps)  # of the plain row
    cells = {h: r.accuracy["rows"][i + offset]["cells"] for i, h in enumerate(f.steps)}
    slots = {h: r.slots["rows"][i]["cells"] for i, h in enumerate(f.steps)}
    solved = [h for h in f.steps if decided(cells[h][r.thoughts]) and cells[h][-1]["lo"] > 0.55]
    if len(solved) > 1:
        deep = {h: slots[h] for h in solved if h > 1 and all(slots[h])}
        r.findings.append(insight.judge_depth({h: cells[h] for h in solved}, deep, r.noun))


def _judge_readout(r: Report, engine: Engine, f: Figures, pairs: Pairs) -> None:
    """Add the findings of tests 6 and 7."""
    if not pairs.is_prosqa or not pairs.twinned:
        r.warnings.append("Test 7 was left out: it needs ProsQA's graphs and twins.")
        if found := words_by_step(engine, f, pairs, r.thoughts):
            r.findings.append(insight.judge_words(found))
        return
    try:
        r.names, best, r.write = readout(engine, f, pairs, r.thoughts)
        r.findings += [insight.judge_read(best), insight.judge_write(r.write)]
    except UserError as e:
        r.warnings.append(f"Tests 6 and 7 were left out: {str(e).splitlines()[0]}")


def _warn(r: Report, engine: Engine, f: Figures, pairs: Pairs) -> None:
    """Say what a reader has to know about how it was measured."""
    if not pairs.twinned:
        r.warnings.append("Without twins, only the donor's answer tells moved from destroyed.")
    if f.cells["by_inputs"].nanmean() > 0:
        r.warnings.append("Twins of another length: inputs were exchanged, not keys and values.")
    if engine.model.config.stop:
        r.warnings.append(
            f"The stop classifier was not asked: all questions have {r.thoughts} thoughts."
        )
