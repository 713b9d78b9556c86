from __future__ import annotations

import functools
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import command_support
import helpers
import malmend
import malmend.patch_file as patch_module
from command_support import (
    CALIBRATION,
    EAGER,
    Tiny,
    as_lines,
    cut_otherwise,
    files_in,
    make_facts,
    make_model,
)
from malmend.commands import edit as edit_module
from malmend.commands import train as train_module
from malmend.commands.learn import learn
from malmend.editors.calibration_file import load_calibration
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, published, training_free
from malmend.editors.train_settings import TrainSettings
from malmend.editors.training import StepRecord
from malmend.errors import FactsError, MalmendError, PatchError
from malmend.facts.fact import Fact
from malmend.facts.readers import given_facts
from malmend.methods.ke import KeSettings
from malmend.models.identity import bits
from malmend.models.load import prepared
from malmend.models.sites import around, find_sites
from malmend.models.trunk import TrunkSettings
from malmend.patch import Patch
from malmend.workbench import lay_out

tiny = command_support.tiny
cache = command_support.cache

FEW = make_facts(3)
LAST = replace(training_free(), layers=1)
TRAINING = TrainSettings(facts_per_step=4, steps=5, network_rate=1e-3, chunk=9, save_every=2)
SMALL = EditorSettings(layers=2, network=NetworkSettings(rank=4))


def own(tiny: Tiny) -> dict:
    return {"calibrate": tiny.calibrate, "text": tiny.text, "calibration": CALIBRATION}


def eager(tiny: Tiny) -> dict:
    return own(tiny) | {"calibration": EAGER}


@pytest.fixture
def stopped_clock(monkeypatch) -> None:
    """The only part of a patch that is another one each time."""
    monkeypatch.setattr(edit_module, "now", lambda: "2025-01-31T12:00:00Z")


def test_a_patch_says_when_it_was_made_and_towards_what(tiny, tmp_path):
    before = datetime.now(UTC).replace(microsecond=0)
    facts = with_alternatives(FEW)
    malmend.edit(tiny.loaded, facts, tmp_path / "patch", alternative=True, **own(tiny))
    after = datetime.now(UTC)
    said = malmend.load_patch(tmp_path / "patch").provenance
    assert said["alternative"] is True
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", said["created"])
    assert before <= datetime.fromisoformat(said["created"]) <= after
    assert malmend.edit(tiny.loaded, FEW, **own(tiny)).patch.provenance["alternative"] is False


def test_edit_to_evaluation_to_answer(tiny, tmp_path):
    before = bits(tiny.loaded.model)
    path = tmp_path / "patch.safetensors"
    done = malmend.edit(tiny.loaded, FEW, path, settings=LAST, **eager(tiny))
    assert done.path == path
    assert (done.unedited, done.edited) == (0.0, 1.0)
    assert files_in(tmp_path) == {"patch.safetensors"}
    assert bits(tiny.loaded.model) == before

    patch = malmend.load_patch(path)
    assert patch.provenance == done.patch.provenance
    metric = {"unedited": 0.0, "edited": 1.0}
    assert patch.provenance["metrics"] == {"ES": {"token_ratio": metric}}
    assert {term: len(found) for term, found in patch.provenance["prior"].items()} == {
        "text": 1,
        "asked": 1,
        "wording": 1,
    }
    assert patch.provenance["powers"] == {"text": [0.0], "asked": [0.0], "wording": [0.0]}
    assert patch.provenance["base"] == tiny.loaded.fingerprint
    assert patch.provenance["configuration"]["hidden_size"] == tiny.loaded.model.config.hidden_size
    assert (patch.provenance["facts"], patch.provenance["skipped"]) == (3, 0)

    report = malmend.eval(tiny.loaded, FEW, path)
    assert report.edited["ES"].token_ratio == report.edited["ES"].generated == 1.0
    assert report.unedited["ES"].exact == 0.0
    assert report.rows[0].edited[0].text == FEW[0].answer
    assert bits(tiny.loaded.model) == before

    said = malmend.ask(tiny.loaded, FEW[0].prompt, path)
    assert said.edited == FEW[0].answer != said.unedited
    assert said == malmend.ask(tiny.loaded, FEW[0].prompt, patch)
    assert malmend.ask(tiny.loaded, FEW[0].prompt) == replace(said, edited=None, edited_cut=False)
    assert bits(tiny.loaded.model) == before

    shown = malmend.inspect(path)
    assert shown.kind == "patch"
    assert len(shown.entries["shifts"]) == 1


def test_a_model_given_by_name_is_edited_like_a_loaded_one(
    tiny, tmp_path, monkeypatch, stopped_clock
):
    # One solve: a further pass starts from the first one's rounding and makes more of it.
    once = own(tiny) | {"refine": RefineSettings(passes=1)}
    # Each from a cache of its own: what is there already is not batched again, and rounds apart.
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "by-name"))
    named = malmend.edit(tiny.model, tiny.facts, **once).patch
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "loaded"))
    given = malmend.edit(tiny.loaded, tiny.facts, **once).patch
    assert named.provenance == given.provenance
    assert all(torch.equal(named.shift(name), given.shift(name)) for name in given.factors)


