"""``python -m symmpatterns``: a person's entry points. Each command's module is imported when it runs."""

from __future__ import annotations

import argparse
import sys

_SCRIPTS = {"demo": "examples/tp_mlp.py", "bench": "bench/bench_matmul_all_reduce.py", "tune": "bench/tune.py"}


def parser() -> argparse.ArgumentParser:
    """The command line, for `main` and for the tests."""
    top = argparse.ArgumentParser(
        prog="python -m symmpatterns", description="Collectives fused into the kernels around them, for torch.compile."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="command")

    doctor = commands.add_parser("doctor", help="what works on this machine, what does not, and what to do about it")
    doctor.add_argument("--verbose", action="store_true", help="show the tracebacks of failed trials")
    doctor.add_argument("--no-trial", action="store_true", help="do not start ranks to try the backends out (faster)")

    for name, what in (
        ("demo", "a tensor-parallel MLP, compiled with and without symmpatterns (examples/tp_mlp.py)"),
        ("bench", "fused matmul -> all-reduce against its alternatives (bench/bench_matmul_all_reduce.py)"),
        ("tune", "the quickest kernels of the GEMM families on these GPUs, for your tuning table (bench/tune.py)"),
    ):
        command = commands.add_parser(name, help=what, description=f"{what}; further options go to the script")
        command.add_argument("--ranks", type=int, default=2, help="processes to start (default: 2)")

    commands.add_parser("build-host", help="compile the native part for CPU tensors now instead of at its first use")
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    args, rest = parser().parse_known_args(argv)
    if rest and args.command not in _SCRIPTS:
        parser().error(f"unknown arguments: {' '.join(rest)}")
    if args.command == "doctor":
        from symmpatterns.cli import doctor

        return doctor.run(with_trial=not args.no_trial, verbose=args.verbose)
    if args.command == "build-host":
        from symmpatterns.cli import build_host

        return build_host.run()
    from symmpatterns.cli import launch

    return launch.run(_SCRIPTS[args.command], args.ranks, rest)


if __name__ == "__main__":
    sys.exit(main())
