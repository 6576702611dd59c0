"""What loading takes of this process's memory:  python footprint.py CHECKPOINT PP_RANK PP_SIZE TP_RANK TP_SIZE ...

Prints, for each place in a group, the bytes that its parameters take and by how much the process grew at the most.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from hortator.workers.engine import model as model_module
from hortator.workers.engine.model import load_model, read_config
from tests.workers.engine.meshes import Stage


def resident(field: str) -> int:
    """Bytes: VmRSS is now, VmHWM the most since the last reset."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(field)).split()[1])


def measure(path: Path, place: Stage) -> dict[str, int]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = load_model(read_config(path), place)
    parameters = {id(p): p.nbytes for m in (model.body, model.head) if m is not None for p in m.parameters()}
    return {"share": sum(parameters.values()), "grown": resident("VmHWM") - before}


def main(path: Path, numbers: list[int]) -> None:
    torch.set_num_threads(1)
    setattr(model_module, "parallel_linear", lambda linear, *_: linear)  # noqa: B010 - no other ranks here
    quadruples = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
    places = [Stage(pp, pp_size, tp, tp_size) for pp, pp_size, tp, tp_size in quadruples]
    measure(path, places[-1])  # what is imported and kept once does not count
    print(json.dumps([measure(path, place) for place in places]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(number) for number in sys.argv[2:]])
