"""Equation (18): further passes, by least squares written out in float64 on a model edited by hand.

Shape letters: N tokens, K key width, V value width.
"""

from __future__ import annotations

import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from support import (
    WORDS,
    captured_of,
    encoder,
    random_editor,
    random_facts,
    random_questions,
    statistics_of,
    tiny_model,
    tiny_trunk,
)

import helpers
from malmend.editors.editor import Editor
from malmend.editors.network import NetworkSettings
from malmend.editors.refine import (
    FRAMES,
    WITH_CHAT,
    RefineSettings,
    framed,
    further,
    missed,
)
from malmend.editors.restore import Held, restoring
from malmend.editors.settings import EditorSettings
from malmend.errors import EditorError, MalmendError
from malmend.facts.fact import Question
from malmend.facts.tokens import Encoder
from malmend.models.capture import capture
from malmend.patch import shifted

SETTINGS = EditorSettings(layers=2, network=NetworkSettings(blocks=0), end_weight=0.3)
FACTS = random_facts(6, seed=3)
QUESTIONS = encoder().encode_all(fact.question for fact in FACTS)
LEFT = random_questions(random.Random(8), 6)
OTHERS = encoder().encode_all(Question(f"{WORDS[0]} {fact.prompt}", fact.answer) for fact in FACTS)


def heavy_editor(trunk, captured, weight: float) -> Editor:
    """An editor without a network whose prior holds it back."""
    return Editor(
        SETTINGS,
        {s.name: s.shape_VK for s in trunk.sites},
        statistics_of(trunk, captured),
        weights=[weight, weight, 0.01],
    )


def nll(model, questions) -> float:
    """Of the answers, through the model's own forward."""
    total = 0.0
    for one in questions:
        logits = model(torch.tensor([one.ids])).logits[0].log_softmax(-1)
        at = range(one.answer_start - 1, one.answer_end - 1)
        total -= sum(logits[i, one.ids[i + 1]].item() for i in at)
    return total / len(questions)


def edited(model, trunk, shifts):
    """A copy of the model with W + S written into its weights."""
    other = copy.deepcopy(model)
    modules = dict(other.named_modules())
    for site in trunk.sites:
        modules[site.name].weight.data += shifts[site.name]
    return other


@pytest.mark.parametrize(
    ("frame", "restore"),  # the first is what `make test` runs
    [("chat", 2.3), ("chat", None), ("w1 {prompt}", None), ("chat", 1.0)],
)
def test_a_further_pass_is_least_squares_on_the_keys_of_the_edited_model(frame, restore):
    model = tiny_model()
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, FACTS, SETTINGS)
    editor = random_editor(SETTINGS, trunk, captured)
    shifts = editor.shifts(captured)
    refine = RefineSettings(gain=1.3, chat_gain=2.9, restore=restore or 0.0)
    others = {"w0 {prompt}": OTHERS[:4], frame: OTHERS[4:]}
    held = None if restore is None else Held.of(trunk, encoder("none").encode_all(LEFT), 10)
    _, found = further(editor, trunk, shifts, QUESTIONS, others, refine, held)
    with shifted(list(trunk.sites), shifts):
        back = [None] * 2 if held is None else restoring(trunk, held, 1000)
    cut = tiny_trunk(edited(model, trunk, shifts))
    pairs = capture(cut, [*QUESTIONS, *OTHERS], "answer", replace(SETTINGS.descent, end_nll=0.05))
    tokens = sum(len(one.sources) for one in QUESTIONS)
    in_chat = sum(len(one.sources) for one in OTHERS[4:])
    gain = torch.full((len(pairs[0].keys_NK), 1), 1.3, dtype=torch.float64)
    gain[-in_chat:] = 2.9 if frame == "chat" else 1.3
    for site, (name, pair, more) in enumerate(zip(editor.names, pairs, back, strict=True)):
        prior = editor.prior(site, tokens)
        width = pair.keys_NK.shape[1]
        P = prior.ridge * torch.eye(width, dtype=torch.float64)
        for weight, matrix in zip(prior.weights, prior.matrices_KK, strict=True):
            P = P + weight * matrix.double()
        root = torch.where(pair.ends_N, editor.log_end_weight_S[site].double().exp(), 1.0).sqrt()
        asked = pair.keys_NK @ shifts[name].T - gain * pair.value_grads_NV
        keys = pair.keys_NK
        if more is not None:
            assert len(more.keys_NK) > 3
            keys = torch.cat([keys, more.keys_NK])
            asked = torch.cat([asked, more.keys_NK @ shifts[name].T - more.value_grads_NV])
            root = torch.cat([root, torch.full((len(more.keys_NK),), restore).double().sqrt()])
        rows = torch.cat([root[:, None] * keys, torch.linalg.cholesky(P).T])
        wanted = torch.cat([root[:, None] * asked, torch.zeros(width, asked.shape[1]).double()])
        expected = torch.linalg.lstsq(rows, wanted).solution.T
        # Of the largest: a Cholesky factor of the normal equations squares their condition.
        near = 1e-7 * expected.abs().max().item()
        torch.testing.assert_close(found[site].shift(), expected, rtol=0, atol=near)


