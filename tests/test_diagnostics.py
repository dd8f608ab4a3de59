import pytest
import torch
from torch import nn

from lookupffn import HashMonitor, LookupConfig, LookupFFN


def layer_without_projection():
    return LookupFFN(LookupConfig(4, 3, num_tables=2, code_bits=2, projection="none"))


def test_statistics_by_hand():
    # table 0 sees codes 3, 3, 2, 2 (first bit dead); table 1 sees 0, 1, 2, 3
    x = torch.tensor([[1.0, 2, -1, -1], [1, 1, -1, 1], [1, -1, 1, -1], [1, -1, 1, 3]])
    model = nn.Sequential(layer_without_projection())
    with HashMonitor(model) as monitor:
        model(x)
    (row,) = monitor.summary()
    assert row["layer"] == 0
    assert row["name"] == "0"
    assert row["tokens"] == 4
    assert row["buckets_used"] == (2 + 4) / 8
    assert row["code_entropy"] == pytest.approx((1 + 2) / 2 / 2)
    assert (row["dead_bits"], row["bits"]) == (1, 4)
    assert row["margin_quantiles"]["0.5"] == 1.0
    assert row["margin_quantiles"]["0.95"] == pytest.approx(x.abs().flatten().quantile(0.95).item())


def test_a_bucket_counts_as_used_by_the_second_probe_too():
    model = nn.Sequential(LookupFFN(LookupConfig(2, 3, num_tables=1, code_bits=2, projection="none", reads=2)))
    with HashMonitor(model) as monitor:
        model(torch.tensor([[2.0, 1.0]]))  # bucket 11, then 10
    (row,) = monitor.summary()
    assert (row["tokens"], row["buckets_used"], row["code_entropy"], row["dead_bits"]) == (1, 2 / 4, 0, 2)


def test_counts_add_up_over_calls_and_stop_when_closed():
    model = nn.Sequential(layer_without_projection(), nn.Linear(3, 4), layer_without_projection())
    monitor = HashMonitor(model)
    for _ in range(3):
        model(torch.randn(5, 4))
    assert [row["tokens"] for row in monitor.summary()] == [15, 15]
    monitor.reset()
    assert monitor.summary() == []
    monitor.close()
    model(torch.randn(5, 4))
    assert monitor.summary() == []


def test_it_looks_at_a_bounded_number_of_tokens_and_changes_nothing():
    model = nn.Sequential(layer_without_projection())
    x = torch.randn(3, 333, 4)
    plain = model(x)
    with HashMonitor(model, tokens_per_call=100) as monitor:
        assert torch.equal(model(x), plain)
        model(x[:0])
    assert 50 <= monitor.summary()[0]["tokens"] <= 100
