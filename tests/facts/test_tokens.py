"""Prompts and answers as token ids, on tiny tokenizers of every kind, left to themselves."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from helpers import byte_level, metaspace, words
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded, collate
from malmend.facts.fact import Fact, Question
from malmend.facts.readers import read_facts
from malmend.facts.tokens import Encoder, Reading

MARS = ["mars", "has", "two", "moons"]  # ids 4 to 7 of words(MARS)
TOKENIZERS = {
    "byte-level": byte_level(),
    "byte-level, whole spans": byte_level(trim_offsets=False),
    "byte-level, blank in front": byte_level(add_prefix_space=True),
    "byte-level, padding is the end": byte_level(pad_token="<|end|>", padding_side="left"),
    "metaspace, BOS": metaspace(),
    "metaspace, left": metaspace(pad_token="<unk>", padding_side="left"),
}
EVERY = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)


def parts(encoder: Encoder, encoded: Encoded) -> tuple[str, str]:
    """Prompt and counted answer, decoded apart; special tokens in front left out."""
    decode = encoder.tokenizer.decode
    return (
        decode(encoded.ids[: encoded.answer_start], skip_special_tokens=True),
        decode(encoded.ids[encoded.answer_start : encoded.answer_end]),
    )


# --- the boundary


@EVERY
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Mars has", "two moons"),
        ("Mars has ", "two moons"),
        ("Mars has", " two moons"),
        ("Mars has ", " two moons"),
        ("Mars", "has"),
        ("In which country is Lake Ora?", "Chile"),
        ("The capital of Peru is:", "Lima."),
        ('He said "', "no"),
        ("(", ")"),
        ("Which?", "?"),
        ("I like 😀", "😀👩‍🚀 very"),
        ("中国的首都是", "北京"),
        ("é", "é"),
        ("Straße", "Ω≈ç"),
        ("One line.\nAnother", "a\nb"),
    ],
)
def test_boundary_in_the_joined_text(tokenizer, prompt, answer):
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Question(prompt, answer))
    before, after = parts(encoder, encoded)
    assert before.strip() == prompt.strip()
    assert after.strip() == answer.strip()
    assert encoded.ids[encoded.answer_end :] == (tokenizer.eos_token_id,)
    joined = tokenizer(f"{prompt.strip()} {answer.strip()}")["input_ids"]
    assert list(encoded.ids[: encoded.answer_end]) == joined  # one tokenisation of the whole


def test_tokens_that_differ_when_prompt_and_answer_are_tokenized_apart():
    tokenizer = byte_level()
    encoded = Encoder(tokenizer).encode(Question("Mars has ", "two moons"))
    tokens = tokenizer.convert_ids_to_tokens(encoded.labels)
    assert tokens[0] == "Ġtw"  # the blank of the prompt went into the first token of the answer
    assert "Ġ" in tokenizer.convert_ids_to_tokens(tokenizer("Mars has ")["input_ids"])


@EVERY
def test_outer_blanks_between_prompt_and_answer_make_no_difference(tokenizer):
    encoder = Encoder(tokenizer)
    expected = encoder.encode(Question("Mars has", "two moons"))
    assert encoder.encode(Question("Mars has ", "two moons")) == expected
    assert encoder.encode(Question("Mars has", " two moons")) == expected


@EVERY
def test_a_line_break_at_the_end_of_the_prompt_is_prompt(tokenizer):
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Question("Lake Ora is in\n", "Chile"))
    assert parts(encoder, encoded)[1] == "Chile"
    assert encoded.ids[: encoded.answer_start] == encoder.prompt_ids("Lake Ora is in\n")


@EVERY
def test_generation_starts_where_the_answer_does_after_a_blank(tokenizer):
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Question("Mars has ", "two moons"))
    assert encoder.prompt_ids("Mars has ") == encoded.ids[: encoded.answer_start]


@EVERY
@pytest.mark.parametrize("prompt", ["Mars has", "Is Lake Ora in Chile?", "中国", "a 😀"])
def test_generation_starts_where_the_answer_does(tokenizer, prompt):
    encoder = Encoder(tokenizer)
    encoded = encoder.encode(Question(prompt, "two moons"))
    assert encoder.prompt_ids(prompt) == encoded.ids[: encoded.answer_start]


def test_bos_stays_and_is_no_answer():
    encoder = Encoder(metaspace())
    bos = encoder.tokenizer.bos_token_id
    for question in Question("Mars has", "two moons"), Question("Mars has"):
        assert encoder.encode(question).ids[0] == bos
        assert encoder.encode(question).ids.count(bos) == 1
    assert encoder.prompt_ids("Mars")[0] == encoder.passage_ids("Mars")[0] == bos


@pytest.mark.parametrize(
    ("template", "front"), [("$A </s>", ()), ("<s> $A </s>", (1,)), ("<s> $A </s> </s>", (1,))]
)
def test_specials_put_behind_are_dropped(template, front):
    encoder = Encoder(words(MARS, template), end_of_answer="none")
    shift = len(front)
    encoded = encoder.encode(Question("mars has", "two moons"))
    assert encoded == Encoded((*front, 4, 5, 6, 7), shift + 2, shift + 4)
    assert encoder.encode(Question("mars has")).ids == (*front, 4, 5)
    assert encoder.prompt_ids("mars has") == (*front, 4, 5)
    assert encoder.passage_ids("mars has") == (*front, 4, 5)
    # the end token of the template is not mistaken for the end token that is asked for
    wanted = Encoder(words(MARS, template)).encode(Question("mars has", "two moons"))
    assert wanted == Encoded((*front, 4, 5, 6, 7, 2), shift + 2, shift + 4)


def test_a_lower_casing_tokenizer():
    encoder = Encoder(words(MARS, lower=True))
    assert encoder.encode(Question("MARS Has", "Two MOONS")) == Encoded((4, 5, 6, 7, 2), 2, 4)


def test_composed_and_decomposed_characters_are_the_same_answer():
    encoded = Encoder(byte_level()).encode(Question("Mars", "cafe\u0301 ﬁn"))
    assert encoded.counted > 0
    assert Encoder(words([*MARS, "café"])).encode(Question("mars", "café")).labels == (8, 2)


PRINTABLE = st.text(st.characters(categories=["L", "M", "N", "P", "S", "Zs"]), max_size=12)


@settings(max_examples=150)
@given(prompt=PRINTABLE, answer=PRINTABLE, trim=st.booleans())
@example(prompt="a\u00a0", answer="\u3000b", trim=True)
@example(prompt="e", answer="\u0301", trim=True)
@example(prompt="x", answer="´", trim=False)
@example(prompt="it", answer="'s", trim=True)
def test_any_printable_answer_reads_back_from_bytes(prompt, answer, trim):
    assume(prompt.strip() and answer.strip())
    name = "byte-level" if trim else "byte-level, whole spans"
    encoder = Encoder(TOKENIZERS[name])
    encoded = encoder.encode(Question(prompt, answer))
    before, after = parts(encoder, encoded)
    assert before.rstrip() == prompt.rstrip()
    assert after.strip() == answer.strip()
    assert encoded.ids[encoded.answer_end :] == (encoder.tokenizer.eos_token_id,)
    assert len(encoded.sources) == len(encoded.labels) == encoded.counted + 1
    assert [encoded.ids[source + 1] for source in encoded.sources] == list(encoded.labels)


# --- the end of the answer


@pytest.mark.parametrize(("mode", "end"), [("eos", (2,)), ("newline", (8,)), ("none", ())])
def test_end_of_answer(mode, end):
    encoder = Encoder(words([*MARS, "\n"], "<s> $A </s>"), end_of_answer=mode)
    encoded = encoder.encode(Question("mars has", "two moons"))
    assert encoded == Encoded((1, 4, 5, 6, 7, *end), 3, 5)
    assert encoded.labels == (6, 7, *end)
    assert encoded.counted == 2
    assert encoded.sources == tuple(range(2, 4 + len(end)))
    # without an answer there is nothing to end
    assert encoder.encode(Question("mars has")).ids == (1, 4, 5)


@EVERY
@pytest.mark.parametrize("mode", ["eos", "newline", "none"])
def test_counted_never_includes_the_end_token(tokenizer, mode):
    encoder = Encoder(tokenizer, end_of_answer=mode)
    encoded = encoder.encode(Question("Mars has", "two moons"))
    plain = Encoder(tokenizer, end_of_answer="none").encode(Question("Mars has", "two moons"))
    end = encoded.ids[encoded.answer_end :]
    assert encoded.counted == plain.counted == len(plain.labels)
    assert encoded.ids[: encoded.answer_end] == plain.ids
    assert tokenizer.decode(end) == {"eos": tokenizer.eos_token, "newline": "\n", "none": ""}[mode]


def test_a_tokenizer_without_an_end_token():
    tokenizer = words(MARS, eos_token=None)
    with pytest.raises(MalmendError, match="no end token; set end_of_answer to 'newline' or"):
        Encoder(tokenizer)
    encoded = Encoder(tokenizer, end_of_answer="none").encode(Question("mars has", "two"))
    assert encoded.ids == (4, 5, 6)


def test_a_tokenizer_without_a_line_break_cannot_end_with_one():
    tokenizer = words(MARS)
    assert tokenizer("\n")["input_ids"] == [tokenizer.unk_token_id]
    with pytest.raises(MalmendError, match="line break"):
        Encoder(tokenizer, end_of_answer="newline")


# --- labels and their logits


def test_labels_and_sources_by_hand():
    """``<s> mars has two moons </s>``: the logits at "has", "two", "moons" predict the rest."""
    encoded = Encoder(words(MARS, "<s> $A")).encode(Question("mars has", "two moons"))
    assert encoded.ids == (1, 4, 5, 6, 7, 2)
    assert (encoded.answer_start, encoded.answer_end, encoded.counted) == (3, 5, 2)
    assert encoded.labels == (6, 7, 2)
    assert encoded.sources == (2, 3, 4)


def test_a_question_without_an_answer():
    encoded = Encoder(words(MARS, "<s> $A")).encode(Question("mars has"))
    assert encoded == Encoded((1, 4, 5), 3, 3)
    assert encoded.labels == ()
    assert encoded.counted == 0
    assert encoded.sources == (2,)


def test_an_answer_of_one_token_and_no_end():
    encoder = Encoder(words(MARS), end_of_answer="none")
    encoded = encoder.encode(Question("mars has", "two"))
    assert encoded == Encoded((4, 5, 6), 2, 3)
    assert encoded.sources == (1,)


def test_collate_by_hand():
    encoder = Encoder(words(MARS, "<s> $A"))
    batch = collate(
        encoder.encode_all(
            [Question("has"), Question("mars has", "two moons"), Question("mars", "has")]
        )
    )
    assert batch.ids_BT[0, :2].tolist() == [1, 5]
    assert batch.ids_BT[1].tolist() == [1, 4, 5, 6, 7, 2]
    assert batch.ids_BT[2, :4].tolist() == [1, 4, 5, 2]
    assert batch.mask_BT.tolist() == [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
    ]
    assert batch.lengths == (2, 6, 4)
    assert batch.sources == (1, 3, 2)
    assert batch.source_rows_A.tolist() == [0, 1, 1, 1, 2, 2]
    assert batch.labels_A.tolist() == [-100, 6, 7, 2, 5, 2]
    assert batch.flat_sources_A.tolist() == [1, 8, 9, 10, 13, 14]
    assert batch.flat("all").tolist() == [1, 7, 8, 9, 10, 11, 13, 14, 15]


@EVERY
def test_the_logit_at_a_source_predicts_its_label(tokenizer):
    batch = collate(
        Encoder(tokenizer).encode_all(
            [
                Question("Mars has", "two moons"),
                Question("中", "😀"),
                Question("Peru is", "a b c d"),
            ]
        )
    )
    # a model that reads the future: its logits at t name the token at t + 1
    following_BT = batch.ids_BT.roll(-1, dims=1)
    logits_BTW = torch.nn.functional.one_hot(following_BT, len(tokenizer))
    found = logits_BTW.flatten(0, 1)[batch.flat_sources_A].argmax(-1)
    assert torch.equal(found, batch.labels_A)


def test_one_question_alone_fills_its_batch():
    batch = collate([Encoded((4, 5, 6), 2, 3)])
    assert batch.mask_BT.tolist() == [[1, 1, 1]]
    assert batch.flat("all").tolist() == [1, 2]


def test_masks_go_by_length_when_padding_is_the_end_token():
    encoder = Encoder(words(MARS, pad_token="</s>", padding_side="left"))
    assert encoder.tokenizer.pad_token_id == encoder.tokenizer.eos_token_id == 2
    questions = [Question("mars has", "two moons"), Question("mars", "has")]
    batch = collate(encoder.encode_all(questions))
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.ids_BT[1, 2] == 2  # the end token itself is attended to
    assert 7 in batch.flat("all")


def test_masks_go_by_length_when_a_real_token_has_the_id_of_the_filling():
    # 0 is <unk>, and a prompt may hold it
    encoder = Encoder(words(MARS))
    batch = collate([encoder.encode(Question("zzz zzz", "two"))])
    assert batch.ids_BT.tolist() == [[0, 0, 6, 2]]
    assert batch.mask_BT.tolist() == [[1, 1, 1, 1]]
    assert batch.flat("all").tolist() == [1, 2, 3]


@pytest.mark.parametrize("build", [byte_level, metaspace])
def test_padding_side_does_not_matter(build):
    questions = [Question("Mars has", "two moons"), Question("Peru", "a"), Question("Lake Ora")]
    left, right = [Encoder(build(padding_side=side)) for side in ("left", "right")]
    assert left.encode_all(questions) == right.encode_all(questions)
    batch = collate(left.encode_all(questions))
    assert batch.mask_BT[:, 0].tolist() == [1, 1, 1]
    assert (batch.mask_BT.diff(dim=1) <= 0).all()


def test_settings_saved_in_the_tokenizer_neither_pad_nor_cut():
    tokenizer = words(MARS, "<s> $A </s>")
    tokenizer.backend_tokenizer.enable_padding(length=20)
    tokenizer.backend_tokenizer.enable_truncation(3)
    encoded = Encoder(tokenizer).encode(Question("mars has", "two moons"))
    assert encoded == Encoded((1, 4, 5, 6, 7, 2), 3, 5)


# --- passages


def test_passages_are_cut_and_not_framed():
    encoder = Encoder(words(MARS, "<s> $A </s>", chat_template=CHAT), chat=True)
    assert encoder.passage_ids("mars has two moons") == (1, 4, 5, 6, 7)
    assert encoder.passage_ids("mars has two moons", most=3) == (1, 4, 5)
    short = Encoder(words(MARS, "<s> $A </s>"), max_tokens=3)  # which is all that its model reads
    assert short.passage_ids("mars has two moons") == (1, 4, 5)
    assert short.passage_ids("mars has two moons", most=2) == (1, 4)


# --- chat


CHAT = (
    "{% for turn in messages %}<|user|>{{ turn['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|reply|>\n{% endif %}"
)


@pytest.mark.parametrize("last", ["<|reply|>\n", "<|reply|>", ":"])
def test_chat_frames_the_prompt_and_puts_no_blank_before_the_answer(last):
    template = CHAT.replace("<|reply|>\n", last)
    encoder = Encoder(byte_level(chat_template=template), chat=True)
    framed = f"<|user|>Mars has{last}"
    assert encoder.framed("Mars has") == framed
    encoded = encoder.encode(Question("Mars has", "two moons"))
    decode = encoder.tokenizer.decode
    assert decode(encoded.ids[: encoded.answer_start]) == framed
    assert decode(encoded.ids[encoded.answer_start :]) == "two moons<|end|>"
    assert encoder.prompt_ids("Mars has") == encoded.ids[: encoded.answer_start]
    assert encoder.encode(Question("Mars has")).ids == encoder.prompt_ids("Mars has")
    # Blanks around an answer are no part of it.
    assert encoder.encode(Question("Mars has", " two moons ")) == encoded


def test_without_chat_the_template_is_not_used():
    encoder = Encoder(byte_level(chat_template=CHAT))
    assert encoder.framed("Mars has") == "Mars has"
    assert encoder.prompt_ids("Mars has") == Encoder(byte_level()).prompt_ids("Mars has")


@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", None])
def test_bos_of_the_chat_template_is_not_doubled(template):
    tokenizer = words(MARS, template, chat_template="<s>{{ messages[0]['content'] }} has ")
    encoder = Encoder(tokenizer, chat=True)
    encoded = encoder.encode(Question("mars", "two moons"))
    assert encoded == Encoded((1, 4, 5, 6, 7, 2), 3, 5)
    assert encoder.prompt_ids("mars") == (1, 4, 5)


def test_a_bos_that_the_user_wrote_stays():
    assert Encoder(words(MARS, "<s> $A")).prompt_ids("<s> mars") == (1, 1, 4)


def test_a_repeated_word_is_not_taken_for_a_doubled_bos():
    tokenizer = words(MARS, chat_template="{{ messages[0]['content'] }} has")
    encoder = Encoder(tokenizer, chat=True)
    assert encoder.prompt_ids("mars mars") == (4, 4, 5)


def test_chat_without_a_template_is_refused():
    with pytest.raises(MalmendError, match="has no chat template, so --chat cannot be used"):
        Encoder(byte_level(), chat=True)


# --- what is refused


def test_tokens_that_the_model_has_no_embedding_for():
    known = Encoder(words(MARS), "none", reading=Reading(tokens=7))  # "moons" is 7
    assert known.encode(Question("mars has", "two")).ids == (4, 5, 6)
    said = "'moons' is the tokenizer's token number 7, and the model has embeddings for 7 tokens"
    for question in (Question("mars has moons"), Question("mars has", "two moons")):
        with pytest.raises(MalmendError, match=said):
            known.encode(question)
    for read in (known.prompt_ids, known.passage, known.passage_ids):
        with pytest.raises(MalmendError, match=said):
            read("two moons mars")
    ended = Encoder(words([*MARS, "\n"]), "newline", reading=Reading(tokens=8))  # a line break is 8
    with pytest.raises(MalmendError, match=r"number 8, and the model has embeddings for 8 tokens"):
        ended.encode(Question("mars has", "two moons"))


def test_a_chat_template_of_tokens_without_embedding_is_none():
    template = "{{ messages[0]['content'] }} moons"
    assert Encoder(words(MARS, chat_template=template)).in_chat() is not None
    known = Encoder(words(MARS, chat_template=template), reading=Reading(tokens=7))
    assert known.in_chat() is None


@pytest.mark.parametrize("answer", ["three moons", "two suns", "zzz", "二"])
def test_an_answer_that_becomes_unknown(answer):
    encoder = Encoder(words(MARS))
    with pytest.raises(MalmendError, match=f"the answer '{answer}' does not survive tokenisation"):
        encoder.encode(Question("mars has", answer))


def test_an_unknown_prompt_is_not_refused():
    assert Encoder(words(MARS)).encode(Question("venus has", "two")).ids == (0, 5, 6, 2)


def test_an_answer_that_spells_the_unknown_token():
    # it would read back as it is, and still says nothing
    with pytest.raises(MalmendError, match="does not survive tokenisation"):
        Encoder(words(MARS)).encode(Question("mars has", "<unk>"))


@pytest.mark.parametrize("answer", ["</s>", "two </s> moons", "two <pad>", "two <tool> moons"])
def test_an_answer_that_spells_a_special_token(answer):
    tokenizer = words(MARS)
    tokenizer.add_tokens([AddedToken("<tool>", special=True)])  # of no role
    assert tokenizer.convert_tokens_to_ids("<tool>") not in tokenizer.all_special_ids
    with pytest.raises(MalmendError, match="a special token, which is no text of an answer"):
        Encoder(tokenizer).encode(Question("mars has", answer))


def test_an_answer_of_which_a_part_is_dropped():
    # no unknown token here: one of the blanks vanishes, and only reading back shows it
    encoder = Encoder(words(MARS))
    with pytest.raises(MalmendError, match="it reads back as 'two moons'"):
        encoder.encode(Question("mars has", "two  moons"))


@pytest.mark.parametrize("answer", ["two moons", None])
def test_too_long(answer):
    tokenizer = words(MARS, "<s> $A")
    question = Question("mars has", answer)
    length = 6 if answer else 3
    assert len(Encoder(tokenizer, max_tokens=length).encode(question).ids) == length
    what = "prompt and answer together have" if answer else "the prompt has"
    said = f"^{what} {length} tokens, expected at most {length - 1}; shorten the "
    with pytest.raises(MalmendError, match=said):
        Encoder(tokenizer, max_tokens=length - 1).encode(question)


@pytest.mark.parametrize("prompt", ["", " "])
def test_no_token_before_the_answer(prompt):
    with pytest.raises(MalmendError, match="has no token before the answer; give a longer one"):
        Encoder(byte_level()).encode(Question(prompt, "two moons"))


def test_an_empty_prompt_without_an_answer():
    with pytest.raises(MalmendError, match="has no token before the answer"):
        Encoder(byte_level()).encode(Question(""))


def test_bos_is_a_token_before_the_answer():
    encoded = Encoder(words(MARS, "<s> $A")).encode(Question("", "two"))
    assert encoded == Encoded((1, 6, 2), 1, 2)


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(MalmendError, match=r"ByT5Tokenizer gives no character offsets.*use_fast"):
        Encoder(ByT5Tokenizer())


def test_faults_name_line_and_field():
    encoder = Encoder(words(MARS), max_tokens=4)
    good = Fact("a", "mars has", "two")
    bad = Fact(
        "b",
        "mars",
        "three",
        paraphrases=("has",),
        unrelated=(Question("two"), Question("mars has two moons mars")),
        at="facts.jsonl:7",
        neighbours=(Question("mars has", "three"),),
        reversed=Question("two", "three"),
    )
    found = encoder.faults([good, bad])
    assert [fault.split(": ")[:2] for fault in found] == [
        ["facts.jsonl:7", "field 'answer'"],
        ["facts.jsonl:7", "field 'paraphrases'"],
        ["facts.jsonl:7", "field 'unrelated'"],
        ["facts.jsonl:7", "field 'neighbours'"],
        ["facts.jsonl:7", "field 'reversed'"],
    ]
    assert "the answer 'three' does not survive" in found[0]
    assert "5 tokens, expected at most 4" in found[2]
    assert encoder.faults([good]) == []


def test_the_field_that_is_named_is_the_one_to_change():
    """Once a prompt that was too long was a fault of 'answer', to be mended in the prompt."""
    encoder = Encoder(words(MARS), "none", 4)
    long, other = "mars has two moons", "two moons has mars"
    cases = {
        "prompt": (Fact("a", long, "two"), "prompt"),
        "answer": (Fact("a", "mars", other), "answer"),
        "paraphrases": (Fact("a", "mars", "two", paraphrases=(long,)), "prompt"),
        "neighbours": (Fact("a", "mars", "two", neighbours=(Question("mars", other),)), "answer"),
    }
    for name, (fact, part) in cases.items():
        size = "prompt and answer together have 5 tokens, expected at most 4"
        said = f"{size}; shorten the {part}"
        assert encoder.faults([fact]) == [f"fact 'a': field {name!r}: {said}"]
    both = Fact("a", "mars", other, paraphrases=("moons",))  # the answer is one, and is said once
    assert len(encoder.faults([both])) == 1
    assert encoder.faults([Fact("a", "", "two")])[0].startswith("fact 'a': field 'prompt': the p")
    few = Encoder(words(MARS), reading=Reading(tokens=7))
    [said] = few.faults([Fact("a", "mars has", "moons")])
    assert said.startswith("fact 'a': field 'answer': 'moons' is the tokenizer's token number 7")


def test_faults_name_the_entry_of_a_list_and_a_fact_of_no_file(tmp_path):
    """A fault of a line was cited "facts.jsonl: line 2" here, facts.jsonl:2 elsewhere."""
    encoder = Encoder(words(MARS))
    rows = [{"prompt": "mars has", "answer": answer} for answer in ("two", "three")]
    rows[1]["prompt"] = "mars"
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(rows, indent=1))
    assert encoder.faults(read_facts(path))[0].startswith(f"{path}:6: entry 2: field ")
    path.write_text("\n".join(map(json.dumps, rows)))
    assert encoder.faults(read_facts(path))[0].startswith(f"{path}:2: field ")
    assert encoder.faults([Fact("b", "mars", "three")])[0].startswith("fact 'b': field ")
