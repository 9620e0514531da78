"""Every bad input ends with exit code 2 and two lines, and changes no file."""

import json
import runpy
import shutil
import sys

import pytest
from helpers import ROOT

from nanococonut.data import prosqa
from nanococonut.data.files import write_examples

TINY = dict(
    tokenizer="words", render="compact", n_nodes=10, min_hops=2, max_hops=3, n_layer=1, n_head=2,
    n_embd=16, block_size=128, train_examples=4, val_examples=2, max_latent_stage=1, epochs=2,
    epochs_per_stage=1, batch_size=4, micro_batch_size=4, max_new_tokens=2,
)  # fmt: skip
GOOD = {"question": "2+2?", "steps": ["2+2=4"], "answer": "4"}
TRAIN = ["train.py", "tiny.py"]
ACCURACY = ["bench/accuracy.py", "--n=2", "--max_new_tokens=2"]
SAMPLE = ["sample.py", "--seed=1"]
RUN = "--out_dir=run"
RESUME = [*TRAIN, RUN, "--resume"]
DATA = ["nanococonut/data/__main__.py"]
FROM = [*TRAIN, "--tokenizer=gpt2", "--render=sentences", "--block_size=512", "--init_from"]


def config(text):
    """Return the command that trains with this config file."""
    return ["train.py", "bad.py", "--max_steps=1", "--train_examples=4"], "bad.py", text


def data(text, *argv):
    """Return the command that trains on this file of examples."""
    return [*TRAIN, "--data=bad.json", *argv], "bad.json", text


def damaged(name, change, command=SAMPLE):
    """Return a command that reads a run in which change(bytes) was applied to one file."""
    return [*command], f"run/step_00000001/{name}", change


def edited_manifest(command=SAMPLE, **changes):
    """Return a command that reads a run with a changed manifest that has no digest."""

    def change(text):
        saved = json.loads(text)
        del saved["digest"]
        return json.dumps(saved | changes).encode()

    return damaged("manifest.json", change, command)


