"""Versions of the rules that determine a student together with its settings and data.

A run resumes only under the versions that it began with. So each change of such a rule raises its
version.
"""

# Which rows make a global batch and a micro-batch (data/order.py).
# Version 1: rows were sorted by length over the whole data, then cut into batches.
ORDER_RULES = 2
# How a start becomes a student: which weights are new, how they are drawn (models/student.py).
# Version 2: the bias of a new head of scores began at 0.
START_RULES = 3
# What a model is fed (models/inputs.py).
# Version 1: rows were padded on the right, with the ids and names of config and tokeniser as found.
INPUT_RULES = 2
# What `null` and `auto` stand for (config/automatic.py).
# Version 1: three epochs over all rows, 5e-5, the best checkpoint.
DEFAULT_RULES = 2
# How the second stage of a two-stage method begins (objectives/feature_losses.py).
# Version 1: it kept the optimiser state of the first stage.
STAGE_RULES = 2
# How rows are divided: which rows are tied together, held out, sampled, or left out of the text
# (data/examples.py). This version is compared only where a run would now read other rows.
# Version 1: sentences that differed only in the blanks between words counted as different.
SPLIT_RULES = 2
# How a start is repaired (runs/repair.py).
REPAIR_RULES = 1
# Which rows no file of predictions answers (runs/requests.py).
# Version 1: a row also counted as answered by a teacher that it does not need.
ANSWER_RULES = 2
