"""Commands on whole stores: info, verify, compare, and export and import of the published research code's files."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from spatialprobe.engine.reading.probing_files import Transfer


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("info", info, "what a store holds")
    sub.add_argument("store")
    sub = command("verify", verify, "re-read a whole store and report every damaged file")
    sub.add_argument("store")
    sub = command("compare", compare, "how far the features of a store are from another's, the reference, by layer")
    sub.add_argument("reference", help="store")
    sub.add_argument("store", help="another of the same clips and model")
    sub.add_argument("--json", metavar="FILE", help="write the figures there too")
    sub.add_argument("--max-relative", metavar="X", help="exit code 1 of a relative L2 above it or a clip not in both")
    sub = command("export", export, "write a store as the files of the published research code")
    sub.add_argument("store")
    sub.add_argument("dump", help="folder to write <model>/<split>/<clip>/feature_*.sft into")
    sub.add_argument("--layout", choices=["probing"], required=True, help="the layout to write")
    sub.add_argument("--name", help="of the model's folder (default: the model as it was named to extract)")
    sub.add_argument("--split", default="", help="folder between model and clip, for ids that lack their split")
    sub.add_argument("--fill-missing", action="store_true", help="NaN for rows the store left out, instead of an error")

    sub = command("import", import_dump, "make a store of a dump of the published research code")
    sub.add_argument("dump", help="<model> folder of the published layout")
    sub.add_argument("store")
    sub.add_argument("--family", required=True, help="wan, qwen3_vl, cogvideox, ... : says which row sees a frame")
    sub.add_argument("--layers", metavar="I,J", required=True, help="blocks; hsK for files named feature_layerK")
    sub.add_argument("--steps", metavar="I,J", default="")
    sub.add_argument("--window", metavar="N", default="81", help="frames the clips were cut to (default: 81)")
    sub.add_argument("--query", metavar="FRAMES", help="frames shown to the model (default: the family's)")


def info(args: argparse.Namespace) -> int:
    from spatialprobe.engine.store import FeatureStore

    store = FeatureStore.open(args.store)
    found = store.info()
    print(
        f"{store.root}: {found.clips} clips, {found.bytes / 1e9:.3f} GB, {found.failed} failed, {found.padded} padded"
    )
    if found.damaged:
        print(f"{found.damaged} files have unreadable headers: run `engine verify {store.root}`")
    for name, value in store.about.items():
        print(f"{name}: {value}")
    for name, shapes in found.shapes.items():
        for shape, clips in shapes.items():
            print(f"{name}: {list(shape)} {store.spec.dtype} in {clips} clips")
    print(f"spec {store.spec_hash}:")
    print(store.spec.to_json())
    return 0


def verify(args: argparse.Namespace) -> int:
    from spatialprobe.engine.pipeline.progress import bar
    from spatialprobe.engine.store import FeatureStore

    store = FeatureStore.open(args.store)
    with bar(total=len(store), unit="clip") as progress:
        problems = list(store.verify(progress=progress.update))
    for problem in problems:
        print(problem)
    print(f"{len(store)} clips read, {len(problems)} problems")
    if problems:
        print("to mend them: delete these files and run the same extract again")
    return 1 if problems else 0


def compare(args: argparse.Namespace) -> int:
    from spatialprobe.engine.compare import compare_lines, compare_stores
    from spatialprobe.engine.pipeline.progress import bar
    from spatialprobe.engine.store import FeatureStore
    from spatialprobe.engine.words import share

    limit = None if args.max_relative is None else share("max-relative", args.max_relative)
    file = None if args.json is None else Path(args.json)
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"json must be a file in a folder that is there, got {file}")
    a, b = FeatureStore.open(args.reference), FeatureStore.open(args.store)
    with bar(total=None, unit="clip") as progress:
        found = compare_stores(a, b, progress=progress.update)
    for line in compare_lines(found):
        print(line)
    if file is not None:
        file.write_text(found.to_json() + "\n")
    if limit is None or found.within(limit):
        return 0
    unseen = f": {found.unseen} clips could not be compared" if found.unseen else ""
    print(f"engine: not within a relative L2 of {limit:g}{unseen}", file=sys.stderr)
    return 1


def export(args: argparse.Namespace) -> int:
    from spatialprobe.engine.pipeline.progress import bar
    from spatialprobe.engine.reading.probing_files import export_probing
    from spatialprobe.engine.store import FeatureStore

    store = FeatureStore.open(args.store)
    name = args.name or Path(store.about.get("model", args.store)).name
    with bar(total=len(store), unit="clip") as progress:
        done = export_probing(
            store, args.dump, name, args.split, fill_missing=args.fill_missing, progress=progress.update
        )
    return print_transfer(done)


def import_dump(args: argparse.Namespace) -> int:
    from spatialprobe.engine.pipeline.progress import bar
    from spatialprobe.engine.presets import FAMILIES, STUDY_QUERY
    from spatialprobe.engine.reading.probing_files import import_probing
    from spatialprobe.engine.types import FrameSelection
    from spatialprobe.engine.words import layer_list, numbers, positive

    steps = numbers("steps", args.steps) if args.steps else []
    known = FAMILIES.get(args.family)
    query = args.query or (known.query if known else ":" if steps else STUDY_QUERY)
    with bar(total=None, unit="clip") as progress:
        _, done = import_probing(
            args.dump,
            args.store,
            family=args.family,
            layers=tuple(sorted(set(layer_list("layers", args.layers)))),
            steps=tuple(sorted(set(steps))),
            frames=FrameSelection(window=positive("window", args.window), query=query),
            progress=progress.update,
        )
    return print_transfer(done)


def print_transfer(done: "Transfer") -> int:
    print(f"{done.written} clips written, {done.present} there before, {len(done.failed)} failed")
    for clip_id, reason in sorted(done.failed.items()):
        print(f"  {clip_id}  {reason}", file=sys.stderr)
    return 1 if done.failed else 0
