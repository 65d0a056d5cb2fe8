#!/usr/bin/env bash
# A Slurm cluster of two nodes, n1 and n2, on this machine, for tests; it needs root and Debian's
# slurm-wlm and munge.
#
#   tests/multinode/slurm_cluster.sh up DIR      then: export SLURM_CONF=DIR/slurm.conf
#   tests/multinode/slurm_cluster.sh down DIR
#
# All files, sockets, keys and process ids lie in DIR, ports are free ones: clusters in several
# folders do not meet. `down` ends the processes of DIR and nothing else.
set -euo pipefail

usage() {
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# free_ports N: N TCP ports that nobody listens at.
free_ports() {
    python3 - "$1" <<'PYTHON'
import socket
import sys

sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
for each in sockets:
    each.bind(("127.0.0.1", 0))
print(*(each.getsockname()[1] for each in sockets))
PYTHON
}

# cred_expire is how long a requeued job waits; Slurm takes less than 5 s for its default of 120.
write_configuration() {
    local controller n1 n2 host cores
    read -r controller n1 n2 < <(free_ports 3)
    host=$(hostname -s)
    cores=$(nproc)
    cat >"$DIR/slurm.conf" <<CONF
ClusterName=two
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket,cred_expire=5
CredType=cred/munge
CryptoType=crypto/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool-%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/slurmd-%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
KillWait=${KILL_WAIT_S:-30}
InactiveLimit=0
MinJobAge=3600
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$n1 CPUs=$cores RealMemory=1000 State=UNKNOWN
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$n2 CPUs=$cores RealMemory=1000 State=UNKNOWN
PartitionName=two Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
}

start_munge() {
    dd if=/dev/urandom of="$DIR/munge.key" bs=1024 count=1 status=none
    chmod 400 "$DIR/munge.key"
    # --force: the key and the socket belong to root, who runs it.
    /usr/sbin/munged --force --key-file "$DIR/munge.key" --socket "$DIR/munge.socket" \
        --pid-file "$DIR/munged.pid" --log-file "$DIR/munged.log" \
        --seed-file "$DIR/munged.seed" 2>"$DIR/munged.err"
}

up() {
    local tool node
    for tool in munged slurmctld slurmd; do
        [[ -x /usr/sbin/$tool ]] || {
            echo "$tool: expected Debian's slurm-wlm and munge: apt-get install slurm-wlm munge" >&2
            exit 1
        }
    done
    [[ $(id -u) == 0 ]] || {
        echo "user $(id -un): expected root, as whom the daemons run" >&2
        exit 1
    }
    mkdir -p "$DIR/state" "$DIR/spool-n1" "$DIR/spool-n2"
    chmod 711 "$DIR"
    write_configuration
    start_munge
    export SLURM_CONF=$DIR/slurm.conf
    /usr/sbin/slurmctld -f "$SLURM_CONF"
    for node in n1 n2; do
        /usr/sbin/slurmd -f "$SLURM_CONF" -N "$node"
    done
    wait_until_idle
}

wait_until_idle() {
    local _
    for _ in $(seq 60); do
        [[ $(sinfo --noheader --nodes n1,n2 --states idle --format %D 2>/dev/null) == 2 ]] && return
        sleep 0.5
    done
    echo "nodes are not idle after 30 s:" >&2
    sinfo >&2 || true
    tail -n 5 "$DIR"/*.log >&2
    exit 1
}

down() {
    local file pid pids=()
    export SLURM_CONF=$DIR/slurm.conf
    if timeout 5 scontrol ping &>/dev/null; then
        timeout 10 scancel --user root || true
    fi
    for file in "$DIR"/slurmd-n?.pid "$DIR/slurmctld.pid" "$DIR/munged.pid"; do
        [[ -s $file ]] || continue
        pid=$(<"$file")
        # A recycled number is not ours.
        [[ $(readlink "/proc/$pid/exe" 2>/dev/null) =~ /(slurmd|slurmctld|munged)(-wlm)?$ ]] || continue
        kill "$pid" 2>/dev/null && pids+=("$pid")
    done
    for pid in "${pids[@]}"; do
        timeout 20 tail --pid "$pid" -f /dev/null || kill -KILL "$pid" 2>/dev/null || true
    done
}

[[ $# == 2 && ($1 == up || $1 == down) ]] || {
    usage >&2
    exit 2
}
mkdir -p "$2"
DIR=$(cd "$2" && pwd)
"$1"
