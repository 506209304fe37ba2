"""Engine, loop, checkpoint and evaluation.

Others use `Engine`, `Trainer`, `Checkpointer`, `evaluate`.
"""
