"""Temperature and clock of the CPU, where the machine lets them be read."""

from __future__ import annotations

from pathlib import Path

_ZONE = Path("/sys/class/thermal/thermal_zone0/temp")
_CLOCK = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")


def _read_thousandths(path: Path) -> float | None:
    try:
        return int(path.read_text()) / 1000
    except (OSError, ValueError):
        return None


def read_temperature_c() -> float | None:
    """Degrees Celsius of the first thermal zone, or None."""
    return _read_thousandths(_ZONE)


def read_frequency_mhz() -> float | None:
    """Current clock of the first core, or None."""
    return _read_thousandths(_CLOCK)
