"""Compilations in a thread beside the program: one after the other, and launches wait for those of their kernel.

Inductor takes seconds to compile a graph, and Triton lets go of the interpreter's lock in nearly all of its own work, so
what is begun when a graph is known costs the program little time. A compilation only fills Triton's caches: should it
fail, or not be the one that the launch wants, the launch compiles by itself, and raises what there is to raise.

Triton compiles in threads itself (`AsyncCompileMode`), and so does Inductor where it tries templates out: each compilation
has its own MLIR context, and files of the cache appear whole. Three things are shared. Hashes of functions, those of
Triton's library too, are made under a lock of each function, taken from caller to callee, so there is no cycle. The driver
is made at its first use without a lock: `submit`'s caller has used it. And what a kernel keeps for a device is made at its
first call, again without one: launches of the kernel wait. What is set for one context (allocators, a mode of asynchronous
compilation) is not seen here.

The thread is an ordinary one, and ends when it has nothing to do: a daemon that the interpreter stops at its exit would be
in the middle of C++ code. A program that ends waits for the compilation that is running, and for no other.
"""

from __future__ import annotations

import collections
import logging
import os
import threading
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("symmpatterns")
_lock = threading.Lock()
_tasks: collections.deque[tuple[Callable[[], object], threading.Event]] = collections.deque()
_pending: dict[int, list[threading.Event]] = {}  # by id of the kernel: its hash would have Triton read its source
_thread: threading.Thread | None = None


def submit(kernel: Any, task: Callable[[], object]) -> None:
    """Has the thread run `task`, which compiles `kernel`, behind the tasks before it."""
    global _thread
    done = threading.Event()
    with _lock:
        if _thread is None:
            thread = threading.Thread(target=_work, name="symmpatterns compilations")
            thread.start()  # may raise; waits for the lock
            _thread = thread
        _tasks.append((task, done))
        _pending.setdefault(id(kernel), []).append(done)


def wait_for(kernel: Any) -> None:
    """Returns when what was submitted for `kernel` has ended."""
    pending = _pending.get(id(kernel))
    if pending is not None:
        for done in tuple(pending):
            done.wait()
        with _lock:
            if all(done.is_set() for done in pending):
                _pending.pop(id(kernel), None)


def _work() -> None:
    global _thread
    while True:
        with _lock:
            if not _tasks or not threading.main_thread().is_alive():
                while _tasks:
                    _tasks.popleft()[1].set()
                _thread = None
                return
            task, done = _tasks.popleft()
        try:
            task()
        except BaseException:
            _log.debug("a kernel was not compiled in the background", exc_info=True)
        finally:
            del task  # what it holds may be freed while the next one waits
            done.set()


def _forget() -> None:
    """In a process that was forked there is no such thread."""
    global _lock, _thread
    _lock, _thread = threading.Lock(), None
    _tasks.clear()
    _pending.clear()


os.register_at_fork(after_in_child=_forget)
