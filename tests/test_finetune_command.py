"""The command finetune on models of all three forms: choosing, stopping, going on, refusing."""

from __future__ import annotations

import gc
import json
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import forms_folders as folders
from command_support import malmend
from devices_support import device, devices
from malmend.commands import finetune as command
from malmend.commands import finetune_epochs as epochs_module
from malmend.commands.finetune import finetune
from malmend.commands.finetune_epochs import CHECKPOINT
from malmend.errors import MalmendError
from malmend.evaluation.classes import classes_of
from malmend.evaluation.generate import generate
from malmend.facts.readers import read_facts
from malmend.models import finetune as training
from malmend.models.finetune import Finetuner, FinetuneSettings
from malmend.models.load import LoadedModel, load_model
from malmend.models.sites import find_sites
from malmend.models.trunk import Trunk
from malmend.workbench import encoder_for

RATE = 3e-3
FORMS = pytest.mark.parametrize("family", ["bert", "t5", "llama"])
PAIRS = pytest.mark.parametrize("family", ["t5", "bart"])
ALL = FinetuneSettings(rate=RATE, batch=4, epochs=3, validation=0, until=1.0)
CHOOSING = FinetuneSettings(rate=RATE, batch=4, epochs=4, validation=0.3, patience=2)


@pytest.fixture
def made(tmp_path):
    """A base's folder and its facts, by family."""

    def make(family: str) -> tuple[str, str]:
        model = folders.save_base(family, tmp_path / f"{family}-base")
        return model, folders.save_facts(family, tmp_path / f"{family}-facts")

    return make


def rows(records) -> list[tuple]:
    return [(one.phase, one.epoch, one.loss, one.accuracy) for one in records]


def stopping_after(phase: str, epoch: int):
    def stop(record) -> None:
        if (record.phase, record.epoch) == (phase, epoch):
            raise KeyboardInterrupt

    return stop


