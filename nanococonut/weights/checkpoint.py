"""Checkpoints: safetensors weights, training state, and a manifest that says what they are.

A run's folder holds step_<n>/ folders, each complete: model.safetensors, optimizer.safetensors
and manifest.json with the digests of both. A folder is written under another name and then
renamed, so a run killed at any moment leaves only whole ones. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.provenance import provenance
from nanococonut.tokenizer import Tokenizer

FORMAT = 2
WEIGHTS, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
REQUIRED_KEYS = set(
    "config model tokenizer method stage n_thoughts step minutes device threads files".split()
)
BUNDLED = Path(__file__).parent.parent / "bundled" / "prosqa_small"


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


def gather_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, dict[str, Tensor]]:
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


def write_atomic(
    folder: Path, found: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> None:
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


def list_checkpoints(run: Path) -> list[Path]:
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
        write_atomic(folder, gather_tensors(model, optimizers), manifest | {"step": step})
    for old in list_checkpoints(run)[:-2]:
        if old.name != f"step_{manifest.get('best_step', -1):08d}":
            shutil.rmtree(old, ignore_errors=True)
    return folder


def resolve(path: str | Path, best: bool = False) -> Path:
    """A checkpoint folder from a path to one or to a run's folder (best: by validation)."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    steps = list_checkpoints(path)
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


def read_manifest(folder: Path, resume: bool = False) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({e})") from None
    if isinstance(manifest, dict) and manifest.get("format") == 1:
        raise UserError(
            f"{folder} was written by nanococonut 0.1, whose settings had other names.\n"
            "Use it with commit a32b7b1, or train again."
        )
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _damaged(folder, f"{MANIFEST} is not of format {FORMAT}")
    missing = REQUIRED_KEYS - manifest.keys()
    if missing:
        raise _damaged(folder, f"{MANIFEST} lacks {', '.join(sorted(missing))}")
    kinds = {"config": dict, "model": dict, "tokenizer": dict, "files": dict, "n_thoughts": int}
    for key, kind in kinds.items():
        if not isinstance(manifest[key], kind):
            raise _damaged(folder, f"{MANIFEST} has no proper {key!r}")
    return manifest


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
RESUMABLE = {"resume", "out_dir", "max_steps", "save_interval", "device"}
RESUMABLE |= {"kernels", "graph"}  # but for rounding: as the number of processes


def check_resumable(manifest: dict[str, Any], config: dict[str, Any], run: Path) -> None:
    """UserError where a run would be resumed with other settings than it was begun with."""
    for key, value in config.items():
        begun = manifest["config"].get(key)
        if key not in RESUMABLE and begun != value:
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
    folder = resolve(path, best=True)
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