@pytest.mark.slow
def test_the_same_edit_gives_the_same_bytes_with_an_empty_cache_and_a_full_one(
    tiny, tmp_path, monkeypatch, stopped_clock
):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))
    written = []
    for name in ("one", "two"):
        malmend.edit(tiny.loaded, tiny.facts, tmp_path / name, **own(tiny))
        written.append((tmp_path / name).read_bytes())
    assert list((tmp_path / "cache" / "calibrations").iterdir())
    assert written[0] == written[1]


def test_an_unusable_cache_folder_changes_nothing(tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    # Once, to float32 rounding: descents stop at thresholds, so that later passes make it grow.
    once = own(tiny) | {"refine": RefineSettings(passes=1)}
    good = malmend.edit(tiny.loaded, FEW, **once).patch
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "file"))
    found = malmend.edit(tiny.loaded, FEW, **once).patch
    for name in good.factors:
        wanted = good.shift(name)
        assert (found.shift(name) - wanted).norm() < 1e-5 * wanted.norm()
    assert (tmp_path / "file").read_text() == "no folder"


def test_a_damaged_calibration_is_made_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    good = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch
    (kept,) = (tmp_path / "calibrations").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    again = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch
    assert all(torch.equal(good.shift(name), again.shift(name)) for name in good.factors)
    load_calibration(kept)


def test_the_order_of_the_facts_does_not_matter(tiny):
    one = malmend.edit(tiny.loaded, make_facts(6), **own(tiny)).patch
    other = malmend.edit(tiny.loaded, make_facts(6)[::-1], **own(tiny)).patch
    for name in one.factors:
        shift = one.shift(name)
        assert torch.allclose(shift, other.shift(name), atol=1e-4 * shift.abs().max().item())
    less = malmend.edit(tiny.loaded, make_facts(5), **own(tiny)).patch
    assert not torch.allclose(less.shift(name), shift, atol=1e-2 * shift.abs().max().item())


def test_a_patch_that_is_read_back_otherwise_is_not_what_was_measured(tiny, tmp_path, monkeypatch):
    write, path = patch_module.save_file, tmp_path / "p"
    path.write_text("an earlier one")

    def doubled(tensors, beside, metadata):
        write({name: 2 * one for name, one in tensors.items()}, beside, metadata)

    monkeypatch.setattr(patch_module, "save_file", doubled)
    with pytest.raises(PatchError, match="did not read back as it was written"):
        malmend.edit(tiny.loaded, tiny.facts, path, **own(tiny))
    assert path.read_text() == "an earlier one"


def test_without_a_path_nothing_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert malmend.edit(tiny.loaded, FEW, **own(tiny)).path is None
    assert files_in(tmp_path) == set()


def test_mend_sums(tiny):
    settings = replace(training_free("mend"), layers=1, eta=0.5)
    done = malmend.edit(tiny.loaded, FEW[:1], settings=settings, **own(tiny))
    assert done.patch.provenance["method"] == "mend"
    assert done.edited > done.unedited


def test_the_published_form_is_calibrated_without_a_prior(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path))
    settings = replace(published(), network=NetworkSettings(rank=4, placement="after"), layers=2)
    done = malmend.edit(tiny.loaded, FEW, settings=settings, **own(tiny))
    (kept,) = (tmp_path / "calibrations").iterdir()
    found = load_calibration(kept)
    assert all(not known.priors_KK for known in found.statistics.values())
    assert (found.eta, found.weights, found.tried) == (1e-6, (), ())
    assert done.patch.provenance["prior"] == {}
    assert done.patch.provenance["lambda"] == pytest.approx([1.0, 1.0])
    assert len(done.patch.factors) == 2


def test_skipped_facts_are_counted_and_strict_refuses_them(tiny, tmp_path):
    path = tmp_path / "facts.jsonl"
    twice = [*FEW, replace(FEW[0], id="again"), replace(FEW[1], id="other", answer="Kalo")]
    path.write_text(as_lines(twice))
    done = malmend.edit(tiny.loaded, path, **own(tiny))
    assert (len(done.facts), done.patch.provenance["skipped"]) == (3, 2)
    report = malmend.eval(tiny.loaded, path)
    assert (report.facts, report.about["skipped"]) == (3, 2)
    for command in (malmend.edit, malmend.eval):
        with pytest.raises(FactsError, match="2 faults"):
            command(tiny.loaded, path, strict=True)


def with_alternatives(facts: list[Fact]) -> list[Fact]:
    """Each fact with the next one's answer for an alternative."""
    turned = zip(facts, [*facts[1:], facts[0]], strict=True)
    return [replace(fact, alternative=other.answer) for fact, other in turned]


