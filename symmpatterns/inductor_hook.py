"""The only writer of torch._inductor.config: puts the pass on its post-grad hook, beside whatever is there.

Inductor's FX-graph cache keeps working because the pass is a ``CustomGraphPass`` whose ``uuid()`` covers everything a
rewritten graph depends on: these sources, the configuration, the declarations and which ranks share a host. A cached
graph skips the pass, so operators set themselves up from their arguments at their first call.
"""

from __future__ import annotations

import functools
import hashlib
import threading
from pathlib import Path
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from symmpatterns import compat, config, declare, groups, report, tables


@functools.lru_cache(maxsize=1)
def _sources_hash() -> str:
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for path in sorted(p for pattern in ("**/*.py", "csrc/*", "**/*.json") for p in root.glob(pattern)):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


class PostGradPass(CustomGraphPass):
    """The rewrite of a post-grad graph, as Inductor and hosts such as vLLM take it."""

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """`isinstance` asks for it where it does not know the answer, as vLLM does, which may have been loaded after us."""
        compat.adopt_for_vllm(PostGradPass)
        return type(self)

    def __call__(self, graph: Graph) -> None:
        if not isinstance(graph, Graph):
            raise TypeError(f"post_grad_pass takes a torch.fx.Graph, not {type(graph).__name__}")
        if not config.enabled:
            return
        from symmpatterns import patterns  # imports Inductor's pattern matcher, which takes over a second

        patterns.rewrite(graph)

    def uuid(self) -> Any:
        where = f"{groups.topology()};{groups.names()}"
        return (
            "symmpatterns",
            _sources_hash(),
            f"{config.fingerprint()},timeout_s={float(config.timeout_s)}",  # no graph depends on it, but patch promises it
            tables.fingerprint(),
            declare.fingerprint(),
            where,
        )

    def is_applicable_for_range(self, compile_range: object) -> bool:
        """vLLM asks before each compilation, with the numbers of tokens that it is for."""
        return True

    def is_applicable_for_shape(self, shape: object) -> bool:
        """The same question in older versions of vLLM."""
        return True


class Chain(CustomGraphPass):
    """Passes that were on the hook before, then ours."""

    def __init__(self, passes: tuple[Any, ...]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for each in self.passes:
            each(graph)

    def uuid(self) -> Any:
        ids = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.passes]
        # A plain function has no identity, so Inductor may not cache what it did; the same holds without us.
        return None if any(i is None for i in ids) else tuple(ids)


post_grad_pass = PostGradPass()
_lock = threading.Lock()
_previous: Any = None
_installed = False


def _members(hook: Any) -> tuple[Any, ...]:
    """The single passes on a hook value."""
    if hook is None:
        return ()
    if isinstance(hook, (list, tuple)):
        return tuple(m for each in hook for m in _members(each))
    if isinstance(hook, Chain):
        return tuple(m for each in hook.passes for m in _members(each))
    return (hook,)


def is_installed() -> bool:
    """Whether Inductor will run our pass at its next compilation."""
    return any(member is post_grad_pass for member in _members(compat.get_post_grad_hook()))


def other_passes() -> tuple[Any, ...]:
    """The passes beside ours that Inductor runs from its post-grad hook."""
    return tuple(member for member in _members(compat.get_post_grad_hook()) if member is not post_grad_pass)


def install() -> None:
    """Puts our pass on Inductor's post-grad hook, after what is there already; does nothing when it is there."""
    global _previous, _installed
    with _lock:
        _installed = True
        if is_installed():
            return
        _previous = compat.get_post_grad_hook()
        others = _members(_previous)
        compat.set_post_grad_hook(Chain((*others, post_grad_pass)) if others else post_grad_pass)


def uninstall() -> None:
    """Takes our pass off the hook again and leaves the others; does nothing when it is not there."""
    global _previous, _installed
    with _lock:
        _installed = False
        if not is_installed():
            return
        hook = compat.get_post_grad_hook()
        others = tuple(member for member in _members(hook) if member is not post_grad_pass)
        if others == _members(_previous):
            compat.set_post_grad_hook(_previous)
        elif isinstance(hook, (list, tuple)):
            compat.set_post_grad_hook(type(hook)(others))
        else:
            compat.set_post_grad_hook(others[0] if len(others) == 1 else Chain(others))
        _previous = None


def hook_problem() -> str | None:
    """A sentence when somebody took our pass off the hook after ``install()``."""
    if not _installed or is_installed():
        return None
    return (
        "torch._inductor.config.post_grad_custom_post_pass was overwritten after symmpatterns was installed, so nothing "
        "is rewritten any more: call symmpatterns.install() after setting it, or add symmpatterns.post_grad_pass to it"
    )


report.note_sources.append(hook_problem)
