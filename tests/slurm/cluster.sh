#!/usr/bin/env bash
# A Slurm of this one machine, of the user who calls: bash tests/slurm/cluster.sh start|stop DIRECTORY
# DIRECTORY (empty, with a short path, as sockets have one) gets the configuration, the state and the logs; then
# SLURM_CONF=DIRECTORY/slurm.conf lets sbatch, srun and the others find it.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin # where Debian has the daemons
command=$1
directory=$(realpath "$2")
daemons=(munged slurmctld slurmd)
patience=30 # seconds that a daemon may take to start or to end
export SLURM_CONF=$directory/slurm.conf

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# Free ports, one a line.
free_ports() {
    python3 -c '
import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in sockets), sep="\n")' "$1"
}

write_configuration() {
    local user host cores controller node
    user=$(id -un)
    host=$(hostname -s)
    cores=$(nproc)
    { read -r controller && read -r node; } < <(free_ports 2)
    # Two ranks need two processors, also where the machine has one. A requeued job waits until its credential has expired.
    cat >"$SLURM_CONF" <<END
ClusterName=here
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$node
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket,cred_expire=10
CredType=cred/munge
StateSaveLocation=$directory/state
SlurmdSpoolDir=$directory/spool
SlurmctldPidFile=$directory/slurmctld.pid
SlurmdPidFile=$directory/slurmd.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdLogFile=$directory/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
KillWait=10
ReturnToService=2
MpiDefault=none
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cores > 2 ? cores : 2)) State=UNKNOWN
PartitionName=tests Nodes=$host Default=YES State=UP
END
}

start() {
    [ -z "$(ls -A "$directory")" ] || fail "$directory is not empty"
    mkdir "$directory/state" "$directory/spool"
    write_configuration
    (umask 077 && head -c 1024 /dev/urandom >"$directory/munge.key")
    munged --force --key-file="$directory/munge.key" --socket="$directory/munge.socket" \
        --pid-file="$directory/munged.pid" --log-file="$directory/munged.log" --seed-file="$directory/munged.seed"
    slurmctld
    slurmd
    wait_until "the node comes up" node_is_idle
}

node_is_idle() {
    [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]
}

stop() {
    local daemon pid
    # Jobs outlive the daemons.
    if squeue >/dev/null 2>&1; then
        scancel --user="$(id -un)"
        wait_until "all jobs end" no_job_is_left
    fi
    for daemon in slurmd slurmctld munged; do
        pid=$(cat "$directory/$daemon.pid" 2>/dev/null) || continue
        kill "$pid" 2>/dev/null || continue
        wait_until "$daemon ends" has_ended "$pid"
    done
}

no_job_is_left() {
    [ -z "$(squeue --noheader)" ]
}

has_ended() {
    ! kill -0 "$1" 2>/dev/null
}

# Call a command until it succeeds.
wait_until() {
    local what=$1 deadline=$((SECONDS + patience))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$deadline" ] || fail "waited $patience seconds until $what; see the logs in $directory"
        sleep 0.2
    done
}

for daemon in "${daemons[@]}"; do
    type -P "$daemon" >/dev/null || fail "$daemon is not installed (Debian: apt-get install slurm-wlm munge)"
done
case $command in
    start) start ;;
    stop) stop ;;
    *) fail "say start or stop, not '$command'" ;;
esac
