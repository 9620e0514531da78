"""train.py learns, resumes to the same bits, and reports bad input in two lines."""

import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from nanococonut.curriculum import METHODS
from nanococonut.data import prosqa
from nanococonut.data.files import write_examples
from nanococonut.training import log
from nanococonut.weights import checkpoint
from nanococonut.weights.bundle import bundle

# small, but with everything that has state: dropout, sampled stages, early advance, clipping
TINY = """
tokenizer = "words"
render = "compact"
n_nodes = 10
min_hops = 2
max_hops = 3
n_layer = 1
n_head = 2
n_embd = 16
block_size = 128
dropout = 0.1
smear = True
train_examples = 50
regenerate_each_epoch = True
val_examples = 12
max_latent_stage = 2
epochs_per_stage = 2
epochs = 10
uniform_prob = 0.3
batch_size = 16
micro_batch_size = 6
learning_rate = 3e-3
grad_clip = 1.0
warmup_steps = 3
decay_fraction = 0.5
max_new_tokens = 12
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.py"
    path.write_text(TINY)
    return str(path)


@pytest.fixture
def train(script):
    """Return train(*argv) -> (exit code, stdout, stderr)."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    yield script
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


def digests(run):
    """Return the digests of the weights and moments in a run's newest checkpoint."""
    return checkpoint.read_manifest(checkpoint.resolve(run))["files"]


def logged(run):
    """Return the lines of metrics.jsonl without the fields that are times."""
    timed = ("examples_per_s", "minutes")
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_run_goes_through_its_stages(train, tiny):
    """Guards against a stage that is skipped or ends at the wrong step while the loss falls."""
    code, out, err = train(tiny, "--out_dir=run")
    assert (code, err) == (0, "")
    rows = logged("run")
    losses = [r for r in rows if "loss" in r]
    ends = [r for r in rows if "valid_accuracy" in r]
    assert [r["step"] for r in losses] == list(range(1, 41))  # 4 steps an epoch, 10 epochs
    assert [(r["step"], r["stage"], r["thoughts"]) for r in ends] == [
        (8, 0, 0),
        (16, 1, 1),
        (24, 2, 2),
        (40, 3, 2),
    ]
    first, last = (sum(r["loss"] for r in part) / 5 for part in (losses[:5], losses[-5:]))
    assert last < 0.9 * first
    assert all(r["valid_tokens"] >= r["thoughts"] for r in ends)
    for word in ("generated tokens", "matched", "deeper", "python sample.py"):
        assert word in out
    manifest = checkpoint.verify(checkpoint.resolve("run"))
    assert (manifest["step"], manifest["stage"], manifest["n_thoughts"]) == (40, 3, 2)
    assert (
        "kernels: torch (kernels/cpu_train.c does not support dropout" in out
        and manifest["kernels"] == "torch"
    )
    assert manifest["config"]["n_embd"] == 16 and manifest["tokenizer"]["kind"] == "words"


