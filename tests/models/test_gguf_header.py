"""A GGUF file whose header states more than there is, refused before room is made for it."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from malmend.errors import ModelError
from malmend.models.gguf_header import LONGEST, check_gguf
from malmend.models.load import load_model


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def header(*entries: bytes, version: int = 3, tensors: int = 0, count: int | None = None) -> bytes:
    count = len(entries) if count is None else count
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + b"".join(entries)


def entry(name: str, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def listed(kind: int, count: int, content: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + content


GOOD = header(
    entry("general.architecture", 8, string("llama")),
    entry("llama.block_count", 4, struct.pack("<I", 2)),
    entry("tokenizer.ggml.padding_token_id", 4, struct.pack("<I", 2**32 - 1)),
    entry("general.quantized_at", 10, struct.pack("<Q", 1_700_000_000)),
    entry("tokenizer.ggml.tokens", 9, listed(8, 2, string("a") + string("b"))),
    entry("tokenizer.ggml.scores", 9, listed(6, 2, struct.pack("<ff", 0.0, 1.0))),
    entry("llama.eps", 6, struct.pack("<f", 1e-5)),
    entry("nested", 9, listed(9, 1, listed(4, 1, struct.pack("<I", 1)))),
)
BAD = {
    "blocks": header(entry("llama.block_count", 4, struct.pack("<I", 1_001))),
    "no magic": b"GGML" + GOOD[4:],
    "nothing": b"",
    "another version": header(version=4),
    "more entries than bytes": header(count=2**60),
    "more tensors than bytes": header(tensors=2**60),
    "an entry that is not there": header(count=1),
    "a name longer than the file": header(struct.pack("<Q", 2**62)),
    "a list of numbers longer than the file": header(entry("x", 9, listed(4, 2**61))),
    "a list of words longer than the file": header(entry("x", 9, listed(8, 2**40))),
    "lists of lists longer than the file": header(entry("x", 9, listed(9, 2**40))),
    "lists without end": header(entry("x", 9, listed(9, 1) * 50)),
    "a value of no kind": header(entry("x", 99, b"")),
    "a hundred million blocks": header(entry("llama.block_count", 4, struct.pack("<I", 10**8))),
    "a context of billions": header(entry("llama.context_length", 4, struct.pack("<I", 2**31))),
    "a width of millions": header(entry("llama.embedding_length", 4, struct.pack("<I", 2**22))),
    "cut off": GOOD[:-3],
}


def taken(content: bytes, path: Path) -> bool:
    path.write_bytes(content)
    try:
        check_gguf(path)
    except ModelError:
        return False
    return True


def test_a_good_header_is_taken_and_no_beginning_of_it_is(tmp_path):
    assert taken(GOOD, tmp_path / "m.gguf")
    assert not any(taken(GOOD[:size], tmp_path / "m.gguf") for size in range(len(GOOD)))


@pytest.mark.parametrize("context", [2_097_152, 10_485_760, LONGEST])
def test_a_long_context_is_no_damage(context, tmp_path):
    for name in ("llama.context_length", "llama.rope.scaling.original_context_length"):
        for size in (context, context + LONGEST):
            content = header(entry(name, 4, struct.pack("<I", size)))
            assert taken(content, tmp_path / "m.gguf") is (size <= LONGEST)


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_cannot_be_is_refused(name, tmp_path):
    (tmp_path / "m.gguf").write_bytes(BAD[name])
    with pytest.raises(ModelError, match="is no whole GGUF file"):
        check_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match="is no whole GGUF file"):
        load_model(str(tmp_path / "m.gguf"))
