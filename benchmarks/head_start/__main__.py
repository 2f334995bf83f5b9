"""`python -m benchmarks.head_start`."""

from benchmarks.head_start.benchmark import main

main()
