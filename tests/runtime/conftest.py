import pytest
from encoders import MODELS

from lookupffn import export


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of a model and the model, each exported once."""
    made = {}

    def get(name, linears="float32", **options):
        key = (name, linears, *options.items())
        if key not in made:
            model, folder = MODELS[name](), tmp_path_factory.mktemp("model")
            made[key] = export(model, folder, linears=linears, tables=linears, **options), model
        return made[key]

    return get