def test_closed_stdout_does_not_stop_training(train, tiny, monkeypatch):
    """Guards `train.py | head`, which ended without saving."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert train(tiny, "--out_dir=run", "--max_steps=2") == (0, "", "")
    assert checkpoint.resolve("run").name == "step_00000002"


def test_checkpoint_at_a_stage_end_names_that_stage(train, tiny):
    """Guards against a thought too many: it is saved after the state moved to the next stage."""
    train(tiny, "--out_dir=run", "--max_steps=8")
    manifest = checkpoint.read_manifest(checkpoint.resolve("run"))
    assert (manifest["stage"], manifest["n_thoughts"]) == (0, 0)
    train(tiny, "--out_dir=run", "--max_steps=9", "--resume")
    manifest = checkpoint.read_manifest(checkpoint.resolve("run"))
    assert (manifest["stage"], manifest["n_thoughts"]) == (1, 1)


def test_run_without_a_finished_stage_prints_no_table(train, tiny):
    """Guards against an empty table."""
    code, out, _ = train(tiny, "--out_dir=run", "--max_steps=7")
    assert code == 0 and "no stage was finished in 7 of 40 steps" in out and "generated" not in out
    code, out, _ = train(tiny, "--out_dir=run", "--max_steps=8", "--resume")
    assert code == 0 and "no stage was finished" not in out and "generated tokens" in out


def test_kill_before_the_first_step_keeps_the_log(train, tiny):
    """Guards against a log that is lost if a run is killed while it resumes."""
    train(tiny, "--out_dir=run", "--max_steps=9")
    before = logged("run")
    for _ in range(2):
        process = start(tiny, "--out_dir=run", "--resume")
        for line in process.stdout:
            if "resuming" in line:
                break
        process.kill()
        process.communicate()
        assert logged("run")[: len(before)] == before


@pytest.mark.parametrize(
    "setting",
    [
        *map("--reset_optimizer={}".format, ("stage", "epoch", "never")),
        "--train_positions=False",
        "--n_embd=32 --dropout=0",  # in C
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(train, tiny, setting):
    """Guards against other batches, dropout masks or moments after resuming: at the end of a
    stage, within an epoch, and at the end of an epoch."""
    assert train(tiny, *setting.split(), "--out_dir=whole", "--max_steps=30")[0] == 0
    train(tiny, *setting.split(), "--out_dir=parts", "--max_steps=8")
    for until in (11, 20, 30):
        code, out, _ = train(
            tiny, *setting.split(), "--out_dir=parts", f"--max_steps={until}", "--resume"
        )
        assert code == 0 and "resuming parts" in out
    assert digests("parts") == digests("whole")
    assert logged("parts") == logged("whole")
    positions = checkpoint.load("parts")[0].wpe.weight
    assert positions.any() == ("positions" not in setting)


def test_seed_decides_the_run(train, tiny):
    """Guards against a random stream that ignores the seed, or does not depend on it alone."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tiny, f"--out_dir={name}", f"--seed={seed}", "--max_steps=3")
    assert digests("a") == digests("b") != digests("c")


def test_stage_ends_when_it_is_learned(train, tiny):
    """Guards against a stage that ends before enough examples, or only after its epochs."""
    # a single example is learned soon
    write_examples("one.json", prosqa.generate(1, 0, prosqa.GraphConfig(10, 2, 3)) * 1500)
    code, _, _ = train(
        tiny, "--data=one.json", "--out_dir=run", "--advance_at=0.9", "--batch_size=320",
        "--micro_batch_size=320",
        "--epochs_per_stage=100", "--epochs=310", "--max_steps=150", "--learning_rate=1e-2",
        "--dropout=0", "--uniform_prob=0", "--decay_fraction=0",
    )  # fmt: skip
    assert code == 0
    ends = [r for r in logged("run") if "valid_accuracy" in r]
    assert [r["stage"] for r in ends] == [0, 1, 2]
    assert ends[0]["step"] >= 4  # not before ACCURACY_WINDOW examples were counted
    assert (
        max(b["step"] - a["step"] for a, b in zip([{"step": 0}, *ends], ends, strict=False)) < 100
    )
    by_step = {r["step"]: r for r in logged("run") if "loss" in r}
    for end in ends:
        assert by_step[end["step"]]["accuracy"] >= 0.9 > by_step[end["step"] - 1]["accuracy"]
    assert by_step[150]["stage"] == 3


def start(tiny, *argv, **kwargs):
    command = [sys.executable, str(ROOT / "train.py"), tiny, *argv]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **kwargs
    )


def wait_for_lines(path, n, process):
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= n:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("no progress in a minute")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(train, tiny, number):
    """Guards against saving half a step after a signal, and against losing lines of the log."""
    train(tiny, "--out_dir=whole", "--save_interval=3")
    process = start(tiny, "--out_dir=killed", "--save_interval=3")
    wait_for_lines(Path("killed/metrics.jsonl"), 5, process)  # saved once, far from the end
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert process.returncode == -9
    else:
        assert process.returncode == 128 + number and err == ""
        assert "continue with --resume" in out
    assert checkpoint.resolve("killed").name != checkpoint.resolve("whole").name
    code, out, _ = train(tiny, "--out_dir=killed", "--save_interval=3", "--resume")
    assert code == 0
    assert digests("killed") == digests("whole")
    assert logged("killed") == logged("whole")


def test_full_disk_keeps_the_last_checkpoint(train, tiny):
    """Guards against a half-written checkpoint that replaces a good one."""
    train(tiny, "--out_dir=run", "--max_steps=4")
    before = digests("run")

    def no_room():  # no file can grow beyond 20 kB
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = start(tiny, "--out_dir=run", "--max_steps=9", "--resume", preexec_fn=no_room)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "step_00000009 could not be written" in err and err.count("\n") <= 2, err
    assert digests("run") == before
    checkpoint.load("run")
    assert train(tiny, "--out_dir=run", "--max_steps=9", "--resume")[0] == 0


