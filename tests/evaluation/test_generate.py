from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RwkvConfig, RwkvForCausalLM

import helpers
from command_support import greedy, make_model, teach
from malmend.errors import MalmendError
from malmend.evaluation import generate as generate_module
from malmend.evaluation.generate import Answer, generate
from malmend.evaluation.matching import can_still_match, matches, normalised
from malmend.facts.tokens import Encoder
from malmend.models.load import LoadedModel, prepared

WORDS = ["the", "a", "an", ".", ",", "\n", *(f"w{index}" for index in range(44))]
END = 2  # helpers.words: <unk> <s> </s> <pad>


@functools.cache
def spoken_model(family: str = "llama") -> LoadedModel:
    """Says articles, marks, line breaks and the end token often."""
    size = len(WORDS) + 4
    make = helpers.tiny_gpt2 if family == "gpt2" else helpers.tiny_llama
    keywords = {"tie_word_embeddings": False, "initializer_range": 0.4}
    model = make(size, seed=3, **keywords)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        model.get_output_embeddings().weight[[END, *range(4, 10)]] *= 1.4
        model.get_output_embeddings().weight[END] *= 1.3
    model.generation_config.eos_token_id = END
    return prepared(model, helpers.words(WORDS), f"spoken {family}")


def prompts(count: int = 24) -> list[str]:
    generator = random.Random(4)
    return [" ".join(generator.choices(WORDS[6:], k=generator.randint(1, 9))) for _ in range(count)]


def said(loaded: LoadedModel, ends: set[int], limit: int = 12, whole: bool = False) -> list[str]:
    encode = loaded.tokenizer
    return [greedy(loaded, encode(one)["input_ids"], ends, limit, whole) for one in prompts()]


def texts(*given: Any, **named: Any) -> list[str]:
    return [answer.text for answer in generate(*given, **named)]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("whole", [False, True])
def test_a_batch_of_different_lengths_says_what_each_prompt_alone_says(family, whole):
    loaded = spoken_model(family)
    encoder = Encoder(loaded.tokenizer)
    wanted = said(loaded, {END}, whole=whole)
    assert len(set(wanted)) > len(wanted) / 2  # the answers can be told apart
    assert texts(loaded, encoder, prompts(), 12, whole=whole) == wanted
    assert texts(loaded, encoder, prompts(), 12, batch_tokens=30, whole=whole) == wanted
    alone = [texts(loaded, encoder, [one], 12, whole=whole)[0] for one in prompts()]
    assert alone == wanted


@pytest.mark.parametrize("family", ["rwkv", "llama"])
def test_answers_do_not_hang_on_who_is_asked_beside(family, monkeypatch):
    """One read padding and mixed the states of a batch: of right answers a fifth was right."""
    tokenizer = helpers.byte_level()
    if family == "rwkv":
        sizes = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64}
        config = RwkvConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)
        torch.manual_seed(0)
        model = RwkvForCausalLM(config).eval().requires_grad_(False)
        model.head.weight.data *= 30
    else:
        model = make_model(tokenizer, layers=2)
    loaded, sizes = prepared(model, tokenizer), []
    decode = generate_module._decode_batch

    def noted(loaded, rows, *rest):
        sizes.append(len(rows))
        return decode(loaded, rows, *rest)

    monkeypatch.setattr(generate_module, "_decode_batch", noted)
    encoder = Encoder(tokenizer)
    asked = ["Peru:", "The capital of France is", "Mars has", "Lima: ", "In Chile, the largest of"]
    together = texts(loaded, encoder, asked, 6, whole=True)
    assert sizes == ([5] if family == "llama" else [1] * 5)
    assert together == [texts(loaded, encoder, [one], 6, whole=True)[0] for one in asked]
    assert len(set(together)) > 3


def test_every_end_token_of_model_and_tokenizer_stops(monkeypatch):
    loaded = spoken_model()
    ends = loaded.model.generation_config
    free = said(loaded, set(), whole=True)
    often = Counter(word for text in free for word in text.split() if word.startswith("w"))
    first, second = (WORDS.index(word) + 4 for word, _ in often.most_common(2))
    monkeypatch.setattr(ends, "eos_token_id", [first, second])
    wanted = said(loaded, {first, second, END}, whole=True)
    assert wanted != free
    found = texts(loaded, Encoder(loaded.tokenizer), prompts(), 12, whole=True)
    assert found == wanted
    for stop in (first, second, END):
        assert said(loaded, {first, second, END} - {stop}, whole=True) != wanted  # each matters


