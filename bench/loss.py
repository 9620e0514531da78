"""Is fast training the same training? Loss curves of the same run, plain and with all that is fast.

    python bench/loss.py                        200 steps of config/prosqa_small.py
    python bench/loss.py --config=config/prosqa_scratch.py --steps=50

train.py runs once for each variant, with the same rows, weights and draws: float32 in plain
PyTorch, and what this machine has beside it (bfloat16; on a GPU kernels and CUDA graphs, in float32
and with everything on). Printed: how far each loss curve is from the plain one's. The last line is
JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanococonut.runtime.device import select_device
from nanococonut.runtime.provenance import provenance

sys.path.insert(0, str(Path(__file__).parent.parent))  # a checkout works uninstalled too

from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint

TRAIN = Path(__file__).parent.parent / "train.py"
PLAIN = {"dtype": "float32", "kernels": "torch", "graph": "off"}
CPU = {"bfloat16": {"dtype": "bfloat16"}}
GPU = {
    "float32, again": {},  # what chance does: atomics in torch's own kernels
    "float32, graphs": {"graph": "on"},
    "float32, graphs, kernels": {"graph": "on", "kernels": "triton"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, graphs, kernels": {"dtype": "bfloat16", "graph": "on", "kernels": "triton"},
}


@dataclass(frozen=True)
class LossConfig:
    config: str = option("config/prosqa_small.py", "training config")
    steps: int = option(200, "optimizer steps", ge=1)
    seed: int = option(0, "of the runs", ge=0)
    device: str = option("auto", "auto, cpu, cuda")
    out: str | None = option(None, "append the JSON row to this file")

    def __post_init__(self) -> None:
        validate(self)


def losses(config: LossConfig, settings: dict[str, str], where: str, folder: Path) -> list[float]:
    """The loss of every step of one run. UserError where train.py refuses it."""
    command = [sys.executable, str(TRAIN), config.config, f"--out_dir={folder}"]
    command += [f"--max_steps={config.steps}", f"--seed={config.seed}", f"--device={where}"]
    # no dropout: it is drawn in another order by another path, and kernels have none
    command += ["--fallback=None", "--dropout=0.0"]
    command += [f"--{name}={value}" for name, value in (PLAIN | settings).items()]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"train.py failed with {settings or PLAIN}: {run.stderr.strip()[-300:]}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def compared(curve: list[float], plain: list[float]) -> dict[str, float]:
    """Relative differences of two curves, step by step, and over the last tenth's means."""
    apart = [abs(a - b) / b for a, b in zip(curve, plain, strict=True)]
    tail = -max(1, len(plain) // 10)
    last, plain_last = statistics.fmean(curve[tail:]), statistics.fmean(plain[tail:])
    found = {
        "first": apart[0],
        "median": statistics.median(apart),
        "greatest": max(apart),
        "last_tenth": abs(last - plain_last) / plain_last,
    }
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def main() -> None:
    given, path = parse_cli(LossConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(
        LossConfig, given, {"config": path} if path else {}
    )  # parse_cli sets it apart
    where = select_device(config.device).type
    with tempfile.TemporaryDirectory() as folder:
        plain = losses(config, {}, where, Path(folder) / "plain")
        print(f"{Path(config.config).name} on {where}, {len(plain)} steps, seed {config.seed}")
        print(f"float32, plain: loss {plain[0]:.3f} to {plain[-1]:.3f}; relative differences of")
        print(f"{'':<28} first step    median  greatest  mean of the last tenth")
        found: dict[str, Any] = {}
        for name, settings in (GPU if where == "cuda" else CPU).items():
            curve = losses(config, settings, where, Path(folder) / str(len(found)))
            found[name] = compared(curve, plain)
            first, median, greatest, last = found[name].values()
            print(f"{name:<28} {first:10.2e} {median:9.2e} {greatest:9.2e} {last:9.2e}")
    row = {
        "bench": "loss",
        "config": Path(config.config).name,
        "steps": len(plain),
        "seed": config.seed,
        "device": where,
        "plain": [plain[0], plain[-1]],
        "apart": found,
        **provenance(),
    }
    print(json.dumps(row))
    if config.out:
        checkpoint.append_row(Path(config.out), row)


if __name__ == "__main__":
    run_main(main)
