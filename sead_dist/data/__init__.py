"""Tasks, metrics, reading of files, splits and the order of rows.

Others use `TaskSpec`, `load_examples`, `BatchStream`.
"""
