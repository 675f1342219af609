"""Media files made to break a reader: mutations of whole files, lying headers and what is valid but seldom seen.

Everything follows from the seed. A case is a file with a name that says what was done to it; whole files (`good-...`) come between the
others and must come out the same whatever is around them.
"""

from __future__ import annotations

import dataclasses
import struct
import wave
import zlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import av.stream
import numpy as np

from tests.golden_set import GoldenSet
from tests.media_samples import picture, tones, write_clip, write_sound

VIDEOS = (".mp4", ".mov", ".mkv", ".webm", ".avi")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3", ".m4a")
BOXES = b"ftyp moov mvhd trak tkhd edts elst mdia mdhd hdlr minf stbl stsd avcC esds stts ctts stss stsc stsz stco mdat".split()
FLIPS = (0.0001, 0.001, 0.01, 0.05)  # shares of the bits


@dataclasses.dataclass(frozen=True)
class Case:
    """One record of the corpus; the file is in the field `video`, in `audio`, or in both."""

    id: str
    file: str
    fields: tuple[str, ...] = ("video", "audio")

    @property
    def good(self) -> bool:
        return self.id.startswith("good")


def make_corpus(folder: Path, golden: GoldenSet, seed: int, mutated: int) -> list[Case]:
    """Writes the files and returns the cases in the order of the manifest: `mutated` mutations, the odd files, and whole ones between."""
    rng = np.random.default_rng(seed)
    whole = _whole_files(folder, golden)
    bases = {case.file: (folder / case.file).read_bytes() for case in whole}
    sounds = [write_sound(folder / f"sound{suffix}", 3.0, seed=7) for suffix in SOUNDS]
    bases |= {path.name: path.read_bytes() for path in sounds}
    cases = list(_odd_files(folder)) if mutated >= 100 else []
    for number in range(mutated):
        name = list(bases)[int(rng.integers(len(bases)))]
        kind, mutate = MUTATIONS[number % len(MUTATIONS)]
        data, suffix = mutate(rng, bases[name], Path(name).suffix, bases)
        file = f"{number:03}-{kind}{suffix}"
        (folder / file).write_bytes(data)
        cases.append(Case(f"{kind}-{number:03}", file, ("audio",) if Path(name).suffix in SOUNDS else ("video", "audio")))
    rng.shuffle(cases)  # type: ignore[arg-type] - a list of any objects
    for i, case in enumerate(whole):
        cases.insert(i * len(cases) // len(whole), case)
    return cases


def _whole_files(folder: Path, golden: GoldenSet) -> list[Case]:
    cases = []
    for i, record in enumerate(golden.records):
        file = f"good-golden{i}.mp4"
        (folder / file).write_bytes(Path(str(record.video)).read_bytes())
        cases.append(Case(f"good-golden{i}", file))
    for i, suffix in enumerate(VIDEOS):
        write_clip(folder / f"good-clip{suffix}", 2.0, fps=10, seed=i)
        cases.append(Case(f"good-clip{suffix}", f"good-clip{suffix}"))
    return cases


# ------------------------------------------------------------------------------------------------------------------ mutations

Bases = dict[str, bytes]
Mutation = Callable[[np.random.Generator, bytes, str, Bases], tuple[bytes, str]]


def _cut(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    return data[: int(len(data) * rng.random() ** 0.5)], suffix


def _flip(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    at = rng.integers(len(bits), size=max(1, int(len(bits) * rng.choice(FLIPS))))
    bits[at] ^= 1
    return np.packbits(bits).tobytes(), suffix


def _flip_head(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    head = min(len(data), 256)
    return _flip(rng, data[:head], suffix, bases)[0] + data[head:], suffix


def _zeros(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    start = int(rng.integers(len(data)))
    stop = min(len(data), start + int(rng.integers(1, len(data))))
    return data[:start] + bytes(stop - start) + data[stop:], suffix


def _nothing(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    return bytes(int(rng.integers(3)) * int(rng.integers(1, 5000))), suffix


def _suffix(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    return data, str(rng.choice([".mp4", ".wav", ".mp3", ".txt", ".flac", ".avi", ".gif", ".srt", ".m3u8", ".sdp", ""]))


def _head_of_another(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    other = bases[list(bases)[int(rng.integers(len(bases)))]]
    size = int(rng.integers(16, 4000))
    return other[:size] + data[size:], suffix


def _doubled(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    at = int(rng.integers(len(data)))
    return data[:at] + data + data[at:], suffix


def _field(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    """A lying field: an absurd value over four bytes of an mp4 box or of a header."""
    boxes = [at for name in BOXES for at in [data.find(name)] if at > 0]
    start = boxes[int(rng.integers(len(boxes)))] - 4 + int(rng.integers(0, 10)) * 4 if boxes else int(rng.integers(min(len(data), 200)))
    value = rng.choice([0, 1, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFF0000, 0x00010000])
    return data[:start] + struct.pack(">I", int(value)) + data[start + 4 :], suffix


def _swapped(rng: np.random.Generator, data: bytes, suffix: str, bases: Bases) -> tuple[bytes, str]:
    """Streams that change places: the handlers, the codecs or the chunk tables of an mp4's tracks; two blocks of any other file."""
    first, second = ((b"vide", b"soun"), (b"avc1", b"mp4a"), (b"vmhd", b"smhd"), (b"stco", b"stco"))[int(rng.integers(4))]
    one, other, size = data.find(first), data.rfind(second), 4
    if first == second:  # the tables' contents
        one, other, size = one + 8, other + 8, 4
    if min(one, other) < 8 or one == other:
        size = int(rng.integers(1, max(2, len(data) // 4)))
        one, other = sorted(int(n) for n in rng.integers(0, max(1, len(data) - size), 2))
        size = min(size, other - one)
    low, high = sorted((one, other))
    return data[:low] + data[high : high + size] + data[low + size : high] + data[low : low + size] + data[high + size :], suffix


MUTATIONS: tuple[tuple[str, Mutation], ...] = (
    ("cut", _cut),
    ("flipped", _flip),
    ("head-flipped", _flip_head),
    ("field", _field),
    ("zeroed", _zeros),
    ("renamed", _suffix),
    ("field", _field),
    ("flipped", _flip),
    ("nothing", _nothing),
    ("other-head", _head_of_another),
    ("doubled", _doubled),
    ("swapped", _swapped),
)


# ------------------------------------------------------------------------------------------------------------------ odd files


def _odd_files(folder: Path) -> Iterator[Case]:
    """Valid files that are seldom seen, and headers that ask for the impossible."""
    for make in (_sizes, _lengths, _rates, _tracks, _lists_and_links):
        yield from make(folder)


def _sizes(folder: Path) -> Iterator[Case]:
    for name, width, height, codec, seconds in (
        ("8k", 7680, 4320, "mpeg4", 0.2),
        ("thin", 32, 4080, "mpeg4", 0.3),
        ("strip", 8064, 32, "mpeg4", 0.3),
        ("27px", 26, 26, "mpeg4", 0.3),
        ("2px", 2, 2, "ffv1", 0.3),
        ("1px", 1, 1, "ffv1", 0.3),
    ):
        suffix = ".mkv" if codec == "ffv1" else ".mp4"
        write_clip(folder / f"{name}{suffix}", seconds, width=width, height=height, video_codec=codec, video_options={"threads": "2"})
        yield Case(f"odd-{name}", f"{name}{suffix}")
    # 900 million pixels in a file of 110 kB, and pictures whose headers alone are there.
    side = 30_000
    rows = zlib.compress(bytes(side * (1 + side // 8)), 1)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0xF0, 0, 0) + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    bmp = b"BM" + struct.pack("<IHHIIiiHHIIiiII", 1 << 30, 0, 0, 54, 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0) + bytes(2000)
    for name, data in (("bomb.png", png), ("bomb.gif", gif + b"\x02\x02\x44\x01\x00;"), ("bomb.bmp", bmp)):
        (folder / name).write_bytes(data)
        yield Case(f"odd-{name}", name)


def _lengths(folder: Path) -> Iterator[Case]:
    write_clip(folder / "one-frame.mp4", 0.1, fps=10)
    write_clip(folder / "two-frames.webm", 0.2, fps=10)
    write_clip(folder / "no-frames.mkv", 0.0, audio_seconds=1.0)
    write_clip(folder / "short-sound.mp4", 1.0, audio_seconds=0.01)
    long = folder / "ten-hours.mkv"
    with av.open(long, "w") as container:
        video = container.add_stream("mpeg4", rate=Fraction(1, 10))
        video.width, video.height, video.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(picture(0, 32, 32), format="rgb24")
        for i in range(3600):
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    # A header that says ten hours over a clip of two seconds, everywhere mp4 keeps a length.
    data = bytearray((folder / "one-frame.mp4").read_bytes())
    for box, offset in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)):
        at = data.find(box)
        while at > 0:
            data[at + offset : at + offset + 4] = struct.pack(">I", 36_000_000)
            at = data.find(box, at + 4)
    (folder / "says-ten-hours.mp4").write_bytes(data)
    with (folder / "ten-hours.wav").open("wb") as file:  # sparse: no disk is used
        rate, samples = 8000, 36_000 * 8000
        file.write(b"RIFF" + struct.pack("<I", 36 + samples) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, rate, rate, 1, 8))
        file.write(b"data" + struct.pack("<I", samples))
        file.truncate(44 + samples)
    for name in ("one-frame.mp4", "two-frames.webm", "no-frames.mkv", "short-sound.mp4", "ten-hours.mkv", "says-ten-hours.mp4"):
        yield Case(f"odd-{name}", name)
    yield Case("odd-ten-hours.wav", "ten-hours.wav", ("audio",))


def _rates(folder: Path) -> Iterator[Case]:
    for rate in (384_000, 1000, 7):
        write_sound(folder / f"{rate}Hz.wav", 1.5, sample_rate=rate)
        yield Case(f"odd-{rate}Hz", f"{rate}Hz.wav", ("audio",))
    plain = (folder / "384000Hz.wav").read_bytes()
    for name, offset, value in (
        ("0Hz", 24, struct.pack("<I", 0)),
        ("4GHz", 24, struct.pack("<I", 0xFFFFFFFF)),
        ("0-channels", 22, struct.pack("<H", 0)),
        ("65535-channels", 22, struct.pack("<H", 65535)),
        ("0-bits", 34, struct.pack("<H", 0)),
        ("4GB-of-data", 40, struct.pack("<I", 0xFFFFFFF0)),
    ):
        (folder / f"{name}.wav").write_bytes(plain[:offset] + value + plain[offset + len(value) :])
        yield Case(f"odd-{name}", f"{name}.wav", ("audio",))
    write_clip(folder / "0Hz.mp4", 1.0)
    data = bytearray((folder / "0Hz.mp4").read_bytes())
    for box in (b"mvhd", b"mdhd"):
        at = data.find(box)
        while at > 0:
            data[at + 16 : at + 20] = bytes(4)
            at = data.find(box, at + 4)
    (folder / "0Hz.mp4").write_bytes(data)
    yield Case("odd-0Hz-mp4", "0Hz.mp4")
    with av.open(folder / "variable-rate.mkv", "w") as container:
        video = container.add_stream("libx264", rate=30, options={"preset": "ultrafast", "threads": "1"})
        video.width, video.height, video.pix_fmt, video.time_base = 96, 64, "yuv420p", Fraction(1, 1000)
        video.codec_context.time_base = Fraction(1, 1000)
        for i, time in enumerate(np.cumsum([0, 1, 1, 500, 2, 3000, 1, 1, 40, 40, 40, 10_000]).tolist()):
            frame = av.VideoFrame.from_ndarray(picture(i, 96, 64), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    yield Case("odd-variable-rate", "variable-rate.mkv")


def _tracks(folder: Path) -> Iterator[Case]:
    write_clip(folder / "turned.mp4", 0.5)
    data = bytearray((folder / "turned.mp4").read_bytes())
    upright = b"".join(value.to_bytes(4, "big", signed=True) for value in (0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000))
    at = data.index(upright, data.index(b"tkhd"))
    for name, matrix in (("turned", (0, 0x10000, 0, -0x10000, 0)), ("skewed", (0x7FFFFFFF, 1, 77, -5, 0)), ("flat", (0, 0, 0, 0, 0))):
        packed = b"".join(value.to_bytes(4, "big", signed=True) for value in (*matrix, 0, 0, 0, 0x40000000))
        (folder / f"{name}.mp4").write_bytes(data[:at] + packed + data[at + len(packed) :])
        yield Case(f"odd-{name}", f"{name}.mp4")
    for name, tracks, cover in (("many-tracks", 40, False), ("cover", 1, True)):
        with av.open(folder / f"{name}.mp4", "w") as container:
            video = container.add_stream("png" if cover else "libx264", rate=10)
            video.width, video.height, video.pix_fmt = 64, 64, "rgb24" if cover else "yuv420p"
            if cover:
                video.disposition = av.stream.Disposition.attached_pic
            sounds = [container.add_stream("aac", rate=16_000, layout="mono") for _ in range(tracks)]
            for i in range(1 if cover else 10):
                container.mux(video.encode(av.VideoFrame.from_ndarray(picture(i, 64, 64), format="rgb24")))
            container.mux(video.encode(None))
            for sound in sounds:
                block = np.ascontiguousarray(tones(1.0, 16_000, 1).T)
                piece = av.AudioFrame.from_ndarray(block, format="fltp", layout="mono")
                piece.sample_rate, piece.time_base = 16_000, Fraction(1, 16_000)
                container.mux([*sound.encode(piece), *sound.encode(None)])
        yield Case(f"odd-{name}", f"{name}.mp4")
    write_sound(folder / "sound-as-video.wav")
    yield Case("odd-sound-as-video", "sound-as-video.wav")
    write_clip(folder / "mute.mp4", 1.0, audio=False)
    yield Case("odd-mute", "mute.mp4", ("audio",))
    with av.open(folder / "sound-first.mkv", "w") as container:  # and a video longer than its sound, begun late
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        video = container.add_stream("libx264", rate=10)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        piece = av.AudioFrame.from_ndarray(np.ascontiguousarray(tones(1.0, 16_000, 1).T), format="fltp", layout="mono")
        piece.sample_rate, piece.time_base = 16_000, Fraction(1, 16_000)
        container.mux([*sound.encode(piece), *sound.encode(None)])
        for i in range(10):
            frame = av.VideoFrame.from_ndarray(picture(i, 64, 64), format="rgb24")
            frame.pts, frame.time_base = 50 + 3 * i, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    yield Case("odd-sound-first", "sound-first.mkv")


def _lists_and_links(folder: Path) -> Iterator[Case]:
    """Formats by which FFmpeg opens other files or the network, and things that are no files."""
    secret = folder / "secret.mp4"
    write_clip(secret, 0.5)
    texts = {
        "list.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile://{secret}\n#EXT-X-ENDLIST\n",
        "net.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        "list.ffconcat": "ffconcat version 1.0\nfile 'secret.mp4'\n",
        "list.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 96\na=rtpmap:96 L16/16000\n",
        "list.mpd": f"<?xml version='1.0'?><MPD><Period><BaseURL>file://{secret}</BaseURL></Period></MPD>",
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nconcat:{secret}|{secret}\n#EXT-X-ENDLIST\n",
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        yield Case(f"odd-{name}", name)
    (folder / "loop.mp4").symlink_to("loop.mp4")
    (folder / "device.mp4").symlink_to("/dev/zero")
    (folder / "folder.mp4").mkdir()
    with wave.open(str(folder / "empty.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    for name in ("loop.mp4", "device.mp4", "folder.mp4", "gone.mp4"):
        yield Case(f"odd-{name}", name)
    yield Case("odd-empty-wav", "empty.wav", ("audio",))