@pytest.mark.parametrize("weight", [0.3, 1.0, 3.0, 10.0])
def test_a_second_pass_brings_back_what_the_prior_holds_down(weight):
    """The loss of the answers, of a model that has the shift in its weights.

    One layer: on random models of 16 dimensions two layers and later passes overshoot.
    """
    model = tiny_model()
    trunk = tiny_trunk(model, layers=1)
    captured = captured_of(trunk, FACTS, SETTINGS)
    editor = heavy_editor(trunk, captured, weight)
    once = editor.shifts(captured)
    _, found = further(editor, trunk, once, QUESTIONS, {}, RefineSettings(gain=1.0))
    twice = {name: one.shift() for name, one in zip(editor.names, found, strict=True)}
    before, first, second = (
        nll(one, QUESTIONS)
        for one in (model, edited(model, trunk, once), edited(model, trunk, twice))
    )
    assert second < first < before


def test_a_later_pass_asks_for_an_end_that_the_first_takes_as_said():
    """An end token of 0.2 nats, between the two bounds."""
    model, asked = tiny_model(), QUESTIONS[0]
    end, at = asked.ids[-1], asked.sources[-1]
    states = []
    handle = model.lm_head.register_forward_pre_hook(lambda _, given: states.append(given[0]))
    others = model(torch.tensor([asked.ids])).logits[0, at].clone()
    handle.remove()
    state, others[end] = states[0][0, at], -torch.inf
    wanted = others.logsumexp(0) - math.log(math.exp(0.2) - 1)  # the logit of p = exp(-0.2)
    model.lm_head.weight.data[end] = wanted * state / state.square().sum()
    logs = model(torch.tensor([asked.ids])).logits[0, at].log_softmax(-1)
    assert -logs[end].item() == pytest.approx(0.2, rel=1e-9)
    trunk = tiny_trunk(model)
    first = captured_of(trunk, FACTS[:1], SETTINGS)
    editor = random_editor(SETTINGS, trunk, first, statistics=statistics_of(trunk, first))
    nothing = {site.name: torch.zeros(site.shape_VK).double() for site in trunk.sites}
    again, _ = further(editor, trunk, nothing, [asked], {}, RefineSettings())
    for before, after in zip(first, again, strict=True):
        assert (
            before.ends_N.tolist()
            == after.ends_N.tolist()
            == [False] * (at - asked.sources[0]) + [True]
        )
        assert before.value_grads_NV[-1].norm() == 0
        assert after.value_grads_NV[-1].norm() > 0


def test_a_further_pass_leaves_the_weights_as_they_were():
    model = tiny_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, FACTS, SETTINGS)
    editor = heavy_editor(trunk, captured, weight=1.0)
    further(
        editor, trunk, editor.shifts(captured), QUESTIONS, {"{prompt}": OTHERS}, RefineSettings()
    )
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_missed_counts_answer_and_end_tokens_that_are_not_top():
    model = tiny_model()
    trunk = tiny_trunk(model)
    captured = captured_of(trunk, FACTS, SETTINGS)
    editor = heavy_editor(trunk, captured, weight=3.0)
    shifts = editor.shifts(captured)
    other = edited(model, trunk, shifts)
    expected = 0
    for one in QUESTIONS:
        top = other(torch.tensor([one.ids])).logits[0].argmax(-1)
        expected += sum(int(top[at] != one.ids[at + 1]) for at in one.sources)
    total = sum(len(one.sources) for one in QUESTIONS)
    assert 0 < expected < total
    assert missed(trunk, QUESTIONS, shifts) == expected / total


