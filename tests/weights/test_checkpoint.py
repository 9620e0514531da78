"""A checkpoint is complete or absent, equals what was saved, and damage is an error."""

import errno
import fcntl
import json
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import threading
import time
import types
from dataclasses import asdict, replace

import pytest
import torch
from helpers import random_gpt

from nanococonut.config import TrainConfig
from nanococonut.model import GPT
from nanococonut.runtime import lock
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.training.state import TrainState
from nanococonut.weights import checkpoint
from nanococonut.weights.bundle import bundle
from nanococonut.weights.checkpoint import RunDir


def manifest_of(model, tokenizer, **extra):
    return {
        "config": {},
        "model": asdict(model.config),
        "tokenizer": tokenizer.spec,
        "method": "coconut",
        "stage": 3,
        "n_thoughts": 6,
        "minutes": 0.5,
        "device": "cpu",
        "threads": 1,
        **extra,
    }


def save(run, step, model, tokenizer, **extra):
    """Save a model without optimizer."""
    manifest = manifest_of(model, tokenizer, **extra)
    return checkpoint.save(run, step, checkpoint.gather_tensors(model), manifest)


@pytest.fixture
def model(tokenizer):
    return random_gpt(dtype=torch.float32, vocab_size=tokenizer.vocab_size, smear=True)


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(20, (2, 5))).sum().backward()
    optimizer.step()
    files = checkpoint.gather_tensors(model, [optimizer])
    folder = checkpoint.save(tmp_path / "run", 7, files, manifest_of(model, tokenizer))
    return folder, model, optimizer


def test_load_returns_what_was_saved(saved, tokenizer):
    """A tensor, the vocabulary or a manifest key could be lost on the way."""
    folder, model, _ = saved
    for path in (folder, folder.parent):
        again, words, manifest = checkpoint.load(path)
        for (name, a), b in zip(
            model.state_dict().items(), again.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
        assert words.encode("Tom is a lempus.") == tokenizer.encode("Tom is a lempus.")
        assert (manifest["step"], manifest["n_thoughts"]) == (7, 6)
        assert {"commit", "versions", "platform"} <= manifest.keys()
        assert not again.training


def test_optimizer_state_is_restored(saved):
    """Adam's step count is a tensor in torch's state: without it the bias correction restarts."""
    folder, model, optimizer = saved
    fresh = torch.optim.AdamW(model.parameters())
    checkpoint.load_optimizers([fresh], folder)
    a, b = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert a.keys() == b.keys() and a
    for i in a:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a[i][key], b[i][key])


def test_old_checkpoints_go_but_not_the_best(tmp_path, model, tokenizer):
    """The best checkpoint could be deleted, or the disk could fill up."""
    run = tmp_path / "run"
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]:
        save(run, step, model, tokenizer, best_step=best)
        kept = [int(p.name[5:]) for p in checkpoint.list_checkpoints(run)]
        assert kept == sorted({min(best, step), max(1, step - 1), step})  # the best, the last two
    assert checkpoint.resolve(run).name == "step_00000005"
    assert checkpoint.resolve(run, best=True).name == "step_00000004"


def test_other_weights_of_a_saved_step_are_refused(tmp_path, model, tokenizer):
    """A second save of a step was skipped, and one of an earlier step was deleted at once."""
    for step in (3, 4):
        save(tmp_path, step, model, tokenizer)
    with torch.no_grad():
        model.wte.weight[0, 0] += 1
    with pytest.raises(UserError, match="step_00000004 already holds other weights"):
        save(tmp_path, 4, model, tokenizer)
    folder = save(tmp_path, 2, model, tokenizer)
    assert torch.equal(checkpoint.load(folder)[0].wte.weight, model.wte.weight)
    assert save(tmp_path, 2, model, tokenizer) == folder  # the same weights, as at the end of a run


def test_half_written_checkpoint_is_not_one(saved):
    """kill -9 in the middle of a save leaves a folder under another name."""
    folder, _, _ = saved
    shutil.copytree(folder, folder.with_name(".step_00000009.partial"))
    assert checkpoint.resolve(folder.parent) == folder