def test_a_patched_model_whose_logits_are_none_has_no_answer(tiny):
    [site] = find_sites(tiny.loaded.model, 1)
    huge = torch.full(site.shape_VK, 1e38)
    patch = malmend.Patch({site.name: (huge,)}, {"base": tiny.loaded.fingerprint})
    with pytest.raises(MalmendError, match="NaN or infinity, so it says nothing; check"):
        malmend.ask(tiny.loaded, FEW[0].prompt, patch)
    assert malmend.ask(tiny.loaded, FEW[0].prompt).unedited


def test_alternatives_are_edited_in_and_asked_for(tiny):
    facts = with_alternatives(FEW)
    chosen = {"settings": LAST, **eager(tiny)}
    done = malmend.edit(tiny.loaded, facts, alternative=True, **chosen)
    assert [fact.answer for fact in done.facts] == [fact.alternative for fact in facts]
    assert done.edited == 1.0
    report = malmend.eval(tiny.loaded, facts, done.patch, alternative=True)
    assert report.edited["ES"].generated == 1.0
    assert [row.answer for row in report.rows] == [fact.alternative for fact in facts]
    true = malmend.eval(tiny.loaded, facts, done.patch)
    assert true.edited["ES"].generated == 0.0


@pytest.mark.parametrize("command", ["edit", "eval", "train"])
def test_a_fact_without_an_alternative_is_refused(tiny, tmp_path, command):
    facts = [*with_alternatives(FEW), replace(FEW[0], id="f9", prompt="In Ora is", line=4)]
    out = {"out": tmp_path / "editor"} if command == "train" else {}
    with pytest.raises(FactsError, match=r"1 of 4 facts has no alternative \(fact 'f9'\)"):
        getattr(malmend, command)(tiny.loaded, facts, alternative=True, **out)
    assert files_in(tmp_path) == set()


def test_training_goes_towards_the_alternatives(tiny, tmp_path):
    facts = with_alternatives(make_facts(4))
    short = replace(TRAINING, steps=1)
    folders = [tmp_path / "true", tmp_path / "false"]
    results = [
        malmend.train(
            tiny.loaded, facts, folder, None, SMALL, short, alternative=wanted, **own(tiny)
        )
        for folder, wanted in zip(folders, (False, True), strict=True)
    ]
    assert results[0].records[0].gen != results[1].records[0].gen
    with pytest.raises(MalmendError, match="other facts"):
        malmend.train(tiny.loaded, facts, folders[1], None, SMALL, short, **own(tiny))


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused_of_facts_in_memory_too(tiny, limit):
    for facts in (tiny.facts, FEW):
        with pytest.raises(MalmendError, match=f"limit is {limit}"):
            malmend.edit(tiny.loaded, facts, limit=limit, **own(tiny))


def test_limit_takes_the_first_facts(tiny):
    report = malmend.eval(tiny.loaded, tiny.facts, limit=3)
    assert [row.prompt for row in report.rows] == [fact.prompt for fact in make_facts(3)]
    done = malmend.edit(tiny.loaded, tiny.facts, limit=3, **own(tiny))
    assert [fact.prompt for fact in done.facts] == [fact.prompt for fact in make_facts(3)]


def test_a_model_of_few_blocks_is_evaluated_too():
    tokenizer = helpers.byte_level()
    loaded = prepared(make_model(tokenizer, layers=2), tokenizer)
    assert malmend.eval(loaded, FEW[:2]).facts == 2


def test_facts_from_python_are_not_edited_twice(tiny):
    """As facts of a file: the first of a prompt counts, --strict refuses the others."""
    twice = [*FEW, replace(FEW[0], id="again"), replace(FEW[1], id="other", answer="Kalo")]
    done = malmend.edit(tiny.loaded, twice, **own(tiny))
    once = malmend.edit(tiny.loaded, FEW, **own(tiny))
    assert done.facts.facts == once.facts.facts == tuple(FEW)
    assert [one.kind for one in done.facts.skipped] == ["duplicate", "contradiction"]
    assert done.patch.provenance["skipped"] == 2
    for name in once.patch.factors:
        assert torch.equal(done.patch.shift(name), once.patch.shift(name))
    limited = malmend.eval(tiny.loaded, [FEW[0], *twice], limit=2)
    assert [row.id for row in limited.rows] == [FEW[0].id, FEW[1].id]
    for command in (malmend.edit, malmend.eval):
        with pytest.raises(FactsError, match="cannot be used: 2 faults") as caught:
            command(tiny.loaded, twice, strict=True)
        assert caught.value.faults == (
            f"fact 'again': duplicate of fact 'f0': prompt {FEW[0].prompt!r}; keep one of the two",
            f"fact 'other': contradiction of fact 'f1': prompt {FEW[1].prompt!r} has answer "
            f"'Kalo' here and {FEW[1].answer!r} there; keep one of the two",
        )


