"""What each stage costs on a GPU, for the day that one is lent.

    python benchmarks/on_gpu.py                              # all stages of all three models
    python benchmarks/on_gpu.py capture step --model gptj-6b --facts 1024 8192
    python benchmarks/on_gpu.py --device cpu --tiny          # whether it runs, where there is none

SmolLM2-135M as it is where its package is there, the same with random weights, and GPT-J, 6 B with
random weights: no time here hangs on what a model says.  Seconds are of a device that has done its
work, memory is the most that torch had allocated there, and the most that the process took of the
system's beyond what it held.  Every row is written as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, GPTJConfig, LlamaConfig, PreTrainedTokenizerFast

import malmend
from malmend.editors.calibration import CalibrationSettings, calibrate
from malmend.editors.refine import RefineSettings
from malmend.editors.settings import EditorSettings, published, training_free
from malmend.editors.train_settings import published_training
from malmend.editors.training import Trainer
from malmend.facts.fact import Fact
from malmend.files import written_beside
from malmend.memory import peak_memory
from malmend.models.capture import capture
from malmend.models.load import DTYPES, LoadedModel, prepared
from malmend.models.store import ActivationStore
from malmend.models.trunk import Trunk, TrunkSettings
from malmend.numerics.prior import Prior
from malmend.numerics.ridge import RidgeFactor
from malmend.workbench import Workbench, lay_out, shipped

OUT = Path(__file__).resolve().parent / "out" / "on-gpu"
FACTS, EDITED = (1024, 8192, 16384), 1024
KEEP = 40_000_000_000  # bytes of either store on disk
FEW = CalibrationSettings(moment_facts=64, search_facts=8, prior_facts=64, text_tokens=2000)
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 8192}
CONFIGS = {
    "smollm2-random": partial(LlamaConfig, **SMOLLM2, tie_word_embeddings=True),
    "gptj-6b": GPTJConfig,
    "tiny": partial(LlamaConfig, **TINY),
}
REAL = "smollm2-135m"


@dataclass(frozen=True)
class Row:
    """One measurement; ``device_mb`` is 0 where the device is none of CUDA's."""

    model: str
    what: str
    seconds: float
    device_mb: float
    system_mb: float
    said: str = ""