def test_copy_without_manifest_is_refused(saved):
    """Guards against a resumed run that trains up to this step and then cannot save it."""
    folder, _, _ = saved
    shutil.copytree(folder, folder.with_name("step_00000010"))
    (folder.with_name("step_00000010") / "manifest.json").unlink()
    with pytest.raises(UserError, match="manifest.json is missing"):
        checkpoint.resolve(folder.parent)


def test_leftovers_of_kills_are_deleted(tmp_path, model, tokenizer, monkeypatch):
    """A half-deleted checkpoint blocked the next save of its step, and a half-saved one, which may
    take a gigabyte, was kept if its step was never saved again."""
    run = tmp_path / "run"
    (run / ".step_00000009.partial").mkdir(parents=True)
    rmtree = shutil.rmtree

    def killed(path, **_):
        if (path / "manifest.json").exists():
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt
        rmtree(path, **_)

    for step in (1, 2):
        save(run, step, model, tokenizer)
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(run, 3, model, tokenizer)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    shutil.rmtree(run / "step_00000003")
    save(run, 1, model, tokenizer)
    assert sorted(p.name for p in run.iterdir()) == ["step_00000001", "step_00000002"]


def test_copy_made_by_a_user_is_kept(saved, model, tokenizer):
    """step_00000007_backup was deleted as an old checkpoint."""
    folder, _, _ = saved
    copy = folder.with_name(f"{folder.name}_backup")
    shutil.copytree(folder, copy)
    for step in (8, 9, 10):
        save(folder.parent, step, model, tokenizer)
    assert checkpoint.resolve(folder.parent).name == "step_00000010" and copy.is_dir()


def test_model_without_training_state_cannot_resume(saved, tmp_path):
    """The run would restart at step 0 with trained weights."""
    target = bundle(saved[0].parent, tmp_path / "bundled")
    with pytest.raises(UserError, match="cannot be resumed"):
        checkpoint.verify(target, resume=True)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def change_manifest(folder, **changes):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | changes))


def edit_manifest(folder, **changes):
    """Change the manifest and remove its digest."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest.pop("digest", None)
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE = {
    "weights truncated": lambda f: truncate(f / "model.safetensors"),
    "one bit flipped": lambda f: flip(f / "model.safetensors"),
    "weights missing": lambda f: (f / "model.safetensors").unlink(),
    "optimizer flipped": lambda f: flip(f / "optimizer.safetensors"),
    "manifest truncated": lambda f: truncate(f / "manifest.json"),
    "manifest foreign": lambda f: (f / "manifest.json").write_text('{"model_type": "gpt2"}'),
    "manifest changed": lambda f: change_manifest(f, minutes=0.6),
    "no best step": lambda f: change_manifest(f, best_step=None),
    "manifest a list": lambda f: (f / "manifest.json").write_text("[]"),
}


def test_another_format_names_its_version(saved):
    """Format 1 names its settings differently, so nothing in it could be read."""
    (saved[0] / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="format 1, expected 2.\nUse that version"):
        checkpoint.load(saved[0])


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(saved, damage):
    """Weights with a flipped bit load and answer, only worse."""
    folder, _, _ = saved
    DAMAGE[damage](folder)
    with pytest.raises(UserError, match="damaged or not one of ours") as e:
        checkpoint.load(folder)
    assert str(e.value).count("\n") == 1


def test_resume_names_another_shape(saved, model):
    """The weights at --init_from may have changed since; torch's own error is a page long."""
    folder, _, optimizer = saved
    edit_manifest(folder, progress={"step": 7})
    run = RunDir(folder.parent, TrainConfig(resume=True), Distributed(1, 2))
    assert run.restore(model, [optimizer]) == {"step": 7}
    other = GPT(replace(model.config, block_size=5))
    with pytest.raises(
        UserError, match=r"another shape: wpe.weight is .*, expected \(5, 24\)"
    ) as e:
        run.restore(other, [optimizer])
    assert str(e.value).count("\n") == 1


