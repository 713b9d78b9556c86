"""Write src/malmend/data/wikipedia.txt: lines of English Wikipedia articles, and which they are of.

The articles are those that gensim carries for its own tests (beginning with A, of 2016); markup is
read by mwparserfromhell.  Every second line is written as text for language models often is: marks
apart, hyphens as Moses' tokenizer splits them, and ``<unk>`` for a name that is there once.

Run ``pip install --group text`` and ``python scripts/make_wikipedia.py``, with ``--check`` to
compare only.  The same releases give the same bytes: what is drawn is drawn by a hash of the line.
Licence and attribution are in src/malmend/data/README.md.
"""

from __future__ import annotations

import argparse
import bz2
import hashlib
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

NEEDED = "This script reads gensim and mwparserfromhell: pip install --group text"
try:
    import mwparserfromhell
except ImportError:
    sys.exit(NEEDED)

DATA = Path(__file__).resolve().parent.parent / "src" / "malmend" / "data"
DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
EACH, SHORTEST, LONGEST = 24, 35, 75  # lines of an article, and words of a line
DROPPED = re.compile(
    r"\{\|.*?\|\}|<!--.*?-->|<ref[^>]*/>"
    r"|<(ref|gallery|math|code|timeline|blockquote|poem|chem|sub|sup)\b[^>]*>.*?</\1>",
    re.DOTALL,
)
NO_PROSE = re.compile(r"[{}\[\]<>|=*]|https?:|www\.|ISBN|\(\s*[,;)]|\(\s*$| [,;.]|''|\\")
APART = (
    ("[“”]", '"'),
    ("[‘’]", "'"),
    (r"(?<=\w)-(?=\w)", " @-@ "),
    (r"(?<=\d)([,.])(?=\d)", r" @\1@ "),
    (r"(?<!@)([,;:!?()\"–—])(?!@)", r" \1 "),
    (r'\.(?=[" ]*$)|(?<=[a-z)"\d])\.(?= [A-Z"])', " ."),
    (r"(?<=\w)('(?:s|t|re|ve|d|ll))\b", r" \1"),
)


def articles() -> Iterator[tuple[str, str, str]]:
    """Title, revision and wikitext of each article of the dump that is no redirection."""
    found = find_spec("gensim")
    if found is None or not found.submodule_search_locations:
        sys.exit(NEEDED)
    root = ElementTree.fromstring(
        bz2.decompress((Path(found.submodule_search_locations[0]) / DUMP).read_bytes())
    )
    space = root.tag.partition("}")[0] + "}"
    for page in root.iter(f"{space}page"):
        revision = page.find(f"{space}revision")
        if page.find(f"{space}redirect") is None and revision is not None:
            parts = (page.findtext(f"{space}title"), revision.findtext(f"{space}id"))
            title, number = (part or "" for part in parts)
            yield title, number, revision.findtext(f"{space}text") or ""


def paragraphs(wikitext: str) -> Iterator[str]:
    """The running text of an article, up to its notes and references."""
    body = re.split(r"\n==\s*(?:See also|Notes|References|Further reading|External)", wikitext)[0]
    code = mwparserfromhell.parse(DROPPED.sub("", body))
    for link in code.filter_wikilinks(recursive=True):
        if re.match(r"\s*:?(file|image|category):", str(link.title), re.IGNORECASE):
            code.remove(link)
    for line in code.strip_code().split("\n"):
        line = " ".join(line.split())
        if not NO_PROSE.search(line) and line.endswith((".", "!", "?", '."')):
            yield line


def lines_of(paragraph: str) -> Iterator[str]:
    """Its sentences, as many together as make a line of :data:`SHORTEST` words."""
    together: list[str] = []
    for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"])", paragraph):
        together.append(sentence)
        words = " ".join(together).split()
        if len(words) >= SHORTEST:
            if len(words) <= LONGEST and _is_whole(" ".join(words)):
                yield " ".join(words)
            together = []


def _is_whole(line: str) -> bool:
    """Latin letters only, and no end at an abbreviation."""
    if re.search(r"\b(?:e\.g|i\.e|c|ca|St|Dr|Mr|Mrs|[A-Z])\.$", line):
        return False
    return all(mark.isprintable() and (mark < "\u0250" or mark in "–—’‘“”…") for mark in line)


def apart(line: str, names: Mapping[str, int]) -> str:
    """A line with its marks apart, and without the long names that ``names`` counts once."""
    for pattern, by in APART:
        line = re.sub(pattern, by, line)
    words = line.split()
    return " ".join("<unk>" if len(one) > 6 and names.get(one) == 1 else one for one in words)


def made() -> dict[str, str]:
    """Text by file name: the lines, in turns over the articles, and the articles."""
    chosen, used = list[list[str]](), list[str]()
    for title, number, wikitext in articles():
        lines = sorted(
            {line for paragraph in paragraphs(wikitext) for line in lines_of(paragraph)},
            key=lambda line: hashlib.sha256(line.encode()).hexdigest(),
        )
        if lines:
            chosen.append(lines[:EACH])
            used.append(f"{title}\thttps://en.wikipedia.org/w/index.php?oldid={number}")
    turns = [line for some in itertools.zip_longest(*chosen) for line in some if line]
    names = Counter(re.findall(r"\b[A-Z][a-z]+\b", " ".join(turns)))
    turns = [apart(line, names) if index % 2 else line for index, line in enumerate(turns)]
    return {
        "wikipedia.txt": "\n".join(turns) + "\n",
        "wikipedia-articles.tsv": "\n".join(used) + "\n",
    }


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or with ``--check`` say whether they are up to date."""
    parser = argparse.ArgumentParser(description="Write src/malmend/data/wikipedia.txt.")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    check, differs = parser.parse_args(arguments).check, False
    for name, text in made().items():
        path = DATA / name
        if not check:
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {len(text.splitlines()):,} lines, {len(text.encode()):,} bytes")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            differs = True
            print(f"{name} differs: run scripts/make_wikipedia.py")
        else:
            print(f"{name}: up to date")
    return int(differs)


if __name__ == "__main__":
    sys.exit(main())
