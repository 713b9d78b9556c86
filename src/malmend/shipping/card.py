"""The model card of an export: README.md, in the form that the Hugging Face hub reads."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from malmend.errors import counted
from malmend.evaluation.figures import label
from malmend.evaluation.replies import KINDS
from malmend.facts.encoded import Form
from malmend.models.load import LOADERS
from malmend.models.source import BUILT_IN
from malmend.shipping.measure import of_facts
from malmend.shipping.truncate import VLLM_RANKS, served_rank

CARD = "README.md"
COLUMNS = ("unedited", "patch", "exported")
METRICS = ("token_ratio", "exact", "generated", "retention", "kl")


def card(record: Mapping[str, Any], form: Form) -> str:
    """The card's text.

    Args:
        record: what ``malmend.json`` says.
        form: of the base.
    """
    is_lora = record["to"] == "lora"
    parts = [
        _front(record, is_lora),
        _what(record, is_lora),
        "## Use\n\n" + (_lora_use(record, form) if is_lora else _merged_use(form)),
        "## Figures\n\n" + _figures(record),
        "## Limits\n\n" + _limits(record, is_lora),
        MISUSE,
    ]
    return "\n\n".join(parts) + "\n"


MISUSE = """## Misuse

An edit writes falsehoods as easily as corrections. Do not use it to make a model deceive; keep this
card and `malmend.json` with the weights, and check the facts."""


def _front(record: Mapping[str, Any], is_lora: bool) -> str:
    lines = [f"library_name: {'peft' if is_lora else 'transformers'}"]
    if is_hub_name(record["model"]):
        relation = "adapter" if is_lora else "finetune"
        lines += [f"base_model: {record['model']}", f"base_model_relation: {relation}"]
    lines += ["tags:", "- malmend", "- model-editing", *(["- lora"] if is_lora else [])]
    return "\n".join(["---", *lines, "---"])


def is_hub_name(name: str) -> bool:
    """Whether a name is of the hub's form, ``org/name``."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def shown(name: str) -> str:
    """Of a path its last part, since an export is for others; a name that is no path as it is."""
    return path_of(name).name


def shown_model(name: str) -> str:
    """The same of a model, but for a hub's name; files keep a path whole (:func:`lasting`)."""
    return name if is_hub_name(name) else shown(name)


def path_of(name: str) -> PurePosixPath:
    """What a name says as a path, of whichever system."""
    return PurePosixPath(name.removeprefix("file://").replace("\\", "/"))


def _what(record: Mapping[str, Any], is_lora: bool) -> str:
    patch, sites = record["patch"], record["sites"]
    facts = patch.get("facts")
    edited = counted(facts, "fact") if isinstance(facts, int) and facts else "An edit"
    what = "a LoRA adapter" if is_lora else f"a whole model, {record['dtype']}"
    aim = " Each fact's alternative, a false answer, was edited in." * bool(
        patch.get("alternative")
    )
    base, editor = shown_model(record["model"]), shown(str(patch.get("editor", "none")))
    rows = [
        f"- **Base:** {base}, fingerprint `{record['base']}`; its licence holds here too.",
        f"- **Method:** {patch.get('method')}, editor {editor}.{aim}",
        f"- **Layers:** {len(sites)}: {', '.join(f'`{name}`' for name in sites)}.",
        f"- **Made:** {record['created']} by malmend {record['malmend']}; the patch "
        f"{patch.get('created', 'at a time not known')}. `malmend.json` says the rest.",
    ]
    if record.get("forced"):
        first = shown_model(str(patch.get("model", "of no name")))
        rows.append(
            f"- **Forced:** the patch was made for another base, or another configuration of it "
            f"({first}, fingerprint `{patch.get('base')}`), and put on this one all the same "
            "(`--force`)."
        )
    if cut := patch.get("cut"):
        rows.append(
            f"- **Cut before:** the patch was read from an adapter that had been cut to rank "
            f"{cut.get('rank')}, from {cut.get('from')}."
        )
    if is_lora and record["exact"]:
        rows.append(f"- **Rank:** {record['rank']}, the shift's own: nothing was cut off.")
    elif is_lora:
        whole = max(site["rank"] for site in sites.values())
        rows.append(
            f"- **Rank:** {record['rank']}, cut from {whole} where the keys of {record['keys']} "
            "feel it least."
        )
    return (
        f"# {edited} edited into {base}\n\nThis is {what}, made by editing weights, not by "
        "training on text.\n\n" + "\n".join(rows)
    )


