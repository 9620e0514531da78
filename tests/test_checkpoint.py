"""A checkpoint is whole or not there, is what was saved, and says so when it is not."""

import json
import runpy
import shutil
import sys

import pytest
import torch
from conftest import random_gpt
from safetensors.torch import load_file, save_file

from nanococonut import checkpoint
from nanococonut.config import TrainConfig, build
from nanococonut.errors import UserError


def manifest_of(model, tokenizer, **more):
    return {
        "config": {},
        "model": checkpoint.describe_model(model),
        "tokenizer": tokenizer.spec,
        "method": "coconut",
        "stage": 3,
        "n_thoughts": 6,
        "minutes": 0.5,
        "device": "cpu",
        "threads": 1,
        **more,
    }


@pytest.fixture
def model(tokenizer):
    return random_gpt(dtype=torch.float32, vocab_size=tokenizer.vocab_size, smear=True)


@pytest.fixture
def saved(tmp_path, model, tokenizer):
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randint(20, (2, 5))).sum().backward()
    optimizer.step()
    folder = checkpoint.save(tmp_path / "run", 7, model, [optimizer], manifest_of(model, tokenizer))
    return folder, model, optimizer


def test_load_gives_back_the_model_tokenizer_and_manifest(saved, tokenizer):
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


def test_the_optimizer_goes_on_as_if_nothing_had_happened(saved):
    folder, model, optimizer = saved
    fresh = torch.optim.AdamW(model.parameters())
    checkpoint.load_optimizers([fresh], folder)
    a, b = optimizer.state_dict()["state"], fresh.state_dict()["state"]
    assert a.keys() == b.keys() and a
    for i in a:
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(a[i][key], b[i][key])


def test_older_ones_go_but_not_the_best(tmp_path, model, tokenizer):
    run = tmp_path / "run"
    for step, best in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4)]:
        m = manifest_of(model, tokenizer, best_step=best)
        checkpoint.save(run, step, model, [], m)
        kept = [int(p.name[5:]) for p in checkpoint.steps_in(run)]
        assert kept == sorted({min(best, step), max(1, step - 1), step})  # the best, the last two
    assert checkpoint.find(run).name == "step_00000005"
    assert checkpoint.find(run, best=True).name == "step_00000004"


def test_a_half_written_checkpoint_is_not_one(saved):
    """kill -9 in the middle of a save leaves a folder under another name."""
    folder, _, _ = saved
    shutil.copytree(folder, folder.with_name(".step_00000009.partial"))
    shutil.copytree(folder, folder.with_name("step_00000010"))
    (folder.with_name("step_00000010") / "manifest.json").unlink()
    assert checkpoint.find(folder.parent) == folder


def test_a_users_copy_is_the_users(saved, model, tokenizer):
    folder, _, _ = saved
    copy = folder.with_name(f"{folder.name}_backup")
    shutil.copytree(folder, copy)
    for step in (8, 9, 10):
        checkpoint.save(folder.parent, step, model, [], manifest_of(model, tokenizer))
    assert checkpoint.find(folder.parent).name == "step_00000010" and copy.is_dir()


def test_a_model_without_training_state_cannot_be_resumed(saved, tmp_path):
    target = checkpoint.bundle(saved[0].parent, tmp_path / "bundled")
    with pytest.raises(UserError, match="cannot be resumed"):
        checkpoint.verify(target, resume=True)


# an older run's config -> what it is now
OLDER = {
    "gone": ({"beta1": 0.9, "shard": True, "time_to": 0.9, "eval_batch_size": 7}, {}),
    "adamw": (
        {"optimizer": "adamw", "muon_learning_rate": 5e-3}, {"muon_learning_rate": 0.0},
    ),
    "muon": (
        {"optimizer": "muon", "muon_learning_rate": 7e-3}, {"muon_learning_rate": 7e-3},
    ),
    "hops": ({"task": "prontoqa", "hops": 3, "max_hops": 6}, {"task": "prontoqa", "max_hops": 3}),
    "no hops": ({"task": "prosqa", "hops": 5, "max_hops": 3}, {"task": "prosqa", "max_hops": 3}),
    "all stages": ({"start_stage": 0, "first_stage_epochs": 0}, {"first_stage_epochs": None}),
    "a long stage 0": ({"start_stage": 0, "first_stage_epochs": 6}, {"first_stage_epochs": 6}),
    "no stage 0": ({"start_stage": 1, "first_stage_epochs": 0}, {"first_stage_epochs": 0}),
    "as many passes": ({"thoughts": "jacobi", "jacobi_iterations": 6}, {}),
    "today's": ({"first_stage_epochs": 0, "max_hops": 4}, {"first_stage_epochs": 0, "max_hops": 4}),
}  # fmt: skip


