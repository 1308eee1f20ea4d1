"""Which functions make new memory, as ``with symmetric_memory():`` has to know in a trace."""

from __future__ import annotations

import unittest
from typing import Any

import torch
from parameterized import parameterized

from symmpatterns.functions import NEW, SHARED, UNKNOWN, WRITTEN, kind_of

functional = torch.nn.functional


class KindTest(unittest.TestCase):
    @parameterized.expand(
        [
            (torch.sin, NEW),
            (torch.Tensor.mul, NEW),
            (torch.Tensor.__rsub__, NEW),
            (torch.zeros, NEW),
            (torch.topk, NEW),
            (functional.layer_norm, NEW),
            (torch.ops.aten.sin, NEW),
            (torch.ops.aten.sin.default, NEW),
            (functional.relu, 1),
            (torch.Tensor.t, SHARED),
            (torch.Tensor.split, SHARED),
            (torch.ops.aten.view.default, SHARED),
            (torch.Tensor.add_, WRITTEN),
            (torch.Tensor.__setitem__, WRITTEN),
            (torch.ops.aten.add_.Tensor, WRITTEN),
            (torch.Tensor.T.__get__, SHARED),  # type: ignore[attr-defined]
            (torch.Tensor.reshape, UNKNOWN),
            (torch.broadcast_tensors, UNKNOWN),
            (functional.dropout, UNKNOWN),
            (torch.Tensor.float, UNKNOWN),
            (print, UNKNOWN),
        ]
    )
    def test_kind(self, func: Any, kind: int) -> None:
        self.assertEqual(kind_of(func), kind)


if __name__ == "__main__":
    unittest.main()