def same_weights(one: Path, other: Path) -> bool:
    left, right = (load_file(path / "model.safetensors") for path in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.fixture
def judging(monkeypatch):
    """Scripts the shares that are right, one an epoch: the second epoch is the best."""

    def judge() -> None:
        shares = iter([0.1, 0.5, 0.5, 0.3, 0.7, 0.8])
        monkeypatch.setattr(training, "share_right", lambda *_: next(shares))

    return judge


@pytest.mark.slow
@FORMS
@pytest.mark.parametrize(
    ("settings", "stops"),
    [(ALL, [("all", 1)]), (CHOOSING, [("choice", 2)]), (CHOOSING, [("choice", 1), ("all", 1)])],
    ids=["all", "choice", "both"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    family, settings, stops, made, tmp_path, judging
):
    model, facts = made(family)
    judging()
    whole = finetune(model, facts, tmp_path / "whole", settings)
    judging()
    torch.manual_seed(99)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            finetune(model, facts, tmp_path / "parts", settings, stepped=stopping_after(*stop))
        assert (tmp_path / "parts" / CHECKPOINT).is_file()
        assert not (tmp_path / "parts" / "config.json").exists()
    parts = finetune(model, facts, tmp_path / "parts", settings)
    assert rows(parts.records) == rows(whole.records)
    assert same_weights(parts.folder, whole.folder)
    assert not (tmp_path / "parts" / CHECKPOINT).exists()
    assert not list((tmp_path / "parts").glob("*.part"))


@FORMS
def test_the_epochs_are_chosen_on_held_out_subjects_and_training_starts_again(
    family, made, tmp_path, monkeypatch, judging
):
    model, facts = made(family)
    runs = []

    class Kept(Finetuner):
        def __init__(self, loaded, questions, judged, settings, phase, progress):
            first = {name: t.clone() for name, t in loaded.state_dict().items()}
            runs.append((phase, first, list(questions), list(judged)))
            super().__init__(loaded, questions, judged, settings, phase, progress)

    monkeypatch.setattr(epochs_module, "Finetuner", Kept)
    judging()
    done = finetune(model, facts, tmp_path / "out", replace(CHOOSING, epochs=6), asked="all")
    # Two epochs after the first best one are no better, so that one is taken.
    assert [(one.phase, one.epoch, one.accuracy) for one in done.records] == [
        *(("choice", epoch, share) for epoch, share in enumerate((0.1, 0.5, 0.5, 0.3), 1)),
        *(("all", epoch, share) for epoch, share in enumerate((0.7, 0.8), 1)),
    ]
    (phase, first, learned, held), (again, anew, everything, judged) = runs
    assert (phase, again) == ("choice", "all")
    assert first.keys() == anew.keys()
    assert all(torch.equal(first[name], anew[name]) for name in first)  # a head's start too
    assert judged == everything
    assert sorted(q.ids for q in everything) == sorted({q.ids for q in (*learned, *held)})
    assert done.questions == len(everything)
    # Whole subjects: of every fact, all its wordings stand on one side.
    encoder = encoder_for(str(done.folder))
    places = {"learned": {q.ids for q in learned}, "held": {q.ids for q in held}}
    sides = []
    for fact in read_facts(facts):
        mine = {one.ids for one in encoder.encode_all((fact.question, *fact.equivalents))}
        assert len(mine) == 3
        sides.append(next(side for side, there in places.items() if mine <= there))
    assert set(sides) == {"learned", "held"}


def test_without_validation_it_ends_once_enough_is_known(made, tmp_path):
    model, facts = made("bert")
    settings = FinetuneSettings(rate=RATE, batch=4, epochs=60, validation=0, until=0.9)
    done = finetune(model, facts, tmp_path / "out", settings)
    assert {record.phase for record in done.records} == {"all"}
    assert done.records[-1].accuracy >= 0.9
    assert len(done.records) < 60
    assert all(record.accuracy < 0.9 for record in done.records[:-1])


def answers(loaded: LoadedModel, facts) -> list[str]:
    """What the model says, free-running, or its class."""
    encoder = encoder_for(loaded)
    prompts = [fact.prompt for fact in facts]
    if encoder.reading.form == "classes":
        trunk = Trunk(loaded.model, find_sites(loaded.model, 1))
        return [name for name, _ in classes_of(trunk, encoder, prompts)]
    return [answer.text for answer in generate(loaded, encoder, prompts)]


@pytest.mark.parametrize("family", ["bert", "t5", "bart", "llama"])
def test_the_result_loads_and_answers_what_it_learned(family, made, tmp_path):
    model, facts = made(family)
    done = finetune(model, [facts], tmp_path / "out", folders.learning(family))
    assert done.records[-1].accuracy == 1
    loaded = load_model(str(done.folder))
    known = read_facts(facts)
    assert answers(loaded, known) == [fact.answer for fact in known]
    if family == "bert":
        assert loaded.reading.classes == ("REFUTES", "SUPPORTS")
    said = json.loads((done.folder / "finetune.json").read_text())
    assert (said["base"], said["facts"], said["asked"]) == (model, len(known), "prompts")
    assert [one["epoch"] for one in said["epochs"]] == [one.epoch for one in done.records]


@PAIRS
def test_shared_embeddings_stay_one_tensor(family, made, tmp_path):
    model, facts = made(family)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ALL, stepped=stopping_after("all", 1))
    done = finetune(model, facts, tmp_path / "out", ALL)  # through the checkpoint, too
    loaded = load_model(str(done.folder)).model
    places = (loaded.get_input_embeddings(), loaded.get_output_embeddings())
    both = [*places, loaded.get_encoder().embed_tokens, loaded.get_decoder().embed_tokens]
    assert len({module.weight.data_ptr() for module in both}) == 1
    before = load_model(model).model.get_input_embeddings().weight
    assert not torch.equal(places[0].weight, before)
    with safe_open(done.folder / "model.safetensors", framework="pt") as file:
        embeddings = [
            name
            for name in file.keys()  # noqa: SIM118
            if file.get_slice(name).get_shape() == list(before.shape)
        ]
    assert len(embeddings) == 1


# --- what is refused


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"facts": "other"}, "is of other data; give the same, or another --out"),
        ({"asked": "all"}, "is of other data"),
        ({"model": "other"}, "is of other data"),
        ({"settings": FinetuneSettings(RATE, 4, 3, 0, seed=1)}, "is of other settings"),
        ({"settings": FinetuneSettings(1e-3, 4, 3, 0)}, "is of other settings"),
        ({"settings": FinetuneSettings(RATE, 4, 3, 0.3)}, "is of other settings"),
    ],
)
def test_another_run_in_the_same_folder_is_refused(change, said, made, tmp_path):
    model, facts = made("bert")
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ALL, stepped=stopping_after("all", 1))
    before = (tmp_path / "out" / CHECKPOINT).read_bytes()
    given = {"model": model, "facts": facts, "out": tmp_path / "out", "settings": ALL} | change
    if given["facts"] == "other":
        given["facts"] = folders.save_facts("bert", tmp_path / "other", count=8)
    if given["model"] == "other":
        given["model"] = folders.save_base("bert", tmp_path / "other-base", seed=1)
    with pytest.raises(MalmendError, match=said):
        finetune(**given)
    assert (tmp_path / "out" / CHECKPOINT).read_bytes() == before