def test_the_same_object_twice_is_a_duplicate(tiny):
    known = given_facts([FEW[0], FEW[1], FEW[0]])
    assert known.facts == tuple(FEW[:2])
    assert [(one.kind, one.fact, one.earlier) for one in known.skipped] == [
        ("duplicate", FEW[0], FEW[0])
    ]
    with pytest.raises(FactsError, match="cannot be used: 1 fault") as caught:
        malmend.eval(tiny.loaded, [FEW[0], FEW[0]], strict=True)
    assert caught.value.faults == (
        f"fact 'f0': duplicate of fact 'f0': prompt {FEW[0].prompt!r}; keep one of the two",
    )


def test_facts_that_were_read_keep_their_source_and_what_was_skipped(tiny, tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines([*FEW, replace(FEW[0], id="again")]))
    known = malmend.read_facts(path)
    report = malmend.eval(tiny.loaded, known)
    assert (report.about["facts_source"], report.about["skipped"]) == (str(path), 1)


@pytest.mark.parametrize("command", ["edit", "eval", "train"])
def test_a_model_with_a_patch_on_it_is_refused(tiny, tmp_path, monkeypatch, command):
    """Else what is found of the edited model would be kept as the unedited one's."""
    patch = malmend.edit(tiny.loaded, FEW, settings=LAST, **eager(tiny)).patch
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))
    short = {"out": tmp_path / "editor", "training": replace(TRAINING, steps=1), "settings": SMALL}
    more = {"edit": own(tiny), "eval": {}, "train": own(tiny) | short}[command]
    call = functools.partial(getattr(malmend, command), tiny.loaded, tiny.facts, **more)
    with malmend.applied(tiny.loaded, patch):
        with malmend.applied(tiny.loaded, patch):
            pass
        with pytest.raises(MalmendError, match="a patch is on it; leave the block of applied"):
            call()
        same = prepared(tiny.loaded.model, tiny.loaded.tokenizer)  # the same weights, other name
        with pytest.raises(MalmendError, match="a patch is on it"):
            getattr(malmend, command)(same, tiny.facts, **more)
        assert malmend.ask(tiny.loaded, FEW[0].prompt).unedited == FEW[0].answer
        with pytest.raises(MalmendError, match="a patch is on it"):
            malmend.ask(tiny.loaded, FEW[0].prompt, patch)
    assert files_in(tmp_path) == set()
    call()


def test_a_patch_names_its_model_from_any_folder(tiny, monkeypatch):
    place = Path(tiny.model)
    monkeypatch.chdir(place.parent)
    done = malmend.edit(place.name, FEW, settings=LAST, **eager(tiny))
    assert done.patch.provenance["model"] == str(place)


def test_the_report_of_an_edit_is_of_the_facts_that_were_read(tiny, tmp_path):
    """They were read again after the work, when a file may be another, and an iterator over."""
    done = malmend.edit(tiny.loaded, iter(FEW), settings=LAST, report=tmp_path / "a", **eager(tiny))
    assert done.page == tmp_path / "a" / "index.html"
    path = tmp_path / "facts.jsonl"
    path.write_text(as_lines(FEW))

    def rewritten(*_said):
        path.write_text(as_lines(make_facts(2, seed=9)))

    malmend.edit(
        tiny.loaded,
        path,
        settings=LAST,
        report=tmp_path / "b",
        progress=rewritten,
        **eager(tiny),
    )
    rows = [
        [row["prompt"] for row in json.loads((tmp_path / name / "report.json").read_text())["rows"]]
        for name in "ab"
    ]
    assert rows[0] == rows[1] == [fact.prompt for fact in FEW]


@pytest.mark.parametrize("command", ["edit", "eval", "train", "export", "diff", "ledger"])
def test_another_thread_is_refused_meanwhile(tiny, tmp_path, command):
    """It would take the shifts and hooks that are on the model for the model's own."""
    known, refused = tiny.facts, []
    name = find_sites(tiny.loaded.model, 1)[0].name
    shift = torch.ones(tiny.loaded.model.get_submodule(name).weight.shape)
    patch = Patch({name: (shift,)}, {"base": tiny.loaded.fingerprint})

    def put_on():
        with malmend.applied(tiny.loaded, patch):
            pass

    def meanwhile(*_said):
        if not refused:
            ask = functools.partial(malmend.ask, tiny.loaded, "In Ora is")
            evaluate = functools.partial(malmend.eval, tiny.loaded, known, limit=1, decode_facts=0)
            with ThreadPoolExecutor() as pool:
                refused.extend(pool.submit(one).exception() for one in (put_on, ask, evaluate))

    short = {"out": tmp_path / "editor", "training": replace(TRAINING, steps=1), "settings": SMALL}
    more = {
        "edit": own(tiny) | {"progress": meanwhile, "limit": 2},
        "eval": {"progress": meanwhile, "limit": 2, "decode_facts": 0},
        "train": own(tiny) | short | {"stepped": meanwhile},
    }
    if command in more:
        getattr(malmend, command)(tiny.loaded, known, **more[command])
    elif command == "export":
        asked = {"facts": tiny.calibrate, "limit": 2, "progress": meanwhile}
        malmend.export(patch, tmp_path / "adapter", model=tiny.loaded, **asked)
    elif command == "diff":
        malmend.diff(tiny.loaded, tiny.loaded, progress=meanwhile)
    else:
        _through_a_ledger(tiny, tmp_path / "ledger", refused, meanwhile)
    assert refused
    assert [type(one) for one in refused] == [PatchError] * len(refused)
    assert all("is used by another thread" in str(one) for one in refused)


