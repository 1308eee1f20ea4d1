"""Process groups as the library sees them: who the members are, whether they share a host, and how they agree.

A `Group` is looked up by name and follows the process group of that name: destroying and re-creating the process group
gives a new `Group`. `Group.exchange` is the one place where ranks talk through the group's store; every exchange
carries what it is about, so ranks that diverge get an error that says how instead of a hang.
"""

from __future__ import annotations

import functools
import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from symmpatterns import compat, config

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SymmetricMemoryError(RuntimeError):
    """Symmetric memory could not be set up or used; the text says what was wrong and what to do."""


class SymmetricMemoryTimeout(SymmetricMemoryError):
    """A peer did not arrive within ``config.timeout_s``."""


class DivergenceError(SymmetricMemoryError):
    """The ranks of a group did different things at the same point of the program."""


_SHORTEST_NAP_S, _LONGEST_NAP_S, _LOOK_EVERY_S = 0.0001, 0.02, 0.1


Watch = Callable[[str, Callable[[int], bool]], None]


class Group:
    """One process group: `name`, `rank` and `world_size` within it, and exchanges with the other members."""

    def __init__(self, name: str, pg: ProcessGroup, generation: int) -> None:
        self.name = name
        self.pg = pg
        self.rank: int = pg.rank()
        self.world_size: int = pg.size()
        self.is_fake = compat.is_fake_group(pg)
        # Names are reused when a group is destroyed and made again, and torch caches its rendezvous information by
        # name; all ranks count the generations of a name alike because they run the same program.
        self.unique_name = f"symmpatterns/{name}/{generation}"
        self._sequence = 0
        self._broken: str | None = None  # why an exchange of this rank did not come to its end
        self._processes: list[str] = []  # of every rank, once there was an exchange
        self._lock = threading.Lock()
        # Held while what belongs to the group is made, which is collective: other groups must not wait for it.
        self.making = threading.RLock()
        self._registered = False

    def exchange(self, what: str, payload: str, watch: Watch | None = None) -> list[str]:
        """Every rank's `payload`, in rank order; collective, blocking, not for the hot path.

        ``watch(what, is_here)`` is called now and then while this rank waits, to raise when it sees that a rank will
        not come; ``is_here(rank)`` says whether that one has come.

        Raises DivergenceError on every rank when the ranks are not exchanging the same `what`, SymmetricMemoryTimeout
        when a rank does not come within ``config.timeout_s`` or its process is seen to have ended, SymmetricMemoryError
        when the store cannot be reached, and at once after an exchange that this rank has not finished: the ranks no
        longer count alike.
        """
        if self.world_size == 1:
            return [payload]
        with self._lock:
            if self._broken is not None:
                raise SymmetricMemoryError(
                    f"{what}: group {self.name!r} can no longer be used after an earlier failure: {self._broken}"
                )
            number = self._sequence
            self._sequence += 1
            store = compat.group_store(self.pg)

            def key(rank: int, n: int = number) -> str:
                return f"{self.unique_name}/{n}/{rank}"

            answers = []
            try:
                store.set(key(self.rank), f"{what}\n{process_identity()}\n{payload}")
                # Whoever is in exchange n has finished n - 1, so every rank had entered n - 1 and had read n - 2.
                if number >= 2:
                    store.delete_key(key(self.rank, number - 2))

                def is_here(rank: int) -> bool:
                    return store.check([key(rank)])

                for rank in range(self.world_size):
                    self._await(rank, is_here, what, watch)
                    answers.append(bytes(store.get(key(rank))).decode().split("\n", 2))
            except SymmetricMemoryError as error:
                self._broken = str(error)
                raise
            except RuntimeError as error:  # torch's DistError and what its stores raise besides
                self._broken = (
                    f"{what}: the store of group {self.name!r} cannot be reached; has the process that keeps it, often "
                    f"that of rank 0, ended? ({error})"
                )
                raise SymmetricMemoryError(self._broken) from error
            except BaseException as error:  # of a signal's handler, such as KeyboardInterrupt
                self._broken = f"{type(error).__name__} ended {what!r}"
                raise
            self._processes = [process for _, process, _ in answers]
        if len({doing for doing, _, _ in answers}) > 1:
            each = "; ".join(f"rank {rank}: {doing}" for rank, (doing, _, _) in enumerate(answers))
            raise DivergenceError(
                f"the ranks of group {self.name!r} took different paths: {each}. Every rank has to run the same "
                "operators in the same order"
            )
        return [text for _, _, text in answers]

    def _await(self, rank: int, is_here: Callable[[int], bool], what: str, watch: Watch | None) -> None:
        """Polls, because Store.wait neither handles signals nor notices that a process has ended."""
        began = looked = time.monotonic()
        nap = _SHORTEST_NAP_S
        while not is_here(rank):
            now = time.monotonic()
            ended = False
            if now - looked > _LOOK_EVERY_S:
                looked = now
                # Looked at once more: the last thing that it did may have been to come.
                ended = self.has_ended(rank) and not is_here(rank)
                if watch is not None:
                    watch(what, is_here)
            if ended or now - began > config.timeout_s:
                why = (
                    f"process {self._processes[rank].split()[0]} has ended"
                    if ended
                    else ("it died, hangs, or took another path; config.timeout_s is the limit")
                )
                raise SymmetricMemoryTimeout(
                    f"rank {rank} of group {self.name!r} did not reach {what!r} within {now - began:.3g} s (this is rank "
                    f"{self.rank} of {self.world_size}): {why}"
                )
            time.sleep(nap)
            nap = min(2 * nap, _LONGEST_NAP_S)

    def has_ended(self, rank: int) -> bool:
        """Whether the process of that rank is known to have ended."""
        return bool(self._processes) and has_ended(self._processes[rank])

    def waited_for(self, rank: int) -> str:
        """The end of a sentence about a wait for that rank that took ``config.timeout_s``."""
        state = "has ended" if self.has_ended(rank) else "is alive"
        return f"waited {float(config.timeout_s):g} s (config.timeout_s); its process {state}"

    def agree(self, what: str, fields: dict[str, object], watch: Watch | None = None) -> None:
        """Raises DivergenceError on every rank unless all ranks pass equal `fields`; names ranks and fields."""
        mine = {name: str(value) for name, value in fields.items()}
        answers = self.exchange(what, "\n".join(f"{name}={value}" for name, value in mine.items()), watch)
        if len(set(answers)) == 1:
            return
        tables = [dict(line.split("=", 1) for line in answer.splitlines()) for answer in answers]
        differences = []
        for name in dict.fromkeys(name for table in tables for name in table):
            values = [table.get(name, "missing") for table in tables]
            if len(set(values)) > 1:
                differences.append(f"{name}: " + ", ".join(f"rank {r} has {v}" for r, v in enumerate(values)))
        raise DivergenceError(
            f"the ranks of group {self.name!r} disagree on {what}: {'; '.join(differences)}. Make the ranks compile and "
            "run the same program with the same configuration and versions"
        )

    def rendezvous_name(self, device: torch.device) -> str:
        """The name under which torch's symmetric memory knows this group; not collective.

        The CUDA backend looks the process group up by its own name. The host backend asks for the store of a name, and
        torch keeps that for good: a group that is made again under an old name needs a new one.
        """
        if device.type == "cuda":
            return self.name
        if not self._registered:
            store = torch.distributed.PrefixStore(self.unique_name + "/rendezvous", compat.group_store(self.pg))
            compat.symm_mem_class().set_group_info(self.unique_name, self.rank, self.world_size, store)
            self._registered = True
        return self.unique_name


