"""One schema for the rows of latency.py, throughput.py and kernels.py, a JSON line each:

    what      what was measured: "latent step", "token step", "first token", "answer", ...
    variant   who did it, or by which way: "ours", "released", "written chain", "floor", ...
    device    "NVIDIA H200", or "CPU x86_64 AVX2, 2 threads"
    dtype     of the weights and the cache
    shapes    the sizes it was measured at, whole numbers: batch, context, thoughts, tokens, n_layer
    value     the median, in `unit`
    unit      ms, GB/s, questions/s, launches, times (of two that took turns, pair by pair)
    spread    {"p10": ..., "p90": ...} of the repeats, in `unit`; {} where a value was derived
    repeats   how often it was measured
    versions  of Python and packages, of the process that was measured
    commit    of this repository, "-dirty" where files had changed
    command   that measures it again; local paths are written as RELEASED, PYTHON, ...
    date      UTC, when the run began: 2026-01-31T12:00:00Z

Rows are appended, never edited. Older files (table1, training, curves, drift, loss) have forms of
their own.
"""

import json
import math
import platform
import re
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from nanococonut.runtime.errors import UserError
from nanococonut.runtime.provenance import provenance
from nanococonut.weights import checkpoint

FIELDS: dict[str, type | tuple[type, ...]] = {
    "what": str,
    "variant": str,
    "device": str,
    "dtype": str,
    "shapes": dict,
    "value": (int, float),
    "unit": str,
    "spread": dict,
    "repeats": int,
    "versions": dict,
    "commit": str,
    "command": str,
    "date": str,
}
UNITS = ("ms", "GB/s", "questions/s", "launches", "times")


def check(row: Mapping[str, Any]) -> None:
    """UserError says what is wrong with a row."""

    def wrong(what: str) -> UserError:
        return UserError(
            f"a row of results is wrong: {what}.\nbench/schema.py says what it has to hold."
        )

    if row.keys() != FIELDS.keys():
        names = sorted(row.keys() ^ FIELDS.keys())
        raise wrong(f"it lacks or should not have {', '.join(names)}")
    for name, kind in FIELDS.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise wrong(f"{name} is {row[name]!r}")
    for name in ("what", "variant", "device", "dtype", "commit", "command"):
        if not row[name]:
            raise wrong(f"{name} is empty")
    if row["unit"] not in UNITS:
        raise wrong(f"unit is {row['unit']!r}, not one of {', '.join(UNITS)}")
    if not (math.isfinite(row["value"]) and row["value"] >= 0):
        raise wrong(f"value is {row['value']}")
    if not all(type(n) is int for n in row["shapes"].values()):
        raise wrong(f"shapes are {row['shapes']}, not whole numbers")
    if row["spread"] and row["spread"].keys() != {"p10", "p90"}:
        raise wrong(f"spread is {row['spread']}, not p10 and p90")
    low, high = row["spread"].get("p10", row["value"]), row["spread"].get("p90", row["value"])
    if not low <= row["value"] <= high:
        raise wrong(f"its median {row['value']} is not between {low} and {high}")
    if row["repeats"] < 1 or "torch" not in row["versions"]:
        raise wrong(f"repeats={row['repeats']}, versions={row['versions']}")
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"]):
        raise wrong(f"date is {row['date']!r}")


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """p10, p50, p90 of at least one value, between neighbours as numpy has it."""
    if len(values) == 1:
        return (values[0],) * 3
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], cuts[4], cuts[8]


def command_of(config: Any, script: str) -> str:
    """The command line that asks for a config, local paths by name: what is not its default."""
    words = ["python", script]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "out" or value == f.default:
            continue
        local = isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists())
        shown = f.name.rpartition("_")[2].upper() if local else str(value)
        words.append(f"--{f.name}={shown}")
    return shlex.join(words)


def device_name(device: torch.device) -> str:
    """The machine in words, without its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n = torch.get_num_threads()
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"CPU {kind}, {n} thread{'s' * (n > 1)}"


class Rows:
    """Rows of one run: what they have in common is said once. path: also append each to a file."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        command: str,
        path: str | None,
        shapes: Mapping[str, int],
    ) -> None:
        about = provenance()
        self.path = Path(path) if path else None
        if self.path and not self.path.parent.is_dir():
            raise UserError(f"--out {path} cannot be written: its folder is not there.")
        self.versions, self.shapes, self.rows = about["versions"], dict(shapes), []
        self.common = {
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "commit": about["commit"],
            "command": command,
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def add(
        self,
        what: str,
        variant: str,
        values: Sequence[float],
        unit: str,
        versions: Mapping[str, str] | None = None,
        derived: bool = False,
        **shapes: int,
    ) -> dict[str, Any]:
        """A row of the repeats' values. versions: instead of this process's. derived: computed, not
        measured: no spread."""
        low, median, high = (float(f"{v:.5g}") for v in quantiles(values))
        found = {
            "what": what,
            "variant": variant,
            "shapes": self.shapes | shapes,
            "value": median,
            "unit": unit,
            "spread": {} if derived else {"p10": low, "p90": high},
            "repeats": len(values),
            "versions": dict(self.versions if versions is None else versions),
        }
        row = {name: (self.common | found)[name] for name in FIELDS}
        check(row)
        self.rows.append(row)
        if self.path:
            checkpoint.append_row(self.path, row)
        return row

    def line(self, bench: str, **more: Any) -> str:
        """All of them as one JSON line, what they share only once."""
        own = [k for k in FIELDS if k not in self.common and k != "versions"]
        rows = []
        for row in self.rows:
            short = {k: row[k] for k in own}
            short["shapes"] = {k: v for k, v in row["shapes"].items() if k not in self.shapes}
            if row["versions"] != self.versions:
                short["versions"] = row["versions"]
            rows.append(short)
        head = {"bench": bench, **self.common, "versions": self.versions, "shapes": self.shapes}
        return json.dumps(head | more | {"rows": rows})
