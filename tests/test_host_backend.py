"""The host backend's memory: allocation, rendezvous between real processes, allocation scopes, death of a rank."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import signal
import threading
import time
import unittest

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem

from symmpatterns import config, host_backend, symmetric_memory
from symmpatterns.groups import DivergenceError, SymmetricMemoryError, SymmetricMemoryTimeout, get_group
from symmpatterns.symmetric_memory import empty, is_symmetric, rendezvous
from symmpatterns.testing import Died, run_ranks


def setUpModule() -> None:
    host_backend.build()  # before the ranks' time limits run


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def torch_api(rank: int, world_size: int) -> None:
    """torch's own functions on CPU tensors, with the group that init_process_group made."""
    host_backend.load().register_allocator()
    world = dist.group.WORLD
    tensor = symm_mem.empty(5, 3, dtype=torch.int64, device="cpu")
    if hasattr(symm_mem, "is_symm_mem_tensor"):  # torch 2.13 and newer
        assert symm_mem.is_symm_mem_tensor(tensor) and not symm_mem.is_symm_mem_tensor(torch.empty(1))
    assert symm_mem.get_backend("cpu") == "SYMMPATTERNS_HOST"
    handle = symm_mem.rendezvous(tensor, world)
    assert (handle.rank, handle.world_size, handle.offset) == (rank, world_size, 0)
    assert handle.signal_pad_size % 8 == 0 and all(pad % 8 == 0 for pad in handle.signal_pad_ptrs)
    tensor.fill_(rank)
    handle.barrier(channel=3)
    for peer in range(world_size):
        assert (handle.get_buffer(peer, (5, 3), torch.int64) == peer).all()
    handle.barrier(channel=3)
    for _ in range(100):  # each signal is taken before the next one can be put
        handle.put_signal((rank + 1) % world_size, 0, 5000)
        handle.wait_signal((rank - 1) % world_size, 0, 5000)
    handle.barrier(channel=1)
    dist.barrier()  # of another library: every rank has left ours
    assert all((handle.get_signal_pad(r, (64,)) == 0).all() for r in range(world_size))
    dist.barrier()
    assert symm_mem.rendezvous(tensor, world).buffer_ptrs == handle.buffer_ptrs
    assert symm_mem.rendezvous(tensor[2:], world).buffer_ptrs == handle.buffer_ptrs
    for bad in (10**6, -1):
        try:
            handle.barrier(channel=bad)
            raise AssertionError("a channel outside of the pad was accepted")
        except SymmetricMemoryError as error:
            assert "channel" in str(error)
    handle.barrier(channel=0)


def views_and_groups(rank: int, world_size: int) -> None:
    """Handles over views, over two groups at once, over a sub-group, and of an empty tensor."""
    base = empty((8, 6), dtype=torch.bfloat16)
    base.fill_(rank + 1)
    view = base[2:, ::2]
    whole = rendezvous(base)
    part = rendezvous(view)
    whole.barrier()
    for peer in range(world_size):
        assert part.buffers[peer].shape == (6, 3) and part.buffers[peer].stride() == (6, 2)
        assert (part.buffers[peer] == peer + 1).all()
    whole.barrier()
    part.buffers[(rank + 1) % world_size].fill_(-rank)
    whole.barrier()
    assert (view == -((rank - 1) % world_size)).all() and (base[:2] == rank + 1).all()
    pairs = [dist.new_group([r for r in range(world_size) if r % 2 == parity]) for parity in (0, 1)]
    mine = pairs[rank % 2]
    sub = rendezvous(base, mine)
    assert sub.world_size == dist.get_world_size(mine) and sub.rank == dist.get_rank(mine)
    base.fill_(10 * rank)
    sub.barrier()
    assert [int(b[0, 0]) for b in sub.buffers] == [10 * r for r in range(world_size) if r % 2 == rank % 2]
    sub.barrier()
    nothing = symm_mem.rendezvous(empty((0, 4)), dist.group.WORLD)
    assert nothing.get_buffer((rank + 1) % world_size, (0, 4), torch.float32).shape == (0, 4)
    nothing.barrier()