def test_load_names_what_model_py_lacks(saved, monkeypatch):
    """After an edit of model.py, an older checkpoint ended in torch's traceback."""
    folder, _, _ = saved

    class Edited(GPT):
        def __init__(self, config):
            super().__init__(config)
            self.ln_f = torch.nn.RMSNorm(config.n_embd)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "GPT", Edited)
        with pytest.raises(UserError, match=r"another model.py: ln_f.bias is unknown \(1 in all"):
            checkpoint.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    manifest["model"]["rotary"] = True
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="GPTConfig got an unexpected keyword argument 'rotary'"):
        checkpoint.load(folder)


def test_digest_ignores_the_layout_of_the_json(saved):
    """A manifest that an editor has reformatted is still the same manifest."""
    folder, _, _ = saved
    change_manifest(folder)
    assert "digest" not in checkpoint.load(folder)[2]


def test_progress_of_another_version_is_refused():
    """An unknown key was an unexpected keyword argument, in a traceback."""
    assert TrainState.from_saved({"step": 3}).step == 3
    with pytest.raises(UserError, match="unknown fields: bad_steps.\nUse that version"):
        TrainState.from_saved({"step": 3, "bad_steps": 1})


@pytest.mark.parametrize("folder", ["nowhere", "empty"])
def test_missing_checkpoint_is_a_two_line_error(tmp_path, folder):
    """The error was a traceback from json."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint|does not exist") as e:
        checkpoint.load(tmp_path / folder)
    assert str(e.value).count("\n") == 1


def test_failed_save_leaves_the_last_one(saved, tokenizer, monkeypatch):
    """A full disk left half a checkpoint under the final name."""
    folder, model, _ = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left") as e:
        save(folder.parent, 8, model, tokenizer)
    assert "untouched" in str(e.value) and "--resume" in str(e.value)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    checkpoint.load(folder.parent)
    with pytest.raises(UserError, match="No space left") as e:  # nothing to resume
        save(folder.parent / "new", 8, model, tokenizer)
    assert "untouched" not in str(e.value) and "--resume" not in str(e.value)


def test_windows_can_save(tmp_path, model, tokenizer, monkeypatch):
    """Windows can neither open a folder nor sync a read-only file, so saving failed there."""
    os_open, fsync, synced = os.open, os.fsync, []

    def windows_open(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return os_open(path, flags, *args, **kwargs)

    def windows_fsync(fd):
        if not fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(fd)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", windows_fsync)
    monkeypatch.setattr(checkpoint.shutil, "_use_fd_functions", False)  # rmtree, as there
    monkeypatch.setattr(os, "open", windows_open)
    for step in (1, 2, 3):
        save(tmp_path / "run", step, model, tokenizer)
    assert len(synced) == 6  # weights and manifest, three times
    assert len(checkpoint.list_checkpoints(tmp_path / "run")) == 2


def test_bundle_holds_the_weights_in_bfloat16(saved, tmp_path):
    """A checkpoint other than the best one, or its optimizer, could be bundled."""
    folder, model, _ = saved
    target = bundle(folder.parent, tmp_path / "bundled")
    small, _, manifest = checkpoint.load(target)
    assert not (target / "optimizer.safetensors").exists() and manifest["trained_with"]
    for a, b in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16).float(), b)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy's, as it is imported here
def test_unfinished_run_is_not_bundled(saved, monkeypatch, capsys):
    """The model that sample.py uses would be replaced with a worse one."""
    before = checkpoint.verify(checkpoint.BUNDLED)
    monkeypatch.setattr(sys, "argv", ["checkpoint", str(saved[0].parent)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("nanococonut.weights.bundle", run_name="__main__")
    assert end.value.code == 2 and "final stage" in capsys.readouterr().err
    assert checkpoint.verify(checkpoint.BUNDLED) == before


def test_second_run_in_a_folder_names_the_first(tmp_path):
    """Two runs mixed their checkpoints and logs in one --out_dir."""
    path, dist = tmp_path / "run", Distributed()
    first, late = (RunDir(path, TrainConfig(), dist) for _ in range(2))
    assert not path.exists()
    first.open_metrics(0)
    held = f"is in use by process {os.getpid()} on {socket.gethostname()}, started 2"
    for resume in (False, True):
        with pytest.raises(UserError, match=held) as e:
            RunDir(path, TrainConfig(resume=resume), dist)
        assert str(e.value).count("\n") == 1
    with pytest.raises(UserError, match=held):  # it opened before the folder existed
        late.open_metrics(0)
    assert RunDir(path, TrainConfig(), Distributed(1, 2))  # of a run only rank 0 locks
    first.close()
    RunDir(path, TrainConfig(), dist)


def test_run_that_came_first_is_not_overwritten(tmp_path, model, tokenizer):
    """Another run could make the folder, train and end while this one prepared its examples."""
    late = RunDir(tmp_path / "run", TrainConfig(), Distributed())
    save(tmp_path / "run", 7, model, tokenizer)
    with pytest.raises(UserError, match="already holds a run"):
        late.open_metrics(0)


def test_lock_ends_with_a_killed_process(tmp_path):
    """A lock that outlives its process stops every resume."""
    fork = multiprocessing.get_context("fork")
    reading, writing = fork.Pipe()

    def hold():
        file = lock.lock_folder(tmp_path)
        writing.send(f"{file.name} is locked")
        time.sleep(60)

    child = fork.Process(target=hold)
    child.start()
    try:
        assert reading.poll(30)
        with pytest.raises(UserError, match=f"process {child.pid} on"):
            lock.lock_folder(tmp_path)
    finally:
        child.kill()
        child.join()
    lock.lock_folder(tmp_path).close()


def test_windows_locks_a_byte_after_the_text(tmp_path, monkeypatch):
    """Nobody else can read a locked byte there: the holder would stay unknown."""

    def locking(fd, mode, n):
        assert os.lseek(fd, 0, os.SEEK_CUR) > 1000 and n == 1
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setattr(lock, "fcntl", None)
    windows = types.SimpleNamespace(locking=locking, LK_NBLCK=2)
    monkeypatch.setattr(lock, "msvcrt", windows, raising=False)
    held = lock.lock_folder(tmp_path)
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        lock.lock_folder(tmp_path)
    held.close()
    lock.lock_folder(tmp_path).close()


def test_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys):
    """Some network file systems have no locks; a run must start there anyway."""

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    lock.lock_folder(tmp_path).close()
    assert "No locks available" in capsys.readouterr().out


def test_background_save_ends_and_reports(tmp_path, model, tokenizer, monkeypatch):
    """Two saves could overlap, an error could be lost, or a run could end before its save did."""
    run = RunDir(tmp_path / "run", TrainConfig(), Distributed())
    run.examples, writing, started = "", threading.Event(), []
    write_checkpoint = checkpoint.write_checkpoint

    def slow(*args):
        started.append(args[0].name)
        assert writing.wait(10)
        write_checkpoint(*args)

    monkeypatch.setattr(checkpoint, "write_checkpoint", slow)
    run.save(model, [], 1, manifest_of(model, tokenizer), background=True)
    run.end_save(wait=False)
    assert not checkpoint.list_checkpoints(run.path)  # the loop goes on meanwhile
    threading.Timer(0.1, writing.set).start()
    run.save(model, [], 2, manifest_of(model, tokenizer), background=True)  # waits for the first
    assert (run.path / "step_00000001").is_dir() and started[0] == "step_00000001"
    run.close()
    assert [x.name for x in checkpoint.list_checkpoints(run.path)][1:] == ["step_00000002"]
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("full")))
    run.save(model, [], 3, manifest_of(model, tokenizer), background=True)
    with pytest.raises(UserError, match="full"):
        run.close()
    assert len(checkpoint.list_checkpoints(run.path)) == 2
