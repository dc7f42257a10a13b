"""What disturbed the machine while a measurement was taken, said in sentences; nothing on a quiet machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ryot.edge.protocol import MeasureResult

#: A quiet machine's calibration loops stay within this share of each other,
NOISY_CALIBRATION = 0.10
#: the medians of an arm's rounds within this,
NOISY_SPREAD = 0.15
#: and the load average within this of what the measurement itself makes.
NOISY_LOAD = 0.5


def find_noise(results: Sequence[MeasureResult]) -> list[str]:
    """Sentences on the calibration loop that each process runs before and after, the load average before it, processes
    that did not become steady, and the spread of each arm's rounds.
    """
    notes = []
    loops = [ms for r in results for ms in r.calibration_ms if ms]
    if loops and max(loops) / min(loops) - 1 > NOISY_CALIBRATION:
        notes.append(
            f"the same calibration loop took {min(loops):.1f} to {max(loops):.1f} ms"
            f" (a quiet machine stays within {NOISY_CALIBRATION:.0%})"
        )
    if results:
        # The average lags by a minute, so what ran before the first measurements is in it: the median counts.
        load = statistics.median([r.load_average[0] if r.load_average else 0.0 for r in results])
        own = statistics.median([float(r.threads) for r in results])
        if load - own > NOISY_LOAD:
            notes.append(f"the load average was {load:.1f}, the measurement itself makes {own:.0f}")
    measured = [r for r in results if r.ok]
    unsteady = sum(not r.steady for r in measured)
    if unsteady:
        notes.append(f"{unsteady} of {len(measured)} processes did not become steady while warming up")
    by_arm: dict[str, list[float]] = {}
    for result in measured:
        if result.ttft_ms:
            by_arm.setdefault(result.arm, []).append(statistics.median(result.ttft_ms))
    wide = {arm: m for arm, m in by_arm.items() if max(m) / min(m) - 1 > NOISY_SPREAD}
    if wide:
        worst = max(wide, key=lambda arm: max(wide[arm]) / min(wide[arm]))
        notes.append(
            f"in {len(wide)} of {len(by_arm)} forms the rounds' median TTFT differ by more than {NOISY_SPREAD:.0%}"
            f" ({worst}: {min(wide[worst]):.2f} to {max(wide[worst]):.2f} ms)"
        )
    return notes
