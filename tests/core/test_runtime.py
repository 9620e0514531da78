"""Scripts handle closed output, signals and python -OO as users expect."""

import io
import os
import signal
import sys
import threading

import pytest
from rich.console import Console

from nanococonut.config import TrainConfig
from nanococonut.runtime.cli import parse_cli
from nanococonut.runtime.device import HANGUP, Interrupt
from nanococonut.runtime.errors import UserError, run_main


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return open(writing, "w", encoding="utf-8")


def full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    return open("/dev/full", "w", encoding="utf-8")


def prints(done):
    """Return a main() that prints as scripts do and appends to `done` at its end."""

    def main():
        Console().print("[bold]a table")
        print("a line" * 10_000, flush=True)
        done.append(True)

    return main


@pytest.mark.parametrize("stream", [closed_pipe, full_disk])
def test_script_goes_on_without_stdout(monkeypatch, stream):
    """Guards against a silent end with `| head`, by rich, and a traceback for a full disk."""
    done = []
    with stream() as out:
        monkeypatch.setattr(sys, "stdout", out)
        run_main(prints(done), goes_on=True)
        assert done and sys.stdout is out


@pytest.mark.parametrize(("stream", "code"), [(closed_pipe, 141), (full_disk, 2)])
def test_script_ends_with_its_stdout(monkeypatch, capsys, stream, code):
    """Guards against rich's exit code 1 instead of 141, and a traceback or 120 for a full disk."""
    done = []
    with stream() as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as end:
            run_main(prints(done))
        assert end.value.code == code and not done
        monkeypatch.undo()
    err = capsys.readouterr().err
    assert (err.startswith("error: the output cannot be written"), err.count("\n")) == (
        (True, 2) if code == 2 else (False, 0)
    )


def test_last_line_to_a_full_disk_is_an_error(monkeypatch, capsys):
    """Guards against a lost error: a short output is only written when Python exits."""
    with full_disk() as out:
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit) as end:
            run_main(lambda: print("short"))
        assert end.value.code == 2


def test_error_of_a_script_survives_its_stdout(monkeypatch):
    """Guards against exit code 1 or 120, which mean a bug, if the output is full, too."""
    with full_disk() as out, full_disk() as err:
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)

        def main():
            print("short")
            raise UserError("what is wrong.\nWhat to do.")

        with pytest.raises(SystemExit) as end:
            run_main(main)
        assert end.value.code == 2


def test_stdout_closed_from_the_start_is_no_error(monkeypatch):
    """Guards against an error with `>&-`, where sys.stdout is None."""
    monkeypatch.setattr(sys, "stdout", None)
    run_main(lambda: sys.stdout.write("nowhere"))
    assert sys.stdout is None


def test_encoding_without_the_character_prints(monkeypatch):
    """Guards against a traceback for a table in a Windows pipe, which encodes as cp1252."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", newline="")
    monkeypatch.setattr(sys, "stdout", out)
    run_main(lambda: print("caf\xe9 \u2501 \U0001f965 \udce9"))
    assert out.buffer.getvalue() == b"caf\xe9 ? ? ?\n"


def test_stream_of_a_notebook_prints(monkeypatch):
    """Guards against a traceback for Jupyter's stdout or io.StringIO, without reconfigure()."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    run_main(lambda: print("caf\xe9"))
    assert out.getvalue() == "caf\xe9\n"


@pytest.fixture
def handlers():
    """Restore the handlers of all signals that Interrupt may take."""
    numbers = [signal.SIGINT, signal.SIGTERM, HANGUP]
    before = {number: signal.getsignal(number) for number in numbers if number}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(HANGUP is None, reason="Windows has no SIGHUP")
def test_closed_terminal_stops_after_the_step(handlers, capsys):
    """Guards against SIGHUP ending a run without a save, even if the shell sends it twice."""
    signal.signal(HANGUP, signal.SIG_DFL)  # pytest may run under nohup
    interrupt = Interrupt()
    os.kill(os.getpid(), HANGUP)
    os.kill(os.getpid(), HANGUP)
    assert interrupt.received and interrupt.exit_code == 129
    os.kill(os.getpid(), signal.SIGTERM)  # as when a machine shuts down
    os.kill(os.getpid(), HANGUP)
    assert interrupt.exit_code == 143 and capsys.readouterr().out.count("stopping") == 1
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), signal.SIGINT)
    assert end.value.code == 130


@pytest.mark.skipif(HANGUP is None, reason="Windows has no SIGHUP")
def test_nohup_is_honoured(handlers):
    """Guards against ending a run under nohup with its terminal."""
    signal.signal(HANGUP, signal.SIG_IGN)
    interrupt = Interrupt()
    os.kill(os.getpid(), HANGUP)
    assert not interrupt.received


def test_signal_within_a_print_is_kept(handlers, monkeypatch):
    """Guards against a RuntimeError of a print in the handler, which prevented the save."""

    class Printing(io.StringIO):
        def write(self, text):
            raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    interrupt = Interrupt()
    monkeypatch.setattr(sys, "stdout", Printing())
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.received


def test_end_of_the_loop_puts_handlers_back(handlers):
    """Guards against replacing Ctrl-C in all later cells of a notebook."""
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, HANGUP) if n]
    Interrupt().close()
    assert before == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, HANGUP) if n]


def test_loop_runs_in_a_thread():
    """Guards against an error in a thread, as in Streamlit and gradio, which take no signals."""
    made = []
    thread = threading.Thread(target=lambda: made.append(Interrupt()))
    thread.start()
    thread.join()
    assert made and not made[0].received


def test_help_without_docstrings(capsys):
    """Guards against a traceback with python -OO, which removes docstrings."""
    for doc, shown in ((None, "options:"), ("What it does.\n\nMore.", "What it does.\n")):
        with pytest.raises(SystemExit):
            parse_cli(TrainConfig, ["--help"], doc)
        out = capsys.readouterr().out
        assert shown in out and "More." not in out