def different_sizes(rank: int, world_size: int) -> None:
    tensor = empty((1000 if rank == 1 else 10,), dtype=torch.uint8)
    group = get_group(None)
    group.rendezvous_name(torch.device("cpu"))
    for _ in range(2):
        try:
            symm_mem._SymmetricMemory.rendezvous(tensor, group.unique_name)
            raise AssertionError("memory of different sizes was accepted")
        except DivergenceError as error:
            assert "rank 0 has 10 bytes" in str(error) and "rank 1 has 1000 bytes" in str(error), error
    same = empty((7,))
    same.fill_(rank)  # the group works on after the error
    handle = rendezvous(same)
    handle.barrier()
    assert [float(b[0]) for b in handle.buffers] == list(range(world_size))
    handle.barrier()


def nobody_comes(rank: int, world_size: int) -> str:
    tensor = empty((4,))
    handle = rendezvous(tensor)
    handle.barrier()
    if rank == 1:
        time.sleep(3)
        return ""
    with config.patch(timeout_s=1.0):
        start = time.monotonic()
        for wait in (handle.barrier, lambda: rendezvous(empty((4,)))):
            try:
                wait()
                raise AssertionError("nobody came, and the wait ended well")
            except SymmetricMemoryTimeout as error:
                text = str(error)
        assert 1.9 < time.monotonic() - start < 2.4
        # Rank 1 has not counted what rank 0 gave up on, so nothing more is tried, and nobody waits again.
        for call in (lambda: rendezvous(empty((4,))), lambda: get_group(None).exchange("a call", "")):
            for _ in range(2):
                try:
                    call()
                except SymmetricMemoryError as error:
                    refused = error
            assert "group '0'" in str(refused) and "can no longer be used" in str(refused), refused
            assert not isinstance(refused, SymmetricMemoryTimeout)
        assert time.monotonic() - start < 3.6
    return text


def killed(rank: int, world_size: int) -> tuple[str, float]:
    """Rank 1 is killed; rank 0 learns it long before the timeout and still reads what rank 1 has written."""
    tensor = empty((1 << 26,), dtype=torch.uint8)
    tensor.fill_(rank + 1)
    handle = rendezvous(tensor)
    handle.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    try:
        handle.barrier()
    except SymmetricMemoryTimeout as error:
        assert int(handle.buffers[1][-1]) == 2
        return str(error), time.monotonic() - start
    raise AssertionError("the barrier ended although a rank is dead")


def no_growth(rank: int, world_size: int) -> None:
    backend = host_backend.load()
    keep = empty((3,))
    rendezvous(keep).barrier()
    before = ()
    for round in range(501):
        tensor = empty((1 + 997 * (round % 7),))
        handle = rendezvous(tensor)
        if round % 100 == 0:
            handle.barrier()
        if rank == round % world_size:
            tensor.zero_()
        del tensor, handle
        if round == 0:
            before = (backend.live_segments(), backend.mapped_bytes(), open_files())
    assert (backend.live_segments(), backend.mapped_bytes(), open_files()) == before, before
    with open("/proc/self/maps") as maps:
        assert sum("memfd:symmpatterns" in line for line in maps) == backend.live_segments() * world_size


def handle_outlives_tensor(rank: int, world_size: int) -> None:
    """torch's handle keeps the memory it names, own and peers', when the tensor is gone."""
    group = get_group(None)
    group.rendezvous_name(torch.device("cpu"))
    tensor = empty((16,))
    tensor.fill_(rank)
    handle = symm_mem._SymmetricMemory.rendezvous(tensor, group.unique_name)
    handle.barrier()
    del tensor
    gc.collect()
    handle.barrier()
    assert [float(handle.get_buffer(r, (16,), torch.float32)[5]) for r in range(world_size)] == list(range(world_size))
    handle.barrier()


def published_memory_is_not_used_again(rank: int, world_size: int) -> None:
    tensor = empty((5000,))
    tensor.fill_(rank)
    handle = rendezvous(tensor)
    handle.barrier()
    dist.barrier()
    if rank == 0:
        del tensor, handle
        gc.collect()
        tensors = [empty((5000,)).fill_(7) for _ in range(3)]
        dist.barrier()
        assert all((tensor == 7).all() for tensor in tensors)
    else:
        dist.barrier()
        assert (handle.buffers[0] == 0).all()  # what rank 0 has freed is still what it was


def interrupted(rank: int, world_size: int) -> float:
    handle = rendezvous(empty((1,)))
    handle.barrier()
    if rank == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        start = time.monotonic()
        try:
            handle.barrier()
        except KeyboardInterrupt:
            return time.monotonic() - start
        raise AssertionError("the signal was lost")
    time.sleep(1.5)
    return 0.0


