"""What decides a latency besides the code: processor, memory, allocator, GPU, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from ...runtime.counted import counted

PACKAGES = ("numpy", "onnxruntime", "onnxruntime-gpu", "torch", "openvino", "opencv-python", "matplotlib")
ALLOCATOR_VARIABLES = (
    "LD_PRELOAD",
    "GLIBC_TUNABLES",
    "MALLOC_ARENA_MAX",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_CONF",
)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "KMP_AFFINITY", "KMP_BLOCKTIME")
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """The machine of a report; empty strings and nulls where it does not tell.

    Attributes:
        cores, online_cores: cores that this process may use, and that the machine has.
        flags: instruction sets and features of the processor, as the kernel names them.
        caches: such as "L2 1 MiB", of the first core.
        memory_bytes: of the machine, or of the container where that has less.
        load: load average of the last minute when the bench began; well above 0 means that it was not quiet.
        environment: variables that steer allocators and threads, where they are set.
        packages: versions by name.
        gpus: name, memory, driver.
    """

    cpu: str
    cores: int
    online_cores: int
    flags: tuple[str, ...]
    caches: tuple[str, ...]
    governor: str
    virtual: bool
    memory_bytes: int
    huge_pages: str
    libc: str
    kernel: str
    python: str
    load: float
    environment: dict[str, str]
    packages: dict[str, str]
    gpus: tuple[str, ...]
    board: str
    power_mode: str

    def title(self) -> str:
        """One line for captions."""
        gpu = f", {self.gpus[0].split(',')[0]}" if self.gpus else ""
        wide = next((name for name in ("amx_tile", "avx512f", "avx2", "sve", "asimd") if name in self.flags), "")
        names = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}
        with_flags = f" ({names[wide]})" if wide else ""
        return f"{self.board or self.cpu}{with_flags}, {counted(self.cores, 'core')}{gpu}"


def examine_machine() -> Machine:
    """Look at the machine; changes nothing."""
    info = _cpuinfo()
    flags = tuple((info.get("flags") or info.get("Features") or "").split())
    return Machine(
        cpu=info.get("model name") or info.get("Model") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)),
        online_cores=os.cpu_count() or 1,
        flags=flags,
        caches=_caches(),
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        virtual="hypervisor" in flags,
        memory_bytes=memory_limit(),
        huge_pages=_text("/sys/kernel/mm/transparent_hugepage/enabled"),
        libc=" ".join(platform.libc_ver()).strip(),
        kernel=platform.release(),
        python=platform.python_version(),
        load=round(os.getloadavg()[0], 2),
        environment={
            name: os.environ[name] for name in (*ALLOCATOR_VARIABLES, *THREAD_VARIABLES) if name in os.environ
        },
        packages=_packages(),
        gpus=_gpus(),
        board=_text("/proc/device-tree/model").strip("\0 \n"),
        power_mode=_command(["nvpmodel", "-q"]).splitlines()[0] if shutil.which("nvpmodel") else "",
    )


def memory_limit() -> int:
    """Bytes of memory of the machine, or of the container where that has less."""
    total = _meminfo("MemTotal")
    limit = _text(CGROUP / "memory.max")
    return min(total, int(limit)) if limit.isdigit() else total


def memory_available() -> int:
    """Bytes that can still be taken without swapping or being killed."""
    free = _meminfo("MemAvailable")
    limit, used = _text(CGROUP / "memory.max"), _text(CGROUP / "memory.current")
    if limit.isdigit() and used.isdigit():
        # pages of files count as used though the kernel gives them up first
        cached = dict(line.split() for line in _text(CGROUP / "memory.stat").splitlines()).get("inactive_file", "0")
        free = min(free, int(limit) - int(used) + int(cached))
    return free


@dataclass(frozen=True)
class Resident:
    """Memory of this process in bytes: now, and the most since `reset_peak`."""

    now: int
    peak: int


def resident() -> Resident:
    fields = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmRSS", "VmHWM"):
            fields[name] = int(value.split()[0]) * 1024
    return Resident(fields.get("VmRSS", 0), fields.get("VmHWM", 0))


def reset_peak() -> None:
    """Let the kernel forget the peak so far; where it refuses, the peak is that of the whole process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def gpu_memory_used() -> int | None:
    """Bytes in use on the first GPU by everyone; None without one."""
    if shutil.which("nvidia-smi") is None:
        return None
    found = _command(["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"])
    first = found.splitlines()[0].strip() if found else ""
    return int(first) * 1024**2 if first.isdigit() else None


def _cpuinfo() -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in _text("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    return fields


def _caches() -> tuple[str, ...]:
    found = []
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        if size:
            found.append(f"L{level} {kind.lower()} {size}")
    return tuple(found)


def _packages() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> tuple[str, ...]:
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader"]
    return tuple(line.strip() for line in _command(query).splitlines())


def _command(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _meminfo(name: str) -> int:
    for line in _text("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""
