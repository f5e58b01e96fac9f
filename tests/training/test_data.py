"""Training data: the same crops from folder, shards, little memory and workers; plain words for bad files."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from training import contact_sheet, latents, layouts, prepare, shards
from training.batches import Ahead, DataSettings
from training.pairs import degrade_pairs
from training.photographs import ChunkedOrder, Photographs
from training.picture_files import header_size, read_rgb
from training.randomness import generator_for

SIZES = [(40, 64), (33, 37), (64, 48), (50, 50), (36, 90)]


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture that no other seed gives, with detail everywhere."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five small photographs in two levels, one of them rotated by EXIF."""
    root = tmp_path / "photographs"
    (root / "deeper").mkdir(parents=True)
    for index, (height, width) in enumerate(SIZES):
        path = root / ("deeper" if index % 2 else "") / f"p {index}.{'jpg' if index < 3 else 'png'}"
        image = picture(height, width, index)
        exif = Image.Exif()
        if index == 2:
            exif[0x0112] = 6
        image.save(path, exif=exif)
    return root


def pack(folder: Path, out: Path, *more: str) -> int:
    return prepare.main([f"--data={folder}", f"--out={out}", "--smallest=32", "--shard_mb=1", *more])


def small_shards(folder: Path, out: Path, shard_bytes: int = 12_000) -> shards.ShardIndex:
    """Shards of two or three pictures each, which --shard_mb cannot ask for."""
    chosen = prepare.PrepareSettings(data=(folder,), out=out, smallest=32, threads=1)
    used = [finding for finding in prepare.survey(chosen)[0] if not finding.left_out]
    return shards.write_shards(out, len(used), lambda number: prepare._entry(used[number], 0), "plan", shard_bytes)


def first_crops(photographs: Photographs, count: int = 12) -> Tensor:
    crops = [photographs.crop(32, generator_for(1, n), candidates=2, number=n) for n in range(count)]
    return torch.stack(crops)


def test_same_crops_from_folder_and_shards_in_much_and_in_little_memory(folder: Path, tmp_path: Path) -> None:
    assert len(small_shards(folder, tmp_path / "shards").shards) > 1
    sources = [(data, gigabytes) for data in (folder, tmp_path / "shards") for gigabytes in (4.0, 1e-5)]
    opened = [Photographs(data, 32, gigabytes) for data, gigabytes in sources]
    expected = first_crops(opened[0])
    assert expected.shape == (12, 3, 32, 32)
    for photographs in opened[1:]:
        assert photographs.listing == opened[0].listing
        assert torch.equal(first_crops(photographs), expected)
        assert photographs._decoded.bytes <= max(1e4, 4e9 * (photographs is opened[2]))