def test_full_disk_between_checkpoints_is_an_error(train, tiny):
    """Guards against a traceback if the disk is full, which metrics.jsonl notices first."""
    train(tiny, "--out_dir=run", "--max_steps=4")
    room = Path("run/metrics.jsonl").stat().st_size + 150

    def no_room():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    process = start(tiny, "--out_dir=run", "--max_steps=30", "--resume", preexec_fn=no_room)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and "metrics.jsonl cannot be written" in err, err
    assert err.count("\n") <= 2
    assert train(tiny, "--out_dir=run", "--max_steps=9", "--resume")[0] == 0
    assert [r["step"] for r in logged("run") if "loss" in r] == list(range(1, 10))


def test_divergence_keeps_the_last_good_checkpoint(train, tiny):
    """Guards against a checkpoint of NaN that replaces a good one."""
    argv = ["--learning_rate=1e29", "--grad_clip=0", "--save_interval=1", "--warmup_steps=0"]
    code, _, err = train(tiny, "--out_dir=run", *argv)
    assert code == 2
    assert "infinite or NaN at step" in err and "--learning_rate" in err and err.count("\n") == 2
    kept = checkpoint.list_checkpoints(Path("run"))
    assert kept
    for folder in kept:
        model, _, _ = checkpoint.load(folder)
        assert all(torch.isfinite(p).all() for p in model.parameters())


def test_trains_on_a_file_of_examples(train, tiny):
    """Guards against losing the examples of the short last batch of an epoch."""
    rows = prosqa.generate(40, 5, prosqa.GraphConfig(10, 2, 3))
    write_examples("rows.json", rows[:30])
    write_examples("valid.json", rows[30:])
    code, out, _ = train(tiny, "--data=rows.json", "--valid_data=valid.json", "--epochs=3")
    assert code == 0 and "30 examples per epoch" in out
    manifest = checkpoint.read_manifest(checkpoint.resolve("out/tiny"))
    assert manifest["step"] == 6  # two steps of 16 and 14 examples, three epochs


def test_resume_knows_the_examples_not_their_path(train, tiny):
    """Guards against resuming on changed examples, and against refusing a moved file."""
    flags = [tiny, "--out_dir=run", "--resume"]
    examples = prosqa.generate(40, 5, prosqa.GraphConfig(10, 2, 3))
    write_examples("a.json", examples)
    train(tiny, "--out_dir=run", "--data=a.json", "--max_steps=2")
    # the same examples without their graphs, in another place and format
    keys = ("question", "steps", "answer")
    lines = [json.dumps({k: x[k] for k in reversed(keys)}) + "\n" for x in examples]
    Path("b.jsonl").write_text("".join(lines))
    code, _, err = train(*flags, "--data=b.jsonl", "--max_steps=4")
    assert (code, err) == (0, "")
    assert train(tiny, "--out_dir=whole", "--data=a.json", "--max_steps=4")[0] == 0
    assert digests("run") == digests("whole")
    assert checkpoint.read_manifest(checkpoint.resolve("run"))["config"]["data"] == "b.jsonl"

    Path("a.json").unlink()
    write_examples("a.json", [examples[1], examples[0], *examples[2:]])  # another order
    for data in (["--data=a.json"], []):
        code, _, err = train(*flags, *data)
        assert code == 2 and "was trained on other examples" in err and err.count("\n") == 2
    assert digests("run") == digests("whole")


def test_unknown_words_of_validation_are_named(train, tiny):
    """Guards against words that are split into bytes without a note."""
    for name, first in (("train", range(8)), ("valid", [3, 100])):
        write_examples(f"{name}.json", [
            {"question": f"{a} + 2 = ?", "steps": [], "answer": str(a + 2)} for a in first
        ])  # fmt: skip
    flags = ["--data=train.json", "--valid_data=valid.json", "--render=sentences", "--max_steps=1"]
    code, out, _ = train(tiny, *flags)
    assert code == 0 and "UNKNOWN WORDS: 1 in validation questions" in out and "(100)" in out


