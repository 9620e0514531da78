"""Turn the results of seven tests into verdicts: do a model's thoughts do anything?

1  pairs    does the answer depend on what is asked? (counterfactual pairs: a question, its twin)
2  needed   does accuracy fall if every thought becomes its mean over questions? (mean ablation)
3  carried  does the answer change with the thoughts? (interchange intervention)
4  search   do the thoughts hold the state of the search, the answer, or what is asked?
5  depth    do questions with more steps need more thoughts?
6  read     what does the LM head predict from a thought? (logit lens)
7  write    does the answer change with concepts that are added to a thought? (steering)

A twin differs from its question in one thing, such as the entity asked about, so that another
answer is correct.
Verdicts of tests 1 to 4 and 7 compare whole 95 % intervals with limits. They are undecided with
fewer than MIN_PAIRS questions, or if the candidate answers together have less than half of the
probability. report.py runs the tests; interchange.py explains the interventions.
"""

from typing import Any

from nanococonut.evaluation.interchange import Figure
from nanococonut.evaluation.pairs import MIN_PAIRS
from nanococonut.evaluation.readout import MIN_MASS

Finding = dict[str, Any]  # id, mark, verdict, title, text and figures of one test
LENS = "Logit lens (the LM head applied to a thought)"
UNUSED = "What can be read is not necessarily used."


def decided(*figures: Figure | None) -> bool:
    """Return whether all figures have enough questions and sufficiently likely candidates."""
    return all(f and f.get("n", 0) >= MIN_PAIRS and f.get("mass", 1) >= 0.5 for f in figures)


def finding(name: str, text: str, figures: list[Figure | None], *cases: tuple) -> Finding:
    """Return the finding of the first case whose condition holds.

    text   with {0}, {1}, ... for the figures
    cases  (condition, mark, verdict, title) or (condition, mark, verdict, title, last sentence)
    """
    mark, verdict, title, *last = next(case[1:] for case in cases if case[0])
    if mark == "?" and not last:
        last = [reason(figures)]
    text = " ".join([text, *filter(None, last)])
    return dict(id=name, mark=mark, verdict=verdict, title=title, text=text, figures=figures)


def reason(figures: list[Figure | None]) -> str:
    """Return why these figures give no verdict."""
    if min(f["n"] if f else 0 for f in figures) < MIN_PAIRS:
        return f"There are fewer than {MIN_PAIRS} such questions."
    mass = min(f.get("mass", 1) for f in figures)
    if mass < 0.5:
        low = f"The candidate answers have only {percent(mass)} of the probability"
        return f"{low}: the model would write something else."
    return "The intervals are too wide for a verdict: use more questions."


def percent(p: float) -> str:
    return f"{100 * p:.0f}\xa0%"


def count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def extent(figure: Figure, limit: float) -> str:
    """Return "in part" if an effect is surely below the limit, else "at least in part"."""
    return "in part" if figure["hi"] < limit else "at least in part"


def plateau(accuracy: list[Figure]) -> int:
    """Return the fewest thoughts that give 80 % of the gain in accuracy; 0 without a clear gain."""
    values = [f["value"] for f in accuracy]
    gain = max(values) - values[0]
    return next(k for k, v in enumerate(values) if v - values[0] >= 0.8 * gain) if gain > 0.1 else 0


def judge_pairs(
    trained: Figure, one: Figure, both: Figure, questions: str, which: str = "questions"
) -> Finding:
    """Judge test 1: a shortcut that ignores what is asked is correct for only one of two twins.

    questions  what `trained` was measured on, such as "questions as in training"
    which      what `one` and `both` were measured on
    """
    ok = decided(trained, one, both)
    return finding(
        "pairs",
        f"Accuracy on {questions} is {{0}}. Both answers are correct in {{1}} of the twin pairs of "
        f"{which}, and exactly one in {{2}}. A rule that ignores what is asked never gets both.",
        [trained, both, one],
        (ok and both["hi"] < 0.2, "no", "ignores what is asked",
         f"On these {which}, the model ignores what is asked."),
        (ok and one["hi"] < 0.1, "yes", "looks at what is asked",
         "The answer depends on what is asked."),
        (ok and one["lo"] > 0.1, "part", "same answer to some twins",
         "Some twins get the same answer: by a shortcut, a guess or an error."),
        (True, "?", "undecided", "Whether the answer depends on what is asked is undecided."),
    )  # fmt: skip


