"""Questions as an encoder with classes, and as an encoder-decoder, read them.

Two kinds of tokenizer: BERT's and BART's, which frame a text as ``<s> ... </s>``, and T5's, which
puts an end behind and nothing in front.
"""

from __future__ import annotations

from unicodedata import normalize

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from helpers import metaspace, words
from malmend.errors import MalmendError
from malmend.facts.encoded import Encoded, collate
from malmend.facts.fact import Fact, Question
from malmend.facts.tokens import Encoder, Reading

MARS = ["mars", "has", "two", "moons", "one"]  # ids 4 to 8 of words(MARS)
CLAIMS = Reading("classes", ("REFUTES", "SUPPORTS", "NOT ENOUGH INFO"))
START = 3  # of both decoders: the padding token, as T5 has it
SEQ2SEQ = Reading("seq2seq", start=START)


def framed(**keywords) -> PreTrainedTokenizerFast:
    return words(MARS, "<s> $A </s>", **keywords)


def ended(**keywords) -> PreTrainedTokenizerFast:
    return metaspace("$A </s>", **keywords)


def claims(**keywords) -> Encoder:
    return Encoder(framed(), reading=CLAIMS, **keywords)


KINDS = {"bart": framed, "t5": ended}
EVERY = pytest.mark.parametrize("kind", KINDS)
END = pytest.mark.parametrize("end", ["eos", "none"])


# --- classes


def test_a_claim_by_hand():
    """``<s> mars has two moons </s>``; the classes' logits stand at the first token."""
    encoded = claims().encode(Question("mars has two moons", "SUPPORTS"))
    assert encoded == Encoded((1, 4, 5, 6, 7, 2, 1), 6, 7, "classes")
    assert encoded.read == encoded.prompt == (1, 4, 5, 6, 7, 2)
    assert (encoded.labels, encoded.counted, encoded.sources) == ((1,), 1, (0,))
    assert encoded.decoded == encoded.prefix == ()


def test_a_claim_without_a_class():
    encoded = claims().encode(Question("mars has moons"))
    assert encoded == Encoded((1, 4, 5, 7, 2), 5, 5, "classes")
    assert (encoded.read, encoded.labels, encoded.counted) == (encoded.ids, (), 0)
    assert encoded.sources == (0,)
    assert collate([encoded]).labels_A.tolist() == [-100]


@pytest.mark.parametrize("mode", ["eos", "newline", "none"])
def test_a_class_has_no_end(mode):
    encoder = claims(end_of_answer=mode)
    assert encoder.end_of_answer == "none"
    assert encoder.encode(Question("mars has", "REFUTES")).ids == (1, 4, 5, 2, 0)


def test_a_classifier_needs_no_end_token():
    encoder = Encoder(framed(eos_token=None), reading=CLAIMS)
    assert encoder.encode(Question("mars has", "REFUTES")).labels == (0,)


@pytest.mark.parametrize("index", range(3))
def test_classes_by_their_names_whatever_case_and_blanks(index):
    encoder, name = claims(), CLAIMS.classes[index]
    for spelt in (name, name.lower(), f"  {name.title()} ", name.replace(" ", "  ")):
        assert encoder.encode(Question("mars has", spelt)).labels == (index,)
    assert encoder.said([index]) == name


def test_a_class_is_the_same_however_its_letters_are_encoded():
    composed, apart = (normalize(form, "Île") for form in ("NFC", "NFD"))
    assert composed != apart
    for name, spelt in ((composed, apart), (apart, composed)):
        encoder = Encoder(framed(), reading=Reading("classes", ("Mer", name)))
        assert encoder.encode(Question("mars has", spelt)).labels == (1,)


