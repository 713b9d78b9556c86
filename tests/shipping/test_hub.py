"""Uploads through a fake of huggingface_hub's HfApi; every failure is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from malmend.commands.push import push, without_paths
from malmend.errors import MalmendError
from malmend.shipping.record import RECORD, write_record


class FakeApi:
    """Remembers calls; ``fault`` is raised by the call of that name."""

    def __init__(self, fault=None, at="create_repo"):
        self.calls, self.fault, self.at = [], fault, at

    def _call(self, name, keywords):
        self.calls.append((name, keywords))
        if self.fault is not None and name == self.at:
            raise self.fault

    def create_repo(self, **keywords):
        self._call("create_repo", keywords)

    def create_commit(self, **keywords):
        self._call("create_commit", keywords)
        return SimpleNamespace(commit_url="https://hub/me/edit/commit/1")


@pytest.fixture
def folder(tmp_path):
    write_record(tmp_path, {"to": "lora", "malmend": "1.2", "patch": {}})
    return tmp_path


def refused(status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("no", response=response)


class Unreachable(Exception):
    """As an HTTP library's own."""


def uploaded(api):
    """What the commit would put where, as bytes."""
    ((_, commit),) = [call for call in api.calls if call[0] == "create_commit"]
    return {
        one.path_in_repo: one.path_or_fileobj
        if isinstance(one.path_or_fileobj, bytes)
        else Path(one.path_or_fileobj).read_bytes()
        for one in commit["operations"]
    }


def test_the_folder_goes_up_whole_in_one_commit(folder):
    (folder / "README.md").write_text("a card")
    (folder / "more").mkdir()
    (folder / "more" / "weights.safetensors").write_bytes(b"12")
    (folder / ".malmend.lock").touch()
    api = FakeApi()
    assert push(folder, "me/edit", private=True, api=api) == "https://hub/me/edit/commit/1"
    assert api.calls[0] == (
        "create_repo",
        {"repo_id": "me/edit", "private": True, "exist_ok": True},
    )
    assert api.calls[1][1]["commit_message"] == "lora export by malmend 1.2"
    files = uploaded(api)
    assert sorted(files) == ["README.md", RECORD, "more/weights.safetensors"]
    assert files["README.md"] == b"a card"
    assert files["more/weights.safetensors"] == b"12"
    assert json.loads(files[RECORD]) == json.loads((folder / RECORD).read_text())


def test_no_path_of_this_machine_goes_up(folder):
    here = str(folder.absolute())
    patch = {"model": here, "editor": f"{here}/editor", "sites": {"model.layers.0": {"rank": 2}}}
    write_record(folder, {"to": "lora", "model": here, "facts": f"{here}/f.jsonl", "patch": patch})
    (folder / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": here, "target_modules": ["model.layers.0"], "r": 2})
    )
    (folder / "config.json").write_text(json.dumps({"_name_or_path": here, "unk_token": "/"}))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"/": 1}}}))
    api = FakeApi()
    push(folder, "me/edit", api=api)
    files = uploaded(api)
    assert all(here.encode() not in said for said in files.values())
    record = json.loads(files[RECORD])
    assert record["model"] == record["patch"]["model"] == folder.name
    assert record["patch"]["editor"] == "editor"
    assert record["facts"] == "f.jsonl"
    assert record["patch"]["sites"] == {"model.layers.0": {"rank": 2}}
    config = json.loads(files["adapter_config.json"])
    assert config == {
        "base_model_name_or_path": folder.name,
        "target_modules": ["model.layers.0"],
        "r": 2,
    }
    assert json.loads(files["config.json"])["unk_token"] == "/"
    for said, left in (
        ({"other": "/tmp/x/model2"}, {"other": "model2"}),
        ({"model": "../../home/jo/x"}, {"model": "x"}),
        (
            {"model": "org/name", "editor": "shipped:a"},
            {"model": "org/name", "editor": "shipped:a"},
        ),
        (
            {"facts": "acme-secret/facts.jsonl", "_name_or_path": "work/model"},
            {"facts": "facts.jsonl", "_name_or_path": "model"},
        ),
        (
            {"text": "a/b", "calibrate": "a/c", "editor": "a/d"},
            {"text": "b", "calibrate": "c", "editor": "d"},
        ),
        (
            {"note": ["file:///home/jo/x", "C:\\Users\\jo\\x", "/home/me"]},
            {"note": ["x", "x", "me"]},
        ),
        (
            {"token": "/think", "unk": "/", "end": "</s>"},
            {"token": "/think", "unk": "/", "end": "</s>"},
        ),
    ):
        assert without_paths(said) == left
    # Here it stays, where the base is found by it.
    assert here in (folder / RECORD).read_text()


