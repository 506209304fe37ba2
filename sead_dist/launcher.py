"""Jobs that were submitted before packages had their present places name `Launch` here. To go with
the next version."""

from sead_dist.slurm.submit import Launch

__all__ = ["Launch"]
