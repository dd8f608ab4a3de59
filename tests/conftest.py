import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test depends on a network

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """What is computed here is small: more threads wait for each other, on a busy machine ten times as long as it."""
    torch.set_num_threads(1)


@pytest.fixture
def one_thread():
    """One thread, and again after a test that asks for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
