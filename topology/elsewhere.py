"""Settings whose place in a fleet file is another than one may think: which it is, in words.  Pure."""

from .variables import OWN_PREFIX

RULES = frozenset(
    {
        *("journal_ttl_s", "idempotency_ttl_s", "require_known_model", "max_queued_per_model", "max_queued_per_tenant"),
        *("max_message_bytes", "max_letters", "max_letters_bytes", "max_attempts", "default_deadline_s"),
        "memory_headroom",
    }
)
"""Of the whole namespace: producers keep them, too."""

_IN_SSH = "how hosts are reached is said under [ssh]"
OTHER_PLACES = {
    "HORTATOR_MODEL": "a model's queue is its 'name'",
    "HORTATOR_MODEL_PATH": "a model's directory is its 'path'",
    "HORTATOR_GROUP": "groups are named by model and replica: leave it out",
    "HORTATOR_REDIS_URL": "it is the same for all models: put it at the top of the file",
    "HORTATOR_NAMESPACE": "it is the same for all models: put it at the top of the file",
    "HORTATOR_HOSTS": "the plan decides where a group runs: leave it out",
    "HORTATOR_FRONT_RANKS": "the plan decides where a group runs: leave it out",
    "HORTATOR_LAUNCHER": "it is an option of the command: hortator up --launcher",
    "HORTATOR_RANK_VARIABLES": "every rank gets what stands in [environment]: leave it out",
    "HORTATOR_REMOTE_PYTHON": "it is 'python', at the top of the file",
    "HORTATOR_SSH_USER": f"{_IN_SSH}, as user",
    "HORTATOR_SSH_PORT": f"{_IN_SSH}, as port",
    "HORTATOR_SSH_IDENTITY_FILE": f"{_IN_SSH}, as identity_file",
    "HORTATOR_SSH_KNOWN_HOSTS_FILE": f"{_IN_SSH}, as known_hosts_file",
    "HORTATOR_SSH_CONNECT_TIMEOUT_S": f"{_IN_SSH}, as connect_timeout_s",
}
"""Of variables that the leader is told by whoever starts it."""

PLACES = {name.removeprefix(OWN_PREFIX).lower(): place for name, place in OTHER_PLACES.items()} | {
    "control_host": "the plan decides where a group runs: leave it out",
    "control_port": "ports are chosen when a group starts: leave it out",
    "store_port": "ports are chosen when a group starts: leave it out",
    "num_gpus": "a replica takes tensor_parallel_size x pipeline_parallel_size GPUs: leave it out",
}
"""Of keys that somebody may look for in a model's table."""
