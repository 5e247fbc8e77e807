"""Decoded frames against the pixels that were encoded, and broken files, which must never pass for whole ones."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from spatialprobe.engine.clips import decode, video
from spatialprobe.engine.clips.decode import load_clip, select_frames
from spatialprobe.engine.types import Clip, ClipError, ClipRef, FrameSelection, ShortClip

FASTSTART = {name: {"movflags": "faststart"} for name in ("x.mp4", "x.mov")}  # the index before the pictures
LOSSLESS = {"codec": "libx264rgb", "options": {"qp": "0", "preset": "ultrafast"}, "pix_fmt": "rgb24"}


def pictures(count, height=24, width=32, seed=0):  # uint8 [count, height, width, 3]
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def moving(count, height=48, width=64):
    """Smooth pictures in motion, so that encoders predict from frame to frame."""
    y, x, t = np.mgrid[:height, :width, :count]
    waves = [np.sin(0.2 * x + 0.3 * t), np.sin(0.15 * y - 0.2 * t), np.sin(0.1 * (x + y) + 0.5 * t)]
    return (127.5 + 120 * np.stack(waves, -1)).astype(np.uint8).transpose(2, 0, 1, 3)


def write_video(path, frames, codec, options=None, pix_fmt="yuv420p", rotation=None, **container_options):
    with av.open(str(path), "w", options=container_options) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        if rotation:
            stream.set_display_rotation(*rotation)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), "rgb24")))
        container.mux(stream.encode(None))
    return path


def load(path, *selection, start_idx=None, frames=(), **kwargs):
    return load_clip(
        ClipRef("a/b", str(path), tuple(map(str, frames)), start_idx), FrameSelection(*selection, **kwargs)
    )


def load_or_error(ref, selection=FrameSelection()):  # noqa: B008 (frozen)
    try:
        return load_clip(ref, selection)
    except ClipError as error:
        return error


def hwc(clip):
    return clip.frames.permute(0, 2, 3, 1).numpy()


def same(clip, frames):
    return np.array_equal(hwc(clip), frames)


# Which frames


@pytest.mark.parametrize(
    ("total", "selection", "start_idx", "index", "padded"),
    [
        (5, FrameSelection(), None, [0, 1, 2, 3, 4], 0),
        (5, FrameSelection(stride=2), None, [0, 2, 4], 0),
        (5, FrameSelection(start=3), None, [3, 4], 0),
        (5, FrameSelection(start="center", stride=3), None, [0, 3], 0),
        (5, FrameSelection(3), None, [0, 1, 2], 0),
        (5, FrameSelection(3, "center"), None, [1, 2, 3], 0),
        (6, FrameSelection(3, "center"), None, [1, 2, 3], 0),
        (9, FrameSelection(3, "center", 3), None, [1, 4, 7], 0),
        (9, FrameSelection(3, "start_idx"), 6, [6, 7, 8], 0),
        (9, FrameSelection(3, "start_idx", 2), 6, [6, 8, 8], 1),
        (9, FrameSelection(3, 8), None, [8, 8, 8], 2),
        (2, FrameSelection(4, "center"), None, [0, 1, 1, 1], 2),
        (10, FrameSelection(4, stride=4), None, [0, 4, 8, 8], 1),
        (1, FrameSelection(1), None, [0], 0),
    ],
)
def test_select_frames(total, selection, start_idx, index, padded):
    got, got_padded = select_frames(total, selection, start_idx, "a")
    assert got.dtype == torch.int64
    assert (got.tolist(), got_padded) == (index, padded)


@pytest.mark.parametrize(
    ("total", "selection", "start_idx", "message"),
    [
        (0, FrameSelection(3), None, "clip a: has no frames"),
        (5, FrameSelection(3, 5), None, "clip a: window starts at frame 5 of 5"),
        (5, FrameSelection(3, "start_idx"), 7, "window starts at frame 7 of 5"),
        (5, FrameSelection(3, "start_idx"), None, "starts at start_idx, which the source does not give"),
        (5, FrameSelection(3, "start_idx"), -1, "start_idx must be a frame number"),
    ],
)
def test_select_frames_errors(total, selection, start_idx, message):
    with pytest.raises(ClipError, match=message):
        select_frames(total, selection, start_idx, "a")


@pytest.mark.parametrize("short", ["error", "skip"])
def test_select_frames_short(short):
    with pytest.raises(ShortClip, match="wanted 3 frames from frame 2 at stride 2, got 2 of 5 in the source"):
        select_frames(5, FrameSelection(3, 2, 2, short=short), None, "a")
    assert select_frames(5, FrameSelection(3, 0, 2, short=short), None, "a")[0].tolist() == [0, 2, 4]


# Videos


@pytest.mark.parametrize(
    ("name", "encoding"),
    [
        ("x.mp4", LOSSLESS),
        ("x.mov", {"codec": "png", "pix_fmt": "rgb24"}),
        ("x.mkv", {"codec": "ffv1", "pix_fmt": "bgr0"}),
        ("x.avi", {"codec": "rawvideo", "pix_fmt": "bgr24"}),
        ("a:%03d #?.mkv", LOSSLESS),  # a plain file to us, a protocol and a pattern to FFmpeg
    ],
)
@pytest.mark.parametrize("size", [(24, 32), (17, 31)])
def test_video_pixels(tmp_path, name, encoding, size):
    frames = pictures(12, *size)
    path = write_video(tmp_path / name, frames, **encoding)
    for selection in [(), (5,), (5, "center"), (3, 4, 2), (20,), (4, "start_idx", 3), (None, 7, 2)]:
        clip = load(path, *selection, start_idx=6)
        index, padded = select_frames(12, FrameSelection(*selection), 6, "a/b")
        assert clip.index.tolist() == index.tolist()
        assert (clip.id, clip.padded) == ("a/b", padded)
        assert same(clip, frames[index])


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("x.mp4", "libx264", {"g": "10", "bf": "3"}),
        ("x.mkv", "libx264", {"x264-params": "open-gop=1:keyint=15:bframes=3:scenecut=0"}),
        ("x.mp4", "libx264", {"x264-params": "intra-refresh=1:keyint=15:bframes=0:scenecut=0"}),
        ("x.mp4", "libx265", {"x265-params": "keyint=15:open-gop=1:log-level=none"}),
        ("x.webm", "libvpx-vp9", {"g": "15", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"}),
        ("x.webm", "libvpx", {"g": "15", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10", "b": "100k"}),
        ("x.avi", "mpeg4", {"g": "10", "b": "2M"}),
    ],
)
def test_late_windows_are_exact(tmp_path, monkeypatch, name, codec, options):
    """Starting from a keyframe gives the frames that decoding from the beginning gives."""
    path = write_video(tmp_path / name, moving(40), codec, options)
    every = load(path)
    assert len(every.frames) == 40
    assert np.abs(hwc(every).astype(int) - moving(40)).mean() < 8  # lossy, but these pictures in this order
    monkeypatch.setattr(decode, "LOOK_FOR_KEYFRAME", 1)
    for start in (1, 13, 15, 16, 29, 37):
        clip = load(path, 3, start, 2)
        assert same(clip, hwc(every)[clip.index])
    clip = load(path, 5, "center", 2)
    assert clip.index.tolist() == [15, 17, 19, 21, 23]
    assert same(clip, hwc(every)[clip.index])


def test_decodes_no_more_than_needed(tmp_path, monkeypatch):
    path = write_video(tmp_path / "x.mp4", moving(60), "libx264", {"g": "10", "bf": "0", "preset": "ultrafast"})
    decoded, sound = [], video._sound
    monkeypatch.setattr(video, "_sound", lambda path, frames: decoded.extend(frames) or sound(path, frames))
    monkeypatch.setattr(decode, "LOOK_FOR_KEYFRAME", 20)
    for selection, most in [((5,), 5), ((5, 12), 17), ((5, 42), 7), ((5, "center"), 12)]:
        decoded.clear()
        load(path, *selection)
        assert len(decoded) <= most


@pytest.mark.parametrize("trusted", [False, True])
def test_packets_that_are_not_frames(tmp_path, monkeypatch, trusted):
    """The centre is the middle of the frames, also where the file has packets that show none."""
    if trusted:  # and where packets were believed to be frames
        monkeypatch.setitem(video.PACKET_IS_FRAME, "avi", {"mpeg4"})
    whole, path = write_video(tmp_path / "whole.avi", moving(40), "mpeg4"), tmp_path / "x.avi"
    nothing = bytes.fromhex("000001b650cf")  # MPEG-4 for a picture that is "not coded"
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        packets = [packet for packet in source.demux(video=0) if packet.size]
        for number in (3, 4, 5, 6, 22):
            packet = av.Packet(nothing)
            packet.time_base = packets[0].time_base
            packets.insert(number, packet)
        for number, packet in enumerate(packets):
            packet.pts = packet.dts = round(number / 25 / packet.time_base)
            packet.stream = stream
            target.mux(packet)
    with av.open(str(path)) as container:
        assert sum(packet.size > 0 for packet in container.demux(video=0)) == 45
    clip = load(path, 6, "center")
    assert clip.index.tolist() == list(range(17, 23))
    assert same(clip, hwc(load(whole))[17:23])


def test_edit_list(tmp_path):
    """Frames that an edit list cuts off are not counted, wherever decoding starts."""
    whole = write_video(tmp_path / "whole.mp4", moving(40), "libx264", {"g": "10", "bf": "2"})
    path = tmp_path / "cut.mp4"
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - 13 * 512, packet.dts - 13 * 512, stream
                target.mux(packet)
    every = load(path)
    assert same(every, hwc(load(whole))[13:])
    assert load(path, 3, "center").index.tolist() == [12, 13, 14]
    assert same(load(path, 3, "center"), hwc(every)[12:15])


@pytest.mark.parametrize("full_range", [False, True])
@pytest.mark.parametrize(("space", "red", "blue"), [(1, 0.2126, 0.0722), (6, 0.299, 0.114), (9, 0.2627, 0.0593)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv444p", "yuv420p10le"])
def test_video_colours(tmp_path, full_range, space, red, blue, pix_fmt):
    """RGB of plain YUV pictures follows the formula of the tagged matrix (ITU-T H.273) to the nearest integer."""
    rng = np.random.default_rng(space)
    yuv = rng.integers(90, 165, (8, 3))
    scale, dtype = (4, np.uint16) if pix_fmt.endswith("10le") else (1, np.uint8)
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 46, 34, pix_fmt
        stream.codec_context.colorspace, stream.codec_context.color_range = space, 1 + full_range
        for sample in yuv:
            frame = av.VideoFrame(46, 34, pix_fmt)
            frame.colorspace, frame.color_range = space, 1 + full_range
            for plane, value in zip(frame.planes, sample, strict=True):
                plane.update(np.full(plane.buffer_size // dtype().itemsize, value * scale, dtype).tobytes())
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    low, luma, chroma = (0, 255, 255) if full_range else (16, 219, 224)
    y, u, v = (yuv[:, 0] - low) / luma, (yuv[:, 1] - 128) / chroma, (yuv[:, 2] - 128) / chroma
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    g = (y - red * r - blue * b) / (1 - red - blue)
    wanted = np.clip(255 * np.stack([r, g, b], -1), 0, 255)[:, None, None]
    assert np.abs(hwc(load(path)) - wanted).max() < 0.6


def test_video_is_turned_upright(tmp_path):
    frames = pictures(2)
    for degrees, turn in [(90, 1), (180, 2), (-90, 3)]:  # counterclockwise, like np.rot90
        path = write_video(tmp_path / "x.mp4", frames, rotation=(degrees,), **LOSSLESS)
        assert same(load(path), np.rot90(frames, turn, (1, 2)))
    path = write_video(tmp_path / "x.mp4", frames, rotation=(90, True), **LOSSLESS)
    assert same(load(path), np.rot90(frames, 1, (1, 2))[:, :, ::-1])
    path = write_video(tmp_path / "x.mp4", frames, rotation=(30,), **LOSSLESS)
    with pytest.raises(ClipError, match="only right-angle rotations"):
        load(path)


def test_same_bytes_in_any_thread(tmp_path):
    paths = [
        write_video(tmp_path / "x.mp4", moving(20, 96, 128), "libx264", {"bf": "3"}),
        write_video(tmp_path / "y.webm", moving(20, 96, 128), "libvpx-vp9", {"cpu-used": "8"}),
    ]
    alone = [load(path, 9, "center").frames for path in paths]
    start = threading.Barrier(8)

    def work(number):
        start.wait()
        return [load(path, 9, "center").frames for path in paths]

    with ThreadPoolExecutor(8) as pool:
        for frames in pool.map(work, range(8)):
            assert all(torch.equal(*pair) for pair in zip(frames, alone, strict=True))


# Broken videos


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("x.mp4", "libx264", {"g": "8", "bf": "2"}),
        ("x.mov", "mjpeg", {}),
        ("x.mkv", "libx264", {"g": "8", "bf": "2"}),
        ("x.webm", "libvpx-vp9", {"cpu-used": "8"}),
        ("x.avi", "mpeg4", {"g": "8"}),
    ],
)
def test_cut_videos_never_pass_as_whole(tmp_path, name, codec, options):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = write_video(tmp_path / name, moving(24), codec, options, pix_fmt, **FASTSTART.get(name, {}))
    every = hwc(load(path))
    content = path.read_bytes()
    cuts = {*range(0, len(content), 1 + len(content) // 60), len(content) - 1}
    with av.open(str(path)) as container:  # the border between two packets is where a cut is hardest to see
        cuts |= {packet.pos for packet in container.demux(video=0) if packet.pos}
    early = 0
    for cut in sorted(cuts):
        broken = tmp_path / f"cut{path.suffix}"
        broken.write_bytes(content[:cut])
        for selection in [(), (40,), (5, "center")]:
            with pytest.raises(ClipError, match="cut"):
                load(broken, *selection)
        clip = load_or_error(ClipRef("a", str(broken)), FrameSelection(6, 2))
        if isinstance(clip, Clip):
            assert clip.padded == 0
            assert same(clip, every[2:8])
            early += 1
    assert early > 5


def test_cut_fragments(tmp_path):
    """All cuts but those exactly between two fragments, where nothing says that more should come."""
    flags = "frag_keyframe+empty_moov"
    path = write_video(tmp_path / "x.mp4", moving(24), "libx264", {"g": "8"}, movflags=flags)
    content = path.read_bytes()
    borders, at = [], 0
    while at < len(content):
        borders.append(at)
        at += int.from_bytes(content[at : at + 4])
    for cut in {*range(1, len(content), 41), *(b + 1 for b in borders), *(b - 1 for b in borders[1:])} - {*borders}:
        path.write_bytes(content[:cut])
        if cut < borders[-1]:  # the last box only helps to seek
            with pytest.raises(ClipError):
                load(path)


def test_damaged_pictures_are_not_made_up(tmp_path):
    path = write_video(tmp_path / "x.mp4", moving(24, 96, 128), "libx264", {"bf": "0"}, movflags="faststart")
    every = hwc(load(path))
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][9]
    content[packet.pos + 8 : packet.pos + packet.size] = bytes(packet.size - 8)
    path.write_bytes(content)
    assert same(load(path, 9), every[:9])
    with pytest.raises(ClipError, match=r"x\.mp4: video"):
        load(path, 10)


@pytest.mark.parametrize(
    ("name", "content"), [("empty.mp4", b""), ("text.mkv", b"not a video\n" * 99), ("n.avi", None)]
)
def test_not_a_video(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClipError, match=f"{name}: (video cannot be read|not a video)") as error:
        load(path)
    assert "\n" not in str(error.value)


def test_container_without_a_length(tmp_path):
    path = write_video(tmp_path / "x.ts", moving(5), "libx264")
    with pytest.raises(ClipError, match=r"x\.ts: not a video in one of the containers mov,matroska,avi"):
        load(path)


def test_no_video_stream(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ClipError, match="has no video stream"):
        load(path)


def test_a_playlist_opens_nothing_else(tmp_path):
    target = write_video(tmp_path / "x.mp4", moving(5), "libx264")
    for name, text in [("a.mp4", f"ffconcat version 1.0\nfile {target.name}\n"), ("b.mp4", f"#EXTM3U\n{target}\n")]:
        (tmp_path / name).write_text(text)
        with pytest.raises(ClipError):
            load(tmp_path / name)


# Images


def write_images(folder, frames, suffix=".png"):
    folder.mkdir(exist_ok=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"frame_{number}{suffix}")
    return folder


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_image_folder(tmp_path, suffix):
    frames = pictures(12, 17, 31)
    folder = write_images(tmp_path / "x", frames, suffix)
    for selection in [(), (5,), (5, "center"), (3, 4, 2), (20,), (4, "start_idx", 3)]:
        clip = load(folder, *selection, start_idx=6)
        index, padded = select_frames(12, FrameSelection(*selection), 6, "a/b")
        assert (clip.index.tolist(), clip.padded) == (index.tolist(), padded)
        assert same(clip, frames[index])


def test_listed_images(tmp_path):
    frames = pictures(4)
    folder = write_images(tmp_path / "x", frames)
    clip = load(tmp_path, frames=[folder / f"frame_{number}.png" for number in (3, 0, 0, 2)])
    assert same(clip, frames[[3, 0, 0, 2]])


def test_image_modes(tmp_path):
    """What each kind of image becomes: see load_clip."""
    frame = pictures(1)[0]
    grey = frame[..., 0]
    alpha = np.dstack([frame, grey])
    deep = grey.astype(np.uint16) << 8 | 77
    cmyk = Image.fromarray(alpha, "CMYK")
    for image, wanted in [
        (Image.fromarray(grey), np.dstack([grey] * 3)),
        (Image.fromarray(alpha), frame),
        (Image.fromarray(deep), np.dstack([grey] * 3)),
        (Image.fromarray(np.dstack([grey, grey]), "LA"), np.dstack([grey] * 3)),
        (Image.fromarray(grey > 99), np.dstack([np.where(grey > 99, 255, 0)] * 3)),
        (Image.fromarray(grey // 64 * 64).quantize(8), np.dstack([grey // 64 * 64] * 3)),
    ]:
        image.save(tmp_path / "x.png")
        assert same(load(tmp_path, frames=[tmp_path / "x.png"]), wanted[None]), image.mode
    smooth = moving(2)[1]
    cmyk = Image.fromarray(np.dstack([255 - smooth, np.zeros_like(smooth[..., 0])]), "CMYK")
    cmyk.save(tmp_path / "x.jpg", quality=100, subsampling=0)
    assert np.abs(hwc(load(tmp_path, frames=[tmp_path / "x.jpg"]))[0].astype(int) - smooth).max() <= 4


def test_sixteen_bit_colour(tmp_path):
    frames = pictures(2).astype(np.uint16) << 8 | 77
    path = tmp_path / "x.png"
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = 24, 32, "rgb48be"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frames[0], "rgb48le").reformat(format="rgb48be")))
        container.mux(stream.encode(None))
    assert same(load(tmp_path, frames=[path]), frames[:1] >> 8)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(tmp_path, orientation):
    frame = pictures(1)[0]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(frame).save(tmp_path / "x.png", exif=exif)
    turns = {3: (2, False), 6: (3, False), 8: (1, False), 2: (0, True), 4: (2, True), 5: (3, True), 7: (1, True)}
    turn, mirror = turns.get(orientation, (0, False))  # counterclockwise quarters, then left to right
    wanted = np.rot90(frame, turn)
    assert same(load(tmp_path, frames=[tmp_path / "x.png"]), (wanted[:, ::-1] if mirror else wanted)[None])


def test_image_sizes_differ(tmp_path):
    folder = write_images(tmp_path / "x", pictures(2))
    Image.fromarray(pictures(1, 20, 32)[0]).save(folder / "frame_2.png")
    with pytest.raises(ClipError, match=r"frame_2\.png is 32x20, but .*frame_0\.png is 32x24"):
        load(folder)
    assert same(load(folder, 2), pictures(2))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp"])
def test_truncated_image(tmp_path, name):
    path = tmp_path / name
    Image.fromarray(moving(1)[0]).save(path)
    whole = hwc(load(tmp_path, frames=[path]))
    content = path.read_bytes()
    for cut in range(0, len(content), 1 + len(content) // 40):
        path.write_bytes(content[:cut])
        clip = load_or_error(ClipRef("a", str(tmp_path), (str(path),)))
        if isinstance(clip, Clip):
            assert same(clip, whole)  # what is gone was not part of the picture
            assert cut > 0.9 * len(content)
        else:
            assert f"{name}: image cannot be read" in str(clip)


def test_truncated_images_setting(tmp_path, monkeypatch):
    folder = write_images(tmp_path / "x", pictures(1))
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(RuntimeError, match="half an image would pass"):
        load(folder)


def test_other_images(tmp_path):
    first, second = (Image.fromarray(frame) for frame in pictures(2))
    first.save(tmp_path / "moves.png", save_all=True, append_images=[second])
    with pytest.raises(ClipError, match="is an animation of 2 images"):
        load(tmp_path, frames=[tmp_path / "moves.png"])
    first.save(tmp_path / "tiff.png", format="tiff")
    with pytest.raises(ClipError, match=r"tiff\.png: image cannot be read"):
        load(tmp_path, frames=[tmp_path / "tiff.png"])
    first.save(tmp_path / "x.jpg")
    with pytest.raises(ClipError, match=r"holds \.jpg and \.png images"):
        load(tmp_path)


# Anything else


def test_vanished_files(tmp_path):
    folder = write_images(tmp_path / "x", pictures(2))
    files = sorted(folder.iterdir())
    files[1].unlink()
    with pytest.raises(ClipError, match=r"frame_1\.png: image cannot be read: .*No such file"):
        load(folder, frames=files)
    files[0].unlink()
    with pytest.raises(ClipError, match="has no frames"):
        load(folder)
    folder.rmdir()
    with pytest.raises(ClipError, match="x: video cannot be read: No such file or directory"):
        load(folder)
    folder.symlink_to(folder)
    with pytest.raises(ClipError, match="x: video cannot be read: Too many levels"):
        load(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_files(tmp_path):
    folder = write_images(tmp_path / "x", pictures(1))
    path = write_video(tmp_path / "x.mp4", moving(3), "libx264")
    for locked, source in [(path, path), (folder / "frame_0.png", folder), (folder, folder)]:
        locked.chmod(0)
        try:
            with pytest.raises(ClipError, match="Permission denied"):
                load(source)
        finally:
            locked.chmod(0o700)


def damage(content, rng):
    content = bytearray(content)
    if rng.random() < 0.3:
        return content[: rng.integers(len(content))]
    for _ in range(rng.integers(1, 4)):
        content[rng.integers(rng.choice([min(800, len(content)), len(content)]))] = rng.integers(256)
    return content


@pytest.mark.parametrize("name", ["x.mp4", "x.mkv", "x.avi", "x.png", "x.jpg", "x.webp"])
def test_fuzz(tmp_path, monkeypatch, name):
    """Whatever is in the file: a Clip, or a ClipError of one line."""
    monkeypatch.setattr(decode, "LOOK_FOR_KEYFRAME", 3)
    codecs = {"x.mp4": "libx264", "x.mkv": "ffv1", "x.avi": "mpeg4"}
    path = tmp_path / name
    exif = Image.Exif()
    exif[0x0112] = 6
    if name in codecs:
        write_video(path, moving(8, 32, 32), codecs[name], {"g": "4"}, **FASTSTART.get(name, {}))
    else:
        Image.fromarray(moving(1)[0]).save(path, exif=exif)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    selections = [FrameSelection(3), FrameSelection(3, "center"), FrameSelection(3, 4), FrameSelection()]
    failed = 0
    for number in range(120):
        path.write_bytes(damage(content, rng))
        ref = ClipRef("a", str(path)) if name in codecs else ClipRef("a", str(tmp_path), (str(path),))
        with warnings.catch_warnings(action="ignore"):  # Pillow's, of odd EXIF data
            clip = load_or_error(ref, selections[number % 4])
        if isinstance(clip, Clip):
            assert len(clip.frames) == len(clip.index)
        else:
            assert str(path) in str(clip) or "clip a:" in str(clip)
            assert len(str(clip).splitlines()) == 1
            failed += 1
    assert failed > 20


def test_decoding_writes_nothing(tmp_path):
    folder = write_images(tmp_path / "x", pictures(2))
    path = write_video(tmp_path / "x.mp4", moving(3), "libx264")
    before = sorted(tmp_path.rglob("*")), path.read_bytes()
    load(folder)
    load(path, 2, "center")
    assert (sorted(tmp_path.rglob("*")), path.read_bytes()) == before


@pytest.mark.parametrize("start", [0, 300])
@pytest.mark.parametrize("shown", [(0, 4), (3,), (0, 7, 9)])
def test_shown_frames_of_a_video_are_those_of_the_whole_window(tmp_path, start, shown):
    """Also past its end, where they repeat the last frame, and behind the first keyframes."""
    path = tmp_path / "clip.mkv"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10, width=16, height=16, pix_fmt="bgr0")
        for _ in range(start + 8):
            image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24").reformat(format="bgr0")))
        container.mux(stream.encode())
    ref, selection = ClipRef("a", str(path)), FrameSelection(window=10, start=start)
    whole, some = load_clip(ref, selection), load_clip(ref, selection, shown)
    assert torch.equal(some.frames, whole.frames[list(shown)])
    assert torch.equal(some.index, whole.index[list(shown)])
    assert (some.window, some.padded) == (10, 2) == (whole.window, whole.padded)
