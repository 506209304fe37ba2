"""Ranks, heartbeat, files, run directories and the log."""
