"""workers/serve.py under another Python, and our weights in transformers' form."""

import json
import os
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError

SERVE = Path(__file__).parent.parent / "workers/serve.py"


class Worker:
    """A process that answers requests, a JSON line each. Raises UserError if it ends early.

    python, flag: its Python, and the option that named it. needs: packages it must have.
    """

    def __init__(self, name: str, python: str, flag: str, needs: str) -> None:
        self.name, self.flag, self.needs = name, flag, needs
        # absolute, since it starts elsewhere; not resolved, since a venv's link would leave it
        python = os.path.abspath(python) if os.sep in python else python
        self.stderr = tempfile.TemporaryFile("w+")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        try:
            self.process = subprocess.Popen(
                [python, "-I", str(SERVE)],  # -I: nothing of ours on its path
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                text=True,
                cwd=tempfile.gettempdir(),  # finds Hugging Face's `kernels`, not ours
                env=os.environ | offline,
                start_new_session=True,  # close() also ends what it started, such as compilers
            )
        except OSError as e:
            raise UserError(
                f"{flag} {python} cannot be run: {e.strerror}.\n"
                f"Give the bin/python of a venv with {needs}."
            ) from None

    def send(self, message: Any) -> None:
        """Send a request without waiting for the reply."""
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it has ended, and receive() says why

    def receive(self) -> Any:
        try:
            reply = json.loads(self.process.stdout.readline())
        except ValueError:  # it has ended, or does not write JSON
            self.close()
            self.stderr.seek(0)
            text = self.stderr.read().strip() or "no error message (out of memory?)"
            raise UserError(
                f"worker {self.name} ended: {text.splitlines()[-1][:200]}\n"
                f"{self.flag} has to be a Python with {self.needs}."
            ) from None
        if "out_of_memory" in reply:
            raise torch.OutOfMemoryError(f"worker {self.name} ran out of memory")
        return reply

    def request(self, message: Any) -> Any:
        self.send(message)
        return self.receive()

    def close(self) -> None:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def check_released(clone: str | None, python: str | None) -> None:
    """Raise UserError if --released and --released_python do not go together."""
    if (clone is None) != (python is None):
        raise UserError("--released and --released_python go together.\nGive a clone and a Python.")
    if clone and not (Path(clone) / "coconut.py").is_file():
        raise UserError(f"--released {clone} holds no coconut.py.\nGive a clone of the code.")


def clone_commit(clone: str) -> str:
    """Return the clone's commit, "-dirty" if it has changed."""
    git = ["git", "-C", clone, "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"


def worker_setup(
    model: GPT, tokens: Any, path: Path, clone: str | None, dropout: float = 0.0
) -> dict[str, Any]:
    """Write our weights to `path`, as transformers' GPT-2 has them. Return what a worker needs to
    build that model. tokens: has the ids eos, bot, eot and latent."""
    c = model.config
    gpt2 = {k: getattr(c, k) for k in ("vocab_size", "n_layer", "n_head", "n_embd")}
    gpt2 |= {"n_positions": c.block_size}
    gpt2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    weights = {  # its linear layers are stored transposed
        name: p.t().contiguous() if name.startswith("h.") and p.dim() == 2 else p.contiguous()
        for name, p in model.state_dict().items()
    }
    save_file(weights, path)
    return {
        "gpt2": gpt2,
        "weights": str(path),
        "special": {name: getattr(tokens, name) for name in ("eos", "bot", "eot", "latent")},
        "threads": torch.get_num_threads(),
        "device": model.wte.weight.device.type,
        "clone": str(Path(clone).resolve()) if clone else None,
    }
