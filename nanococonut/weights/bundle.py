"""Make the bundled checkpoint from a run."""

import shutil
import sys
from pathlib import Path

import torch

from nanococonut.runtime.errors import UserError, run_main
from nanococonut.weights.checkpoint import (
    BUNDLED,
    gather_tensors,
    load,
    resolve,
    verify,
    write_atomic,
)


def bundle(run: str | Path, target: Path = BUNDLED) -> Path:
    """A run's best checkpoint in bfloat16 and without optimizer: what sample.py falls back on."""
    model, _, manifest = load(run)
    kept = {k: v for k, v in manifest.items() if k not in ("files", "format", "progress")}
    trained = {k: kept.pop(k) for k in ("commit", "versions", "platform")}
    kept["config"] = kept["config"] | {"out_dir": None}  # where it lay is nobody's business
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    write_atomic(
        fresh, gather_tensors(model.to(torch.bfloat16), []), kept | {"trained_with": trained}
    )
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target


if __name__ == "__main__":  # python -m nanococonut.weights.bundle out/RUN: re-make the bundled one

    def main() -> None:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError("one argument is wanted: the run's folder, as in out/prosqa_small.")
        if verify(resolve(sys.argv[1], best=True)).get("best_step", -1) < 0:
            raise UserError(
                f"{sys.argv[1]} has not been validated in its final stage, and sample.py falls "
                "back on what is bundled.\nTrain it to its end first."
            )
        print(f"bundled {sys.argv[1]} as {bundle(sys.argv[1])}")

    run_main(main)
