"""Sentences for the synthetic voices, one per line, from Jane Austen's novels in a Debian package.

    python texts.py --output sentences.txt [--debs FOLDER] [--prompts prompts.jsonl]

The package is r-cran-janeaustenr; its data is read without R. With --prompts the texts of a manifest are added, each
`PROMPT_TIMES` times.
"""

import argparse
import json
import random
import re
import subprocess
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"  # public-domain texts from Project Gutenberg, 725,000 words
DATA = Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
WORDS = (3, 28)  # in a sentence: up to some 12 s of speech
PROMPT_TIMES = 3
CHARSXP = re.compile(
    rb"\x00[\x00-\x0f][\x00-\xff]\x09(?=[\x00\xff])"
)  # a string in R's serialisation; its length follows
SENTENCE_END = re.compile(r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")

TITLES = {"Mr": "Mister", "Mrs": "Missus", "Dr": "Doctor"}  # as in LibriSpeech's transcripts
TITLE = re.compile(r"\b(Mr|Mrs|Dr)\b\.?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--debs", type=Path, help="folder with the package (default: fetch it with apt-get)")
    parser.add_argument("--prompts", type=Path, help="a manifest whose texts are added")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.debs is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True)
        package = next((options.debs or Path(scratch)).glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, Path(scratch, "root")], check=True)
        content = Path(scratch, "root", DATA).read_bytes()
    lines = sorted({sentence for novel in novels(content) for sentence in sentences(novel)})
    if options.prompts:
        texts = [json.loads(line)["text"] for line in options.prompts.read_text(encoding="utf-8").splitlines()]
        lines += PROMPT_TIMES * texts
    random.Random(0).shuffle(lines)
    options.output.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} sentences, {sum(len(line.split()) for line in lines)} words: {options.output}")


def novels(content: bytes) -> Iterator[list[str]]:
    """The lines of each novel. For each, the file contains a length of 4 bytes and zlib-compressed data."""
    while content:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(content[4:])
        content = unpacker.unused_data
        lines = []
        for match in CHARSXP.finditer(raw):
            end = match.end() + 4
            length = int.from_bytes(raw[match.end() : end], "big", signed=True)
            lines.append(raw[end : end + max(length, 0)].decode("utf-8", "replace"))
        yield lines


def sentences(lines: list[str]) -> Iterator[str]:
    """Sentences of a speakable length with plain words only; chapter headings and the like have no full stop."""
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        for sentence in SENTENCE_END.split(" ".join(paragraph.split())):
            sentence = sentence.replace("--", ", ").replace("_", "").strip("\"' ")
            sentence = TITLE.sub(lambda title: TITLES[title[1]], sentence)
            words = len(sentence.split())
            if WORDS[0] <= words <= WORDS[1] and re.fullmatch(r"[A-Za-z' ,;:.!?\"()-]+[.!?]", sentence):
                yield " ".join(re.sub(r'[()"]', "", sentence).split())


if __name__ == "__main__":
    main()
