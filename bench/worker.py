"""Another Python at work, asked by JSON lines, and our weights in the form that GPT-2 has there."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from torch import Tensor

from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError


class Worker:
    """A script of bench/ under a Python of its own; it waits for lines on stdin and answers each.

    python, flag: that Python and the option it came by. needs: what it has to have. UserError where
    it cannot be run or ends.
    """

    def __init__(self, script: str, python: str, flag: str, needs: str) -> None:
        self.flag, self.needs = flag, needs
        # absolute, since it begins elsewhere; not resolved, or a venv's link would leave the venv
        python = os.path.abspath(python) if os.sep in python else python
        self.stderr = tempfile.TemporaryFile("w+")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        try:
            self.process = subprocess.Popen(
                [python, "-I", str(Path(__file__).with_name(script))],  # -I: nothing of ours
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                text=True,
                cwd=tempfile.gettempdir(),  # Hugging Face's `kernels`, not ours
                env=os.environ | offline,
            )
        except OSError as e:
            raise UserError(
                f"{flag} {python} cannot be run: {e.strerror}.\n"
                f"Give the bin/python of a venv with {needs}."
            ) from None

    def tell(self, message: Any) -> None:
        """Without waiting for the answer."""
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._ended() from None

    def hear(self) -> Any:
        try:
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):  # it is gone, or does not speak JSON
            raise self._ended() from None

    def ask(self, message: Any) -> Any:
        self.tell(message)
        return self.hear()

    def end(self) -> None:
        self.process.kill()
        self.process.wait()

    def _ended(self) -> UserError:
        self.end()
        self.stderr.seek(0)
        said = self.stderr.read().strip() or "no error message (out of memory?)"
        return UserError(
            f"{Path(self.process.args[-1]).stem} ended: {said.splitlines()[-1][:200]}\n"
            f"{self.flag} has to be a Python with {self.needs}."
        )


def check_released(clone: str | None, python: str | None) -> None:
    """UserError where --released and --released_python do not go together or hold no such thing."""
    if (clone is None) != (python is None):
        raise UserError(
            "--released and --released_python go together.\n"
            "Give a clone of facebookresearch/coconut and a Python that has what it needs."
        )
    if clone and not (Path(clone) / "coconut.py").is_file():
        raise UserError(
            f"--released {clone} holds no coconut.py.\nGive a clone of facebookresearch/coconut."
        )


def commit_of(clone: str) -> str:
    """The clone's commit, and whether its coconut.py is that commit's."""

    def git(*args: str) -> str:
        run = subprocess.run(["git", "-C", clone, *args], capture_output=True, text=True)
        return run.stdout.strip()

    try:
        committed = git("rev-parse", "HEAD:./coconut.py")
        changed = "" if git("hash-object", "coconut.py") == committed else "-dirty"
        return git("rev-parse", "HEAD") + changed if committed else "unknown"
    except OSError:
        return "unknown"


def as_gpt2(model: GPT, dropout: float = 0.0) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of transformers' GPT2Config, and the weights of its `transformer`."""
    c = model.config
    settings = {
        "vocab_size": c.vocab_size,
        "n_positions": c.block_size,
        "n_layer": c.n_layer,
        "n_head": c.n_head,
        "n_embd": c.n_embd,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    }
    weights = {  # its linear layers are stored transposed
        name: p.t().contiguous() if name.startswith("h.") and p.dim() == 2 else p.contiguous()
        for name, p in model.state_dict().items()
    }
    return settings, weights
