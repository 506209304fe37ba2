"""The cost of a run before it starts.

Others use `plan`.
"""
