"""The Python blocks of the README and docs/EXPERIMENTS.md run as they stand."""

import re

from helpers import ROOT


def run_blocks(path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(), re.DOTALL)
    exec(compile("\n".join(blocks), path, "exec"), {})


def test_readme_example(capsys):
    """An example that no test runs breaks with the next renaming."""
    run_blocks("README.md")
    assert capsys.readouterr().out.startswith("### lempus torch.Size([1, 6, 64])")


def test_experiments(capsys):
    """Guards against experiments that run, but measure nothing."""
    run_blocks("docs/EXPERIMENTS.md")
    out = capsys.readouterr().out
    percents = {
        name: [float(x) for x in re.findall(rf"^{name}.*?([\d.]+)%", out, re.MULTILINE)]
        for name in ("accuracy", "noise", "thought", "head")
    }
    assert percents["accuracy"][0] > 95 and len(percents["noise"]) == 6
    assert min(percents["noise"]) < 70 and max(percents["thought"]) > 80
    assert len(percents["head"]) == 2  # heads of the last layer
