"""Makes data as hostile as the world is: a folder of captioned pictures, and a conversation file.

A fifth of the folder's lines are sound pictures of many modes and formats; the rest are broken, misnamed, oversized or
lie, some of them harmlessly. Every line is an item of its own, so a test can ask what became of each. The same seed
gives the same items.
"""

import io
import json
import os
import random
import re
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from arra.data.store import Store

Expected = Literal["good", "bad", "either"]
MARK = "<|image|>"


@dataclass(frozen=True)
class HostileItem:
    """One line of the metadata, or one data point of the conversations."""

    number: int
    """Line or data point, from 1."""
    kind: str
    expected: Expected
    name: str | None
    """The record's id; None where the line tells none, or one that belongs to another item."""
    file: Path | None = None
    """The plain file that the line names, where there is one inside the folder."""

    @property
    def id(self) -> str:
        return self.name or f"line {self.number}"


@dataclass(frozen=True)
class HostileFolder:
    """A folder (or conversation file) and what is to become of its items; none may go missing or end the run.

    Beside the items the folder holds `out`, a link to the folder above, and pictures that no line names.
    """

    path: Path
    items: tuple[HostileItem, ...]

    @property
    def expected_good(self) -> set[str]:
        """Ids of the records that must get codes."""
        return self._ids("good")

    @property
    def expected_bad(self) -> set[str]:
        """What must end among the failures: ids, or `line N` where a line tells none of its own."""
        return self._ids("bad")

    @property
    def expected_either(self) -> set[str]:
        """What may go either way, as a decoder can make sense of it or not."""
        return self._ids("either")

    def item(self, record_id: str, where: str = "") -> HostileItem | None:
        """The item that a record or failure tells of, by the line in its place (`where`) or its id, else by its id."""
        for text in (where, record_id):
            if place := re.search(r"(?:line|item) (\d+)$", text):
                return self.items[int(place[1]) - 1]
        return next((item for item in self.items if item.name == record_id), None)

    def _ids(self, expected: Expected) -> set[str]:
        return {item.id for item in self.items if item.expected == expected}


@dataclass(frozen=True)
class _Draft:
    """An item before it is written. NUMBER in texts and names becomes the item's own number."""

    kind: str
    expected: Expected
    content: bytes | None = None
    """What the file holds; None makes no file."""
    name: str = "NUMBER.png"
    fields: dict[str, Any] = field(default_factory=lambda: {"text": "picture NUMBER"})
    line: bytes | None = None
    """The whole line, where it is no JSON object."""
    place: Callable[[Path], object] | None = None
    """Puts something else than a plain file where the picture should be."""


