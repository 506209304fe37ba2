"""`python -m sead_dist`, for launchers."""

from sead_dist.cli.commands import main

main()
