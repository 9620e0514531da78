"""Do a model's thoughts do anything? Rules that turn the figures of seven tests into words.

A rule needs a whole 95 % interval on one side. A cell decides nothing if it has too few questions,
or if the candidates together have less than half of the probability. report.py runs the tests.
"""

from typing import Any

from nanococonut.evaluation.interchange import Figure
from nanococonut.evaluation.pairs import MIN_PAIRS
from nanococonut.evaluation.readout import MIN_MASS

Finding = dict[str, Any]


def decided(*figures: Figure | None) -> bool:
    """Return whether the cells have enough questions, and answers that are candidates at all."""
    return all(f and f.get("n", 0) >= MIN_PAIRS and f.get("mass", 1) >= 0.5 for f in figures)


def finding(name: str, text: str, figures: list[Figure | None], *cases: tuple) -> Finding:
    """Return the finding of the first case that holds.

    text   with {0}, {1}, ... for the figures
    cases  (whether it holds, mark, verdict in few words, title, and perhaps a further sentence)
    """
    mark, verdict, title, *more = next(case[1:] for case in cases if case[0])
    text = " ".join([text, *filter(None, more)])
    about = {"id": name, "mark": mark, "verdict": verdict, "title": title}
    return about | {"text": text, "figures": figures}


def percent(p: float) -> str:
    return f"{100 * p:.0f}\xa0%"


