"""To and from the files of the published research code: `<root>/<model>/<split>/<scene>/feature_t749_layer18.sft`.

Each holds one tensor "feat", float16 [T, H, W, C], or [2, T, H, W, C] where a model saw two interleaved halves of the
clip. With a step, layer i in a name is the output of block i; without, it is hidden_states[i], the output of block
i - 1, so layer 21 of a store is `feature_layer22.sft` (of a model's last block, hidden_states has the final norm, which
a store has not). Which frame a row sees is not in these files: ROW_RULES knows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spatialprobe.engine.files.clipfile import BadFile, is_whole, read_header, write_file
from spatialprobe.engine.files.durable import RunFolder, make_folder, publish, room_for
from spatialprobe.engine.store import FeatureStore
from spatialprobe.engine.types import STORE_DTYPES, FeatureSpec, FrameSelection, check_clip_id, parse_query, tensor_name
from spatialprobe.kernels.pool_features import token_stats

Progress = Callable[[int], object]  # called with 1 after every clip


@dataclass
class Transfer:
    """What became of the clips of an export or import."""

    written: int = 0
    present: int = 0  # were there already, from the same source
    failed: dict[str, str] = field(default_factory=dict)  # clip id -> reason


@dataclass(frozen=True)
class Published:
    """How the research code lays out a family's rows."""

    rows: Callable[[int, tuple[int, ...], int], list[int]]  # (F, query frames, T of one part) -> row of each frame
    parts: int = 1  # leading dimension of "feat", left out if 1
    tag: str = ""  # between "feature_" and "t749"


