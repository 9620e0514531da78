"""GSM8k-Aug: grade-school questions whose steps are equations (Deng et al. 2023; the paper's 4.1).

385,620 / 500 / 1,319 rows to train, validate and test on. They come as text lines
(question||<<16-3-4=9>> <<9*2=18>> #### 18), whose addresses are in the released code
(facebookresearch/coconut, preprocessing/gsm_icot.bash), or from copies on the Hugging Face hub.
A few rows have no step. They have none here; the released preprocessing gives them an empty one.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanococonut.data import Row, fault
from nanococonut.data.files import collect
from nanococonut.errors import UserError

# the first one's columns are question, steps (a list), answer; the second one's question, cot (the
# steps in one text), answer
HUB = ("whynlp/gsm8k-aug", "zen-E/GSM8k-Aug")
SPLITS = ("train", "validation", "test")

# statistics of the 500 released validation rows
RELEASED = {
    "answer decimal": 0,
    "answer has comma": 0.008,
    "answer negative": 0,
    "answer no number": 0,
    "last is answer": 0.932,
    "steps": 3.146,
    "steps 0": 0.012,
    "steps 1": 0.052,
    "steps 2": 0.31,
    "steps 3": 0.28,
    "steps >3": 0.346,
    "words of question": 45.036,
}


def row_of_line(line: str) -> Row:
    """A text line's row. ValueError says what is wrong with it.

    The answer stays as written, commas and all: they are left out where answers are compared.
    """
    question, bars, rest = line.partition("||")
    steps, mark, answer = rest.rpartition("####")
    if not bars:
        raise ValueError("no || behind the question")
    if not mark:
        raise ValueError("no #### before the answer")
    return _row({"question": question, "cot": steps, "answer": answer})


def _row(columns: dict[str, Any]) -> Row:
    """A row of a hub copy's columns. ValueError where they are others or hold something else."""
    row = dict(columns)
    if isinstance(row.get("cot"), str):
        row["steps"] = row.pop("cot").split(" ")
    if row.keys() != {"question", "steps", "answer"}:
        raise ValueError(
            f"the columns are {', '.join(columns)}; wanted are question, steps or cot, answer"
        )
    if wrong := fault(row):
        raise ValueError(wrong)
    steps = [step.strip() for step in row["steps"] if step.strip()]  # none is no empty one
    return {"question": row["question"].strip(), "steps": steps, "answer": row["answer"].strip()}


def from_hub(
    split: str, name: str = HUB[0], revision: str = "main", skipped: list[str] | None = None
) -> tuple[list[Row], str]:
    """(rows of a split, the commit they are of), downloaded once into the Hugging Face cache.

    name: one of HUB, or any data set with the columns of one of them. revision: a branch, tag or
    commit; no commit is written down here, so give the one that is returned to get the same rows
    again. skipped: as in read_rows. UserError where the rows cannot be had, or are others.
    """
    from huggingface_hub import snapshot_download  # these take a second to import
    from rich.console import Console
    from rich.progress import track

    try:
        folder = snapshot_download(name, repo_type="dataset", revision=revision)
    except Exception as e:  # the hub's, the HTTP library's (which depends on versions), the disk's
        raise UserError(
            f"{name} ({revision}) is neither in the Hugging Face cache nor can it be downloaded: "
            f"{_first_line(e)}\nGo online (unset HF_HUB_OFFLINE), copy the cache of a machine that "
            "has it, or give text lines (--from FILE; train.py: --data, --valid_data): the "
            "released code's preprocessing/gsm_icot.bash has their addresses "
            "(github.com/facebookresearch/coconut)."
        ) from None
    try:
        from datasets import load_dataset

        # streamed: read as they lie there, with no second copy of all rows in another cache
        table = load_dataset(folder, split=split, streaming=True)
        shown = track(table, f"{name} {split}", console=Console(stderr=True), transient=True)
        entries = [(f"row {i}", columns) for i, columns in enumerate(shown)]
    except Exception as e:  # pyarrow's, datasets', the disk's
        raise UserError(
            f"{name}, split {split}: cannot be read: {_first_line(e)}\n"
            f"Its splits should be {', '.join(SPLITS)}; try another copy, such as {HUB[0]}."
        ) from None
    wanted = "A row is question, steps (a list) or cot (a text), answer; see --skip_bad_rows."
    rows = collect(f"{name} {split}", entries, lambda columns: [_row(columns)], wanted, skipped)
    return rows, Path(folder).name


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).split("\n")[0]


def statistics(rows: Sequence[Row]) -> dict[str, float]:
    """Means, and shares of the rows (by number of steps, and by kind of answer).

    "last is answer": the result of the last equation is the answer. UserError for no rows.
    """
    if not rows:
        raise UserError("there are no rows to look at.\nGive at least one.")
    total: Counter[str] = Counter()
    for row in rows:
        steps, answer = row["steps"], row["answer"].strip()
        result = steps[-1].rpartition("=")[2].removesuffix(">>") if steps else ""
        number = _number(answer)
        total["steps"] += len(steps)
        total[f"steps {len(steps)}" if len(steps) < 4 else "steps >3"] += 1
        total["words of question"] += len(row["question"].split())
        total["answer has comma"] += "," in answer
        total["answer negative"] += answer.startswith("-")
        total["answer decimal"] += number is not None and "." in answer
        total["answer no number"] += number is None
        total["last is answer"] += number is not None and number == _number(result)
    return {key: n / len(rows) for key, n in sorted(total.items())}


def _number(text: str) -> float | None:
    plain = text.replace(",", "").strip()
    return float(plain) if re.fullmatch(r"-?(\d+\.?\d*|\.\d+)", plain) else None
