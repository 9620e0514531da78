"""The example that every task is made of."""

from typing import Any, TypedDict


class Example(TypedDict):
    """One question with its solution. Further keys are kept (ProsQA stores its graph)."""

    question: str
    steps: list[str]  # may be empty
    answer: str


def validation_error(value: Any) -> str | None:
    """Return what keeps a JSON value from being an Example, or None."""
    if not isinstance(value, dict):
        return f"expected an object, got a JSON {json_type_name(value)}"
    for key in Example.__annotations__:
        if key not in value:
            return f"{key!r} is missing"
    steps = value["steps"]
    if not isinstance(steps, list):
        return f"'steps': expected a list of texts, got a {json_type_name(steps)}"
    named = {"'question'": value["question"], "'answer'": value["answer"]}
    for name, text in (named | {f"'steps'[{i}]": s for i, s in enumerate(steps)}).items():
        if not isinstance(text, str):
            return f"{name}: expected a text, got a {json_type_name(text)}"
        if name in named and not text.strip():
            return f"{name} is blank"
        # json.loads accepts a lone surrogate, UTF-8 and the tokenizer do not
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            return f"{name}: not UTF-8 text (half of a surrogate pair), {text[:20]!a}"
    return None


def json_type_name(value: Any) -> str:
    """Return the type of a JSON value in words."""
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")


def extract_answer(text: str) -> str:
    """Return the answer in generated text: the part after the last "#", without commas."""
    return text.split("#")[-1].replace(",", "").strip()
