"""Versions of the rules that decide a student beside its settings and its data.

A run goes on under the rules that it began with, or not at all: a change of what a row, a start or
an input is raises the version.
"""

# Which rows make a global batch and a micro-batch (data/order.py).
# 1: batches sorted by length over the whole data.
ORDER_RULES = 2
# How a start becomes a student: which weights are new, how they are drawn (models/student.py).
# 2: the bias of a new head of scores began at 0.
START_RULES = 3
# What a model is fed (models/inputs.py).
# 1: padded on the right, with the ids and names that config and tokeniser happened to have.
INPUT_RULES = 2
# What `null` and `auto` stand for (config/automatic.py).
# 1: three epochs over all rows, 5e-5, the best checkpoint.
DEFAULT_RULES = 2
# Of the second stage of a method that has two (objectives/feature_losses.py).
# 1: its optimiser state is as old as the run.
STAGE_RULES = 2
# How rows are divided: which ones are tied, held out, sampled and left out as text
# (data/examples.py). They count only where they give a run other rows than it has read.
# 1: sentences that differ in blanks between words were two.
SPLIT_RULES = 2
# How a start is repaired (runs/repair.py).
REPAIR_RULES = 1
# Which rows no file of predictions answers (runs/requests.py).
# 1: a row counted as answered where a teacher had an answer that is not asked of it.
ANSWER_RULES = 2
