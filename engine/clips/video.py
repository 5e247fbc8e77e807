"""Frames of video files, exact or not at all: damage that can be noticed is a ClipError, never a guessed picture.

Reads mp4/mov, mkv/webm and avi, which state their own length, so that a file cut short can be told from a short one.
(Not so: a fragmented mp4 cut between two fragments, an mkv written live without sizes.) Bytes that were changed
without breaking the codec's syntax cannot be noticed. Sample aspect ratio, interlacing and HDR transfer are left as
they are stored; rotation is applied.
"""

from bisect import bisect_left
from collections.abc import Container, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from spatialprobe.engine.types import ClipError

CONTAINERS = "mov,matroska,avi"
# Only local files of those containers: a playlist named x.mp4 must not make FFmpeg open other files or addresses.
OPEN_OPTIONS = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
CODEC_OPTIONS = {
    "err_detect": "explode",  # without it FFmpeg invents the blocks that it could not decode
    "max_pixels": str(2**27),  # 16384 x 8192; a damaged header may ask for anything
}
# swscale's default path makes 4:2:0 pictures darker by 1 to 3 of 255, depending on the CPU; with these it rounds.
EXACT_RGB = Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
# Where a packet is a frame, by specification and in practice. Elsewhere frames are counted by decoding.
PACKET_IS_FRAME = {
    "mov,mp4,m4a,3gp,3g2,mj2": {"h264", "hevc", "av1", "vp9", "mjpeg", "png", "prores", "ffv1", "rawvideo"},
    "matroska,webm": {"h264", "hevc", "av1", "vp9", "mjpeg", "png", "prores", "ffv1", "rawvideo"},
}


@dataclass(frozen=True)
class Packets:
    """What the packets of a file say of its frames, read without decoding any."""

    pts: list[int]  # of every packet, in file order
    keys: list[int]  # ascending places in `pts` from which decoding can start
    shown: list[int]  # pts of the frames, ascending: frame n has shown[n]


def frames_from_start(
    path: Path, wanted: range, only: Container[int] | None = None
) -> tuple[dict[int, np.ndarray], int]:
    """The wanted frames, uint8 [H, W, 3], by decoding from the first; and how many frames were seen.

    With `only`, frames outside of it are decoded but not turned into images.

    Stops after the last wanted frame; fewer than that were seen only if the file ends there.
    """
    images, seen, reformatter = {}, 0, VideoReformatter()
    with closing(_frames(path)) as frames:
        for seen, frame in enumerate(frames, 1):
            if seen - 1 in wanted and (only is None or seen - 1 in only):
                images[seen - 1] = _upright_rgb(path, frame, reformatter)
            if seen > wanted[-1]:
                break
    return images, seen


def frames_from_keyframe(
    path: Path, packets: Packets, wanted: range, only: Container[int] | None = None
) -> dict[int, np.ndarray] | None:
    """The same frames, by decoding from the last keyframe before them; None if that does not give what it should."""
    first = packets.shown[wanted[0]]
    keyframe = max(key for key in packets.keys if packets.pts[key] <= first)
    start = bisect_left(packets.shown, packets.pts[keyframe])
    images, reformatter = {}, VideoReformatter()
    try:
        with closing(_frames(path, keyframe)) as frames:
            for number, frame in enumerate(frames, start):
                if frame.pts != packets.shown[number]:
                    return None
                if number in wanted and (only is None or number in only):
                    images[number] = _upright_rgb(path, frame, reformatter)
                if number == wanted[-1]:
                    return images
    except ClipError:  # some encoders mark frames as keyframes that need earlier ones
        return None
    return None


def count_frames(path: Path) -> int:
    """How many frames the whole file decodes to."""
    with closing(_frames(path)) as frames:
        return sum(1 for _ in frames)


def read_packets(path: Path) -> Packets | None:
    """Timestamps and keyframes of the whole file; None where packets do not tell what the frames are."""
    pts, keys, shown = [], [], []
    with _open(path) as (container, stream):
        if stream.codec_context.codec.canonical_name not in PACKET_IS_FRAME.get(container.format.name, ()):
            return None
        for packet in _packets(path, container, stream):
            if packet.is_keyframe:
                keys.append(len(pts))
            if not packet.is_discard:  # cut off by an edit list, decoded but not shown
                shown.append(packet.pts)
            pts.append(packet.pts)
        _check_whole(path, container, stream)
    if not shown or None in pts or len(set(pts)) < len(pts) or keys[:1] != [0] or pts[0] > min(pts):
        return None
    return Packets(pts, keys, sorted(shown))