class RendezvousTest(unittest.TestCase):
    def test_torch_api(self) -> None:
        for world_size in (2, 3):
            run_ranks(torch_api, world_size, timeout=60)

    def test_views_and_groups(self) -> None:
        run_ranks(views_and_groups, 4, timeout=60)

    def test_sizes_that_differ_are_an_error_on_every_rank(self) -> None:
        run_ranks(different_sizes, 3, timeout=60)

    def test_waits_are_bounded(self) -> None:
        text = run_ranks(nobody_comes, 2, timeout=60)[0]
        self.assertIn("rank 1", text)

    def test_killed_rank_is_noticed_and_leaves_nothing(self) -> None:
        before = sorted(os.listdir("/dev/shm"))
        (text, seconds), other = run_ranks(killed, 2, timeout=60, allow_death=True)
        self.assertEqual(other, Died(-signal.SIGKILL))
        self.assertRegex(text, r"barrier: rank 0 of group '.*' waited .* s for rank 1 .*its process \d+ has ended")
        self.assertLess(seconds, 2.0)
        left = [name for name in os.listdir("/dev/shm") if name not in before and "symm" in name]
        self.assertEqual(left, [])

    def test_files_and_memory_do_not_grow(self) -> None:
        run_ranks(no_growth, 2, timeout=120)

    def test_published_memory_is_not_used_again(self) -> None:
        run_ranks(published_memory_is_not_used_again, 2, timeout=60)

    def test_handle_outlives_the_tensor(self) -> None:
        run_ranks(handle_outlives_tensor, 2, timeout=60)

    def test_signals_interrupt_a_wait(self) -> None:
        self.assertLess(run_ranks(interrupted, 2, timeout=60)[0], 1.2)