def test_a_wrong_class_names_the_nearest():
    with pytest.raises(MalmendError) as caught:
        claims().encode(Question("mars has", "SUPORTS"))
    assert str(caught.value) == (
        "the answer 'SUPORTS' is no class of this model; did you mean 'SUPPORTS'? expected one of "
        "'REFUTES', 'SUPPORTS', 'NOT ENOUGH INFO'"
    )
    with pytest.raises(MalmendError, match=r"'x' is no class of this model, expected one of 'REF"):
        claims().encode(Question("mars has", "x"))
    with pytest.raises(MalmendError, match="'' is no class"):
        claims().encode(Question("mars has", ""))


def test_columns_and_ends_of_a_claim():
    encoded = claims().encode(Question("mars has two moons", "SUPPORTS"))
    assert list(encoded.columns("answer")) == [0]
    assert list(encoded.columns("all")) == list(range(6))  # no sink is left out
    for tokens in ("answer", "all"):
        assert encoded.ends(tokens) == [False] * len(encoded.columns(tokens))


def test_a_classifiers_tokenizer_may_lower_case():
    encoder = Encoder(framed(lower=True), reading=CLAIMS)
    assert encoder.encode(Question("MARS Has", "refutes")).ids == (1, 4, 5, 2, 0)


# --- encoder-decoders


def test_a_question_of_barts_kind_by_hand():
    """Encoder: ``<s> mars has </s>``.  Decoder: start, ``<s>``, "two", "moons"."""
    encoder = Encoder(framed(), reading=SEQ2SEQ)
    assert encoder.prefix == (START, 1)
    encoded = encoder.encode(Question("mars has", "two moons"))
    assert encoded == Encoded((1, 4, 5, 2, 6, 7, 2), 4, 6, "seq2seq", (START, 1))
    assert encoded.read == (1, 4, 5, 2)
    assert encoded.labels == (6, 7, 2)
    assert encoded.decoded == (START, 1, 6, 7)
    assert encoded.sources == (1, 2, 3)  # "<s>" says "two", "two" "moons", "moons" the end


def test_a_question_of_t5s_kind():
    tokenizer = ended()
    encoder = Encoder(tokenizer, reading=SEQ2SEQ)
    assert encoder.prefix == (START,)
    encoded = encoder.encode(Question("Mars has", "two moons"))
    prompt, answer = (tuple(tokenizer(text)["input_ids"]) for text in ("Mars has", "two moons"))
    assert encoded.read == prompt
    assert prompt[-1] == answer[-1] == tokenizer.eos_token_id
    assert encoded.labels == answer
    assert encoded.decoded == (START, *answer[:-1])
    assert encoded.sources == tuple(range(len(answer)))
    assert encoded.counted == len(answer) - 1 > 1


@EVERY
def test_without_an_answer(kind):
    encoder = Encoder(KINDS[kind](), reading=SEQ2SEQ)
    encoded = encoder.encode(Question("mars has"))
    assert (encoded.labels, encoded.counted) == ((), 0)
    assert encoded.read == encoded.ids
    assert encoded.decoded == encoder.prefix
    assert encoded.sources == (len(encoder.prefix) - 1,)
    assert encoded.ends("answer") == [False]


@EVERY
@pytest.mark.parametrize("answer", ["two moons", " two moons ", "one", "two moons has one mars"])
def test_decoder_inputs_are_the_models_own_shift_of_the_labels(kind, answer):
    tokenizer = KINDS[kind]()
    encoded = Encoder(tokenizer, reading=SEQ2SEQ).encode(Question("mars has", answer))
    whole = torch.tensor([tokenizer(answer.strip())["input_ids"]])  # with every special token
    inputs = model_of(kind, len(tokenizer)).prepare_decoder_input_ids_from_labels(labels=whole)
    assert encoded.decoded == tuple(inputs[0].tolist())
    # Those predict the labels, but for a special token in front that no answer says.
    front = len(encoded.prefix) - 1
    assert encoded.labels == tuple(whole[0, front:].tolist())
    assert encoded.sources == tuple(range(front, whole.shape[1]))


