"""GSM8k-Aug: grade-school questions whose steps are equations (Deng et al. 2023; the paper's 4.1).

The 385,620 training, 500 validation and 1,319 test examples come from a copy on the Hugging Face
hub or from text files (files.py). The addresses of these files are in the released code
(facebookresearch/coconut, preprocessing/gsm_icot.bash). A few examples have no steps; the released
preprocessing gives them one empty step.
"""

from pathlib import Path
from typing import Any

from nanococonut.data.examples import Example
from nanococonut.data.files import OBJECT, collect, parse_gsm8k_columns
from nanococonut.runtime.errors import UserError

HUB = "whynlp/gsm8k-aug"  # columns: question, steps (a list), answer
HUB_SPLITS = ("train", "validation", "test")
SPLITS: dict[str, Any] = {}  # nothing is generated
VOCABULARY = ["###"]  # in addition to the words of the examples


def from_hub(
    split: str, revision: str = "main", skipped: list[str] | None = None
) -> tuple[list[Example], str]:
    """Return (examples, commit) of a split, downloaded once into the Hugging Face cache.

    revision   branch, tag or commit; the returned commit gives the same examples again
    skipped    see read_examples
    """
    from huggingface_hub import snapshot_download  # imported here: the imports take a second
    from rich.console import Console
    from rich.progress import track

    source = f"{HUB} {split}"
    try:
        folder = snapshot_download(HUB, repo_type="dataset", revision=revision)
        from datasets import load_dataset

        # streaming avoids a second copy of the data in another cache
        table = load_dataset(folder, split=split, streaming=True)
        progress = track(table, source, console=Console(stderr=True), transient=True)
        entries = [(f"example {i}", columns) for i, columns in enumerate(progress)]
    except Exception as e:  # many types: of the hub, the HTTP library, pyarrow, the disk
        reason = (str(e).strip() or type(e).__name__).split("\n")[0]
        raise UserError(
            f"{source} ({revision}) is not in the Hugging Face cache and cannot be downloaded: "
            f"{reason}\nGo online (unset HF_HUB_OFFLINE), copy the cache of another machine, or "
            "train on text files (train.py: --data, --valid_data). Their addresses are in "
            "preprocessing/gsm_icot.bash of github.com/facebookresearch/coconut."
        ) from None
    return collect(source, entries, parse_gsm8k_columns, OBJECT, skipped), Path(folder).name
