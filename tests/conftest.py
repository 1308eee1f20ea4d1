"""What every test starts from: the hook installed, default configuration, an empty report, no compiled code."""

from __future__ import annotations

import pytest
import torch

import symmpatterns
from symmpatterns import testing

testing.PRELOADED.append("tests.first_compile")


@pytest.fixture(autouse=True)
def clean_slate():
    symmpatterns.install()
    symmpatterns.report().clear()
    torch._dynamo.reset()
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