@pytest.mark.parametrize("at", ["create_repo", "create_commit"])
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (LocalTokenNotFoundError("none"), "asks for a token"),
        (refused(401), "asks for a token"),
        (refused(403), "does not let this token write to me/edit"),
        (refused(500), "refused the upload to me/edit"),
        (Unreachable("name or service not known"), "cannot be reached .name or service"),
        (OfflineModeIsEnabled("offline"), "cannot be reached"),
        (ConnectionError("down"), "cannot be reached"),
    ],
)
def test_each_failure_is_one_sentence(folder, fault, at, said):
    with pytest.raises(MalmendError, match=said) as caught:
        push(folder, "me/edit", api=FakeApi(fault, at))
    assert "\n" not in str(caught.value)


def test_json_in_a_folder_of_the_folder_names_no_path_either(folder):
    (folder / "second").mkdir()
    config = {"base_model_name_or_path": str(folder)}
    (folder / "second" / "adapter_config.json").write_text(json.dumps(config))
    api = FakeApi()
    push(folder, "me/edit", api=api)
    said = json.loads(uploaded(api)["second/adapter_config.json"])
    assert said == {"base_model_name_or_path": folder.name}


def test_a_name_that_is_no_utf8_goes_up_escaped(folder):
    write_record(folder, {"to": "lora", "malmend": "1.2", "patch": {}, "facts": "f\udcff.jsonl"})
    api = FakeApi()
    push(folder, "me/edit", api=api)
    assert json.loads(uploaded(api)[RECORD].decode("utf-8"))["facts"] == "f\udcff.jsonl"


@pytest.mark.parametrize("text", ['{"a":', "[" * 100_000])
def test_damaged_json_is_found_before_a_repository_is_made(folder, text):
    (folder / "config.json").write_text(text)
    api = FakeApi()
    with pytest.raises(MalmendError, match=r"config.json is damaged .*; export again"):
        push(folder, "me/edit", api=api)
    assert api.calls == []


def test_a_link_is_not_followed(folder, tmp_path_factory):
    secret = tmp_path_factory.mktemp("other") / "secret.txt"
    secret.write_text("secret")
    (folder / "notes.txt").symlink_to(secret)
    api = FakeApi()
    with pytest.raises(MalmendError, match=r"notes.txt is a link"):
        push(folder, "me/edit", api=api)
    assert api.calls == []


def test_what_is_no_export_stays_here(folder, tmp_path):
    api = FakeApi()
    with pytest.raises(MalmendError, match="expected a name like org/name"):
        push(folder, "edit", api=api)
    with pytest.raises(MalmendError, match=f"it has no {RECORD}"):
        push(tmp_path / "typo", "me/edit", api=api)
    (folder / RECORD).write_text("{")
    with pytest.raises(MalmendError, match="is damaged"):
        push(folder, "me/edit", api=api)
    (folder / RECORD).write_text('{"format": 9, "patch": {}}')
    with pytest.raises(MalmendError, match="has format 9, this version reads 1"):
        push(folder, "me/edit", api=api)
    assert api.calls == []


def test_the_real_api_without_a_network_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    with pytest.raises(MalmendError, match=r"cannot be reached|asks for a token"):
        push(folder, "me/edit")