def make_hostile_folder(path: Path, *, count: int = 2000, seed: int = 0) -> HostileFolder:
    """A new folder at `path` whose `metadata.jsonl` has `count` lines, and a picture `outside.png` beside it."""
    chance = random.Random(seed)
    path.mkdir(parents=True)
    path.with_name("outside.png").write_bytes(_png(chance))
    (path / "sub").mkdir()
    (path / "out").symlink_to(path.parent)
    sound: list[_Draft] = []
    hostile: list[_Draft] = []
    items: list[HostileItem] = []
    lines: list[bytes] = []
    for number in range(1, count + 1):
        if number % 5 == 1:
            sound = sound or list(_sound(chance))
            draft = sound.pop(0)
        else:
            earlier = chance.choice([item.name for item in items if item.kind.startswith("sound")])
            hostile = hostile or list(_hostile(chance, earlier or ""))
            draft = hostile.pop(0)
        item, line = _write(path, number, draft)
        items.append(item)
        lines.append(line + (b"\r" if number % 7 == 0 else b""))
    (path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return HostileFolder(path, _with_own_names(items))


def _write(folder: Path, number: int, draft: _Draft) -> tuple[HostileItem, bytes]:
    def numbered(value: Any) -> Any:
        return value.replace("NUMBER", f"{number:05d}") if isinstance(value, str) else value

    name = numbered(draft.name)
    file = folder / name if draft.content is not None else None
    if file is not None and draft.content is not None:
        file.write_bytes(draft.content)
    if draft.place is not None:
        draft.place(folder / name)
    fields = {key: numbered(value) for key, value in draft.fields.items()}
    line = json.dumps({"file_name": name, **fields}).encode()
    if draft.line is not None:
        line = draft.line.replace(b"NUMBER", f"{number:05d}".encode())
    return HostileItem(number, draft.kind, draft.expected, name, file), line


def _with_own_names(items: list[HostileItem]) -> tuple[HostileItem, ...]:
    """A name that several items have is left to the good one."""
    shared = Counter(item.name for item in items)
    return tuple(
        item if item.expected == "good" or shared[item.name] == 1 else replace(item, name=None) for item in items
    )


def _pixels(chance: random.Random, *shape: int, dtype: Any = np.uint8) -> np.ndarray:
    generator = np.random.default_rng(chance.getrandbits(32))
    return generator.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def _picture(chance: random.Random) -> Image.Image:
    return Image.fromarray(_pixels(chance, chance.randint(16, 64), chance.randint(16, 64), 3))


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _png(chance: random.Random) -> bytes:
    return _encode(_picture(chance), "PNG")


def _sound(chance: random.Random) -> Iterator[_Draft]:
    """Pictures that must be read, whatever their mode."""

    def sound(kind: str, suffix: str, content: bytes) -> _Draft:
        return _Draft(f"sound {kind}", "good", content, f"NUMBER{suffix}")

    for suffix, kind in ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".gif", "GIF"), (".bmp", "BMP")):
        yield sound(kind, suffix, _encode(_picture(chance), kind))
    for mode, kind in (("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("CMYK", "JPEG")):
        yield sound(f"{mode} {kind}", f".{kind.lower()}", _encode(_picture(chance).convert(mode), kind))
    for mode in ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "CMYK", "I", "F"):
        through = "RGBA" if mode == "PA" else "L" if mode in ("I", "F") else "RGB"
        yield sound(f"{mode} TIFF", ".tif", _encode(_picture(chance).convert(through).convert(mode), "TIFF"))
    lab = Image.frombytes("LAB", (20, 16), _pixels(chance, 960).tobytes())
    yield sound("LAB TIFF", ".tif", _encode(lab, "TIFF"))
    for kind in ("PNG", "TIFF", "PPM"):
        wide = Image.fromarray(_pixels(chance, 24, 31, dtype=np.uint16) >> chance.choice([0, 4]))
        yield sound(f"I;16 {kind}", f".{kind.lower()}", _encode(wide, kind))
    floats = _pixels(chance, 20, 30).astype(np.float32)
    floats[0, :4] = np.nan, np.inf, -np.inf, 3e38
    yield sound("F TIFF with NaN", ".tif", _encode(Image.fromarray(floats), "TIFF"))
    exif = Image.Exif()
    exif[0x0112] = chance.randint(1, 8)
    for kind in ("JPEG", "PNG", "TIFF", "WEBP"):
        yield sound(f"turned {kind}", f".{kind.lower()}", _encode(_picture(chance), kind, exif=exif))
    yield sound("broken EXIF", ".png", _encode(_picture(chance), "PNG", exif=b"Exif\0\0no TIFF header"))
    yield sound("broken profile", ".jpg", _encode(_picture(chance), "JPEG", icc_profile=b"no profile"))
    more = [Image.fromarray(_pixels(chance, 30, 30, 3)) for _ in range(3)]
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        pages = _encode(more[0], kind, save_all=True, append_images=more[1:])
        yield sound(f"many pages {kind}", f".{kind.lower()}", pages)
    yield sound("1x1", ".png", _encode(Image.new("RGB", (1, 1), "red"), "PNG"))


def _hostile(chance: random.Random, earlier: str) -> Iterator[_Draft]:
    yield from _broken_pictures(chance)
    yield from _other_contents()
    yield from _bombs()
    yield from _captions(chance)
    yield from _names(chance)
    yield from _escapes(chance)
    yield from _lines(chance)
    for name in (earlier, f"./{earlier}", f"sub/../{earlier}"):
        yield _Draft("listed twice", "bad", name=name)


def _broken_pictures(chance: random.Random) -> Iterator[_Draft]:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"):
        name = f"NUMBER.{kind.lower()}"
        whole = _encode(_picture(chance), kind)
        yield _Draft(f"cut {kind}", "bad", whole[: chance.randint(1, len(whole) * 2 // 3)], name)
        yield _Draft(f"end cut {kind}", "either", whole[: -chance.randint(1, 12)], name)
        flipped = bytearray(whole)
        for _ in range(chance.choice([1, 3, 20])):
            flipped[chance.randrange(len(flipped))] ^= 1 << chance.randrange(8)
        yield _Draft(f"flipped bits {kind}", "either", bytes(flipped), name)
        head = bytearray(whole)
        head[chance.randrange(min(60, len(head)))] = chance.randrange(256)
        yield _Draft(f"changed head {kind}", "either", bytes(head), name)
        yield _Draft(f"much behind {kind}", "either", whole + chance.randbytes(500), name)
    yield _Draft("zero bytes", "bad", b"")
    yield _Draft("noise", "bad", b"\0" + chance.randbytes(999), "NUMBER.jpg")
    yield _Draft("20000x1", "bad", _encode(Image.new("L", (20_000, 1)), "PNG"))
    yield _Draft("1x20000", "bad", _encode(Image.new("1", (1, 20_000)), "TIFF"), "NUMBER.tif")


def _other_contents() -> Iterator[_Draft]:
    """Files of other kinds under a picture's name; Pillow could read some, and would call a program for EPS."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\n%%EOF\n"
    contents = {
        "text": b"no picture at all\n",
        "page of an error": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "EPS": eps,
        "PDF": b"%PDF-1.4\n1 0 obj\n<< /Type /Catalog >>\nendobj\ntrailer\n<< /Root 1 0 R >>\n%%EOF\n",
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9" height="9"/></svg>',
        "pickle": b"cos\nsystem\n(S'exit 3'\ntR.",
        "zip": b"PK\x05\x06" + bytes(18),
        "pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    }
    for kind, content in contents.items():
        yield _Draft(f"{kind} as picture", "bad", content)
    for kind in ("PCX", "ICO", "TGA", "SGI"):
        yield _Draft(f"{kind} as picture", "bad", _encode(Image.new("RGB", (16, 16), "red"), kind))


@cache
def _bombs() -> tuple[_Draft, ...]:
    """Small files that unpack to gigabytes, or claim to."""
    tiff = [(256, 4, 60_000), (257, 4, 60_000), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (279, 4, 8)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tiff)
    jpeg = bytearray(_encode(Image.new("L", (16, 16)), "JPEG"))
    start = jpeg.index(b"\xff\xc0")
    jpeg[start + 5 : start + 9] = struct.pack(">HH", 65_500, 65_500)
    webp = b"WEBPVP8X" + struct.pack("<II", 10, 0) + b"\xfe\x3f\0\xfe\x3f\0"
    rows = zlib.compress(bytes(20_000 * 2_501), 9)
    much = zlib.compress(bytes(50_000_000), 9)
    small = (_chunk(b"IDAT", zlib.compress(bytes(16 * 17))), _chunk(b"IEND", b""))
    text = _chunk(b"iTXt", b"Comment\0\1\0\0\0" + much)
    return (
        _Draft("claims 60000x60000 PNG", "bad", _png_file(60_000, 60_000, small[1])),
        _Draft("claims 60000x60000 TIFF", "bad", struct.pack("<2sHIH", b"II", 42, 8, 7) + entries + bytes(4)),
        _Draft(
            "claims 60000x60000 BMP",
            "bad",
            b"BM" + struct.pack("<IIIIiiHH", 99, 0, 54, 40, 60_000, 60_000, 1, 24) + bytes(24),
        ),
        _Draft("claims 60000x60000 PPM", "bad", b"P6 60000 60000 255\n"),
        _Draft(
            "claims 65535x65535 GIF",
            "bad",
            b"GIF89a" + b"\xff" * 4 + bytes(3) + b",\0\0\0\0" + b"\xff" * 4 + b"\0\2\0;",
        ),
        _Draft("claims 65500x65500 JPEG", "bad", bytes(jpeg), "NUMBER.jpg"),
        _Draft("claims 16383x16383 WEBP", "bad", b"RIFF" + struct.pack("<I", len(webp)) + webp, "NUMBER.webp"),
        _Draft("is 20000x20000 PNG", "bad", _png_file(20_000, 20_000, _chunk(b"IDAT", rows), small[1], depth=1)),
        _Draft("text of 50 MB before pixels", "either", _png_file(16, 16, text, *small)),
        _Draft("text of 50 MB behind pixels", "either", _png_file(16, 16, small[0], text, small[1])),
        _Draft("profile of 50 MB", "either", _png_file(16, 16, _chunk(b"iCCP", b"x\0\0" + much), *small)),
        _Draft("pixels of 50 MB for 16x16", "either", _png_file(16, 16, _chunk(b"IDAT", much), small[1])),
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_file(width: int, height: int, *chunks: bytes, depth: int = 8) -> bytes:
    """A grey PNG file of these sides, as far as its header knows."""
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks)


def _captions(chance: random.Random) -> Iterator[_Draft]:
    for text in (
        "<|image|> NUMBER", "<reserved08706> NUMBER", "</s> NUMBER", "<s>[INST] NUMBER", "<racm3:break>NUMBER<eoss>",
        "{NUMBER} %s %n \\x00 $(reboot)", "\u2028NUMBER\u2029\u0085", "\u202eNUMBER", "\x1b[31mNUMBER\x07", "=1+NUMBER",
        "NUMBER \U0001f9d1\u200d\U0001f680 e\u0301 \u5716", "NUMBER " + "long " * 2000,
    ):  # fmt: skip
        yield _Draft("odd caption", "good", _png(chance), fields={"text": text})
    yield _Draft("second column", "good", _png(chance), fields={"text": None, "caption": "caption NUMBER"})
    for text in ("", "   ", "\n\t\u00a0"):
        yield _Draft("blank caption", "bad", _png(chance), fields={"text": text})
    for value in (None, 5, True, ["a"], {"a": "b"}):
        yield _Draft("caption is no text", "bad", _png(chance), fields={"text": value})
    yield _Draft("no caption", "bad", _png(chance), fields={})
    yield _Draft("null in caption", "bad", _png(chance), fields={"text": "a\0b"})
    yield _Draft("lone surrogate in caption", "bad", _png(chance), fields={"text": "a \ud83d b"})
    yield _Draft("endless caption", "bad", _png(chance), fields={"text": "x" * 100_000})
    yield _Draft("odd split", "bad", _png(chance), fields={"text": "NUMBER", "split": "../../train"})
    for raw in (b"caf\xe9", b"\xff\xfe", b"\xed\xa0\x80", b"\xc0\xaf"):
        line = b'{"file_name": "NUMBER.png", "text": "' + raw + b' NUMBER"}'
        yield _Draft("caption not UTF-8", "bad", _png(chance), line=line)


def _names(chance: random.Random) -> Iterator[_Draft]:
    for kind, name in (
        ("unicode", "NUMBER-\u00fcn\u00ef \u56fe \U0001f3a8.png"),
        ("decomposed", "NUMBER-e\u0301.png"),
        ("right to left", "NUMBER-\u202e\u05d0.png"),
        ("line break", "NUMBER\n.png"),
        ("leading dash", "-rf NUMBER.png"),
        ("hidden", ".NUMBER.png"),
        ("no suffix", "NUMBER"),
        ("upper case", "NUMBER.PNG"),
        ("quotes", "NUMBER'\";{}%s.png"),
        ("backslash", "NUMBER\\x.png"),
        ("in a folder", "sub/NUMBER.png"),
        ("255 bytes", f"NUMBER{'x' * 246}.png"),
    ):
        yield _Draft(f"name {kind}", "good", _png(chance), name)
    yield _Draft("PNG as .jpg", "good", _png(chance), "NUMBER.jpg")
    yield _Draft("JPEG as .gif", "good", _encode(_picture(chance), "JPEG"), "NUMBER.gif")
    yield _Draft("missing file", "bad")
    for kind, name in (
        ("of 300 bytes", f"NUMBER{'x' * 291}.png"),
        ("of 5000 bytes", f"{'x/' * 2500}NUMBER.png"),
        ("with null", "NUMBER\0.png"),
        ("with lone surrogate", "NUMBER\ud800.png"),
        ("empty", ""),
        ("of the folder", "."),
        ("of a URL", "https://example.invalid/NUMBER.png"),
    ):
        yield _Draft(f"name {kind}", "bad", name=name)
    yield _Draft("name not UTF-8", "bad", name="NUMBER\udcff.png", place=_write_where_allowed)
    no_texts: list[Any] = [None, 7, ["NUMBER.png"], {}]
    for value in no_texts:
        yield _Draft("name is no text", "bad", fields={"file_name": value, "text": "picture NUMBER"})


def _write_where_allowed(path: Path) -> None:
    with suppress(OSError):  # some file systems keep to Unicode
        path.write_bytes(_png(random.Random(0)))


def _escapes(chance: random.Random) -> Iterator[_Draft]:
    """Names that leave the folder, and things that are no plain files."""
    for name in (
        "../../etc/passwd", "../outside.png", "sub/../../outside.png", "/etc/passwd", "/dev/zero", "/proc/self/mem",
        "out/outside.png", "~/outside.png", "..\\outside.png", "file:///etc/passwd",
    ):  # fmt: skip
        yield _Draft("leaves the folder", "bad", name=name)
    for target in ("../outside.png", "/etc/hostname", "/dev/zero", "nowhere.png", "NUMBER.png"):
        yield _Draft("link", "bad", place=partial(_link, target=target))
    yield _Draft("link inside", "good", place=partial(_link_inside, content=_png(chance)))
    yield _Draft("a folder", "bad", place=Path.mkdir)
    yield _Draft("a pipe", "bad", place=os.mkfifo)


def _link(path: Path, *, target: str) -> None:
    path.symlink_to(target.replace("NUMBER.png", path.name))


def _link_inside(path: Path, *, content: bytes) -> None:
    kept = path.with_name("sub") / f"kept-{path.name}"
    kept.write_bytes(content)
    path.symlink_to(kept)


def _lines(chance: random.Random) -> Iterator[_Draft]:
    for line in (
        b"not JSON NUMBER", b'{"file_name": "NUMBER.png", "text": "cut', b"{'file_name': 'NUMBER.png', 'text': 'x'}",
        b'{"file_name": "NUMBER.png", "text": "x"} {}', b"[" * 100_000, b'{"file_name": ' * 20_000, b"9" * 5_000,
        b"\0NUMBER", b'{"file_name": "NUMBER.png", "text": "\\ud8"}', b"NUMBER.png,a caption",
    ):  # fmt: skip
        yield _Draft("line is no JSON", "bad", line=line)
    for line in (b'["NUMBER.png", "x"]', b"5", b"null", b'"NUMBER.png"', b"NaN", b"{}", b'{"text": "NUMBER"}'):
        yield _Draft("line is no record", "bad", line=line)
    line = (
        b'{"text": "picture NUMBER", "nested": ' + b"[" * 50 + b"]" * 50 + b', "big": 1e999, "file_name": "NUMBER.png"}'
    )
    yield _Draft("line with more", "good", _png(chance), line=line)


def make_hostile_conversations(path: Path, *, count: int = 200, seed: int = 0) -> HostileFolder:
    """A new `.json` list at `path` of `count` data points in ARRA's format, and their pictures beside it."""
    chance = random.Random(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name("broken.png").write_bytes(_png(chance)[:40])
    items, points = [], []
    for number in range(1, count + 1):
        name, picture = f"c{number:05d}", f"c{number:05d}.png"
        path.with_name(picture).write_bytes(_png(chance))
        kinds = list(_points(name, picture))
        kind, expected, point = kinds[(number - 1) % len(kinds)]
        own = isinstance(point, dict) and point.get("id") == name
        items.append(HostileItem(number, kind, expected, name if own else None, path.with_name(picture)))
        points.append(point)
    path.write_text(json.dumps(points), encoding="utf-8")
    return HostileFolder(path, tuple(items))


def _points(name: str, picture: str) -> Iterator[tuple[str, Expected, Any]]:
    def point(*values: Any, image: Any = (picture,), **more: Any) -> dict[str, Any]:
        turns = [{"from": ("human", "gpt")[n % 2], "value": value} for n, value in enumerate(values)]
        return {"id": name, "conversations": turns, "image": image, **more}

    prompt = f"prompt {name}"
    sound = point(prompt, MARK)
    human, answer = sound["conversations"]
    yield "sound", "good", sound
    yield "a bare path", "good", point(prompt, MARK, image=picture)
    yield "assistant", "good", {**sound, "conversations": [human, {**answer, "from": "assistant"}]}
    yield "special tokens", "good", point(f"</s><reserved08706> {prompt}", MARK)
    for values in ((prompt, MARK * 2), (f"{MARK} {prompt}", MARK), (prompt, "no mark"), (prompt, "<|image |>")):
        yield "mark count", "bad", point(*values)
    wrong: dict[str, list[Any]] = {
        "image count": [(), (picture, picture), (picture,) * 99],
        "image is no path": [5, None, [None], {"path": picture}, [[picture]]],
        "image cannot be read": ["gone.png", "/etc/passwd", "../../etc/passwd", "", "broken.png", "\0", "x" * 300],
    }
    for kind, images in wrong.items():
        for image in images:
            yield kind, "bad", point(prompt, MARK, image=image)
    yield "no image key", "bad", {key: value for key, value in sound.items() if key != "image"}
    yield "two pictures", "bad", point(prompt, MARK * 2, image=(picture, picture))
    yield "picture in the question", "bad", point(f"{MARK} {prompt}", "an answer")
    yield "text alone", "bad", point(prompt, "an answer", image=())
    turns: list[Any] = [None, [], "x", {}, [5], [human], [answer, human], [human, human], [human, {"from": "gpt"}]]
    for conversation in turns:
        yield "turns", "bad", {**sound, "conversations": conversation}
    prompts: list[Any] = [None, 5, ["x"], "", "  ", "a\0b", "a \ud83d b"]
    for value in prompts:
        yield "prompt", "bad", point(value, MARK)
    for other in ("c00001", True, ["x"], ""):
        yield "id", "bad", {**sound, "id": other}
    wholes: list[Any] = [None, 5, "x", [], {}, [[]], {"file": "x.pkl", "len": 5}]
    for whole in wholes:
        yield "no data point", "bad", whole


def fates(made: HostileFolder, store: Store) -> tuple[set[str], set[str]]:
    """Ids of the items that have codes, and which are among the failures."""
    named = np.array(store.table(["id"]).column("id").to_pylist())[store.reader("codes").valid()]
    lines = [json.loads(line) for line in (store.path / "failures.jsonl").read_text().splitlines()]
    pairs = [*((name, "") for name in named), *((line["id"], line["where"]) for line in lines)]
    found = [made.item(*pair) for pair in pairs]
    ids = [None if item is None else item.id for item in found]
    return {each for each in ids[: len(named)] if each}, {each for each in ids[len(named) :] if each}
