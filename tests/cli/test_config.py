"""Options out of YAML files: a group's own, and the --config of train."""

from __future__ import annotations

import pytest

import command_support
from command_support import malmend
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.ledgers.watch import StopRule
from malmend.methods.ft import FineTuning
from malmend.models.trunk import TrunkSettings

tiny = command_support.tiny
cache = command_support.cache
reached = command_support.reached


@pytest.mark.parametrize(
    ("command", "group", "content", "wanted"),
    [
        ("edit m f --out p", "refine", "passes: 1", RefineSettings(passes=1)),
        ("edit m f --out p", "trunk", "batch_tokens: 9", TrunkSettings(batch_tokens=9)),
        ("eval m f", "trunk", "batch_tokens: 9", TrunkSettings(batch_tokens=9)),
        ("edit m f --out p --method ft", "ft", "epochs: 3", FineTuning(epochs=3)),
        ("train m f --out e", "network", "rank: 3", NetworkSettings(rank=3)),
        ("ledger init l m", "rule", "questions: 9", StopRule(questions=9)),
    ],
)
def test_a_group_may_be_a_file(command, group, content, wanted, reached, tmp_path):
    file = tmp_path / "group.yaml"
    file.write_text(content)
    given = reached(*command.split(), f"--{group}", file)
    found = vars(given["settings"]) if group == "network" else given
    assert found["method" if group == "ft" else group] == wanted


CONFIG = """\
facts_per_step: x
stepz: 3
network: {rank: a, bloks: 2}
descent:
  ratee: 3
  rate: y
model: [1]
ke: 3
trunk:
facts-per-step: 3
config: x
steps: 3
"""
FAULTS = """\
1: facts_per_step is 'x', expected a whole number
2: unknown field 'stepz'; did you mean 'steps'?
3: network.rank is 'a', expected a whole number
3: unknown field 'network.bloks'; did you mean 'network.blocks'?
5: descent has no setting 'ratee' (did you mean 'rate'?)
6: descent.rate is 'y', expected a number
7: model is '[1]', expected a text
8: ke is 3, expected its own fields by name: decay, end_of_answer, facts_per_step, floor, hidden, \
layers, margin, multiplier_rate, rate, save_every, seed, start, steps
9: trunk is empty, expected its own fields by name: batch_tokens, store_bytes
10: unknown field 'facts-per-step'; did you mean 'facts_per_step'?
11: unknown field 'config'; see malmend train --help
"""


def test_all_faults_of_a_config_file_are_said_at_once(tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(CONFIG)
    assert malmend("train", "m", "f", "--out", "e", "--config", config) == 2
    faults = [f"{config}:{line}" for line in FAULTS.splitlines()]
    said = f"malmend: {config} cannot be used: {len(faults)} faults"
    assert capsys.readouterr().err.splitlines() == [said, *faults]


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "steps"])
def test_a_config_file_without_names_is_refused(content, tmp_path, capsys):
    config = tmp_path / "train.yaml"
    config.write_text(content)
    assert malmend("train", "m", "f", "--out", "e", f"--config={config}") == 2
    said = f"malmend: {config} holds no options by name, expected such as 'steps: 80'"
    assert capsys.readouterr().err.startswith(said)
