"""Which process works on which clip, told by files in a folder `leases`. Knows nothing of clips but their ids; what
`engine ask` shares are parts of many.

A holder is a process: `holder-<token>`, locked while it lives, holds a counter that a thread raises every few seconds.
A lease is `<key>.<turn>`, made only where there is none, and names its holder; the highest turn of a key is the one
that counts, and taking a lease over is making the next turn. A holder is gone when its file is, when its lock is free
(seen from its own machine), or when an observer has found its counter unchanged for `patience` seconds of the
observer's own monotonic clock. No time of day is read or compared.

A shared file system must make O_EXCL and hard links exclusive and show a file that is opened anew as it was last synced
(NFS from version 3 on, Lustre, GPFS, CephFS, BeeGFS do); where there are no hard links, O_EXCL is enough. Locks are a
shortcut: where there are none, the counter alone decides.
A holder that wakes up after it was given up finds the next turn there, and drops the clip.
"""

import fcntl
import os
import platform
import re
import secrets
import threading
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from spatialprobe.engine.files.durable import NO_LINKS, NO_LOCKS, room_for

BEAT, PATIENCE = 5.0, 60.0  # seconds
TOKEN = "[0-9a-f]" * 16
OURS = re.compile(rf"holder-{TOKEN}|\.(lease-)?{TOKEN}|{TOKEN}{TOKEN}\.\d+")  # clips may lie in `leases` too


