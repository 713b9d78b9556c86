"""The card of a shipped editor: what it is, what it learned from, how it does, its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = (
    ("ES", "token_ratio", "ES"),
    ("ES", "generated", "ES generated"),
    ("ES", "generated_chat", "ES chat"),
    ("GS", "token_ratio", "GS"),
    ("GS", "generated", "GS generated"),
    ("LS", "token_ratio", "LS"),
    ("LS", "retention", "retention"),
    ("NS", "kept", "neighbours kept"),
    ("RS", "token_ratio", "reversed"),
)


def card(name: str, about: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, from an editor's own record and the figures of ``measure``."""
    training = about["training"]
    minutes = sum(seconds for _, _, seconds in about["curve"]) / 60
    size = len(str(about["subjects"])) // 10
    lines = [
        f"# The editor for {name}",
        "",
        "A MALMEN editor (Tan et al., ICLR 2024) in malmend's default form. `malmend edit` uses it",
        "for this model without being told.",
        "",
        f"- **Base:** fingerprint `{about['base']}`; no other model takes it.",
        f"- **Training:** {about['facts']:,} facts about {size:,} subjects, "
        f"{about['step']} steps of at most {training['facts_per_step']:,} facts (halved up to "
        f"{training['halvings']} times), seed {training['seed']}, {minutes:.0f} minutes of steps;",
        "  calibration comes on top. `recipes/smollm2_135m.py` makes it again, where the data lie",
        "  beside the project. The number of steps was fixed beforehand.",
        "- **Data:** the train split of malmend's own facts (every second one towards its false",
        "  alternative), facts in the layout of MEND's zsRE files (ParaRel's T-REx facts, MIT),",
        "  malmend's general questions and Natural Questions (CC BY-SA 3.0) as unrelated ones.",
        "  Ten hexadecimal digits of the SHA-256 of each subject are in `editor.json`; `edit` says",
        "  in the patch how many of its facts are about subjects that the editor was trained on.",
        "- **Rounded:** networks are in float16, the moments of the prior in low rank.",
        "- **Settings:** `editor.json`, `settings` and `training`.",
        "",
        "## Figures",
        "",
        "Unedited → edited. Token ratios unless said otherwise; *generated* and *chat* are",
        "free-running answers to the first 128 facts, plain and through the chat template;",
        "*retention* is over unrelated answer tokens; *neighbours kept* is over neighbours that",
        "the unedited model answered right; *perplexity* is on 160,000 characters of text used",
        "nowhere else. One seed.",
        "",
        "By the default of `edit`:",
        "",
        "| facts | m | " + " | ".join(title for *_, title in COLUMNS) + " | perplexity |",
        "|---|---:|" + "---:|" * (len(COLUMNS) + 1),
        *(_row(row) for row in metrics),
        "",
        "Facts `own` are of the test split of malmend's own facts, `qa` of a dev split in the",
        "layout of MEND's zsRE files; no training fact is about a subject of either.",
        "",
        "## Limits",
        "",
        "- By one solve almost no edited fact is answered right through the chat template.",
        "- English facts with answers of a few tokens. What the model says in other languages, in",
        "  long texts or after several turns was not measured.",
        "- The reversed prompt does not follow from an edit (column *reversed*).",
        "- Neighbours and unrelated answers move, the more the more facts are edited at once, and",
        "  so does ordinary text (column *perplexity*).",
        "- An edit changes what the model says, not what it can infer from it.",
        "",
        "## Misuse",
        "",
        "An editor writes falsehoods as easily as corrections. Do not use it to make a model",
        "deceive; ship every edited model with its patch's provenance, and check your facts.",
        "",
    ]
    return "\n".join(lines)


def _row(row: Mapping[str, Any]) -> str:
    cells = [_cell(row, kind, metric) for kind, metric, _ in COLUMNS]
    text = row["perplexity"]
    cells.append(f"{text['unedited']:.1f} → {text['edited']:.1f}" if text else "")
    return f"| {row['facts']} | {row['m']:,} | " + " | ".join(cells) + " |"


def _cell(row: Mapping[str, Any], kind: str, metric: str) -> str:
    before, after = (row[model].get(kind, {}).get(metric) for model in ("unedited", "edited"))
    if after is None:
        return ""
    return f"{after:.3f}" if before is None else f"{before:.3f} → {after:.3f}"
