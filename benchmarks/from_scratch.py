"""A small T5 or BART learns facts from scratch until it knows them, then is edited (MEND, Table 3).

    python benchmarks/from_scratch.py train    # benchmarks/out/t5, resumes where it was
    python benchmarks/from_scratch.py settle   # a T5: the same facts again, with dropout
    python benchmarks/from_scratch.py editor   # an editor for it, likewise
    python benchmarks/from_scratch.py edit     # 5, 25, 75 and 125 edits at once

With ``--family bart`` another model in another folder.

Facts are of the project's own, each in four wordings (of a BART in two).  A small T5 first learns
each wording by itself; trained on with dropout it comes to hold a fact in one place.  Edits aim at
the false alternatives.
Success is sequence-wise (every token of the answer), over edit prompts and over paraphrases;
drawdown is how much fewer of the facts that were not edited the model says right, as a share of
them.  What the editor is calibrated or trained on is neither edited nor asked.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import malmend
from malmend.commands.finetune import finetune
from malmend.editors.calibration import CalibrationSettings
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, training_free
from malmend.editors.train_settings import TrainSettings
from malmend.facts.fact import Fact, Question
from malmend.files import written_beside
from malmend.models.finetune import FinetuneSettings
from malmend.workbench import shipped

FOLDERS = Path(__file__).resolve().parent / "out"
FACTS, LEARNED, SIZES, SEEDS = 1500, 1024, (5, 25, 75, 125), (0, 1, 2)
EPOCHS, SETTLING = {"t5": 26, "bart": 80}, 14  # at most; with dropout
WIDTH, BLOCKS, HEADS = 128, 3, 4
FFN = {"t5": 2048, "bart": 512}  # T5-small's own
WORDINGS = {"t5": 4, "bart": 2}
RATES = {"t5": 1e-3, "bart": 5e-4}  # a BART normalises after its blocks, and learns nothing at 1e-3


# Chosen on facts that an editor may see: the last two blocks of the decoder, a heavy prior.
CHOSEN = CalibrationSettings(prior_facts=1024, alphas=(200.0,), etas=(1.8,))


def known_facts(family: str) -> list[Fact]:
    """The facts that the model learns, in random order; their subjects differ in all relations."""
    others = WORDINGS[family] - 1
    known = [fact for fact in malmend.read_facts(shipped("facts.jsonl")) if "train" in fact.tags]
    known = [
        replace(fact, neighbours=(), reversed=None, paraphrases=fact.paraphrases[:others])
        for fact in known
        if fact.alternative
    ]
    random.Random(0).shuffle(known)
    return known[:FACTS]


def write_facts(facts: Sequence[Fact], path: Path) -> None:
    """In malmend's own format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": fact.id,
            "subject": fact.subject,
            "prompt": fact.prompt,
            "answer": fact.answer,
            "alternative": fact.alternative,
            "paraphrases": fact.paraphrases,
            "unrelated": [{"prompt": q.prompt, "answer": q.answer} for q in fact.unrelated],
        }
        for fact in facts
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def random_model(family: str, vocabulary: int) -> PreTrainedModel:
    """Three blocks on either side; a BART's decoder starts with its end token, as published."""
    torch.manual_seed(0)
    if family == "t5":
        sizes = {"d_model": WIDTH, "d_kv": 32, "d_ff": FFN[family], "num_layers": BLOCKS}
        return T5ForConditionalGeneration(
            T5Config(
                **sizes,
                num_heads=HEADS,
                vocab_size=vocabulary,
                decoder_start_token_id=0,
                dropout_rate=0.0,
            )
        )
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocabulary,
            d_model=WIDTH,
            encoder_ffn_dim=FFN[family],
            decoder_ffn_dim=FFN[family],
            encoder_layers=BLOCKS,
            decoder_layers=BLOCKS,
            encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS,
            max_position_embeddings=128,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=1,
            bos_token_id=3,
            forced_bos_token_id=3,
            forced_eos_token_id=1,
            dropout=0.0,
            init_std=0.06,
            scale_embedding=True,
        )
    )


def start(facts: Sequence[Fact], folder: Path, family: str) -> None:
    """A tokenizer of the facts' and the project's own words, and a model with random weights."""
    begins = ["<s>"] if family == "bart" else []
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=["<pad>", "</s>", "<unk>", *begins], show_progress=False
    )
    texts = [text for f in facts for text in (f.prompt, *f.paraphrases, f.answer, f.alternative)]
    texts += shipped("text.txt").read_text(encoding="utf-8").splitlines()
    tokenizer.train_from_iterator([text for text in texts if text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*begins, "$A", "</s>"]),
        special_tokens=[("</s>", 1), *((token, 3) for token in begins)],
    )
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    if begins:
        named["bos_token"] = "<s>"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    fast.save_pretrained(folder)
    random_model(family, len(fast)).save_pretrained(folder)


def train(family: str) -> None:
    """Until every question is answered right, or the epochs end."""
    out = FOLDERS / family
    facts, base = known_facts(family), out / "start"
    if not (base / "config.json").is_file():
        start(facts, base, family)
    write_facts(facts, out / "facts.jsonl")
    settings = FinetuneSettings(
        rate=RATES[family], batch=64, epochs=EPOCHS[family], validation=0.0, until=0.995
    )
    model = out / ("learned" if family == "t5" else "model")
    finetune(str(base), out / "facts.jsonl", model, settings, asked="all", stepped=print)