_groups: dict[str, Group] = {}
_generations: dict[str, int] = {}
_groups_lock = threading.Lock()


def get_group(group: str | ProcessGroup | None) -> Group:
    """The `Group` of a process group, of its name, or of the default group (None).

    Raises SymmetricMemoryError when torch.distributed is not initialised or there is no such group, TypeError for
    anything that is not a group.
    """
    if not torch.distributed.is_initialized():
        raise SymmetricMemoryError(
            "no process group: call torch.distributed.init_process_group() before using symmetric memory"
        )
    if group is None:
        group = torch.distributed.group.WORLD
    if not isinstance(group, (str, torch.distributed.ProcessGroup)):
        if group is torch.distributed.GroupMember.NON_GROUP_MEMBER:
            raise TypeError("this process is not in that group, so new_group has given it no ProcessGroup")
        raise TypeError(f"a group is a ProcessGroup or its name, not {type(group).__name__}")
    name = group if isinstance(group, str) else group.group_name
    try:
        pg = compat.resolve_process_group(name)
    except (RuntimeError, KeyError, LookupError, ValueError) as error:
        raise SymmetricMemoryError(
            f"there is no process group named {name!r} in this process (pass ProcessGroup.group_name)"
        ) from error
    with _groups_lock:
        known = _groups.get(name)
        if known is None or known.pg is not pg:
            live = compat.live_groups()
            for dead in [other for other, group in _groups.items() if group.pg not in live]:
                del _groups[dead]  # it would keep the process group's sockets
            _generations[name] = _generations.get(name, -1) + 1
            known = _groups[name] = Group(name, pg, _generations[name])
        return known