def tokenizer_of(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE made of these texts, with an end token."""
    found = ByteLevelBPETokenizer()
    given = {"special_tokens": ["<|end|>"], "show_progress": False}
    found.train_from_iterator(texts, vocab_size=8000, **given)
    return PreTrainedTokenizerFast(tokenizer_object=found._tokenizer, eos_token="<|end|>")


def facts_of(count: int) -> list[Fact]:
    """The project's own, over and over with another number in front; each beside another."""
    own = [f for f in malmend.read_facts(shipped("facts.jsonl")) if f.paraphrases and f.neighbours]
    found = list[Fact]()
    for at in range(count):
        turn, fact = f"{at // len(own) + 1}. ", own[at % len(own)]
        said = {"prompt": turn + fact.prompt, "paraphrases": (turn + fact.paraphrases[0],)}
        found.append(replace(fact, id=turn + fact.id, **said))
    return found


class Bench:
    """A model on a device, and what all of its stages share."""

    def __init__(self, name: str, given: argparse.Namespace, folder: Path):
        self.name, self.folder, self.tiny = name, folder, given.tiny
        self.device, self.counts = torch.device(given.device), given.facts
        self.edited = 16 if given.tiny else EDITED
        self.facts = facts_of(max(*self.counts, self.edited))
        self.loaded = self._model(given.dtype)
        self.trunk = TrunkSettings(given.batch_tokens, KEEP)

    def _model(self, dtype: str) -> LoadedModel:
        if self.name == REAL:
            return malmend.load_model(self.name, dtype, str(self.device))
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(CONFIGS[self.name](), dtype=DTYPES[dtype])
        return prepared(model, tokenizer_of(one.prompt for one in self.facts[:8000]), self.name)

    def laid_out(self, settings: EditorSettings, store: str) -> Workbench:
        """Cut at the sites, with a store in a folder."""
        bench = lay_out(self.loaded, settings.sites_in(self.loaded.model), settings.end_of_answer)
        trunk = Trunk(self.loaded.model, bench.trunk.sites, self.trunk, Path(store))
        return replace(bench, trunk=trunk)

    def row(
        self, what: str, run: Callable[[], Any], say: Callable[[Any], str] = lambda _: ""
    ) -> Row:
        """Seconds and memory of a run, once all that was begun is done; ``say`` of its result."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        with peak_memory() as taken:
            start = time.perf_counter()
            found = run()
            if on_cuda:
                torch.cuda.synchronize(self.device)
            seconds = time.perf_counter() - start
        most = torch.cuda.max_memory_allocated(self.device) / 1e6 if on_cuda else 0.0
        return Row(self.name, what, seconds, most, (taken.most or 0) / 1e6, say(found))


def capturing(bench: Bench) -> Iterator[Row]:
    """Keys and value gradients, by cuDNN's attention too: first of new shapes, then once more."""
    places = [f"malmend.models.{name}.without_cudnn" for name in ("forms", "suffix", "cut")]
    for name, settings in (("plain", published()), ("descended", training_free())):
        for by, swapped in (("", ()), (", cuDNN's attention", places)):
            with tempfile.TemporaryDirectory(dir=bench.folder) as store, ExitStack() as stack:
                for place in swapped:
                    stack.enter_context(mock.patch(place, nullcontext))
                laid = bench.laid_out(settings, store)
                some = laid.encoder.encode_all(one.question for one in bench.facts[: bench.edited])
                run = partial(capture, laid.trunk, some, settings.tokens, settings.descent)
                for when in ("first", "again"):
                    yield bench.row(f"capture of {bench.edited:,}, {name}, {when}{by}", run)


def solving(bench: Bench) -> Iterator[Row]:
    """One site's factor and both of its uses, of two tokens a fact."""
    value, key = published().sites_in(bench.loaded.model)[0].shape_VK
    generator = torch.Generator().manual_seed(0)
    grad_VK = torch.randn(value, key, generator=generator)
    for count in bench.counts:
        keys_NK, diffs_NV = (torch.randn(2 * count, n, generator=generator) for n in (key, value))

        def run(keys_NK: Any = keys_NK, diffs_NV: Any = diffs_NV) -> None:
            factor = RidgeFactor(keys_NK, Prior(ridge=1.0, device=bench.device))
            factor.backward(grad_VK, diffs_NV, factor.shift(diffs_NV))

        run()
        yield bench.row(f"solve and back, N {2 * count:,}, K {key:,}", run)


def stepping(bench: Bench) -> Iterator[Row]:
    """A training step of the published editor, identity prior: in the first epoch, and later."""
    settings, training = published(), published_training()
    if bench.tiny:
        settings = replace(settings, network=replace(settings.network, rank=8))
    for count in bench.counts:
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
            laid = bench.laid_out(settings, folder)
            found = calibrate(laid.trunk, laid.encoder, settings, bench.facts[:64], "A line.", FEW)
            pairs = ActivationStore(Path(folder) / "pairs", 1, laid.trunk.wide, KEEP)
            asked = replace(training, facts_per_step=count)
            editor, some = found.editor(settings, laid.trunk, 0), bench.facts[:count]
            trainer = Trainer(editor, laid.trunk, laid.encoder, some, (), asked, pairs)
            for when in ("first epoch", "later"):
                yield bench.row(f"training step, {count:,} facts, {when}", trainer.take_step)
                trainer.step = 0  # so that the same facts are drawn


def editing(bench: Bench) -> Iterator[Row]:
    """An edit without a network, calibration included: one solve, and settled in a few steps."""
    steps, settings = 2 if bench.tiny else 20, replace(training_free(), eta=1.0)
    given = {"settings": settings, "calibration": FEW, "trunk": bench.trunk}
    run = partial(malmend.edit, bench.loaded, bench.facts[: bench.edited], **given)
    ways = {"one solve": RefineSettings(passes=1, rounds=0)}
    ways[f"settled in {steps} steps"] = RefineSettings(rounds=1, steps=steps)
    for name, refine in ways.items():
        yield bench.row(
            f"edit of {bench.edited:,}, {name}",
            partial(run, refine=refine),
            lambda found: f"{found.seconds:.1f} s without calibration",
        )


STAGES: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "capture": capturing,
    "solve": solving,
    "step": stepping,
    "edit": editing,
}


def main() -> None:
    """Measures the stages that were named, or all, of the models that were named, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=[*STAGES, []], default=[])
    parser.add_argument("--model", choices=[REAL, *CONFIGS])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bfloat16")
    parser.add_argument("--facts", type=int, nargs="+", default=FACTS)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="a few facts, and three small blocks")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if given.tiny:
        given.facts, given.model = (8, 16), "tiny"
    names = [given.model] if given.model else [REAL, "smollm2-random", "gptj-6b"]
    on_cuda = given.device.startswith("cuda")
    if on_cuda and not torch.cuda.is_available():
        parser.error(f"there is no {given.device} here; --device cpu --tiny shows that it runs")
    device = torch.cuda.get_device_name(given.device) if on_cuda else given.device
    about, rows = {"device": device, "torch": torch.__version__, "dtype": given.dtype}, list[Row]()
    path = given.out / f"{'-'.join([given.model or 'all', *given.stages])}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, MALMEND_CACHE=folder):
        for name in names:
            bench = None  # the one before gives its room
            for stage in given.stages or STAGES:
                try:
                    bench = bench or Bench(name, given, Path(folder))
                    for row in STAGES[stage](bench):
                        rows.append(row)
                        took = f"{row.seconds:.3f} s, {row.device_mb:,.0f} MB there"
                        print(f"{name}, {row.what}: {took}, {row.system_mb:,.0f} MB here")
                        kept = {**about, "rows": [asdict(one) for one in rows]}
                        with written_beside(path) as beside:
                            beside.write_text(json.dumps(kept, indent=2), encoding="utf-8")
                except (malmend.MalmendError, torch.OutOfMemoryError) as error:
                    print(f"{name}, {stage}: {error}")  # as where its package is not there


if __name__ == "__main__":
    main()