def test_more_epochs_may_be_asked_for(made, tmp_path):
    model, facts = made("bert")
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ALL, stepped=stopping_after("all", 2))
    more = FinetuneSettings(RATE, 4, 5, 0)
    done = finetune(model, facts, tmp_path / "out", more)
    whole = finetune(model, facts, tmp_path / "whole", more)
    assert rows(done.records) == rows(whole.records)
    assert same_weights(done.folder, whole.folder)


def test_a_choice_that_is_over_stays_made_when_more_epochs_are_asked_for(made, tmp_path, judging):
    model, facts = made("bert")
    fewer = replace(CHOOSING, epochs=3)
    judging()
    whole = finetune(model, facts, tmp_path / "whole", fewer)
    assert [one.epoch for one in whole.records] == [1, 2, 3, 1, 2]
    judging()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", fewer, stepped=stopping_after("all", 1))
    done = finetune(model, facts, tmp_path / "out", CHOOSING)
    assert rows(done.records) == rows(whole.records)
    assert same_weights(done.folder, whole.folder)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      ", b"\xff" * 64])
def test_a_damaged_checkpoint(content, made, tmp_path):
    model, facts = made("bert")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CHECKPOINT).write_bytes(content)
    with pytest.raises(
        MalmendError, match=r"is damaged \(.*\); remove it to start again"
    ) as caught:
        finetune(model, facts, tmp_path / "out", ALL)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short(made, tmp_path):
    model, facts = made("bert")
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ALL, stepped=stopping_after("all", 1))
    path = tmp_path / "out" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MalmendError, match="is damaged"):
        finetune(model, facts, tmp_path / "out", ALL)


@pytest.mark.parametrize(
    "harmed", ["optimiser.", "optimiser.2.exp_avg_sq", "optimiser.1.exp_avg", "model.a weight"]
)
def test_a_checkpoint_without_moments_or_of_other_weights(harmed, made, tmp_path):
    model, facts = made("bert")
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", ALL, stepped=stopping_after("all", 1))
    path = tmp_path / "out" / CHECKPOINT
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = {n: t for n, t in load_file(path).items() if not n.startswith(harmed)}
    if harmed == "model.a weight":
        name = next(one for one in tensors if one.startswith("model.") and tensors[one].ndim == 2)
        tensors[name] = tensors[name][:1].clone()
    save_file(tensors, path, header)
    with pytest.raises(MalmendError, match=r"is damaged \(.*\); remove it to start again"):
        finetune(model, facts, tmp_path / "out", ALL)


def test_a_resumed_run_holds_no_more_than_another(made, tmp_path):
    """Once its checkpoint, weights and both moments, stayed in memory to the end."""
    model, facts = made("llama")
    held = list[int]()

    def noted(_record) -> None:
        gc.collect()
        known = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter)]
        storages = {one.data_ptr(): one.numel() * one.element_size() for one in known}
        held.append(sum(storages.values()))

    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "parts", ALL, stepped=stopping_after("all", 2))
    finetune(model, facts, tmp_path / "whole", ALL, stepped=noted)
    finetune(model, facts, tmp_path / "parts", ALL, stepped=noted)
    size = sum(one.numel() * 4 for one in load_model(model).model.parameters())
    assert held[-1] < held[-2] + size / 2