def judge_needed(
    own: Figure,
    mean: Figure,
    chance: float,
    noun: str,
    which: str = "questions",
    **others: Figure | None,
) -> Finding:
    """Judge test 2 by how much accuracy falls below that without intervention (own).

    mean    accuracy under mean ablation, see Figures.ablated (for a written chain: without it)
    others  accuracy under two further ablations, "none" (the answer is forced before the first
            thought) and "unrelated" (another question's thoughts); the smallest fall counts
    """
    the = f"The {noun} {'are' if noun.endswith('s') else 'is'}"
    others = {name: x for name, x in others.items() if decided(x)}
    falls = [x["fall"] for x in (mean, *others.values()) if decided(x)]
    fall = min(falls, key=lambda x: x["value"], default={"value": 0, "lo": 0, "hi": 1})
    gain = own["value"] - chance
    text = f"Under mean ablation ({noun} averaged over questions), accuracy"
    if noun == "written chain":
        text = "Without the written chain, accuracy"
    text += f" on {which} goes from {{0}} to {{1}}"
    also = {
        "none": f"; with the answer forced before the first of the {noun}, to ",
        "unrelated": f"; with the {noun} of an unrelated question, to ",
    }
    text += "".join(f"{also[name]}{{{i}}}" for i, name in enumerate(others, 2)) + "."
    lost = percent(min(1.0, fall["value"] / max(gain, 0.01)))
    lost = f"The smallest fall is {lost} of the gain over a guess ({percent(chance)})."
    unclear, part = f"Whether {the.lower()} needed is undecided.", extent(fall, 0.8 * gain)
    return finding(
        "needed",
        text,
        [own, mean, *others.values()],
        (not decided(own), "?", "undecided", unclear),
        (own["lo"] <= chance + 0.05, "?", "undecided", unclear,
         "The model is hardly better than guessing on these questions."),
        (fall["hi"] < min(0.05, 0.2 * gain), "no", "not needed", f"{the} not needed."),
        (not decided(mean), "?", "undecided", unclear),
        (fall["lo"] >= 0.8 * gain, "yes", "needed", f"{the} needed.", lost),
        (fall["lo"] > 0, "part", f"needed {part}", f"{the} needed {part}.", lost),
        (True, "?", "undecided", unclear),
    )  # fmt: skip


def judge_carried(
    twin: Figure, unrelated: Figure, stays: Figure, kept: Figure, noun: str, twinned: bool = True
) -> Finding:
    """Judge test 3 by the answers that change to the twin's, for two donors of the slots.

    stays  answers that do not change if the twin is the donor
    kept   answers that do not change if an unrelated question is the donor
    """
    are, those = ("are", "those") if noun.endswith("s") else ("is", "that")
    ok = decided(twin, stays) and bool(unrelated) and unrelated["n"] >= MIN_PAIRS
    ignored = ok and twin["hi"] <= 0.1 and stays["lo"] >= 0.9
    overlap = ok and twin["lo"] <= unrelated["hi"] and unrelated["lo"] <= twin["hi"]
    part = extent(twin, 0.9) if ok else ""
    text = "Interchange intervention, where both answers are correct: if only the "
    text += f"{noun} of a question {are} replaced by "
    if twinned:
        figures = [twin, unrelated]
        text += "its twin's, {0} of the answers change to the twin's; if by "
        text += f"{those} of an unrelated question (as many steps), {{1}}."
    else:
        figures = [twin, stays, kept]
        text += f"{those} of another question, {{0}} of the answers change to that question's and "
        text += f"{{1}} do not change; if by {those} of a third (as many steps), {{2}} do not."
    return finding(
        "carried",
        text,
        figures,
        (not ok, "?", "undecided", f"Whether the answer is carried by the {noun} is undecided."),
        (ok and twin["lo"] >= 0.9 and unrelated["hi"] < twin["lo"], "yes", "carried",
         f"The answer is carried by the {noun}."),
        (ignored and kept["lo"] >= 0.9, "no", "ignored", f"The {noun} {are} ignored."),
        (ignored, "?", "undecided",
         f"The {noun} of twins are interchangeable, but not those of unrelated questions.", ""),
        (overlap, "?", "undecided",
         f"Whether replacing the {noun} moves the answer or only destroys it is undecided."),
        (True, "part", f"carried {part}", f"The answer is carried {part} by the {noun}."),
    )  # fmt: skip