def test_without_any_end_token_decoding_runs_to_the_limit(monkeypatch):
    loaded = spoken_model()
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(loaded.tokenizer, "_special_tokens_map", {"unk_token": "<unk>"})
    assert loaded.tokenizer.eos_token_id is None
    found = texts(loaded, Encoder(loaded.tokenizer, "none"), prompts(), 5, whole=True)
    assert found == said(loaded, set(), 5, whole=True)


def test_an_answer_ends_at_a_line_break_and_keeps_no_outer_blank():
    loaded = spoken_model()
    encoder = Encoder(loaded.tokenizer)
    whole = texts(loaded, encoder, prompts(), 12, whole=True)
    line = texts(loaded, encoder, prompts(), 12)
    broken = [index for index, text in enumerate(whole) if "\n" in text]
    assert broken
    for index in broken:
        assert line[index] == whole[index].split("\n")[0].strip() != whole[index]
    assert all(text == text.strip() and "\n" not in text for text in line)


@pytest.mark.parametrize("limit", [1, 3])
def test_at_most_so_many_tokens_are_said(limit):
    loaded = spoken_model()
    found = texts(loaded, Encoder(loaded.tokenizer), prompts(), limit, whole=True)
    assert found == said(loaded, {END}, limit, whole=True)
    assert max(len(loaded.tokenizer(text)["input_ids"]) for text in found) == limit


@pytest.mark.parametrize("whole", [False, True])
def test_each_prompt_has_its_own_limit(whole):
    loaded = spoken_model()
    encode = loaded.tokenizer
    limits = [1 + index % 5 for index in range(len(prompts()))]
    wanted = [
        greedy(loaded, encode(one)["input_ids"], {END}, limit, whole)
        for one, limit in zip(prompts(), limits, strict=True)
    ]
    found = texts(loaded, Encoder(loaded.tokenizer), prompts(), limits, whole=whole)
    assert found == wanted != said(loaded, {END}, 5, whole)


def test_an_answer_ends_where_the_positions_do():
    """GPT-2 has a table of positions, past whose end it cannot read."""
    room = 11
    size, many = len(WORDS) + 4, prompts()
    model = helpers.tiny_gpt2(size, seed=3, n_positions=room, initializer_range=0.4)
    model.generation_config.eos_token_id = None
    loaded = prepared(model, helpers.words(WORDS, eos_token=None), "short")
    encode = loaded.tokenizer
    lengths = [len(encode(one)["input_ids"]) for one in many]
    assert len(set(lengths)) > 4
    wanted = [
        greedy(loaded, encode(one)["input_ids"], set(), min(6, room - length), True)
        for one, length in zip(many, lengths, strict=True)
    ]
    encoder = Encoder(loaded.tokenizer, "none")
    assert texts(loaded, encoder, many, 6, whole=True) == wanted
    with pytest.raises(MalmendError, match=r"has 11 tokens, but short has 11 positions"):
        generate(loaded, encoder, [" ".join(["w1"] * room)], 6)


@pytest.mark.parametrize("room", [5, 6])
def test_no_trial_is_beyond_the_positions(room, monkeypatch):
    """On a GPU such a trial ends the process's work: nothing recovers from its assert."""
    model = helpers.tiny_gpt2(len(WORDS) + 4, n_positions=room)
    seen, forward = [], model.transformer.wpe.forward

    def read(ids_BT):
        seen.append(int(ids_BT.max()))
        return forward(ids_BT)

    monkeypatch.setattr(model.transformer.wpe, "forward", read)
    assert generate_module._says_the_same_together(model)
    assert max(seen, default=0) == (room - 1 if room == 6 else 0)


def test_no_prompt_gives_no_answer():
    loaded = spoken_model()
    assert texts(loaded, Encoder(loaded.tokenizer), []) == []


def test_gold_answers_stop_rows_early_and_change_no_match():
    loaded = spoken_model()
    encoder = Encoder(loaded.tokenizer)
    full = texts(loaded, encoder, prompts(), 12)
    golds = [
        " ".join(w for w in text.split() if w not in ("a", "an", "the", ".")) if i % 2 else "w1 w2"
        for i, text in enumerate(full)
    ]
    golds = [gold or "w3" for gold in golds]
    wanted = [matches(text, gold) for text, gold in zip(full, golds, strict=True)]
    assert any(wanted)
    assert not all(wanted)
    found = texts(loaded, encoder, prompts(), 12, golds)
    assert [matches(t, gold) for t, gold in zip(found, golds, strict=True)] == wanted
    assert sum(map(len, found)) < sum(map(len, full))


