"""`python -m worker.cli`, the same as `clerk-sync`."""

from worker.cli import main

main()
