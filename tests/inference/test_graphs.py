"""GraphCache keeps a bounded number of graphs, and capturing has no side effect."""

import pytest
import torch
from fake_graphs import FakeGraphCache


def test_each_run_does_the_work_once():
    """Guards against work done twice at the capture, and against keeping the oldest graph."""
    graphs, total, calls = FakeGraphCache(2), torch.zeros(()), []

    def add(n):
        def fn():
            calls.append(n)
            total.add_(n)

        return fn

    for n in (1, 2, 1, 3, 1, 2):  # 3 replaces 2, then 2 replaces 3
        graphs.run((n,), add(n))
        assert len(graphs.graphs) <= 2
    assert total == 1 + 2 + 1 + 3 + 1 + 2
    assert calls == [1, 1, 2, 2, 3, 3, 2, 2]  # first run and capture; a replay calls nothing


def test_fake_graphs_refuse_a_sync():
    """Guards against a fake graph that allows syncs, which fail on a GPU."""
    x = torch.zeros(3)
    for sync in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x[0] > 0)):
        with pytest.raises(AssertionError, match="cannot sync"):
            FakeGraphCache(2).run((0,), sync)