def this_machine() -> str:
    """Names the running kernel: within it, locks tell the truth."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node().replace(" ", "-") or "unknown"


@dataclass
class Seen:
    """What an observer knows of a holder."""

    raw: bytes  # its file, when last looked at
    at: float  # monotonic seconds, of the last look
    session: str = ""
    stalled: float = 0.0  # seconds without a change; what the observer slept through is not counted
    alive: bool = False  # since this observer came


@dataclass(frozen=True)
class Lease:
    turn: int
    holder: str  # "": its process is just making it, or died in the act
    deaths: int  # processes that died while they held this clip


class Leases:
    """This process's leases. `session` is shared by processes that one parent started, which may die before they are
    looked at; a death counts against a clip only if the observer knows that the holder lived in its own time."""

    def __init__(self, folder: Path, *, session: str = "", beat: float = BEAT, patience: float = PATIENCE):
        self.folder, self.session, self.beat, self.patience = folder, session, beat, patience
        self.token = secrets.token_hex(8)
        self._machine, self._mine, self._seen = this_machine(), {}, {}  # _mine: clip id -> turn
        self._blank, self._links = None, True  # stat of the file that leases are links to; whether links work here
        self._beats, self._lock, self._entering = 0, None, threading.Lock()
        self._lock = self._enter()
        for path in folder.glob(f"holder-{TOKEN}"):
            self.gone(path.name.removeprefix("holder-"))  # who is dead already is not this session's business
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._live, name="heartbeat", daemon=True)
        self._heart.start()

    # -- this process's sign of life ----------------------------------------------------------------------------------

    def _enter(self) -> int:
        """Makes the holder's file, locked before it has its name, and returns it open."""
        temp = self.folder / f".{self.token}"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = None
            try:
                fd = os.open(temp, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
                locks = can_lock(fd)
                self._about = f"{self._machine} {'locks' if locks else 'none'} {self.session or '-'}"
                with room_for(temp, 100):
                    self._write(fd)
                temp.rename(self.folder / f"holder-{self.token}")
                return fd
            except FileNotFoundError:  # the last of other processes was just leaving
                os.close(fd) if fd is not None else None
            except BaseException:
                os.close(fd) if fd is not None else None
                temp.unlink(missing_ok=True)
                raise

    def _write(self, fd: int) -> None:
        os.pwrite(fd, f"{self._about} {self._beats:020d}\n".encode(), 0)  # always of one length: needs no new block
        os.fsync(fd)

    def _live(self) -> None:
        while not self._stop.wait(self.beat):
            self._beats += 1
            try:
                with self._entering:
                    self._write(self._lock)
                self._come_back()
            except OSError:  # the run itself will meet a file system that fails, and say so
                pass

    def _come_back(self) -> None:
        """After it was given up while it was stopped, and its file or the whole folder was cleared away."""
        with self._entering:
            if not (self.folder / f"holder-{self.token}").exists():
                old, self._lock = self._lock, self._enter()
                os.close(old)

    def gone(self, holder: str, name: str = "") -> bool:
        """Whether a holder works no more; `name` is of the lease, where it does not say whose it is."""
        if holder == self.token:
            return False
        try:
            fd = os.open(self.folder / (f"holder-{holder}" if holder else name), os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return True
        try:
            raw, now = os.read(fd, 200), time.monotonic()
            words = raw.decode(errors="replace").split()
            seen = self._seen.get(holder or name)
            if seen is None:
                seen = self._seen[holder or name] = Seen(raw, now, words[2] if len(words) == 4 else "")
            if raw != seen.raw:
                seen.raw, seen.stalled, seen.alive = raw, 0.0, True
            else:
                seen.stalled += min(now - seen.at, self.beat)
            seen.at = now
            if len(words) == 4 and words[:2] == [self._machine, "locks"]:
                if lock_is_free(fd):
                    return True
                seen.alive = True
            return seen.stalled >= self.patience  # with its lock held: stopped
        finally:
            os.close(fd)

    def _blame(self, holder: str) -> bool:
        seen = self._seen.get(holder)
        return seen is not None and (seen.alive or bool(self.session and seen.session == self.session))

    # -- leases -------------------------------------------------------------------------------------------------------

    def claim(self, clip_id: str, most_deaths: int = 0) -> int | None:
        """Takes a clip. Returns how many processes died at it; None if another has it, or if more than `most_deaths`.

        Who has claimed a clip must look whether it is done: it may have been done and given back a moment ago.
        """
        key = key_of(clip_id)
        made = self._create(key, 0, 0)
        if made is not None:
            if not self._exists(key, 1) and self._is(made, key, 0):  # in this order: they go from 0 up
                self._mine[clip_id] = 0
                return 0
            self._path(key, 0).unlink(missing_ok=True)
        over = self._top(key)
        if over is not None and over.holder == self.token:  # it was made, and a network file system lost the answer
            self._mine[clip_id] = over.turn
            return over.deaths
        if over is None or not self.gone(over.holder, f"{key}.{over.turn}"):
            return None
        turn, deaths = over.turn + 1, over.deaths + self._blame(over.holder)
        if deaths > most_deaths:
            return None
        if self._create(key, turn, deaths) is None:
            return None
        if self._read(key, over.turn) != over:  # given back in this moment: not a lease to take over
            self._path(key, turn).unlink(missing_ok=True)
            return None
        self._mine[clip_id] = turn
        return deaths

    def holds(self, clip_id: str) -> bool:
        """Whether a clip is still this process's, or was taken over because it seemed to be gone."""
        turn, key = self._mine.get(clip_id), key_of(clip_id)
        if turn is None or self._exists(key, turn + 1):
            return False
        lease = self._read(key, turn)
        return lease is not None and lease.holder == self.token

    def release(self, clip_id: str) -> None:
        """Gives a clip back, done or not. One that was taken over is left to who has it."""
        if self.holds(clip_id):
            for turn in range(self._mine[clip_id] + 1):
                self._path(key_of(clip_id), turn).unlink(missing_ok=True)
        self._mine.pop(clip_id, None)

    def close(self, *, abandon: bool = False) -> None:
        """Gives everything back. `abandon` leaves the leases as a killed process would: whoever takes them over knows
        that a process ended at them."""
        self._stop.set()
        self._heart.join()
        for clip_id in [] if abandon else list(self._mine):
            self.release(clip_id)
        if not abandon:
            for name in (f".lease-{self.token}", f"holder-{self.token}"):
                (self.folder / name).unlink(missing_ok=True)
            self._sweep()
        os.close(self._lock)

    def _sweep(self) -> None:
        """The last one out clears away what the dead have left, and the folder."""
        try:
            names = [path.name for path in self.folder.iterdir() if OURS.fullmatch(path.name)]
            holders = [name.removeprefix("holder-") for name in names if name.startswith("holder-")]
            if not all(self.gone(holder) for holder in holders):
                return
            for name in names:
                lease = None if name.startswith(("holder-", ".")) else self._read(*name.split("."))
                if lease is None or not lease.holder or self.gone(lease.holder):
                    (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()
        except OSError:  # another came, or is leaving too
            pass

    def _path(self, key: str, turn: int | str) -> Path:
        return self.folder / f"{key}.{turn}"

    def _exists(self, key: str, turn: int) -> bool:
        return os.access(f"{self.folder}/{key}.{turn}", os.F_OK)

    def _create(self, key: str, turn: int, deaths: int) -> os.stat_result | None:
        """Makes a lease; None if there is one. At a clip where nobody died it is a link to a file that this process
        keeps: one call, whole at once, and no inode, for which ext4 searches up to a millisecond where thousands of
        files were deleted within the last minute."""
        path = self._path(key, turn)
        with room_for(path, 40):
            try:
                made = self._link(path) if deaths == 0 and self._links else None
                return made or self._new_file(path, deaths)
            except FileExistsError:
                return None
            except FileNotFoundError:  # the folder
                self._come_back()
                return self._create(key, turn, deaths)

    def _link(self, path: Path) -> os.stat_result | None:
        blank = self.folder / f".lease-{self.token}"
        while True:
            self._blank = self._blank or self._new_file(blank, 0)
            try:
                os.link(blank, path)
                return self._blank
            except FileNotFoundError:  # cleared away while this process was stopped
                self._blank = None
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                self._links = False
                return None

    def _new_file(self, path: Path, deaths: int) -> os.stat_result:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, f"{self.token} {deaths}\n".encode())
            return os.fstat(fd)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def _is(self, made: os.stat_result, key: str, turn: int) -> bool:
        try:
            if os.path.samestat(made, self._path(key, turn).stat()):
                return True
        except FileNotFoundError:
            return False
        there = self._read(key, turn)  # some file systems give every name of a file a number of its own
        return there is not None and there.holder == self.token

    def _read(self, key: str, turn: int | str) -> Lease | None:
        try:
            fd = os.open(f"{self.folder}/{key}.{turn}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            words = os.read(fd, 100).decode(errors="replace").split()
        finally:
            os.close(fd)
        whole = len(words) == 2 and words[1].isdigit()
        return Lease(int(turn), words[0], int(words[1])) if whole else Lease(int(turn), "", 0)

    def _top(self, key: str) -> Lease | None:
        turn = 0
        while self._exists(key, turn + 1):
            turn += 1
        return self._read(key, turn)


def key_of(clip_id: str) -> str:
    """Ids may be long and hold "/"."""
    return sha256(clip_id.encode()).hexdigest()[:32]


def can_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return False
    return True


def lock_is_free(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: observers must not take each other for the holder
    except OSError:
        return False
    return True
