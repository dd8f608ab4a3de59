"""What a researcher asks of the hash in training: are buckets used, are bits dead, how near are the boundaries."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lookupffn.layer import LookupFFN
from lookupffn.ops import at_least_float32, hash_codes

MARGIN_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


class HashMonitor:
    """Statistics of the codes of every LookupFFN in a model, gathered by forward hooks until ``close``.

    At most ``tokens_per_call`` tokens of each forward pass are looked at, evenly spaced, so it can stay on during
    training. Use as a context manager, or call ``close`` to remove the hooks::

        with HashMonitor(model) as monitor:
            model(**batch)
        print(monitor.summary())
    """

    def __init__(self, model: nn.Module, tokens_per_call: int = 256):
        if tokens_per_call < 1:
            raise ValueError(f"tokens_per_call must be at least 1, not {tokens_per_call}")
        self.layers = {name: module for name, module in model.named_modules() if isinstance(module, LookupFFN)}
        self.tokens_per_call = tokens_per_call
        self.reset()
        self._hooks = [
            layer.projection.register_forward_hook(lambda _, __, z, name=name: self._look(name, z.detach()))
            for name, layer in self.layers.items()
        ]

    def reset(self) -> None:
        """Forgets everything seen so far."""
        self._counts: dict[str, Tensor] = {}  # (T, K, N) how often a bucket was the nearest, the second nearest, ...
        self._margins: dict[str, list[Tensor]] = {name: [] for name in self.layers}  # |z| of the latest tokens

    def close(self) -> None:
        """Removes the hooks; what was gathered stays."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> HashMonitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def _look(self, name: str, z: Tensor) -> None:
        config = self.layers[name].config
        z = z.to(at_least_float32(z.dtype)).reshape(-1, config.num_tables, config.code_bits)  # (B, T, tau)
        z = z[:: math.ceil(len(z) / self.tokens_per_call) or 1]
        codes, _ = hash_codes(z, config.reads)  # (B, T, N)
        shape = (config.num_tables, config.num_rows, config.reads)
        place = torch.arange(config.num_tables, device=z.device)[:, None] * config.num_rows + codes.long()
        place = place * config.reads + torch.arange(config.reads, device=z.device)
        counts = torch.bincount(place.flatten(), minlength=math.prod(shape)).view(shape)
        self._counts[name] = self._counts.get(name, 0) + counts
        self._margins[name] = [*self._margins[name][-7:], z.abs().flatten()[: 2**16]]

    def summary(self) -> list[dict]:
        """One dict a layer, in model order; layers that saw no token are left out.

        ``buckets_used``: share of all buckets read at least once, by any probe; with few tokens at most
        ``tokens N / K``. ``code_entropy``: entropy of the nearest buckets of a table, averaged over tables, as a share
        of ``code_bits`` (1 is uniform). ``dead_bits``: how many of ``bits`` took one value only.
        ``margin_quantiles``: of ``|z|``, the distance of a coordinate from flipping its bit. ``tokens``: how many were
        looked at.
        """
        result = []
        for index, (name, layer) in enumerate(self.layers.items()):
            if name not in self._counts or not self._counts[name].sum():
                continue
            config, used = layer.config, (self._counts[name] > 0).any(-1)
            counts = self._counts[name][..., 0].double()  # (T, K), of the nearest bucket
            tokens = counts[0].sum()
            share = counts / tokens  # (T, K)
            entropy_bits = -torch.xlogy(share, share).sum(1) / math.log(2)
            codes = torch.arange(config.num_rows, device=counts.device)
            bits = torch.stack([codes >> j & 1 for j in reversed(range(config.code_bits))], -1).double()  # (K, tau)
            ones = counts @ bits  # (T, tau) tokens in which the bit was 1
            margins = torch.cat(self._margins[name]).double()
            quantiles = margins.quantile(torch.tensor(MARGIN_QUANTILES, device=margins.device).double())
            result.append(
                {
                    "layer": index,
                    "name": name,
                    "tokens": int(tokens),
                    "buckets_used": used.double().mean().item(),
                    "code_entropy": entropy_bits.mean().item() / config.code_bits,
                    "dead_bits": int(((ones == 0) | (ones == tokens)).sum()),
                    "bits": config.code_features,
                    "margin_quantiles": dict(zip(map(str, MARGIN_QUANTILES), quantiles.tolist(), strict=True)),
                }
            )
        return result
