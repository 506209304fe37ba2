"""Settings of SLURM, submission and jobs."""
