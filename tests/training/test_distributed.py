"""Several processes train the same as one, stop together, and resume in any number.

Most runs are forked from this process, which has imported torch already; one uses torchrun.
"""

import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT

from nanococonut import coconut
from nanococonut.runtime import distributed
from nanococonut.runtime.distributed import Distributed
from nanococonut.runtime.errors import UserError
from nanococonut.weights import checkpoint

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA does not survive a fork"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
# 4 steps per epoch of 16, 16, 16 and 1 examples: one of two processes gets none of the last
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
dropout = 0.0
smear = True
train_examples = 49
regenerate_each_epoch = True
val_examples = 7
max_latent_stage = 2
epochs_per_stage = 1
epochs = 10
uniform_prob = 0.3
batch_size = 16
micro_batch_size = 6
learning_rate = 3e-3
grad_clip = 1.0
max_new_tokens = 12
"""


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(TINY)
    handlers = {number: signal.getsignal(number) for number in INTERRUPTS}
    yield
    for number, handler in handlers.items():  # train.py replaced them if it ran in this process
        signal.signal(number, handler)


class Run:
    """Run train.py in `world` forked processes, each of which calls before(rank) first."""

    def __init__(self, world, *argv, before=None):
        # outlives the processes, as torchrun's does
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        fork = multiprocessing.get_context("fork")
        self.world, self.before, self.argv = world, before, ["train.py", "tiny.py", *argv]
        self.processes = [fork.Process(target=self.child, args=(r,)) for r in range(world)]
        for process in self.processes:
            process.start()

    def child(self, rank):
        for name in ("stdout", "stderr"):
            setattr(sys, name, open(f"{name}.{rank}", "w"))
        given = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=self.world, MASTER_ADDR="127.0.0.1")
        given |= dict(MASTER_PORT=self.store.port, TORCHELASTIC_USE_AGENT_STORE=True)
        os.environ.update({name: str(value) for name, value in given.items()})
        sys.argv = self.argv
        if self.before:
            self.before(rank)
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    def end(self):
        """Return (exit codes, all of stdout, all of stderr). Fail if a process hangs."""
        for process in self.processes:
            process.join(30)
        hung = [process for process in self.processes if process.is_alive()]
        for process in hung:
            process.kill()
        assert not hung
        out, err = ("".join(p.read_text() for p in sorted(Path().glob(f"{name}.*")))
                    for name in ("stdout", "stderr"))  # fmt: skip
        return [process.exitcode for process in self.processes], out, err


def logged(run):
    timed = ("examples_per_s", "minutes")
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").open()]
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def assert_same(run, expected):
    assert len(logged(run)) == len(logged(expected)) >= 20
    for line, other in zip(logged(run), logged(expected), strict=True):
        assert line.keys() == other.keys()
        for key in line:
            if key.startswith("thought_"):
                continue  # computed on the first rank's share of the validation examples
            assert line[key] == pytest.approx(other[key], rel=1e-5, abs=1e-5), (key, line, other)


def test_two_processes_train_what_one_trains(script):
    """Guards against losing or averaging a gradient that only some ranks have."""
    # projected: unused in stage 0 and for some examples; the stop classifier is not clipped
    flags = ["--method=projected", "--muon_learning_rate=5e-3", "--stop=classifier"]
    flags += ["--advance_at=0.01", "--max_steps=22"]
    assert script("tiny.py", "--out_dir=one", *flags)[0] == 0
    codes, out, err = Run(2, "--out_dir=two", *flags).end()
    assert (codes, err) == ([0, 0], "") and out.count("try it: python sample.py") == 1
    assert_same("two", "one")
    assert checkpoint.read_manifest(checkpoint.resolve("two"))["processes"] == 2


def test_torchrun_trains_the_same(script):
    """Guards the real launcher, which sets more variables than a fork and owns the store."""
    flags = ["--max_steps=20", "--eval_interval=4", "--n_embd=32"]  # in C
    assert script("tiny.py", "--out_dir=one", *flags)[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    command += [str(ROOT / "train.py"), "tiny.py", "--out_dir=two", *flags]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("try it: python sample.py") == 1
    assert_same("two", "one")


def test_resumes_in_another_number_of_processes(script):
    """Guards against examples or dropout that depend on the number of processes."""
    assert script("tiny.py", "--out_dir=whole", "--max_steps=20")[0] == 0
    assert Run(2, "--out_dir=parts", "--max_steps=7").end()[0] == [0, 0]
    assert script("tiny.py", "--out_dir=parts", "--max_steps=14", "--resume")[0] == 0
    assert Run(3, "--out_dir=parts", "--max_steps=20", "--resume").end()[0] == [0, 0, 0]
    assert_same("parts", "whole")


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("how", ["UserError", "SIGKILL"])
def test_failure_of_one_ends_all_with_one_error(failing, how):
    """Guards against the other processes hanging, or printing errors of their own."""

    def before(rank):
        forward, calls = coconut.forward, []

        def fails(*args):
            calls.append(1)
            if len(calls) == 9:
                if how == "SIGKILL":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise UserError("the dog ate it.\nTry a cat.")
            return forward(*args)

        if rank == failing:
            coconut.forward = fails

    codes, _, err = Run(2, "--out_dir=run", "--save_interval=1", before=before).end()
    if how == "UserError":
        assert (codes, err) == ([2, 2], "error: the dog ate it.\nTry a cat.\n")
    else:
        assert sorted(codes) == [-9, 2] and codes[failing] == -9
        assert err.startswith("error: ") and "lost its connection" in err and err.count("\n") == 2
    assert checkpoint.list_checkpoints(Path("run"))


def test_error_of_all_is_printed_once():
    """Guards against an error printed by every process."""
    codes, out, err = Run(2, "--n_layr=2").end()
    assert (codes, out) == ([2, 2], "")
    assert err.count("error: ") == 1 and "--n_layer" in err and err.count("\n") == 2


def test_bug_shows_its_traceback_once():
    """Guards against interleaved tracebacks of all processes."""

    def before(rank):
        coconut.loss = None

    codes, _, err = Run(2, "--out_dir=run", before=before).end()
    assert codes == [1, 1] and err.count("Traceback") == err.count("TypeError") == 1


def test_unusable_path_is_one_error_for_all():
    """Guards against a traceback for an OSError with a file name."""

    def before(rank):
        def fails(*args, **kwargs):
            raise PermissionError(13, "Permission denied", "there/file")

        coconut.loss = fails

    codes, _, err = Run(2, "--out_dir=run", before=before).end()
    error = "error: there/file cannot be used: Permission denied.\nChoose another path.\n"
    assert (codes, err) == ([2, 2], error)


def test_signal_to_one_stops_all_at_the_same_step(script):
    """Guards against a rank that stops a step early: the others wait in the all-reduce."""
    assert script("tiny.py", "--out_dir=whole")[0] == 0
    run = Run(2, "--out_dir=run")
    log = Path("run/metrics.jsonl")
    for _ in range(3000):
        if log.exists() and log.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.01)
    os.kill(run.processes[1].pid, signal.SIGTERM)
    os.kill(run.processes[1].pid, signal.SIGINT)  # torchrun adds its own to the terminal's
    codes, out, err = run.end()
    assert codes[0] == 143 and codes[1] in (143, 130)  # of two signals, either may come first
    assert err == "" and out.count("stopped at step") == 1
    assert checkpoint.read_manifest(checkpoint.resolve("run"))["step"] < 40
    assert script("tiny.py", "--out_dir=run", "--resume")[0] == 0
    assert_same("run", "whole")


def test_dropout_differs_between_processes():
    """Guards against equal seeds: the CPU generator reads only 32 bits of them."""
    drawn = set()
    for rank in range(64):
        torch.manual_seed(Distributed(rank, 64).seed(12_345))
        drawn.add(torch.rand(()).item())
    assert len(drawn) == 64 and Distributed().seed(12_345) == 12_345


def test_shards_cover_everything_once():
    """Guards against an example that is lost or trained twice."""
    shares = [list(Distributed(rank, 3).shard(range(10))) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(10)) and max(map(len, shares)) == 4


@pytest.mark.parametrize(
    ("env", "named"),
    [
        ("RANK=1", "RANK=1"),
        ("LOCAL_RANK=0", "LOCAL_RANK=0"),
        ("WORLD_SIZE=2 RANK=0", "WORLD_SIZE=2, RANK=0"),
        ("WORLD_SIZE=2 RANK=0 LOCAL_RANK=0 MASTER_ADDR=localhost", "WORLD_SIZE=2"),
        ("WORLD_SIZE=two RANK=0 LOCAL_RANK=0 MASTER_ADDR=a MASTER_PORT=1", "WORLD_SIZE=two"),
        ("SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0", "unset SLURM_STEP_NUM_TASKS"),
        ("OMPI_COMM_WORLD_SIZE=4", "OMPI_COMM_WORLD_SIZE=4"),
        ("SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1", ""),  # sbatch without srun
        ("SLURM_STEP_NUM_TASKS=4 WORLD_SIZE=1 RANK=0", ""),
        ("WORLD_SIZE= MASTER_ADDR=a", ""),
    ],
)
def test_half_a_launch_is_refused(monkeypatch, env, named):
    """Guards against processes that each train the whole run, in the same folder."""
    for name in (*distributed.TORCHRUN, *distributed.TASK_COUNTS):
        monkeypatch.delenv(name, raising=False)
    for name, value in (pair.split("=") for pair in env.split()):
        monkeypatch.setenv(name, value)
    assert not distributed._launched()
    if not named:
        assert Distributed.from_env() == Distributed()
        return
    with pytest.raises(UserError, match=named) as e:
        Distributed.from_env()
    assert str(e.value).count("\n") == 1


def test_one_device_is_refused_for_several_processes():
    """Guards against an unclear out-of-memory error of several processes on one GPU."""
    with pytest.raises(UserError, match="its own GPU"):
        Distributed(1, 2).device("cuda:1")
    assert (
        Distributed(1, 2).device("auto") == Distributed(1, 2).device("cpu") == torch.device("cpu")
    )
