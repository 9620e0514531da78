"""The settings of a training run, as a frozen dataclass.

Each field has a default, a help text, a group in --help and its allowed values. The command line
overrides the config file, which overrides the defaults. All values are checked before any work.
"""

from dataclasses import dataclass

from nanococonut.curriculum import METHODS, ignored_options
from nanococonut.runtime.cli import Options, option
from nanococonut.runtime.errors import UserError


@dataclass(frozen=True)
class TrainConfig(Options):
    """All options of train.py. The defaults: the paper's ProsQA recipe from random weights."""

    # data
    task: str = option("prosqa", "dataset", "data", choices=("prosqa", "prontoqa", "gsm8k"))
    data: str | None = option(None, "file of training examples (None: the task's data)", "data")
    valid_data: str | None = option(None, "file of validation examples", "data")
    skip_bad_rows: bool = option(False, "drop and report invalid or too long examples", "data")
    train_examples: int = option(17_886, "generated examples per epoch", "data", ge=1)
    regenerate_each_epoch: bool = option(
        False, "generate new examples every epoch, and batch examples of similar length", "data"
    )
    val_examples: int = option(300, "validation examples (file: a tenth at most)", "data", ge=1)
    n_nodes: int = option(28, "ProsQA: nodes before pruning", "data", ge=4, le=55)
    min_hops: int = option(3, "ProsQA: minimum steps to the answer", "data", ge=1)
    max_hops: int = option(
        6, "ProsQA: maximum steps to the answer; ProntoQA: steps to the property", "data", ge=1
    )
    matched_fraction: float = option(0.0, "fraction without the shortcut", "data", ge=0, le=1)
    short_fraction: float = option(0.0, "fraction with fewer steps", "data", ge=0, le=1)
    long_fraction: float = option(
        0.0, "ProsQA: fraction of max_hops - 1 or max_hops steps, no shortcut", "data", ge=0, le=1
    )
    grow_epochs: int = option(0, "first epochs with half the nodes and steps", "data", ge=0)
    render: str = option(
        "sentences", "format of ProsQA and ProntoQA", "data", choices=("sentences", "compact")
    )
    # model
    init_from: str = option("scratch", "scratch, gpt2, gpt2-medium, -large, -xl or a path", "model")
    fallback: str | None = option(None, "config to use if weights or GPU are missing", "model")
    tokenizer: str = option("gpt2", "vocabulary", "model", choices=("gpt2", "words"))
    n_layer: int = option(12, "layers", "model", ge=1)
    n_head: int = option(12, "attention heads", "model", ge=1)
    n_embd: int = option(768, "embedding dimension", "model", ge=1)
    block_size: int = option(1024, "maximum sequence length", "model", ge=8)
    dropout: float = option(0.1, "dropout", "model", ge=0, lt=1)
    smear: bool = option(False, "add W x_(t-1) to each input embedding x_t", "model")
    train_positions: bool = option(
        True, "train the position embeddings (scratch with smear: they start at 0)", "model"
    )
    # curriculum
    method: str = option("coconut", "training method", "curriculum", choices=tuple(METHODS))
    c_thought: int = option(1, "thoughts per dropped step", "curriculum", ge=0, le=100)
    max_latent_stage: int = option(6, "last numbered stage", "curriculum", ge=0, le=100)
    pad_latent_to_max: bool = option(
        True, "final stage: same number of thoughts for all examples", "curriculum"
    )
    final_thoughts: int | None = option(
        None, "thoughts in the final stage (None: c_thought * max_latent_stage)", "curriculum",
        ge=0, le=10_000,
    )  # fmt: skip
    uniform_prob: float = option(
        0.0, "probability that an example gets a random stage", "curriculum", ge=0, le=1
    )
    epochs: int = option(50, "total epochs", "curriculum", ge=1)
    epochs_per_stage: int = option(5, "epochs per stage", "curriculum", ge=1)
    first_stage_epochs: int | None = option(
        None, "epochs of stage 0 (None: epochs_per_stage; 0: skip it)", "curriculum", ge=0
    )
    advance_at: float = option(
        0.0, "next stage at this fraction of exact matches (0: off)", "curriculum", ge=0, le=1
    )
    icot_tokens: float = option(8.0, "icot: tokens dropped per epoch", "curriculum", gt=0)
    soft_temperature: float = option(1.0, "soft_thought: temperature", "curriculum", gt=0)
    soft_top_k: int = option(0, "soft_thought: tokens to average (0: all)", "curriculum", ge=0)
    thought_labels: str = option(
        "none", "labels of thought k (path: node of step k; frontier: nodes k steps away)",
        "curriculum", choices=("none", "path", "frontier"),
    )  # fmt: skip
    stop: str = option(
        "constant", "what ends the thoughts at inference (constant: a fixed number)", "curriculum",
        choices=("constant", "classifier"),
    )  # fmt: skip
    # optimizer
    batch_size: int = option(128, "examples per optimizer step", "optimizer", ge=1)
    micro_batch_size: int = option(
        32, "examples per forward pass (changes rounding and dropout masks)", "optimizer", ge=1
    )
    learning_rate: float = option(1e-4, "AdamW's learning rate", "optimizer", gt=0)
    muon_learning_rate: float = option(0.0, "Muon's learning rate (0: no Muon)", "optimizer", ge=0)
    grad_clip: float = option(0.0, "maximum gradient norm (0: off)", "optimizer", ge=0)
    warmup_steps: int = option(0, "steps of linear warm-up", "optimizer", ge=0)
    decay_fraction: float = option(
        0.0, "final fraction of steps, with decay to 0", "optimizer", ge=0, le=1
    )
    reset_optimizer: str = option(
        "stage", "when to reset the optimizer", "optimizer", choices=("stage", "epoch", "never")
    )
    # run
    seed: int = option(0, "seed of data, weights, dropout and stages", ge=0, le=2**32 - 1)
    out_dir: str | None = option(None, "output directory (None: out/<name of the config>)")
    resume: bool = option(False, "continue the run in out_dir")
    max_steps: int = option(0, "stop after this many steps (0: at the end of the schedule)", ge=0)
    save_interval: int = option(200, "steps between checkpoints", ge=1)
    eval_interval: int = option(0, "final stage: steps between validations (0: at its end)", ge=0)
    max_new_tokens: int = option(128, "maximum length of a generated answer", ge=1)
    tensorboard: bool = option(False, "also write TensorBoard event files to out_dir")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto", "dtype of the forward pass (auto: bfloat16 autocast on a GPU)",
        choices=("auto", "float32", "tf32", "bfloat16"),
    )  # fmt: skip
    kernels: str = option(
        "auto", "backend (auto: without dropout, triton on a GPU and c on a CPU)",
        choices=("auto", "triton", "c", "torch"),
    )  # fmt: skip
    graph: str = option("auto", "replay steps as CUDA graphs", choices=("auto", "on", "off"))

    def validate(self) -> None:
        is_compact = self.render == "compact"
        problems = {  # message: whether it applies
            "init_from='resume' is not a path of weights.\n"
            "Continue a run with --resume and its --out_dir.": self.init_from == "resume",
            f"n_embd={self.n_embd} is not a multiple of n_head={self.n_head}.\n"
            "Choose n_embd as a multiple of n_head.": self.n_embd % self.n_head,
            f"min_hops={self.min_hops} is greater than max_hops={self.max_hops}.\n"
            "Swap them.": self.task == "prosqa" and self.min_hops > self.max_hops,
            f"matched_fraction={self.matched_fraction}, short_fraction={self.short_fraction} and "
            f"long_fraction={self.long_fraction} add up to more than 1.\nLower one of them.": (
                self.matched_fraction + self.short_fraction + self.long_fraction > 1
            ),
            "grow_epochs needs new examples every epoch, since their size changes.\n"
            "Use --regenerate_each_epoch, or --grow_epochs=0.": (
                self.grow_epochs and not self.regenerate_each_epoch
            ),
            "render='compact' does not work for gsm8k, whose examples are free text.\n"
            "Use --render=sentences.": is_compact and self.task == "gsm8k",
            f"thought_labels='frontier' does not work for {self.task}, which has no graphs.\n"
            "Use --thought_labels=path.": (
                self.thought_labels == "frontier" and self.task != "prosqa"
            ),
            "thought_labels needs compact steps, whose last token is the node they reach.\n"
            "Use --render=compact (with --tokenizer=words), or --thought_labels=none.": (
                self.thought_loss and not is_compact
            ),
            "render='compact' needs a word-level tokenizer, not tokenizer='gpt2'.\n"
            "Use --render=sentences or --tokenizer=words.": is_compact and self.tokenizer == "gpt2",
        }
        for message, applies in problems.items():
            if applies:
                raise UserError(message)

    @property
    def unused(self) -> set[str]:
        """Return the options that have no effect with this method and data."""
        names = ignored_options(METHODS[self.method])
        from_hub = not self.data and self.task == "gsm8k"
        if self.valid_data or from_hub:
            names |= {"val_examples"}
        if self.data or from_hub:  # nothing is generated
            names |= {"train_examples", "grow_epochs", "n_nodes", "min_hops", "max_hops"}
            names |= {"matched_fraction", "short_fraction", "long_fraction"}
        if self.init_from != "scratch":  # the weights have their own
            names |= {"n_layer", "n_head", "n_embd"}
        if self.task == "prontoqa":  # its examples have max_hops steps
            names |= {"n_nodes", "min_hops", "long_fraction"}
        return names

    @property
    def thought_loss(self) -> float:
        """Return the weight of the loss on thought labels: 1, or 0 if there are none."""
        return float(self.thought_labels != "none")
