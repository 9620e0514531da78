"""The example that every task is made of."""

import re
from typing import Any, TypedDict

MARK = "### "  # every layout writes it before the answer
NUMBER = re.compile(r"[-+]?\$?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")  # 1,234.5


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


def split_answer(text: str, known: str = "") -> tuple[str, str | None]:
    """Return (written steps, answer) of a generated text. The answer is None if there is no mark.

    known: the correct answer. Marks that it contains itself do not start the generated one.
    """
    steps, *answer = text.rsplit(MARK, 1 + known.count(MARK))
    return steps, MARK.join(answer).strip() if answer else None


def is_correct(text: str, known: str) -> bool:
    """Return whether the answer of a generated text is the known one. 1,000 equals 1000."""
    answer, known = split_answer(text, known)[1], known.strip()
    if answer and NUMBER.fullmatch(answer) and NUMBER.fullmatch(known):
        return answer.replace(",", "") == known.replace(",", "")
    return answer == known


def is_correct_as_released(text: str, known: str) -> bool:
    """Return is_correct by the released code's rule: after the last "#", without any comma."""
    answer = text.rpartition("#")[2] if "#" in text else ""
    return answer.replace(",", "").strip() == known.replace(",", "").strip() != ""
