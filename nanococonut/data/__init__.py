"""Rows: a question, the reasoning steps to its answer, the answer. Nothing about tokens or models.

A file of rows is what the released code reads: one JSON list of objects. JSON lines are read too.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypedDict

from nanococonut.errors import UserError


class Row(TypedDict):
    """One example. Keys beyond these are allowed and kept (ProsQA's hold the graph)."""

    question: str
    steps: list[str]  # may be empty
    answer: str


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
    """All rows of a JSON or JSON-lines file, every one checked. UserError names file and row."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text (byte {e.start}).\nGive a JSON file of rows."
        ) from None
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        reason = getattr(e, "strerror", None) or str(e)
        raise UserError(f"{path} cannot be read: {reason}.\nGive a JSON file of rows.") from None
    rows = _parse(path, text)
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds a JSON {_kind(rows)}, where a list of rows is wanted.\n"
            'Write [{"question": ..., "steps": [...], "answer": ...}, ...].'
        )
    if not rows:
        raise UserError(f"{path} holds no rows.\nGive a file with at least one.")
    for i, row in enumerate(rows):
        if wrong := _fault(row):
            raise UserError(
                f"{path}, row {i}: {wrong}.\n"
                "A row is an object: question (text), steps (list of texts), answer (text)."
            )
    return rows


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


def _parse(path: Path, text: str) -> Any:
    """The file's JSON value; JSON lines as a list. UserError names the line."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        whole = e
    lines = [(i, line) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    # a list broken off somewhere is no JSON lines: complain about the list
    if lines and lines[0][1].lstrip().startswith("{"):
        rows = []
        for i, line in lines:
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError) as e:
                raise _not_json(path, i, e) from None
        return rows
    raise _not_json(path, getattr(whole, "lineno", 1), whole) from None


def _not_json(path: Path, line: int, e: Exception) -> UserError:
    reason = getattr(e, "msg", None) or "nested too deeply or a number too long"
    return UserError(f"{path}, line {line}: not JSON ({reason}).\nGive a JSON list of rows.")


def _fault(row: Any) -> str | None:
    """What is wrong with a row, or None."""
    if not isinstance(row, dict):
        return f"a JSON {_kind(row)}, where an object is wanted"
    for key in ("question", "steps", "answer"):
        if key not in row:
            return f"{key!r} is missing"
    for key in ("question", "answer"):
        if not isinstance(row[key], str):
            return f"{key!r} is a {_kind(row[key])}, where a text is wanted"
        if not row[key].strip():
            return f"{key!r} is blank"
    steps = row["steps"]
    if not isinstance(steps, list):
        return f"'steps' is a {_kind(steps)}, where a list of texts is wanted"
    for i, step in enumerate(steps):
        if not isinstance(step, str):
            return f"'steps'[{i}] is a {_kind(step)}, where a text is wanted"
    return None


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "truth value", type(None): "null"}
    return names.get(type(value), "number")
