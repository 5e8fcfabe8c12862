"""How much memory there is to use."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

_PLENTY = 1 << 50


def available_memory(meminfo: Path = Path("/proc/meminfo"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be used without swapping, on the machine and in its container; a large number where neither says.

    Shared memory counts towards a container's limit too, and who exceeds that is killed.
    """
    available = _memory_of_cgroup(cgroup)
    with suppress(OSError, ValueError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(available, 1024 * int(line.split()[1]))
    return available


def _memory_of_cgroup(root: Path) -> int:
    """What is left of the cgroup's limit (v2, then v1), cached files counted as free; a large number without one."""
    for limit, used in (
        (root / "memory.max", root / "memory.current"),
        (root / "memory" / "memory.limit_in_bytes", root / "memory" / "memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # without a limit v2 says `max`
            found = dict(line.split() for line in limit.with_name("memory.stat").read_text().splitlines())
            cached = sum(int(found.get(f"total_{name}", found[name])) for name in ("active_file", "inactive_file"))
            return max(0, min(_PLENTY, int(limit.read_text())) - int(used.read_text()) + cached)
    return _PLENTY