@contextmanager
def _open(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The file and its first video stream that is not cover art. FFmpeg's errors inside the block become ClipError."""
    with (
        _ffmpeg_errors(path),
        av.open(f"file:{path}", container_options=OPEN_OPTIONS, metadata_errors="replace") as container,
    ):
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise ClipError(f"{path}: has no video stream")
        if streams[0].codec_context is None:
            raise ClipError(f"{path}: no decoder for its video stream")
        streams[0].codec_context.options = CODEC_OPTIONS
        # Clips are decoded side by side by the loader's threads: more threads in here only take turns with those.
        streams[0].codec_context.thread_count = 1
        yield container, streams[0]


@contextmanager
def _ffmpeg_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except av.error.ArgumentError as error:  # what the whitelist of containers answers
        raise ClipError(f"{path}: not a video in one of the containers {CONTAINERS}: {error.strerror}") from error
    except av.error.FFmpegError as error:
        raise ClipError(f"{path}: video cannot be read: {error.strerror}") from error


def _packets(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise ClipError(f"{path}: video is damaged or cut short")
        if packet.size:  # an empty one marks the end, or in avi a frame that was dropped
            yield packet


def _frames(path: Path, keyframe: int = 0) -> Iterator[av.VideoFrame]:
    """Frames in the order they are shown, from the packet `keyframe` on. Comes to an end only for a whole file."""
    with _open(path) as (container, stream):
        packets = _packets(path, container, stream)
        if keyframe:
            first = next(islice(packets, keyframe, None))
            # Packets after a keyframe that are shown before it lean on frames that were skipped.
            packets = chain([first], (packet for packet in packets if packet.pts >= first.pts))
        for packet in packets:
            yield from _sound(path, stream.decode(packet))
        _check_whole(path, container, stream)  # before the decoder hands out its last frames as if nothing came after
        yield from _sound(path, stream.decode(None))


def _sound(path: Path, frames: list[av.VideoFrame]) -> list[av.VideoFrame]:
    if any(frame.is_corrupt for frame in frames):
        raise ClipError(f"{path}: video is damaged or cut short")
    return frames


def _upright_rgb(path: Path, frame: av.VideoFrame, reformatter: VideoReformatter) -> np.ndarray:
    """uint8 [H, W, 3], turned and mirrored as the file says it is to be shown."""
    with _ffmpeg_errors(path):
        rgb = reformatter.reformat(frame, format="rgb24", interpolation=EXACT_RGB, threads=1).to_ndarray()
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return rgb
    # Fixed point, row vectors: pixel (x, y) is shown at (ax + cy, bx + dy) (ISO/IEC 14496-12, 6.2.2).
    exact = np.frombuffer(matrix, np.int32)[[0, 1, 3, 4]] / 2**16
    a, b, c, d = turn = np.rint(exact).astype(int)
    if np.abs(exact - turn).max() > 0.01 or abs(a) != abs(d) or abs(b) != abs(c) or abs(a) + abs(b) != 1:
        raise ClipError(f"{path}: only right-angle rotations can be applied, the file asks for {exact.tolist()}")
    rgb = rgb.transpose(1, 0, 2) if b else rgb
    return rgb[:: b + d, :: a + c]


def _check_whole(path: Path, container: InputContainer, stream: VideoStream) -> None:
    """Raises ClipError if the file is shorter than its own headers say."""
    size = container.size
    promised = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    promised = max(promised, _CONTAINER_LENGTH[container.format.name](path))
    if promised > size:
        raise ClipError(f"{path}: video is cut short, {size} bytes of at least {promised}")


def _boxes_length(path: Path) -> int:
    """Where the last box with frames or their places should end in an mp4 or mov (ISO/IEC 14496-12, 4.2)."""
    at = promised = 0
    with path.open("rb") as file:
        while header := file.read(16):
            if len(header) < 8:
                return at + 8
            length, kind = int.from_bytes(header[:4]), header[4:8]
            if length == 1:
                length = int.from_bytes(header[8:])
            if length < 8:  # 0: this box goes on to the end of the file; else not a box
                break
            at += length
            promised = at if kind in (b"moov", b"moof", b"mdat") else promised
            file.seek(at)
    return promised


def _segment_length(path: Path) -> int:
    """Where the segment of an mkv or webm should end, 0 if it does not say (RFC 8794, 4 and 6.2; RFC 9559, 4.5)."""
    with path.open("rb") as file:
        head = file.read(4096)
    header_size, width = _vint(head, 4)  # of the EBML header, which comes first
    at = 4 + width + header_size
    segment_size, width = _vint(head, at + 4)
    if head[at : at + 4] != b"\x18\x53\x80\x67" or segment_size == 2 ** (7 * width) - 1:  # all ones: written live
        return 0
    return at + 4 + width + segment_size


def _vint(head: bytes, at: int) -> tuple[int, int]:
    """The variable-length number at `at`, and its width in bytes."""
    width = 9 - int.from_bytes(head[at : at + 1]).bit_length()
    return int.from_bytes(head[at : at + width]) & (2 ** (7 * width) - 1), width


def _riff_length(path: Path) -> int:
    """Where the last RIFF chunk of an avi should end; files over 1 GB have several."""
    end = 0
    with path.open("rb") as file:
        while (header := file.read(8))[:4] == b"RIFF":
            end += 8 + int.from_bytes(header[4:], "little")
            file.seek(end)
    return end


_CONTAINER_LENGTH = {
    "mov,mp4,m4a,3gp,3g2,mj2": _boxes_length,
    "matroska,webm": _segment_length,
    "avi": _riff_length,
}