_aliases: dict[str, str] = {}


def register_group_name(name: str, group: str | ProcessGroup) -> None:
    """Tells which process group a host program means by a name of its own, such as vLLM's "tp:0".

    Names that vLLM has registered itself need not be told. Raises TypeError for a name that is no text or a group that is
    none, SymmetricMemoryError when there is no such process group.
    """
    if not isinstance(name, str):
        raise TypeError(f"a group's name is a text, not {type(name).__name__}")
    _aliases[name] = get_group(group).name


def resolve_name(name: object) -> str:
    """The process group's own name behind a name that a host program uses; raises SymmetricMemoryError for unknown ones."""
    if isinstance(name, str):
        known = _aliases.get(name) or compat.vllm_groups().get(name)
        if known is not None:
            return known
        try:
            return get_group(name).name
        except SymmetricMemoryError:
            pass
    raise SymmetricMemoryError(
        f"{name!r} is no process group's name, and nobody said which group it means: call "
        f"symmpatterns.register_group_name({name!r}, group)"
    )


def names() -> str:
    """This rank's groups, and every name that means one of them, as text: part of the cache key of compiled graphs.

    torch's own key of a graph with DTensors is the same on all ranks of a mesh, and a graph says its groups by name, which
    in a mesh of two dimensions are others on every rank.
    """
    aliases = ",".join(f"{name}={group}" for name, group in sorted({**compat.vllm_groups(), **_aliases}.items()))
    return f"{aliases};{','.join(sorted(compat.group_names()))}"


def is_alive(group: Group) -> bool:
    """Whether the process group that `group` follows still exists."""
    try:
        return get_group(group.name) is group
    except SymmetricMemoryError:
        return False


@functools.lru_cache(maxsize=1)
def host_identity() -> str:
    """A text that is equal in two processes only if they can map each other's memory (same boot, same PID namespace)."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()
    return hashlib.sha256(f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}".encode()).hexdigest()[:16]


def process_identity() -> str:
    """This process: its number, when it was started (numbers are used again), and its host."""
    return f"{os.getpid()} {_start_time(os.getpid())} {host_identity()}"


def has_ended(process: str) -> bool:
    """Whether the process of that identity is known to have ended; False for one of another host."""
    pid, started, host = process.split()
    return host == host_identity() and _start_time(int(pid)) != started


def _start_time(pid: int) -> str:
    """When a process was started, in ticks since the host was; "" when it has ended or waits for its parent to notice."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def topology() -> str:
    """What the environment says about which ranks share a host: part of the cache key of compiled graphs."""
    return ",".join(f"{name}={os.environ.get(name, '')}" for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR"))


def shares_one_host(group: Group) -> bool | None:
    """Whether all ranks of `group` run on one host, decided without communication and alike on every rank.

    torchrun gives every node LOCAL_WORLD_SIZE consecutive ranks. Without it the address of the store decides: a
    loopback address can only be reached from one host. None when neither says.
    """
    if group.is_fake:
        return True
    local = os.environ.get("LOCAL_WORLD_SIZE", "")
    if local.isdigit() and int(local) > 0:
        return len({rank // int(local) for rank in compat.global_ranks(group.pg)}) == 1
    address = os.environ.get("MASTER_ADDR")
    if address is None or address in ("localhost", "::1") or address.startswith("127."):
        return True
    try:
        if socket.gethostbyname(address).startswith("127."):
            return True
    except OSError:
        pass
    return None
