"""Measure what bfloat16, kernels and CUDA graphs change in the losses of a training run.

    python bench/precision.py                             200 steps of config/prosqa_small.py
    python bench/precision.py config/prontoqa_small.py --steps=50

train.py runs once per variant, with the same examples, weights and seeds: float32 in plain torch,
and what else this machine has. Each loss curve is compared with the first. --out appends a result
for each variant; each prints a line of JSON.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs without installation

import nanococonut  # isort: skip  # noqa: F401  # first: sets OMP_WAIT_POLICY
from bench.common.results import ResultWriter
from nanococonut.runtime.cli import make_config, option, parse_cli, validate
from nanococonut.runtime.device import select_device
from nanococonut.runtime.errors import UserError, run_main

TRAIN = Path(__file__).parent.parent / "train.py"
PLAIN = {"dtype": "float32", "kernels": "torch", "graph": "off"}
VARIANTS = {  # by device
    "cpu": {"bfloat16": {"dtype": "bfloat16"}},
    "cuda": {
        "float32, again": {},  # torch's own kernels have atomics: the noise
        "float32, graphs": {"graph": "on"},
        "float32, graphs, kernels": {"graph": "on", "kernels": "triton"},
        "bfloat16": {"dtype": "bfloat16"},
        "bfloat16, graphs, kernels": {"dtype": "bfloat16", "graph": "on", "kernels": "triton"},
    },
}


@dataclass(frozen=True)
class PrecisionConfig:
    config: str = option("config/prosqa_small.py", "training config")
    steps: int = option(200, "optimizer steps", ge=1)
    seed: int = option(0, "of the training run", ge=0)
    device: str = option("auto", "where to run", choices=("auto", "cpu", "cuda"))
    out: str | None = option(None, "append the results to this file")

    def __post_init__(self) -> None:
        validate(self)


def losses(config: PrecisionConfig, settings: dict[str, str], run_dir: Path) -> list[float]:
    """Return the loss of every step of a run. Raise UserError if train.py refuses it."""
    command = [sys.executable, str(TRAIN), config.config, f"--out_dir={run_dir}"]
    command += [f"--max_steps={config.steps}", f"--seed={config.seed}"]
    # no dropout: kernels have none, and another path draws it in another order
    command += [f"--device={config.device}", "--fallback=None", "--dropout=0.0"]
    command += [f"--{name}={value}" for name, value in (PLAIN | settings).items()]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise UserError(f"train.py failed with {settings or PLAIN}: {run.stderr.strip()[-300:]}")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def main() -> None:
    given, path = parse_cli(PrecisionConfig, sys.argv[1:], __doc__.split("\n")[0])
    config = make_config(PrecisionConfig, given, {"config": path} if path else {})
    device, shape = select_device(config.device), {"steps": config.steps, "seed": config.seed}
    with tempfile.TemporaryDirectory() as folder:
        plain = losses(config, {}, Path(folder) / "plain")
        print(f"float32, plain: loss {plain[0]:.3f} to {plain[-1]:.3f}; relative differences:")
        for name, settings in VARIANTS["cuda" if device.type == "cuda" else "cpu"].items():
            curve = losses(config, settings, Path(folder) / name)
            apart = [abs(a - b) / b for a, b in zip(curve, plain, strict=True)]
            tail = -max(1, len(plain) // 10)
            ends = [statistics.fmean(values[tail:]) for values in (curve, plain)]
            detail = {"first": apart[0], "greatest": max(apart), "plain": [plain[0], plain[-1]]}
            detail["last_tenth"] = abs(ends[0] - ends[1]) / ends[1]
            labels = {"config": Path(config.config).name, "variant": name}
            dtype = settings.get("dtype", "float32")
            results = ResultWriter("precision", config, device, dtype, labels, shape)
            results.add("loss_difference", "nanococonut", apart, "fraction", detail=detail)
            print(results.summary())


if __name__ == "__main__":
    run_main(main)
