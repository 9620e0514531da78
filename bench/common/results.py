"""One schema for every row that a bench script writes, a JSON line each. Rows are only appended."""

import json
import math
import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanococonut.runtime.errors import UserError
from nanococonut.runtime.provenance import provenance
from nanococonut.weights import checkpoint

OURS = "nanococonut"  # a row's provider
Row = dict[str, Any]
FIELDS: dict[str, type] = {  # of a row
    "bench": str,  # script: latency, throughput, training, kernels, accuracy
    "metric": str,  # latent_step, answer, throughput, step, accuracy, ...
    "provider": str,  # who was measured: nanococonut, released, transformers, torch, roofline, ...
    "labels": dict,  # text that identifies it: task, path, config, method, relative_to, ...
    "shape": dict,  # integers that identify it: batch, context, thoughts, n_layer, ...
    "value": float,  # the median
    "unit": str,  # ms, us, GB/s, questions/s, examples/s, fraction; x: ratio to labels.relative_to
    # p10 and p90, the 95 % interval ci_low and ci_high, or min and max; {} for a derived value
    "spread": dict,
    "repeats": int,
    "detail": dict,  # what does not identify it: categories, losses, the evaluated run, ...
    "device": str,  # "NVIDIA H200", or "CPU x86_64 AVX2, 2 threads"
    "dtype": str,  # of weights and cache
    "commit": str,  # of this repository, "-dirty" if files had changed
    "versions": dict,  # of Python and packages in the measured process
    "command": str,  # that measures it again; local paths are written as RELEASED, PYTHON, ...
    "date": str,  # UTC, when the run began: 2026-01-31T12:00:00Z; some old rows: "unknown"
}


def validate_row(row: Row) -> None:
    """Raise UserError if a row lacks a field of FIELDS, has another, or one of the wrong type."""
    bad = sorted(row.keys() ^ FIELDS.keys())  # missing or unknown
    bad = bad or [name for name, kind in FIELDS.items() if not isinstance(row[name], kind)]
    if bad:
        raise UserError(
            f"not a valid result: {bad[0]} is {row.get(bad[0], 'missing')!r}.\n"
            "bench/common/results.py has the schema."
        )


def fmt(value: float) -> str:
    """Format a positive number with three digits, or all of its digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def command_line(config: Any, script: str) -> str:
    """Return the command that gives this config: values other than the defaults, paths by name."""
    words = ["python", script]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "out" or value == f.default:
            continue
        is_local = isinstance(value, str) and (Path(value).is_absolute() or Path(value).exists())
        text = f.name.rpartition("_")[2].upper() if is_local else str(value)
        words.append(f"--{f.name}={text}")
    return shlex.join(words)


def device_name(device: torch.device) -> str:
    """Return the kind of machine, without its name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU {platform.machine()}"
    n = torch.get_num_threads()
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"CPU {kind}, {n} thread{'s' * (n > 1)}"


def load_average() -> float:
    """Return how many processes want to run; NaN on Windows, which does not count them."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


class ResultWriter:
    """The rows of one run. Each is printed, and appended to the file config.out, at once.

    bench, config: the script and its options. shared: labels (text) and sizes of all rows.
    """

    def __init__(
        self,
        bench: str,
        config: Any,
        device: torch.device,
        dtype: torch.dtype | str,
        /,  # a label may have the name "config"
        **shared: str | int,
    ) -> None:
        about = provenance()
        self.path = Path(config.out) if config.out else None
        if self.path and not self.path.parent.is_dir():
            raise UserError(f"--out {self.path} cannot be written: its folder does not exist.")
        self.versions, self.shared = about["versions"], shared
        self.rows: list[Row] = []
        self.common = {
            "bench": bench,
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "commit": about["commit"],
            "command": command_line(config, f"bench/{bench}.py"),
            "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }

    def add(
        self,
        metric: str,
        provider: str,
        values: Sequence[float],
        unit: str,
        *,
        detail: dict[str, Any] | None = None,
        spread: dict[str, float] | None = None,
        versions: dict[str, str] | None = None,
        **own: str | int,
    ) -> Row:
        """Append, print and return a row of repeated measurements.

        spread     instead of p10 and p90; {} for a derived value
        versions   of another process
        own        labels (text) and sizes of this row
        """
        low, median, high = (float(f"{v:.5g}") for v in np.percentile(values, (10, 50, 90)))
        row = self.common | {
            "metric": metric,
            "provider": provider,
            "labels": {k: v for k, v in (self.shared | own).items() if isinstance(v, str)},
            "shape": {k: v for k, v in (self.shared | own).items() if not isinstance(v, str)},
            "value": median,
            "unit": unit,
            "spread": {"p10": low, "p90": high} if spread is None else spread,
            "repeats": len(values),
            "detail": detail or {},
            "versions": versions or self.versions,
        }
        self.rows.append({name: row[name] for name in FIELDS})
        if self.path:
            checkpoint.append_row(self.path, self.rows[-1])
        text = [metric, *(v for v in own.values() if isinstance(v, str))]
        text[-1] = f"relative to {text[-1]}" if unit == "x" else text[-1]
        text += [f"{name} {n}" for name, n in own.items() if not isinstance(n, str)]
        scale, sign = (100, "%") if unit == "fraction" else (1, "")  # percentages, like all others
        value, *ends = (f"{fmt(scale * v)}{sign}" for v in (median, *row["spread"].values()))
        line = f"{value:>8} {'' if sign else unit:<11} {provider:<20} {', '.join(text)}"
        print(f"{line} ({' .. '.join(ends)})" if ends else line)
        return self.rows[-1]

    def add_ratio(
        self, metric: str, provider: str, slower: Sequence[float], faster: Sequence[float],
        relative_to: str, **extra: Any,
    ) -> None:  # fmt: skip
        """Append the ratio of values from the same rounds, pair by pair."""
        ratios = [a / b for a, b in zip(slower, faster, strict=True)]
        self.add(metric, provider, ratios, "x", **extra, relative_to=relative_to)

    def summary(self, **extra: Any) -> str:
        """Return all rows as one JSON line; what they share is written once."""
        rows = [{k: v for k, v in row.items() if k not in self.common} for row in self.rows]
        return json.dumps(self.common | extra | {"rows": rows})


# ---- reading


def read_jsonl(path: Path) -> list[Row]:
    """Read a file of JSON lines; a missing file has none. UserError names a bad line."""
    if not path.is_file():
        return []
    rows = []
    for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows += [json.loads(line)] if line else []
        except ValueError:
            raise UserError(
                f"{path}, line {i}: not JSON.\nGive another file, or repair this one."
            ) from None
    return rows


def read_results(path: Path) -> list[Row]:
    """Read a file of results. Raise UserError if a row is not valid."""
    rows = read_jsonl(path)
    for row in rows:
        validate_row(row)
    return rows
