"""Checkpoints: safetensors weights, training state, and a manifest that says what they are.

A run's folder holds step_<n>/ folders, each complete: model.safetensors, optimizer.safetensors
and manifest.json with the digests of both. A folder is written under another name and then
renamed, so a run killed at any moment leaves only whole ones. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nanococonut import __version__
from nanococonut.errors import UserError, main_guard
from nanococonut.model import GPT, GPTConfig
from nanococonut.tokenizer import Tokenizer

FORMAT = 1
WEIGHTS, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
NEEDED = set(
    "config model tokenizer method stage n_thoughts step minutes device threads files".split()
)
BUNDLED = Path(__file__).parent / "bundled" / "prosqa_small"


def provenance() -> dict[str, Any]:
    """Commit, versions and platform: what a figure or a checkpoint was made with."""
    root = Path(__file__).parent.parent
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    versions = {"nanococonut": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "tiktoken", "safetensors", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            pass
    return {"commit": commit, "versions": versions, "platform": sys.platform}


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_text(path: Path, text: str) -> None:
    """A file's new content, all of it or nothing. UserError where it cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {e.strerror}.\nMake room or choose another --out_dir."
        ) from None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """One more line in a JSONL file of results. UserError where it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"--out {path} cannot be written: {e.strerror}.") from None


def logged_step(line: str) -> float:
    """The step of a line of metrics.jsonl; infinite where it is not one of ours."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return float("inf")


def tensors(model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Tensor]]:
    """Return file -> name -> tensor on the CPU: all that a checkpoint holds."""
    found: dict[str, dict[str, Tensor]] = {WEIGHTS: {}} | ({OPTIMIZER: {}} if optimizers else {})
    entries = [(WEIGHTS, name, tensor) for name, tensor in model.state_dict().items()]
    entries += [
        (OPTIMIZER, f"{o}.{i}.{name}", tensor)
        for o, optimizer in enumerate(optimizers)
        for i, entry in optimizer.state_dict()["state"].items()
        for name, tensor in entry.items()
    ]
    for file, name, tensor in entries:
        found[file][name] = tensor.detach().contiguous().cpu()
    return found


