"""Tasks, metrics, reading of files, splits and the order of rows."""
