"""The GPUs of this host and who sits on them, as nvidia-smi tells.  No torch: it would cost seconds and memory."""

import shutil
import subprocess

from pydantic import BaseModel, ConfigDict

QUERY_TIMEOUT_S = 20.0
_MIB = 1 << 20


class Gpu(BaseModel):
    """One GPU; `pids` are the processes that compute on it, also those of other users and containers where visible."""

    model_config = ConfigDict(frozen=True)

    index: int
    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    pids: tuple[int, ...] = ()


def read_gpus() -> tuple[tuple[Gpu, ...], str | None]:
    """The GPUs, and why they cannot be told.  A host without nvidia-smi has none, and that is no problem."""
    if shutil.which("nvidia-smi") is None:
        return (), None
    try:
        gpus = _query("--query-gpu=index,uuid,name,memory.total,memory.free")
        apps = _query("--query-compute-apps=gpu_uuid,pid")
        return parse_gpus(gpus, apps), None
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi gives no answer within {QUERY_TIMEOUT_S:g} s"
    except (subprocess.CalledProcessError, OSError, ValueError) as error:
        said = getattr(error, "stdout", None) or str(error)
        return (), f"nvidia-smi fails: {' '.join(said.split())[:200]}"


def parse_gpus(gpus: str, apps: str) -> tuple[Gpu, ...]:
    """What nvidia-smi prints with --format=csv,noheader,nounits; memory is in MiB there."""
    pids: dict[str, list[int]] = {}
    for uuid, pid in _rows(apps, 2):
        pids.setdefault(uuid, []).append(int(pid))
    return tuple(
        Gpu(
            index=int(index),
            uuid=uuid,
            name=name,
            total_bytes=int(total) * _MIB,
            free_bytes=int(free) * _MIB,
            pids=tuple(sorted(pids.get(uuid, ()))),
        )
        for index, uuid, name, total, free in _rows(gpus, 5)
    )


def _rows(table: str, num_columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split(",")] for line in table.splitlines() if line.strip()]
    if any(len(row) != num_columns for row in rows):
        raise ValueError(f"nvidia-smi printed a line without its {num_columns} columns")
    return rows


def _query(what: str) -> str:
    argv = ["nvidia-smi", what, "--format=csv,noheader,nounits"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True)
    return done.stdout