def load_optimizers(optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Put the moments saved in a checkpoint folder into optimizers of the same parameters."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in load_file(folder / OPTIMIZER).items():
        o, i, name = key.split(".", 2)
        states[int(o)].setdefault(int(i), {})[name] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def write(folder: Path, found: dict[str, dict[str, Tensor]], manifest: dict[str, Any]) -> None:
    """One complete checkpoint of `tensors` at `folder`, which must not exist. UserError if it
    cannot be kept."""
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, part in found.items():
            save_file(part, temporary / name)
        files = {p.name: _digest(p) for p in sorted(temporary.iterdir())}
        manifest = {"format": FORMAT, **manifest, **provenance(), "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        for path in [*temporary.iterdir(), temporary]:
            _sync(path)
        os.rename(temporary, folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"the checkpoint {folder} could not be written: {e}.\n"
            "Earlier ones are untouched: make room or choose another --out_dir, then --resume."
        ) from None


def steps_in(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    ours = re.compile(r"step_\d{8}")  # a user's step_00000008_backup is the user's
    return sorted(
        p for p in run.glob("step_*") if ours.fullmatch(p.name) and (p / MANIFEST).is_file()
    )


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    manifest: dict[str, Any],
) -> Path:
    """Write run/step_<step>, then drop the older ones but for the one before, in case this one
    turns out to be where a run went wrong, and the manifest's best_step."""
    folder = run / f"step_{step:08d}"
    if not (folder / MANIFEST).is_file():
        write(folder, tensors(model, optimizers), manifest | {"step": step})
    for old in steps_in(run)[:-2]:
        if old.name != f"step_{manifest.get('best_step', -1):08d}":
            shutil.rmtree(old, ignore_errors=True)
    return folder


def find(path: str | Path, best: bool = False) -> Path:
    """A checkpoint folder from a path to one or to a run's folder (best: by validation)."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    steps = steps_in(path)
    if not steps:
        what = "holds no checkpoint" if path.is_dir() else "is not there"
        raise UserError(
            f"{path} {what}.\nGive the folder of a run (out/NAME) or of one of its checkpoints."
        )
    if best:
        chosen = path / f"step_{read_manifest(steps[-1]).get('best_step', -1):08d}"
        return chosen if chosen in steps else steps[-1]
    return steps[-1]


def _damaged(folder: Path, why: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged or not one of ours: {why}.\n"
        "Use an older step_ folder of the run, or train again."
    )


# an option of an older manifest -> its name now; None: there is no such option any more
LEGACY: dict[str, str | None] = dict.fromkeys(
    "optimizer hops start_stage uniform_to length_pool position_std advance_rows beta1 stop_target "
    "thoughts jacobi_iterations shard time_to eval_batch_size".split()
)


def upgraded(config: dict[str, Any], n_thoughts: int, folder: Path, resume: bool) -> dict[str, Any]:
    """Return a manifest's config in today's options.

    Raise UserError if an option that is gone made it another model, or if resume and the run cannot
    go on as it began.
    """
    passes = config.get("jacobi_iterations", 0)
    if config.get("thoughts") == "jacobi" and 0 < passes < n_thoughts:
        raise UserError(
            f"{folder} computes its {n_thoughts} thoughts in {passes} parallel passes, which this "
            "version cannot do.\nUse the version it was trained with, or train again."
        )
    old = {key: config[key] for key in LEGACY.keys() & config.keys()}
    now = {LEGACY.get(key, key): value for key, value in config.items()}
    now.pop(None, None)
    if old.get("optimizer") == "adamw":
        now["muon_learning_rate"] = 0.0
    if "hops" in old and config.get("task") == "prontoqa":
        now["max_hops"] = old["hops"]
    start, first = old.get("start_stage"), config.get("first_stage_epochs")
    if start == 0 and first == 0:  # 0 meant: as the others
        now["first_stage_epochs"] = None
    if start == 1 and first == 0:  # stage 0 was skipped, as 0 means now
        del old["start_stage"]
    # what every run has now; another value only matters to a run that goes on
    fixed: dict[str, Any] = {"beta1": 0.9, "start_stage": 0, "thoughts": "sequential"}
    fixed["length_pool"] = 16 if config.get("fresh_rows") else 1
    if config.get("uniform_prob"):
        fixed["uniform_to"] = "stage" if config.get("advance_at") else "steps"
    if config.get("advance_at"):
        fixed["advance_rows"] = 1280
    if config.get("stop") == "classifier":
        fixed["stop_target"] = "steps"
    for key in fixed.keys() & old.keys() if resume else ():
        if old[key] != fixed[key]:
            raise UserError(
                f"{folder} was trained with {key}={config[key]!r}, which this version cannot do.\n"
                "Resume it with the version it began with, or start a new run."
            )
    return now


def read_manifest(folder: Path, resume: bool = False) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({e})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(folder, f"{MANIFEST} is not of format {FORMAT}")
    missing = NEEDED - manifest.keys()
    if missing:
        raise _damaged(folder, f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    kinds = {"config": dict, "model": dict, "tokenizer": dict, "files": dict, "n_thoughts": int}
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            raise _damaged(folder, f"{MANIFEST} has no proper {key!r}")
    config = upgraded(manifest["config"], manifest["n_thoughts"], folder, resume)
    return manifest | {"config": config}


def verify(folder: Path, resume: bool = False) -> dict[str, Any]:
    """The manifest, after every file's digest has been checked against it. resume: it also has to
    hold what training needs to go on."""
    manifest = read_manifest(folder, resume)
    if resume and not (OPTIMIZER in manifest["files"] and "progress" in manifest):
        raise UserError(
            f"{folder} holds a model without its training state, so it cannot be resumed.\n"
            "Start a new run in another --out_dir."
        )
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
        if _digest(folder / name) != digest:
            raise _damaged(folder, f"{name} is not the file that was saved")
    return manifest


# what a resumed run may be told anew: it does not change the run's bits
FREE = {"resume", "out_dir", "max_steps", "save_interval", "device"}
FREE |= {"kernels", "graph"}  # but for rounding: as the number of processes


def same_settings(manifest: dict[str, Any], config: dict[str, Any], run: Path) -> None:
    """UserError where a run would be resumed with other settings than it was begun with."""
    for key, value in config.items():
        begun = manifest["config"].get(key)
        if key not in FREE and begun != value:
            raise UserError(
                f"{run} was trained with {key}={begun!r}, now {key}={value!r} is asked for.\n"
                "Resume with the settings it began with, or start anew in another --out_dir."
            )


def load_weights(model: nn.Module, folder: Path) -> None:
    """Weights of a checkpoint folder into a model of the same shape; any float dtype is cast."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise _damaged(folder, f"{WEIGHTS} cannot be read ({e})") from None
    own = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    wrong = sorted(k for k in own.keys() | found.keys() if own.get(k) != found.get(k))
    if wrong:
        k = wrong[0]
        raise UserError(
            f"{folder} holds a model of another shape: {k} is {found.get(k, 'missing')}, wanted "
            f"{own.get(k, 'none')} ({len(wrong)} tensors differ).\n"
            "Use the settings it was trained with; they stand in its manifest.json."
        )
    model.load_state_dict(weights)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Model (eval mode), tokenizer and manifest of a checkpoint or of a run's best one."""
    folder = find(path, best=True)
    manifest = verify(folder)
    try:
        model = GPT(GPTConfig(**manifest["model"]))
        tokenizer = Tokenizer.from_spec(manifest["tokenizer"])
    except (TypeError, KeyError, ValueError, RuntimeError) as e:
        raise _damaged(folder, f"its manifest does not describe a model ({e})") from None
    load_weights(model, folder)
    return model.to(device).eval(), tokenizer, manifest


def describe_model(model: GPT) -> dict[str, Any]:
    return asdict(model.config)


def bundle(run: str | Path, target: Path = BUNDLED) -> Path:
    """A run's best checkpoint in bfloat16 and without optimizer: what sample.py falls back on."""
    model, _, manifest = load(run)
    kept = {k: v for k, v in manifest.items() if k not in ("files", "format", "progress")}
    trained = {k: kept.pop(k) for k in ("commit", "versions", "platform")}
    kept["config"] = kept["config"] | {"out_dir": None}  # where it lay is nobody's business
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    write(fresh, tensors(model.to(torch.bfloat16), []), kept | {"trained_with": trained})
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)
    return target


if __name__ == "__main__":  # python -m nanococonut.checkpoint out/RUN: re-make the bundled one

    def main() -> None:
        if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
            raise UserError("one argument is wanted: the run's folder, as in out/prosqa_small.")
        if verify(find(sys.argv[1], best=True)).get("best_step", -1) < 0:
            raise UserError(
                f"{sys.argv[1]} has not been validated in its final stage, and sample.py falls "
                "back on what is bundled.\nTrain it to its end first."
            )
        print(f"bundled {sys.argv[1]} as {bundle(sys.argv[1])}")

    main_guard(main)
