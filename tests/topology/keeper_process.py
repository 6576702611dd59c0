"""A keeper whose ranks are any command: `python keeper_process.py PORT KEY RANKS REJOIN CODE`."""

import sys

from hortator.topology.errors import TopologyError
from hortator.topology.join import Place
from hortator.topology.keeper import Errand, Keeper, Rejoin

if __name__ == "__main__":
    port, key, ranks, rejoin, token, code = sys.argv[1:]
    numbers = tuple(map(int, ranks.split(",")))
    place = Place(numbers, tuple(range(len(numbers))))
    errand = Errand(("127.0.0.1", int(port)), bytes.fromhex(key), place, Rejoin[rejoin], token)
    try:
        Keeper(errand, argv=(sys.executable, "-c", code)).run(patience_s=5.0)
    except TopologyError as error:
        sys.exit(f"{type(error).__name__}: {error}")
