"""Names of what can be registered: those of the configuration are those of the code."""

import subprocess
import sys

from source_text import comparisons

from sead_dist.config.registered import BUILT_IN, NO_ENSEMBLE
from sead_dist.data.kinds import KINDS
from sead_dist.objectives.losses import HARD_LOSSES, SOFT_LOSSES
from sead_dist.objectives.weightings import WEIGHTINGS


def test_built_in_names_are_those_that_the_code_has():
    assert set(BUILT_IN["loss"]) <= set(SOFT_LOSSES)
    assert set(BUILT_IN["hard loss"]) == set(HARD_LOSSES)
    assert set(BUILT_IN["ensemble"]) - {NO_ENSEMBLE} <= set(WEIGHTINGS)
    assert set(BUILT_IN["kind of task"]) <= set(KINDS)


def test_names_are_checked_without_torch():
    code = """
import sys
from sead_dist.config.load import load_config
from sead_dist.errors import UserError

for word in ("loss=mse", "ensemble=answers", "teachers=[{kind: model, path: a}]"):
    load_config(["task=sst2", "output_dir=unused", word])
try:
    load_config(["task=sst2", "output_dir=unused", "ensemble=best"])
except UserError as error:
    print(error)
assert not {"torch", "transformers"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ensemble='best': input should be 'none', 'single', 'mean_logits'" in done.stdout


def test_no_file_asks_for_the_name_of_an_ensemble():
    assert list(comparisons(BUILT_IN["ensemble"], attribute="ensemble")) == []
