"""Rows: a question, the reasoning steps to its answer, the answer. Nothing about tokens or models.

files.py reads and writes them; prosqa.py, prontoqa.py and gsm8k.py are the paper's three tasks.
"""

from typing import Any, TypedDict


class Row(TypedDict):
    """One example. Keys beyond these are allowed and kept (ProsQA's hold the graph)."""

    question: str
    steps: list[str]  # may be empty
    answer: str


def fault(row: Any) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"a JSON {kind(row)}, where an object is wanted"
    for key in ("question", "steps", "answer"):
        if key not in row:
            return f"{key!r} is missing"
    for key in ("question", "answer"):
        if not isinstance(row[key], str):
            return f"{key!r} is a {kind(row[key])}, where a text is wanted"
        if not row[key].strip():
            return f"{key!r} is blank"
    steps = row["steps"]
    if not isinstance(steps, list):
        return f"'steps' is a {kind(steps)}, where a list of texts is wanted"
    for i, step in enumerate(steps):
        if not isinstance(step, str):
            return f"'steps'[{i}] is a {kind(step)}, where a text is wanted"
    for text in (row["question"], *steps, row["answer"]):
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            return f"{text[:20]!a} holds half of a surrogate pair, which is no text"
    return None


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
