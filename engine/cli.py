"""The `engine` command: words in, exit code out. 0 all done, 1 clips failed or damaged, the disk or memory is
full, or the GPU lost, 2 bad arguments, 130 interrupted."""

import argparse
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

from spatialprobe.engine.commands import ask, demo, extract, lift, models, points, probe, report, stores, study, targets

# Before torch is imported: threads that spin while they wait stall the loader threads, threefold on a busy CPU.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(words)
    args.words = words
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except ValueError as error:
        print(f"engine: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, OSError) as error:
        if isinstance(error, BrokenPipeError) and reader_left():
            return 128 + signal.SIGPIPE
        print(f"engine: stopped: {error}", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if type(error).__name__ == "Refused":
            print(f"engine: error: {error}", file=sys.stderr)
            return 2
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            traceback.print_exc()  # it may be a bug of ours
            print("engine: stopped: lost its GPU; run the same command again to go on", file=sys.stderr)
            return 1
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch to say so
            raise
        print(f"engine: stopped: the model does not fit: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("engine: interrupted", file=sys.stderr)
        return 130


def reader_left() -> bool:
    """Whether nobody reads standard output any more, as after `| head`. What is left of it then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLERR)
    if not poll.poll(0):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def parser() -> argparse.ArgumentParser:
    """Of all commands. Torch and the model libraries are imported when a command runs, not here."""
    top = argparse.ArgumentParser(prog="engine", description=__doc__, allow_abbrev=False)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], about: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    for module in (extract, targets, points, lift, ask, models, stores, probe, study, report, demo):
        module.add_command(command)
    return top


if __name__ == "__main__":
    sys.exit(main())
