"""Export, diff and conflicts as a user runs them; a typo in each input is one sentence."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from dataclasses import replace

import pytest
import shipping_support
import torch
from peft import PeftModel
from shipping_support import (
    RANK,
    assert_untouched,
    bits_of,
    logits_of,
    refusal,
    towards_alternatives,
)

import command_support
import malmend as api
from command_support import files_in, malmend
from malmend.commands import export as export_module
from malmend.commands.evaluate import evaluate
from malmend.commands.export import export
from malmend.models.identity import configuration_of
from malmend.models.load import load_model
from malmend.patch import applied
from malmend.patch_file import load_patch
from malmend.shipping.adapter import read_adapter
from malmend.shipping.merged import merged

tiny = command_support.tiny
cache = command_support.cache
patch = shipping_support.patch


def record_of(folder):
    return json.loads((folder / "malmend.json").read_text())


# --- export


def test_an_exact_adapter_by_the_command_line(tiny, patch, tmp_path, capsys):
    folder = tmp_path / "adapter"
    assert malmend("export", patch, "--to", "lora", folder, "--facts", tiny.facts) == 0
    shown = capsys.readouterr().out
    assert f"LoRA of rank {RANK} at 2 layers: exact" in shown
    assert "--max-lora-rank 32" in shown
    assert "asked of what was read back, of 12 facts" in " ".join(shown.split())
    assert files_in(tmp_path) == {
        f"adapter/{name}"
        for name in ("README.md", "adapter_config.json", "adapter_model.safetensors")
    } | {"adapter/malmend.json"}
    ids = {"input_ids": torch.tensor([[5, 6, 7, 8, 9]])}
    with applied(tiny.loaded, load_patch(patch)) as model:
        wanted = logits_of(model, ids)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        adapted = PeftModel.from_pretrained(load_model(tiny.model).model, folder)
    assert (logits_of(adapted, ids) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_figures_are_those_of_what_was_read_back(tiny, patch, tmp_path):
    exact = export(patch, tmp_path / "exact", facts=tiny.facts, model=tiny.loaded)
    cut = export(patch, tmp_path / "cut", rank=1, facts=tiny.facts, model=tiny.loaded)
    own = evaluate(tiny.loaded, tiny.facts, patch, decode_facts=64, text="none")
    assert exact.metrics["patch"] == cut.metrics["patch"] == own.edited
    assert exact.metrics["unedited"] == own.unedited
    back = evaluate(tiny.loaded, tiny.facts, tmp_path / "cut", decode_facts=64, text="none")
    assert cut.metrics["exported"] == back.edited
    assert cut.metrics["exported"]["LS"].kl != cut.metrics["patch"]["LS"].kl
    assert record_of(tmp_path / "cut")["metrics"]["exported"]["LS"]["kl"] == back.edited["LS"].kl


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_what_is_made_of_a_cut_adapter_says_the_cut(tiny, patch, tmp_path, to):
    made = load_patch(patch)
    figures = {"metrics": {"ES": {"token_ratio": {"edited": 1.0}}}, "mean_residual": 0.25}
    full = api.Patch(made.factors, {**made.provenance, **figures, "residual_after": 0.5})
    export(full, tmp_path / "whole", model=tiny.loaded)
    assert read_adapter(tmp_path / "whole").provenance == full.provenance
    export(full, tmp_path / "cut", rank=8, model=tiny.loaded)
    said = read_adapter(tmp_path / "cut").provenance
    assert said == {**made.provenance, "cut": {"rank": 8, "from": RANK}}
    assert api.inspect(tmp_path / "cut").entries["cut"] == {"rank": 8, "from": RANK}
    export(tmp_path / "cut", tmp_path / "again", to, model=tiny.loaded)
    card = " ".join((tmp_path / "again" / "README.md").read_text().split())
    assert f"cut to rank 8, from {RANK}." in card
    assert "itself measured" not in card
    if to == "lora":
        assert read_adapter(tmp_path / "again").provenance == said
        export(tmp_path / "cut", tmp_path / "less", rank=1, model=tiny.loaded)
        assert read_adapter(tmp_path / "less").provenance["cut"] == {"rank": 1, "from": RANK}


def test_a_patch_made_for_alternatives_is_asked_for_them(tiny, patch, tmp_path):
    facts, other = towards_alternatives(tiny, patch, tmp_path)
    found = export(other, tmp_path / "out", facts=facts, model=tiny.loaded, decode_facts=0).metrics
    asked = {"decode_facts": 0, "text": "none"}
    own = evaluate(tiny.loaded, facts, other, alternative=True, **asked)
    assert (found["unedited"], found["patch"]) == (own.unedited, own.edited)
    assert found["patch"]["ES"] != evaluate(tiny.loaded, facts, other, **asked).edited["ES"]


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_a_path_that_is_no_utf8_is_written_escaped(tiny, patch, tmp_path, to):
    facts = os.fsdecode(bytes(tmp_path) + b"/f\xff.jsonl")
    shutil.copy(tiny.facts, facts)
    base = replace(tiny.loaded, name=facts)  # the card names the model
    export(patch, tmp_path / "out", to=to, facts=facts, model=base, decode_facts=0)
    assert record_of(tmp_path / "out")["facts"] == facts
    assert r"f\udcff" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_a_cut_is_said_layer_by_layer(tiny, patch, tmp_path, capsys):
    folder = tmp_path / "adapter"
    assert malmend("export", patch, "--to=lora", folder, "--rank", 8, "--text", tiny.text) == 0
    assert "cut to rank 8" in capsys.readouterr().out
    record = record_of(folder)
    assert (record["exact"], record["rank"], record["keys"]) == (False, 8, "text.txt")
    whole, kept = load_patch(patch), read_adapter(folder)
    for name, one in record["sites"].items():
        assert one["rank"] == RANK
        plain = (whole.shift(name) - kept.shift(name)).norm() / whole.shift(name).norm()
        assert one["error"] == pytest.approx(plain.item(), rel=1e-4)
        assert 0 < one["error_on_keys"] < 1


def test_a_merged_model_by_the_command_line(tiny, patch, tmp_path, capsys):
    folder = tmp_path / "merged"
    before = bits_of(tiny.loaded.model)
    arguments = ["--to", "merged", folder, "--dtype", "bfloat16", "--facts", tiny.facts]
    assert malmend("export", patch, *arguments, "--decode-facts", 1) == 0
    shown = capsys.readouterr().out
    assert "Merged into 2 layers, bfloat16: rounding took at most" in shown
    wanted = merged(tiny.loaded, load_patch(patch), "bfloat16").model
    found = load_model(str(folder), "bfloat16").model
    for one, other in zip(found.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(one, other)
    record = record_of(folder)
    assert record["dtype"] == "bfloat16"
    assert set(record["sites"]) == set(load_patch(patch).factors)
    assert record["metrics"]["exported"]["LS"]["kl"] > 0
    assert (folder / "tokenizer.json").is_file()
    assert (folder / "generation_config.json").is_file()
    assert_untouched(tiny.loaded.model, before)
    # and the two models differ at the edited layers alone
    assert malmend("diff", tiny.model, folder) == 0
    shown = capsys.readouterr().out
    assert "2 weights differ" in shown
    assert "more differ by rounding alone" in shown


def test_an_adapter_can_be_merged_as_a_patch_can(tiny, patch, tmp_path):
    export(patch, tmp_path / "adapter", model=tiny.loaded)
    export(tmp_path / "adapter", tmp_path / "one", to="merged", model=tiny.loaded)
    export(patch, tmp_path / "two", to="merged", model=tiny.loaded)
    one, two = (load_model(str(tmp_path / name)).model for name in ("one", "two"))
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("to", ["lora", "merged"])
def test_nothing_half_written_is_left(tiny, patch, tmp_path, monkeypatch, to):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module, "write_record", fails)
    with pytest.raises(api.MalmendError, match="cannot be written"):
        export(patch, tmp_path / "out", to=to, model=tiny.loaded)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "lara"], "--to is 'lara' (did you mean 'lora'?), expected"),
        (["--to", "lora", "--rank", "100"], "1, 8, 16, 32, 64, 128, 256, 320, 512"),
        (["--to", "lora", "--dtype", "bfloat16"], "leave --dtype out"),
        (["--to", "merged", "--rank", "8"], "of --to lora"),
        (["--to", "merged", "--dtype", "bfloat61"], "did you mean 'bfloat16'?"),
        (["--to", "lora", "--facts", "typo.jsonl"], "typo.jsonl"),
        (["--to", "lora", "--rank", "8", "--text", "typo.txt"], "typo.txt"),
        (["--to", "lora", "--text", "text.txt"], "give --rank too"),
        (["--to", "lora", "--model", "smollm2-135n"], "did you mean 'smollm2-135m'?"),
        (["--to", "lora", "--rnk", "8"], "did you mean '--rank'?"),
        ([], "--to must be given"),
        (["--to", "lora", "--decode-facts", "-1"], "decode_facts is -1"),
        (["--to", "lora", "--limit", "5"], "give --facts, or leave it out"),
    ],
)
def test_a_typo_in_each_input_of_export_is_one_sentence(patch, tmp_path, capsys, arguments, said):
    assert malmend("export", patch, tmp_path / "out", *arguments) == 2
    assert said in refusal(capsys)
    assert list(tmp_path.iterdir()) == []


def test_folders_and_patches_that_do_not_serve(tiny, patch, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for folder, said in (
        (tmp_path / "full", "holds files already"),
        (tmp_path / "full" / "notes.txt", "is a file"),
        (tmp_path / "no" / "where", "There is no folder"),
    ):
        assert malmend("export", patch, "--to", "lora", folder) == 2
        assert said in refusal(capsys)
    assert malmend("export", tmp_path / "typo", "--to", "lora", tmp_path / "out") == 2
    assert "There is no patch file" in refusal(capsys)
    nameless = load_patch(patch)
    nameless.provenance.pop("model")
    with pytest.raises(api.PatchError, match="give --model"):
        export(nameless, tmp_path / "out")
    assert files_in(tmp_path) == {"full/notes.txt"}
    (tmp_path / "empty").mkdir()
    export(patch, tmp_path / "empty", model=tiny.loaded)  # an empty folder is as good as none


def test_another_base_needs_force(tiny, patch, tmp_path, capsys):
    other = command_support.save_model(tmp_path / "other", seed=1)
    arguments = ["export", patch, "--to", "lora", tmp_path / "out", "--model", other]
    assert malmend(*arguments) == 2
    assert "or --force" in refusal(capsys)
    assert malmend(*arguments, "--force") == 0
    assert record_of(tmp_path / "out")["forced"] is True
    assert "Forced" in (tmp_path / "out" / "README.md").read_text()


def test_another_configuration_that_is_forced_is_recorded(tiny, patch, tmp_path):
    known = load_patch(patch)
    other = {**configuration_of(tiny.loaded.model), "rms_norm_eps": 0.5}
    known = replace(known, provenance={**known.provenance, "configuration": other})
    with pytest.raises(api.PatchError, match=r"rms_norm_eps 0\.5"):
        export(known, tmp_path / "out", model=tiny.loaded)
    export(known, tmp_path / "out", model=tiny.loaded, force=True)
    assert record_of(tmp_path / "out")["forced"] is True


# --- where a patch is read, an adapter may stand


def test_an_adapter_is_evaluated_asked_and_inspected(tiny, patch, tmp_path, capsys):
    folder = tmp_path / "adapter"
    export(patch, folder, model=tiny.loaded)
    arguments = ["--patch", folder, "--limit", 2, "--decode-facts", 0, "--text", "none"]
    assert malmend("eval", tiny.model, tiny.facts, *arguments) == 0
    assert "edited" in capsys.readouterr().out
    (folder / "malmend.json").unlink()  # as PEFT alone writes it
    assert malmend("ask", tiny.model, "The capital of Ora is", "--patch", folder) == 0
    assert "edited:" in capsys.readouterr().out
    assert malmend("inspect", folder) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("adapter ")
    assert f"rank {RANK}" in shown


# --- diff


def test_a_difference_as_a_patch_is_measured_as_the_patch_was(tiny, patch, tmp_path, capsys):
    export(patch, tmp_path / "merged", to="merged", model=tiny.loaded)
    found = tmp_path / "found"
    assert malmend("diff", tiny.model, tmp_path / "merged", "--out", found) == 0
    assert "2 weights differ, 55 are equal bit for bit" in capsys.readouterr().out
    one, two = (
        evaluate(tiny.loaded, tiny.facts, path, decode_facts=0, text="none").edited
        for path in (patch, found)
    )
    assert two["LS"].kl == pytest.approx(one["LS"].kl, rel=1e-4)
    assert malmend("inspect", found) == 0
    assert "method: diff" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["model", "other"])
def test_a_typo_in_a_model_of_diff_is_one_sentence(tiny, tmp_path, capsys, place):
    names = {"model": tiny.model, "other": tiny.model} | {place: "smolm2-135m"}
    assert malmend("diff", names["model"], names["other"]) == 2
    assert "did you mean 'smollm2-135m'?" in refusal(capsys)


# --- push


def test_push_by_the_command_line(tmp_path, capsys):
    assert malmend("push", tmp_path, "me/edit") == 2
    assert "is no exported folder" in refusal(capsys)
