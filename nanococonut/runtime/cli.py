"""Parse command lines and config files into frozen dataclasses: each field is one --key."""

import argparse
import ast
import dataclasses
import difflib
import operator
import re
import reprlib
import sys
import textwrap
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from nanococonut.runtime.errors import UserError

T = TypeVar("T")
TYPE_NAMES = {
    int: "an integer", float: "a number", str: "a string", bool: "True or False", NoneType: "None"
}  # fmt: skip
CONSTANTS = {"true": True, "false": False, "none": None}
BOUNDS = {  # argument of option() -> (words for the error, comparison)
    "ge": ("at least", operator.ge),
    "le": ("at most", operator.le),
    "gt": ("more than", operator.gt),
    "lt": ("less than", operator.lt),
}
OTHER_NAMES = {  # other names for an option, mostly nanoGPT's -> its name here
    "checkpoint": "out_dir",
    "compile": "kernels",
    "gradient_accumulation_steps": "micro_batch_size",
    "lr": "learning_rate",
    "lr_decay_iters": "decay_fraction",
    "min_lr": "decay_fraction",
    "out_dir": "checkpoint",
    "start": "question",
    "wandb_log": "tensorboard",
}
LITERAL_ERRORS = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)


def option(
    default: Any,
    help: str,
    group: str = "run",
    choices: Sequence[str] = (),
    **bounds: float,
) -> Any:
    """Return a dataclass field with its help text, its group in --help and its allowed values.

    bounds: limits by the keys of BOUNDS, such as ge=0.
    """
    metadata = dict(help=help, group=group, choices=choices, bounds=bounds)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base class of the options of a script: a frozen dataclass whose fields are option()s."""

    def __post_init__(self) -> None:
        """Raise UserError if a field has a wrong type or value."""
        for f in dataclasses.fields(self):
            _check(f, getattr(self, f.name))
        self.validate()

    def validate(self) -> None:
        """Raise UserError if the options do not fit together."""

    @classmethod
    def from_cli(cls, doc: str | None) -> typing.Self:
        """Return the options in sys.argv. Raise UserError if one is unknown or invalid."""
        return make_config(cls, parse_cli(cls, sys.argv[1:], doc)[0])


def _check(field: dataclasses.Field, value: Any) -> None:
    """Raise UserError if a field of Options cannot have this value."""
    meta, types, shown = field.metadata, _types(field), f"--{field.name}={reprlib.repr(value)}"
    # type(), not isinstance(), because a bool is an int
    if type(value) not in types and not (float in types and type(value) is int):
        expected = " or ".join(TYPE_NAMES[t] for t in types)
        raise UserError(f"{shown}: expected {expected}.\nSee --help.")
    if type(value) is str and re.search("[\0\ud800-\udfff]", value):  # a lone surrogate
        raise UserError(
            f"{shown} contains a zero byte or is not valid UTF-8.\nUse another string or path."
        )
    if value is None:
        return
    for key, limit in meta["bounds"].items():
        words, holds = BOUNDS[key]
        if not holds(value, limit):  # false for NaN
            raise UserError(f"{shown}: expected {words} {limit}.\nSee --help.")
    # what int64 and, with a margin, float32 can hold
    largest = {int: 2**63, float: 1e30}.get(type(value))
    if largest and not abs(value) < largest:
        raise UserError(f"{shown} is too large.\nUse a smaller number.")
    if meta["choices"] and value not in meta["choices"]:
        raise UserError(
            f"{shown} is unknown.{suggestion(value, meta['choices'])}\n"
            f"Choose one of: {', '.join(meta['choices'])}."
        )


def _types(field: dataclasses.Field) -> tuple[Any, ...]:
    """Return the types of a field: (int,) for int, (int, NoneType) for int | None."""
    return typing.get_args(field.type) or (field.type,)


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean X?" for a known word like this one, or ""."""
    name = word.removeprefix("--")
    ours = word.removesuffix(name) + OTHER_NAMES.get(name, name)
    close = [ours] if ours in known else difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]}?" if close else ""