def test_a_gold_of_several_lines_is_read_for_as_many():
    loaded = spoken_model()
    encoder = Encoder(loaded.tokenizer)
    whole = [answer.text for answer in generate(loaded, encoder, prompts(), 12, whole=True)]
    golds = ["\n".join(text.split("\n")[:2]).strip() for text in whole]
    found = texts(loaded, encoder, prompts(), 12, golds)
    several = [at for at, gold in enumerate(golds) if "\n" in gold and normalised(gold)]
    assert len(several) > 3
    assert all(matches(found[at], golds[at]) for at in several)
    assert any(len(found[at]) < len(whole[at]) for at in several)  # and no further
    # Blank lines count for nothing, as in matching.
    blank = [gold.replace("\n", "\n \n") for gold in golds]
    assert texts(loaded, encoder, prompts(), 12, blank) == found


@torch.no_grad()
def step_by_step(loaded: LoadedModel, prompt: str, ends: set[int], gold: str | None) -> Answer:
    """Of twelve tokens at most: the answer of one prompt, and whether it had not ended yet."""
    ids, new = loaded.tokenizer(prompt)["input_ids"], []
    while len(new) < 12:
        token = int(loaded.model(torch.tensor([[*ids, *new]])).logits[0, -1].argmax())
        if token in ends:
            return Answer(loaded.tokenizer.decode(new).strip())
        new.append(token)
        text = loaded.tokenizer.decode(new, skip_special_tokens=True).lstrip()
        if "\n" in text:
            return Answer(text.split("\n")[0].strip())
        if gold is not None and not can_still_match(text, gold):
            break
    return Answer(text.strip(), cut=True)


@pytest.mark.parametrize("golden", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_an_answer_is_cut_where_the_model_had_not_ended_it(golden, ends, monkeypatch):
    loaded = spoken_model()
    if not ends:
        monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
        monkeypatch.setattr(loaded.tokenizer, "_special_tokens_map", {"unk_token": "<unk>"})
    stop = {END} if ends else set()
    encoder = Encoder(loaded.tokenizer, "eos" if ends else "none")
    full = said(loaded, stop)
    golds = [text if at % 2 and text else "w1 w2" for at, text in enumerate(full)]
    given = golds if golden else [None] * len(full)
    wanted = [
        step_by_step(loaded, prompt, stop, gold)
        for prompt, gold in zip(prompts(), given, strict=True)
    ]
    assert generate(loaded, encoder, prompts(), 12, golds if golden else None) == wanted
    assert 0 < sum(answer.cut for answer in wanted) < len(wanted)


def test_an_answer_that_is_lost_does_not_depend_on_its_company(monkeypatch):
    """Without an end token nothing is padded: a row's tokens go on while others are decoded."""
    loaded = spoken_model()
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", None)
    monkeypatch.setattr(loaded.tokenizer, "_special_tokens_map", {"unk_token": "<unk>"})
    encoder, golds = Encoder(loaded.tokenizer, "none"), ["w1 w2"] * len(prompts())
    alone = [generate(loaded, encoder, [one], 12, ["w1 w2"])[0] for one in prompts()]
    assert generate(loaded, encoder, prompts(), 12, golds) == alone


def test_an_answer_over_several_lines_is_cut_at_the_limit_only():
    loaded = spoken_model()
    encoder = Encoder(loaded.tokenizer)
    found = generate(loaded, encoder, prompts(), 12, whole=True)
    for prompt, answer in zip(prompts(), found, strict=True):
        ids = loaded.tokenizer(prompt)["input_ids"]
        endless = greedy(loaded, ids, {END}, 40, True)
        assert answer.cut == (endless != answer.text) or answer.text == ""
    assert len({answer.cut for answer in found}) == 2


def test_an_answer_whose_letters_take_several_tokens_is_not_given_up_half_way():
    tokenizer = helpers.byte_level()
    model = make_model(tokenizer, layers=2)
    prompt, answer = "The capital of Peru is", " Éśaß東京!"
    start = tokenizer(prompt)["input_ids"]
    teach(model, [(start, [*tokenizer(answer)["input_ids"], tokenizer.eos_token_id])])
    loaded = prepared(model, tokenizer)
    encoder = Encoder(tokenizer)
    assert texts(loaded, encoder, [prompt]) == ["Éśaß東京!"]
    assert texts(loaded, encoder, [prompt], golds=["Éśaß東京"]) == ["Éśaß東京!"]


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Paris.", "Paris"),
        ("  the  Paris ", "paris"),
        ("An apple, a day", "apple day"),
        ("U.S.A.", "USA"),
        ("theory", "Theory"),
        ("New\tYork", "new york"),
        ("!!", " !! "),
        ("Éire", "ÉIRE"),
        ("1024", "1,024"),
        ("1,234,567.5", "1234567.5"),
        ("−40", "-40"),
        ("(1.5)", "1.5."),
        ("well-known", "wellknown"),
        ("the C++", "c++"),
        ("H2O", "H₂O"),
        ("Cafe\u0301", "Café"),
    ],
)
def test_answers_that_match(answer, gold):
    assert matches(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("Paris France", "Paris"),
        ("Pari", "Paris"),
        ("ory", "theory"),
        ("", "Paris"),
        ("", "!!"),
        ("!", "!!"),
        ("bananas", "bn"),
        ("Eire", "Éire"),
        ("15 million", "1.5 million"),
        ("35", "3.5"),
        ("1.92", "19.2"),
        ("40 °C", "-40 °C"),
        ("12", "1/2"),
        ("1030", "10:30"),
        ("1,5", "15"),
        ("12", "1-2"),
        ("C", "C++"),
        ("C", "C#"),
        ("Vitamin", "Vitamin A"),
        ("1,02", "102"),
        ("1,0245", "10245"),
    ],
)
def test_answers_that_do_not_match(answer, gold):
    assert not matches(answer, gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("London", "Paris"),
        ("Paris France", "Paris"),
        ("the Paris b", "Paris"),
        ("Lo", "Paris"),
        ("Parist", "Paris"),
    ],
)
def test_text_that_can_no_longer_match(text, gold):
    assert not can_still_match(text, gold)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        ("", "Paris"),
        ("Par", "Paris"),
        ("th", "Paris"),  # may become an article
        ("the Par", "The Paris."),
        ("New\tYo", "New York"),
        ("x—th", "x—"),
        ("ΟΔΟΣ", "ΟΔΟΣΑ"),  # the small sigma of a word's end is another letter
        ("\ufffd", "Éire"),  # half a letter
        ("Paris.", "Paris"),
        ("−4", "-40"),
        ("e\u0301", "e\u0301\u0323x"),  # the mark that comes last stands first in NFKC
        ("what", "!!"),  # a gold answer of marks alone is left to decoding
    ],
)
def test_text_that_can_still_match(text, gold):
    assert can_still_match(text, gold)


