"""The schema of a result row. Bench scripts append rows to files, one JSON line each."""

import json
import math
import os
import platform
import shlex
import sys
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
    "bench": str,  # the script: latency, throughput, training, kernels, accuracy, insight
    "metric": str,  # latent_step, answer, throughput, step, accuracy, ...
    "provider": str,  # what was measured: nanococonut, released, transformers, roofline, ...
    "labels": dict,  # text that identifies the row: task, path, config, method, relative_to, ...
    "shape": dict,  # integers that identify the row: batch, context, thoughts, n_layer, ...
    "value": float,  # the median
    "unit": str,  # ms, us, GB/s, questions/s, examples/s, fraction; x: ratio to labels.relative_to
    # p10 and p90, the 95 % interval ci_low and ci_high, or min and max; {} for a derived value
    "spread": dict,
    "repeats": int,
    "detail": dict,  # what does not identify the row: categories, losses, the evaluated run, ...
    "device": str,  # "NVIDIA H200", or "CPU x86_64 AVX2, 2 threads"
    "dtype": str,  # of the weights
    "commit": str,  # of this repository; "-dirty" if files had changed
    "versions": dict,  # Python and packages of the measured process
    "command": str,  # that measures the row again; local paths become RELEASED, PYTHON, ...
    "date": str,  # UTC, when the run began: 2026-01-31T12:00:00Z; "unknown" in some old rows
}


def validate_row(row: Row) -> None:
    """Raise UserError if a row has missing, unknown or wrongly typed fields."""
    bad = sorted(row.keys() ^ FIELDS.keys())  # missing or unknown
    bad = bad or [name for name, kind in FIELDS.items() if not isinstance(row[name], kind)]
    if bad:
        raise UserError(
            f"not a valid result: {bad[0]} is {row.get(bad[0], 'missing')!r}.\n"
            "The schema is in bench/common/results.py."
        )


def fmt(value: float) -> str:
    """Format a positive number with three significant digits, or as an integer from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def command_line(config: Any, script: str) -> str:
    """Return this config as a command line: non-default options, local paths replaced by names."""
    words = ["python", script]
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name == "out" or value == f.default:
            continue
        is_local = isinstance(value, str) and (os.path.isabs(value) or os.path.exists(value))
        text = f.name.rpartition("_")[2].upper() if is_local else str(value)
        words.append(f"--{f.name}={text}")
    return shlex.join(words)


def device_name(device: torch.device) -> str:
    """Return the kind of device, such as "CPU x86_64 AVX2, 2 threads"; never a host name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"Apple GPU {platform.machine()}"
    n = torch.get_num_threads()
    kind = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"CPU {kind}, {n} thread{'s' * (n > 1)}"


def load_average() -> float:
    """Return the load average of the last minute; NaN on Windows, which has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


class ResultWriter:
    """The rows of one run of the script `bench`; each is printed and appended to the file
    config.out at once. shared: labels (text) and sizes of all rows."""

    def __init__(
        self,
        bench: str,
        config: Any,
        device: torch.device,
        dtype: torch.dtype | str,
        /,  # a label may be named "config"
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

        spread     in place of p10 and p90; {} for a derived value
        versions   of the measured process, if it is not this one
        own        labels (text) and sizes of this row
        """
        low, median, high = (float(f"{v:.5g}") for v in np.percentile(values, (10, 50, 90)))
        facts = self.shared | own
        row = self.common | {
            "metric": metric,
            "provider": provider,
            "labels": {k: v for k, v in facts.items() if isinstance(v, str)},
            "shape": {k: v for k, v in facts.items() if not isinstance(v, str)},
            "value": median,
            "unit": unit,
            "spread": {"p10": low, "p90": high} if spread is None else spread,
            "repeats": len(values),
            "detail": detail or {},
            "versions": versions or self.versions,
        }
        row = {name: row[name] for name in FIELDS}  # in the schema's order
        self.rows.append(row)
        if self.path:
            checkpoint.append_row(self.path, row)
        print(_line(row, own))
        return row

    def add_ratio(
        self, metric: str, provider: str, slower: Sequence[float], faster: Sequence[float],
        relative_to: str, **extra: Any,
    ) -> None:  # fmt: skip
        """Append the median of slower / faster, computed round by round."""
        ratios = [a / b for a, b in zip(slower, faster, strict=True)]
        self.add(metric, provider, ratios, "x", **extra, relative_to=relative_to)

    def print_summary(self, **extra: Any) -> None:
        """Print all rows as one JSON line for other programs. Print nothing in a terminal."""
        if not sys.stdout.isatty():
            rows = [{k: v for k, v in row.items() if k not in self.common} for row in self.rows]
            print(json.dumps(self.common | extra | {"rows": rows}))


def _line(row: Row, own: dict[str, str | int]) -> str:
    """Format a row for the terminal: value, unit, provider, own labels and sizes, spread."""
    words = [row["metric"], *(v for v in own.values() if isinstance(v, str))]
    if row["unit"] == "x":
        words[-1] = f"relative to {words[-1]}"
    words += [f"{name} {n}" for name, n in own.items() if not isinstance(n, str)]
    percent = row["unit"] == "fraction"
    values = (row["value"], *row["spread"].values())
    value, *ends = (f"{fmt(100 * v)}%" if percent else fmt(v) for v in values)
    unit = "" if percent else row["unit"]
    line = f"{value:>8} {unit:<11} {row['provider']:<20} {', '.join(words)}"
    return f"{line} ({' .. '.join(ends)})" if ends else line


# ---- reading


def read_jsonl(path: Path) -> list[Row]:
    """Return the rows of a JSONL file, [] if it is missing. Raise UserError for a bad line."""
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
    """Return the rows of a file of results, [] if it is missing. Raise UserError for a bad row."""
    rows = read_jsonl(path)
    for row in rows:
        validate_row(row)
    return rows
