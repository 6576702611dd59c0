"""What somebody else's launcher needs to start a planned group: torchrun, Slurm, Kubernetes (LeaderWorkerSet).  Pure.

All of them do the same two things: run the leader, a Celery worker with launcher=external, on the first host; and run a
keeper (`python -m hortator.topology.keeper`) for the ranks of every host, which joins the leader and waits for orders.
A keeper of ranks that the leader starts itself only holds their places.
"""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template
from urllib.parse import urlsplit

from .errors import CannotStart
from .fleet import Fleet
from .orders import celery_command
from .plan import PlannedGroup

KEEPER_PORT = 7400
SECRET_FILE = "/etc/hortator/group/secret"  # noqa: S105
STYLES = ("torchrun", "slurm", "kubernetes")
_SAY_IT = "${HORTATOR_REDIS_URL:?has a password, so it is not written here}"

_TORCHRUN = Template("""\
# Group $group: $num_hosts hosts of $per_host ranks.  The same secret file on every host first:
#   openssl rand -hex 32 > $secret && chmod 600 $secret

# 1. The leader, on $first:
$settings \\
  $celery

# 2. On every host, NODE_RANK counting from 0 in this order: $hosts
$python -m torch.distributed.run --nnodes $num_hosts --nproc-per-node $per_host --node-rank "$$NODE_RANK" \\
  --master-addr $first --master-port 29500 \\
  -m hortator.topology.keeper --join $address --secret-file $secret
""")

_SLURM = Template("""\
#!/bin/bash
# sbatch THIS_FILE starts group $group.  The secret file must be on a shared file system, made once:
#   openssl rand -hex 32 > $secret && chmod 600 $secret
#SBATCH --job-name=$group
#SBATCH --nodes=$num_hosts
#SBATCH --ntasks=$num_ranks
#SBATCH --ntasks-per-node=$per_host
$gpus#SBATCH --signal=B:TERM@60
set -eu

$exports
export HORTATOR_CONTROL_HOST="$$(hostname)"  # the batch script runs on the first node

srun --kill-on-bad-exit=0 $python -m hortator.topology.keeper \\
  --join "$$HORTATOR_CONTROL_HOST:$port" --secret-file $secret &
exec $celery
""")

_KUBERNETES = Template("""\
# Model $model on Kubernetes with the LeaderWorkerSet controller.  Secret: kubectl create secret generic hortator-group
# --from-literal=secret=$$(openssl rand -hex 32).  Models: a volume claim hortator-models.  Image: hortator-worker.
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: $name
spec:
  replicas: $replicas
  startupPolicy: LeaderCreated
  leaderWorkerTemplate:
    size: $num_hosts
    restartPolicy: None # the leader restarts its ranks, and keepers join again, by themselves
    leaderTemplate:
      spec:
        terminationGracePeriodSeconds: $grace
        containers:
          - name: leader
            image: hortator-worker
            command: $celery
            env:
              - name: HORTATOR_GROUP
                valueFrom: {fieldRef: {fieldPath: metadata.name}}
              - name: HORTATOR_CONTROL_HOST
                valueFrom: {fieldRef: {fieldPath: status.podIP}}
$env
            ports: [{name: keepers, containerPort: $port}]
            resources: $resources
            volumeMounts: &mounts
              - {name: models, mountPath: $models, readOnly: true}
              - {name: secret, mountPath: /etc/hortator/group, readOnly: true}
              - {name: shm, mountPath: /dev/shm}
        volumes: &volumes
          - {name: models, persistentVolumeClaim: {claimName: hortator-models, readOnly: true}}
          - {name: secret, secret: {secretName: hortator-group, defaultMode: 0440}}
          - {name: shm, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
    workerTemplate:
      spec:
        terminationGracePeriodSeconds: $grace
        containers:
          - name: peer
            image: hortator-worker
            command: [python, -m, hortator.topology.keeper]
            args: ["--join=$$(LWS_LEADER_ADDRESS):$port", --secret-file=$secret, --ranks-per-node=$per_host]
            resources: $resources
            volumeMounts: *mounts
        volumes: *volumes
""")


def recipe(style: str, fleet: Fleet, group: PlannedGroup, *, python: Path) -> str:
    """The commands, the sbatch file or the manifest.  Raises CannotStart for what the style cannot express."""
    match style:
        case "torchrun":
            return _torchrun(fleet, group, python)
        case "slurm":
            return _slurm(fleet, group, python)
        case "kubernetes":
            return _kubernetes(fleet, group)
        case _:
            raise CannotStart(f"no recipe for {style!r}: there are {', '.join(STYLES)}")


