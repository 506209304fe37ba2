"""What a run does from its configuration to its results.

Others use `distill`, `finetune`.
"""