def test_a_folder_that_holds_a_model(made, tmp_path):
    model, facts = made("bert")
    before = {path: path.read_bytes() for path in Path(model).iterdir()}
    with pytest.raises(MalmendError, match="holds a model already; give another --out"):
        finetune(model, facts, model, ALL)
    assert {path: path.read_bytes() for path in Path(model).iterdir()} == before


def test_a_folder_that_holds_something_else(made, tmp_path):
    model, facts = made("llama")
    out = tmp_path / "mine"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(MalmendError, match=r"is not empty \(it holds tokenizer.json\)"):
        finetune(model, facts, out, ALL)
    assert (out / "tokenizer.json").read_text() == "mine"


def test_a_run_on_another_base_of_the_same_name_is_not_gone_on_with(made, tmp_path):
    model, facts = made("llama")
    base = shutil.copytree(model, tmp_path / "base")
    with pytest.raises(KeyboardInterrupt):
        finetune(str(base), facts, tmp_path / "out", ALL, stepped=stopping_after("all", 1))
    weights = load_file(base / "model.safetensors")
    save_file({n: one + 0.01 for n, one in weights.items()}, base / "model.safetensors")
    with pytest.raises(MalmendError, match="is of other data; give the same"):
        finetune(str(base), facts, tmp_path / "out", ALL)


def test_facts_that_the_model_cannot_say(made, tmp_path):
    model, _ = made("t5")
    (tmp_path / "odd").write_text('{"prompt": "The capital of", "answer": "nowhere"}')
    with pytest.raises(
        MalmendError,
        match=r"1 question does not fit this model:\n.*odd:1: field .answer.: .*does not survive",
    ):
        finetune(model, tmp_path / "odd", tmp_path / "out", ALL)


def test_too_few_subjects_to_hold_some_out(made, tmp_path):
    model, _ = made("bert")
    facts = folders.save_facts("bert", tmp_path / "few", count=1)
    with pytest.raises(MalmendError, match=r"1 fact cannot be split .*--validation 0"):
        finetune(model, facts, tmp_path / "out", CHOOSING)


def test_of_one_prompt_in_two_files_the_first_answer_counts(made, tmp_path):
    model, facts = made("bert")
    claims = json.loads(Path(facts).read_text())
    turned = [claim | {"label": claim["alt"], "alt": claim["label"]} for claim in claims[:3]]
    (tmp_path / "turned").write_text(json.dumps(turned))
    once = finetune(model, facts, tmp_path / "once", ALL)
    told: list[str] = []
    files = [facts, tmp_path / "turned"]
    both = finetune(model, files, tmp_path / "both", ALL, told=told.append)
    assert "Skipped 3 facts: 0 duplicates and 3 contradictions of earlier ones." in told
    line = f"  {tmp_path / 'turned'}:1: entry 1: contradiction of {facts}:1: entry 1"
    assert line in told
    assert rows(both.records) == rows(once.records)
    assert both.questions == len(claims)


# --- an encoder that has a head already


@pytest.mark.parametrize("turned", [False, True])
def test_a_head_of_the_same_classes_is_kept(turned, made, tmp_path):
    model, facts = made("bert")
    known = read_facts(facts)
    wanted = [fact.answer for fact in known]
    base = finetune(model, facts, tmp_path / "base", folders.learning("bert")).folder
    if turned:  # the same model, its classes in another order
        loaded = load_model(str(base)).model
        loaded.config.id2label = {0: "supports", 1: "refutes"}
        loaded.config.label2id = {"supports": 0, "refutes": 1}
        head = loaded.classifier
        head.weight.data, head.bias.data = head.weight.data.flip(0), head.bias.data.flip(0)
        loaded.save_pretrained(base)
    hardly = FinetuneSettings(rate=1e-9, batch=12, epochs=1, validation=0)
    done = finetune(str(base), facts, tmp_path / "out", hardly)
    said = answers(load_model(str(done.folder)), known)
    assert [name.upper() for name in said] == wanted