def judge_search(
    twin: Figure,
    other: Figure,
    same: Figure,
    noun: str,
    query: str = "other options",
    renamed: Figure | None = None,
    retargeted: Figure | None = None,
) -> Finding:
    """Judge test 4 by the answers that change to the twin's, for five donors of the slots.

    other, same  the twin and the question itself, asked with other options: the search is the same,
                 the answer is not
    renamed      the question itself after the names of its entity and the twin's are exchanged: the
                 search is the same, the name that is asked about is not (None: no ProsQA)
    retargeted   the question itself after the options' names are exchanged in the facts: the search
                 begins as before, but ends at the twin's answer (None: no ProsQA)
    """
    enough = decided(twin, other, same)
    ok = enough and twin["lo"] >= 0.9
    separate = ok and other["lo"] > same["hi"]
    no_answer = ok and other["lo"] > 0.8 and same["hi"] < 0.2
    mostly = separate and other["lo"] > 0.5 and same["hi"] < 0.5
    controlled = ok and decided(renamed, retargeted)
    named = controlled and renamed["lo"] > max(same["hi"], 0.1)  # a part depends on the name
    begun = controlled and retargeted["lo"] <= 0.5  # perhaps only the start of a search
    text = (
        f"If the {noun} come from the twin with {query}, {{0}} of the answers change to the twin's;"
        f" if they come from the question itself with {query}, {{1}}"
    )
    if renamed and retargeted:
        text += "; with the two names exchanged, {2}; with the two options exchanged in the facts "
        text += "(the same first steps lead to the other option), {3}"
    return finding(
        "search",
        f"{text}.",
        [other, same, *filter(None, [renamed, retargeted])],
        (not enough, "?", "undecided", f"What the {noun} hold is undecided."),
        (not ok, "?", "undecided", f"What the {noun} hold is undecided.",
         f"This test needs an answer that changes with the {noun}, see the test before."),
        (controlled and renamed["hi"] >= 0.5 or no_answer and begun, "part",
         "what is asked, perhaps no search",
         f"The {noun} carry what is asked, and perhaps no search."),
        (named and separate, "part", "search and what is asked",
         f"The {noun} carry what is asked, and part of the search."),
        (no_answer and controlled and retargeted["lo"] > 0.8, "yes", "the search, not the answer",
         f"The {noun} carry the search, not the answer.",
         f"So the {noun} hold where the search has arrived; the options are compared afterwards."),
        (no_answer and controlled, "part", "part of the search",
         f"The {noun} carry part of the search, not the answer.",
         "For some questions they do not hold its end."),
        (no_answer, "part", "not the answer",
         f"The {noun} carry the search, or what is asked, but not the answer."),
        (ok and not separate and other["lo"] <= 0.5, "no", "the answer itself",
         f"The {noun} carry the answer itself, not the search."),
        (mostly and begun, "part", "more than the answer",
         f"The {noun} carry more than the answer: what is asked, or the start of the search."),
        (mostly, "part", "more search than answer",
         f"The {noun} carry more of the search than of the answer."),
        (True, "part", "search and answer", f"The {noun} carry some of both, search and answer."),
    )  # fmt: skip


def judge_depth(
    accuracy: dict[int, list[Figure]], slots: dict[int, list[Figure]], noun: str
) -> Finding:
    """Judge test 5. Both arguments map a number of steps to fractions of answers:

    accuracy  correct after 0, 1, 2, ... thoughts
    slots     changed to the twin's if only slot 1, 2, ... is replaced
    """
    counts = {h: plateau(figures) for h, figures in accuracy.items()}
    strongest = [max(range(len(f)), key=lambda j: f[j]["value"]) + 1 for f in slots.values()]
    phrases = [
        f"{count(h, 'step')}: {k or '0 (no clear gain)'}, {{{i}}}"
        for i, (h, k) in enumerate(counts.items())
    ]
    alone = (
        f"The single slot that changes most answers is number {', '.join(map(str, strongest))} "
        f"for {', '.join(map(str, slots))} steps."
    )
    # one step may need no thought; the deepest questions must gain from the thoughts they add
    values = [k for h, k in counts.items() if h > 1]
    deepest = accuracy[max(accuracy)]
    gains = bool(values) and deepest[values[0]]["hi"] < deepest[values[-1]]["lo"]
    rises = values == sorted(values) and strongest == sorted(strongest) and gains
    return finding(
        "depth",
        f"Number of {noun} that give 80\xa0% of the gain in accuracy, and the accuracy with them: "
        f"{'; '.join(phrases)}.",
        [accuracy[h][k] for h, k in counts.items()],
        (rises, "yes", "deeper takes more", f"Deeper questions need more {noun}.",
         strongest and alone),
        (True, "part", "depth unclear", f"Deeper questions do not clearly need more {noun}."),
    )  # fmt: skip


