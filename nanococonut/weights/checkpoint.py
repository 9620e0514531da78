"""Checkpoints: safetensors weights, training state, and a manifest that describes them.

A run's folder holds metrics.jsonl and step_<n>/ folders, each complete: model.safetensors,
optimizer.safetensors and manifest.json with the digests of both. A folder is written under another
name and then renamed, so a run killed at any moment leaves only whole ones. Nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nanococonut.config import REMOVED_OPTIONS, TrainConfig, config_from_saved
from nanococonut.data.tasks import Data, load_data
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.lock import lock_folder
from nanococonut.runtime.provenance import provenance
from nanococonut.tokenizer import Tokenizer

T = TypeVar("T")
FORMAT = 2
WEIGHTS, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
TYPES = {  # of the manifest's values
    **dict.fromkeys(("config", "model", "tokenizer", "files", "progress"), dict),
    **dict.fromkeys(("stage", "n_thoughts", "step", "threads", "best_step"), int),
    **dict.fromkeys(("method", "device", "examples"), str),
    "minutes": int | float,
    "hub_commit": str | None,
}
OPTIONAL = {"best_step", "progress", "examples", "hub_commit"}
# settings that may change when a run is resumed: the mathematics stay the same
RESUMABLE = {"resume", "out_dir", "max_steps", "save_interval", "device", "tensorboard", "fallback"}
RESUMABLE |= {"eval_interval", "max_new_tokens"}  # may choose another checkpoint as the best
RESUMABLE |= {"epochs"}  # Schedule.check_epochs
RESUMABLE |= {"wte_init_std", "recompute_mlp"}  # of older runs: neither changes a later step
ROUNDING = {"kernels", "graph", "micro_batch_size"}  # not to the bit
BUNDLED = Path(__file__).parent.parent / "bundled" / "prosqa_small"


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_run_data(config: TrainConfig, manifest: dict[str, Any]) -> tuple[Data, str]:
    """Return the examples of a run and the digest of what they say, in order, in any format.

    manifest: of the run, {} for a new one. Raise UserError if it was trained on other examples.
    """
    # a branch on the hub may move, so the commit that the run started with is read
    revision = manifest.get("hub_commit") or config.hub_revision
    data, sha = load_data(replace(config, hub_revision=revision)), hashlib.sha256()
    for split, examples in ({"train": data.train or []} | data.val).items():
        for x in examples:
            line = json.dumps([split, x["question"], x["steps"], x["answer"]])
            sha.update(line.encode() + b"\n")
    if manifest.get("examples", sha.hexdigest()) != sha.hexdigest():  # old manifests have none
        paths = [p for p in (config.data, config.valid_data) if p]
        raise UserError(
            "this run was trained on other examples than those "
            f"{'of ' + ' and '.join(paths) if paths else 'that are generated now'}.\n"
            "Resume with the --data and --valid_data it started with (the path is free), "
            "or use another --out_dir."
        )
    return data, sha.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content atomically. Raise UserError if it cannot be written."""
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
    """Append a line to a JSONL file of results. Raise UserError if it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"--out {path} cannot be written: {e.strerror}.") from None


def gather_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer] = ()
) -> dict[str, dict[str, Tensor]]:
    """Return file -> name -> tensor on the CPU: everything that a checkpoint holds."""
    files: dict[str, dict[str, Tensor]] = {WEIGHTS: dict(model.state_dict())}
    if optimizers:
        files[OPTIMIZER] = {
            f"{o}.{i}.{name}": tensor
            for o, optimizer in enumerate(optimizers)
            for i, moments in optimizer.state_dict()["state"].items()
            for name, tensor in moments.items()
        }
    return {
        file: {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        for file, tensors in files.items()
    }


def load_optimizers(optimizers: Sequence[Optimizer], folder: Path) -> None:
    """Load the moments of a checkpoint folder into optimizers of the same parameters."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in load_file(folder / OPTIMIZER).items():
        o, i, name = key.split(".", 2)
        states[int(o)].setdefault(int(i), {})[name] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a temporary folder to write files to, and rename it to `folder`, which must not exist.

    Leave nothing and raise UserError if a file cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        usual_mode = next(temporary.glob("*.json"))
        for path in temporary.iterdir():
            shutil.copymode(usual_mode, path)  # safetensors writes 0600
            with path.open("rb+") as file:  # "+": Windows syncs no read-only file
                os.fsync(file.fileno())  # a power cut must not leave an empty file of that name
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        advice = "Make room or choose another folder."
        if list_checkpoints(folder.parent):
            advice = "Earlier checkpoints are untouched: make room, then continue with --resume."
        raise UserError(f"{folder} could not be written: {e}.\n{advice}") from None