def written(folder, model, tokenizer, config):
    """A model's checkpoint of this config, with training state."""
    manifest = manifest_of(model, tokenizer, progress={}) | {"config": config, "step": 1}
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint.write(folder, checkpoint.tensors(model, [optimizer]), manifest)


@pytest.mark.parametrize("case", OLDER)
def test_older_settings_are_read_as_todays(tmp_path, model, tokenizer, case):
    older, now = OLDER[case]
    written(tmp_path / "run", model, tokenizer, older)
    manifest = checkpoint.load(tmp_path / "run")[2]
    assert manifest["config"] == now
    build(TrainConfig, now)


def test_thoughts_in_fewer_passes_are_refused(tmp_path, model, tokenizer):
    """They are not those that are computed one by one: it would answer, and wrongly."""
    config = {"thoughts": "jacobi", "jacobi_iterations": 5}
    written(tmp_path / "run", model, tokenizer, config)
    with pytest.raises(UserError, match="6 thoughts in 5 parallel passes") as e:
        checkpoint.load(tmp_path / "run")
    assert str(e.value).count("\n") == 1


@pytest.mark.parametrize(
    "config",
    [
        {"beta1": 0.8},
        {"start_stage": 2, "first_stage_epochs": 0},
        {"start_stage": 1, "first_stage_epochs": 3},
        {"length_pool": 16},
        {"fresh_rows": True, "length_pool": 1},
        {"uniform_prob": 0.3, "uniform_to": "stage"},
        {"uniform_prob": 0.3, "uniform_to": "steps", "advance_at": 0.9},
        {"advance_at": 0.9, "advance_rows": 32},
        {"stop": "classifier", "stop_target": "correct"},
        {"thoughts": "jacobi", "jacobi_iterations": 0},
    ],
    ids=str,
)
def test_what_cannot_go_on_as_it_began_is_loaded_only(tmp_path, model, tokenizer, config):
    written(tmp_path / "run", model, tokenizer, config)
    checkpoint.load(tmp_path / "run")
    with pytest.raises(UserError, match="which this version cannot do") as e:
        checkpoint.verify(tmp_path / "run", resume=True)
    assert str(e.value).count("\n") == 1


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


DAMAGE = {
    "weights truncated": lambda f: truncate(f / "model.safetensors"),
    "one bit flipped": lambda f: flip(f / "model.safetensors"),
    "weights missing": lambda f: (f / "model.safetensors").unlink(),
    "optimizer flipped": lambda f: flip(f / "optimizer.safetensors"),
    "manifest truncated": lambda f: truncate(f / "manifest.json"),
    "manifest foreign": lambda f: (f / "manifest.json").write_text('{"model_type": "gpt2"}'),
    "manifest a list": lambda f: (f / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_clear_error(saved, damage):
    folder, _, _ = saved
    DAMAGE[damage](folder)
    with pytest.raises(UserError, match="damaged or not one of ours") as e:
        checkpoint.load(folder)
    assert str(e.value).count("\n") == 1


def test_another_shape_is_named(saved):
    folder, model, _ = saved
    weights = load_file(folder / "model.safetensors")
    weights["wpe.weight"] = weights["wpe.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = checkpoint._digest(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"another shape: wpe.weight is \(5, 24\)"):
        checkpoint.load(folder)


@pytest.mark.parametrize("where", ["nowhere", "empty"])
def test_no_checkpoint_is_said_in_two_lines(tmp_path, where):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint|is not there") as e:
        checkpoint.load(tmp_path / where)
    assert str(e.value).count("\n") == 1


def test_a_save_that_fails_leaves_the_last_one(saved, tokenizer, monkeypatch):
    folder, model, _ = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left") as e:
        checkpoint.save(folder.parent, 8, model, [], manifest_of(model, tokenizer))
    assert "untouched" in str(e.value)
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    checkpoint.load(folder.parent)


def test_bundle_is_small_and_answers_the_same(saved, tmp_path):
    folder, model, _ = saved
    target = checkpoint.bundle(folder.parent, tmp_path / "bundled")
    small, _, manifest = checkpoint.load(target)
    assert not (target / "optimizer.safetensors").exists() and manifest["trained_with"]
    for a, b in zip(model.parameters(), small.parameters(), strict=True):
        assert torch.equal(a.to(torch.bfloat16).float(), b)


def test_the_bundled_model_is_not_replaced_by_an_unfinished_run(saved, monkeypatch, capsys):
    before = checkpoint.verify(checkpoint.BUNDLED)
    monkeypatch.setattr(sys, "argv", ["checkpoint", str(saved[0].parent)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("nanococonut.checkpoint", run_name="__main__")
    assert end.value.code == 2 and "final stage" in capsys.readouterr().err
    assert checkpoint.verify(checkpoint.BUNDLED) == before