def test_resume_needs_only_the_folder(train, tiny):
    """Guards against other settings than the run's, if its command is forgotten."""
    flags = [tiny, "--seed=3", "--method=cot"]
    assert train(*flags, "--out_dir=run", "--max_steps=2")[0] == 0
    code, _, err = train("--resume", "--out_dir=run", "--max_steps=4")
    assert (code, err) == (0, "")
    assert train(*flags, "--out_dir=whole", "--max_steps=4")[0] == 0
    assert digests("run") == digests("whole")


def test_resume_takes_what_changes_only_rounding(train, tiny):
    """Guards against refusing a smaller micro-batch or other evaluation settings on resume."""
    flags = [tiny, "--out_dir=run", "--max_steps=4"]
    train(*flags[:2], "--max_steps=2")
    flags += ["--resume", "--micro_batch_size=2", "--eval_interval=3", "--max_new_tokens=9"]
    code, out, err = train(*flags)
    assert (code, err) == (0, "")
    line = "micro_batch_size=2 (was 6): this changes rounding and dropout masks\n"
    assert out.count("this changes") == out.count(line) == 1
    code, out, err = train(*flags)
    assert (code, err) == (0, "") and "this changes" not in out


def test_resume_with_more_epochs_is_the_longer_run(train, tiny):
    """Guards against refusing more epochs that leave the past steps as they were."""
    flags = [tiny, "--decay_fraction=0", "--first_stage_epochs=1", "--epochs_per_stage=1"]
    assert train(*flags, "--epochs=7", "--out_dir=whole")[0] == 0
    assert train(*flags, "--epochs=5", "--out_dir=run")[0] == 0
    code, out, err = train(*flags, "--epochs=7", "--out_dir=run", "--resume")
    assert (code, err) == (0, "") and digests("run") == digests("whole")


def test_resume_needs_no_init_from(train, tiny, tmp_path):
    """Guards against a run that cannot go on because the weights it started from have moved."""
    assert train(tiny, "--max_steps=1", "--out_dir=first")[0] == 0
    (tmp_path / "next.py").write_text(TINY + 'fallback = "none.py"\n')
    flags = [tmp_path / "next.py", "--epochs=2", "--init_from=first"]
    assert train(*flags, "--out_dir=whole")[0] == 0
    code, out, _ = train(*flags, "--out_dir=run", "--max_steps=1")
    assert code == 0 and "ended by max_steps=1: to go on, --resume with --max_steps=0\n" in out
    (tmp_path / "first").rename(tmp_path / "moved")
    code, out, err = train("--resume", "--out_dir=run", "--max_steps=0")
    assert (code, err) == (0, "") and digests("run") == digests("whole")
    assert "ended by" not in out


def test_resume_with_other_rates_names_init_from(train, tiny):
    """Guards against resuming with epochs that would have changed the past learning rates."""
    train(tiny, "--epochs=7", "--epochs_per_stage=1", "--out_dir=run")
    code, _, err = train(tiny, "--epochs=9", "--epochs_per_stage=1", "--out_dir=run", "--resume")
    assert code == 2 and "planned for epochs=7; it is too late to change to 9." in err
    assert err.count("\n") == 2
    options = [x for x in err.split() if x.startswith("--") and x != "--out_dir:"]
    assert options == ["--epochs=7,", "--init_from=RUN", "--first_stage_epochs=0",
                       "--max_latent_stage=0", "--final_thoughts=2"]  # fmt: skip
    code, _, err = train(tiny, "--epochs=9", "--init_from=run", *options[2:], "--out_dir=new")
    assert (code, err) == (0, "")
    ends = [r for r in logged("new") if "valid_accuracy" in r]
    assert [(r["step"], r["thoughts"]) for r in ends] == [(36, 2)]


def test_resume_refuses_another_generator(train, tiny, monkeypatch):
    """Guards against silently resuming after the generator changed."""
    train(tiny, "--out_dir=run", "--max_steps=2")
    generate = prosqa.generate
    monkeypatch.setattr(prosqa, "generate", lambda *a, **k: generate(*a, **k)[::-1])
    code, _, err = train(tiny, "--out_dir=run", "--resume")
    assert code == 2 and "than those of this version's generator" in err and err.count("\n") == 2


