"""`engine ask`: questions about the objects of lifted clips, and how many of each kind there came to be."""

import argparse
from collections.abc import Callable

from spatialprobe.engine.commands.flags import WORDS, add_flags
from spatialprobe.engine.commands.outcome import print_report

IMAGES = "{clip}/frame_{frame:05d}.png"
ASK_WORDS = {  # word -> (placeholder, help)
    "out": ("DIR", "folder of the questions; run the same command again to resume"),
    "per_clip": ("N", "questions of each clip (default: 100)"),
    "seed": ("N", "of everything that is drawn (default: 0)"),
    "types": ("A,B", "types of questions (default: all)"),
    "levels": ("I,J", "0 pixels, 1 one object, 2 two objects, 3 several steps (default: all)"),
    "shares": ("X,Y", "shares of these levels (default: of all four 0.15,0.25,0.35,0.25)"),
    "forms": ("F,G", "open, choice, truth, each alone or with its share (default: open=0.4,choice=0.3,truth=0.3)"),
    "images": ("PATTERN", f"of image paths in chats (default: {IMAGES})"),
    "shard": ("I/N", "every N-th part of the output from the I-th, from 0"),
    "limit": WORDS["limit"],
}


def add_command(command: Callable[..., argparse.ArgumentParser]) -> None:
    sub = command("ask", ask, "questions and answers about the objects of lifted clips, as JSON lines")
    sub.add_argument("lifted", help="folder that `engine lift` made")
    add_flags(sub, ASK_WORDS, required="out")
    sub.add_argument("--chat", action="store_true", help="write them as chats with images too, for fine-tuning tools")
    sub.add_argument("--retry-failed", action="store_true", help="again the parts in which a clip failed")


def ask(args: argparse.Namespace) -> int:
    from spatialprobe.engine.questions.run import AskJob, run_ask
    from spatialprobe.engine.questions.settings import Settings
    from spatialprobe.engine.words import positive

    if args.images and not args.chat:
        raise ValueError("images goes with chat")
    settings = Settings.from_words({word: text for word in ASK_WORDS if (text := getattr(args, word)) is not None})
    limit = None if args.limit is None else positive("limit", args.limit)
    images = (args.images or IMAGES) if args.chat else None
    job = AskJob(args.lifted, args.out, settings, images, args.shard, limit)
    report, out, summary = run_ask(job, retry_failed=args.retry_failed)
    code = print_report(report, out, args.words)
    for name in ("levels", "wanted", "forms", "truths", "types"):
        print(f"{name}: {', '.join(f'{key} {count}' for key, count in summary[name].items())}")
    return code
