"""Settings: frozen dataclasses, plain files of literal assignments, --key=value on top.

A field's metadata carries its help text, its group in --help, and what values are allowed; all of
it is checked before any work. Precedence: the dataclass's default, then the config file, then the
command line.
"""

from dataclasses import dataclass

from nanococonut.curriculum import METHODS
from nanococonut.runtime.cli import option, validate
from nanococonut.runtime.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Everything train.py can be told. The defaults are the paper's ProsQA recipe."""

    # data
    task: str = option(
        "prosqa", "what the rows are", "data", choices=("prosqa", "prontoqa", "gsm8k")
    )
    data: str | None = option(None, "train on this file of rows instead of the task's own", "data")
    valid_data: str | None = option(None, "validate on this file of rows", "data")
    hub_revision: str = option(
        "main", "GSM8k: commit, tag or branch of the rows' copy on the hub", "data"
    )
    skip_bad_rows: bool = option(
        False, "leave out rows of files that are bad or too long, and say so", "data"
    )
    train_examples: int = option(17_886, "generated rows in an epoch", "data", ge=1)
    regenerate_each_epoch: bool = option(
        False, "generate new rows for every epoch, and batch rows of like length", "data"
    )
    val_examples: int = option(300, "generated validation rows", "data", ge=1)
    n_nodes: int = option(28, "ProsQA: nodes before pruning", "data", ge=4, le=55)
    min_hops: int = option(3, "ProsQA: fewest steps to the answer", "data", ge=1)
    max_hops: int = option(
        6, "ProsQA: most steps to the answer; ProntoQA: steps to the concept with the property",
        "data", ge=1,
    )  # fmt: skip
    matched_fraction: float = option(
        0.0, "share of training rows without the depth shortcut", "data", ge=0, le=1
    )
    short_fraction: float = option(
        0.0, "share of training rows with chains of 1 .. min_hops - 1 steps", "data",
        ge=0, le=1,
    )  # fmt: skip
    render: str = option(
        "sentences", "how ProsQA and ProntoQA are written", "data", choices=("sentences", "compact")
    )
    # model
    init_from: str = option(
        "scratch", "scratch, gpt2, gpt2-medium, -large, -xl, or a folder, run or file of weights",
        "model",
    )  # fmt: skip
    fallback: str | None = option(
        None, "config trained instead where the weights or a GPU for them are missing", "model"
    )
    tokenizer: str = option("gpt2", "vocabulary", "model", choices=("gpt2", "words"))
    n_layer: int = option(12, "layers", "model", ge=1)
    n_head: int = option(12, "attention heads", "model", ge=1)
    n_embd: int = option(768, "width", "model", ge=1)
    block_size: int = option(1024, "longest sequence", "model", ge=8)
    dropout: float = option(0.1, "dropout", "model", ge=0, lt=1)
    smear: bool = option(False, "add W times the previous input embedding", "model")
    wte_init_std: float = option(0.02, "token embeddings' first std", "model", ge=0)
    # curriculum
    method: str = option("coconut", "training method", "curriculum", choices=tuple(METHODS))
    c_thought: int = option(1, "thoughts for each dropped step", "curriculum", ge=0)
    max_latent_stage: int = option(6, "last numbered stage", "curriculum", ge=0, le=100)
    pad_latent_to_max: bool = option(
        True, "final stage: the same thoughts for rows with fewer steps", "curriculum"
    )
    final_thoughts: int | None = option(
        None, "thoughts in the final stage (None: c_thought * max_latent_stage)", "curriculum",
        ge=0,
    )  # fmt: skip
    uniform_prob: float = option(
        0.0, "chance that a row draws its own stage: from 0 to its number of steps, or, with "
        "advance_at, to the curriculum's stage", "curriculum", ge=0, le=1,
    )  # fmt: skip
    epochs: int = option(50, "epochs in all", "curriculum", ge=1)
    epochs_per_stage: int = option(5, "epochs of a stage", "curriculum", ge=1)
    first_stage_epochs: int | None = option(
        None, "epochs of stage 0 (None: as the others; 0: skip it)", "curriculum", ge=0
    )
    advance_at: float = option(
        0.0, "move on when this share of recent rows is all right (0: off)", "curriculum",
        ge=0, le=1,
    )  # fmt: skip
    icot_tokens: float = option(
        8.0, "icot: chain tokens removed by every epoch (may be a fraction)", "curriculum", gt=0
    )
    soft_temperature: float = option(
        1.0, "soft_thought: temperature of the mean over tokens", "curriculum", gt=0
    )
    soft_top_k: int = option(0, "soft_thought: tokens in the mean (0: all)", "curriculum", ge=0)
    stop: str = option(
        "constant", "how many thoughts when asked: the stage's, or as a classifier trained on the "
        "hidden states says", "curriculum", choices=("constant", "classifier"),
    )  # fmt: skip
    # optimizer
    batch_size: int = option(128, "rows of an optimizer step", "optimizer", ge=1)
    micro_batch_size: int = option(32, "rows of a forward pass", "optimizer", ge=1)
    learning_rate: float = option(1e-4, "AdamW's rate", "optimizer", gt=0, alias="lr")
    muon_learning_rate: float = option(
        0.0, "Muon's rate for the layers' matrices (0: AdamW trains all)", "optimizer", ge=0
    )
    beta2: float = option(0.999, "AdamW's second beta", "optimizer", ge=0, lt=1)
    grad_clip: float = option(0.0, "clip the gradient's norm (0: off)", "optimizer", ge=0)
    warmup_steps: int = option(0, "steps of linear warm-up", "optimizer", ge=0)
    decay_fraction: float = option(
        0.0, "last share of all steps, in which the rate falls to 0", "optimizer",
        ge=0, le=1,
    )  # fmt: skip
    reset_optimizer: str = option(
        "stage", "when AdamW's moments are forgotten", "optimizer",
        choices=("stage", "epoch", "never"),
    )  # fmt: skip
    # run
    seed: int = option(0, "of rows, weights, dropout and draws", ge=0, le=2**32 - 1)
    out_dir: str | None = option(None, "where the run is kept (None: out/<config's name>)")
    resume: bool = option(False, "go on with the run in out_dir")
    max_steps: int = option(0, "stop after this many steps (0: at the schedule's end)", ge=0)
    save_interval: int = option(200, "steps between checkpoints", ge=1)
    eval_interval: int = option(
        0, "steps between validations in the final stage (0: at stage ends only)", ge=0
    )
    max_new_tokens: int = option(128, "longest generated answer", ge=1)
    tensorboard: bool = option(False, "also write TensorBoard event files to out_dir")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = option(
        "auto", "forward pass: bfloat16 autocast, or float32, or that with tf32 products on a GPU "
        "(auto: bfloat16 on a GPU)", choices=("auto", "float32", "tf32", "bfloat16"),
    )  # fmt: skip
    recompute_mlp: bool = option(False, "make the MLPs anew in backward: less memory, more time")
    kernels: str = option(
        "auto", "thoughts' attention over the prefix and the head's loss by Triton or plain torch "
        "(auto: Triton on a GPU without dropout)",
        choices=("auto", "triton", "torch"),
    )  # fmt: skip
    graph: str = option(
        "auto", "forward and backward by CUDA graphs", choices=("auto", "on", "off")
    )

    def __post_init__(self) -> None:
        validate(self)
        if self.n_embd % self.n_head:
            raise UserError(
                f"n_embd={self.n_embd} does not divide into n_head={self.n_head} heads.\n"
                "Choose n_embd as a multiple of n_head."
            )
        if self.task == "prosqa" and self.min_hops > self.max_hops:
            raise UserError(
                f"min_hops={self.min_hops} is more than max_hops={self.max_hops}.\nSwap them."
            )
        thoughts = max(self.c_thought * self.max_latent_stage, self.final_thoughts or 0)
        if thoughts + 4 > self.block_size:  # a word, <bot>, <eot> and eos are the least
            raise UserError(
                f"{thoughts} thoughts (c_thought, final_thoughts) do not fit into "
                f"block_size={self.block_size}.\nUse fewer thoughts or a longer block_size."
            )
        if self.matched_fraction + self.short_fraction > 1:
            raise UserError(
                f"matched_fraction={self.matched_fraction} and "
                f"short_fraction={self.short_fraction} add up to more than 1.\nLower one of them."
            )
        if self.graph == "on" and self.ungraphed:
            raise UserError(
                "graph='on' does not go with recompute and dropout.\n"
                "Use --graph=auto, which leaves graphs out there."
            )
        if self.render == "compact" and self.task == "gsm8k":
            raise UserError(
                "render='compact' is not for gsm8k, whose rows are any text.\nUse "
                "--render=sentences."
            )
        if self.render == "compact" and self.tokenizer == "gpt2":
            raise UserError(
                "render='compact' is for the word-level vocabulary, tokenizer is 'gpt2'.\n"
                "Use --render=sentences or --tokenizer=words."
            )

    @property
    def ungraphed(self) -> bool:
        """Return whether a CUDA graph is ruled out: dropout would be drawn a second time."""
        return self.recompute_mlp and self.dropout > 0
