"""Checkpoints: safetensors weights, optimizer state, and a manifest that describes them.

A run's folder holds metrics.jsonl and one folder step_<n>/ per checkpoint: model.safetensors,
optimizer.safetensors and manifest.json. The manifest stores SHA-256 digests that reveal a change of
any of the three files. A checkpoint is written to a temporary folder, then renamed, so a killed run
never leaves half a checkpoint. Nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from nanococonut.config import TrainConfig
from nanococonut.data.tasks import Data, load_data
from nanococonut.model import GPT, GPTConfig
from nanococonut.runtime.cli import make_config
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.runtime.lock import lock_folder
from nanococonut.runtime.provenance import provenance
from nanococonut.tokenizer import Tokenizer

FORMAT = 2
WEIGHTS, OPTIMIZER, MANIFEST = "model.safetensors", "optimizer.safetensors", "manifest.json"
# options that may change when a run is resumed
RESUMABLE = {"resume", "out_dir", "max_steps", "save_interval", "device", "tensorboard", "fallback"}
RESUMABLE |= {"eval_interval", "max_new_tokens"}  # may select another checkpoint as the best
RESUMABLE |= {"epochs"}  # Schedule.check_epochs limits the change
RESUMABLE |= {"data", "valid_data"}  # load_run_data compares the examples
ROUNDING = {"kernels", "graph", "micro_batch_size"}  # may change, with a note
BUNDLED = Path(__file__).parent.parent / "bundled" / "prosqa_small"


def _digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _json_digest(manifest: dict[str, Any]) -> str:
    """Return the digest of a manifest's content, which ignores white space in its file."""
    return hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def load_run_data(config: TrainConfig, manifest: dict[str, Any]) -> tuple[Data, str]:
    """Return a run's examples and a digest of their content, whatever format their file has.

    manifest: the run's manifest; {} for a new run. Raise UserError if the run was trained on other
    examples.
    """
    # a branch on the hub may move, so load the commit that the run started with
    data = load_data(config, manifest.get("hub_commit") or "main")
    sha = hashlib.sha256()
    for split, examples in ({"train": data.train or []} | data.val).items():
        for x in examples:
            line = json.dumps([split, x["question"], x["steps"], x["answer"]])
            sha.update(line.encode() + b"\n")
    digest = sha.hexdigest()
    if manifest.get("examples", digest) != digest:  # new runs and prosqa_small have none
        files = [p for p in (config.data, config.valid_data) if p]
        source = " and ".join(files) or "this version's generator"
        raise UserError(
            f"this run was trained on other examples than those of {source}.\n"
            "Resume with its original data (a file may have moved), or use another --out_dir."
        )
    return data, digest


def replace_text(path: Path, text: str) -> None:
    """Replace a file's content atomically. Raise UserError if the file cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"{path} cannot be written: {e.strerror}.\nFree some space or choose another folder."
        ) from None


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a JSONL file of results. Raise UserError if the file cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as e:
        raise UserError(f"--out {path} cannot be written: {e.strerror}.") from None


def gather_tensors(
    model: nn.Module, optimizers: Sequence[Optimizer] = ()
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint on the CPU: file name -> tensor name -> tensor.

    Those of a model on the CPU are no copies, so they change with the model until they are saved.
    """
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
    """Load the optimizer state of a checkpoint folder. The parameters must be the same."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in load_file(folder / OPTIMIZER).items():
        o, i, name = key.split(".", 2)
        states[int(o)].setdefault(int(i), {})[name] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to, then rename it to `folder`, which must not exist.

    If a file cannot be written, delete the temporary folder and raise UserError.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        json_path = next(temporary.glob("*.json"))
        for path in temporary.iterdir():
            shutil.copymode(json_path, path)  # safetensors writes its files with mode 0600
            with path.open("rb+") as file:  # "+", because Windows cannot sync a read-only file
                os.fsync(file.fileno())  # a power cut must not leave an empty file
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        advice = "Free some space or choose another folder."
        if is_run(folder.parent):
            advice = "Earlier checkpoints are untouched: free some space, then use --resume."
        raise UserError(f"{folder} could not be written: {e}.\n{advice}") from None


def write_checkpoint(
    folder: Path, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> None:
    """Write a checkpoint to `folder`, all of it or nothing. files: from gather_tensors."""
    with new_folder(folder) as new:
        for name, tensors in files.items():
            save_file(tensors, new / name)
        digests = {name: _digest(new / name) for name in sorted(files)}
        manifest = {"format": FORMAT, **manifest, **provenance(), "files": digests}
        manifest["digest"] = _json_digest(manifest)
        (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoint folders, oldest first. Raise UserError if one has no manifest."""
    # exactly eight digits: step_00000008_backup is a user's own copy
    folders = sorted(run.glob(f"step_{'[0-9]' * 8}"))
    for folder in folders:  # an interrupted copy would otherwise be skipped and never replaced
        if not (folder / MANIFEST).is_file():
            raise _damaged(folder, f"{MANIFEST} is missing")
    return folders


