"""
A model whose weights come later: shapes without numbers.
"""

import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from model import GPT


class NothingDrawn(TorchFunctionMode):
    """Within it new weights are not drawn, because others will take their place."""

    DRAWING = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        return kwargs["tensor"] if func in self.DRAWING else func(*args, **kwargs)


def hollow(config, dtype=torch.float32):
    """A GPT whose parameters have shapes and no storage, on torch's device "meta"; dtype as for GPT."""
    with torch.device("meta"), NothingDrawn():
        return GPT(config, dtype)
