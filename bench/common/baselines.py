"""The providers that are timed: our engine, and other implementations in processes of their own."""

import atexit
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.common.results import OURS
from bench.common.workload import Workload
from nanococonut.inference.engine import Engine, Request
from nanococonut.model import GPT
from nanococonut.runtime.errors import UserError
from nanococonut.weights.pretrained import CONFIG_KEYS, CONV1D_WEIGHTS

WORKER = Path(__file__).with_name("worker.py")
OPENMP = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # set by nanococonut/__init__.py
N_PROMPT = 48  # length of the prompt on which all providers must agree
N_CHECKED = 9  # greedy tokens that are compared
# tokens, and the seconds of prefill, latent_step, first_token, token_step and answer. first_token
# and answer are measured from the start of the request.
Timing = dict[str, Any]


class EngineProvider:
    """Our engine with a choice of kernels and CUDA graphs."""

    versions: dict[str, str] | None = None  # those of this process

    def __init__(self, name: str, workload: Workload, kernels: str, graph: str) -> None:
        self.name = name
        self.engine = Engine(workload.model, kernels=kernels, graph=graph)

    def generate(self, request: Request) -> Timing:
        out = self.engine.run(request)
        return {
            "tokens": out.tokens,
            "prefill": out.seconds_prefill,
            "latent_step": out.seconds_thoughts / max(1, request.n_thoughts),
            "first_token": out.seconds_first,
            "token_step": out.seconds_decode / max(1, request.max_new_tokens - 1),
            "answer": out.seconds,
        }


class Worker:
    """worker.py under another Python. Requests and replies are JSON lines.

    name     a kind of worker.py
    model    the worker builds the same GPT-2: sizes, dropout, weights, device and dtype
    special  name in SPECIAL -> token id
    clone    folder of the released code, for the kinds that run it
    extra    further setup of this kind

    Every method raises UserError if the process has ended.
    """

    def __init__(
        self,
        name: str,
        python: str,
        model: GPT,
        special: dict[str, int],
        clone: str | None = None,
        **extra: Any,
    ) -> None:
        self.name, self.model = name, model
        # absolute, since it starts in another folder; not resolved, since a venv's python is a link
        python = os.path.abspath(python) if os.sep in python else python
        self.stderr = tempfile.TemporaryFile("w+")
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        # without our OpenMP settings: users of other implementations run with the defaults
        env = {k: v for k, v in os.environ.items() if k not in OPENMP} | offline
        try:
            self.process = subprocess.Popen(
                [python, "-I", str(WORKER)],  # -I: our packages are not on its path
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                text=True,
                cwd=tempfile.gettempdir(),  # so that `kernels` is Hugging Face's, not ours
                env=env,
                start_new_session=True,  # close() also kills its children
            )
        except OSError as e:
            raise UserError(
                f"{python} cannot be run: {e.strerror}.\n"
                "Give the bin/python of a venv with torch and transformers 4.46.2."
            ) from None
        c = model.config
        sizes = {key: getattr(c, field) for field, key in CONFIG_KEYS.items()}
        sizes |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), c.dropout)
        weights = {
            name: (p.t() if name.endswith(CONV1D_WEIGHTS) else p).contiguous()
            for name, p in model.state_dict().items()
        }
        atexit.register(self.close)  # a worker left running would slow down later measurements
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/model.safetensors"
            save_file(weights, path)
            setup = {
                "kind": name,
                "gpt2": sizes | {"vocab_size": c.vocab_size},
                "weights": path,
                "special": special,
                "threads": torch.get_num_threads(),
                "device": model.wte.weight.device.type,
                "clone": clone and os.path.abspath(clone),
            }
            self.versions: dict[str, str] = self.request(setup | extra)["versions"]
        if clone:
            git = ["git", "-C", clone, "describe", "--always", "--dirty", "--exclude=*"]
            commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
            self.versions["coconut"] = commit or "unknown"

    def request(self, message: Any) -> Any:
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
            reply = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):  # the process has ended, or does not write JSON
            self.close()
            self.stderr.seek(0)
            text = self.stderr.read().strip() or "no error message (out of memory?)"
            raise UserError(f"worker {self.name} ended: {text.splitlines()[-1][:200]}") from None
        if "out_of_memory" in reply:
            raise torch.OutOfMemoryError(f"worker {self.name} ran out of memory")
        time.sleep(0.05)  # its OpenMP threads still spin and would slow down the next provider
        return reply

    def generate(self, request: Request) -> Timing:
        """Return tokens and times of a request, computed in our model's current dtype."""
        dtype = str(self.model.wte.weight.dtype).removeprefix("torch.")
        return self.request(asdict(request) | {"dtype": dtype})

    def close(self) -> None:
        if self.process.returncode is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


Provider = EngineProvider | Worker


def check_released(clone: str | None, python: str | None) -> None:
    """Raise UserError if --released and --released_python do not go together."""
    if (clone is None) != (python is None):
        raise UserError("--released and --released_python go together.\nGive a clone and a Python.")
    if clone and not (Path(clone) / "coconut.py").is_file():
        raise UserError(
            f"--released {clone} has no coconut.py.\nGive a clone of facebookresearch/coconut."
        )


def start(workload: Workload, options: Any) -> tuple[list[Provider], dict[str, str]]:
    """Return (providers, missing provider -> reason). The first is our engine with its defaults.

    A provider is not timed if its greedy tokens after thoughts differ from those of our plain eager
    steps. Raise UserError if this provider is one of ours. options: LatencyConfig.
    """
    ours = EngineProvider(OURS, workload, "auto", "auto")
    eager = EngineProvider(f"{OURS}, eager", workload, "torch", "off")
    providers: list[Provider] = [ours]
    if ours.engine.kernels != "torch" or ours.engine.graph:
        providers.append(eager)
    if workload.device.type == "cuda" and ours.engine.kernels != "torch":
        providers.append(EngineProvider(f"{OURS}, torch graph", workload, "torch", "on"))
    missing: dict[str, str] = {}
    if ours.engine.kernels == "c":
        providers.append(EngineProvider(f"{OURS}, packed", workload, "packed", "off"))
    request = workload.request(workload.prompts(1, N_PROMPT, 0), "thoughts", N_CHECKED)
    expected = eager.generate(request)["tokens"]
    for provider in providers:
        if (tokens := provider.generate(request)["tokens"]) != expected:
            raise UserError(
                f"{provider.name}: expected tokens {expected[0]}, got {tokens[0]}.\n"
                "This is a bug in nanococonut; nothing was timed."
            )

    here = sys.executable if importlib.util.find_spec("transformers") else None
    peers = (  # name, Python, clone, how to get it
        ("released", options.released_python, options.released,
         "give --released and --released_python"),
        ("transformers", here, None, "pip install transformers"),
    )  # fmt: skip
    for name, python, clone, advice in peers:
        if not options.peers or not python:
            missing[name] = advice if options.peers else "not requested"
            continue
        try:
            worker = Worker(name, python, workload.model, workload.special, clone)
            if (tokens := worker.generate(request)["tokens"]) != expected:
                worker.close()
                raise UserError(f"not timed, expected tokens {expected[0]}, got {tokens[0]}")
            providers.append(worker)
        except UserError as e:
            missing[name] = str(e).replace("\n", " ")
    return providers, missing
