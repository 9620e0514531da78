"""Files of examples: four formats are read, recognized by their content; one is written.

JSON list        [{question, steps, answer}, ...], the released code's format; also written here
JSON lines       one such object per line
raw ProntoQA     the JSON of the public generator
GSM8k-Aug text   question||<<16-3-4=9>> <<9*2=18>> #### 18
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from nanococonut.data.examples import Example, json_type_name, validation_error
from nanococonut.runtime.errors import UserError

BAD_BYTE_RE = re.compile("[\udc80-\udcff]")  # how surrogateescape decodes a byte that is not UTF-8


class _Format(NamedTuple):
    parse: Callable[[Any], Example]  # raises ValueError for a bad entry
    expected: str  # what an entry should look like, the second line of an error


def read_examples(path: str | os.PathLike[str], skipped: list[str] | None = None) -> list[Example]:
    """Read and check all examples of a file in any format.

    A bad example raises a UserError that names file and place. If `skipped` is a list, bad examples
    are dropped and their errors appended. A file without any valid example is always an error.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path} cannot be read: {reason}.\nGive a file of examples.") from None
    (parse, expected), entries = _detect_format(path, text)
    return collect(path, entries, parse, expected, skipped)


def collect(
    source: str | os.PathLike[str],
    entries: Iterable[tuple[str, Any]],
    parse: Callable[[Any], Example],
    expected: str,
    skipped: list[str] | None,
) -> list[Example]:
    """Return the examples that parse() makes of (place, entry) pairs; see read_examples.

    parse      raises ValueError for a bad entry
    expected   what an entry should look like, the second line of an error
    """
    examples: list[Example] = []
    errors: list[str] = []
    for place, entry in entries:
        try:
            examples.append(parse(entry))
        except ValueError as e:
            errors.append(f"{source}, {place}: {e}")
            if skipped is None:
                raise UserError(f"{errors[0]}.\n{expected}") from None
    if not examples and errors:
        raise UserError(f"all {len(errors)} examples are bad, the first: {errors[0]}.\n{expected}")
    if not examples:
        raise UserError(f"{source} holds no examples.\nGive one that has at least one.")
    if skipped is not None:
        skipped += errors
    return examples


def skipped_summary(n_examples: int, skipped: Sequence[str]) -> str:
    """Return one line about the skipped examples of a file with `n_examples` valid ones."""
    n_all = n_examples + len(skipped)
    return f"{len(skipped)} of {n_all} examples skipped, the first: {skipped[0]}"


def write_examples(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Write a new file atomically: a JSON list, one example per line.

    Raise UserError if the file exists or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = "[\n" + ",\n".join(json.dumps(example) for example in examples) + "\n]\n"
    try:
        if path.exists():
            raise UserError(f"{path} exists already.\nChoose another name or remove it first.")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except (OSError, ValueError) as e:
        with suppress(OSError):
            temporary.unlink()
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path} cannot be written: {reason}.\nChoose another file.") from None


# ---- one entry of each format -> an example


def parse_object(value: Any) -> Example:
    """Return a JSON object itself. Raise ValueError if it is not an example."""
    if error := validation_error(value):
        raise ValueError(error)
    return value


def parse_json_line(line: str) -> Example:
    """Return the example on a line of JSON. Raise ValueError if it holds none."""
    return parse_object(_load_json(line))


def parse_gsm8k_line(line: str) -> Example:
    """Return the example on a line of GSM8k-Aug text. Raise ValueError if it holds none.

    The answer keeps its commas; extract_answer drops them when answers are compared.
    """
    question, bars, solution = _require_utf8(line).partition("||")
    steps, mark, answer = solution.rpartition("####")
    if not bars:
        raise ValueError("no || after the question")
    if not mark:
        raise ValueError("no #### before the answer")
    return parse_gsm8k_columns({"question": question, "cot": steps, "answer": answer})


def parse_gsm8k_columns(columns: dict[str, Any]) -> Example:
    """Return the example in the columns question, steps or cot, answer. ValueError as above."""
    values = dict(columns)
    if isinstance(values.get("cot"), str):  # all steps in one text
        values["steps"] = values.pop("cot").split(" ")
    if values.keys() != {"question", "steps", "answer"}:
        names = ", ".join(columns)
        raise ValueError(f"expected the columns question, steps or cot, answer, got {names}")
    question, steps, answer = (parse_object(values)[k] for k in ("question", "steps", "answer"))
    steps = [step.strip() for step in steps if step.strip()]  # "" is no step
    return {"question": question.strip(), "steps": steps, "answer": answer.strip()}


def parse_raw_prontoqa(raw: Any) -> Example:
    """Return an example of the public ProntoQA generator, as the released preprocessing does.

    raw   {"test_example": {question, query, chain_of_thought, answer}}; other keys are ignored

    Raise ValueError if it is not one.
    """
    try:
        test = raw["test_example"]
        question, query, chain = test["question"], test["query"], test["chain_of_thought"]
        texts = [question, query, test["answer"], *chain]
        valid = isinstance(chain, list) and all(isinstance(t, str) and t.strip() for t in texts)
    except (KeyError, TypeError):
        valid = False
    if not valid:
        raise ValueError("not an example of the public generator")
    steps = [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)]
    return {"question": f"{question} {query}", "steps": steps, "answer": test["answer"]}


_OBJECT = "An example is an object: question (text), steps (list of texts), answer (text)."
JSON = _Format(parse_object, _OBJECT)
JSON_LINES = _Format(parse_json_line, _OBJECT)
GSM8K = _Format(parse_gsm8k_line, "A line is: question||<<16-3-4=9>> <<9*2=18>> #### 18")
RAW_PRONTOQA = _Format(
    parse_raw_prontoqa,
    "An example is {test_example: {question, query, answer (texts), chain_of_thought (texts)}}.",
)


def _detect_format(path: Path, text: str) -> tuple[_Format, list[tuple[str, Any]]]:
    """Return the format of a text and its (place, entry) pairs. UserError if there is none."""
    try:
        value = _load_json(text)
    except ValueError as e:
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        start = lines[0][1].strip() if lines else ""
        # "[" or a lone "{" starts a broken JSON value over several lines, not JSON lines
        if not start.startswith("[") and start != "{":
            if any(line.lstrip().startswith("{") for _, line in lines):
                return JSON_LINES, lines
            if "||" in text:
                return GSM8K, lines
        line_number = getattr(e.__cause__, "lineno", 1)
        if bad_byte := BAD_BYTE_RE.search(text):
            line_number = text.count("\n", 0, bad_byte.start()) + 1
        raise UserError(
            f"{path}, line {line_number}: {e}.\nGive a JSON list of examples."
        ) from None
    if isinstance(value, list):
        return JSON, [(f"example {i}", entry) for i, entry in enumerate(value)]
    if isinstance(value, dict):
        if any(isinstance(v, dict) and "test_example" in v for v in value.values()):
            return RAW_PRONTOQA, list(value.items())
        return JSON, [("example 0", value)]  # JSON lines with one line
    raise UserError(
        f"{path}: expected a list of examples, got a JSON {json_type_name(value)}.\n"
        'Write [{"question": ..., "steps": [...], "answer": ...}, ...].'
    )


def _require_utf8(text: str) -> str:
    """Return the text. Raise ValueError if a byte of it is not UTF-8."""
    if BAD_BYTE_RE.search(text):
        raise ValueError("not UTF-8 text")
    return text


def _load_json(text: str) -> Any:
    """Return the JSON value. Raise ValueError with the reason; its cause knows the line."""
    try:
        return json.loads(_require_utf8(text))
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg})") from e
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
