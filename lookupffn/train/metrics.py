"""What is measured of a fine-tuned model, by scikit-learn and SciPy, as GLUE names it."""

import numpy as np
from scipy import stats
from sklearn.metrics import f1_score, matthews_corrcoef

METRICS = {  # each with its heading in a table
    "accuracy": "accuracy",
    "accuracy_standard_error": "standard error",
    "accuracy_matched": "accuracy, matched",  # of MNLI
    "accuracy_mismatched": "accuracy, mismatched",
    "f1": "F1",
    "f1_micro": "micro F1",
    "f1_macro": "macro F1",
    "matthews_correlation": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "mean_squared_error": "mean squared error",
}

SCORES = {  # the metrics whose mean decides which checkpoint is the best
    "single_label_classification": ("accuracy",),
    "multi_label_classification": ("f1_micro",),
    "regression": ("pearson", "spearman"),
}


def measured(problem_type: str, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a problem, by names of ``METRICS``: ``logits (N, outputs)``, ``labels`` as the model takes them.

    - ``single_label_classification``: ``accuracy`` with its standard error over texts, ``matthews_correlation``, and of
      two classes ``f1`` of the second, of more ``f1_macro``, the mean over classes.
    - ``multi_label_classification``, where a label holds if its logit is above 0: ``accuracy``, the share of texts with
      all labels right, ``f1_micro`` over all pairs of text and label, and ``f1_macro``.
    - ``regression``: ``pearson`` and ``spearman`` correlation and ``mean_squared_error``; a correlation with a constant
      is not defined, and NaN.
    """
    count = len(labels)
    if problem_type == "regression":
        guess, labels = logits.reshape(count), labels.reshape(count)
        constant = count < 2 or np.ptp(guess) == 0 or np.ptp(labels) == 0
        return {
            "pearson": float("nan") if constant else float(stats.pearsonr(guess, labels).statistic),
            "spearman": float("nan") if constant else float(stats.spearmanr(guess, labels).statistic),
            "mean_squared_error": float(np.square(guess - labels).mean()),
        }
    several = problem_type == "multi_label_classification"
    guess = logits > 0 if several else logits.argmax(-1)
    accuracy = float((guess == labels).reshape(count, -1).all(1).mean())
    found = {"accuracy": accuracy, "accuracy_standard_error": (accuracy * (1 - accuracy) / count) ** 0.5}
    if several:
        averages = ("micro", "macro")
    else:
        found["matthews_correlation"] = float(matthews_corrcoef(labels, guess))
        averages = ("binary",) if logits.shape[-1] == 2 else ("macro",)
    for average in averages:
        name = "f1" if average == "binary" else f"f1_{average}"
        found[name] = float(f1_score(labels, guess, average=average, zero_division=0.0))
    return found
