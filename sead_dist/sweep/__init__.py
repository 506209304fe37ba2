"""Grids of runs and their report.

Others use `run_sweep`.
"""