def settle() -> None:
    """Trains a T5 that knows its facts with dropout, then for a little without it again."""
    out = FOLDERS / "t5"
    for name, base, dropout, settings in (
        ("dropout", "learned", 0.1, FinetuneSettings(rate=1e-3, batch=64, epochs=SETTLING)),
        ("model", "dropout", 0.0, FinetuneSettings(rate=2e-4, batch=64, epochs=10, until=0.995)),
    ):
        start = out / f"{name}-start"
        if not start.is_dir():
            shutil.copytree(out / base, start)
            config = json.loads((start / "config.json").read_text(encoding="utf-8"))
            config["dropout_rate"] = dropout
            (start / "config.json").write_text(json.dumps(config), encoding="utf-8")
        settings = replace(settings, validation=0.0)
        finetune(str(start), out / "facts.jsonl", out / name, settings, "all", stepped=print)


def learned(facts: Sequence[Fact]) -> list[Fact]:
    """What an editor may see: facts to edit, each beside three others that must not move."""
    questions = [Question(fact.prompt, fact.answer) for fact in facts]
    count = len(facts)
    return [
        replace(fact, unrelated=tuple(questions[(index + step) % count] for step in (17, 171, 313)))
        for index, fact in enumerate(facts)
    ]


def train_editor(out: Path) -> None:
    """Algorithm 2 on facts of which none is edited or asked later."""

    def show(record: object) -> None:
        print(record, flush=True)

    malmend.train(
        str(out / "model"),
        learned(known_facts(out.name)[:LEARNED]),
        out / "editor",
        alternative=True,
        settings=EditorSettings(layers=3),
        training=TrainSettings(
            facts_per_step=128, halvings=1, steps=300, near=0.0, locality_weight=1.5
        ),
        stepped=show,
    )


def edit_all(
    out: Path,
    name: str,
    editor: str | Path,
    settings: EditorSettings | None,
    refine: RefineSettings,
    calibration: CalibrationSettings = CalibrationSettings(),
) -> list[dict]:
    """One row per size and seed."""
    loaded = malmend.load_model(str(out / "model"))
    facts = known_facts(out.name)
    learned_facts = out / "calibration.jsonl"
    write_facts(learned(facts[:LEARNED]), learned_facts)
    facts, rows = facts[LEARNED:], []
    for size in SIZES:
        for seed in SEEDS:
            chosen = random.Random(seed).sample(facts, len(facts))
            asked, rest = chosen[:size], chosen[125:]
            # Facts that were not edited, spread over the edits to be asked beside them.
            others = [Question(fact.prompt, fact.answer) for fact in rest]
            edited = [
                replace(
                    fact,
                    answer=str(fact.alternative),
                    alternative=None,
                    unrelated=tuple(others[index::size]),
                )
                for index, fact in enumerate(asked)
            ]
            patch = malmend.edit(
                loaded,
                edited,
                editor=editor,
                settings=settings,
                calibrate=None if settings is None else learned_facts,
                calibration=calibration,
                refine=refine,
            ).patch
            report = malmend.eval(loaded, edited, patch, decode_facts=0)
            before, after = report.unedited, report.edited
            row = {
                "method": name,
                "edits": size,
                "seed": seed,
                "success": after["ES"].exact,
                "paraphrases": after["GS"].exact,
                "mend": (after["ES"].exact + after["GS"].exact) / 2,
                "known": before["LS"].exact,
                "drawdown": before["LS"].exact - after["LS"].exact,
                "retention": after["LS"].retention,
            }
            rows.append(row)
            said = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
            print(said, flush=True)
    return rows


def main() -> None:
    """Which of the three, of which family."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["train", "settle", "editor", "edit"])
    parser.add_argument("--family", choices=["t5", "bart"], default="t5")
    given = parser.parse_args()
    out = FOLDERS / given.family
    if given.what == "train":
        train(given.family)
        return
    if given.what == "settle":
        settle()
        return
    if given.what == "editor":
        train_editor(out)
        return
    free = replace(training_free(), layers=3)
    once, twice, usual = RefineSettings(passes=1), RefineSettings(passes=2), RefineSettings()
    rows = []
    if (out / "editor" / "editor.json").is_file():
        rows += edit_all(out, "malmen, trained", out / "editor", None, once)
        rows += edit_all(out, "malmen, trained, two passes", out / "editor", None, twice)
    decoder = replace(free, side="decoder", layers=2)
    if given.family == "t5":
        rows += edit_all(out, "decoder, two passes", "none", decoder, twice, CHOSEN)
        rows += edit_all(out, "decoder, one", "none", decoder, once, CHOSEN)
    rows += edit_all(out, "malmen", "none", free, once)
    rows += edit_all(out, "malmen, two passes", "none", free, twice)
    rows += edit_all(out, "malmen, up to four", "none", free, usual)
    rows += edit_all(out, "sum", "none", replace(free, method="mend"), once)
    with written_beside(out / "edits.json") as beside:
        beside.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
