"""Compilations in a thread beside the program: one after the other, and never of a kernel that a launch is at.

Inductor takes seconds to compile a graph, and Triton lets go of the interpreter's lock while MLIR, LLVM and ptxas work, so
what is begun when a graph is known costs the program little time. A compilation only fills Triton's caches: should it
fail, or not be the one that the launch wants, the launch compiles by itself, and raises what there is to raise. A launch
waits for the compilation of its kernel that is running, for none that has not begun: the peers wait for the launch.

Triton compiles in threads itself (`AsyncCompileMode`), and so does Inductor where it tries templates out: each compilation
has its own MLIR context, and files of the cache appear whole. Four things are shared. Hashes of functions, those of
Triton's library too, are made under a lock of each function, taken from caller to callee, so there is no cycle. The driver
is made at its first use without a lock: `submit`'s caller has used it. What a kernel keeps for a device is made at its
first call, again without one: hence `exclusive`. And Triton 3.6 sets the process's filters of warnings for each node of a
kernel's source, which no two threads may do: `_launch.py` keeps it from doing so in this one.

The thread is an ordinary one, and ends when it has nothing to do: a daemon that the interpreter stops at its exit would be
in the middle of C++ code. A program that ends waits for the compilation that is running, and for no other.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

_log = logging.getLogger("symmpatterns")
_changed = threading.Condition()  # guards what follows
_tasks: collections.deque[tuple[Any, Callable[[], object]]] = collections.deque()  # kernel, what compiles it
_taken: dict[int, Any] = {}  # the kernel that a thread compiles, by the thread
_thread: threading.Thread | None = None


def submit(kernel: Any, task: Callable[[], object]) -> None:
    """Has the thread run `task`, which compiles `kernel`, behind the tasks before it."""
    global _thread
    with _changed:
        _tasks.append((kernel, task))
        if _thread is None:
            _thread = threading.Thread(target=_work, name="symmpatterns compilations")
            try:
                _thread.start()
            except RuntimeError:  # there can be no more threads
                _thread = None
                _tasks.clear()
                raise


def is_expected(kernel: Any) -> bool:
    """Whether a task that compiles `kernel` is running or waiting."""
    if _thread is None:
        return False
    with _changed:
        return _is_taken(kernel) or any(each is kernel for each, _ in _tasks)


@contextlib.contextmanager
def exclusive(kernel: Any) -> Iterator[None]:
    """Inside nobody else compiles `kernel`."""
    try:
        _take(kernel)
        yield
    finally:
        _let_go()


def is_background() -> bool:
    """Whether the caller is a task."""
    return threading.current_thread() is _thread


def _is_taken(kernel: Any) -> bool:
    return any(each is kernel for each in _taken.values())


def _take(kernel: Any) -> None:
    with _changed:
        while _is_taken(kernel):
            _changed.wait()
        _taken[threading.get_ident()] = kernel


def _let_go() -> None:
    with _changed:
        _taken.pop(threading.get_ident(), None)
        _changed.notify_all()


def _work() -> None:
    global _thread
    while True:
        with _changed:
            if _thread is not threading.current_thread():
                return
            if not _tasks or not threading.main_thread().is_alive():
                _tasks.clear()
                _thread = None
                return
            kernel, task = _tasks.popleft()
            _take(kernel)
        try:
            task()
        except BaseException:
            _log.debug("a kernel was not compiled in the background", exc_info=True)
        finally:
            del task  # what it holds may be freed while the next one waits
            _let_go()


def _forget() -> None:
    """In a process that was forked there is no such thread."""
    global _changed, _thread
    _changed, _thread = threading.Condition(), None
    _tasks.clear()
    _taken.clear()


os.register_at_fork(after_in_child=_forget)
