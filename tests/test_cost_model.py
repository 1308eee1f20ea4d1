"""The cost model: measured points where there are any, a bound elsewhere, and the same answer on every rank."""

from __future__ import annotations

import unittest
from unittest import mock

import torch
from parameterized import parameterized

import symmpatterns
from symmpatterns import cost_model, tables

POINTS = [
    {"family": "matmul_all_reduce", "device": "GPU", "world_size": 2, "launch": launch, "dtype": "bfloat16",
     "size": size, "fused_us": fused, "best_other_us": other}
    for launch, size, fused, other in (
        ("graph", [16, 8192, 4096], 20.0, 25.0),
        ("graph", [512, 8192, 4096], 90.0, 80.0),
        ("eager", [16, 8192, 4096], 60.0, 30.0),
        ("eager", [512, 8192, 4096], 81.0, 80.0),
    )
]  # fmt: skip


class CostModelTest(unittest.TestCase):
    points = POINTS

    def verdict(
        self,
        m: int,
        n: int = 8192,
        k: int = 4096,
        *,
        graphs: bool = True,
        world_size: int = 2,
        family: str = "matmul_all_reduce",
    ) -> cost_model.Verdict:
        with (
            mock.patch.object(tables, "_shipped", lambda kind: self.points),
            mock.patch.object(torch.cuda, "get_device_name", lambda device: "GPU"),
            symmpatterns.config.patch(cuda_graphs=graphs),
        ):
            arguments = (m, n, k, torch.bfloat16, world_size, torch.device("cuda", 0))
            return cost_model.matmul_collective(family, *arguments)

    @parameterized.expand(
        [
            ("at a point", 16, {}, True, "measured at 16x8192x4096 \\(graph launches\\): 20 us fused, 25 us apart"),
            ("near a point", 24, {}, True, "measured at 16x8192x4096"),
            ("near a slow point", 700, {}, False, "90 us fused, 80 us apart"),
            ("launched from Python", 16, {"graphs": False}, False, "eager launches"),
            ("within tolerance", 512, {"graphs": False}, True, "81 us fused, 80 us apart"),
            ("far from all", 16, {"n": 64, "k": 64}, True, "estimated"),
            ("another world size", 16, {"world_size": 8}, True, "estimated"),
        ]
    )
    def test_measured(self, _: str, m: int, options: dict, fuse: bool, why: str) -> None:
        verdict = self.verdict(m, **options)
        self.assertRegex(verdict.why, why)
        self.assertEqual(verdict.fuse, fuse)

    @parameterized.expand([("eager", 95.0, False), ("eager", 85.0, True), ("graph", 95.0, True)])
    def test_a_gather_that_the_host_launches_has_to_be_clearly_quicker(
        self, launch: str, fused: float, fuse: bool
    ) -> None:
        point = {**POINTS[0], "launch": launch, "fused_us": fused, "best_other_us": 100.0}
        for family, expected in (("all_gather_matmul", fuse), ("matmul_all_reduce", True)):
            with mock.patch.object(self.__class__, "points", [{**point, "family": family}]):
                self.assertEqual(self.verdict(16, graphs=launch == "graph", family=family).fuse, expected)

    @parameterized.expand([(3, 80.0, False), (4, 80.0, False), (8, 80.0, False), (2, 25.0, True)])
    def test_more_than_two_ranks_are_taken_for_four(self, world_size: int, other: float, fuse: bool) -> None:
        four = {**POINTS[0], "world_size": 4, "fused_us": 90.0, "best_other_us": 80.0}
        with mock.patch.object(self.__class__, "points", [*POINTS, four]):
            verdict = self.verdict(16, world_size=world_size)
        self.assertRegex(verdict.why, f"measured .* {other:g} us apart")
        self.assertEqual(verdict.fuse, fuse)

    fewest = 1  # rows of which a norm was measured

    def norm_is_better(
        self, m: int, n: int = 8192, k: int = 4096, world_size: int = 2, graphs: bool = True
    ) -> cost_model.Verdict:
        parts = [
            {**POINTS[0], "size": [m, 8192, 4096], "fused_us": fused, "alone_us": alone}
            for m, fused, alone in ((1, 22.3, 18.4), (64, 26.6, 19.1), (4096, 487.0, 357.0))
        ]
        parts += [
            {**POINTS[0], "size": size, "fused_us": fused, "alone_us": alone}
            for size, fused, alone in (
                ([16, 8192, 14336], 60.6, 58.4),
                ([16, 4096, 4096], 15.0, 8.4),
                ([16, 16384, 4096], 40.0, 30.0),
            )
        ]
        norms = [
            {
                **POINTS[0],
                "family": "all_reduce_rms_norm",
                "size": [m, 8192, 1],
                "fused_us": fused,
                "best_other_us": other,
            }
            for m, fused, other in ((1, 5.5, 7.2), (8, 5.7, 7.5), (64, 9.2, 10.3), (4096, 276.0, 261.0))
            if m >= self.fewest
        ]
        with (
            mock.patch.object(tables, "_shipped", lambda kind: [*parts, *norms]),
            mock.patch.object(torch.cuda, "get_device_name", lambda device: "GPU"),
            symmpatterns.config.patch(cuda_graphs=graphs),
        ):
            gpu, bfloat16 = torch.device("cuda", 0), torch.bfloat16
            return cost_model.norm_is_better(m, n, k, bfloat16, world_size, gpu, bfloat16)

    def test_a_collective_is_fused_with_the_norm_behind_it_where_that_saves_more(self) -> None:
        """18.4 us for the product and 4.4 for collective and norm, against 22.3 for product and collective and 2.2 for the
        norm."""
        verdict = self.norm_is_better(1)
        self.assertTrue(verdict.fuse)
        self.assertRegex(verdict.why, "1x8192x4096 .* 22.8 us, and 24.5 us with the matmul fused")
        self.assertTrue(self.norm_is_better(64).fuse)

    def test_fewer_rows_than_were_measured_count_as_the_fewest(self) -> None:
        with mock.patch.object(self, "fewest", 8):
            self.assertRegex(self.norm_is_better(1).why, "1x8192x4096 .* 23.0 us, and 24.5 us")

    def test_layers_of_many_rows_were_not_measured(self) -> None:
        verdict = self.norm_is_better(4097)
        self.assertFalse(verdict.fuse)
        self.assertIn("more than 4096 rows", verdict.why)

    def test_only_a_product_of_much_the_same_size_decides(self) -> None:
        self.assertTrue(self.norm_is_better(128).fuse)
        self.assertTrue(self.norm_is_better(64, k=8192).fuse)
        for verdict in (self.norm_is_better(129), self.norm_is_better(128, k=4097)):
            self.assertIn("no such product", verdict.why)

    def test_rows_of_other_columns_count_by_their_bytes(self) -> None:
        verdict = self.norm_is_better(16, n=4096)  # as 8 of 8192: 5.7 us
        self.assertTrue(verdict.fuse)
        self.assertRegex(verdict.why, "16x4096x4096 .* 13.0 us, and 17.2 us")
        self.assertIn("no norm of 16x16384", self.norm_is_better(16, n=16384).why)

    def test_a_long_product_hides_the_transfer_and_keeps_the_collective(self) -> None:
        between = self.norm_is_better(16, k=14336)  # 16 rows of a norm: between 8 and 64
        self.assertFalse(between.fuse)
        self.assertRegex(between.why, "16x8192x14336 .* 63.5 us, and 62.8 us")

    def test_what_was_not_measured_stays_with_the_matmul(self) -> None:
        for verdict in (
            self.norm_is_better(1, graphs=False),
            self.norm_is_better(1, world_size=4),
            self.norm_is_better(1, k=64),
        ):
            self.assertFalse(verdict.fuse, verdict.why)

    def test_float16_uses_what_was_measured_in_bfloat16(self) -> None:
        with (
            mock.patch.object(tables, "_shipped", lambda kind: POINTS),
            mock.patch.object(torch.cuda, "get_device_name", lambda device: "GPU"),
            symmpatterns.config.patch(cuda_graphs=True),
        ):
            point = cost_model._nearest("matmul_all_reduce", 16, 8192, 4096, torch.float16, 2, torch.device("cuda", 0))
        self.assertEqual(point, POINTS[0])

    def test_the_nearest_of_a_gpu_and_of_one_with_the_same_processor(self) -> None:
        here, there = "NVIDIA H200", "NVIDIA H100 80GB HBM3"
        entries = [
            {**POINTS[0], "device": device, "size": [m, 8192, 4096]}
            for device, m in ((here, 16), (there, 64), (here, 64))
        ]

        def found(m: int, device: str = here) -> tuple[str, int] | None:
            with mock.patch.object(tables, "_shipped", lambda kind: entries):
                near = tables.nearest("measured", "matmul_all_reduce", (m, 8192, 4096), torch.bfloat16, device)
            return (near["device"], near["size"][0]) if near else None

        self.assertEqual(found(64), (here, 64), "equally near: its own")
        self.assertEqual(found(16, there), (here, 16), "nearer than its own")
        self.assertEqual(found(32), (here, 64), "equally near and its own: the larger")
        self.assertEqual(found(256), (here, 64))
        self.assertIsNone(found(257))
        self.assertIsNone(found(64, "NVIDIA A100"))

    def test_the_table_that_ships_is_well_formed(self) -> None:
        points = tables._shipped("measured")
        self.assertTrue(any(p["device"] == "NVIDIA H200" and p["world_size"] == 2 for p in points))
        for point in points:
            self.assertEqual(set(point) - {"alone_us"}, set(POINTS[0]))
            self.assertGreater(min(point["fused_us"], point["best_other_us"], *point["size"]), 0)