def test_chunked_order_is_the_same_in_any_memory_and_reads_one_shard_after_the_other(
    folder: Path, tmp_path: Path
) -> None:
    index = small_shards(folder, tmp_path / "shards")
    much, little = (Photographs(tmp_path / "shards", 32, memory, "chunked", seed=5) for memory in (4.0, 1e-5))
    assert torch.equal(first_crops(much), first_crops(little))
    order = little._chunked
    assert order is not None
    assert len(order.chunks) == len(index.shards)
    for epoch in range(3):
        row = [order.picture(epoch * order.epoch_length + place) for place in range(order.epoch_length)]
        visited = [next(i for i, chunk in enumerate(order.chunks) if number in chunk) for number in row]
        assert sum(a != b for a, b in itertools.pairwise(visited)) == len(order.chunks) - 1


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=12),
    cut=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_every_epoch_shows_every_picture_as_often_as_its_area_asks(
    sizes: list[tuple[int, int]], cut: int, seed: int
) -> None:
    chunks = [range(start, min(start + cut, len(sizes))) for start in range(0, len(sizes), cut)]
    order, again = (ChunkedOrder(sizes, chunks, seed) for _ in range(2))
    counts = Counter(order.epoch(0).tolist())
    assert set(counts) == set(range(len(sizes)))
    assert Counter(order.epoch(1).tolist()) == counts
    assert torch.equal(order.epoch(4), again.epoch(4))
    areas = [height * width for height, width in sizes]
    assert all(counts[a] >= counts[b] for a in counts for b in counts if areas[a] > areas[b])


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 3000), min_size=1, max_size=9),
    limit=st.integers(1000, 9000),
    killed_at=st.integers(0, 9),
)
def test_shards_hold_every_byte_and_a_killed_run_ends_with_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], limit: int, killed_at: int
) -> None:
    whole, halves = (tmp_path_factory.mktemp(name) for name in ("whole", "halves"))
    data = [bytes([index]) * length for index, length in enumerate(lengths)]

    def entry(number: int) -> shards.Entry:
        return shards.Entry(f"folder/p.{number}.png", ".png", data[number], 5, 7)

    def killed(number: int) -> shards.Entry:
        if number == killed_at:
            raise KeyboardInterrupt
        return entry(number)

    index = shards.write_shards(whole, len(data), entry, "plan", limit)
    try:
        shards.write_shards(halves, len(data), killed, "plan", limit)
    except KeyboardInterrupt:
        if (halves / shards.INDEX).exists():
            assert not shards.ShardIndex.read(halves).complete
    assert shards.write_shards(halves, len(data), entry, "plan", limit) == index
    names = {path.name for path in whole.iterdir()}
    assert {path.name for path in halves.iterdir()} == names
    assert all((whole / name).read_bytes() == (halves / name).read_bytes() for name in names)

    members = [(whole / shard.name, member) for shard in index.shards for member in shard.members]
    assert [shards.read_member(path, member.offset, member.bytes) for path, member in members] == data
    for shard in index.shards:
        with tarfile.open(whole / shard.name) as tar:
            assert [(info.name, info.offset_data, info.size) for info in tar] == [
                (member.key, member.offset, member.bytes) for member in shard.members
            ]
        assert len(shard.members) == 1 or sum(member.bytes + 512 for member in shard.members) <= limit + 512


def test_pictures_go_into_shards_byte_for_byte_unless_they_must_be_converted(folder: Path, tmp_path: Path) -> None:
    picture(48, 40, 9).save(folder / "other.bmp")
    assert pack(folder, tmp_path / "shards") == 0
    members = shards.ShardIndex.read(tmp_path / "shards").shards[0].members
    for member in members:
        stored = shards.read_member(tmp_path / "shards" / "000000.tar", member.offset, member.bytes)
        original = folder / member.name
        assert (stored == original.read_bytes()) == (original.suffix != ".bmp")
        assert np.array_equal(read_rgb(io.BytesIO(stored)), read_rgb(original))
    assert pack(folder, tmp_path / "small", "--smallest=16", "--long_side=40") == 0
    members = shards.ShardIndex.read(tmp_path / "small").shards[0].members
    assert max(max(member.height, member.width) for member in members) == 40
    assert {Path(member.name).name for member in members} == {
        "p 0.jpg",
        "p 1.jpg",
        "p 2.jpg",
        "p 3.png",
        "p 4.png",
        "other.bmp",
    }


