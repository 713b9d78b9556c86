"""Let SmolLM2-135M write the text that edits hold beside the project's own.

    python recipes/written_text.py      # some ten minutes on a core

An edited model should go on as the unedited one would (method.md, equation 29), and a model's own
lines are near what it would say: draws from the likeliest words that make 95% of what may follow.
Openings are neutral, and some are about subjects of the project's own training facts.  Lines are
cut after a sentence's end; ones that are short, or hold anything but printable ASCII, digits in a
row or a web address, are left out.  Seeded: the same lines on the same machine and thread count.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import torch

from malmend import load_model, read_facts
from malmend.files import written_beside
from malmend.workbench import shipped

OUT = Path(__file__).resolve().parents[1] / "src" / "malmend" / "data" / "written.txt"
LINES, BATCH, TOKENS, LEAST_WORDS = 1200, 100, 72, 12
WARMTH, NUCLEUS = 1.0, 0.95
ABOUT = ("{} is", "{} was", "In {},", "The history of {}", "{} has", "From {} to", "Near {}")
OTHERS = """
According to | During the | He was born in | The film | The song | The team played in | In the |
It is located in | She worked as | The book was written in | The band | The company | They moved to
| The species | The river | The game | At the | After the | The first | The author of | His father |
Her work in | The building | The language of | The capital of | In 1998, | In the 19th century, |
The museum | The railway | A study of | Most of the | The word | The album was recorded in |
The university | The island | The author lived in | The school | The population of | The storm |
The road from | Students in | The river flows | The recipe | The team won | Scientists at |
The music of | The novel is set in | The mountain | The bridge | On the other hand, | When the |
One of the | The people of | The engine | The bird | The plant | The city council | The season |
""".replace("\n", " ").split("|")


def sane(line: str) -> str | None:
    """Up to the last sentence's end; None where that is not fit to keep."""
    line = " ".join(line.split())
    end = max(line.rfind(mark) for mark in ".!?")
    line = line[: end + 1]
    plain = line.isascii() and line.isprintable() and len(line.split()) >= LEAST_WORDS
    return line if plain and not re.search(r"\d{5}|http|www|[<>{}\[\]|]", line) else None


@torch.no_grad()
def written() -> list[str]:
    """So many lines, in the order in which they were written."""
    loaded, generator = load_model("smollm2-135m"), random.Random(0)
    known = [fact for fact in read_facts(shipped("facts.jsonl")) if "train" in fact.tags]
    subjects = sorted({fact.subject for fact in known if fact.subject})
    openings = [one.strip() for one in OTHERS if one.strip()]
    tokenizer = loaded.tokenizer
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    torch.manual_seed(0)
    lines: dict[str, None] = {}
    while len(lines) < LINES:
        starts = [
            generator.choice(ABOUT).format(generator.choice(subjects))
            if generator.random() < 1 / 3
            else generator.choice(openings)
            for _ in range(BATCH)
        ]
        read = tokenizer(starts, return_tensors="pt", padding=True, add_special_tokens=False)
        said = loaded.model.generate(
            **read,
            do_sample=True,
            temperature=WARMTH,
            top_k=0,
            top_p=NUCLEUS,
            max_new_tokens=TOKENS,
            pad_token_id=tokenizer.pad_token_id,
        )
        kept = map(sane, tokenizer.batch_decode(said, skip_special_tokens=True))
        lines.update((one, None) for one in kept if one)
        print(f"{len(lines)} of {LINES} lines", flush=True)
    return list(lines)[:LINES]


if __name__ == "__main__":
    with written_beside(OUT) as path:
        path.write_text("\n".join(written()) + "\n", encoding="ascii")
