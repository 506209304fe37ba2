"""Model card, plots and tables of a run.

Others use `read_run`, `write_report`.
"""