def test_frames_hold_the_prompt_and_the_answer():
    said = encoder()
    question = Question("w1 w2", "w3 w4")
    (found,) = framed(said, [question], "w9 {prompt} w8")
    assert found == said.encode(Question("w9 w1 w2 w8", "w3 w4"))


def test_a_question_too_long_in_a_frame_is_left_out_of_that_frame_alone():
    short, long = Question("w1", "w2"), Question(" ".join(["w3"] * 61), "w4")
    said = encoder()
    assert framed(said, [short, long], "w9 {prompt} w8") == [
        said.encode(Question("w9 w1 w8", "w2")),
        None,
    ]
    assert framed(said, [short, long], "{prompt}") == said.encode_all([short, long])


def test_the_chat_template_is_a_frame():
    tokenizer = helpers.words(WORDS)
    tokenizer.chat_template = "w7 {{ messages[0]['content'] }} w6 "
    said = Encoder(tokenizer, "eos", 64)
    chat = Encoder(tokenizer, "eos", 64, chat=True)
    question = Question("w1", "w2")
    assert framed(said, [question], "chat") == [chat.encode(question)]
    assert chat.encode(question) != said.encode(question)


def test_chat_without_a_template_is_refused():
    with pytest.raises(EditorError, match="no chat template"):
        framed(encoder(), [Question("w1", "w2")], "chat")
    assert RefineSettings().frames_for(encoder()) == FRAMES


@pytest.mark.parametrize(
    ("template", "chats"),
    [
        ("w7 {{ messages[0]['content'] }} w6 ", True),
        (
            "{% if not messages[0]['content'] %}{{ raise_exception('') }}{% endif %}"
            "{{ messages[0]['content'] }}",
            True,
        ),
        ("{{ raise_exception('no') }}", False),
        ("{{ 'w7' + 1 }}", False),
        ("{{ tools | length }}", False),
    ],
)
def test_a_template_that_can_be_filled_is_among_the_default_frames(template, chats):
    said = Encoder(helpers.words(WORDS, chat_template=template), "eos", 64)
    assert RefineSettings().frames_for(said) == (WITH_CHAT if chats else FRAMES)
    assert RefineSettings(frames=()).frames_for(said) == ()
    if not chats:
        with pytest.raises(MalmendError, match="cannot be filled"):
            framed(said, [Question("w1", "w2")], "chat")


@pytest.mark.parametrize(
    "template",
    ["w7 w6", "{% for one in messages[0]['content'] %}{{ one['text'] }}{% endfor %} w6"],
)
def test_a_template_without_what_the_user_says_is_no_frame(template):
    """All facts would ask for other answers to one and the same text."""
    said = Encoder(helpers.words(WORDS, chat_template=template), "eos", 64)
    assert said.in_chat() is None
    assert RefineSettings().frames_for(said) == FRAMES


def test_nothing_asked_misses_nothing():
    trunk = tiny_trunk(tiny_model())
    nothing = {site.name: torch.zeros(site.shape_VK) for site in trunk.sites}
    assert missed(trunk, [], nothing) == 0.0


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"passes": 0}, "passes is 0"),
        ({"gain": 0.0}, "gain is 0"),
        ({"chat_gain": -1.0}, r"chat_gain is -1\.0, .*--refine.chat-gain"),
        ({"restore": -0.5}, "restore is -0.5, .*--refine.restore"),
        ({"restore": float("nan")}, "restore is nan"),
        ({"gain": float("nan")}, "gain is nan"),
        ({"gain": float("inf")}, "gain is inf"),
        ({"wordings": -1}, "wordings is -1, .*--refine.wordings"),
        ({"wordings": 11}, "wordings is 11, expected 0 to 10"),
        ({"frames": ("no place",)}, "'no place' has no place for the prompt"),
    ],
)
def test_settings_that_mean_nothing_are_refused(wrong, said):
    with pytest.raises(EditorError, match=said):
        RefineSettings(**wrong)
