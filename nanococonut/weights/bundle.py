"""Bundle a run's best checkpoint with the package. sample.py uses prosqa_small if there is no run.

python -m nanococonut.weights.bundle out/RUN [NAME]    # NAME: prosqa_small by default
"""

import shutil
import sys
from pathlib import Path

import torch

from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights import checkpoint
from nanococonut.weights.checkpoint import BUNDLED


def bundle(run: str | Path, target: Path = BUNDLED) -> Path:
    """Write a run's best checkpoint in bfloat16, without its optimizer state. Return target."""
    model, _, manifest = checkpoint.load(run)
    manifest.pop("progress", None)  # of the optimizer state
    # write_checkpoint adds these three keys again, with the values of the bundling
    manifest["trained_with"] = {k: manifest.pop(k) for k in ("commit", "versions", "platform")}
    manifest["config"] |= {"out_dir": None}  # a path of this machine
    shutil.rmtree(target, ignore_errors=True)
    files = checkpoint.gather_tensors(model.to(torch.bfloat16))
    checkpoint.write_checkpoint(target, files, manifest)
    return target


def main() -> None:
    if not 2 <= len(sys.argv) <= 3 or any(a.startswith("-") for a in sys.argv[1:]):
        raise UserError("expected a run, such as out/prosqa_small, and optionally a name.")
    if checkpoint.verify(checkpoint.resolve(sys.argv[1], best=True)).get("best_step", -1) < 0:
        raise UserError(
            f"{sys.argv[1]} has no validation in its final stage.\nTrain it to the end first."
        )
    name = sys.argv[2] if len(sys.argv) == 3 else BUNDLED.name
    print(f"bundled {sys.argv[1]} as {bundle(sys.argv[1], BUNDLED.with_name(name))}")


if __name__ == "__main__":
    run_main(main)
