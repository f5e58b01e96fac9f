"""Pictures in tar files of a few hundred megabytes (WebDataset's layout), with an index for random access.

A folder of shards holds `000000.tar`, `000001.tar`, ... with members `key.jpg` or `key.png`, and `index.json` with the
place, size in pixels and hash of every member. Members are read by offset; nothing is unpacked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import logging
import re
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from clearsr_core.whole_files import replacing

from .picture_files import SUFFIXES, header_size
from .provenance import sha256

log = logging.getLogger("clearsr.training")

FORMAT = 1
INDEX = "index.json"
BLOCK = 512  # bytes; a tar file is made of these


class ShardError(ValueError):
    """Shards are damaged, incomplete or of other data; the message says which and what to do."""


@dataclass(frozen=True)
class Member:
    """One picture of a shard."""

    name: str  # path of the original file below its data folder
    key: str  # name of the member in the tar file
    offset: int  # first byte in the tar file
    bytes: int
    height: int  # of the upright picture, in pixels
    width: int
    sha256: str  # of the member; empty where nobody has computed it


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    bytes: int
    sha256: str
    members: tuple[Member, ...]


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says."""

    plan: str  # hash of the pictures and settings that the shards are made from
    complete: bool
    shards: tuple[Shard, ...]

    def write(self, folder: Path) -> None:
        """Replace `folder/index.json` in one go: a kill leaves the old one or the new one."""
        table = {
            "format": FORMAT,
            "count": sum(len(shard.members) for shard in self.shards),
            "bytes": sum(shard.bytes for shard in self.shards),
            **dataclasses.asdict(self),
        }
        with replacing(folder / INDEX) as unfinished:
            unfinished.write_text(json.dumps(table, indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> ShardIndex:
        """Read `folder/index.json`.

        Raises:
            ShardError: when it is not there, not readable or of a later format.
        """
        path = folder / INDEX
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            if table["format"] != FORMAT:
                raise ShardError(f"{path} has format {table['format']}; this version reads format {FORMAT}.")
            shards = tuple(
                Shard(
                    shard["name"], shard["bytes"], shard["sha256"], tuple(Member(**item) for item in shard["members"])
                )
                for shard in table["shards"]
            )
            return cls(table["plan"], table["complete"], shards)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ShardError(
                f"{path} cannot be read as an index of shards ({error}). Make the shards again with training.prepare."
            ) from error


def _key(number: int, name: str, suffix: str) -> str:
    # WebDataset ends a key at the first dot, and a plain tar header holds 100 bytes.
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem)[:60]
    return f"{number:07d}_{stem}{suffix}"


@dataclass(frozen=True)
class Entry:
    """One picture on its way into a shard."""

    name: str
    suffix: str  # ".jpg" or ".png"
    data: bytes
    height: int
    width: int


def write_shards(
    folder: Path,
    count: int,
    entry: Callable[[int], Entry],
    plan: str,
    shard_bytes: int,
    advance: Callable[[int], None] = lambda number: None,
) -> ShardIndex:
    """Write pictures 0 .. count-1 as shards, continuing what an earlier call with the same plan has finished.

    Every shard is written beside its name, flushed to the disk and renamed; the index follows it. After a kill the next
    call goes on behind the last whole shard and ends with the same files, byte for byte.

    Args:
        folder: made if missing.
        count: number of pictures.
        entry: gives picture number i; called in order, each picture once.
        plan: hash of everything that decides the shards; another one in `folder` is refused.
        shard_bytes: a shard is closed before a picture would take it above this; one picture always fits.
        advance: told the number of every picture that is in the file, those of an earlier call included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = list(_finished(folder, plan))
    number = sum(len(shard.members) for shard in shards)
    for done in range(number):
        advance(done)
    waiting: Entry | None = None
    while number < count:
        path = folder / f"{len(shards):06d}.tar"
        members: list[Member] = []
        with replacing(path) as unfinished:
            # The oldest tar format has no dates or owners that would differ from run to run.
            with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
                while number < count:
                    waiting = waiting or entry(number)
                    if members and tar.offset + BLOCK + len(waiting.data) > shard_bytes:
                        break
                    info = tarfile.TarInfo(_key(number, waiting.name, waiting.suffix))
                    info.size = len(waiting.data)
                    member = Member(
                        waiting.name,
                        info.name,
                        tar.offset + BLOCK,
                        info.size,
                        waiting.height,
                        waiting.width,
                        hashlib.sha256(waiting.data).hexdigest(),
                    )
                    tar.addfile(info, io.BytesIO(waiting.data))
                    members.append(member)
                    advance(number)
                    number, waiting = number + 1, None
            digest = sha256(unfinished)
        shards.append(Shard(path.name, path.stat().st_size, digest, tuple(members)))
        ShardIndex(plan, False, tuple(shards)).write(folder)
    index = ShardIndex(plan, True, tuple(shards))
    index.write(folder)
    return index


def _finished(folder: Path, plan: str) -> Iterator[Shard]:
    """Yield the shards that an earlier call has finished and that are still whole."""
    if not (folder / INDEX).exists():
        return
    index = ShardIndex.read(folder)
    if index.plan != plan:
        raise ShardError(
            f"{folder} holds shards of other pictures or settings. Give another --out, or delete that folder."
        )
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file() or path.stat().st_size != shard.bytes:
            log.warning("%s is missing or cut off; it and the shards behind it are written again.", path)
            return
        yield shard


def is_shard_folder(folder: Path) -> bool:
    """Say whether a data folder holds shards: tar files or an index, and no loose pictures beside them."""
    files = [path for path in folder.iterdir() if path.is_file()]
    shards = any(path.suffix == ".tar" or path.name == INDEX for path in files)
    return shards and not any(path.suffix.lower() in SUFFIXES for path in files)


def open_index(folder: Path) -> ShardIndex:
    """Return the index of a folder of shards, checked against the files; without `index.json` it is made in memory.

    Raises:
        ShardError: for shards that are missing, cut off, or not finished.
    """
    if not (folder / INDEX).exists():
        paths = sorted(folder.glob("*.tar"))
        log.info("%s has no %s; reading the headers of %d tar files.", folder, INDEX, len(paths))
        with ThreadPoolExecutor(4) as pool:
            return ShardIndex("", True, tuple(pool.map(_scan, paths)))
    index = ShardIndex.read(folder)
    if not index.complete:
        raise ShardError(
            f"{folder} holds {len(index.shards)} finished shards and is not complete. Run the training.prepare command "
            "that was making it again; it goes on where it stopped."
        )
    for shard in index.shards:
        path = folder / shard.name
        if not path.is_file():
            raise ShardError(f"{path} is missing. Copy it again, or make it again with training.prepare.")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ShardError(
                f"{path} has {size:,} bytes instead of {shard.bytes:,}: it is cut off or changed. Copy it again, or "
                "make it again with training.prepare."
            )
    return index


def _scan(path: Path) -> Shard:
    """Read the places and sizes of a tar file's pictures; members that are no pictures are passed over."""
    size = path.stat().st_size
    members: list[Member] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.offset_data + info.size > size:
                    raise tarfile.ReadError(f"its member {info.name} ends behind the end of the file")
                if not info.isfile() or Path(info.name).suffix.lower() not in SUFFIXES:
                    continue
                data = read_member(path, info.offset_data, info.size)
                try:
                    height, width = header_size(io.BytesIO(data))
                except Exception as error:  # Pillow raises many kinds; one bad member must not end a run.
                    log.warning("%s: %s cannot be read and is left out (%s).", path, info.name, error)
                    continue
                members.append(Member(info.name, info.name, info.offset_data, info.size, height, width, ""))
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{path} is cut off or no tar file: {error}. Copy it again.") from error
    return Shard(path.name, size, "", tuple(members))


def read_member(path: Path, offset: int, count: int) -> bytes:
    """Return `count` bytes of a tar file from `offset` on.

    Raises:
        ShardError: when the file ends before that.
    """
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read(count)
    if len(data) != count:
        raise ShardError(f"{path} is cut off: {count:,} bytes at {offset:,} are not there. Copy it again.")
    return data
