"""Everything that is wrong with a plan is said at once, with its line."""

from __future__ import annotations

import re

import pytest

from malmend.bench.plan import Plan, read_plan
from malmend.errors import MalmendError


def faults_of(tmp_path, text: str) -> list[str]:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(MalmendError) as caught:
        read_plan(path)
    return str(caught.value).replace(f"{tmp_path}/", "").split("\n")


def test_all_faults_are_said_in_order_with_their_lines(tmp_path):
    """One was said per run, and a number was quoted as if it were a text."""
    text = """\
facts: 3
sizs: [4]
methods:
  ft: {epoch: 2, rate: x}
  one solve: {passes: 1.5}
  malmen: {}
sizes: [1, 2,
  x, 0]
seeds: []
protocols: [allone, together]
decode: 1.5
"""
    head, *faults = faults_of(tmp_path, text)
    assert head == "The plan plan.yaml cannot be used: 11 faults"
    for fault, said in zip(
        faults,
        (
            "plan.yaml: models is missing; give a list of models' names",
            "plan.yaml:1: facts is 3, expected a text",
            "plan.yaml:2: unknown field 'sizs'; did you mean 'sizes'?",
            "plan.yaml:4: method 'ft' has no setting 'epoch'; did you mean 'epochs'?",
            "plan.yaml:4: method 'ft' cannot be made: rate is 'x', expected a number",
            "plan.yaml:5: method 'one solve' cannot be made: passes is 1.5, expected",
            "plan.yaml:8: sizes[3] is 'x', expected a whole number of at least 1",
            "plan.yaml:8: sizes[4] is 0, expected a whole number of at least 1",
            "plan.yaml:9: seeds is empty; give a list of whole numbers",
            "plan.yaml:10: protocols[1] is 'allone'; did you mean 'alone'? expected 'together'",
            "plan.yaml:11: decode is 1.5, expected a whole number of at least 0",
        ),
        strict=True,
    ):
        assert fault.startswith(said)


def test_what_is_listed_twice_and_empty_texts_are_faults(tmp_path):
    """A size that was there twice made no cell more, and an empty text was a path."""
    text = """\
models: [a, ""]
facts: ""
methods: [ft]
sizes: [4, 8, 4]
seeds: [1, 1]
text: ""
"""
    assert faults_of(tmp_path, text) == [
        "The plan plan.yaml cannot be used: 5 faults",
        "plan.yaml:1: models[2] is an empty text; give one, or leave it out",
        "plan.yaml:2: facts is an empty text; give one",
        "plan.yaml:4: sizes[3] is 4, as sizes[1] is; leave one out",
        "plan.yaml:5: seeds[2] is 1, as seeds[1] is; leave one out",
        "plan.yaml:6: text is an empty text; give one, or leave the field out",
    ]


def test_a_folder_is_no_plan(tmp_path):
    said = rf"^There is no plan {tmp_path} to be read \(Is a directory\); give a YAML file.$"
    with pytest.raises(MalmendError, match=said):
        read_plan(tmp_path)


def test_every_fault_ends_alike_with_what_to_do(tmp_path):
    """Some ended in a full stop and some did not, and half of them said what to do."""
    text = """\
facts: 3
q: 1
methods:
  one solve: {passes: 1.5}
  mine: {class: "nosuch:M"}
  foo: {}
  foo and more: 3
  enn: {}
  big: {most: x}
  ft: {epochs: 0}
  malmen: {editor: x, form: residual}
  memit: {editor: y}
  bar: {method: memmit}
  lora: {rank:}
sizes: [1, x, 0]
protocols: [allone]
seeds: []
decode: 1.5
text:
"""
    head, *faults = faults_of(tmp_path, text)
    assert head == "The plan plan.yaml cannot be used: 20 faults"
    for fault in faults:
        assert not fault.endswith(".")
        assert "The plan's" not in fault  # its name stands in front
        assert re.search(r"[;?.] (give|correct|valid|say|run|leave|It has|did|Under)", fault), fault
    for said in (
        "plan.yaml: models is missing; give a list of models' names, folders or GGUF files",
        "plan.yaml:1: facts is 3, expected a text; give one",
        "plan.yaml:10: method 'ft': ft.epochs is 0, expected 1 or more; correct it, or leave it "
        "out",
        "plan.yaml:15: sizes[2] is 'x', expected a whole number of at least 1; give one, or leave "
        "it out",
        "plan.yaml:17: seeds is empty; give a list of whole numbers, or leave the field out",
    ):
        assert said in faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("methods: {malmen: {}, malmen: {passes: 1}}", "1: the field 'malmen' is there twice, fir"),
        ("models: [a]\nmodels: [b]", "2: the field 'models' is there twice, first on line 1; keep"),
        ("methods: {1: {method: ft}, '1': {}}", "1: the field '1' is there twice, first on line 1"),
        ("methods:\n- ft: {rate: 1,\n   rate: 2}", "3: the field 'rate' is there twice, first on"),
        ("a: [", "1: is no YAML (expected the node content, but found '<stream end>', column 5); "),
        (
            "a: {b: c",
            "1: is no YAML (expected ',' or '}', but got '<stream end>', column 9); correct it ",
        ),
        (
            "a: 1\nb: \x07",
            "2: is no YAML (special characters are not allowed, column 4); correct it there",
        ),
        ("a: 1\nb: *c", "2: is no YAML (found undefined alias 'c', column 4); correct it there"),
        (
            "a: !b c",
            "1: is no YAML (could not determine a constructor for the tag '!b', column 4); cor",
        ),
    ],
)
def test_what_yaml_would_drop_and_what_is_none(text, said, tmp_path):
    """Of a name that was there twice the first was dropped without a word."""
    (fault,) = faults_of(tmp_path, text)
    assert fault.startswith(f"plan.yaml:{said}")


def test_a_date_that_is_none_and_what_nests_too_deeply(tmp_path):
    for text in ("a: 2001-99-99", "[" * 5000):
        (fault,) = faults_of(tmp_path, text)
        assert fault.startswith("plan.yaml: is no YAML (")
        assert fault.endswith("); correct the file")


def test_a_name_that_is_given_twice_in_a_list(tmp_path):
    head, fault = faults_of(tmp_path, "models: [a]\nfacts: f\nmethods: [ft, ft]")
    assert head.endswith("1 fault")
    assert fault.startswith("plan.yaml:3: methods is ['ft', 'ft']; give methods by name")


def test_what_holds_itself_is_refused_and_does_not_hang(tmp_path):
    head, *_, fault = faults_of(tmp_path, "models: [a]\nfacts: f\nmethods: &a {ft: *a}")
    assert head.endswith("1 fault")
    assert fault.startswith("plan.yaml:3: method 'ft' has no setting 'ft'")


def test_aliases_and_merges_are_yaml_too(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text(
        "models: [a]\nfacts: f\nmethods:\n  ft: &a {epochs: 3}\n  b: {<<: *a, method: ft-kl}\n"
    )
    assert read_plan(path).methods["b"] == {"epochs": 3, "method": "ft-kl"}


def test_a_plan_from_python_says_all_too():
    with pytest.raises(MalmendError, match=r"(?s)sizes\[2\] is 0, expected.*decode is -1"):
        Plan(("a",), "f", {"ft": {}}, sizes=(1, 0), decode=-1)
