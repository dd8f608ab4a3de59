"""Tasks of MTEB for a model, where the package ``mteb`` is installed and their data is within reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lookupffn.conversion.quality import Embed
from lookupffn.errors import InputError
from lookupffn.train.rows import first_line


def mteb_scores(model: Any, embed: Embed, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """By task its ``main_score``, all ``scores``, and the revision of its data, as mteb has them.

    A SentenceTransformer is given to mteb as it is, with its prompts; of other models it sees ``embed``.

    Raises:
        InputError: a task is not known, or cannot be run, for one because its data cannot be fetched.
    """
    import mteb

    found = {}
    for name in names:
        try:
            (task,) = mteb.get_tasks(tasks=[name])
        except (KeyError, ValueError) as error:
            raise InputError(f"--mteb {name!r} is no task of mteb {mteb.__version__} ({first_line(error)})") from None
        try:
            given = model if type(model).__name__ == "SentenceTransformer" else _encoder(embed)
            # Without its cache, which knows a local model by no more than its name.
            (result,) = mteb.evaluate(given, task, cache=None, co2_tracker=False).task_results
        except Exception as error:  # a dozen types, from the network to the task's own code
            raise InputError(
                f"--mteb {name!r} cannot be run ({type(error).__name__}: {first_line(error)}): its data comes from the "
                "Hugging Face hub"
            ) from error
        found[name] = {
            "main_score": float(result.get_score()),
            "dataset_revision": result.dataset_revision,
            "scores": result.scores,
        }
    return found


def _encoder(embed: Embed) -> Any:
    """What mteb calls to have texts embedded; it compares vectors by their cosine."""
    from mteb.models.abs_encoder import AbsEncoder
    from mteb.models.model_meta import ModelMeta

    class Encoder(AbsEncoder):
        mteb_model_meta = ModelMeta.create_empty()

        def encode(self, inputs: Any, **_: Any) -> np.ndarray:
            return embed([text for batch in inputs for text in batch["text"]])

    return Encoder()
