"""Items of language modelling from token blocks: their order, what is hidden, and from which seed.

Differs from the usual collator: masks and data order are functions of (seed, index), not of a stream of random numbers.
"""

from typing import Any

import numpy as np
import torch


class MaskedBlocks(torch.utils.data.Dataset):
    """Masked-LM items over blocks (N, L) of token ids: item i is a pure function of the blocks, seed and i.

    Item i is {"input_ids": (L,) int64, "labels": (L,) int64, -100 where not masked} of block i mod N, or with
    `shuffle` of the block at place i mod N of the permutation of (seed, i // N); its masks are those of
    (seed, i). So data and masks do not depend on batch size, workers or ranks, a resumed run meets exactly
    what an uninterrupted one would, and a `length` beyond N (the default) gives further epochs with fresh masks.

    Of the L positions exactly round(mask_probability * L) are masked, uniformly among non-special tokens (all
    of those where there are fewer): each becomes <mask> with probability 0.8, a random non-special token with
    0.1, or stays. Raises ValueError for blocks, a seed or a probability that cannot give such items.
    """

    def __init__(
        self,
        blocks: np.ndarray,
        tokenizer: Any,
        *,
        seed: int,
        mask_probability: float = 0.15,
        length: int | None = None,
        shuffle: bool = False,
    ):
        if len(blocks) == 0 or seed < 0:
            raise ValueError(f"{len(blocks)} blocks and seed {seed}: need at least 1 and 0")
        self.num_masked = round(mask_probability * blocks.shape[1])
        if not 1 <= self.num_masked <= blocks.shape[1]:
            raise ValueError(f"mask_probability {mask_probability} masks {self.num_masked} tokens of a block")
        self.blocks, self.seed, self.shuffle = blocks, seed, shuffle
        self.length = len(blocks) if length is None else length
        self.mask_id = tokenizer.mask_token_id
        ids = np.array(sorted(tokenizer.get_vocab().values()))
        self.is_special = np.zeros(ids.max() + 1, bool)
        self.is_special[tokenizer.all_special_ids] = True
        self.ordinary_ids = ids[~self.is_special[ids]]
        self._latest_order = (-1, np.empty(0))  # (epoch, permutation): a memo, no state

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        return self._item(index, self._tokens(index))

    def _tokens(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, len(self.blocks))
        return self.blocks[self._order(epoch)[place] if self.shuffle else place].astype(np.int64)

    def _item(self, index: int, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        rng = self._rng("masks", index)
        masked = rng.permutation(np.flatnonzero(~self.is_special[tokens]))[: self.num_masked]
        labels = np.full_like(tokens, -100)
        labels[masked] = tokens[masked]
        random = self.ordinary_ids[rng.integers(len(self.ordinary_ids), size=len(masked))]
        fate = rng.random(len(masked))
        tokens[masked] = np.select([fate < 0.8, fate < 0.9], [self.mask_id, random], tokens[masked])
        return {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}

    def _order(self, epoch: int) -> np.ndarray:
        if self._latest_order[0] != epoch:
            self._latest_order = (epoch, self._rng("order", epoch).permutation(len(self.blocks)))
        return self._latest_order[1]

    def _rng(self, purpose: str, index: int) -> np.random.Generator:
        key = np.random.SeedSequence(self.seed, spawn_key=(("masks", "order").index(purpose), index))
        return np.random.Generator(np.random.Philox(key))


class CausalBlocks(MaskedBlocks):
    """The same blocks in the same order with nothing hidden: `labels` are the ids, for a model that shifts them."""

    def _item(self, index: int, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(tokens)
        return {"input_ids": ids, "labels": ids}


def unigram_entropy(dataset: MaskedBlocks) -> float:
    """Entropy, in nats, of the labelled tokens of a fixed evaluation set: the least log perplexity that a
    predictor blind to context could reach on it. Raises ValueError if none is masked.
    """
    labels = torch.cat([dataset[index]["labels"] for index in range(len(dataset))] or [torch.empty(0).long()])
    counts = labels[labels != -100].bincount().double()
    if counts.sum() == 0:
        raise ValueError("no token of this set is masked: it has no entropy")
    return torch.special.entr(counts / counts.sum()).sum().item()
