"""The Ray cluster of a run: one that is there, or one on this machine for the run alone. Knows nothing of clips.

A cluster of our own writes (sockets, logs) below the store's `tmp`, asks for a token of this process, and listens on
127.0.0.1. Ray maps its object store into memory as /dev/shm files, which have no name; no feature goes there.
"""

import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from spatialprobe.engine.files.durable import RunFolder, make_folder

LOCAL = "local"  # as address: a cluster on this machine, for the run
GONE_AFTER = (
    20.0  # seconds without an answer of the cluster's head. After 60, Ray ends the process, with no word of ours
)
OBJECT_STORE = 80 * 2**20  # bytes; Ray takes no less than 75 MiB


def ray_library() -> Any:
    """The module `ray`. Raises ValueError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # else a cluster that is gone fills our standard error
    try:
        import ray
    except ImportError:
        raise ValueError("ray is not installed: --ray needs the extra ray, pip install 'spatialprobe[ray]'") from None
    return ray


@contextmanager
def cluster(address: str, out: Path, *, cpus: int) -> Iterator["Cluster"]:
    """Connects to the cluster at `address`, or starts one; ends that again. Raises ValueError if none answers."""
    ray = ray_library()
    hush()
    own = address == LOCAL
    with ExitStack() as stack:
        options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
        if own:
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            options |= {"num_cpus": cpus, "num_gpus": gpus, "object_store_memory": OBJECT_STORE}
            options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
            options["_temp_dir"] = stack.enter_context(room_in(out))
            stack.enter_context(environment(of_our_own()))
        try:
            if not own and address != "auto":
                socket.create_connection(endpoint(address), timeout=10.0).close()  # Ray would try for a minute
            with no_standard_error():  # on which its C++ reports its settings; what goes wrong is raised as well
                ray.init(**options)
        except (RuntimeError, OSError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            why = (str(error).splitlines() or [type(error).__name__])[0]
            if own:
                raise OSError(f"Ray starts no cluster on this machine: {why}") from None
            raise ValueError(f"no Ray cluster answers at {address}: {why}") from None
        stack.callback(ray.shutdown)
        yield Cluster(ray, "127.0.0.1" if own else address, own)


class Cluster:
    def __init__(self, ray: Any, address: str, own: bool):
        self.ray, self.address, self.own = ray, address, own
        self._head = endpoint(ray.get_runtime_context().gcs_address)
        self._heard, self.gone = time.monotonic(), False

    def counts(self) -> tuple[int, int]:
        """GPUs and machines that are up."""
        nodes = [node for node in self.ray.nodes() if node["Alive"]]
        return int(sum(node["Resources"].get("GPU", 0) for node in nodes)), len(nodes)

    def look(self, patience: float = GONE_AFTER) -> bool:
        """Whether the cluster's head still answers, or has within `patience` seconds."""
        try:
            socket.create_connection(self._head, timeout=min(patience, 5.0)).close()
            self._heard = time.monotonic()
        except OSError:
            self.gone = time.monotonic() - self._heard >= patience
        return not self.gone


def endpoint(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"wanted HOST:PORT or auto, got {address!r}")
    return host.strip("[]"), int(port)


@contextmanager
def no_standard_error() -> Iterator[None]:
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@contextmanager
def room_in(out: Path) -> Iterator[str]:
    """A path for Ray's files below `out`/tmp, cleared away after. Killed runs' are cleared away by the next.

    Ray makes sockets there, whose paths may have 107 bytes, 70 of them Ray's own. So the folder goes by the name that
    the kernel gives to a folder this process has open, which is short wherever the store lies.
    """
    make_folder(out)
    run = RunFolder(out / "tmp")
    folder = run.path / "ray"
    folder.mkdir()
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/{os.getpid()}/fd/{held}"
    finally:
        os.close(held)
        shutil.rmtree(folder, ignore_errors=True)  # a log may be written to once more; the next run clears it away
        run.close()


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in (*variables, "RAY_AUTH_MODE")}  # which Ray sets itself
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


@cache  # Ray reads it once in a process
def of_our_own() -> dict[str, str]:
    """Only who has the token may use the cluster. Without, Ray would write one into the user's home."""
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def hush() -> None:
    """Ray prints paragraphs on standard output when an actor dies, whatever is set; a line of ours says it."""
    import ray._private.worker as worker

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = lambda *args, **kwargs: None
