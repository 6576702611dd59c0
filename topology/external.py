"""What somebody else's launcher needs to start a planned group: torchrun, Slurm, Kubernetes (LeaderWorkerSet).  Pure.

All of them do the same two things: run the leader, a Celery worker with launcher=external, on the first host; and run a
keeper (`python -m hortator.topology.keeper`) for the ranks of every host, which joins the leader and waits for orders.
A keeper of ranks that the leader starts itself only holds their places.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple
from urllib.parse import urlsplit

from .address import host_port
from .errors import CannotStart
from .findings import counted
from .fleet import Fleet
from .identity import check_redis_of_recipe
from .orders import celery_command
from .plan import PlannedGroup
from .variables import check_variables

KEEPER_PORT = 7400
MASTER_PORT = 29_500
"""Of the first group; a further one whose leader is on the same host has the next."""

SECRET_FILE = "/etc/hortator/group/secret"  # noqa: S105
MAX_OBJECT_NAME = 40
STYLES = ("torchrun", "slurm", "kubernetes")
_SAY_IT = "${HORTATOR_REDIS_URL:?has a password, so it is not written here}"

_TORCHRUN = Template("""\
# Group $group: $size.$make_secret

# 1. The leader, on $first:
$settings \\
  $celery
""")

_TORCHRUN_NODE = Template("""
# $step. The keepers, on $host:
$devices$python -m torch.distributed.run --nnodes $num_hosts --nproc-per-node $per_host --node-rank $number \\
  --master-addr $first --master-port $master_port \\
  -m hortator.topology.keeper --join $address --secret-file $secret
""")

_MAKE_SECRET = Template("""  Once, and then the same file to every host:
#   mkdir -p $directory && (umask 077; openssl rand -hex 32 > $secret)""")

_SLURM = Template("""\
#!/bin/bash
# sbatch THIS_FILE starts group $group.$make_secret
#SBATCH --job-name=$group
#SBATCH --nodes=$num_hosts
#SBATCH --ntasks=$num_ranks
#SBATCH --ntasks-per-node=$per_host
$gpus#SBATCH --signal=B:TERM@60
set -eu

$exports
# The batch script runs on the first node; say its address yourself if its own name leads to 127.0.1.1 there.
export HORTATOR_CONTROL_HOST="$${HORTATOR_CONTROL_HOST:-$$(hostname)}"
$keepers
exec $celery
""")

_SRUN = Template("""
srun --kill-on-bad-exit=0 $python -m hortator.topology.keeper \\
  --join "$$HORTATOR_CONTROL_HOST:$port" --secret-file $secret &""")

_KUBERNETES = Template("""\
---
# Model $model on Kubernetes with the LeaderWorkerSet controller.  Secret: kubectl create secret generic hortator-group
# --from-literal=secret=$$(openssl rand -hex 32).  Models: a volume claim hortator-models.  Image: hortator-worker.
apiVersion: leaderworkerset.x-k8s.io/v1
kind: LeaderWorkerSet
metadata:
  name: $name
  labels: {app.kubernetes.io/part-of: hortator, app.kubernetes.io/component: group}
spec:
  replicas: $replicas
  startupPolicy: LeaderCreated
  leaderWorkerTemplate:
    size: $num_hosts
    restartPolicy: None # the leader restarts its ranks, and keepers join again, by themselves
    leaderTemplate:
      metadata:
        labels: {app.kubernetes.io/part-of: hortator, app.kubernetes.io/component: leader, hortator/model: $name}
      spec:
        terminationGracePeriodSeconds: $grace
        automountServiceAccountToken: false
        securityContext: &user
          {runAsNonRoot: true, runAsUser: 10001, runAsGroup: 10001, fsGroup: 10001,
           seccompProfile: {type: RuntimeDefault}}
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
            readinessProbe:
              exec: {command: [python, /opt/hortator/health/group.py]}
              periodSeconds: 10
              timeoutSeconds: 8
            resources: $resources
            securityContext: &rights {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
            volumeMounts: &mounts
              - {name: models, mountPath: $models, readOnly: true}
              - {name: secret, mountPath: /etc/hortator/group, readOnly: true}
              - {name: shm, mountPath: /dev/shm}
        volumes: &volumes
          - {name: models, persistentVolumeClaim: {claimName: hortator-models, readOnly: true}}
          - {name: secret, secret: {secretName: hortator-group, defaultMode: 0440}}
          - {name: shm, emptyDir: {medium: Memory, sizeLimit: 1Gi}}
    workerTemplate:
      metadata:
        labels: {app.kubernetes.io/part-of: hortator, app.kubernetes.io/component: peer, hortator/model: $name}
      spec:
        terminationGracePeriodSeconds: $grace
        automountServiceAccountToken: false
        securityContext: *user
        containers:
          - name: peer
            image: hortator-worker
            command: [python, -m, hortator.topology.keeper]
            args: ["--join=$$(LWS_LEADER_ADDRESS):$port", --secret-file=$secret, --ranks-per-node=$per_host]
            resources: $resources
            securityContext: *rights
            volumeMounts: *mounts
        volumes: *volumes
""")


