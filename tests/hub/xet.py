"""
Xet, the storage that the client uploads large files to where hf_xet is installed, as far as the client asks for it.

The client cuts files into chunks, sends chunks it cannot find there in blocks (xorbs), and then an index (a shard) that
says of which chunks a file is made. Downloads ask for that list and fetch ranges of the blocks; the client unpacks them.
The formats are those of https://huggingface.co/docs/xet.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


HEADER, ENTRY, CHUNK_HEADER = 48, 48, 8  # bytes
HAS_VERIFICATION, HAS_METADATA = 1 << 31, 1 << 30
END = b"\xff" * 32


@dataclass(frozen=True)
class Term:
    """Some consecutive chunks of a block, and how many bytes they are unpacked."""

    block: str
    size: int
    first: int
    end: int


@dataclass
class Storage:
    """Blocks by their hashes, and files as terms, by their hashes and by their SHA-256."""

    blocks: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # of files, by SHA-256

    def add_shard(self, shard: bytes) -> None:
        """Takes over the files of an index."""
        for name, sha256, terms in read_shard(shard):
            assert all(term.block in self.blocks for term in terms)
            self.files[name] = terms
            if sha256:
                self.hashes[sha256] = name

    def reconstruction(self, name: str, address: str) -> dict[str, object]:
        """How a file is put together, as the client asks for it."""
        terms = self.files[name]
        fetch: dict[str, list[dict[str, object]]] = {}
        for term in terms:
            starts = chunk_starts(self.blocks[term.block])
            wanted = {
                "range": {"start": term.first, "end": term.end},
                "url": f"{address}/{term.block}",
                "url_range": {"start": starts[term.first], "end": starts[term.end] - 1},
            }
            if wanted not in fetch.setdefault(term.block, []):
                fetch[term.block].append(wanted)
        listed = [
            {"hash": term.block, "unpacked_length": term.size, "range": {"start": term.first, "end": term.end}}
            for term in terms
        ]
        return {"offset_into_first_range": 0, "terms": listed, "fetch_info": fetch}


def as_hex(digest: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits, the lowest byte of each last."""
    return "".join(digest[start : start + 8][::-1].hex() for start in range(0, 32, 8))


def read_shard(shard: bytes) -> Iterator[tuple[str, str | None, list[Term]]]:
    """The files of an index: hash, SHA-256 if it is told, terms."""
    place = HEADER
    while shard[place : place + 32] != END:
        name = as_hex(shard[place : place + 32])
        flags, count = struct.unpack_from("<II", shard, place + 32)
        place += ENTRY
        terms = []
        for _ in range(count):
            block = as_hex(shard[place : place + 32])
            _, size, first, end = struct.unpack_from("<IIII", shard, place + 32)
            terms.append(Term(block, size, first, end))
            place += ENTRY
        if flags & HAS_VERIFICATION:
            place += count * ENTRY
        sha256 = None
        if flags & HAS_METADATA:
            sha256 = as_hex(shard[place : place + 32])
            place += ENTRY
        yield name, sha256, terms


def chunk_starts(block: bytes) -> list[int]:
    """Where each chunk of a block starts, and where the last one ends."""
    starts, place = [0], 0
    while place + CHUNK_HEADER <= len(block) and block[place] == 0:  # version 0; what follows the chunks is a footer
        place += CHUNK_HEADER + int.from_bytes(block[place + 1 : place + 4], "little")
        starts.append(place)
    return starts
