"""Features straight from extraction to whoever uses them: a bounded queue in memory, and nothing written.

For disks that cannot hold a dump. Every pass extracts again. What becomes of the features is not known here.
"""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from spatialprobe.engine.adapter import Adapter
from spatialprobe.engine.device.compiled import check_thread
from spatialprobe.engine.extract import extract
from spatialprobe.engine.files.durable import StoreFull
from spatialprobe.engine.pipeline.outcomes import Report
from spatialprobe.engine.reading.memory import MemoryClip, each
from spatialprobe.engine.reading.rows import StoredRows
from spatialprobe.engine.types import ClipRef, FeatureSpec, tensor_name


class NobodyReads(StoreFull):
    """The reader has left; like a full disk, this ends an extraction."""


class LiveStore:
    """What `extract` fills in place of a store, and, iterated once, the clips in the order of their arrival.

    At most `queue_bytes` of features wait, or one clip if that is larger; then extraction waits.
    """

    def __init__(self, spec: FeatureSpec, queue_bytes: int):
        if queue_bytes < 1:
            raise ValueError(f"queue_bytes must be at least 1, got {queue_bytes}")
        self.spec, self.queue_bytes = spec, queue_bytes
        self.spec_hash = sha256(spec.to_json().encode()).hexdigest()[:16]  # as a FeatureStore's
        self.failed: dict[str, str] = {}  # clip id -> stage and reason
        self.report: Report | None = None  # once all clips have arrived
        self._waiting: deque[MemoryClip] = deque()
        self._changed = threading.Condition()
        self._closed, self._iterated, self._error = False, False, None

    # -- extraction's side ------------------------------------------------------------------------------------------

    def ids(self) -> list[str]:
        """None: no clip is there already."""
        return []

    def write(self, clip_id: str, tensors: dict[str, Tensor], rows: Tensor, provenance: dict[str, Any]) -> int:
        """Puts a clip in the queue, when there is room, and returns its bytes. Raises NobodyReads."""
        features = {}
        for key in self.spec.tensors():
            parts = {part: tensors.get(f"{tensor_name(*key)}.{part}") for part in ("mean", "rstd", "scale")}
            # copies: what comes is a view of a whole batch, and made in inference mode, which training cannot use
            features[key] = each(StoredRows(tensors[tensor_name(*key)], **parts), torch.clone)
        clip = MemoryClip(clip_id, "extraction", rows.tolist(), features)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._has_room(clip.nbytes))
            if self._closed:
                raise NobodyReads("the reader of the features has left")
            self._waiting.append(clip)
            self._changed.notify_all()
        return clip.nbytes

    def _has_room(self, nbytes: int) -> bool:
        return not self._waiting or sum(clip.nbytes for clip in self._waiting) + nbytes <= self.queue_bytes

    def record_failure(self, clip_id: str, stage: str, reason: str) -> None:
        self.failed[clip_id] = f"{stage}: {reason}"

    def end(self, report: Report | None, error: BaseException | None = None) -> None:
        """Says that no clip comes any more, and why."""
        with self._changed:
            self.report, self._error, self._closed = report, error, True
            self._changed.notify_all()

    # -- the reader's side ------------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[MemoryClip]:
        """The clips as they arrive. Raises what extraction raised, and RuntimeError if it had to stop early."""
        if self._iterated:
            raise RuntimeError("features that are extracted live can be read once; a second pass needs another `live`")
        self._iterated = True
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    break
                clip = self._waiting.popleft()
                self._changed.notify_all()
            yield clip
        if self._error is not None:
            raise self._error
        if self.report is not None and self.report.stopped:
            raise RuntimeError(f"extraction stopped after {self.report.written} clips: {self.report.stopped}")

    def close(self) -> None:
        """The reader leaves: extraction stops at its next clip."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()


@contextmanager
def live(
    refs: Sequence[ClipRef],
    adapter: Adapter,  # loaded to max(spec.layers) + 1 blocks
    spec: FeatureSpec,
    *,
    queue_bytes: int = 1 << 30,
    batch_size: int | str = 1,  # the others as for `extract`
    loaders: int = 2,
    writers: int = 2,
) -> Iterator[LiveStore]:
    """`with live(refs, adapter, spec) as arriving: for clip in arriving: ...`, while a thread extracts.

    The features are those that `extract` would store, bit for bit. A clip that cannot be extracted is in
    `arriving.failed`. Leaving the block, early or by an error, ends the extraction. Raises ValueError for CUDA graphs
    that this torch cannot have in a thread.
    """
    check_thread(spec.compile)
    arriving = LiveStore(spec, queue_bytes)
    device = torch.device(adapter.device)
    if device.type == "cuda" and device.index is None:  # the current one, which is another in another thread
        device = torch.device("cuda", torch.cuda.current_device())

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # for this thread: streams are made on the current device
            report = extract(refs, adapter, arriving, batch_size=batch_size, loaders=loaders, writers=writers)
        except BaseException as error:  # raised again where the features are read
            arriving.end(None, error)
        else:
            arriving.end(report)

    thread = threading.Thread(target=run, name="extract")
    thread.start()
    try:
        yield arriving
    finally:
        arriving.close()
        thread.join()