def per_host(group: PlannedGroup) -> int:
    """Ranks on each host, which all three count alike."""
    sizes = {len(seats.devices) for seats in group.hosts}
    if len(sizes) > 1:
        raise CannotStart(
            f"group {group.name} has {' and '.join(map(str, sorted(sizes)))} ranks on its hosts: torchrun, Slurm and"
            " Kubernetes want as many on each; change the hostfile or the parallel sizes, or use --launcher ssh"
        )
    return sizes.pop()


def settings(fleet: Fleet, group: PlannedGroup) -> dict[str, str]:
    """The leader's environment, but for what only its host knows."""
    own = {
        "HORTATOR_LAUNCHER": "external",
        "HORTATOR_FRONT_RANKS": str(per_host(group)),
        "HORTATOR_KEEPER_PORT": str(KEEPER_PORT),
        "HORTATOR_SECRET_FILE": _secret_file(fleet),
    }
    said = fleet.worker_environment(fleet.model_named(group.model))
    return {**fleet.environment, **said, "HORTATOR_REDIS_URL": fleet.redis_url, **own}


def _torchrun(fleet: Fleet, group: PlannedGroup, python: Path) -> str:
    first = group.hosts[0].host
    place = {"HORTATOR_GROUP": group.name, "HORTATOR_CONTROL_HOST": first}
    return _TORCHRUN.substitute(
        _common(fleet, group, python),
        first=first,
        hosts=", ".join(seats.host for seats in group.hosts),
        address=f"[{first}]:{KEEPER_PORT}" if ":" in first else f"{first}:{KEEPER_PORT}",
        settings=" ".join(_assignments(settings(fleet, group) | place)),
        celery=shlex.join(celery_command(python, queue=group.model, group=group.name)),
    )


def _slurm(fleet: Fleet, group: PlannedGroup, python: Path) -> str:
    exports = settings(fleet, group) | {"HORTATOR_GROUP": group.name}
    on_gpus = fleet.model_named(group.model).device != "cpu"
    return _SLURM.substitute(
        _common(fleet, group, python),
        num_ranks=len(group.ranks),
        gpus=f"#SBATCH --gpus-per-node={per_host(group)}\n" if on_gpus else "",
        exports="\n".join(f"export {said}" for said in _assignments(exports)),
        celery=shlex.join(celery_command(python, queue=group.model, group=group.name)),
    )


def _kubernetes(fleet: Fleet, group: PlannedGroup) -> str:
    spec = fleet.model_named(group.model)
    variables = settings(fleet, group)
    password = _has_password(fleet.redis_url)
    if password:
        del variables["HORTATOR_REDIS_URL"]
    lines = [f"{{name: {name}, value: {json.dumps(value)}}}" for name, value in variables.items()]
    if password:
        source = "{secretKeyRef: {name: hortator-redis, key: url}}"
        lines.append(f"{{name: HORTATOR_REDIS_URL, valueFrom: {source}}}")
    limits = {} if spec.device == "cpu" else {"limits": {"nvidia.com/gpu": per_host(group)}}
    name = spec.name.replace("/", "-").replace(".", "-").replace("_", "-").lower()
    command = celery_command(Path("python"), queue=spec.name, group="$(HORTATOR_GROUP)")
    return _KUBERNETES.substitute(
        _common(fleet, group, Path("python")),
        model=json.dumps(spec.name),
        name=json.dumps(name),
        replicas=spec.replicas,
        grace=round(spec.grace_s) + 15,
        celery=json.dumps(command),
        env="\n".join(f"              - {line}" for line in lines),
        resources=json.dumps(limits),
        models=json.dumps(str(spec.path.parent if spec.path else "/models")),
    )


def _common(fleet: Fleet, group: PlannedGroup, python: Path) -> dict[str, object]:
    return {
        "group": group.name,
        "num_hosts": len(group.hosts),
        "per_host": per_host(group),
        "port": KEEPER_PORT,
        "secret": _secret_file(fleet),
        "python": shlex.quote(str(python)),
    }


def _assignments(variables: Mapping[str, str]) -> list[str]:
    """For a shell; a URL with a password is left to whoever runs it."""
    return [
        f'{name}="{_SAY_IT}"'
        if name == "HORTATOR_REDIS_URL" and _has_password(value)
        else f"{name}={shlex.quote(value)}"
        for name, value in variables.items()
    ]


def _secret_file(fleet: Fleet) -> str:
    return fleet.environment.get("HORTATOR_SECRET_FILE", SECRET_FILE)


def _has_password(url: str) -> bool:
    return "@" in urlsplit(url).netloc
