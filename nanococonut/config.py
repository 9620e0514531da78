"""Settings: frozen dataclasses, plain files of literal assignments, --key=value on top.

A field's metadata carries its help text, its group in --help, and what values are allowed; all of
it is checked before any work. Precedence: the dataclass's default, then the config file, then the
command line.
"""

import argparse
import ast
import dataclasses
import difflib
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from nanococonut.errors import UserError

T = TypeVar("T")


def opt(
    default: Any,
    help: str,
    group: str = "run",
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[str] | None = None,
    alias: str | None = None,
) -> Any:
    """A dataclass field with its help, its --help group and its allowed values."""
    meta = dict(help=help, group=group, at_least=at_least, at_most=at_most, above=above)
    meta |= dict(below=below, choices=choices, alias=alias)
    return field(default=default, metadata=meta)


METHOD_NAMES = (
    "coconut", "cot", "no_cot", "icot", "pause", "coconut_no_curriculum", "coconut_no_thought",
    "pause_as_thought", "soft_thought", "projected",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything train.py can be told. The defaults are the paper's ProsQA recipe."""

    # data
    task: str = opt("prosqa", "what the rows are", "data", choices=("prosqa", "prontoqa", "gsm8k"))
    data: str | None = opt(None, "train on this file of rows instead of the task's own", "data")
    valid_data: str | None = opt(None, "validate on this file of rows", "data")
    hub_revision: str = opt(
        "main", "GSM8k: commit, tag or branch of the rows' copy on the hub", "data"
    )
    skip_bad_rows: bool = opt(
        False, "leave out rows of files that are bad or too long, and say so", "data"
    )
    rows_per_epoch: int = opt(17_886, "generated rows in an epoch", "data", at_least=1)
    fresh_rows: bool = opt(
        False, "generate new rows for every epoch, and batch rows of like length", "data"
    )
    valid_rows: int = opt(300, "generated validation rows", "data", at_least=1)
    n_nodes: int = opt(28, "ProsQA: nodes before pruning", "data", at_least=4, at_most=55)
    min_hops: int = opt(3, "ProsQA: fewest steps to the answer", "data", at_least=1)
    max_hops: int = opt(
        6, "ProsQA: most steps to the answer; ProntoQA: steps to the concept with the property",
        "data", at_least=1,
    )  # fmt: skip
    matched_share: float = opt(
        0.0, "share of training rows without the depth shortcut", "data", at_least=0, at_most=1
    )
    short_share: float = opt(
        0.0, "share of training rows with chains of 1 .. min_hops - 1 steps", "data",
        at_least=0, at_most=1,
    )  # fmt: skip
    render: str = opt(
        "sentences", "how ProsQA and ProntoQA are written", "data", choices=("sentences", "compact")
    )
    # model
    init_from: str = opt(
        "scratch", "scratch, gpt2, gpt2-medium, -large, -xl, or a folder, run or file of weights",
        "model",
    )  # fmt: skip
    fallback: str | None = opt(
        None, "config trained instead where the weights or a GPU for them are missing", "model"
    )
    tokenizer: str = opt("gpt2", "vocabulary", "model", choices=("gpt2", "words"))
    n_layer: int = opt(12, "layers", "model", at_least=1)
    n_head: int = opt(12, "attention heads", "model", at_least=1)
    n_embd: int = opt(768, "width", "model", at_least=1)
    block_size: int = opt(1024, "longest sequence", "model", at_least=8)
    dropout: float = opt(0.1, "dropout", "model", at_least=0, below=1)
    smear: bool = opt(False, "add W times the previous input embedding", "model")
    token_std: float = opt(0.02, "token embeddings' first std", "model", at_least=0)
    # curriculum
    method: str = opt("coconut", "training method", "curriculum", choices=METHOD_NAMES)
    c_thought: int = opt(1, "thoughts for each dropped step", "curriculum", at_least=0)
    max_latent_stage: int = opt(6, "last numbered stage", "curriculum", at_least=0, at_most=100)
    pad_latent_to_max: bool = opt(
        True, "final stage: the same thoughts for rows with fewer steps", "curriculum"
    )
    final_thoughts: int | None = opt(
        None, "thoughts in the final stage (None: c_thought * max_latent_stage)", "curriculum",
        at_least=0,
    )  # fmt: skip
    uniform_prob: float = opt(
        0.0, "chance that a row draws its own stage: from 0 to its number of steps, or, with "
        "advance_at, to the curriculum's stage", "curriculum", at_least=0, at_most=1,
    )  # fmt: skip
    epochs: int = opt(50, "epochs in all", "curriculum", at_least=1)
    epochs_per_stage: int = opt(5, "epochs of a stage", "curriculum", at_least=1)
    first_stage_epochs: int | None = opt(
        None, "epochs of stage 0 (None: as the others; 0: skip it)", "curriculum", at_least=0
    )
    advance_at: float = opt(
        0.0, "move on when this share of recent rows is all right (0: off)", "curriculum",
        at_least=0, at_most=1,
    )  # fmt: skip
    icot_tokens: float = opt(
        8.0, "icot: chain tokens removed by every epoch (may be a fraction)", "curriculum", above=0
    )
    soft_temperature: float = opt(
        1.0, "soft_thought: temperature of the mean over tokens", "curriculum", above=0
    )
    soft_top_k: int = opt(0, "soft_thought: tokens in the mean (0: all)", "curriculum", at_least=0)
    stop: str = opt(
        "constant", "how many thoughts when asked: the stage's, or as a classifier trained on the "
        "hidden states says", "curriculum", choices=("constant", "classifier"),
    )  # fmt: skip
    # optimizer
    batch_size: int = opt(128, "rows of an optimizer step", "optimizer", at_least=1)
    micro_batch_size: int = opt(32, "rows of a forward pass", "optimizer", at_least=1)
    learning_rate: float = opt(1e-4, "AdamW's rate", "optimizer", above=0, alias="lr")
    muon_learning_rate: float = opt(
        0.0, "Muon's rate for the layers' matrices (0: AdamW trains all)", "optimizer", at_least=0
    )
    weight_decay: float = opt(0.01, "AdamW's decay", "optimizer", at_least=0)
    beta2: float = opt(0.999, "AdamW's second beta", "optimizer", at_least=0, below=1)
    grad_clip: float = opt(0.0, "clip the gradient's norm (0: off)", "optimizer", at_least=0)
    warmup_steps: int = opt(0, "steps of linear warm-up", "optimizer", at_least=0)
    decay_share: float = opt(
        0.0, "last share of all steps, in which the rate falls to 0", "optimizer",
        at_least=0, at_most=1,
    )  # fmt: skip
    reset_optimizer: str = opt(
        "stage", "when AdamW's moments are forgotten", "optimizer",
        choices=("stage", "epoch", "never"),
    )  # fmt: skip
    # run
    seed: int = opt(0, "of rows, weights, dropout and draws", at_least=0, at_most=2**32 - 1)
    out_dir: str | None = opt(None, "where the run is kept (None: out/<config's name>)")
    resume: bool = opt(False, "go on with the run in out_dir")
    max_steps: int = opt(0, "stop after this many steps (0: at the schedule's end)", at_least=0)
    save_interval: int = opt(200, "steps between checkpoints", at_least=1)
    eval_interval: int = opt(
        0, "steps between validations in the final stage (0: at stage ends only)", at_least=0
    )
    max_new_tokens: int = opt(128, "longest generated answer", at_least=1)
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt(
        "auto", "forward pass: bfloat16 autocast, or float32, or that with tf32 products on a GPU "
        "(auto: bfloat16 on a GPU)", choices=("auto", "float32", "tf32", "bfloat16"),
    )  # fmt: skip
    recompute: bool = opt(False, "make the MLPs anew in backward: less memory, more time")
    kernels: str = opt(
        "auto", "thoughts' attention over the prefix and the head's loss by Triton or plain torch "
        "(auto: Triton on a GPU without dropout)",
        choices=("auto", "triton", "torch"),
    )  # fmt: skip
    graph: str = opt("auto", "forward and backward by CUDA graphs", choices=("auto", "on", "off"))

    def __post_init__(self) -> None:
        check_values(self)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads.\n"
                "Choose n_embd as a multiple of n_head."
            )
        if self.task == "prosqa" and self.min_hops > self.max_hops:
            raise UserError(
                f"min_hops={self.min_hops} is more than max_hops={self.max_hops}.\nSwap them."
            )
        thoughts = max(self.c_thought * self.max_latent_stage, self.final_thoughts or 0)
        if thoughts + 4 > self.block_size:  # a word, <bot>, <eot> and eos are the least
            raise UserError(
                f"{thoughts} thoughts (c_thought, final_thoughts) do not fit into "
                f"block_size={self.block_size}.\nUse fewer thoughts or a longer block_size."
            )
        if self.matched_share + self.short_share > 1:
            raise UserError(
                f"matched_share={self.matched_share} and short_share={self.short_share} are more "
                "than all rows.\nLower one: together they may be 1."
            )
        if self.graph == "on" and self.ungraphed:
            raise UserError(
                "graph='on' does not go with recompute and dropout.\n"
                "Use --graph=auto, which leaves graphs out there."
            )
        if self.render == "compact" and self.task == "gsm8k":
            raise UserError(
                "render='compact' is not for gsm8k, whose rows are any text.\nUse "
                "--render=sentences."
            )
        if self.render == "compact" and self.tokenizer == "gpt2":
            raise UserError(
                "render='compact' is for the word-level vocabulary, tokenizer is 'gpt2'.\n"
                "Use --render=sentences or --tokenizer=words."
            )

    @property
    def ungraphed(self) -> bool:
        """Return whether a CUDA graph is ruled out: dropout would be drawn a second time."""
        return self.recompute and self.dropout > 0


def check_values(config: Any) -> None:
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
            ("at_least", "at least", lambda v, b: v >= b),
            ("at_most", "at most", lambda v, b: v <= b),
            ("above", "more than", lambda v, b: v > b),
            ("below", "less than", lambda v, b: v < b),
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


def build(cls: type[T], *layers: Mapping[str, Any]) -> T:
    """The dataclass from layers of settings, later ones winning. UserError where one is wrong."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    return cls(**merged)


def show(config: Any) -> str:
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