def write_checkpoint(
    folder: Path, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> None:
    """Write a complete checkpoint at `folder`; see new_folder. files: as of gather_tensors."""
    with new_folder(folder) as new:
        for name, tensors in files.items():
            save_file(tensors, new / name)
        digests = {name: _digest(new / name) for name in sorted(files)}
        manifest = {"format": FORMAT, **manifest, **provenance(), "files": digests}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    # not step_00000008_backup, a user's own folder
    return sorted(p.parent for p in run.glob(f"step_{'[0-9]' * 8}/{MANIFEST}"))


def is_run(path: Path) -> bool:
    """Return whether this is a checkpoint, or a run's folder with one in it."""
    return (path / MANIFEST).is_file() or bool(list_checkpoints(path))


def save(
    run: Path, step: int, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> Path:
    """Write run/step_<step>. Keep the last two checkpoints and the best; delete the rest.

    files: as of gather_tensors.
    """
    folder = run / f"step_{step:08d}"
    if not (folder / MANIFEST).is_file():
        write_checkpoint(folder, files, manifest | {"step": step})
    for old in list_checkpoints(run)[:-2]:  # two, in case the run went wrong at the last one
        if old.name != f"step_{manifest.get('best_step', -1):08d}":
            with suppress(OSError):  # Windows renames no folder that is being read
                old.rename(old.with_name(f".{old.name}.partial"))  # never half a checkpoint
    for partial in run.glob(".step_*.partial"):  # also of runs that were killed
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def resolve(path: str | Path, best: bool = False) -> Path:
    """Return the checkpoint folder at a path, or the newest (or best) one of a run's folder."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        what = "holds no checkpoint" if path.exists() else "does not exist"
        raise UserError(
            f"{path} {what}.\nGive the folder of a run (out/NAME) or of one of its checkpoints."
        )
    newest = checkpoints[-1]
    # the best by validation accuracy in the final stage, if there was one
    step = read_manifest(newest).get("best_step", -1) if best else -1
    chosen = path / f"step_{step:08d}"
    return chosen if chosen in checkpoints else newest


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged or not one of ours: {reason}.\n"
        "Use an older step_ folder of the run, or train again."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest, its config with the defaults of options added since.

    Raise UserError if it is damaged or of another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({e})") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version == 1:
        raise UserError(
            f"{folder} was written by nanococonut 0.1, whose settings have other names.\n"
            "Use it with commit a32b7b1, or train again."
        )
    if version != FORMAT:
        raise _damaged(folder, f"{MANIFEST} is not of format {FORMAT}")
    for key in TYPES.keys() - (OPTIONAL - manifest.keys()):
        if not isinstance(manifest.get(key), TYPES[key]):
            raise _damaged(folder, f"{MANIFEST} has no valid {key!r}")
    try:
        config = config_from_saved(manifest["config"])
    except UserError as e:
        raise UserError(f"{folder / MANIFEST}: {e}") from None
    removed = {k: v for k, v in manifest["config"].items() if k in REMOVED_OPTIONS}
    return manifest | {"config": asdict(config), "removed": removed}


def verify(folder: Path, resume: bool = False) -> dict[str, Any]:
    """Return the manifest after checking the digest of every file.

    Raise UserError if one differs, or if `resume` and there is no training state.
    """
    manifest = read_manifest(folder)
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


def tensor_problems(model: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Return a sentence for each tensor of a file that does not fit the model, or is missing."""
    params, problems = model.state_dict(), []
    for name, tensor in tensors.items():
        if name not in params:
            problems.append(f"{name} is unknown")
        elif params[name].shape != tensor.shape or not tensor.is_floating_point():
            dtype = "" if tensor.is_floating_point() else f" {tensor.dtype}"
            expected = tuple(params[name].shape)
            problems.append(f"{name} is {tuple(tensor.shape)}{dtype}, expected {expected}")
    return problems + [f"{name} is missing" for name in params if name not in tensors]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's weights into a model of the same shapes; float dtypes are cast."""
    try:
        weights = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as e:
        raise _damaged(folder, f"{WEIGHTS} cannot be read ({e})") from None
    if problems := tensor_problems(model, weights):
        raise UserError(
            f"{folder} holds a model of another shape: {problems[0]} ({len(problems)} tensors "
            "differ).\nUse the settings it was trained with, see its manifest.json."
        )
    model.load_state_dict(weights)


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Return (model in eval mode, tokenizer, manifest) of a checkpoint, or of a run's best one."""
    folder = resolve(path, best=True)
    manifest = verify(folder)
    try:
        model = GPT(GPTConfig(**manifest["model"]))
        tokenizer = Tokenizer.from_spec(manifest["tokenizer"])
    except (TypeError, KeyError, ValueError, RuntimeError) as e:
        raise _damaged(folder, f"its manifest does not describe a model ({e})") from None
    load_weights(model, folder)
    return model.to(device).eval(), tokenizer, manifest


class RunDir:
    """The folder of a training run: its checkpoints and metrics.jsonl. Only rank 0 writes.

    Opening makes no folder, so a run that is refused later leaves none. One that exists is locked,
    until close() or the end of the process. With config.resume, `manifest` is the newest
    checkpoint's, else {}.
    """

    def __init__(self, path: str | Path, config: TrainConfig, dist: Distributed) -> None:
        """Raise UserError if the folder holds another run, or none that config can resume."""
        self.path, self.config, self.dist = Path(path), config, dist
        self.metrics_path = self.path / "metrics.jsonl"
        self.manifest: dict[str, Any] = {}
        self._lock: FileLock | None = None
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="save")
        self._saving: Future[Path] | None = None
        if (self.path / MANIFEST).is_file():
            raise UserError(
                f"--out_dir {path} is a checkpoint, not a run.\nGive the folder that contains it."
            )
        if self.path.is_dir():
            self._claim()
        if config.resume:
            if not list_checkpoints(self.path):
                raise UserError(
                    f"{path} holds no checkpoint to resume.\n"
                    "Leave --resume out to start there, or give the --out_dir of a run."
                )
            self.manifest = verify(resolve(self.path), resume=True)
            self._check_resumable(self.manifest["config"] | self.manifest["removed"])

    def _claim(self) -> None:
        """Lock the folder. Raise UserError if another process has, or if it holds another run."""
        if self.dist.is_master and self._lock is None:
            self._lock = lock_folder(self.path)
        checkpoints = list_checkpoints(self.path)
        if checkpoints and not self.config.resume:
            raise UserError(
                f"{self.path} already holds a run (saved at step {_step(checkpoints[-1])}).\n"
                "Continue it with --resume, or choose another --out_dir."
            )

    def close(self) -> None:
        """Wait for a save in the background, then end the lock."""
        self.end_save()
        if self._lock:
            self._lock.release()

    def _check_resumable(self, saved_config: dict[str, Any]) -> None:
        """Raise UserError if a setting that matters differs from those the run started with."""
        # the examples have a digest, except in old checkpoints: there the path has to do
        free = RESUMABLE | ({"data", "valid_data"} if "examples" in self.manifest else set())
        for key, saved in saved_config.items():
            if key in free or saved == (value := getattr(self.config, key)):
                continue
            if key in ROUNDING:
                dropout = " and dropout's draws" if self.config.dropout else ""
                print(f"{key}={value!r}, not {saved!r} as before: roundings{dropout} differ")
            else:
                raise UserError(
                    f"{self.path} was trained with {key}={saved!r}, not {value!r}.\n"
                    "Resume with the settings it started with, or use another --out_dir."
                )

    def load_data(self) -> Data:
        """Return the examples of this run. UserError if a resumed run was trained on others."""
        data, self.examples = load_run_data(self.config, self.manifest)
        return data

    def restore(
        self, model: nn.Module, optimizers: Sequence[Optimizer], parse: Callable[[dict], T]
    ) -> T:
        """Load weights and moments. Return parse(what save() got as "progress"; {} for a new run).

        Raise UserError if parse raises a TypeError, KeyError or ValueError.
        """
        if not self.manifest:
            return parse({})
        folder = resolve(self.path)
        try:
            state = parse(progress := self.manifest["progress"])
            if progress["step"] != self.manifest["step"]:
                raise ValueError(f"step {progress['step']}, not {self.manifest['step']}")
        except (TypeError, KeyError, ValueError) as e:
            raise _damaged(folder, f"{MANIFEST} has a bad 'progress' ({e})") from None
        load_weights(model, folder)
        load_optimizers(optimizers, folder)
        return state

    def open_metrics(self, step: int) -> IO[str]:
        """Create the folder and return metrics.jsonl, open after its lines up to `step`."""
        if not self.dist.is_master:
            return open(os.devnull, "w")
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim()  # if the folder is new; another process may have made it meanwhile
        path, kept = self.metrics_path, []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if text and not self.manifest:  # of a run killed before its first save
            path.replace(self.path / "metrics.before.jsonl")
            text = ""
        for line in text.splitlines(True):
            # steps that a killed run logged after its last save will be logged again; half a line,
            # or one that is not ours, goes too
            with suppress(ValueError, TypeError, KeyError):
                if line.endswith("\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
        replace_text(path, "".join(kept))
        return path.open("a", encoding="utf-8")

    def save(
        self,
        model: GPT,
        optimizers: Sequence[Optimizer],
        step: int,
        manifest: dict[str, Any],
        background: bool = False,
    ) -> None:
        """Save the model unless a weight is NaN or infinite. Collective: every rank calls it.

        background: copy the tensors to the CPU and write the files in a thread (for a GPU).
        """
        is_bad = not all(torch.isfinite(p).all() for p in model.parameters())
        if any(self.dist.all_reduce_sum([is_bad])):
            raise self.diverged("weights", step)
        if not self.dist.is_master:
            return
        manifest |= {
            "config": asdict(self.config),
            "model": asdict(model.config),
            "method": self.config.method,
            "examples": self.examples,
            "device": str(next(model.parameters()).device),
            "threads": torch.get_num_threads(),
            "processes": self.dist.world,
        }
        self.end_save()  # never two at once
        files = gather_tensors(model, optimizers)
        if background:
            self._saving = self._writer.submit(save, self.path, step, files, manifest)
        else:  # the CPU's tensors are the model's own, which the next step changes
            save(self.path, step, files, manifest)

    def end_save(self, wait: bool = True) -> None:
        """Raise the error of a save in the background; wait: if it still runs, wait for its end."""
        if self._saving and (wait or self._saving.done()):
            saving, self._saving = self._saving, None
            saving.result()

    def diverged(self, what: str, step: int) -> UserError:
        """Return the error for a loss or weights that are no longer finite."""
        self.end_save()
        checkpoints = list_checkpoints(self.path)
        kept = f"the last checkpoint is step {_step(checkpoints[-1])}" if checkpoints else "no save"
        return UserError(
            f"the {what} became infinite or NaN at step {step}; {kept}.\n"
            "Try a lower --learning_rate, --grad_clip=1 or more --warmup_steps, in a new --out_dir."
        )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))
