"""Numbers and places as words: the same everywhere on the page."""

import math
from collections.abc import Sequence

from spatialprobe.probes.report.scores import Probes
from spatialprobe.probes.results import varied

NONE = "\u2013"  # what a number is that is not there
HAS_ITS_OWN_PLACE = {"layer", "step", "seed"}  # settings that a cell says in words


def place(layer: int, step: int | None) -> str:
    return f"block {layer}" if step is None else f"block {layer}, step {step}"


def told(probes: Probes, among: Sequence[Probes]) -> str:
    """Where a cell's numbers are from: layer and step, settings that vary, seeds, and of how many it is the best."""
    words = [" + ".join(place(*each) for each in probes.places)]
    results = [p.first for p in among]
    settings = next(one for one, p in zip(varied(results), among, strict=True) if p is probes)
    words += [f"{name} {value}" for name, value in settings.items() if name not in HAS_ITS_OWN_PLACE]
    if len(probes.results) > 1:
        seeds = list(dict.fromkeys(str(result.config.get("seed")) for result in probes.results))
        runs = f"{len(probes.results)} runs of " if len(seeds) < len(probes.results) else ""
        of = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(seeds)})"
        words.append(runs + of)
    if len(among) > 1:
        words.append(f"best of {len(among)}")
    return "; ".join(words)


def number(x: float | None, decimals: int = 3) -> str:
    """Fixed decimals, as many figures where that would show nothing; an en dash for none."""
    if x is None or not math.isfinite(x):
        return NONE
    if isinstance(x, int):
        return str(x)
    return f"{x:.{decimals}f}" if x == 0 or 10**-decimals <= abs(x) < 1e4 else f"{x:.{decimals}g}"


def size(nbytes: int | None) -> str:
    if nbytes is None:
        return NONE
    for unit, of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= of:
            return f"{nbytes / of:.3g} {unit}" if nbytes < 1000 * of else f"{nbytes / of:,.0f} {unit}"
    return f"{nbytes} bytes"
