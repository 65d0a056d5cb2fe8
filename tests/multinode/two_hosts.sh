#!/usr/bin/env bash
# Two hosts on this machine: network namespaces NAME-1 and NAME-2 with addresses of their own,
# joined by one veth cable; for tests. It needs root and iproute2.
#
#   tests/multinode/two_hosts.sh up NAME        10.77.0.1 and 10.77.0.2, the interface is called emo0
#   tests/multinode/two_hosts.sh cut NAME       takes the cable out, as seen from both ends
#   tests/multinode/two_hosts.sh mend NAME
#   tests/multinode/two_hosts.sh down NAME      ends what still runs in them and removes them
#
# ip netns exec NAME-1 COMMAND runs a command on host 1. Namespaces of different names do not meet.
set -euo pipefail

usage() {
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

up() {
    local host
    for host in 1 2; do
        ip netns add "$NAME-$host"
        ip -n "$NAME-$host" link set lo up
    done
    ip -n "$NAME-1" link add emo0 type veth peer name emo0 netns "$NAME-2"
    for host in 1 2; do
        ip -n "$NAME-$host" address add "10.77.0.$host/24" dev emo0
        ip -n "$NAME-$host" link set emo0 up
    done
}

cut() {
    ip -n "$NAME-1" link set emo0 down
}

mend() {
    ip -n "$NAME-1" link set emo0 up
}

down() {
    local host pids
    for host in 1 2; do
        pids=$(ip netns pids "$NAME-$host" 2>/dev/null) || continue
        # shellcheck disable=SC2086  # one word a process
        [[ -z $pids ]] || kill -KILL $pids 2>/dev/null || true
        ip netns delete "$NAME-$host"
    done
}

[[ $# == 2 && $1 =~ ^(up|cut|mend|down)$ ]] || {
    usage >&2
    exit 2
}
NAME=$2
"$1"
