"""Masks: how many, which tokens, and that they depend on nothing but seed and index."""

from collections import Counter

import numpy as np
import pytest
import torch

from lookupffn.train.masking import MaskedBlocks, unigram_entropy


class Tokenizer:
    """What MaskedBlocks needs: 5 special ids, then ordinary ones with a hole at 7."""

    mask_token_id, all_special_ids = 4, [0, 1, 2, 3, 4]

    def get_vocab(self):
        return {str(i): i for i in range(1000) if i != 7}


def blocks(rows=20, length=512):
    ids = np.random.default_rng(1).integers(8, 1000, (rows, length)).astype(np.uint16)
    ids[:, ::50], ids[:, 49::50] = 0, 2
    return ids


def test_mask_counts_and_shares():
    source = blocks(200)
    dataset = MaskedBlocks(source, Tokenizer(), seed=3)
    fates, where = Counter(), np.zeros(512)
    for i in range(len(dataset)):
        item = dataset[i]
        tokens, labels = item["input_ids"].numpy(), item["labels"].numpy()
        assert tokens.dtype == labels.dtype == np.int64
        masked = labels != -100
        assert masked.sum() == 77  # the authors' number for 512
        original = source[i].astype(np.int64)
        assert np.array_equal(labels[masked], original[masked])
        assert np.array_equal(tokens[~masked], original[~masked])
        assert (original[masked] > 4).all()
        assert not np.isin(tokens[masked], [0, 1, 2, 3, 7]).any()
        fates["mask"] += int((tokens[masked] == 4).sum())
        fates["same"] += int((tokens[masked] == original[masked]).sum())
        where += masked
    total = 77 * len(dataset)
    for fate, share in (("mask", 0.8), ("same", 0.1)):  # a random token is the same one in 1 of 994 cases
        assert abs(fates[fate] - share * total) < 5 * (total * share * (1 - share)) ** 0.5
    ordinary = source[0] > 4
    expected = 77 / ordinary.sum() * len(dataset)
    assert abs(where[ordinary] - expected).max() < 6 * expected**0.5


def test_item_is_a_pure_function_of_seed_and_index():
    source, options = blocks(), {"shuffle": True, "length": 70}
    dataset = MaskedBlocks(source, Tokenizer(), seed=3, **options)
    forwards = [dataset[i] for i in range(70)]
    fresh = MaskedBlocks(source, Tokenizer(), seed=3, **options)
    backwards = [fresh[i] for i in reversed(range(70))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("input_ids", "labels"))
    loader = torch.utils.data.DataLoader(dataset, batch_size=7)
    assert torch.equal(torch.cat([b["labels"] for b in loader]), torch.stack([a["labels"] for a in forwards]))
    other = MaskedBlocks(source, Tokenizer(), seed=4, **options)
    assert not any(torch.equal(other[i]["labels"], forwards[i]["labels"]) for i in range(70))
    with pytest.raises(IndexError):
        dataset[70]


@pytest.mark.parametrize("shuffle", [False, True])
def test_epochs(shuffle):
    source = blocks(50, 64)
    source[:, 0] = np.arange(50) % 3  # special, thus never masked; the rows differ elsewhere too
    source[:, 50] = 0
    dataset = MaskedBlocks(source, Tokenizer(), seed=3, length=100, shuffle=shuffle)

    def row(item):
        tokens = torch.where(item["labels"] != -100, item["labels"], item["input_ids"]).numpy()
        (match,) = np.flatnonzero((source == tokens).all(axis=1))
        return int(match)

    first, second = [row(dataset[i]) for i in range(50)], [row(dataset[i]) for i in range(50, 100)]
    assert sorted(first) == sorted(second) == list(range(50))
    assert (first == second == list(range(50))) is not shuffle
    assert (first != second) is shuffle
    where = {row(dataset[i]): dataset[i]["labels"] for i in range(50)}
    assert not any(torch.equal(where[row(dataset[i])], dataset[i]["labels"]) for i in range(50, 100))


def test_few_ordinary_tokens():
    source = np.zeros((2, 64), np.uint16)
    source[0, :3] = 100
    dataset = MaskedBlocks(source, Tokenizer(), seed=0)
    assert [int((dataset[i]["labels"] != -100).sum()) for i in range(2)] == [3, 0]


@pytest.mark.parametrize(
    ("rows", "options"),
    [(0, {}), (2, {"seed": -1}), (2, {"mask_probability": 0.001}), (2, {"mask_probability": 1.5})],
)
def test_impossible_masks(rows, options):
    with pytest.raises(ValueError, match=r"blocks and seed|mask_probability"):
        MaskedBlocks(blocks(rows, 16), Tokenizer(), **{"seed": 0, **options})


def test_unigram_entropy_by_hand():
    # All of the tokens are masked: 8 of one kind, 4 of another, 2 and 2: 1/2, 1/4, 1/8, 1/8 is 1.75 bits.
    source = np.array([[10] * 8, [11] * 4 + [12] * 2 + [13] * 2], np.uint16)
    dataset = MaskedBlocks(source, Tokenizer(), seed=0, mask_probability=1.0)
    assert unigram_entropy(dataset) == pytest.approx(1.75 * np.log(2), abs=1e-12)
    with pytest.raises(ValueError, match="no token"):
        unigram_entropy(MaskedBlocks(source * 0, Tokenizer(), seed=0))
