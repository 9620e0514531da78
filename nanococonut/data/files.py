"""Files of rows: four formats in, told apart by their content, and one out.

A JSON list of {question, steps, answer}   what the released code reads, and what is written here
JSON lines                                 one such object a line
raw ProntoQA                               as the public generator writes it
GSM8k-Aug text                             question||<<16-3-4=9>> <<9*2=18>> #### 18
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanococonut.data import Row, fault, kind
from nanococonut.errors import UserError

OBJECT = "A row is an object: question (text), steps (list of texts), answer (text)."
EXAMPLE = "An example is {test_example: {question, query, chain_of_thought, answer}}."
LINE = "A line is: question||<<16-3-4=9>> <<9*2=18>> #### 18"
BAD_BYTE = re.compile("[\udc80-\udcff]")  # how a byte that is not UTF-8 is decoded here


def read_rows(path: str | os.PathLike[str], skipped: list[str] | None = None) -> list[Row]:
    """All rows of a file in any of the formats, every one checked.

    A bad row is a UserError that names file and place. With a list `skipped` it is left out
    instead, and what would have been said about it is appended to the list; what is no file of
    rows at all, or has none that is good, stays an error.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path} cannot be read: {reason}.\nGive a file of rows.") from None
    wanted, read, entries = _format(path, text)
    return collect(path, entries, read, wanted, skipped)


def collect(
    source: str | os.PathLike[str],
    entries: Iterable[tuple[str, Any]],
    read: Callable[[Any], list[Row]],
    wanted: str,
    skipped: list[str] | None,
) -> list[Row]:
    """The rows that read() makes of (place, entry) pairs; read raises ValueError for bad ones.

    wanted: what an entry should be, for the error's second line. skipped: as in read_rows.
    """
    rows: list[Row] = []
    bad: list[str] = []
    for place, entry in entries:
        try:
            rows += read(entry)
        except (ValueError, UserError) as e:
            reason = str(e).split("\n")[0].removesuffix(".")
            bad.append(f"{source}, {place}: {reason}")
            if skipped is None:
                raise UserError(f"{bad[0]}.\n{wanted}") from None
    if not rows and bad:
        raise UserError(f"all {len(bad)} rows are bad, the first: {bad[0]}.\n{wanted}")
    if not rows:
        raise UserError(f"{source} holds no rows.\nGive one that has at least one.")
    if skipped is not None:
        skipped += bad
    return rows


def skipped_line(n_rows: int, skipped: Sequence[str]) -> str:
    """What to tell the user about rows left out, beside the n_rows that were read."""
    return f"{len(skipped)} of {n_rows + len(skipped)} rows skipped, the first: {skipped[0]}"


def write_rows(path: str | os.PathLike[str], rows: Sequence[Row], overwrite: bool = False) -> None:
    """One JSON list, a row a line; there at once and whole, or not at all.

    UserError where the file exists and overwrite is False, or cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    try:
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists already.\nChoose another name or remove it first.")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except (OSError, ValueError) as e:
        with suppress(OSError):
            temporary.unlink()
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path} cannot be written: {reason}.\nChoose another file.") from None


# what an entry should be, what makes rows of one, and all entries with their places in the file
_Format = tuple[str, Callable[[Any], list[Row]], list[tuple[str, Any]]]


def _format(path: Path, text: str) -> _Format:
    """How to read this text. UserError where it is in none of the formats."""
    try:
        value = _json(text)
    except ValueError as e:
        lines = [(f"line {i}", line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
        start = lines[0][1].strip() if lines else ""
        # a list or an object over several lines, broken somewhere, is no JSON lines
        if not start.startswith("[") and start != "{":
            if any(line.lstrip().startswith("{") for _, line in lines):
                return OBJECT, lambda line: _row(_json(line)), lines
            if "||" in text:
                return LINE, _gsm8k, lines
        at = getattr(e.__cause__, "lineno", 1)
        if odd := BAD_BYTE.search(text):
            at = text.count("\n", 0, odd.start()) + 1
        raise UserError(f"{path}, line {at}: {e}.\nGive a JSON list of rows.") from None
    if isinstance(value, list):
        return OBJECT, _row, [(f"row {i}", row) for i, row in enumerate(value)]
    if isinstance(value, dict):
        if any(isinstance(v, dict) and "test_example" in v for v in value.values()):
            return EXAMPLE, _prontoqa, [(key, {key: example}) for key, example in value.items()]
        return OBJECT, _row, [("row 0", value)]  # JSON lines with one line
    raise UserError(
        f"{path} holds a JSON {kind(value)}, where a list of rows is wanted.\n"
        'Write [{"question": ..., "steps": [...], "answer": ...}, ...].'
    )


def _utf8(text: str) -> str:
    """The text itself. ValueError where a byte of it could not be decoded."""
    if BAD_BYTE.search(text):
        raise ValueError("not UTF-8 text")
    return text


def _json(text: str) -> Any:
    """Its JSON value. ValueError with the reason, caused by what knows the line."""
    try:
        return json.loads(_utf8(text))
    except json.JSONDecodeError as e:
        raise ValueError(f"not JSON ({e.msg})") from e
    except RecursionError:
        raise ValueError("not JSON (nested too deeply)") from None


def _row(value: Any) -> list[Row]:
    if wrong := fault(value):
        raise ValueError(wrong)
    return [value]


def _gsm8k(line: str) -> list[Row]:
    from nanococonut.data import gsm8k  # which imports this module

    return [gsm8k.row_of_line(_utf8(line))]


def _prontoqa(example: dict) -> list[Row]:
    from nanococonut.data import prontoqa

    return prontoqa.rows_of_raw(example)