def read_config_file(path: str | Path, cls: type) -> dict[str, Any]:
    """Return name -> value of a config file. Values are literals: nothing in it is executed."""
    path, names = Path(path), [f.name for f in dataclasses.fields(cls)]
    try:
        body = ast.parse(path.read_text(encoding="utf-8-sig")).body
    except (OSError, UnicodeDecodeError) as e:
        missing = isinstance(e, FileNotFoundError)
        reason = "does not exist" if missing else "is not readable as UTF-8 text"
        reason = "is a folder" if path.is_dir() else reason
        folder = path if path.is_dir() else path.parent
        if str(folder) == "." and Path("config").is_dir():  # train.py prosqa_small
            folder = Path("config")
        near = sorted(p.as_posix() for p in folder.glob("*.py") if p != path)
        hint = suggestion((folder / path.with_suffix(".py").name).as_posix(), near)
        advice = f"Available: {', '.join(near)}" if near else "Give a file of assignments"
        raise UserError(f"config file {path} {reason}.{hint}\n{advice}.") from None
    except (SyntaxError, ValueError) as e:
        line = getattr(e, "lineno", None) or 1
        raise UserError(
            f"{path}, line {line}: not a config file ({e.args[0]}).\n"
            "Write one assignment per line, such as n_layer = 2."
        ) from None
    values = {}
    for node in body:
        location = f"{path}, line {node.lineno}"
        match node:
            case ast.Expr(value=ast.Constant()):  # a docstring
                continue
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                pass
            case _:
                raise UserError(
                    f"{location}: only assignments of literals are allowed.\n"
                    "Write name = value, such as n_layer = 2."
                )
        if name not in names:
            raise UserError(
                f"{location}: unknown key {name!r}.{suggestion(name, names)}\n"
                "See --help for all options."
            )
        try:
            values[name] = ast.literal_eval(value)
        except LITERAL_ERRORS:
            raise UserError(
                f"{location}: the value of {name} is not a literal.\n"
                "Write a number, a string in quotes, True, False or None."
            ) from None
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:  # argparse would print the whole usage
        raise UserError(f"{message}.\nSee --help for all options.")


def parse_cli(
    cls: type[T], argv: Sequence[str], doc: str | None, config_file: bool = False
) -> tuple[dict[str, Any], str | None]:
    """Parse --key=value and --key value; a bare --flag means True.

    doc: the script's __doc__ (None under `python -OO`); --help shows its first line. Return (field
    name -> value, only for the keys in argv; path of the config file or None). The values are
    checked later, once the defaults and the config file are merged in.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # set by `python -m NAME`
    parser = _Parser(
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=(doc or "").split("\n")[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # only keys in argv are returned
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    if config_file:
        parser.add_argument("config", nargs="?", help="config file, such as config/prosqa.py")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    names = dict.fromkeys(f.metadata["group"] for f in fields.values())  # unique, in order
    groups = {name: parser.add_argument_group(name) for name in names}
    for f in fields.values():
        meta, types = f.metadata, _types(f)
        choices = f": {', '.join(meta['choices'])}" if meta["choices"] else ""
        groups[meta["group"]].add_argument(
            f"--{f.name}",
            metavar=types[0].__name__.upper(),
            help=f"{meta['help']}{choices} [{f.default}]".replace("%", "%%"),
            **(dict(nargs="?", const="True") if types == (bool,) else {}),
        )
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        key = unknown[0].split("=")[0]
        hint = suggestion(key, [f"--{name}" for name in fields])
        if not key.startswith("-"):
            hint = " Options start with --, such as --seed=1."
        raise UserError(f"unknown argument {key!r}.{hint}\nSee --help for all options.")
    texts = vars(namespace)
    path = texts.pop("config", None) if config_file else None
    return {name: _parse_value(text, _types(fields[name])) for name, text in texts.items()}, path


def _parse_value(text: str, types: tuple[type, ...]) -> Any:
    """Return the text as a value of one of these types, or unchanged, which Options refuses."""
    constant = CONSTANTS.get(text.lower(), text)
    if type(constant) in types:  # a constant, or any text if str is allowed
        return constant
    try:
        return ast.literal_eval(text) if int in types or float in types else text
    except LITERAL_ERRORS:
        return text


def make_config(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """Return cls(**settings). Later layers override earlier ones.

    Raise UserError if a setting is unknown, such as one in a manifest of another version.
    """
    values = {name: value for layer in layers for name, value in layer.items()}
    if unknown := values.keys() - {f.name for f in dataclasses.fields(cls)}:  # type: ignore[arg-type]
        raise UserError(
            f"unknown in this version of nanococonut: {', '.join(sorted(unknown))}.\n"
            "Use the version that wrote the checkpoint, or train again."
        )
    return cls(**values)


def format_config(config: Any, unused: Iterable[str] = ()) -> str:
    """Return the settings that are used and differ from their defaults, wrapped at 80 columns."""
    changed = [
        f"{f.name}={value!r}"
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) != f.default and f.name not in unused
    ]
    text = " ".join(changed) or "all settings are the defaults"
    # do not break paths
    text = textwrap.fill(text, width=78, break_long_words=False, break_on_hyphens=False)
    return textwrap.indent(text, "  ")