def _causal(frames: int, query: tuple[int, ...], length: int) -> list[int]:
    """Frame 0 alone, then four frames a row."""
    return [(f + 3) // 4 for f in range(frames)]


def _interleaved(frames: int, query: tuple[int, ...], length: int) -> list[int]:
    """Frame 0 and odd frames in part 0, even ones in part 1, each by the causal rule; one part after the other."""
    rows = [0] + [((f - 1) // 2) // 4 + 1 for f in range(1, frames)]
    if max(rows) >= length:
        raise ValueError(f"{length} rows in each half cannot see {frames} frames: {max(rows) + 1} are needed")
    return [row + length * ((f - 1) % 2 if f else 0) for f, row in enumerate(rows)]


def _images(frames: int, query: tuple[int, ...], length: int) -> list[int]:
    """One row for each query frame, which the model saw as an image of its own."""
    if length != len(query):
        raise ValueError(f"{length} rows for {len(query)} query frames")
    return [query.index(f) if f in query else -1 for f in range(frames)]


def _given(rows: tuple[int, ...], frames: int, query: tuple[int, ...], length: int) -> list[int]:
    return list(rows)


ROW_RULES = {  # by the beginning of the family's name
    "wan_i2v": Published(_causal, tag="i2v_"),
    "wan": Published(_causal),
    "opensora": Published(_causal),
    "open_sora": Published(_causal),
    "cogvideox": Published(_interleaved, parts=2, tag="t2v_5b_"),
    "aether": Published(_interleaved, parts=2),
    "qwen": Published(_images),
    "internvl": Published(_images),
}


def published(family: str) -> Published:
    """The rule of a family, by the beginning of its name. Raises ValueError if there is none."""
    for prefix, rule in ROW_RULES.items():
        if family.startswith(prefix):
            return rule
    raise ValueError(f"no published layout is known for family {family!r}; known: {', '.join(ROW_RULES)}")


def probing_name(layer: int, step: int | None, tag: str = "") -> str:
    """File name of the output of block `layer`: with a step as block index, without as hidden_states index."""
    return f"feature_layer{layer + 1}.sft" if step is None else f"feature_{tag}t{step}_layer{layer}.sft"


# -- export ---------------------------------------------------------------------------------------------------------


def export_probing(
    store: FeatureStore,
    root: str | Path,
    model: str,  # name of the folder below `root`
    split: str = "",  # folder between model and clip id, for ids that do not begin with their split
    *,
    tag: str | None = None,  # instead of the family's, e.g. "i2v_"
    fill_missing: bool = False,  # rows that the store lacks become NaN; without, such a store is refused
    progress: Progress = lambda clips: None,
) -> Transfer:
    """Writes every clip as `<root>/<model>/<split>/<clip id>/feature_*.sft`, float16. Runs again where it stopped.

    The research code finds a frame's row by the model's full T. A store that kept only the rows of its query frames is
    refused, unless `fill_missing`. A clip whose values overflow float16 or whose file is damaged fails. Raises
    ValueError for merged steps, which have no name there.
    """
    spec, rule, root, result = store.spec, published(store.spec.family), Path(root), Transfer()
    if spec.merge_steps and spec.steps:
        raise ValueError("the published layout has no name for features merged over steps")
    tag, ids = rule.tag if tag is None else tag, store.ids()
    if not fill_missing:
        _refuse_missing_rows(store, ids)
    make_folder(root)
    run = RunFolder(root / ".tmp")
    for clip_id in ids:
        folder = root / model / split / clip_id
        try:
            fresh = [
                _export(store, clip_id, key, folder / probing_name(*key, tag), rule, run) for key in spec.tensors()
            ]
        except ValueError as error:
            result.failed[clip_id] = str(error)
        else:
            result.written += any(fresh)
            result.present += not any(fresh)
        progress(1)
    run.close()
    return result


def _refuse_missing_rows(store: FeatureStore, ids: list[str]) -> None:
    for clip_id in ids:
        try:
            source = store.provenance(clip_id)
        except ValueError:  # damaged: it will fail on its own
            continue
        kept, length = len(source["rows_kept"]), source["grid"][0]
        if kept < length:
            raise ValueError(
                f"clip {clip_id} holds {kept} of the model's {length} rows and the published code expects all of them; "
                "extract with query ':', or fill the missing rows with NaN"
            )


def _export(
    store: FeatureStore, clip_id: str, key: tuple[int, int | None], path: Path, rule: Published, run: RunFolder
) -> bool:
    """Writes one file, or returns False if it is there already."""
    source = store.provenance(clip_id)
    kept, length = source["rows_kept"], source["grid"][0]
    origin = {"clip": clip_id, "tensor": tensor_name(*key), "source": source["checksum"]}
    if path.exists():
        if _origin(path) != origin:
            raise ValueError(f"{path} is there already and was not made from this clip; choose another folder")
        return False
    if not is_whole(store.path(clip_id)):
        raise ValueError("its file is damaged: run `engine verify`")
    data = store.read(clip_id, *key).data
    feat = data.to(torch.float16)
    if not feat.isfinite().all():
        raise ValueError(f"{tensor_name(*key)} overflows float16: largest magnitude {float(data.abs().max()):.6g}")
    if len(kept) < length:
        full = torch.full((length, *feat.shape[1:]), torch.nan, dtype=torch.float16)
        full[kept] = feat
        feat = full
    if length % rule.parts:
        raise ValueError(f"the model's {length} rows must be {rule.parts} equal halves")
    if rule.parts > 1:
        feat = feat.unflatten(0, (rule.parts, -1))
    temp = run.file()
    with room_for(path, feat.nbytes):
        try:
            write_file(temp, {"feat": feat}, origin)
            publish(temp, path)
        finally:
            temp.unlink(missing_ok=True)
    return True


def _origin(path: Path) -> dict:
    """What an exported file was made from, {} if it is not one of ours."""
    try:
        with path.open("rb") as file:
            provenance = read_header(file).provenance
    except BadFile:
        return {}
    del provenance["checksum"]
    return provenance


# -- import ---------------------------------------------------------------------------------------------------------


def import_probing(
    root: str | Path,  # <root>/<model> of the published layout
    out: str | Path,
    *,
    family: str,
    layers: tuple[int, ...],  # block indices: hidden_states[22] is layer 21
    steps: tuple[int, ...] = (),
    frames: FrameSelection,  # as the clips were cut when the files were made; needs a window
    rows: Sequence[int]
    | None = None,  # [F] row of each frame, -1 if none, instead of the family's rule (halves one after the other)
    name: str | None = None,  # whose features these are; the folder's name if None
    dtype: str = "float16",
    progress: Progress = lambda clips: None,
) -> tuple[FeatureStore, Transfer]:
    """Makes a store at `out` of the clips below `root`, with their values as they are. Runs again where it stopped.

    A clip with a missing, broken or unfit file fails, with a line in `failed.jsonl`; the others are imported. Every
    token's mean and rstd are computed. Raises ValueError if nothing is there or the arguments fit no row rule.
    """
    root = Path(root)
    spec, rule = describe_dump(root, family, layers, steps, frames, rows, name, dtype)
    ids = dumped_ids(root)
    store = FeatureStore.create(out, spec, {"model": root.name, "layout": "probing"})
    result = Transfer()
    for clip_id in ids:
        try:
            if clip_id in store:
                result.present += 1
            else:
                store.write(clip_id, *_import_clip(root / clip_id, spec, rule))
                result.written += 1
        except ValueError as error:
            result.failed[clip_id] = str(error)
            store.record_failure(clip_id, "import", str(error))
        progress(1)
    return store, result


def describe_dump(
    root: Path,
    family: str,
    layers: Sequence[int],
    steps: Sequence[int],
    frames: FrameSelection,
    rows: Sequence[int] | None,
    name: str | None,
    dtype: str,
) -> tuple[FeatureSpec, Published]:
    """The spec of what `root` holds, and its row rule; arguments and errors as of `import_probing`."""
    rule = published(family) if rows is None else replace(published(family), rows=partial(_given, tuple(rows)))
    if frames.window is None or (rows is not None and len(rows) != frames.window):
        raise ValueError(f"a dump needs the window's length, and a row for each of its frames, got {frames.window}")
    weights = f"imported:{root.name if name is None else name}"
    return FeatureSpec(family, weights, tuple(layers), tuple(steps), frames=frames, dtype=dtype), rule


def dumped_ids(root: Path) -> list[str]:
    """Clips of `<root>/<split>/<scene>/feature_*.sft`, sorted. Raises ValueError if there are none."""
    visible = (p for p in root.rglob("feature_*.sft") if not any(x.startswith(".") for x in p.relative_to(root).parts))
    folders = sorted({path.parent for path in visible})
    if not folders or folders[0] == root:
        raise ValueError(f"{root} must hold <split>/<scene>/feature_*.sft, found {'the files' if folders else 'none'}")
    return [check_clip_id(folder.relative_to(root).as_posix()) for folder in folders]


def dumped_length(spec: FeatureSpec, rule: Published, shapes: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """T of one part of a clip's files, whose "feat" have these dtypes and shapes. Raises ValueError for unfit ones."""
    lengths = set()
    for name, (dtype, shape) in shapes.items():
        if dtype != STORE_DTYPES[spec.dtype]:
            raise ValueError(f"{name}: feat is {dtype}, and the store would hold {spec.dtype}")
        halves = [] if rule.parts == 1 else [rule.parts]
        if len(shape) != 4 + len(halves) or (halves and shape[0] != rule.parts):
            raise ValueError(f"{name}: feat must be {[*halves, 'T', 'H', 'W', 'C']}, got {list(shape)}")
        lengths.add(shape[-4])
    if len(lengths) != 1:
        raise ValueError(f"{', '.join(shapes)} have unequal numbers of rows: {sorted(lengths)}")
    return lengths.pop()


def dumped_rows(spec: FeatureSpec, rule: Published, length: int) -> list[int]:
    """[F] row that sees each frame, of files with `length` rows in each part, one part after the other."""
    rows = rule.rows(spec.frames.window, parse_query(spec.frames.query, spec.frames.window), length)
    if max(rows) >= length * rule.parts:
        raise ValueError(f"{length * rule.parts} rows cannot see {len(rows)} frames: {max(rows) + 1} are needed")
    return rows


def dumped_file(folder: Path, layer: int, step: int | None) -> Path:
    """The file of a layer and step, whatever its tag."""
    found = sorted(folder.glob(probing_name(layer, step, "" if step is None else "*")))
    if len(found) != 1:
        there = ", ".join(sorted(p.name for p in folder.glob("feature_*.sft")))
        wanted = f"one {probing_name(layer, step)}"
        raise ValueError(f"{wanted} expected, found {len(found)}; there are {there}")
    return found[0]


def _import_clip(folder: Path, spec: FeatureSpec, rule: Published) -> tuple[dict[str, Tensor], Tensor, dict]:
    """What `FeatureStore.write` takes, of one clip's folder. Raises ValueError for files that do not fit."""
    feats = {}
    for key in spec.tensors():
        path = dumped_file(folder, *key)
        feats[path.name] = _load(path)
    length = dumped_length(spec, rule, {name: (feat.dtype, tuple(feat.shape)) for name, feat in feats.items()})
    tensors = {}
    for key, feat in zip(spec.tensors(), feats.values(), strict=True):
        name = tensor_name(*key)
        tensors[name] = feat.flatten(0, -4)
        stats = [token_stats(row) for row in tensors[name]]  # by row: float32 copies stay small
        tensors[f"{name}.mean"], tensors[f"{name}.rstd"] = (torch.stack(s) for s in zip(*stats, strict=True))
    rows, total = dumped_rows(spec, rule, length), length * rule.parts
    grid = list(tensors[name].shape[:3])
    provenance = {"grid": grid, "rows_kept": list(range(total)), "padded": None, "files": list(feats)}
    return tensors, torch.tensor(rows), provenance


def _load(path: Path) -> Tensor:
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("feat")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name}: {error}") from None
