"""The example that every task is made of."""

from typing import Any, TypedDict


class Example(TypedDict):
    """One question with its solution. Further keys are kept (ProsQA stores its graph)."""

    question: str
    steps: list[str]  # may be empty
    answer: str


def parse_object(value: Any) -> Example:
    """Return a JSON object itself. Raise ValueError if it is not an Example."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    for key in Example.__annotations__:
        if key not in value:
            raise ValueError(f"{key!r} is missing")
    steps = value["steps"]
    if not isinstance(steps, list):
        raise ValueError(f"'steps': expected a list of texts, got {type(steps).__name__}")
    named = {"'question'": value["question"], "'answer'": value["answer"]}
    for name, text in (named | {f"'steps'[{i}]": s for i, s in enumerate(steps)}).items():
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected a text, got {type(text).__name__}")
        if name in named and not text.strip():
            raise ValueError(f"{name} is blank")
        # json.loads accepts a lone surrogate, UTF-8 and the tokenizer do not
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name}: not UTF-8 text (half of a surrogate pair), {text[:20]!a}")
    return value


def extract_answer(text: str) -> str:
    """Return the answer in generated text: the part after the last "#", without commas."""
    return text.split("#")[-1].replace(",", "").strip()
