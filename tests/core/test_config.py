"""Settings from config files and flags; an error names the bad setting."""

import re

import pytest

from nanococonut.config import TrainConfig
from nanococonut.runtime.cli import format_config, make_config, parse_cli, read_config_file
from nanococonut.runtime.errors import UserError


def refused(fn, *words):
    """Assert that fn() raises a UserError of at most two lines that contains these words."""
    with pytest.raises(UserError) as e:
        fn()
    text = str(e.value)
    assert text.count("\n") <= 1, text
    for word in words:
        assert word in text, text


def cli(*argv):
    overrides, path = parse_cli(TrainConfig, argv, "", config_file=True)
    return make_config(TrainConfig, overrides), path


def write_config(tmp_path, text):
    path = tmp_path / "mine.py"
    path.write_text(text)
    return path


def test_cli_spellings_and_bare_flags():
    """--key=value, --key value, --resume for True, None as a value."""
    config, path = cli(
        "config/x.py", "--learning_rate=3e-4", "--n_layer", "3", "--resume", "--fallback=None"
    )
    assert path == "config/x.py"
    assert (config.learning_rate, config.n_layer, config.resume) == (3e-4, 3, True)
    assert config.fallback is None
    assert cli("--resume=False")[0].resume is False


def test_command_line_overrides_config_file(tmp_path):
    """Guards against defaults that override the config file."""
    path = write_config(
        tmp_path, '"""why"""\nn_layer = 3  # because\nlearning_rate = 0.5\ndata = None\n'
    )
    values = read_config_file(path, TrainConfig)
    assert values == {"n_layer": 3, "learning_rate": 0.5, "data": None}
    overrides, _ = parse_cli(TrainConfig, ["--n_layer=4"], "", config_file=True)
    config = make_config(TrainConfig, values, overrides)
    assert (config.n_layer, config.learning_rate) == (4, 0.5)


def test_config_file_saved_by_notepad_is_read(tmp_path):
    """Guards against an error for a byte order mark or CRLF line endings."""
    (tmp_path / "mine.py").write_bytes(b"\xef\xbb\xbfn_layer = 3\r\nn_head = 3\r\n")
    assert read_config_file(tmp_path / "mine.py", TrainConfig) == {"n_layer": 3, "n_head": 3}


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--n_layr=3"], ["--n_layr", "Did you mean --n_layer?"]),
        (["--n_layer=three"], ["--n_layer='three'", "'three'", "an integer"]),
        (["--n_layer=3.5"], ["n_layer", "3.5", "an integer"]),
        (["--n_layer"], ["--n_layer", "expected one argument"]),
        (["--n_layer=0"], ["--n_layer=0", "at least 1"]),
        (["--dropout=1"], ["dropout=1", "less than 1"]),
        (["--learning_rate=0"], ["learning_rate=0", "more than 0"]),
        (["--learning_rate=nan"], ["learning_rate", "number"]),
        (["--lr=3e-4"], ["--lr", "Did you mean --learning_rate?"]),
        (["--max_steps=-1"], ["max_steps=-1", "at least 0"]),
        (["--resume=perhaps"], ["resume", "True or False"]),
        (["--method=coconot"], ["--method='coconot'", "Did you mean coconut?", "no_cot"]),
        (["--n_embd=10", "--n_head=3"], ["n_embd=10", "n_head=3", "multiple"]),
        (["--min_hops=7"], ["min_hops=7", "max_hops=6"]),
        (["--render=compact"], ["compact", "--tokenizer=words"]),
        (["--thought_labels=path"], ["thought_labels", "--render=compact", "=none"]),
        (["--task=gsm8k", "--thought_labels=frontier"], ["frontier", "gsm8k", "=path"]),
        (["--grow_epochs=2"], ["grow_epochs", "--regenerate_each_epoch"]),
        (["--resume=1"], ["resume='1'", "True or False"]),
        (["--n_layer=True"], ["n_layer=True", "an integer"]),
        (["--n_layer=None"], ["n_layer", "an integer"]),
        (["--n-layer=3"], ["--n-layer", "Did you mean --n_layer?"]),
        (["a.py", "b.py"], ["b.py"]),
        (["--compile=False"], ["--compile", "Did you mean --kernels?"]),  # as in nanoGPT
        (["--init_from=resume"], ["init_from", "--resume"]),
    ],
)
def test_bad_setting_is_refused(argv, words):
    """Guards against a training run with a typo or a value out of range."""
    refused(lambda: cli(*argv), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_layer = 2\n\nn_layerz = 3\n", ["line 3", "n_layerz", "Did you mean n_layer?"]),
        ("n_layer = 2 * 3\n", ["line 1", "n_layer", "not a literal"]),
        ("n_layer = open('x')\n", ["line 1", "not a literal"]),
        ("import os\n", ["line 1", "only assignments"]),
        ("n_layer, n_head = 2, 2\n", ["line 1", "only assignments"]),
        ("n_layer = = 2\n", ["line 1", "not a config file"]),
        ("a\0b", ["not a config file"]),
    ],
)
def test_bad_config_file_is_refused(tmp_path, text, words):
    """The error names the file and line; no code in the file is executed."""
    path = write_config(tmp_path, text)
    refused(lambda: read_config_file(path, TrainConfig), str(path), *words)


def test_unreadable_config_file_is_refused(tmp_path):
    """Guards against a traceback for a missing file, a Latin-1 file or a folder."""
    write_config(tmp_path, "")
    refused(
        lambda: read_config_file(tmp_path / "mien.py", TrainConfig),
        "does not exist",
        "mine.py?",
    )
    refused(lambda: read_config_file("nowhere/x.py", TrainConfig), "nowhere/x.py", "does not exist")
    (tmp_path / "latin.py").write_bytes(b"# caf\xe9\n")
    refused(lambda: read_config_file(tmp_path / "latin.py", TrainConfig), "UTF-8")
    refused(lambda: read_config_file(tmp_path, TrainConfig), "is a folder")


def test_help_is_grouped_and_complete(capsys):
    """--help lists every setting in its group, at 100 columns."""
    with pytest.raises(SystemExit) as e:
        cli("--help")
    assert e.value.code == 0
    text = capsys.readouterr().out
    for group in ("data:", "model:", "curriculum:", "optimizer:", "run:"):
        assert group in text
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name} " in text
    assert max(map(len, text.splitlines())) <= 100


def test_min_hops_is_checked_for_prosqa_only():
    """Guards against an error for ProntoQA, which has no min_hops."""
    assert cli("--task=prontoqa", "--max_hops=2")[0].max_hops == 2
    refused(lambda: cli("--max_hops=2"), "min_hops=3", "max_hops=2")


def test_format_config_shows_what_differs():
    """Guards against a log of all sixty settings, which hides the changed ones."""
    assert "=" not in format_config(TrainConfig())
    changed = dict(n_layer=2, n_head=2, n_embd=64, seed=1, tokenizer="words", out_dir="out/a-b")
    changed |= dict(valid_data="v" * 90)  # longer than a line, but not broken
    lines = format_config(TrainConfig(**changed)).splitlines()
    assert sorted(re.findall(r"(\w+)=", " ".join(lines))) == sorted(changed)
    assert [len(line) <= 80 for line in lines].count(False) == 1
