"""Engine, loop, checkpoint and evaluation."""
