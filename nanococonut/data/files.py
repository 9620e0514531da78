"""Read and write files of examples. Six formats are read and recognized by their content:

JSON list        [{question, steps, answer}, ...], the released code's format; the one written
JSON lines       one such object per line
openai/gsm8k     {question, answer: "4*6=<<4*6=24>>24 eggs.\\n#### 24"}, as JSON lines or list
CODI             {question, cot: "<<4*6=24>> <<24-3=21>>", answer: "21"}, as JSON lines or list
raw ProntoQA     the JSON of the public generator
GSM8k-Aug text   question||<<16-3-4=9>> <<9*2=18>> #### 18
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from nanococonut.data.examples import Example, parse_object
from nanococonut.runtime.errors import UserError

Parse = Callable[[Any], Example]  # raises ValueError for an invalid entry

OBJECT = "An example is an object: question (string), steps (list of strings), answer (string)."


def read_examples(path: str | os.PathLike[str], skipped: list[str] | None = None) -> list[Example]:
    """Return the validated examples of a file in any format.

    An invalid example raises a UserError that names file and place. If `skipped` is a list, invalid
    examples are dropped and their errors appended to it. A file without a valid example always
    raises a UserError.
    """
    path = Path(path)
    try:
        # a byte that is not UTF-8 becomes a lone surrogate, which parse_object() rejects
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        reason = f"cannot be read: {getattr(e, 'strerror', None) or e}"
        reason = "does not exist" if isinstance(e, FileNotFoundError) else reason
        raise UserError(f"{path} {reason}.\nGive a file of examples.") from None
    return collect(path, *_detect_format(path, text), skipped)


def collect(
    source: str | os.PathLike[str],
    entries: Iterable[tuple[str, Any]],
    parse: Parse,
    expected: str,
    skipped: list[str] | None,
) -> list[Example]:
    """Return the examples of (place, entry) pairs, made by parse(); see read_examples.

    expected   second line of an error: what an entry should look like
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
    if not examples:
        first = f", the first: {errors[0]}" if errors else ""
        raise UserError(f"{source} holds no valid examples{first}.\n{expected}")
    if skipped is not None:
        skipped += errors
    return examples


def write_examples(path: str | os.PathLike[str], examples: Sequence[Example]) -> None:
    """Write a new JSON list, one example per line. Raise UserError if the file exists."""
    text = "[\n" + ",\n".join(json.dumps(example) for example in examples) + "\n]\n"
    created = False
    try:
        with open(path, "x", encoding="utf-8") as f:
            created = True
            f.write(text)
    except OSError as e:
        if created:  # leave no partial file
            os.unlink(path)
        missing = isinstance(e, FileNotFoundError)
        reason = "its folder does not exist" if missing else e.strerror
        raise UserError(f"{path} cannot be written: {reason}.\nChoose another file.") from None


# ---- parse one entry of each format, or raise ValueError if it is invalid


def parse_gsm8k_line(line: str) -> Example:
    """Return the example on a line of GSM8k-Aug text.

    The answer keeps its commas; examples.is_correct ignores them in numbers.
    """
    solved, mark, answer = line.rpartition("####")
    question, bars, steps = (solved or answer).rpartition("||")  # the question may contain ||
    if not bars:
        raise ValueError("no || after the question")
    if not mark:
        raise ValueError("no #### before the answer")
    return parse_gsm8k_columns({"question": question, "steps": steps.split(" "), "answer": answer})


def parse_gsm8k_columns(columns: dict[str, Any]) -> Example:
    """Return the example in the columns question, steps, answer; strip texts, drop empty steps."""
    x = parse_object(columns)
    steps = [step.strip() for step in x["steps"] if step.strip()]
    return {"question": x["question"].strip(), "steps": steps, "answer": x["answer"].strip()}


def parse_row(row: Any) -> Example:
    """Return the example in a JSON object: {question, steps, answer}, openai/gsm8k's or CODI's.

    In the last two formats the steps are the equations, as in GSM8k-Aug, or else the lines.
    """
    if isinstance(row, dict) and "steps" not in row:
        solution, answer = row.get("cot"), row.get("answer")
        if "cot" not in row and isinstance(answer, str) and "####" in answer:
            solution, _, answer = answer.rpartition("####")
        if isinstance(solution, str):
            steps = re.findall("<<.*?>>", solution) or solution.split("\n")
            return parse_gsm8k_columns(row | {"steps": steps, "answer": answer})
    return parse_object(row)


def parse_raw_prontoqa(raw: Any) -> Example:
    """Return an example of the public ProntoQA generator, converted as in the released code.

    raw   {"test_example": {question, query, chain_of_thought, answer}}; other keys are ignored
    """
    try:
        test = raw["test_example"]
        chain = parse_object({**test, "steps": test["chain_of_thought"]})["steps"]
        steps = [" ".join(chain[i : i + 2]) for i in range(0, len(chain), 2)]
        question = f"{test['question']} {test['query']}"
        return parse_object({"question": question, "steps": steps, "answer": test["answer"]})
    except (KeyError, TypeError, ValueError):
        raise ValueError("not an example of the public generator") from None


def _detect_format(path: Path, text: str) -> tuple[list[tuple[str, Any]], Parse, str]:
    """Return collect()'s (entries, parse, expected). Raise UserError if the text fits no format."""
    try:
        value = _load_json(text)
    except ValueError as e:
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        start = lines[0][1].strip() if lines else ""
        # "[" or a lone "{" starts an invalid JSON value of several lines, not JSON lines
        if not start.startswith("[") and start != "{":
            if any(line.lstrip().startswith("{") for _, line in lines):
                return lines, lambda line: parse_row(_load_json(line)), OBJECT
            if "||" in text:
                line = "A line is: question||<<16-3-4=9>> <<9*2=18>> #### 18"
                return lines, parse_gsm8k_line, line
        raise UserError(
            f"{path}, line {getattr(e.__cause__, 'lineno', 1)}: {e}.\nGive a JSON list of examples."
        ) from None
    if isinstance(value, dict):
        if any(isinstance(v, dict) and "test_example" in v for v in value.values()):
            keys = "question, query, answer (texts), chain_of_thought (texts)"
            return list(value.items()), parse_raw_prontoqa, f"Expected test_example: {{{keys}}}."
    values = value if isinstance(value, list) else [value]  # JSON lines with one line
    return [(f"example {i}", entry) for i, entry in enumerate(values)], parse_row, OBJECT


def _load_json(text: str) -> Any:
    """Return the JSON value. Raise ValueError with the reason; its cause has the line number."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg})") from e
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None
