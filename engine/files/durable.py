"""Files that survive a crash: folders and names made durable, temporary files that a killed process cannot leave for
good, and a clear error when the disk is full. Several machines on one store need a file system with working flock.
"""

import errno
import fcntl
import os
import secrets
import shutil
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)


class StoreFull(OSError):
    """There is no room for a file: the disk is full, a quota is used up, or files may not be that large."""


@contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Turns "no space" errors of the code inside into StoreFull, saying what was needed and what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL or isinstance(error, StoreFull):
            raise
        folder = next(p for p in path.parents if p.is_dir())
        free = shutil.disk_usage(folder).free
        what = f"{error.strerror}: {needed / 1e6:,.3f} MB needed, {free / 1e6:,.3f} MB free"
        raise StoreFull(error.errno, what, str(path)) from error


def must_be_no_file(path: Path, what: str) -> None:
    """Raises ValueError where a folder cannot be made: `path` is a file, though `what`, or lies below one."""
    there = next(p for p in (path, *path.parents) if p.exists())
    if not there.is_dir():
        raise ValueError(f"{there} is a file; {what if there == path else f'{path} cannot be below it'}")


def make_folder(path: Path) -> None:
    """mkdir -p that survives a power cut. Raises ValueError where a file is in the way."""
    if path.is_dir():
        return
    must_be_no_file(path, "a folder is wanted")
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


class _FolderSync:
    """Of threads that want one folder synced, one does it for all that came before it began."""

    def __init__(self):
        self.lock, self.counting, self.wanted, self.done = threading.Lock(), threading.Lock(), 0, 0


_folder_syncs: "weakref.WeakValueDictionary[str, _FolderSync]" = weakref.WeakValueDictionary()
_folder_syncs_lock = threading.Lock()


def _forget_folder_syncs() -> None:
    """In a forked child: a thread that it has not got may have held a lock."""
    global _folder_syncs, _folder_syncs_lock
    _folder_syncs, _folder_syncs_lock = weakref.WeakValueDictionary(), threading.Lock()


os.register_at_fork(after_in_child=_forget_folder_syncs)


def sync_folder(path: Path) -> None:
    """Returns once all that was in the folder at the call is on the disk. Threads share the waiting for it."""
    with _folder_syncs_lock:
        shared = _folder_syncs.get(str(path))
        if shared is None:
            shared = _folder_syncs[str(path)] = _FolderSync()
    with shared.counting:
        shared.wanted += 1
        mine = shared.wanted
    with shared.lock:
        if shared.done >= mine:
            return
        with shared.counting:
            covered = shared.wanted
        _sync_folder(path)
        shared.done = covered


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def publish(temp: Path, final: Path) -> None:
    """Gives a whole, synced file its final name, at once and for good."""
    make_folder(final.parent)
    temp.replace(final)
    sync_folder(final.parent)


def publish_first(temp: Path, final: Path) -> None:
    """Like `publish`, but a file that has the name already stays; of two processes at once one wins."""
    try:
        final.hardlink_to(temp)
    except FileExistsError:
        pass
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        if not final.exists():  # no hard links on this file system: of two processes at once the last wins
            temp.replace(final)
    temp.unlink(missing_ok=True)
    sync_folder(final.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a new file, to the disk itself."""
    with path.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, text: str) -> None:
    """Writes or replaces a file at once, so that nobody sees a part of it. For files outside stores."""
    make_folder(path.parent)
    run = RunFolder(path.parent / ".tmp")
    try:
        with room_for(path, len(text)):
            temp = run.file()
            write_text(temp, text)
            publish(temp, path)
    finally:
        run.close()


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file that several threads and processes add to; a line torn by a kill stays alone."""
    data = line.encode() + b"\n"
    with room_for(path, len(data)):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class RunFolder:
    """A folder for one process's temporary files: `<parent>/run-*`, locked while the process lives.

    Making one removes the folders of processes that have died; folders of live ones are left alone.
    """

    def __init__(self, parent: Path):
        with _locked(parent / "lock") as locks_work:
            for folder in dead_runs(parent) if locks_work else ():
                with suppress(OSError):  # its owner may be removing it too; verify names the rest
                    _remove_run(folder)
            self.path = parent / f"run-{secrets.token_hex(6)}"
            self.path.mkdir()
            lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
            _flock(lock, fcntl.LOCK_EX)
        self._numbers = count()
        self.close = weakref.finalize(self, _end_run, self.path, lock, os.getpid())

    def file(self) -> Path:
        """A new name, also in a forked child."""
        return self.path / f"{os.getpid()}-{next(self._numbers)}.part"


def dead_runs(parent: Path) -> list[Path]:
    """Folders of runs whose process has died. A run that this process may not lock counts as alive."""
    dead = []
    for folder in sorted(parent.glob("run-*")):
        try:
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:  # killed between making it and its lock, which happens under the parent's lock
            if folder.is_dir() and not any(folder.iterdir()):
                dead.append(folder)
            continue
        except OSError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            dead.append(folder)
        except OSError:
            pass
        finally:
            os.close(lock)
    return dead


def _remove_run(folder: Path) -> None:
    """The lock goes last: a folder without one counts as dead only if it is empty, and this may be killed too."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink(missing_ok=True)
    (folder / "lock").unlink(missing_ok=True)
    folder.rmdir()


def _end_run(path: Path, lock: int, pid: int) -> None:
    if os.getpid() != pid:  # a forked child: the folder is its parent's
        return
    try:
        _remove_run(path)
        # The last one out removes the parent. Never waits: this may run inside a garbage collection.
        with _locked(path.parent / "lock", wait=False):
            if not any(path.parent.glob("run-*")):
                (path.parent / "lock").unlink()
                path.parent.rmdir()
    except OSError:  # another process is at it, or the whole store is gone
        pass
    finally:
        os.close(lock)


def _flock(fd: int, operation: int) -> bool:
    """False where the file system has no locks."""
    try:
        fcntl.flock(fd, operation)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Holds the lock file `path`, made if need be, which its holder may remove. Yields False if locks do not work."""
    while True:
        if wait:
            path.parent.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            if not wait:
                raise
            continue
        try:
            works = _flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                yield works
                return
        finally:
            os.close(fd)
