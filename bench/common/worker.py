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
NEEDS = {  # provider -> the option that names its Python, and the packages that Python must have
    "released": ("--released_python", "torch and transformers 4.46.2"),
    "transformers": ("--transformers_python", "torch and transformers 5"),
}


class Worker:
    """Another implementation in its own process, which answers requests, a JSON line each.

    name     a provider of NEEDS
    setup    of worker_setup, and what else this kind needs

    Every method raises UserError if the process ends early.
    """

    def __init__(self, name: str, python: str, setup: dict[str, Any]) -> None:
        self.name, (self.flag, self.needs) = name, NEEDS[name]
        self.max_batch = 1 if name == "released" else None  # its generate takes one question
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
                f"{self.flag} {python} cannot be run: {e.strerror}.\n"
                f"Give the bin/python of a venv with {self.needs}."
            ) from None
        self.versions: dict[str, str] = self.request(setup)["versions"]

    def request(self, message: Any) -> Any:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):  # it has ended, or does not write JSON
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

    def generate(self, *request: Any) -> Any:
        """Generate as EngineProvider does, from the same arguments."""
        names = ("prompts", "n_thoughts", "forced_tokens", "n_tokens")
        return self.request(dict(zip(names, request, strict=True)))

    def cast(self, dtype: torch.dtype) -> None:
        self.request({"dtype": str(dtype).removeprefix("torch.")})

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