def is_run(path: Path) -> bool:
    """Return whether the path is a checkpoint, or a run's folder with at least one."""
    return (path / MANIFEST).is_file() or any(path.glob(f"step_{'[0-9]' * 8}"))


def save(
    run: Path, step: int, files: dict[str, dict[str, Tensor]], manifest: dict[str, Any]
) -> Path:
    """Write run/step_<step>, then delete all but the last two checkpoints, the best one and this.

    A checkpoint of this step with these weights is kept. Raise UserError if it has others.
    """
    folder = run / f"step_{step:08d}"
    if not (folder / MANIFEST).is_file():
        write_checkpoint(folder, files, manifest | {"step": step})
    elif not _has_weights(folder, files[WEIGHTS]):
        raise UserError(
            f"{folder} already holds other weights.\nSave another step, or to another folder."
        )
    kept = folder.name, f"step_{manifest.get('best_step', -1):08d}"
    for old in list_checkpoints(run)[:-2]:  # two, in case the last one is already diverging
        if old.name not in kept:
            with suppress(OSError):  # Windows cannot rename a folder while a file in it is open
                # rename before deleting, so that a kill never leaves half a checkpoint
                old.rename(old.with_name(f".{old.name}.partial"))
    for partial in run.glob(".step_*.partial"):  # including those of killed runs
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _has_weights(folder: Path, tensors: dict[str, Tensor]) -> bool:
    """Return whether a checkpoint has exactly these weights."""
    saved = load_file(folder / WEIGHTS)
    return saved.keys() == tensors.keys() and all(torch.equal(saved[k], tensors[k]) for k in saved)


def resolve(path: str | Path, best: bool = False) -> Path:
    """Return the path if it is a checkpoint, else the newest (or best) one in the run's folder."""
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        problem = "holds no checkpoint" if path.exists() else "does not exist"
        problem = "is a file, not a folder" if path.is_file() else problem
        raise UserError(
            f"{path} {problem}.\nGive the folder of a run (out/NAME) or of one of its checkpoints."
        )
    newest = checkpoints[-1]
    # see TrainState; -1 before the first validation of the last stage
    step = read_manifest(newest).get("best_step", -1) if best else -1
    chosen = path / f"step_{step:08d}"
    return chosen if chosen in checkpoints else newest