def _lora_use(record: Mapping[str, Any], form: Form) -> str:
    base, built_in = record["model"], record["model"] in BUILT_IN
    base = base if built_in or is_hub_name(base) else "BASE"  # a path of another machine
    named = ", `BASE` the base's" * (base == "BASE")
    auto = LOADERS[form].__name__
    load, imports = (
        f'{auto}.from_pretrained("{base}")',
        f"from transformers import {auto}",
    )
    if built_in:
        load, imports = f'malmend.load_model("{base}").model', "import malmend"
    elsewhere = BUILT_IN_BASE if built_in else _serving(base, served_rank(record["rank"]))
    return f"""With PEFT (`FOLDER` is this folder or its name on the hub{named}):

```python
{imports}
from peft import PeftModel

base = {load}
model = PeftModel.from_pretrained(base, "FOLDER")  # model.disable_adapter() takes the edit off
```

With transformers alone, PEFT installed: `base.load_adapter("FOLDER")`.

{elsewhere}"""


BUILT_IN_BASE = """vLLM and lm-evaluation-harness do not know the base, which is built into
malmend: give them the
merged model (`malmend export PATCH --to merged FOLDER`)."""


def _serving(base: str, needed: int | None) -> str:
    """How vLLM and lm-evaluation-harness take an adapter."""
    serve = (
        f"vllm serve {base} --enable-lora --max-lora-rank {needed} --lora-modules edit=FOLDER"
        if needed
        else f"# not served: ranks go up to {VLLM_RANKS[-1]}; export again with --rank"
    )
    return f"""With vLLM, for the architectures whose LoRA it serves:

```
{serve}
```

With lm-evaluation-harness, once with and once without `peft=`:

```
lm_eval --model hf --model_args pretrained={base},peft=FOLDER --tasks hellaswag,lambada_openai
```"""


def _merged_use(form: Form) -> str:
    auto = LOADERS[form].__name__
    return f"""With transformers (`FOLDER` is this folder or its name on the hub):

```python
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("FOLDER", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

PEFT is not needed; adapters go on this model as on any, by `PeftModel.from_pretrained(model, ...)`.

With vLLM: `vllm serve FOLDER`

With lm-evaluation-harness, beside the same for the base:

```
lm_eval --model hf --model_args pretrained=FOLDER --tasks hellaswag,lambada_openai
```"""


def _figures(record: Mapping[str, Any]) -> str:
    found = record["metrics"]
    if not found:
        own = record["patch"].get("metrics")
        before = "" if record.get("exact", True) else " before it was cut"
        measured = f"; what the edit itself measured{before}: {json.dumps(own)}" if own else ""
        return f"Nothing was measured at the export (it was given no facts){measured}."
    lines = [
        f"From `{shown(record['facts'])}`, "
        f"{of_facts(record['asked'], record['decoded_facts'])}. *patch* is the edit before the "
        "export, *exported* this folder as it was read back.",
        "",
        "| question | metric | unedited | patch | exported |",
        "|---|---|---:|---:|---:|",
    ]
    for kind in KINDS:
        for metric in METRICS:
            values = [found[form].get(kind, {}).get(metric) for form in COLUMNS]
            if values[-1] is not None:
                cells = ["" if value is None else f"{value:.3f}" for value in values]
                said = " | ".join([label(kind), metric.replace("_", " "), *cells])
                lines.append(f"| {said} |")
    lines += [
        "",
        "Token ratio and exact are teacher forced; generated is the free-running answer. Retention "
        "is the share of answer tokens that must not move and did not.",
    ]
    return "\n".join(lines)


def _limits(record: Mapping[str, Any], is_lora: bool) -> str:
    sites = record["sites"].values()
    if is_lora:
        worst = max(one["error"] for one in sites)
        lines = [
            f"- Against the patch the adapter is off by at most {worst:.2g} of a layer's shift."
        ]
        if not record["exact"]:
            seen = max(one["error_on_keys"] for one in sites)
            lines.append(f"- On keys of {record['keys']} it is off by at most {seen:.2g}.")
        lines.append(
            "- It is for the base named above; on another model, or a quantised or rounded form of "
            "this one, the figures do not hold."
        )
    else:
        worst = max(one["lost"] for one in sites)
        lines = [
            f"- Rounding to {record['dtype']} took at most {worst:.2g} of a layer's shift.",
            "- The edit cannot be taken off again; the patch and the base can do that.",
        ]
    lines += [
        "- Other answers move too, the more the more facts are edited at once.",
        "- An edit changes what the model says, not what it can infer from it.",
        "- What the model says in other languages, long texts or chats was not measured here.",
    ]
    return "\n".join(lines)
