"""Command lines and config files into frozen dataclasses: one field, one --flag."""

import argparse
import ast
import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from nanococonut.runtime.errors import UserError

T = TypeVar("T")


def option(
    default: Any,
    help: str,
    group: str = "run",
    ge: float | None = None,
    le: float | None = None,
    gt: float | None = None,
    lt: float | None = None,
    choices: Sequence[str] | None = None,
    alias: str | None = None,
) -> Any:
    """A dataclass field with its help, its --help group and its allowed values."""
    meta = dict(help=help, group=group, ge=ge, le=le, gt=gt)
    meta |= dict(lt=lt, choices=choices, alias=alias)
    return field(default=default, metadata=meta)


def validate(config: Any) -> None:
    """Types and ranges of every field of a config dataclass. UserError names the field."""
    hints = typing.get_type_hints(type(config))
    for f in dataclasses.fields(config):
        value, meta = getattr(config, f.name), f.metadata
        if not _is_a(value, hints[f.name]):
            raise UserError(
                f"{f.name}={value!r} has the wrong type: {type(value).__name__}.\n"
                f"It has to be {_type_name(hints[f.name])} ({meta['help']})."
            )
        bounds = (
            ("ge", "at least", lambda v, b: v >= b),
            ("le", "at most", lambda v, b: v <= b),
            ("gt", "more than", lambda v, b: v > b),
            ("lt", "less than", lambda v, b: v < b),
        )
        for key, words, holds in bounds:
            limit = meta.get(key)
            if value is not None and limit is not None and not holds(value, limit):  # NaN too
                raise UserError(
                    f"{f.name}={value!r} is out of range ({meta['help']}).\n"
                    f"It has to be {words} {meta[key]}."
                )
        if meta.get("choices") and value is not None and value not in meta["choices"]:
            raise UserError(
                f"{f.name}={value!r} is not known.{_hint(str(value), meta['choices'])}\n"
                f"Choose one of: {', '.join(meta['choices'])}."
            )


def _is_a(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_is_a(value, h) for h in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "True or False"}
    if isinstance(hint, types.UnionType):
        kinds = typing.get_args(hint)
        return " or ".join("None" if h is type(None) else _type_name(h) for h in kinds)
    return names[hint]


def _hint(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def _aliases(cls: type) -> dict[str, str]:
    """Other spelling -> field name."""
    return {a: f.name for f in dataclasses.fields(cls) if (a := f.metadata.get("alias"))}


def read_config_file(path: str | Path, cls: type) -> dict[str, Any]:
    """The assignments of a config file. Only literals: nothing in it is ever executed."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:
        reason = "not there" if isinstance(e, FileNotFoundError) else "not readable as UTF-8 text"
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        has = f"{path.parent}/ holds: {', '.join(near)}." if near else "Give a file of assignments."
        raise UserError(f"config file {path} is {reason}.{_hint(path.name, near)}\n{has}") from None
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError) as e:
        line = getattr(e, "lineno", None) or 1
        raise UserError(
            f"{path}, line {line}: not a config file ({e.args[0]}).\n"
            "Write one literal assignment a line, such as n_layer = 2."
        ) from None
    known = {f.name for f in dataclasses.fields(cls)}
    aliases, values = _aliases(cls), {}
    for node in body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        simple = isinstance(node, ast.Assign) and len(node.targets) == 1
        if not simple or not isinstance(node.targets[0], ast.Name):
            raise UserError(
                f"{path}, line {node.lineno}: only assignments of literals may stand here.\n"
                "Write name = value, such as n_layer = 2."
            )
        name = aliases.get(node.targets[0].id, node.targets[0].id)
        if name not in known:
            raise UserError(
                f"{path}, line {node.lineno}: unknown key {name!r}."
                f"{_hint(name, sorted(known | set(aliases)))}\nSee --help for all keys."
            )
        try:
            values[name] = ast.literal_eval(node.value)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            raise UserError(
                f"{path}, line {node.lineno}: the value of {name} is not a literal.\n"
                "Write a number, a text in quotes, True, False or None."
            ) from None
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:  # argparse would print all of the usage
        raise UserError(f"{message}.\nSee --help for what can be given.")


def _parse_value(text: str, hint: Any) -> Any:
    """A command-line value as the field's type; left as text where it is not (checked later)."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in kinds and text in ("None", "none"):
        return None
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    if float in kinds or int in kinds:
        try:
            value = ast.literal_eval(text)
            return value if not isinstance(value, str) else text
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text
    return text


def parse_cli(
    cls: type[T],
    argv: Sequence[str],
    description: str,
    config_file: bool = False,
    short: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], str | None]:
    """Command line -> (what was given, by field name; the config file's path or None).

    --key=value and --key value, a bare --flag for True. Nothing is merged or checked yet.
    """
    hints = typing.get_type_hints(cls)
    parser = _Parser(description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
    if config_file:
        parser.add_argument("config", nargs="?", help="a file of literal assignments")
    groups: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        group = f.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        names = [f"--{f.name}"]
        if f.metadata.get("alias"):
            names.append(f"--{f.metadata['alias']}")
        kwargs: dict[str, Any] = {}
        if hints[f.name] is bool:
            kwargs = dict(nargs="?", const="True")
        text = f.metadata["help"]
        if f.metadata.get("choices"):
            text += f": {', '.join(f.metadata['choices'])}"
        groups[group].add_argument(
            *names,
            dest=f.name,
            default=argparse.SUPPRESS,
            metavar=_type_name(hints[f.name]).split()[-1].upper(),
            help=f"{text} [{f.default}]".replace("%", "%%"),
            **kwargs,
        )
    given, rest = parser.parse_known_args(argv)
    if rest:
        key = rest[0].split("=")[0]
        known = [f"--{n}" for n in [f.name for f in dataclasses.fields(cls)] + [*_aliases(cls)]]
        raise UserError(f"unknown argument {key!r}.{_hint(key, known)}\nSee --help for all keys.")
    values = vars(given)
    config = values.pop("config", None)
    return {k: _parse_value(v, hints[k]) for k, v in values.items()}, config


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def make_config(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """The dataclass from layers of settings, later ones winning. UserError where one is wrong."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    return cls(**merged)


def format_config(config: Any) -> str:
    """Return the settings that differ from their defaults, wrapped at 80 columns."""
    changed = [
        f"{f.name}={value!r}"
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default
    ]
    return textwrap.fill(
        " ".join(changed) or "all settings are the defaults",
        width=80,
        initial_indent="  ",
        subsequent_indent="  ",
        break_long_words=False,  # a path stays in one piece
        break_on_hyphens=False,
    )