def _through_a_ledger(tiny, folder, refused, meanwhile):
    """Each command is one that another thread is refused beside."""
    found = []
    malmend.ledger.init(folder, tiny.loaded, progress=meanwhile, **own(tiny))
    for command, facts in (("add", [FEW[:1]]), ("replace", [_turned(FEW[:1])]), ("verify", [])):
        found, refused[:] = [*found, *refused], []
        getattr(malmend.ledger, command)(folder, *facts, model=tiny.loaded, progress=meanwhile)
        assert refused, command
    refused[:] = [*found, *refused]


def _turned(facts):
    return [replace(fact, answer=FEW[1].answer) for fact in facts]


def test_a_patch_that_fails_to_come_on_leaves_the_model_usable(tiny):
    patch = malmend.edit(tiny.loaded, FEW, settings=LAST, **eager(tiny)).patch
    with pytest.raises(KeyboardInterrupt), malmend.applied(tiny.loaded, patch):
        raise KeyboardInterrupt
    assert malmend.eval(tiny.loaded, FEW, patch, decode_facts=0).facts == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_question_is_longer_than_the_models_positions(tiny, tmp_path, monkeypatch, family):
    """Noticed before weights are read; a table of positions would else end in a traceback."""
    tokenizer = helpers.byte_level()
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    made = {
        "llama": lambda: helpers.tiny_llama(len(tokenizer), max_position_embeddings=40, **ends),
        "gpt2": lambda: helpers.tiny_gpt2(len(tokenizer), n_positions=40, **ends),
    }[family]()
    made.float().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(
        (Path(tiny.text).read_text().replace("\n", " ") * 3)[:4000] + "\n" + "a b\n" * 9
    )
    chosen = own(tiny) | {"text": text, "settings": replace(training_free(), layers=1)}
    done = malmend.edit(name, FEW, **chosen)
    report = malmend.eval(name, FEW, done.patch, text=text)
    assert report.facts == 3
    long = replace(FEW[0], prompt="In Mars " * 30)
    with pytest.raises(MalmendError, match=r"has \d+ tokens, but .* has 40 positions"):
        malmend.ask(name, long.prompt)
    monkeypatch.setattr("malmend.workbench.load_model", None)
    with pytest.raises(FactsError, match="1 question does not fit") as caught:
        malmend.edit(name, [long], **chosen)
    (fault,) = caught.value.faults
    assert re.search("field 'prompt': .* tokens, expected at most 40; shorten the prompt", fault)


def test_facts_are_read_as_the_patch_was_made(tiny):
    tokenizer = helpers.byte_level(eos_token=None)
    model = make_model(tokenizer, layers=2)
    loaded = prepared(model, tokenizer)
    settings = replace(training_free(), layers=2, end_of_answer="newline")
    done = malmend.edit(loaded, FEW, settings=settings, **own(tiny))
    report = malmend.eval(loaded, FEW, done.patch)
    assert report.edited["ES"].token_ratio == done.edited
    alone = malmend.eval(loaded, FEW)
    assert alone.unedited["ES"].token_ratio == done.unedited


def test_an_edit_with_a_report_is_the_edit_and_its_evaluation(
    tiny, tmp_path, monkeypatch, stopped_clock
):
    monkeypatch.setattr(edit_module, "DECODED", 1)
    facts = tmp_path / "facts.jsonl"
    rows = [json.loads(line) | {"alternative": "Ka"} for line in as_lines(FEW).splitlines()]
    rows.append(rows[0] | {"id": "again"})
    facts.write_text("\n".join(map(json.dumps, rows)))
    out, given = tmp_path / "patch", {"settings": LAST, "alternative": True, **eager(tiny)}
    plain = malmend.edit(tiny.loaded, facts, **given)
    done = malmend.edit(tiny.loaded, facts, out, report=tmp_path / "page", **given)
    assert (plain.page, done.page) == (None, tmp_path / "page" / "index.html")
    assert done.patch.provenance == plain.patch.provenance
    names = {"facts.jsonl", "patch", "page/index.html", "page/report.json"}
    assert files_in(tmp_path) == names
    saved = json.loads((tmp_path / "page" / "report.json").read_text(encoding="utf-8"))
    asked = malmend.eval(
        tiny.loaded, facts, done.patch, alternative=True, decode_facts=1, report=tmp_path / "again"
    )
    assert saved == json.loads(json.dumps(asked.to_json()))
    assert (saved["about"]["decoded_facts"], saved["about"]["skipped"]) == (1, 1)
    assert {row["answer"] for row in saved["rows"]} == {"Ka"}
    assert saved["edited"]["ES"]["token_ratio"] == done.edited
    assert (tmp_path / "again" / "index.html").read_bytes() == done.page.read_bytes()


