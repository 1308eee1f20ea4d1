"""No suite forgets a family: what each has a case for is what symmpatterns/patterns has."""

from __future__ import annotations

import unittest

import torch

from tests import fault_matrix, programs, test_stress
from tests.families import FAMILIES, PROGRAMS

# Those whose operator stands for the collective itself; the others leave it to the operators of peer views and pools.
WITH_OPERATORS = [family for family in FAMILIES if hasattr(torch.ops.symmpatterns, family)]


class FamiliesTest(unittest.TestCase):
    def test_every_suite_has_every_family(self) -> None:
        for suite, has in {
            "a program each (leaks, equal bits)": PROGRAMS,
            "the fault matrix": fault_matrix.FAMILIES,
            "the stress test": test_stress.EAGER,
            "generated programs": programs.TAKEN_BY,
        }.items():
            with self.subTest(suite):
                self.assertEqual(set(has), set(FAMILIES))

    def test_generated_programs_can_draw_them(self) -> None:
        self.assertLessEqual(set(programs.TAKEN_BY.values()), set(programs.ALL_COLLECTIVES[False]))

    def test_kernels(self) -> None:
        """Every family with an operator has Triton kernels, and its faults are tried with them."""
        self.assertEqual(set(fault_matrix.OF_KERNELS["triton"]), set(WITH_OPERATORS))