def test_trains_on_a_task_of_your_own(train, tiny):
    """Guards data of sums: new words, no graphs, no shortcut rules, no validation file."""
    sums = [(a, b) for a in range(6) for b in range(5)]
    rows = [{"question": f"{a} plus {b}?", "steps": [], "answer": f"{a + b}"} for a, b in sums]
    write_examples("sums.json", rows)
    code, out, err = train(tiny, "--data=sums.json", "--render=sentences", "--epochs=2")
    assert (code, err) == (0, "") and "27 examples per epoch" in out and "no model" not in out
    _, tokenizer, manifest = checkpoint.load("out/tiny")
    assert "plus" in manifest["tokenizer"]["words"] and not tokenizer.unknown_words("3 plus 4?")
    code, out, _ = train("--out_dir=out/tiny", "--seed=1", script="sample.py")
    assert code == 0 and "plus" in out


def test_trains_on_released_examples(train, tiny, released):
    """Guards against an error for the additional keys of the released files."""
    code, out, _ = train(
        tiny, f"--data={released}/prosqa_valid.json", "--max_steps=2", "--block_size=300"
    )
    assert code == 0 and "288 examples per epoch" in out  # 12, val_examples, are held out


def test_methods_without_stages_validate_at_the_end(train, tiny):
    """Guards against runs of a single stage that are never validated."""
    for method in ("cot", "no_cot"):
        code, _, err = train(tiny, f"--method={method}", f"--out_dir={method}", "--epochs=2")
        assert (code, err) == (0, "")
        ends = [r for r in logged(method) if "valid_accuracy" in r]
        assert [(r["stage"], r["thoughts"]) for r in ends] == [(3, 0)]


def test_ignored_options_are_named_if_typed(train, tiny):
    """Guards against a typed option that silently has no effect; in a file it is allowed."""
    flags = [tiny, "--max_steps=1"]
    code, out, _ = train(*flags, "--method=cot", "--out_dir=a")
    assert code == 0 and "NOT USED" not in out
    flags += ["--first_stage_epochs=0"]
    code, out, _ = train(*flags, "--method=cot", "--dropout=0", "--out_dir=b")
    assert code == 0
    assert "NOT USED by method cot with this data and init_from: --first_stage_epochs\n" in out
    code, out, _ = train(tiny, "--max_steps=1", "--init_from=b", "--n_layer=5", "--out_dir=e")
    assert code == 0 and "with this data and init_from: --n_layer\n" in out
    code, out, _ = train(*flags, "--out_dir=c")
    assert code == 0 and "NOT USED" not in out
    write_examples("rows.json", prosqa.generate(40, 5, prosqa.GraphConfig(10, 2, 3)))
    flags = [tiny, "--max_steps=1", "--data=rows.json", "--train_examples=9", "--out_dir=d"]
    code, out, _ = train(*flags)
    assert code == 0 and "with this data and init_from: --train_examples\n" in out
    assert "n_nodes" not in out and "val_examples=12" in out  # four are held out


def test_fallback_is_printed_and_recorded(train, tiny, monkeypatch, tmp_path):
    """Guards against a small model that is taken for GPT-2."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    (tmp_path / "big.py").write_text('init_from = "gpt2"\nfallback = "tiny.py"\n')
    code, out, _ = train(tmp_path / "big.py", "--max_steps=1", "--out_dir=run")
    assert code == 0
    assert "NOT TRAINING" in out and "--fallback=None" in out
    fell_back = checkpoint.read_manifest(checkpoint.resolve("run"))["fell_back"]
    assert "big.py" in fell_back["instead_of"] and fell_back["because"]


@pytest.mark.parametrize("has_gpu", [False, True])
def test_typed_init_from_never_falls_back(train, tiny, monkeypatch, tmp_path, has_gpu):
    """Guards against replacing a typed --init_from, unless --fallback is typed, too."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: has_gpu)
    (tmp_path / "big.py").write_text('init_from = "gpt2"\nfallback = "tiny.py"\n')
    flags = [tmp_path / "big.py", "--max_steps=1", "--out_dir=run", "--device=cpu"]
    code, out, err = train(*flags, "--init_from=gpt2")
    assert code == 2 and "TRAINING" not in out and not Path("run").exists()
    assert "tiny.py" in err and "--fallback=None" in err and err.count("\n") == 2
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # to train without one
    code, out, _ = train(*flags, "--init_from=gpt2", "--fallback=tiny.py")
    assert code == 0 and "TRAINING" in out


