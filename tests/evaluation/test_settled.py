"""Teacher forcing stands for decoding only where it read the prompt as decoding does."""

from __future__ import annotations

from asked_support import END, WORDS, examiner, facts, ids_of, model

from command_support import greedy
from malmend.evaluation import examiner as examiner_module
from malmend.evaluation.generate import Answer
from malmend.facts.fact import Fact


def test_a_prompt_whose_tokens_differ_beside_its_answer_is_decoded(monkeypatch):
    known = []
    for fact in facts():  # what the model says to its end, so that teacher forcing settles it
        said = greedy(model(), ids_of(fact.prompt), {END}, 9).split()
        if 0 < len(said) < 9 and set(said) <= set(WORDS):
            known.append(Fact(fact.id, fact.prompt, " ".join(said)))
    decoded = []

    def recorded(loaded, encoder, prompts, limits, golds):
        decoded.extend(prompts)
        return [Answer("decoded")] * len(prompts)

    monkeypatch.setattr(examiner_module, "generate", recorded)
    rows = examiner().examine(known).rows
    settled = [row.question.prompt for row in rows if row.exact and row.text != "decoded"]
    assert len(settled) > 2
    changed, decoded[:] = settled[0], []
    asking = examiner()
    read = asking.encoder.prompt_ids
    more = {changed: (9,)}  # by itself the prompt ends in a token that it has not beside the answer
    monkeypatch.setattr(
        asking.encoder, "prompt_ids", lambda prompt: read(prompt) + more.get(prompt, ())
    )
    rows = asking.examine(known).rows
    assert changed in decoded
    assert not set(settled[1:]) & set(decoded)
    assert {row.text for row in rows if row.question.prompt == changed} == {"decoded"}