def test_progress_runs_from_nothing_to_all(tiny):
    seen: dict[str, list[float]] = {}

    def report(stage: str, share: float) -> None:
        seen.setdefault(stage, []).append(share)

    patch = malmend.edit(tiny.loaded, FEW, progress=report, **own(tiny)).patch
    malmend.eval(tiny.loaded, FEW, patch, progress=report)
    assert {"keys and value gradients", "least squares", "asking"} <= set(seen)
    for stage, shares in seen.items():
        assert shares == sorted(shares), stage
        assert shares[-1] == 1.0, stage


def test_a_patch_of_another_model_is_refused_unless_forced(tiny, tmp_path):
    tokenizer = helpers.byte_level()
    other = prepared(make_model(tokenizer, seed=9), tokenizer, "other")
    patch = malmend.edit(tiny.loaded, FEW, **own(tiny)).patch
    for command in (malmend.eval, malmend.ask):
        what = FEW if command is malmend.eval else "In Ora"
        with pytest.raises(PatchError, match="made for a base with fingerprint"):
            command(other, what, patch)
        before = bits(other.model)
        command(other, what, patch, force=True)
        assert bits(other.model) == before


def plain(records: tuple[StepRecord, ...]) -> list[StepRecord]:
    return [replace(record, seconds=0.0) for record in records]


def trained(tiny: Tiny, folder: Path, **more) -> malmend.TrainResult:
    chosen = {"settings": SMALL, "training": TRAINING} | own(tiny) | more
    return malmend.train(tiny.loaded, tiny.facts, folder, **chosen)


def same_editor(one: malmend.TrainResult, other: malmend.TrainResult) -> bool:
    left, right = one.saved.editor.state_dict(), other.saved.editor.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_captured_pairs_are_kept_apart_by_all_that_they_depend_on(tiny, monkeypatch):
    """What another editor left in the cache is not what this one would capture."""
    monkeypatch.setattr(train_module, "ActivationStore", lambda folder, *_: folder)

    def place(**chosen: object) -> Path:
        settings = replace(SMALL, **{"tokens": "answer", **chosen})
        bench = lay_out(tiny.loaded, settings.sites_in(tiny.loaded.model), settings.end_of_answer)
        return train_module._pairs_store(bench, settings, TrunkSettings())

    apart = [{}, {"descent": None}, {"tokens": "all"}, {"end_of_answer": "none"}, {"layers": 1}]
    assert len({place(**one) for one in apart}) == len(apart)
    assert place() == place()


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_run_stopped_by_the_user_goes_on_as_if_it_never_was(tiny, tmp_path, stop):
    whole = trained(tiny, tmp_path / "whole")
    assert len(whole.records) == 5
    assert whole.saved.about["step"] == 5

    def interrupt(record: StepRecord) -> None:
        if record.step == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(tiny, tmp_path / "parts", stepped=interrupt)
    started: list[int] = []
    parts = trained(
        tiny, tmp_path / "parts", starting=lambda trainer, seconds: started.append(trainer.step)
    )
    assert started == [(stop - 1) // 2 * 2]  # what was saved last
    assert plain(parts.records) == plain(whole.records)
    assert same_editor(parts, whole)
    names = {"editor.json", "training.safetensors", parts.saved.about["weights"]}
    assert files_in(tmp_path / "parts") == names


def test_a_run_stopped_between_its_two_files_goes_on(tiny, tmp_path, monkeypatch):
    save = train_module.save_editor

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_module, "save_editor", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trained(tiny, tmp_path / "parts", training=replace(TRAINING, save_every=5))
    monkeypatch.setattr(train_module, "save_editor", save)
    parts = trained(tiny, tmp_path / "parts", training=replace(TRAINING, save_every=5))
    assert same_editor(parts, trained(tiny, tmp_path / "whole"))
    assert parts.saved.about["step"] == 5


def test_a_run_killed_before_the_last_of_its_two_files_is_whole_again(tiny, tmp_path):
    wanted = trained(tiny, tmp_path / "editor")
    (tmp_path / "editor" / "editor.json").unlink()
    again = trained(tiny, tmp_path / "editor")
    assert same_editor(again, wanted)
    assert again.saved.about["step"] == 5


def test_a_finished_editor_without_what_resuming_needs_is_not_written_over(tiny, tmp_path):
    trained(tiny, tmp_path / "editor")
    (tmp_path / "editor" / "training.safetensors").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "editor").iterdir()}
    with pytest.raises(MalmendError, match="holds an editor without what resuming needs"):
        trained(tiny, tmp_path / "editor")
    assert {path: path.read_bytes() for path in (tmp_path / "editor").iterdir()} == before