class Recipe(NamedTuple):
    """`file`: a name that fits it."""

    file: str
    text: str


def recipes(
    style: str, fleet: Fleet, planned: Sequence[PlannedGroup], groups: Sequence[PlannedGroup], *, python: Path
) -> tuple[Recipe, ...]:
    """What these of the planned groups need: commands, an sbatch file for each, or a manifest for each model.

    Raises CannotStart for what the style cannot express, BadFleet for a Redis that its leaders would not reach."""
    if style not in STYLES:
        raise CannotStart(f"no recipe for {style!r}: there are {', '.join(STYLES)}")
    check_redis_of_recipe(fleet, (seats.host for group in planned for seats in group.hosts), style=style)
    match style:
        case "torchrun":
            numbers = numbers_on_hosts(planned)
            return tuple(
                Recipe(f"{group.name}.txt", _torchrun(fleet, group, python, numbers[group.name])) for group in groups
            )
        case "slurm":  # which picks the hosts itself, so that any two groups may meet on one
            numbers = {group.name: number for number, group in enumerate(planned)}
            return tuple(
                Recipe(f"{group.name}.sbatch", _slurm(fleet, group, python, numbers[group.name])) for group in groups
            )
        case _:
            return _kubernetes_of_models(fleet, groups)


def joined(found: Sequence[Recipe]) -> str:
    """All in one text.  Raises CannotStart for more than one sbatch file, of which only the first would start."""
    if len(found) > 1 and any(one.file.endswith(".sbatch") for one in found):
        raise CannotStart(
            f"an sbatch file starts one group, but these are {len(found)}:"
            " give --out DIR for a file each, or --group NAME for one"
        )
    return "\n".join(one.text for one in found)


def numbers_on_hosts(planned: Sequence[PlannedGroup]) -> dict[str, int]:
    """Each group's number among those whose leaders are on one host, by its name."""
    seen: Counter[str] = Counter()
    numbers = {}
    for group in planned:
        numbers[group.name] = seen[group.hosts[0].host]
        seen[group.hosts[0].host] += 1
    return numbers


def per_host(group: PlannedGroup) -> int:
    """Ranks on each host, which all three count alike."""
    sizes = {len(seats.devices) for seats in group.hosts}
    if len(sizes) > 1:
        raise CannotStart(
            f"group {group.name} has {' and '.join(map(str, sorted(sizes)))} ranks on its hosts: torchrun, Slurm and"
            " Kubernetes want as many on each; change the hostfile or the parallel sizes, or use --launcher ssh"
        )
    return sizes.pop()


def settings(fleet: Fleet, group: PlannedGroup, *, number: int = 0) -> dict[str, str]:
    """The leader's environment, but for what only its host knows."""
    if len(group.hosts) > 1:
        check_variables(fleet.rank_variables, launcher="external")
    own = {
        "HORTATOR_LAUNCHER": "external",
        "HORTATOR_FRONT_RANKS": str(per_host(group)),
        "HORTATOR_KEEPER_PORT": str(KEEPER_PORT + number),
        "HORTATOR_SECRET_FILE": _secret_file(fleet),
    }
    said = fleet.worker_environment(fleet.model_named(group.model))
    return {**fleet.environment, **said, "HORTATOR_REDIS_URL": fleet.redis_url, **own}