def count(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def plateau(cells: list[Figure]) -> int:
    """Return after how many thoughts four fifths of the gain in accuracy are there."""
    values = [f["value"] for f in cells]
    gain = max(values) - values[0]
    return next(k for k, v in enumerate(values) if v - values[0] >= 0.8 * gain) if gain > 0.1 else 0


def judge_pairs(plain: Figure, one: Figure, both: Figure) -> Finding:
    """Test 1. A rule that ignores what is asked is right for exactly one of two twins."""
    ok = decided(plain, one, both)
    return finding(
        "pairs",
        "As in training, it is right in {0}. Of two twins that both need steps, both are right in "
        "{1} and exactly one, which is all that a rule that ignores what is asked can do, in {2}.",
        [plain, both, one],
        (ok and both["hi"] < 0.2, "no", "ignores what is asked", "It ignores what is asked."),
        (ok and one["hi"] < 0.1, "yes", "looks at what is asked", "It looks at what is asked."),
        (ok and one["lo"] > 0.1, "part", "partly a shortcut",
         "Part of its accuracy is a rule that ignores what is asked."),
        (True, "?", "undecided", "Whether it looks at what is asked is undecided."),
    )  # fmt: skip


def judge_needed(own: Figure, mean: Figure, chance: float, noun: str) -> Finding:
    """Test 2. Does accuracy fall if the slots hold what they hold on average?"""
    is_plural, ok = noun.endswith("s"), decided(own) and mean is not None
    the = f"The {noun} {'are' if is_plural else 'is'}"
    without = f"With {noun} averaged over questions" if is_plural else f"Without the {noun}"
    share = (own["value"] - mean["value"]) / max(own["value"] - chance, 0.01) if ok else 0.0
    gain = f"This is {percent(min(1.0, share))} of its gain over guessing ({percent(chance)})."
    falls = ok and mean["hi"] < own["lo"]
    return finding(
        "needed",
        f"{without}, accuracy {'falls' if falls else 'goes'} from {{0}} to {{1}}.",
        [own, mean],
        (not ok, "?", "undecided", f"Whether {the.lower()} needed is undecided."),
        (falls and share >= 0.8, "yes", "needed", f"{the} needed.", gain),
        (falls, "part", "needed in part", f"{the} needed in part.", gain),
        (True, "no", "not needed", f"{the} not needed.", "The intervals overlap."),
    )


def judge_carried(
    twin: Figure, unrelated: Figure, stays: Figure, noun: str, twinned: bool = True
) -> Finding:
    """Test 3. Does the answer follow the slots of the twin? stays: it is still the question's."""
    are, those = ("are", "those") if noun.endswith("s") else ("is", "that")
    ok = decided(twin, stays) and unrelated is not None  # of which only the choice matters
    overlap = ok and twin["lo"] <= unrelated["hi"] and unrelated["lo"] <= twin["hi"]
    donor, whose = "the twin", "the twin's"
    if not twinned:
        donor = "a question with as many steps and another answer"
        whose = "that question's and {2} stay as they are"
    return finding(
        "carried",
        f"If only the {noun} {are} replaced, by {those} of {donor}, {{0}} of the answers become "
        f"{whose}; by {those} of an unrelated question with as many steps, {{1}}.",
        [twin, unrelated] + ([] if twinned else [stays]),
        (not ok, "?", "undecided", f"Whether the answer is carried by the {noun} is undecided."),
        (ok and twin["lo"] >= 0.9 and unrelated["hi"] < twin["lo"], "yes", "carried",
         f"The answer is carried by the {noun}."),
        (ok and twin["hi"] <= 0.1 and stays["lo"] >= 0.9, "no", "ignored",
         f"The {noun} {are} ignored."),
        (overlap, "?", "undecided", "Destroyed or moved: undecided."),
        (True, "part", "carried in part", f"The answer is carried in part by the {noun}."),
    )  # fmt: skip


def judge_search(
    twin: Figure, other: Figure, same: Figure, noun: str, asked: str = "other options"
) -> Finding:
    """Test 4. The donors were asked otherwise: what moves, the search or the answer?"""
    ok = decided(twin, other, same)
    return finding(
        "search",
        f"The {noun} of the twin with {asked} flip {{0}} of the answers; those of the question "
        f"itself with {asked} flip {{1}}.",
        [other, same],
        (not ok, "?", "undecided", f"What the {noun} hold is undecided."),
        (ok and other["lo"] > 0.5 and same["hi"] < 0.5, "yes", "the search, not the answer",
         "They carry the search, not the answer.",
         "So they hold where it has come to; the answer is chosen afterwards."),
        (ok and other["hi"] < 0.5 and twin["lo"] >= 0.9, "no", "the answer itself",
         "They carry the answer itself, not the search."),
        (True, "part", "search and answer", "They carry some of both, the search and the answer."),
    )  # fmt: skip


def judge_depth(
    accuracy: dict[int, list[Figure]], slots: dict[int, list[Figure]], noun: str
) -> Finding:
    """Test 5. Do questions of more steps take more slots? Both by steps, then by slots."""
    counts = {h: plateau(cells) for h, cells in accuracy.items()}
    carriers = [max(range(len(c)), key=lambda j: c[j]["value"]) + 1 for c in slots.values()]
    parts = [f"{count(h, 'step')}: {k}, {{{i}}}" for i, (h, k) in enumerate(counts.items())]
    numbers, values = ", ".join(map(str, carriers)), list(counts.values())
    alone = (
        f"For {', '.join(map(str, slots))} steps, the slot that moves most answers alone is number"
    )
    rises = values == sorted(values) and carriers == sorted(carriers) and len(set(values)) >= 3
    return finding(
        "depth",
        f"Number of {noun} after which four fifths of the gain in accuracy are there, and the "
        f"accuracy then: {'; '.join(parts)}.",
        [accuracy[h][k] for h, k in counts.items()],
        (rises, "yes", "deeper takes more", f"Deeper questions take more {noun}.",
         carriers and f"{alone} {numbers}."),
        (True, "part", "depth unclear", f"Deeper questions do not plainly take more {noun}."),
    )  # fmt: skip


def judge_read(best: dict[int, dict[str, Any]]) -> Finding:
    """Test 6. Does the LM head name nodes further and further away?

    best  distance -> thought, own and other (figures), base, mass: where it names most
    """
    parts, good = [], []
    for i, (d, b) in enumerate(best.items()):
        parts.append(
            f"thought {b['thought']} gives {{{2 * i}}} of its probability on concepts to those "
            f"{count(d, 'step')} away (counted from the twin's entity {{{2 * i + 1}}}; "
            f"{percent(b['base'])} of concepts are that far)"
        )
        own, control = b["own"]["value"], b["other"]["value"]
        good += [own >= 2 * b["base"] and own >= control + 0.2 and b["mass"] >= MIN_MASS]
    rising = [b["thought"] for b in best.values()]
    return finding(
        "read",
        f"Read by the LM head, {' and '.join(parts)}. What can be read need not be used.",
        [b[name] for b in best.values() for name in ("own", "other")],
        (all(good) and rising == sorted(set(rising)), "yes", "readable",
         "They can be read, and move outward."),
        (any(good), "part", "readable in part", "They can be read in part."),
        (True, "no", "not readable", "Nothing can be read in them."),
    )  # fmt: skip


def judge_words(found: dict[int, dict[str, Figure]]) -> Finding:
    """Test 6 without a graph. Does thought i name the words of step i? See words_by_step."""
    i = max(found, key=lambda i: found[i]["own"]["value"] - found[i]["other"]["value"])
    own, other = found[i]["own"], found[i]["other"]
    more = own["lo"] > other["hi"]
    return finding(
        "read",
        f"Read by the LM head, thought {i} gives {{0}} to the words of step {i}, and {{1}} to those"
        f" of step {i} of another question. What can be read need not be used.",
        [own, other],
        (more and own["value"] >= max(2 * other["value"], MIN_MASS), "yes", "readable",
         "They can be read: they name the words of their step."),
        (more, "part", "readable in part", "They can be read in part."),
        (True, "no", "not readable", "Nothing can be read in them."),
    )  # fmt: skip


def judge_write(w: dict[str, Any]) -> Finding:
    """Test 7. Does the answer follow concepts that are written, or erased, by hand?"""
    cells = {point["id"]: point for point in w["points"] + w["erase"]}
    other, own, control = map(cells.get, ("other", "own", "control"))
    right, wrong = cells.get("right"), cells.get("wrong")
    ok, figures, erased = decided(other, control), [other, own, control], ""
    if right and wrong:
        figures += [right, wrong]
        erased = "With the one right branch erased {3} stay right, with a wrong one {4}"
        split = wrong["lo"] > right["hi"]
        erased += ": branches are held side by side, and each one counts." if split else "."
    return finding(
        "write",
        f"Thought {w['thought']} becomes the mean thought plus {w['factor']} times the mean "
        f"embedding of the concepts {count(w['distance'], 'step')} from an entity. The twin's "
        "flip {0} of the answers, the question's own {1}, other concepts {2}. " + erased,
        figures,
        (not ok, "?", "undecided", "Whether they can be written by hand is undecided."),
        (ok and other["lo"] > max(0.8, control["hi"]), "yes", "writable",
         "They can be written by hand."),
        (ok and other["lo"] > control["hi"], "part", "writable in part",
         "They can be written by hand in part."),
        (True, "no", "not writable", "They cannot be written by hand in this way."),
    )  # fmt: skip


def judge_unsolved(trained: Figure, own: Figure, chance: float) -> Finding:
    """Say that the other tests cannot be asked."""
    return finding(
        "solves",
        f"It is right in {{0}}, without a shortcut in {{1}}; guessing gives {percent(chance)}.",
        [trained, own],
        (True, "no", "does not solve these questions", "It does not solve these questions."),
    )
