"""On a worker's path, this gives rank 1 another model directory than it was told, as if its node had other weights."""

import json
import os

config = json.loads(os.environ.get("HORTATOR_RANK_CONFIG", "null"))
if config and config["rank"] == 1:
    config["model_path"] = os.environ["OTHER_MODEL_PATH"]
    os.environ["HORTATOR_RANK_CONFIG"] = json.dumps(config)
