"""The Example type of all tasks, and what counts as a correct answer."""

import re
from typing import Any, TypedDict

MARK = "### "  # precedes the answer in every task
NUMBER = re.compile(r"[-+]?\$?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)(\.[0-9]+)?")  # 1,234.5


class Example(TypedDict):
    """A question with its solution. Other keys are kept (ProsQA stores its graph)."""

    question: str
    steps: list[str]  # may be empty
    answer: str


def parse_object(value: Any) -> Example:
    """Return the JSON value unchanged. Raise ValueError if it is not an Example."""
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {type(value).__name__}")
    for key in Example.__annotations__:
        if key not in value:
            raise ValueError(f"{key!r} is missing")
    steps = value["steps"]
    if not isinstance(steps, list):
        raise ValueError(f"'steps': expected a list of strings, got {type(steps).__name__}")
    texts = {"'question'": value["question"], "'answer'": value["answer"]}
    texts |= {f"'steps'[{i}]": step for i, step in enumerate(steps)}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name}: expected a string, got {type(text).__name__}")
        if name in ("'question'", "'answer'") and not text.strip():
            raise ValueError(f"{name} is blank")
        # json.loads accepts a lone surrogate, but UTF-8 and the tokenizer do not
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise ValueError(f"{name}: not UTF-8 text (half of a surrogate pair), {text[:20]!a}")
    return value


def split_answer(text: str, known: str = "") -> tuple[str, str | None]:
    """Return (text before the mark, answer after it). The answer is None if there is no mark.

    known   the correct answer; if it contains marks, the answer in the text may contain as many
    """
    steps, *answer = text.rsplit(MARK, 1 + known.count(MARK))
    return steps, MARK.join(answer).strip() if answer else None


def is_correct(text: str, known: str) -> bool:
    """Return whether a generated text ends in the known answer. 1,000 equals 1000."""
    answer, known = split_answer(text, known)[1], known.strip()
    if answer and NUMBER.fullmatch(answer) and NUMBER.fullmatch(known):
        return answer.replace(",", "") == known.replace(",", "")
    return answer == known


def is_correct_as_released(text: str, known: str) -> bool:
    """Apply the released code's rule: compare what follows the last "#", without commas."""
    answer = text.rpartition("#")[2] if "#" in text else ""
    return answer.replace(",", "").strip() == known.replace(",", "").strip() != ""
