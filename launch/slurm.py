"""`python launch/slurm.py ARGS` is `sead-dist submit ARGS`."""

import sys

from sead_dist.cli.commands import main

main(["submit", *sys.argv[1:]])
