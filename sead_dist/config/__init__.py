"""The run configuration: its fields, its files and its overrides."""