def _torchrun(fleet: Fleet, group: PlannedGroup, python: Path, number: int) -> str:
    first = group.hosts[0].host
    on_gpus = fleet.model_named(group.model).device != "cpu"
    devices = [{"CUDA_VISIBLE_DEVICES": ",".join(map(str, seats.devices))} if on_gpus else {} for seats in group.hosts]
    place = {"HORTATOR_GROUP": group.name, "HORTATOR_CONTROL_HOST": first} | devices[0]
    common = _common(fleet, group, python, number) | {
        "first": first,
        "address": host_port(first, KEEPER_PORT + number),
        "master_port": MASTER_PORT + number,
    }
    leader = _TORCHRUN.substitute(
        common,
        settings=" ".join(_assignments(settings(fleet, group, number=number) | place)),
        celery=shlex.join(celery_command(python, queue=group.model, group=group.name)),
    )
    if len(group.hosts) == 1:
        return leader
    return leader + "".join(
        _TORCHRUN_NODE.substitute(
            common,
            step=node + 2,
            host=seats.host,
            number=node,
            devices="".join(f"{name}={value} " for name, value in said.items()),
        )
        for node, (seats, said) in enumerate(zip(group.hosts, devices, strict=True))
    )


def _slurm(fleet: Fleet, group: PlannedGroup, python: Path, number: int) -> str:
    exports = settings(fleet, group, number=number) | {"HORTATOR_GROUP": group.name}
    on_gpus = fleet.model_named(group.model).device != "cpu"
    common = _common(fleet, group, python, number)
    return _SLURM.substitute(
        common,
        num_ranks=len(group.ranks),
        gpus=f"#SBATCH --gpus-per-node={per_host(group)}\n" if on_gpus else "",
        exports="\n".join(f"export {said}" for said in _assignments(exports)),
        keepers=_SRUN.substitute(common) if len(group.hosts) > 1 else "",
        celery=shlex.join(celery_command(python, queue=group.model, group=group.name)),
    )


def _kubernetes_of_models(fleet: Fleet, groups: Sequence[PlannedGroup]) -> tuple[Recipe, ...]:
    """One manifest a model, whose groups are its replicas."""
    replicas = Counter(group.model for group in groups)
    first = {group.model: group for group in reversed(groups)}
    names = {model: object_name(model) for model in replicas}
    for model, name in names.items():
        if others := [other for other in names if names[other] == name and other != model]:
            raise CannotStart(f"{model!r} and {others[0]!r} are both called {name} on Kubernetes: rename one")
    return tuple(
        Recipe(f"{names[model]}.yaml", _kubernetes(fleet, first[model], name=names[model], replicas=count))
        for model, count in replicas.items()
    )


def object_name(model: str) -> str:
    """A model's name as Kubernetes takes it: an RFC 1035 label, with room for the numbers that the controller appends.
    Raises CannotStart."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    name = name if name[:1].isalpha() else f"m-{name}"
    if len(name) > MAX_OBJECT_NAME:
        raise CannotStart(
            f"{model!r} is too long for Kubernetes: give the model a name of {MAX_OBJECT_NAME} characters"
        )
    return name


def _kubernetes(fleet: Fleet, group: PlannedGroup, *, name: str, replicas: int) -> str:
    spec = fleet.model_named(group.model)
    variables = settings(fleet, group) | {"HORTATOR_SECRET_FILE": SECRET_FILE}
    password = _has_password(fleet.redis_url)
    if password:
        del variables["HORTATOR_REDIS_URL"]
    lines = [f"{{name: {name}, value: {json.dumps(value)}}}" for name, value in variables.items()]
    if password:
        source = "{secretKeyRef: {name: hortator-redis, key: url}}"
        lines.append(f"{{name: HORTATOR_REDIS_URL, valueFrom: {source}}}")
    limits = {} if spec.device == "cpu" else {"limits": {"nvidia.com/gpu": per_host(group)}}
    command = celery_command(Path("python"), queue=spec.name, group="$(HORTATOR_GROUP)")
    return _KUBERNETES.substitute(
        _common(fleet, group, Path("python"), 0) | {"secret": SECRET_FILE},
        model=json.dumps(spec.name),
        name=name,
        replicas=replicas,
        grace=round(spec.grace_s) + 15,
        celery=json.dumps(command),
        env="\n".join(f"              - {line}" for line in lines),
        resources=json.dumps(limits),
        models=json.dumps(str(spec.path.parent if spec.path else "/models")),
    )


def _common(fleet: Fleet, group: PlannedGroup, python: Path, number: int) -> dict[str, object]:
    secret = _secret_file(fleet)
    make = _MAKE_SECRET.substitute(secret=shlex.quote(secret), directory=shlex.quote(str(Path(secret).parent)))
    return {
        "group": group.name,
        "size": f"{counted(len(group.hosts), 'host')} of {counted(per_host(group), 'rank')}",
        "num_hosts": len(group.hosts),
        "per_host": per_host(group),
        "port": KEEPER_PORT + number,
        "secret": shlex.quote(secret),
        "make_secret": make if len(group.hosts) > 1 else "",
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
