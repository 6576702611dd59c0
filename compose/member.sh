#!/bin/sh
# A container's part in a model group of this compose project: `member leader`, `member peer`, `member health`.
#
# Containers know little of each other, but Docker's name server knows the name of the one with this address:
# PROJECT_peer_2 (PROJECT-peer-2 with compose 2) joins PROJECT_leader_2.  So groups come by scaling both services alike.
set -eu

secret=${HORTATOR_SECRET_FILE:?}
address=$(hostname -i)
address=${address%% *}

container_name() {
    # "ADDRESS NAME.NETWORK"; /etc/hosts, which would answer with the container's id, is not asked
    answer=$(getent -s hosts:dns hosts "$1") || return 0
    set -- $answer
    echo "${2%%.*}"
}

name=$(container_name "$address")
group=${HORTATOR_GROUP:-${name:-$(hostname)}}

case "${1:-}" in
leader)
    # One secret for the whole project, made by the first leader that looks; `ln` fails if another one was quicker.
    if [ ! -s "$secret" ]; then
        umask 077
        head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > "$secret.$name.$$"
        ln "$secret.$name.$$" "$secret" 2>/dev/null || true
        rm "$secret.$name.$$"
    fi
    export HORTATOR_GROUP="$group"
    export HORTATOR_CONTROL_HOST="${HORTATOR_CONTROL_HOST:-$address}"
    exec hortator worker
    ;;
health)
    HORTATOR_GROUP="$group" exec python /opt/hortator/health/group.py
    ;;
peer)
    leader=$(echo "$name" | sed -n 's/^\(.*[_-]\)peer\([_-][0-9][0-9]*\)$/\1leader\2/p')
    until [ -s "$secret" ]; do sleep 0.5; done
    shift # --ranks and the like
    exec python -m hortator.topology.keeper \
        --join "${leader:-leader}:${HORTATOR_KEEPER_PORT:?}" --secret-file "$secret" "$@"
    ;;
*)
    echo "usage: member leader | member peer [OPTIONS OF THE KEEPER] | member health" >&2
    exit 2
    ;;
esac