def test_finished_shards_are_kept_and_other_pictures_are_refused(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "shards"
    assert pack(folder, out) == 0
    written = (out / "000000.tar").stat().st_mtime_ns
    assert pack(folder, out) == 0
    assert (out / "000000.tar").stat().st_mtime_ns == written
    whole = (out / "000000.tar").read_bytes()
    (out / "000000.tar").write_bytes(whole[:2000])
    assert pack(folder, out) == 0
    assert "written again" in caplog.text
    assert (out / "000000.tar").read_bytes() == whole
    picture(50, 50, 77).save(folder / "new.png")
    assert pack(folder, out) == 1
    assert "other pictures or settings" in caplog.text


def test_damaged_shards_say_which_and_what_to_do(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    index = small_shards(folder, out)
    last = out / index.shards[-1].name
    whole = last.read_bytes()
    last.write_bytes(whole[:5000])
    with pytest.raises(shards.ShardError, match=rf"{last.name} has 5,000 bytes instead of .* cut off"):
        Photographs(out, 32)
    (out / shards.INDEX).rename(out / "kept")
    with pytest.raises(shards.ShardError, match=rf"{last.name} is cut off"):
        Photographs(out, 32)
    last.unlink()
    (out / "kept").rename(out / shards.INDEX)
    with pytest.raises(shards.ShardError, match=rf"{last.name} is missing"):
        Photographs(out, 32)
    shards.ShardIndex("plan", False, index.shards[:1]).write(out)
    with pytest.raises(shards.ShardError, match=r"not complete.*again"):
        Photographs(out, 32)
    (out / shards.INDEX).write_text("{")
    with pytest.raises(shards.ShardError, match=r"index\.json cannot be read"):
        Photographs(out, 32)


def test_tar_files_of_others_are_read_without_an_index(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "foreign"
    out.mkdir()
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with tarfile.open(out / "some.tar", "w") as tar:
        for number, path in enumerate(paths):
            tar.add(path, f"{number}{path.suffix}")
        note = tarfile.TarInfo("0.txt")
        note.size = 4
        tar.addfile(note, io.BytesIO(b"text"))
    assert torch.equal(first_crops(Photographs(out, 32)), first_crops(Photographs(folder, 32)))


def test_a_picture_that_turns_out_to_be_damaged_is_replaced_by_the_next(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder / "p 0.jpg"
    path.write_bytes(path.read_bytes()[:-900])
    lazy = Photographs(folder, 32, memory_gb=1e-5)
    assert len(lazy) == len(SIZES)
    assert torch.equal(first_crops(lazy, 30), first_crops(lazy, 30))
    assert caplog.text.count("p 0.jpg is cut off or damaged") == 1
    assert len(Photographs(folder, 32)) == len(SIZES) - 1


def test_a_failing_disk_is_not_taken_for_a_damaged_picture(folder: Path) -> None:
    """Going on without the picture would make it another run; the user has to know."""
    lazy = Photographs(folder, 32, memory_gb=1e-5)
    for path in list(folder.rglob("*.*")):
        path.unlink()
    with pytest.raises(FileNotFoundError):
        first_crops(lazy)


def test_caches_of_encoded_crops_know_their_pictures_by_name_and_shape(folder: Path) -> None:
    """The form of the list is part of the caches on disk: changing it encodes everything anew."""
    expected = [["p 1.jpg", [33, 37, 3]], ["p 3.png", [50, 50, 3]], ["p 0.jpg", [40, 64, 3]]]
    listing = json.loads(json.dumps(Photographs(folder, 32).listing))
    assert listing[:3] == expected
    assert ["p 2.jpg", [48, 64, 3]] in listing


def test_prepare_says_what_it_left_out_and_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    root = tmp_path / "mixed"
    (root / "b").mkdir(parents=True)
    good = picture(40, 40)
    good.save(root / "good.png")
    good.save(root / "b" / "same.png")
    picture(40, 44, 2).save(root / "b" / "good.png")
    good.save(root / "cut.jpg", quality=95)
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:-1000])
    (root / "broken.jpg").write_bytes(b"not a picture")
    (root / "empty.png").write_bytes(b"")
    (root / "notes.txt").write_text("text")
    picture(20, 40, 3).save(root / "small.png")
    picture(40, 41, 4).convert("L").save(root / "grey.png")
    picture(40, 42, 5).convert("CMYK").save(root / "cmyk.jpg")
    picture(40, 43, 6).convert("RGBA").save(root / "alpha.png")
    Image.fromarray(np.full((40, 45), 30_000, dtype=np.uint16)).save(root / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    picture(40, 46, 7).save(root / "turned.jpg", exif=exif)
    target = tmp_path / "report.json"
    assert prepare.main([f"--data={root}", "--smallest=32", f"--report={target}"]) == 0
    table = json.loads(target.read_text())
    assert table["total"]["pictures"] == 12
    assert table["total"]["used"] == 7
    assert table["colour"] == {
        "RGB": 3, "grey": 1, "CMYK": 1, "with alpha": 1, "16 bit": 1, "rotated by EXIF": 1
    }  # fmt: skip
    assert table["left_out"]["cut off"] == ["cut.jpg (cut off)"]
    assert table["left_out"]["small"] == ["small.png (40x20)"]
    assert table["left_out"]["same content"] == ["good.png (as b/same.png)"]
    assert len(table["left_out"]["broken"]) == 2
    assert table["other_files"] == 1
    for words in ("cut.jpg", "broken.jpg", "empty.png", "fetch them again", "small.png", "CMYK", "no pictures"):
        assert words in caplog.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data={0}/missing"], "not a folder"),
        (["--data={0}/empty"], "No pictures in"),
        (["--data={0}/broken"], "None of the 1 pictures can be used"),
        (["--data={0}/good", "--out={0}/good/shards"], "lies inside --data"),
        (["--data={0}/good", "--shard_mb=0"], "--shard_mb=0"),
        (["--data={0}/good", "--long_side=100"], "below --smallest=512"),
    ],
)
def test_prepare_refuses_in_plain_words(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, arguments: list[str], words: str
) -> None:
    for name in ("empty", "broken", "good"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no")
    picture(8, 8).save(tmp_path / "good" / "a.png")
    assert prepare.main([argument.format(tmp_path) for argument in arguments]) == 1
    assert words in caplog.text


@pytest.mark.parametrize("data", ["missing", "empty", "broken", "small"])
def test_training_refuses_unusable_folders_in_plain_words(tmp_path: Path, data: str) -> None:
    for name in ("empty", "broken", "small"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no")
    picture(8, 8).save(tmp_path / "small" / "a.png")
    with pytest.raises(ValueError, match=r"not a folder|No pictures in|can be used"):
        Photographs(tmp_path / data, 32)


def test_data_sets_of_the_paper_are_known_and_compared(tmp_path: Path) -> None:
    for place, names in {
        "DIV2K/DIV2K_train_HR": ["0001.png", "0003.png"],
        "DIV2K/DIV2K_train_LR_bicubic/X4": ["0001x4.png"],
        "DIV2K/DIV2K_valid_HR": ["0801.png"],
        "OutdoorSceneTrain_v2/sky": ["any.png"],
        "FFHQ": ["00000.png", "10000.png"],
    }.items():
        (tmp_path / place).mkdir(parents=True)
        for name in names:
            picture(16, 16, sum(map(ord, place + name))).save(tmp_path / place / name)
    chosen = prepare.PrepareSettings(
        data=tuple(tmp_path / name for name in ("DIV2K", "OutdoorSceneTrain_v2", "FFHQ")), smallest=16, threads=1
    )
    findings, others = prepare.survey(chosen)
    table = prepare.report(findings, others, chosen)
    assert [(row["name"], row["used"]) for row in table["data_sets"]] == [("DIV2K", 2), ("FFHQ", 1), ("OST", 1)]
    assert table["left_out"] == {
        "low-resolution copy": ["DIV2K/DIV2K_train_LR_bicubic/X4/0001x4.png"],
        "held out for measuring": ["DIV2K/DIV2K_valid_HR/0801.png"],
        "not among the first 10,000": ["FFHQ/10000.png"],
    }
    said = " ".join(table["remarks"])
    assert "DIV2K: 2 of 800 training pictures. Missing 798: numbers 2, 4, 5, 6, 7, ..." in said
    assert "OST: 1 of 10,324" in said
    assert "No folder for animal, building" in said
    assert layouts.layout_of(Path("holiday/photo.jpg")) is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_gives_the_size_that_decoding_gives(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("jpg", "png", "webp", "tif"):
        picture(20, 30).save(tmp_path / f"a.{suffix}", exif=exif)
        assert header_size(tmp_path / f"a.{suffix}") == read_rgb(tmp_path / f"a.{suffix}").shape[:2]


def test_workers_change_neither_order_nor_content(folder: Path) -> None:
    photographs = Photographs(folder, 32, memory_gb=1e-5)
    makers = set()

    def make(step: int) -> Tensor:
        makers.add(threading.current_thread().name)
        generator = generator_for(3, step)
        crops = (photographs.crops(2, 32, generator, first=2 * step) + 1.0) / 2.0
        return degrade_pairs(crops, [2 * step, 2 * step + 1], 3)

    threads = torch.get_num_threads()
    alone, helped = (Ahead(make, 9, workers) for workers in (0, 3))
    for step in (0, 1, 2, 3, 7, 8, 2):  # a resumed run starts anywhere
        expected = alone.get(step)
        assert torch.equal(helped.get(step), expected)
    assert torch.get_num_threads() == threads
    assert {name.startswith("batch") for name in makers} == {True, False}
    with pytest.raises(ValueError, match="--workers=-1"):
        DataSettings(steps=1, learning_rate=1e-3, out=Path("x"), workers=-1)


def test_a_worker_reports_its_failure_at_the_step_that_needs_it() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("picture 7 is gone")
        return step

    batches = Ahead(make, 5, 2)
    assert [batches.get(step) for step in (0, 1)] == [0, 1]
    with pytest.raises(ValueError, match="picture 7 is gone"):
        batches.get(2)


def test_contact_sheet_shows_pairs_from_folder_and_shards_alike(folder: Path, tmp_path: Path) -> None:
    small_shards(folder, tmp_path / "shards")
    for name, data in (("folder", folder), ("shards", tmp_path / "shards")):
        command = [f"--data={data}", f"--out={tmp_path}/{name}.png", "--count=3", "--crop=32", "--degradation=light"]
        assert contact_sheet.main(command) == 0
    assert (tmp_path / "folder.png").read_bytes() == (tmp_path / "shards.png").read_bytes()
    with Image.open(tmp_path / "folder.png") as sheet:
        assert sheet.size == (
            2 * (64 + 2 * contact_sheet.GAP),
            2 * (32 + 7 * contact_sheet.LINE + 2 * contact_sheet.GAP),
        )
    chosen = contact_sheet.ContactSheetSettings(folder, tmp_path / "x.png", crop=32)
    lines = contact_sheet.pair(Photographs(folder, 32), 0, chosen)[2]
    assert len(lines) == contact_sheet.LINES
    assert contact_sheet.main([f"--data={folder}", f"--out={tmp_path}/a.png", "--crop=30"]) == 1


def test_synthetic_pictures_are_the_same_every_time_and_large_enough() -> None:
    first, second = (Photographs(Path("synthetic"), 800) for _ in range(2))
    assert len(first) == 16
    assert {min(size) for size in first.sizes} == {800}
    crops = [source.crops(2, 64, generator_for(0, 1)) for source in (first, second)]
    assert torch.equal(*crops)
    assert float(crops[0].std()) > 0.1


def test_data_that_is_no_folder_is_refused_with_both_ways_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not a folder\. Give a folder of photographs, or of shards; or synthetic"):
        Photographs(tmp_path / "nothing", 64)


def test_contact_sheet_shows_both_paths_and_their_difference(folder: Path, tmp_path: Path) -> None:
    command = [f"--data={folder}", "--count=1", "--crop=32"]
    for way in ("cpu", "device", "both"):
        assert contact_sheet.main([*command, f"--out={tmp_path}/{way}.png", f"--degrade_on={way}"]) == 0
    sheets = {way: read_rgb(tmp_path / f"{way}.png") for way in ("cpu", "device", "both")}
    np.testing.assert_array_equal(sheets["cpu"], sheets["device"])
    gap = contact_sheet.GAP
    shown = sheets["both"][gap : gap + 32, gap : gap + 4 * 32]
    np.testing.assert_array_equal(shown[:, :64], sheets["cpu"][gap : gap + 32, gap : gap + 64])
    np.testing.assert_array_equal(shown[:, 32:64], shown[:, 64:96])
    assert set(shown[:, 96:].flatten()) == {128}  # no difference is middle grey


def test_the_chunked_order_of_other_chunks_is_another_set_of_crops(folder: Path, tmp_path: Path) -> None:
    """A folder and its shards have the same pictures, but crop n is cut from another one: no cache holds for both."""
    small_shards(folder, tmp_path / "shards")
    area = [Photographs(data, 32).identity for data in (folder, tmp_path / "shards")]
    chunked = [Photographs(data, 32, order="chunked") for data in (folder, tmp_path / "shards")]
    assert area[0] == area[1]
    assert chunked[0].listing == chunked[1].listing
    assert not torch.equal(*map(first_crops, chunked))
    assert chunked[0].identity != chunked[1].identity
    assert area[0] not in [photographs.identity for photographs in chunked]


def test_an_outdated_cache_is_not_even_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Windows a file that is mapped cannot be replaced, and hours of encoding would end in an error."""

    def encode(numbers: Tensor) -> dict[str, Tensor]:
        return {"latents": numbers.float()[:, None]}

    cache = tmp_path / "cache.safetensors"
    latents.encoded_once(cache, "old", 3, encode, "encoding")
    loaded: list[Path] = []
    real = latents.load_file
    monkeypatch.setattr(latents, "load_file", lambda path: loaded.append(path) or real(path))
    assert latents.encoded_once(cache, "new", 2, encode, "encoding")["latents"].tolist() == [[0.0], [1.0]]
    assert loaded == []
    assert latents.encoded_once(cache, "new", 2, encode, "encoding").keys() == {"latents"}
    assert loaded == [cache]


@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("value", [100, 200, 257, 30_000, 65_535])
def test_pictures_of_16_bits_are_scaled_by_their_mode(tmp_path: Path, suffix: str, value: int) -> None:
    """A dark one is dark, however low its highest value."""
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.full((3, 5), value, dtype=np.uint16)).save(path)
    assert np.array_equal(read_rgb(path), np.full((3, 5, 3), round(value / 257), dtype=np.uint8))


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, 0), (0.5, 128), (1.0, 255), (2.0, 2), (200.0, 200), (25_700.0, 100)]
)
def test_pictures_of_floats_are_scaled_by_their_range(tmp_path: Path, value: float, expected: int) -> None:
    Image.fromarray(np.full((3, 5), value, dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.array_equal(read_rgb(tmp_path / "a.tiff"), np.full((3, 5, 3), expected, dtype=np.uint8))


def test_a_picture_that_shrinking_makes_too_small_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Judged by its shorter side behind --long_side, not in front of it."""
    caplog.set_level("INFO")
    (tmp_path / "data").mkdir()
    picture(40, 80, 0).save(tmp_path / "data" / "long.png")
    picture(40, 44, 1).save(tmp_path / "data" / "square.png")
    assert pack(tmp_path / "data", tmp_path / "shards", "--long_side=40") == 0
    members = shards.ShardIndex.read(tmp_path / "shards").shards[0].members
    assert [(member.name, member.height, member.width) for member in members] == [("square.png", 36, 40)]
    assert "long.png (80x40, shrunk to 40x20)" in caplog.text


def test_pictures_of_the_same_names_and_sizes_are_another_set(tmp_path: Path) -> None:
    """`00000.png` of 1024 x 1024 pixels is in more than one data set; shards of a folder are the same set."""
    for folder, seed in (("a", 0), ("b", 1)):
        generator = np.random.default_rng(seed)
        (tmp_path / folder).mkdir()
        for number in range(40):
            picture = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(picture).save(tmp_path / folder / f"{number:05d}.png")
    assert prepare.main([f"--data={tmp_path}/a", f"--out={tmp_path}/shards", "--smallest=32"]) == 0
    first, other, packed = (Photographs(tmp_path / name, 32) for name in ("a", "b", "shards"))
    assert first.listing == other.listing
    assert first.identity != other.identity
    assert first.identity == packed.identity
    small = Photographs(tmp_path / "a", 32, memory_gb=0.0)
    assert small.identity == first.identity