LETTERS = "abnNthe  .,-'\t\n\u00a0é—’ΣσςO15/:+#e\u0301\u0323₂ﬁ\u2212한ᄒ"
TEXT = st.text(st.sampled_from(LETTERS), max_size=12)
NOISE = st.lists(st.sampled_from(["", " ", "the ", " a ", "An ", ".", ", ", "\t", "'"]), min_size=1)


@st.composite
def answer_and_gold(draw: st.DrawFn) -> tuple[str, str]:
    gold = draw(TEXT)
    noise = draw(NOISE)
    kept = gold.swapcase() if draw(st.booleans()) else gold
    parts = kept.split(" ")
    said = "".join(noise[i % len(noise)] + part + " " for i, part in enumerate(parts))
    return (said if draw(st.booleans()) else kept), gold


@settings(max_examples=400)
@given(answer_and_gold(), st.integers(0, 40))
def test_text_on_its_way_to_a_match_is_never_given_up(pair, cut):
    answer, gold = pair
    if matches(answer, gold):
        assert can_still_match(answer[:cut].lstrip(), gold)
        assert can_still_match(answer.lstrip(), gold)


@settings(max_examples=300)
@given(TEXT)
def test_blanks_articles_and_marks_do_not_count(text):
    assert normalised(text) == " ".join(normalised(text).split())
    assert not {"a", "an", "the"} & set(normalised(text).split()[:-1])
    assert matches(text, text)
    assert matches(f"the {text}.", text) == bool(normalised(text))


@pytest.mark.parametrize("whole", [True, False])
def test_logits_that_are_none_give_no_answer(whole):
    """From some token on; of NaN the largest is the first, so that id would be said."""
    loaded = spoken_model()
    steps = itertools.count()
    hook = loaded.model.get_output_embeddings().register_forward_hook(
        lambda module, given, out: out * torch.nan if next(steps) > 6 else out
    )
    try:
        with pytest.raises(MalmendError, match="NaN or infinity, so it says nothing"):
            generate(loaded, Encoder(loaded.tokenizer), prompts(), 12, whole=whole)
    finally:
        hook.remove()
