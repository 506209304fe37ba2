"""Settings of SLURM, submission and jobs.

Others use `SlurmSettings`, `Launch`, `enqueue`.
"""