def _damaged(folder: Path, reason: str) -> UserError:
    return UserError(
        f"the checkpoint {folder} is damaged or not one of ours: {reason}.\n"
        "Move this folder away to use the checkpoint before it, or train again."
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest. Options that did not exist in its version get their defaults.

    Raise UserError if the manifest is damaged or has another format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise _damaged(folder, f"{MANIFEST} cannot be read ({e})") from None
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if type(version) is int and version != FORMAT:
        raise UserError(
            f"{folder} was written by another version of nanococonut: format {version}, expected "
            f"{FORMAT}.\nUse that version (for format 1, commit a32b7b1), or train again."
        )
    if version != FORMAT:
        raise _damaged(folder, f"{MANIFEST} has format {version!r}, expected {FORMAT}")
    digest = manifest.pop("digest", None)  # a manifest edited by hand has none
    if digest is not None and digest != _json_digest(manifest):
        raise _damaged(folder, f"{MANIFEST} has changed since it was saved")
    try:
        config = make_config(TrainConfig, manifest["config"])
    except UserError as e:
        raise UserError(f"{folder / MANIFEST}: {e}") from None
    return manifest | {"config": asdict(config)}


def verify(folder: Path, resume: bool = False) -> dict[str, Any]:
    """Return the manifest. Raise UserError if a file is missing or its digest differs.

    resume: also raise UserError if there is no training state to resume from.
    """
    manifest = read_manifest(folder)
    if resume and not (OPTIMIZER in manifest["files"] and "progress" in manifest):
        raise UserError(
            f"{folder} holds no training state, so it cannot be resumed.\n"
            "Start a new run in another --out_dir."
        )
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
        if _digest(folder / name) != digest:
            raise _damaged(folder, f"{name} has changed since it was saved")
    return manifest


def tensor_problems(
    model: nn.Module, tensors: dict[str, Tensor], unknown: Mapping[str, str] | None = None
) -> list[str]:
    """Return one description for each tensor that is unknown, does not fit or is missing.

    unknown: name -> what to say of this tensor if the model does not have it
    """
    params, problems, unknown = model.state_dict(), [], unknown or {}
    for name, tensor in tensors.items():
        if name not in params:
            problems.append(f"{name} {unknown.get(name, 'is unknown')}")
        elif params[name].shape != tensor.shape or not tensor.is_floating_point():
            dtype = "" if tensor.is_floating_point() else f" {tensor.dtype}"
            expected = tuple(params[name].shape)
            problems.append(f"{name} is {tuple(tensor.shape)}{dtype}, expected {expected}")
    return problems + [f"{name} is missing" for name in params if name not in tensors]


def load(path: str | Path, device: str | torch.device = "cpu") -> tuple[GPT, Tokenizer, dict]:
    """Return (model in eval mode, tokenizer, manifest) of a checkpoint or a run's best one."""
    folder = resolve(path, best=True)
    manifest = verify(folder)
    weights = load_file(folder / WEIGHTS)
    try:
        model = GPT(GPTConfig(**manifest["model"]))
        problems = tensor_problems(model, weights)
    except TypeError as e:  # a field that this GPTConfig does not have
        problems = [f"GPTConfig {str(e).rpartition('() ')[2]}"]
    if problems:
        raise UserError(
            f"{folder} was trained with another model.py: {problems[0]} ({len(problems)} in all)."
            "\nUse the code that trained it."
        )
    model.load_state_dict(weights)  # and cast them to its dtype
    tokenizer = Tokenizer.from_spec(manifest["tokenizer"])
    return model.to(device).eval(), tokenizer, manifest


class RunDir:
    """The folder of a training run: its checkpoints and metrics.jsonl. Only rank 0 writes.

    open_metrics creates the folder, so a refused run leaves none. The folder is locked until
    close() or the end of the process. With config.resume, `manifest` is that of the newest
    checkpoint; otherwise it is {}.
    """

    def __init__(self, path: str | Path, config: TrainConfig, dist: Distributed) -> None:
        """Raise UserError if the folder holds another run, or none that config can resume."""
        self.path, self.config, self.dist = Path(path), config, dist
        self.metrics_path = self.path / "metrics.jsonl"
        self.manifest: dict[str, Any] = {}
        self._lock: IO[str] | None = None
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
                    "Give the --out_dir of a run, or start a new run there without --resume."
                )
            self.manifest = verify(resolve(self.path), resume=True)
            self._check_resumable(self.manifest["config"])

    def _claim(self) -> None:
        """Lock the folder. Raise UserError if it is locked already or holds another run."""
        if self.dist.is_master and self._lock is None:
            self._lock = lock_folder(self.path)
        checkpoints = list_checkpoints(self.path)
        if checkpoints and not self.config.resume:
            raise UserError(
                f"{self.path} already holds a run, saved as {checkpoints[-1].name}.\n"
                "Continue it with --resume, or choose another --out_dir."
            )

    def close(self) -> None:
        """Wait for a save in the background, then release the lock."""
        self.end_save()
        if self._lock:
            self._lock.close()

    def _check_resumable(self, saved_config: dict[str, Any]) -> None:
        """Raise UserError if an option that changes the training differs from the saved one."""
        for key, saved in saved_config.items():
            if key in RESUMABLE | self.config.unused:
                continue
            value = getattr(self.config, key)
            if value != saved and key in ROUNDING:
                dropout = " and dropout masks" if self.config.dropout else ""
                print(f"{key}={value!r} (was {saved!r}): this changes rounding{dropout}")
            elif value != saved:
                raise UserError(
                    f"{self.path} was trained with {key}={saved!r}, not {value!r}.\n"
                    "To keep its settings, give only --resume and --out_dir."
                )

    def load_data(self) -> Data:
        """Return the run's examples. Raise UserError if a resumed run was trained on others."""
        data, self.examples = load_run_data(self.config, self.manifest)
        return data

    def restore(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> dict[str, Any]:
        """Load the weights and the optimizer state of a resumed run.

        Return the saved training state; {} for a new run. Raise UserError if the model's shape has
        changed, as with other weights at --init_from.
        """
        if not self.manifest:
            return {}
        folder = resolve(self.path)
        weights = load_file(folder / WEIGHTS)
        if problems := tensor_problems(model, weights):
            raise UserError(
                f"{folder} holds a model of another shape: {problems[0]} ({len(problems)} tensors "
                "differ).\nIts --init_from or its data have changed: resume with the original ones."
            )
        model.load_state_dict(weights)
        load_optimizers(optimizers, folder)
        return self.manifest["progress"]

    def open_metrics(self, step: int) -> IO[str]:
        """Create the folder. Return metrics.jsonl, cut after `step` and open for appending."""
        if not self.dist.is_master:
            return open(os.devnull, "w")
        self.path.mkdir(parents=True, exist_ok=True)
        self._claim()  # needed if the folder is new: another process may have just created it
        path, kept = self.metrics_path, []
        text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
        if text and not self.manifest:  # left by a run that was killed before its first save
            path.replace(self.path / "metrics.before.jsonl")
            text = ""
        for line in text.splitlines(True):
            # drop the steps after the last save, which will be logged again, and damaged lines
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
        """Save a checkpoint. Every rank calls it. Raise UserError if a weight is NaN or infinite.

        background: write the files in a thread (for a GPU, from which tensors are copied first)
        """
        is_finite = all(torch.isfinite(p).all() for p in model.parameters())
        if any(self.dist.all_reduce_sum([not is_finite])):
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
        self.end_save()  # one at a time
        files = gather_tensors(model, optimizers)
        if background:
            self._saving = self._writer.submit(save, self.path, step, files, manifest)
        else:  # on a CPU the tensors are not copied, and the next step would change them
            save(self.path, step, files, manifest)

    def end_save(self, wait: bool = True) -> None:
        """Raise the error of a background save. wait: if it is still running, wait for it."""
        if self._saving and (wait or self._saving.done()):
            saving, self._saving = self._saving, None
            saving.result()

    def diverged(self, what: str, step: int) -> UserError:
        """Return the error for a loss or weights that are no longer finite."""
        self.end_save()
        checkpoints = list_checkpoints(self.path)
        last = f"the last checkpoint is {checkpoints[-1].name}" if checkpoints else "no checkpoint"
        return UserError(
            f"the {what} became infinite or NaN at step {step}; {last}.\n"
            "Try a lower --learning_rate, --grad_clip=1 or more --warmup_steps, in a new --out_dir."
        )
