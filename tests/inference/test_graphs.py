"""GraphCache are kept by key, a bounded number of them, and capturing one does nothing twice."""

import pytest
import torch
from fake_graphs import FakeGraphCache


def test_the_oldest_goes_and_each_play_does_the_work_once():
    graphs, total, made = FakeGraphCache(2), torch.zeros(()), []

    def add(n):
        def work():
            made.append(n)
            total.add_(n)

        return work

    for n in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, then 2 that of 3
        graphs.run((n,), add(n), [total])
        assert len(graphs.graphs) <= 2
    assert total == 1 + 2 + 1 + 3 + 1 + 2
    assert made == [1, 1, 2, 2, 3, 3, 2, 2]  # rehearsed and captured; never called to replay


def test_tapes_refuse_what_a_graph_cannot_do():
    x = torch.zeros(3)
    for asking in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool(x[0] > 0)):
        with pytest.raises(AssertionError, match="cannot ask the device"):
            FakeGraphCache(2).run((0,), asking, [x])
