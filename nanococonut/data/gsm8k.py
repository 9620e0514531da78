"""GSM8k-Aug: grade-school questions whose steps are equations (Deng et al. 2023; the paper's 4.1).

385,620 / 500 / 1,319 examples to train, validate and test on, from copies on the Hugging Face hub
or from text lines (files.py), whose addresses are in the released code
(facebookresearch/coconut, preprocessing/gsm_icot.bash). A few examples have no step; the released
preprocessing gives them an empty one instead.
"""

from pathlib import Path

from nanococonut.data.examples import Example
from nanococonut.data.files import collect, parse_gsm8k_columns
from nanococonut.runtime.errors import UserError

# columns: question, steps (a list), answer; the second copy has cot (all steps in one text)
HUB = ("whynlp/gsm8k-aug", "zen-E/GSM8k-Aug")
SPLITS = ("train", "validation", "test")


def from_hub(
    split: str, name: str = HUB[0], revision: str = "main", skipped: list[str] | None = None
) -> tuple[list[Example], str]:
    """Return (examples of a split, their commit), downloaded once into the Hugging Face cache.

    name       one of HUB, or any data set with the same columns
    revision   branch, tag or commit; the returned commit gives the same examples again
    skipped    as in read_examples

    Raise UserError if the data set cannot be downloaded or has other columns.
    """
    from huggingface_hub import snapshot_download  # imported here: they take a second
    from rich.console import Console
    from rich.progress import track

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision)
    except Exception as e:  # from the hub, the HTTP library (whose types vary) or the disk
        raise UserError(
            f"{name} ({revision}) is neither in the Hugging Face cache nor can it be downloaded: "
            f"{_first_line(e)}\nGo online (unset HF_HUB_OFFLINE), copy another machine's cache, or "
            "train on text lines (train.py: --data, --valid_data). Their addresses are in "
            "preprocessing/gsm_icot.bash of github.com/facebookresearch/coconut."
        ) from None
    try:
        from datasets import load_dataset

        # streaming avoids a second copy of the data in another cache
        table = load_dataset(folder, split=split, streaming=True)
        progress = track(table, f"{name} {split}", console=Console(stderr=True), transient=True)
        entries = [(f"example {i}", columns) for i, columns in enumerate(progress)]
    except Exception as e:  # from pyarrow, datasets or the disk
        raise UserError(
            f"{name}, split {split}: cannot be read: {_first_line(e)}\n"
            f"Its splits should be {', '.join(SPLITS)}; try another copy, such as {HUB[0]}."
        ) from None
    expected = "Columns: question, steps (a list) or cot (a text), answer; see --skip_bad_rows."
    examples = collect(f"{name} {split}", entries, parse_gsm8k_columns, expected, skipped)
    return examples, Path(folder).name


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).split("\n")[0]