class AllocationTest(unittest.TestCase):
    def setUp(self) -> None:
        gc.collect()
        self.backend = host_backend.load()
        self.live = self.backend.live_segments()

    def tearDown(self) -> None:
        gc.collect()
        self.assertEqual(self.backend.live_segments(), self.live)
        self.assertEqual(self.backend.native.scope_depth(), 0)

    def test_segments(self) -> None:
        tensor = empty((10, 10))
        address, size = self.backend.segment_of(tensor.data_ptr())  # type: ignore[misc]
        self.assertEqual((address, size), (tensor.data_ptr(), 400))
        self.assertEqual(self.backend.segment_of(tensor[9, 9:].data_ptr()), (address, size))
        self.assertIsNone(self.backend.segment_of(address + size))
        self.assertIsNone(self.backend.segment_of(address - 1))

    def test_freed_memory_is_used_again_unless_somebody_else_may_have_it(self) -> None:
        self.backend.trim()
        with symmetric_memory():
            address = torch.ones(1000).data_ptr()
            self.assertEqual(torch.empty(900).data_ptr(), address)  # as many pages
            self.assertNotEqual(torch.empty(9000).data_ptr(), address)
            tensor = torch.empty(950)
            self.assertEqual(tensor.data_ptr(), address)
            self.assertEqual(self.backend.segment_of(address), (address, 3800))
        # A fork shares the memory that exists: neither side may use it for something new.
        tensor.fill_(5)
        for parent_frees in (True, False):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                try:
                    if parent_frees:
                        os.read(read, 1)
                        os._exit(int(not bool((tensor == 5).all())))
                    del tensor
                    empty((950,)).fill_(9)
                    os._exit(0)
                finally:
                    os._exit(2)
            if parent_frees:
                del tensor
                replacement = empty((950,)).fill_(1)
                os.write(write, b"x")
            self.assertEqual(os.waitpid(child, 0)[1], 0)
            os.close(read)
            os.close(write)
            tensor = replacement
        self.assertTrue((tensor == 1).all())
        del tensor, replacement
        big = empty((200 << 20,), dtype=torch.uint8)  # more than is ever kept
        mapped = self.backend.mapped_bytes()
        del big
        self.assertLess(self.backend.mapped_bytes(), mapped - (200 << 20) + 1)
        self.backend.trim()
        small = self.backend.mapped_bytes()
        for _ in range(200):
            kept = [empty((1 << 20,), dtype=torch.uint8) for _ in range(3)]
        del kept
        self.assertLessEqual(self.backend.mapped_bytes(), small + (8 << 20))

    def test_too_much_memory_is_a_clean_error(self) -> None:
        for size in (1 << 44, 1 << 61):
            with self.assertRaisesRegex(SymmetricMemoryError, f"cannot allocate {size} bytes.*are available"):
                empty((size,), dtype=torch.uint8)
            with symmetric_memory(), self.assertRaisesRegex(RuntimeError, "cannot allocate"):
                torch.empty(size, dtype=torch.uint8)

    def test_scope_covers_every_operator_of_the_thread(self) -> None:
        outside = torch.ones(4, 4)

        @torch.library.custom_op("symmpatterns_test::twice", mutates_args=())
        def twice(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        elsewhere: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: elsewhere.append(torch.ones(5)))
        with symmetric_memory():
            made = [outside + 1, outside @ outside, torch.cat([outside, outside]), torch.tensor([1, 2]), twice(outside)]
            made += [outside.to(torch.bfloat16), outside.t().contiguous(), torch.nn.functional.relu(outside)]
            with symmetric_memory():
                made.append(outside.clone())
            made.append(outside.sum(0))
            thread.start()
            thread.join()
            view = outside[1:]
        self.assertTrue(all(is_symmetric(tensor) for tensor in made))
        self.assertFalse(any(map(is_symmetric, [outside, view, elsewhere[0], torch.ones(4)])))
        self.assertTrue(torch.equal(made[1], torch.full((4, 4), 4.0)))
        if hasattr(symm_mem, "is_symm_mem_tensor"):  # torch 2.13 and newer
            self.assertTrue(symm_mem.is_symm_mem_tensor(made[0]))

    def test_scope_ends_with_an_exception(self) -> None:
        with self.assertRaises(ZeroDivisionError), symmetric_memory():
            _ = 1 / 0
        self.assertFalse(is_symmetric(torch.ones(3)))
        with self.assertRaisesRegex(SymmetricMemoryError, "in no symmetric_memory"):
            self.backend.native.exit_scope()

    def test_tensors_of_a_scope_are_ordinary_otherwise(self) -> None:
        with symmetric_memory():
            tensor = torch.arange(6.0)
            nothing = torch.empty(0)
            big = torch.ones(1 << 22)
        self.assertEqual((nothing.numel(), float(big.sum())), (0, 1 << 22))
        self.assertTrue(torch.equal(pickle.loads(pickle.dumps(tensor)), tensor))
        self.assertTrue(torch.equal(copy.deepcopy(tensor), tensor))
        file = io.BytesIO()
        torch.save(tensor, file)
        self.assertTrue(torch.equal(torch.load(io.BytesIO(file.getvalue())), tensor))
        array = tensor.numpy()
        array[0] = 7
        self.assertEqual(float(tensor[0]), 7)
        again = torch.from_numpy(array)
        del array, tensor, big
        self.assertTrue(is_symmetric(again))
        self.assertEqual(again.tolist(), [7, 1, 2, 3, 4, 5])

    def test_resize(self) -> None:
        with symmetric_memory():
            inside = torch.arange(4.0)
            grown = torch.empty(0)
            grown.resize_(100).fill_(3)
        self.assertTrue(is_symmetric(grown))
        inside.resize_(10_000)  # outside of the scope it grows into ordinary memory
        self.assertFalse(is_symmetric(inside))
        self.assertEqual(inside[:4].tolist(), [0, 1, 2, 3])
        ordinary = torch.arange(4.0)
        with symmetric_memory():
            ordinary.resize_(1000)
        self.assertEqual(ordinary[:4].tolist(), [0, 1, 2, 3])

    def test_lazy_clones_and_shared_storages(self) -> None:
        with symmetric_memory():
            tensor = torch.arange(4.0)
        lazy = torch._lazy_clone(tensor)
        lazy += 1
        self.assertEqual((tensor.tolist(), lazy.tolist()), ([0, 1, 2, 3], [1, 2, 3, 4]))
        shared = tensor.clone().share_memory_()
        self.assertTrue(shared.is_shared())
        with symmetric_memory():
            moved = torch.arange(4.0)
        moved.share_memory_()  # replaces the storage
        self.assertEqual(moved.tolist(), [0, 1, 2, 3])

    def test_a_forked_child_frees_its_own_mapping_only(self) -> None:
        tensor = empty((1000,))
        tensor.fill_(1)
        child = os.fork()
        if child == 0:
            tensor.add_(1)  # the memory is shared
            del tensor
            os._exit(0)
        self.assertEqual(os.waitpid(child, 0)[1], 0)
        self.assertTrue((tensor == 2).all())

    def test_errors_before_there_is_a_group(self) -> None:
        with self.assertRaisesRegex(SymmetricMemoryError, "init_process_group"):
            rendezvous(empty((1,)))


if __name__ == "__main__":
    unittest.main()
