"""The prediction store: kept predictions of teachers."""