REFUSED = {
    "misspelt key": (["tiny.py", "--n_layr=2"], "Did you mean --n_layer?"),
    "no config": (["--max_steps=1"], "no config file"),
    "a folder as config": (["run"], "run is a folder"),
    "wrong type": (["tiny.py", "--epochs=many"], "expected an integer"),
    "missing config": (["tiy.py"], "Did you mean tiny.py?"),
    "config not literal": (["bad.py"], "not a literal"),
    "data missing": (["tiny.py", "--data=none.json"], "none.json"),
    "data not JSON": (["tiny.py", "--data=bad.py"], "not JSON"),
    "data not UTF-8": (["tiny.py", "--data=latin.json"], "UTF-8"),
    "data without keys": (["tiny.py", "--data=keys.json"], "example 0"),
    "data empty": (["tiny.py", "--data=empty.json"], "no valid examples"),
    "data no ProsQA": (["tiny.py", "--data=other.json", "--valid_data=other.json"], "ProsQA"),
    "data of one row": (["tiny.py", "--data=one.json"], "held out"),
    "validation too long": (["tiny.py", "--valid_data=long.json"], "block_size=128"),
    "validation no ProsQA": (["tiny.py", "--valid_data=other.json"], "ProsQA"),
    "a checkpoint as out_dir": (["tiny.py", "--out_dir=run/step_00000001"], "is a checkpoint"),
    "a model only": (["tiny.py", "--out_dir=bundle", "--resume"], "cannot be resumed"),
    "seed too large": (["tiny.py", "--seed=99999999999999999999"], "at most"),
    "no GPT-2 there": (["tiny.py", "--init_from=hub"], "no weights"),
    "brackets": (["tiny.py", "--data=[/x].json"], "[/x].json"),
    "too long": (["tiny.py", "--block_size=30"], "block_size=30"),
    "out_dir a file": (["tiny.py", "--out_dir=tiny.py"], "cannot be used"),
    "nothing to resume": (["tiny.py", "--resume", "--out_dir=none"], "without --resume"),
    "run exists": (["tiny.py", "--out_dir=run"], "already holds a run"),
    "model changed": (["tiny.py", "--out_dir=run", "--resume", "--n_embd=32"], "n_embd=16"),
    "data changed": (["tiny.py", "--out_dir=run", "--resume", "--n_nodes=12"], "n_nodes=10"),
    "damaged": (["tiny.py", "--out_dir=torn", "--resume"], "Move this folder away"),
    "no manifest": (["tiny.py", "--out_dir=torn_copy", "--resume"], "manifest.json is missing"),
    "no such device": (["tiny.py", "--device=cuda:99"], "cannot be used"),
    "no device": (["tiny.py", "--device=toaster"], "auto, cpu, cuda"),
    "impossible graphs": (["tiny.py", "--min_hops=7", "--max_hops=7"], "hops"),
    "no weights": (["tiny.py", "--init_from=gpt2"], "no weights of 'gpt2'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_two_lines(train, tiny, tmp_path, monkeypatch, case):
    """Guards against a traceback, a silent default, or an overwritten run."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    (tmp_path / "bad.py").write_text("n_layer = int('2')\n")
    (tmp_path / "latin.json").write_bytes(b'[{"question": "caf\xe9", "steps": [], "answer": "1"}]')
    (tmp_path / "keys.json").write_text('[{"question": "Is it?"}]')
    (tmp_path / "empty.json").write_text("[]")
    write_examples("long.json", prosqa.generate(2, 0))  # of the released size
    if case == "a model only":
        train(tiny, "--out_dir=whole", "--max_steps=1")
        (tmp_path / "bundle").mkdir()
        bundle("whole", tmp_path / "bundle" / "step_00000001")
    write_examples("one.json", prosqa.generate(1, 0))
    (tmp_path / "other.json").write_text('[{"question": "2+2?", "steps": [], "answer": "4"}]')
    argv, words = REFUSED[case]
    if "run" in str(argv) or "torn" in str(argv):
        name = "run" if "run" in str(argv) else argv[1].removeprefix("--out_dir=")
        assert train(tiny, f"--out_dir={name}", "--max_steps=1")[0] == 0
        before = digests(name)
        if name == "torn":
            weights = checkpoint.resolve(name) / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-8])
        if name == "torn_copy":  # an older checkpoint is whole
            newest = tmp_path / name / "step_00000002"
            shutil.copytree(checkpoint.resolve(name), newest)
            (newest / "manifest.json").unlink()
    code, _, err = train(*argv)
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") <= 2 and "Traceback" not in err, err
    assert words in err, err
    if "run" in str(argv):
        assert digests("run") == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write everywhere")
def test_unwritable_out_dir_is_an_error(train, tiny, tmp_path):
    """Guards against a traceback."""
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = train(tiny, "--out_dir=locked/run")
    assert code == 2 and "cannot be used" in err


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_resumes_and_samples(train, tiny, method):
    """Guards against a method that trains, but cannot resume or answer in sample.py."""
    flags = [tiny, f"--method={method}", "--epochs=8", "--reset_optimizer=never"]
    # as in the small configs: a module may be unused in some stages
    flags += ["--muon_learning_rate=5e-3"]
    assert train(*flags, "--out_dir=whole")[0] == 0
    assert train(*flags, "--out_dir=part", "--max_steps=13")[0] == 0
    assert train(*flags, "--out_dir=part", "--resume")[0] == 0
    assert digests("whole") == digests("part") and logged("whole") == logged("part")
    manifest = checkpoint.read_manifest(checkpoint.resolve("whole"))
    has_thoughts = METHODS[method].n_thoughts_rule != "none"
    assert (manifest["method"], manifest["n_thoughts"]) == (method, 2 if has_thoughts else 0)
    code, out, err = train("--out_dir=whole", "--seed=1", script="sample.py")
    assert (code, err) == (0, "") and "answer" in out
    assert ("ms per thought" in out) == METHODS[method].feeds_back


def test_collapsed_thoughts_are_reported(train, tiny, monkeypatch):
    """Guards against thoughts that ignore the question without a warning."""
    flags = [tiny, "--epochs=3", "--first_stage_epochs=0"]
    code, out, _ = train(*flags, "--out_dir=a")
    assert code == 0 and "COLLAPSED" not in out
    validation = [line for line in logged("a") if "valid_accuracy" in line][0]
    assert len(validation["thought_norm"]) == validation["thoughts"] == 1
    monkeypatch.setattr(log, "COLLAPSED", -1.1)
    code, out, _ = train(*flags, "--out_dir=b")
    assert code == 0 and out.count("COLLAPSED") == out.count("validation:") > 0


def test_stop_classifier_does_not_change_the_model(train, tiny):
    """Guards against a stop loss or its gradient norm that changes the model's weights."""
    shape = ["--epochs=8", "--pad_latent_to_max=False"]
    assert train(tiny, *shape, "--out_dir=without")[0] == 0
    assert train(tiny, *shape, "--stop=classifier", "--out_dir=with")[0] == 0
    plain = checkpoint.load("without")[0].state_dict()
    with_stop = checkpoint.load("with")[0].state_dict()
    assert with_stop.keys() - plain.keys() == {"stop.weight", "stop.bias"}
    assert all(torch.equal(with_stop[name], tensor) for name, tensor in plain.items())
    assert with_stop["stop.weight"].abs().max() > 0
    code, out, err = train("--out_dir=with", "--seed=1", script="sample.py")
    assert (code, err) == (0, "") and "answer" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stop=classifier", "--method=cot"], "cot has none"),
        (["--stop=classifier", "--method=pause_as_thought"], "has none"),
        (["--method=soft_thought", "--soft_top_k=100000"], "exceeds the vocabulary"),
        (["--kernels=triton"], "kernels=triton cannot run here"),
        (["--graph=on"], "graph=on cannot run here"),
        (["--task=gsm8k"], "render='compact' does not work for gsm8k"),
        (["--task=gsm8k", "--render=sentences"], "cannot be downloaded"),
    ],
)
def test_contradicting_settings_are_refused(train, tiny, flags, words):
    """Guards against silently ignoring one of two conflicting options."""
    code, _, err = train(tiny, *flags, "--out_dir=new")
    assert code == 2 and words in err and err.count("\n") <= 2 and "Traceback" not in err
    assert not checkpoint.list_checkpoints(Path("new"))