def judge_read(best: dict[int, dict[str, Any]]) -> Finding:
    """Judge test 6. best: distance -> the thought that names concepts at this distance most."""
    phrases, good = [], []
    for i, (d, b) in enumerate(best.items()):
        phrases.append(
            f"at thought {b['thought']}, {{{2 * i}}} of the probability of all concepts goes to "
            f"those {count(d, 'step')} from the entity (control, from the twin's entity: "
            f"{{{2 * i + 1}}}; {percent(b['base'])} of the concepts are at this distance)"
        )
        own, control = b["own"]["value"], b["other"]["value"]
        good += [own >= 2 * b["base"] and own >= control + 0.2 and b["mass"] >= MIN_MASS]
    thoughts = [b["thought"] for b in best.values()]
    return finding(
        "read",
        f"{LENS}: {'; '.join(phrases)}. {UNUSED}",
        [b[name] for b in best.values() for name in ("own", "other")],
        (all(good) and thoughts == sorted(set(thoughts)), "yes", "readable",
         "The LM head can read the thoughts: later ones name concepts farther away."),
        (any(good), "part", "readable in part", "The LM head can read the thoughts in part."),
        (True, "no", "not readable",
         "The LM head does not name the concepts one or two steps away."),
    )  # fmt: skip


def judge_words(p: dict[int, dict[str, Figure]]) -> Finding:
    """Judge test 6 for tasks without a graph. p: see words_by_step."""
    i = max(p, key=lambda i: p[i]["own"]["value"] - p[i]["other"]["value"])
    own, other = p[i]["own"], p[i]["other"]
    is_above = own["lo"] > other["hi"]
    return finding(
        "read",
        f"{LENS}: at thought {i}, {{0}} of the probability goes to the words of step {i}, and "
        f"{{1}} to those of another question's step {i}. {UNUSED}",
        [own, other],
        (is_above and own["value"] >= max(2 * other["value"], MIN_MASS), "yes", "readable",
         "The LM head can read the thoughts: they name the words of their step."),
        (is_above, "part", "readable in part", "The LM head can read the thoughts in part."),
        (True, "no", "not readable", "The LM head cannot read the thoughts."),
    )  # fmt: skip


def judge_write(w: dict[str, Any]) -> Finding:
    """Judge test 7. w: the results of steering, see readout."""
    figures = {point["id"]: point for point in w["points"] + w["erase"]}
    other, own, control = map(figures.get, ("other", "own", "control"))
    right, wrong = figures.get("right"), figures.get("wrong")
    ok, shown, erased = decided(other, control), [other, own, control], ""
    part = extent(other, 0.8) if ok else ""
    if right and wrong:
        shown += [right, wrong]
        erased = " If the branch to the answer is projected out, {3} stay correct; if another, {4}"
        split = decided(right, wrong) and wrong["lo"] > right["hi"]
        erased += ": the answer needs the branch to it, not the other." if split else "."
    return finding(
        "write",
        f"Steering: thought {w['thought']} becomes the mean thought plus {w['factor']} times the "
        f"mean embedding of concepts. Those {count(w['distance'], 'step')} from the twin's entity "
        "change {0} of the answers, those from the question's own entity {1}, others {2}." + erased,
        shown,
        (not ok, "?", "undecided", "Whether concepts can be written into a thought is undecided."),
        (ok and other["lo"] > max(0.8, control["hi"]), "yes", "writable",
         "Concepts written into a thought steer the answer."),
        (ok and other["lo"] > control["hi"], "part", f"writable {part}",
         f"Concepts written into a thought steer the answer {part}."),
        (ok and other["value"] < control["value"] + 0.05, "no", "not writable",
         "Concepts written into a thought do not steer the answer."),
        (True, "?", "undecided", "Whether concepts can be written into a thought is undecided."),
    )  # fmt: skip


def judge_control(own: Figure, control: Figure, name: str, noun: str) -> Finding:
    """Judge whether a model is more accurate than a control run that has no such thoughts."""
    return finding(
        "control",
        f"Accuracy is {{0}}; that of {name} is {{1}}.",
        [own, control],
        (not decided(own, control), "?", "undecided",
         "Whether the model is more accurate than the control is undecided."),
        (own["lo"] > control["hi"], "yes", "better than the control",
         "The model is more accurate than the control."),
        (True, "no", "not better than the control",
         "The model is not clearly more accurate than the control.",
         f"So accuracy is no evidence that the {noun} help."),
    )  # fmt: skip


def judge_unsolved(trained: Figure, own: Figure, chance: float, both: bool) -> Finding:
    """Return the finding that the model is hardly better than guessing.

    both  `own` was measured on different questions than `trained`, without a shortcut
    """
    hopeless = max(trained["hi"], own["hi"]) < chance + 0.15
    return finding(
        "solves",
        f"Accuracy is {{0}}{', and {1} without a shortcut' * both}; guessing gives "
        f"{percent(chance)}.",
        [trained, own],
        (hopeless, "no", "does not solve these questions",
         "The model does not solve these questions."),
        (True, "?", "undecided", "Whether the model solves these questions is undecided."),
    )  # fmt: skip