def test_a_head_of_other_classes_is_made_anew(made, tmp_path):
    _, facts = made("bert")
    base = tmp_path / "with-head"
    folders.save_base("bert", base, classes=("no", "yes", "perhaps"))
    done = finetune(str(base), facts, tmp_path / "out", folders.learning("bert"))
    loaded = load_model(str(done.folder))
    assert loaded.reading.classes == ("REFUTES", "SUPPORTS")
    assert done.records[-1].accuracy == 1


def test_as_a_command_it_says_epochs_and_where_the_model_lies(made, tmp_path, capfd):
    model, facts = made("t5")
    out = tmp_path / "out"
    options = ["--rate", RATE, "--batch", 4, "--epochs", 2, "--validation", 0]
    capfd.readouterr()  # what the fixture said
    assert malmend("finetune", model, facts, "--out", out, *options) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("Fine-tuned on 12 questions in 2 epochs, of which the model now")
    assert shown.out.strip().endswith(f"Model: {out}")
    told = [line.split()[:2] for line in shown.err.splitlines() if line.startswith("epoch")]
    assert told == [["epoch", "1"], ["epoch", "2"]]
    assert "Writing" not in shown.err  # a bar of transformers' own
    assert malmend("finetune", model, facts, "--out", out, *options) == 2
    assert "holds a model already" in capfd.readouterr().err


def test_a_full_disk_while_the_model_is_written(made, tmp_path, monkeypatch):
    """It was once a traceback at the end of the whole run."""
    model, facts = made("bert")

    def full(_loaded, folder):
        folder.mkdir()
        (folder / "half").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(command, "save_model", full)
        with pytest.raises(MalmendError, match=r"written \(.*No space.*goes on") as caught:
            finetune(model, facts, tmp_path / "out", ALL)
    assert "\n" not in str(caught.value)
    assert [one.name for one in (tmp_path / "out").iterdir()] == [CHECKPOINT]
    done = finetune(model, facts, tmp_path / "out", ALL, stepped=stopping_after("all", 1))
    assert (done.folder / "config.json").is_file()


@pytest.mark.parametrize("phase", ["choice", "all"])
def test_fewer_epochs_than_were_taken_are_refused(phase, made, tmp_path, judging):
    model, facts = made("bert")
    settings = ALL if phase == "all" else CHOOSING
    judging()
    with pytest.raises(KeyboardInterrupt):
        finetune(model, facts, tmp_path / "out", settings, stepped=stopping_after(phase, 2))
    before = (tmp_path / "out" / CHECKPOINT).read_bytes()
    with pytest.raises(MalmendError, match="took 2 epochs, 1 is asked for"):
        finetune(model, facts, tmp_path / "out", replace(settings, epochs=1))
    assert (tmp_path / "out" / CHECKPOINT).read_bytes() == before
    done = finetune(model, facts, tmp_path / "out", replace(settings, epochs=2))
    assert max(one.epoch for one in done.records) == 2


def test_a_checkpoint_is_copied_off_the_device_and_not_on_it(tmp_path, monkeypatch):
    """Model and both moments once stood there twice."""
    places = []
    copy = torch.Tensor.clone

    def noted(self, **given):
        places.append(self.device)
        return copy(self, **given)

    with devices():
        layer = nn.Linear(2, 2).to(device(0))
        trainer = Namespace(model=layer, optimiser=torch.optim.Adam(layer.parameters()))
        run = epochs_module.Epochs(tmp_path, ALL, "data", lambda *_: None, lambda _: None)
        monkeypatch.setattr(torch.Tensor, "clone", noted)
        monkeypatch.setattr(epochs_module, "save_file", lambda tensors, *_: seen.update(tensors))
        seen: dict[str, torch.Tensor] = {}
        run._save(trainer)
    assert {str(one.device) for one in seen.values()} == {"cpu"}
    assert device(0) not in places