def test_half_precision_trains_everything(train, tiny):
    """Guards autocast, under which hidden states and parameters differ in dtype."""
    flags = [tiny, "--dtype=bfloat16", "--max_steps=3", "--stop=classifier"]
    flags += ["--first_stage_epochs=0", "--max_latent_stage=0", "--final_thoughts=2"]
    for method in ("coconut", "soft_thought", "projected", "pause_multipass"):
        code, _, err = train(*flags, f"--method={method}", f"--out_dir={method}")
        assert (code, err) == (0, "")


def test_kernels_train_as_torch_does(train, tiny):
    """Guards against a different backend than the one printed."""
    pytest.importorskip("triton")
    losses = []
    for kernels in ("torch", "triton"):
        flags = ["--dropout=0", "--first_stage_epochs=0", "--c_thought=2"]
        flags += ["--max_steps=2", "--batch_size=2"]
        code, out, err = train(tiny, *flags, f"--kernels={kernels}", f"--out_dir={kernels}")
        assert (code, err) == (0, "") and f"kernels: {kernels} (" in out
        losses.append([row["loss"] for row in logged(kernels)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][0] != losses[0][1]


def test_generated_examples_are_never_skipped(train, tiny):
    """Guards against silently dropping generated examples that exceed block_size."""
    code, _, err = train(tiny, "--skip_bad_rows", "--block_size=40", "--out_dir=new")
    assert code == 2 and "block_size=40" in err


def test_hub_commit_stays_the_first_ones(train, tiny, monkeypatch):
    """Guards against other examples after resuming: a branch on the hub may move."""
    tips, asked = {"main": "c0ffee"}, []

    def from_hub(split, name="", revision="main", skipped=None):
        asked.append((split, revision))
        commit = tips.get(revision, revision)
        b = len(commit)  # other examples at another commit
        sums = [(f"{a} + {b}?", f"{a + b}") for a in range(20)]
        return [{"question": q, "steps": [], "answer": a} for q, a in sums], commit

    monkeypatch.setattr("nanococonut.data.gsm8k.from_hub", from_hub)
    flags = [tiny, "--task=gsm8k", "--render=sentences"]
    assert train(*flags, "--out_dir=whole", "--max_steps=4")[0] == 0
    code, out, err = train(*flags, "--out_dir=run", "--max_steps=2")
    assert (code, err) == (0, "") and "c0ffee" in out
    assert asked[-2:] == [("train", "main"), ("validation", "c0ffee")]
    tips["main"] = "another one"
    code, _, err = train(*flags, "--out_dir=run", "--max_steps=4", "--resume")
    assert (code, err) == (0, "") and digests("run") == digests("whole")
    assert asked[-2:] == [("train", "c0ffee"), ("validation", "c0ffee")]
    assert checkpoint.read_manifest(checkpoint.resolve("run"))["hub_commit"] == "c0ffee"
    assert train("--out_dir=run", "--seed=1", script="sample.py")[0] == 0
    assert asked[-2:] == [("train", "c0ffee"), ("validation", "c0ffee")]


def test_refused_run_leaves_no_folder(train, tiny):
    """Guards against an empty folder that blocks the corrected command."""
    for wrong in ("--kernels=triton", "--graph=on", "--data=nowhere.json"):
        code, _, err = train(tiny, wrong, "--out_dir=refused")
        assert code == 2 and err.count("\n") == 2 and not Path("refused").exists()


def test_tensorboard_gets_every_step(train, tiny):
    """Guards against duplicate events of steps that a resumed run repeats."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, _, err = train(tiny, "--tensorboard", "--out_dir=run", "--max_steps=8")
    assert (code, err) == (0, "")
    assert train(tiny, "--tensorboard", "--out_dir=run", "--max_steps=9", "--resume")[0] == 0
    events = accumulator.EventAccumulator("run/tensorboard").Reload()
    lines = [line for line in logged("run") if "loss" in line]
    for name in ("loss", "accuracy", "stage"):
        scalars = events.Scalars(f"train/{name}")
        assert [x.step for x in scalars] == list(range(1, 10))
        assert [x.value for x in scalars] == pytest.approx([line[name] for line in lines])
    assert events.Scalars("train/lr")[0].value == pytest.approx(
        1e-3
    )  # the first of 3 warm-up steps
    assert [x.step for x in events.Scalars("validation/valid_accuracy")] == [8]


def test_tensorboard_missing_is_an_error(train, tiny, monkeypatch):
    """Guards against a traceback after the data was generated."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *a: name != "tensorboard" and find_spec(name, *a) or None,
    )
    code, _, err = train(tiny, "--tensorboard", "--out_dir=run")
    assert code == 2 and "pip install" in err and err.count("\n") == 2 and not Path("run").exists()