@EVERY
def test_the_models_own_loss_is_the_labels(kind):
    tokenizer = KINDS[kind]()
    model = model_of(kind, len(tokenizer))
    encoded = Encoder(tokenizer, reading=SEQ2SEQ).encode(Question("mars has", "two moons"))
    prompt = torch.tensor([tokenizer("mars has")["input_ids"]])
    whole = torch.tensor([tokenizer("two moons")["input_ids"]])
    labels = whole.clone()
    labels[0, : len(encoded.prefix) - 1] = -100  # "<s>" is given, not learned
    with torch.no_grad():
        # The shift is the model's; where the loss is read is what the labels say.
        inputs = model.prepare_decoder_input_ids_from_labels(labels=whole)
        wanted = model(input_ids=prompt, decoder_input_ids=inputs, labels=labels).loss
        asked = collate([encoded])
        logits = model(input_ids=asked.ids_BT, decoder_input_ids=asked.decoded_BD).logits[0]
    logs = logits.log_softmax(-1)[list(encoded.sources)]
    found = -logs[torch.arange(len(encoded.labels)), asked.labels_A].mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def model_of(kind: str, vocabulary: int):
    """The shift to the right is the model's own code, for which its size does not matter."""
    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "d_model": 8, "decoder_start_token_id": START}
    if kind == "t5":
        sizes |= {"pad_token_id": START, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
        return T5ForConditionalGeneration(T5Config(**sizes)).double().eval()
    sizes |= {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    config = BartConfig(**sizes, pad_token_id=0, eos_token_id=2, max_position_embeddings=16)
    return BartForConditionalGeneration(config).double().eval()


@END
@EVERY
def test_columns_and_ends_of_both_halves(kind, end):
    encoder = Encoder(KINDS[kind](), end, reading=SEQ2SEQ)
    encoded = encoder.encode(Question("mars has", "two moons"))
    front, labels = len(encoder.prefix) - 1, len(encoded.labels)
    assert labels == encoded.counted + (end == "eos")
    for tokens in ("answer", "all"):
        inside = encoded.columns(tokens, in_encoder=True)
        assert list(inside) == list(range(encoded.answer_start))
        assert encoded.ends(tokens, in_encoder=True) == [False] * len(inside)
    assert list(encoded.columns("answer")) == list(range(front, front + labels))
    assert list(encoded.columns("all")) == list(range(front + labels))
    has_end = [end == "eos"]
    assert encoded.ends("answer") == [False] * (labels - 1) + has_end
    assert encoded.ends("all") == [False] * (front + labels - 1) + has_end


@EVERY
def test_flat_columns_of_a_padded_batch(kind):
    encoder = Encoder(KINDS[kind](), reading=SEQ2SEQ)
    asked = [Question("mars has", "two moons"), Question("mars has two moons has", "one")]
    batch = collate(encoder.encode_all(asked))
    assert batch.ids_BT.shape != batch.decoded_BD.shape
    for inside, rows, mask in (
        (True, batch.ids_BT, batch.mask_BT),
        (False, batch.decoded_BD, batch.decoded_mask_BD),
    ):
        assert batch.width(inside) == rows.shape[1]
        at = batch.flat("all", inside)
        assert at.tolist() == mask.flatten().nonzero().squeeze(1).tolist()
        read = [one.read if inside else one.decoded for one in batch.questions]
        assert rows.flatten()[at].tolist() == [token for row in read for token in row]
    counts = [len(one.labels) for one in batch.questions]
    assert batch.source_rows_A.tolist() == [0] * counts[0] + [1] * counts[1]
    assert batch.labels_A.tolist() == [label for one in batch.questions for label in one.labels]
    places = [*batch.questions[0].sources, *batch.questions[1].sources]
    starts = batch.source_rows_A * batch.decoded_BD.shape[1]
    assert batch.flat_sources_A.tolist() == (torch.tensor(places) + starts).tolist()


def test_what_a_decoder_cannot_say():
    encoder = Encoder(framed(), reading=SEQ2SEQ)
    with pytest.raises(MalmendError, match="'three moons' does not survive tokenisation"):
        encoder.encode(Question("mars has", "three moons"))
    for empty in ("", "  "):
        with pytest.raises(MalmendError, match="does not survive tokenisation"):
            encoder.encode(Question("mars has", empty))
    assert encoder.said(encoder.encode(Question("mars has", "two moons")).labels[:2]) == "two moons"


def test_a_decoder_without_a_start_token():
    with pytest.raises(MalmendError, match=r"no decoder_start_token_id.*set it in config\.json"):
        Encoder(framed(), reading=Reading("seq2seq"))


# --- of both forms


@pytest.mark.parametrize(
    ("reading", "prompt", "answer", "size"),
    [
        (CLAIMS, "mars has two moons", "SUPPORTS", 6),  # the class is no token
        (SEQ2SEQ, "mars has two moons", "one", 6),
        (SEQ2SEQ, "mars has", "two moons has one", 6),  # start, "<s>" and four words
    ],
)
def test_the_longer_half_is_bounded(reading, prompt, answer, size):
    question = Question(prompt, answer)
    encoded = Encoder(framed(), max_tokens=size, reading=reading).encode(question)
    assert max(len(encoded.read), len(encoded.decoded)) == size
    half = "answer" if answer.startswith("two") else "prompt"
    said = f"^the {half} has {size} tokens, expected at most {size - 1}; shorten the {half}$"
    with pytest.raises(MalmendError, match=said):
        Encoder(framed(), max_tokens=size - 1, reading=reading).encode(question)


def test_faults_name_line_and_field():
    facts = [
        Fact("a", "mars has", "SUPPORTS", at="f:1"),
        Fact("b", "mars", "REFUTE", paraphrases=("has",), at="f:2"),
        Fact("c", "has", "REFUTES", unrelated=(Question("mars", "two"),), at="f:3"),
    ]
    found = claims().faults(facts)
    assert [fault.split(": the answer")[0] for fault in found] == [
        "f:2: field 'answer'",
        "f:2: field 'paraphrases'",
        "f:3: field 'unrelated'",
    ]
    assert all("is no class of this model" in fault for fault in found)
    assert "did you mean 'REFUTES'?" in found[0]


def test_passages():
    text = "mars has two moons one"
    claim = claims().passage(text)
    assert (claim.form, claim.counted, claim.labels) == ("classes", 0, ())
    assert claim.read == claim.ids
    assert claim.ids[:6] == (1, 4, 5, 6, 7, 8)
    assert claim.sources == (0,)
    for kind, front in (("bart", (1,)), ("t5", ())):
        encoder = Encoder(KINDS[kind](), reading=SEQ2SEQ)
        passage, ids = encoder.passage(text), encoder.passage_ids(text)
        assert ids[: len(front)] == front
        half = (len(ids) + 1) // 2
        assert passage.read == ids[:half]
        assert passage.labels == ids[half:]
        assert passage.decoded == (*encoder.prefix, *ids[half:-1])
        assert not any(passage.ends("answer"))  # a text goes on
        assert encoder.tokenizer.eos_token_id not in ids


@pytest.mark.parametrize("reading", [CLAIMS, SEQ2SEQ], ids=["classes", "seq2seq"])
def test_a_passage_of_one_token(reading):
    passage = Encoder(words(MARS, "$A </s>"), reading=reading).passage("mars")
    # An encoder reads a text with the marks that it reads a prompt with.
    assert passage.ids == passage.read == ((4, 2) if reading is CLAIMS else (4,))
    assert passage.labels == ()
    assert passage.sources == (0,)


@EVERY
def test_generation_starts_from_what_is_read(kind):
    encoder = Encoder(KINDS[kind](), reading=SEQ2SEQ)
    for prompt in ("mars has", "mars has "):
        assert encoder.prompt_ids(prompt) == encoder.encode(Question(prompt, "one")).read
    assert claims().prompt_ids("mars has") == claims().encode(Question("mars has")).read
