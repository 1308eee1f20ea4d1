"""vLLM's own compiler, layers and collectives with our pass in its chain, on CPU ranks.

Needs vLLM's Python sources only: of its own kernels nothing is called, and names that its passes look up are declared.
``make test-vllm`` installs it so.
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import symmpatterns  # before vLLM, which takes the pass as one of its own all the same
from symmpatterns.testing import run_ranks

HIDDEN, INNER, WORDS = 64, 128, 96
_kernels = torch.library.Library("_C", "FRAGMENT")  # names of kernels that vLLM's passes look for in the graph


def _prepare(cache: str) -> Any:
    """A vLLM of two CPU ranks, whose configuration is returned; compiled as on GPUs, where it has a compiler of its own."""
    os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1", VLLM_PLUGINS="", VLLM_CACHE_ROOT=cache)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/inductor"
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    CpuPlatform.use_custom_op_collectives = classmethod(lambda cls: True)  # as on GPUs
    vllm.platforms._current_platform = CpuPlatform()
    from vllm.compilation.passes.inductor_pass import InductorPass
    from vllm.compilation.passes.utility import fix_functionalization
    from vllm.config import CompilationConfig, CompilationMode, DeviceConfig, ParallelConfig, VllmConfig

    source = Path(fix_functionalization.__file__).read_text()
    for name in sorted(set(re.findall(r"torch\.ops\._C\.(\w+)\.default", source))):
        if not hasattr(torch.ops._C, name):
            _kernels.define(f"{name}(Tensor x) -> Tensor")

    options = CompilationConfig(
        inductor_passes={"post_grad_custom_post_pass": "symmpatterns.post_grad_pass"},
        custom_ops=["none"],
        splitting_ops=[],
    )
    parallel = ParallelConfig(tensor_parallel_size=2, rank=dist.get_rank())
    config = VllmConfig(parallel_config=parallel, compilation_config=options, device_config=DeviceConfig("cpu"))
    options = config.compilation_config
    assert isinstance(symmpatterns.post_grad_pass, InductorPass)
    assert isinstance(options.inductor_compile_config["post_grad_custom_post_pass"], type(symmpatterns.post_grad_pass))
    options.mode, options.backend = CompilationMode.VLLM_COMPILE, "inductor"
    options.compile_sizes, options.ir_enable_torch_wrap = [], True
    for name, value in vars(options.pass_config).items():
        if name.startswith(("fuse_", "enable_")) and isinstance(value, bool):
            setattr(options.pass_config, name, False)  # passes for kernels that only GPUs have
    return config


def _model(config: Any) -> nn.Module:
    from vllm.compilation.decorators import support_torch_compile
    from vllm.distributed import tensor_model_parallel_all_gather, tensor_model_parallel_all_reduce
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.layernorm import RMSNorm
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList(RMSNorm(HIDDEN, eps=1e-5) for _ in range(2))
            self.up = MergedColumnParallelLinear(HIDDEN, [INNER, INNER], bias=False, prefix=f"{number}.up")
            self.activation = SiluAndMul()
            self.down = RowParallelLinear(INNER, HIDDEN, bias=False, prefix=f"{number}.down")

        def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
            x, residual = self.norms[0](x, residual)
            x = tensor_model_parallel_all_reduce(torch.tanh(x))  # behind no matmul: what a norm takes
            x, residual = self.norms[1](x, residual)
            x, _ = self.down(self.activation(self.up(x)[0]))
            return x, residual

    class Model(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.embedding = VocabParallelEmbedding(WORDS, HIDDEN)
            self.layers = nn.ModuleList(Layer(number) for number in range(2))
            self.norm = RMSNorm(HIDDEN, eps=1e-5)

        def forward(self, words: Tensor) -> Tensor:
            x = self.embedding(words)
            residual = x
            for layer in self.layers:
                x, residual = layer(x, residual)
            return tensor_model_parallel_all_gather(self.norm(x, residual)[0].sin(), -1)

    model = support_torch_compile(Model, dynamic_arg_dims={"words": 0})(vllm_config=config, prefix="")
    generator = torch.Generator().manual_seed(dist.get_rank())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.125, generator=generator) if parameter.ndim > 1 else nn.init.ones_(parameter)
    for module in model.modules():
        if hasattr(getattr(module, "quant_method", None), "process_weights_after_loading"):
            module.quant_method.process_weights_after_loading(module)
    return model


def _run(rank: int, world_size: int, cache: str) -> list[tuple[str, str | None, bool]]:
    config = _prepare(cache)
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.forward_context import set_forward_context

    with set_current_vllm_config(config), torch.no_grad():
        init_distributed_environment(world_size, rank, "env://", rank, "gloo")
        initialize_model_parallel(world_size, backend="gloo")
        model = _model(config)
        with set_forward_context(None, config):
            words = torch.arange(16) * 5
            expected = model.forward(words)  # only a call is compiled
            for count in (16, 16, 9):
                torch.testing.assert_close(model(words[:count]), expected[:count], rtol=1e-4, atol=1e-4)
    report = symmpatterns.report()
    assert not report.declined, report
    return sorted((record.collective, record.family, record.from_cache) for record in report.rewrites)


@pytest.mark.slow
@unittest.skipUnless(importlib.util.find_spec("vllm"), "vLLM is not installed (make test-vllm)")
class VllmItselfTest(unittest.TestCase):
    @pytest.mark.timeout(600)
    def test_its_compiler_takes_the_pass(self) -> None:
        wanted = [
            ("all_gather", "peer_all_gather"),
            *[("all_reduce", "all_reduce_rms_norm")] * 2,
            *[("all_reduce", "matmul_all_reduce")] * 2,
            ("all_reduce", "peer_all_reduce"),
        ]
        with tempfile.TemporaryDirectory() as cache:
            for from_cache in (False, True):
                for records in run_ranks(_run, 2, cache, timeout=280):
                    self.assertEqual(records, [(*record, from_cache) for record in wanted])