# name: argv, or (argv, file, its new text or bytes or a function of its old bytes)
CASES = {
    # config files
    "config binary": config(b"\x00\x01\xff\xfe"),
    "config UTF-16": config("n_layer = 2\n".encode("utf-16")),
    "config unclosed": config("n_layer = (2\n"),
    "config deeply nested": config("n_layer = " + "(" * 5000 + "2" + ")" * 5000),
    "config a number of 5000 digits": config("seed = " + "9" * 5000),
    "config a surrogate": config("out_dir = '\\ud800'\n"),
    "config a zero byte in a path": config("data = 'a\\0b'\n"),
    "config a list": config("n_layer = [1]\n"),
    "config an augmented assignment": config("n_layer = 1\nn_layer += 1\n"),
    "config infinite": config("learning_rate = 1e999\n"),
    "config complex": config("learning_rate = 1j\n"),
    "config annotated": config("n_layer: int = 2\n"),
    "config is a folder": ["train.py", "run"],
    "config is data": ["train.py", "good.json"],
    # settings
    "huge layers": [*TRAIN, "--n_embd=99999999998", "--n_layer=1"],
    "huge integer": [*TRAIN, "--block_size=" + "9" * 30],
    "integer of 5000 digits": [*TRAIN, "--seed=" + "9" * 5000],
    "nested value": [*TRAIN, "--n_layer=" + "(" * 999],
    "no thoughts fit": [*TRAIN, "--c_thought=200"],
    "nan dropout": [*TRAIN, "--dropout=nan"],
    "learning rate beyond float32": [*TRAIN, "--learning_rate=1e39"],
    "negative seed": [*TRAIN, "--seed=-1"],
    "empty value": [*TRAIN, "--n_layer="],
    "empty option": [*TRAIN, "--=3"],
    "zero byte in out_dir": [*TRAIN, "--out_dir=a\0b"],
    "long out_dir": [*TRAIN, "--out_dir=" + "a" * 300],
    "out_dir below a file": [*TRAIN, "--out_dir=good.json/run"],
    "device without a number": [*TRAIN, "--device=cuda:x"],
    "device meta": [*TRAIN, "--device=meta"],
    "more hops than nodes": [*TRAIN, "--n_nodes=4", "--max_hops=50"],
    "fallback missing": [*TRAIN, "--init_from=gpt2", "--fallback=none.py"],
    # files of examples
    "data truncated": data('[{"question": "2+2?", "steps": ["2+2'),
    "data a number": data("3"),
    "data null": data("null"),
    "data nested lists": data("[" * 100_000),
    "data steps a text": data(json.dumps([GOOD | {"steps": "2+2=4"}] * 9)),
    "data answer a number": data(json.dumps([GOOD | {"answer": 4}] * 9)),
    "data steps null": data(json.dumps([GOOD | {"steps": None}] * 9)),
    "data empty question": data(json.dumps([GOOD | {"question": ""}] * 9), "--render=sentences"),
    "data a surrogate": data('[{"question": "\\ud800", "steps": [], "answer": "4"}]'),
    "data UTF-16": data(json.dumps([GOOD] * 9).encode("utf-16")),
    "data a zero byte": data("\0" * 99),
    "data NaN": data('[{"question": NaN, "steps": [], "answer": "4"}]'),
    "data huge number": data("9" * 5000),
    "data special token": data(json.dumps([GOOD | {"question": "<|latent|>"}] * 9)),
    "data a folder": [*TRAIN, "--data=run"],
    "data a device": [*TRAIN, "--data=/dev/null"],
    "data a checkpoint": [*TRAIN, "--data=run/step_00000001/model.safetensors"],
    "valid_data a folder": [*TRAIN, "--valid_data=run"],
    # checkpoints
    "weights truncated": damaged("model.safetensors", lambda b: b[:-9]),
    "weights empty": damaged("model.safetensors", b""),
    "manifest empty": damaged("manifest.json", b""),
    "manifest a list": damaged("manifest.json", b"[]"),
    "manifest not UTF-8": damaged("manifest.json", b"\xff\xfe{}"),
    "manifest nested": damaged("manifest.json", b"[" * 100_000),
    "manifest another stage": damaged(
        "manifest.json", lambda b: b.replace(b'"stage": 0', b'"stage": 1')
    ),
    "manifest unknown setting": edited_manifest(config={"n_layers": 3}),
    "manifest file outside": edited_manifest(files={"../../good.json": "0"}),
    "resume with damaged moments": damaged("optimizer.safetensors", lambda b: b[:-9], RESUME),
    "resume without moments": damaged("optimizer.safetensors", b"", RESUME),
    "resume of another window": damaged(
        "manifest.json", lambda b: b.replace(b'"window"', b'"windows"'), RESUME
    ),
    "resume of no progress": edited_manifest(RESUME, files={}),
    "resume of unknown progress": edited_manifest(RESUME, progress={"steps": 1}),
    "run exists": [*TRAIN, RUN],
    "out_dir a checkpoint": [*TRAIN, "--out_dir=run/step_00000001"],
    # weights to start from
    "weights a text": [*FROM, "good.json"],
    "weights a folder without any": [*FROM, "."],
    "weights a pickle": ([*FROM, "bad.bin"], "bad.bin", b"\x80\x04cos\nsystem\n"),
    "weights without config": [*FROM, "run/step_00000001/optimizer.safetensors"],
    "weights of another vocabulary": [*FROM, "run"],
    "weights a zero byte": [*FROM, "a\0b"],
    # sample.py, bench/accuracy.py, python -m nanococonut.data
    "sample without a question": [*SAMPLE, "--question="],
    "sample a surrogate": [*SAMPLE, "--question=\udcff"],
    "sample temperature": [*SAMPLE, "--temperature=nan"],
    "sample infinite temperature": [*SAMPLE, "--temperature=inf"],
    "sample temperature beyond float32": [*SAMPLE, "--temperature=1e300"],
    "sample too many thoughts": [*SAMPLE, "--latent=99999"],
    "sample a file": [*SAMPLE, "--out_dir=good.json"],
    "sample a zero byte": [*SAMPLE, "--out_dir=a\0b"],
    "accuracy of a file": [*ACCURACY, "--checkpoint=good.json"],
    "accuracy too many thoughts": [*ACCURACY, "--latent=99999"],
    "accuracy data of another task": [*ACCURACY, "--data=prontoqa"],
    "accuracy on bad data": [*ACCURACY, "--data=tiny.py"],
    "accuracy out a folder": [*ACCURACY, "--out=run"],
    "accuracy out below a file": [*ACCURACY, "--out=good.json/x"],
    "accuracy n a fraction": [*ACCURACY, "--n=0.5"],
    "data over a file": [*DATA, "--n=2", "--out=good.json"],
    "data over a folder": [*DATA, "--n=2", "--out=run"],
    "data into no folder": [*DATA, "--n=2", "--out=none/x.json"],
    "data of one node": [*DATA, "--n=2", "--n_nodes=1", "--out=x.json"],
    "data of impossible hops": [*DATA, "--n=2", "--min_hops=9", "--max_hops=9", "--n_nodes=5"],
    "data of no task": [*DATA, "chess"],
    "data two tasks": [*DATA, "prosqa", "prontoqa"],
    "data zero byte": [*DATA, "--n=2", "--out=a\0b"],
    "data huge n": [*DATA, "--n=-5"],
}


def contents(folder):
    """Return path -> bytes of all files in a folder, except a run's lock and its holder's name."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and ".lock" not in p.name]
    return {p: p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """Return a folder with a config, a file of examples and a run of one step."""
    path = tmp_path_factory.mktemp("inputs")
    (path / "tiny.py").write_text("".join(f"{k} = {v!r}\n" for k, v in TINY.items()))
    write_examples(path / "good.json", prosqa.generate(20, 0, prosqa.GraphConfig(10, 2, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr("signal.signal", lambda *_: None)
        patch.setattr(sys, "argv", [*TRAIN, RUN, "--max_steps=1"])
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    return path


@pytest.mark.parametrize("case", CASES)
def test_bad_input_ends_in_two_lines(template, tmp_path, script, monkeypatch, case):
    """Guards against tracebacks, and against losing saved files."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # of train.py
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    argv = CASES[case]
    if isinstance(argv, tuple):
        argv, name, text = argv
        file = tmp_path / name
        text = text(file.read_bytes()) if callable(text) else text
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        if name.startswith("run"):
            argv = [*argv, RUN]
    before = contents(tmp_path)
    code, _, err = script(*argv[1:], script=argv[0])
    print(f"{case}: {err}")
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") <= 2 and len(err) < 999, err
    assert contents(tmp_path) == before
