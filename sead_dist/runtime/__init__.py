"""Ranks, heartbeat, files, run directories and the log.

Others use `World`, `join_world`, `RunLog`.
"""