def test_an_editor_is_not_trained_where_another_method_was(tiny, tmp_path):
    ke = KeSettings(steps=1, layers=1, hidden=4, facts_per_step=2)
    learn(tiny.loaded, tiny.facts, tmp_path / "ke", "ke", ke)
    with pytest.raises(MalmendError, match="holds a trained ke, not an editor"):
        trained(tiny, tmp_path / "ke")
    trained(tiny, tmp_path / "editor")
    with pytest.raises(MalmendError, match="holds an editor, not ke"):
        learn(tiny.loaded, tiny.facts, tmp_path / "editor", "ke", ke)


def test_a_finished_run_may_be_lengthened_and_starting_it_again_changes_nothing(tiny, tmp_path):
    trained(tiny, tmp_path / "editor", training=replace(TRAINING, steps=3))
    before = {path: path.read_bytes() for path in (tmp_path / "editor").iterdir()}
    trained(tiny, tmp_path / "editor", training=replace(TRAINING, steps=3))
    assert {path: path.read_bytes() for path in (tmp_path / "editor").iterdir()} == before
    longer = trained(tiny, tmp_path / "editor")
    assert same_editor(longer, trained(tiny, tmp_path / "whole"))


def test_another_device_is_said_before_a_run_goes_on(tiny, tmp_path, monkeypatch):
    said: list[str] = []
    trained(tiny, tmp_path, training=replace(TRAINING, steps=3), told=said.append)
    monkeypatch.setattr("malmend.editors.resuming.places_of", lambda model: "cuda:0")
    trained(tiny, tmp_path, training=replace(TRAINING, steps=4), told=said.append)
    (line,) = said
    assert "was on cpu and resumes on cuda:0" in line


def test_another_number_of_threads_is_said_before_a_run_goes_on(tiny, tmp_path):
    said: list[str] = []
    trained(tiny, tmp_path, training=replace(TRAINING, steps=3), told=said.append)
    trained(tiny, tmp_path, training=replace(TRAINING, steps=4), told=said.append)
    assert said == []
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        trained(tiny, tmp_path, told=said.append)
    finally:
        torch.set_num_threads(before)
    (line,) = said
    assert f"used {before} threads and resumes on {before + 1}" in line
    assert f"OMP_NUM_THREADS={before}" in line


def test_training_goes_on_only_with_the_same_facts_and_settings(tiny, tmp_path):
    trained(tiny, tmp_path)
    with pytest.raises(MalmendError, match="other facts"):
        malmend.train(
            tiny.loaded, make_facts(12, seed=8), tmp_path, None, SMALL, TRAINING, **own(tiny)
        )
    with pytest.raises(MalmendError, match="trained with seed = 0, now 1"):
        trained(tiny, tmp_path, training=replace(TRAINING, seed=1))


