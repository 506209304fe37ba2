"""The run configuration: its fields, its files and its overrides.

Others use `load_config`, `RunConfig`, `SweepConfig`.
"""