def test_training_goes_on_only_by_the_same_tokenizer(tiny, tmp_path):
    """The second half was of other tokens, and the loss rose by a tenth."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.model, folder)
    run = {"settings": SMALL, "training": replace(TRAINING, steps=1)} | own(tiny)
    malmend.train(str(folder), tiny.facts, tmp_path / "editor", **run)
    cut_otherwise(folder)
    with pytest.raises(MalmendError, match="in training on other tokenizer files; give the same"):
        malmend.train(str(folder), tiny.facts, tmp_path / "editor", **run)


@pytest.mark.parametrize(
    "change",
    [
        {"calibration": replace(CALIBRATION, prior_facts=11)},
        {"calibrate": as_lines(make_facts(12, seed=5))},
        {
            "calibrate": as_lines(
                [replace(one, paraphrases=one.paraphrases[:1]) for one in make_facts(12, seed=1)]
            )
        },
        {"calibrate": as_lines([replace(one, unrelated=()) for one in make_facts(12, seed=1)])},
        {"text": None},
    ],
)
def test_training_goes_on_only_with_what_it_was_calibrated_on(change, tiny, tmp_path):
    """It was taken again, for minutes, and then made no difference without a word."""
    folder, facts = tmp_path / "editor", tmp_path / "calibrate.jsonl"
    if lines := change.get("calibrate"):
        facts.write_text(lines)
        change = {"calibrate": facts}
    begun = trained(tiny, folder, training=replace(TRAINING, steps=2))
    with pytest.raises(MalmendError, match="in training on other calibration facts, text or set"):
        trained(tiny, folder, **change)
    assert trained(tiny, folder).records[0] == begun.records[0]


def test_a_trained_editor_edits(tiny, tmp_path):
    result = trained(tiny, tmp_path / "editor")
    before = bits(tiny.loaded.model)
    named = malmend.edit(tiny.loaded, tiny.facts, editor=tmp_path / "editor")
    given = malmend.edit(tiny.loaded, tiny.facts, editor=result.saved.editor)
    assert bits(tiny.loaded.model) == before
    assert named.patch.provenance["editor"] == str(tmp_path / "editor")
    assert named.patch.provenance["settings"]["network"]["rank"] == 4
    assert len(named.patch.factors) == 2
    untrained = malmend.edit(tiny.loaded, tiny.facts, settings=SMALL, **own(tiny))
    for name in named.patch.factors:
        assert torch.equal(named.patch.shift(name), given.patch.shift(name))
        assert not torch.equal(named.patch.shift(name), untrained.patch.shift(name))


def test_training_on_questions_of_ones_own(tiny, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("Kalo miru\nSeto vane lomi\n")
    alone = [replace(fact, unrelated=()) for fact in make_facts(4)]
    short = replace(TRAINING, steps=1)
    result = malmend.train(tiny.loaded, alone, tmp_path / "editor", path, SMALL, short, **own(tiny))
    assert len(result.records) == 1
    with pytest.raises(MalmendError, match="has no unrelated question"):
        malmend.train(tiny.loaded, alone, tmp_path / "none", None, SMALL, short, **own(tiny))


def test_inspection_of_every_kind(tiny, tmp_path):
    model = malmend.inspect(tiny.model, layers=2)
    assert (model.kind, model.entries["fingerprint"]) == ("model", tiny.loaded.fingerprint)
    assert list(model.entries["sites"].values()) == ["32 x 128"] * 2
    beside = model.entries["sites that settle too (--refine.around)"]
    assert beside
    assert not beside.keys() & model.entries["sites"].keys()
    both = {*beside, *model.entries["sites"]}
    found = around(tiny.loaded.model, find_sites(tiny.loaded.model, 2))
    assert both == {site.name for site in found}
    named = malmend.inspect(
        tiny.model, sites=next(iter(beside))
    ).entries  # then nothing but these settles
    assert "sites that settle too (--refine.around)" not in named
    trained(tiny, tmp_path / "editor")
    editor = malmend.inspect(tmp_path / "editor")
    assert (editor.kind, editor.entries["last step"]["step"]) == ("editor", 5)
    assert "curve" not in editor.entries
    assert "locality_sha256" not in editor.entries  # each fact has its own
    with pytest.raises(MalmendError, match="is an editor, and --layers"):
        malmend.inspect(tmp_path / "editor", linear="first")
    facts = malmend.inspect(tiny.facts)
    assert (facts.kind, facts.entries["facts"]) == ("facts", 12)
    absent = ("with neighbours", "with a reversed prompt", "with an alternative", "relations")
    assert [facts.entries[name] for name in absent] == [0] * 4
    known = [
        {"relation": "capital", "alternative": "Quito", "neighbours": ["Chile"]},
        {"relation": "capital", "reversed": {"prompt": "Lima", "answer": "Peru"}},
    ]
    rows = [one | {"prompt": str(i), "answer": "x"} for i, one in enumerate(known)]
    (tmp_path / "known").write_text("\n".join(map(json.dumps, rows)))
    full = malmend.inspect(tmp_path / "known").entries
    assert [full[name] for name in absent] == [1, 1, 1, 1]
    assert facts.entries["first"] == {"prompt": FEW[0].prompt, "answer": FEW[0].answer}
    path = tmp_path / "listed"
    path.write_text(json.dumps([rows[0], rows[0] | {"id": "again"}], indent=1))
    skipped = malmend.inspect(path).entries["skipped"]
    assert skipped == [f"{path}:11: entry 2: duplicate of {path}:2: entry 1"]


@pytest.mark.parametrize("name", ["facts.jsonl", "report.json", "patch.safetensors"])
def test_a_file_that_is_not_there_is_no_model(tmp_path, name):
    with pytest.raises(MalmendError, match=rf"There is no file .*{name}\. Give a file"):
        malmend.inspect(tmp_path / "sub" / name)


def test_what_an_inspection_does_not_read_is_named_with_what_does(tiny, tmp_path):
    malmend.evaluate(tiny.loaded, FEW, report=tmp_path / "page", decode_facts=0, text="none")
    with pytest.raises(MalmendError, match=r"page is the folder of a report.*open its index\.html"):
        malmend.inspect(tmp_path / "page")
    with pytest.raises(MalmendError, match=r"report\.json is a report of malmend eval.*JSON"):
        malmend.inspect(tmp_path / "page" / "report.json")
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.sqlite").touch()
    with pytest.raises(MalmendError, match=r"is a ledger.*malmend ledger list .*ledger"):
        malmend.inspect(tmp_path / "ledger")


def test_what_no_file_can_be_called_is_told(tmp_path):
    """It was an OSError."""
    with pytest.raises(MalmendError, match=r"'a+\.\.\.' cannot be read .*; give a model"):
        malmend.inspect("a" * 300)


def test_a_gguf_file_in_capitals_is_no_facts_file(tmp_path):
    (tmp_path / "x.GGUF").write_bytes(b"GGUF")
    with pytest.raises(MalmendError, match=r"no model|GGUF"):
        malmend.inspect(tmp_path / "x.GGUF")
