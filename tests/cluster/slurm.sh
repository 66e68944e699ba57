#!/usr/bin/env bash
# A Slurm of two nodes on this machine and a run of this repository on it: set up in a temporary
# folder, torn down at the end. Needs root and Debian's slurm-wlm and munge.
#
#   tests/cluster/slurm.sh OUT [kill] SNAKEMAKE_ARGUMENTS...
#   tests/cluster/slurm.sh /tmp/out kill --config params=params/smoke.yaml
#
# A hash of every artefact goes to OUT. With `kill` the node that trains experts dies
# in the middle, with all that it runs.
set -euo pipefail
if [ -z "${INSIDE:-}" ]; then  # own mounts and process ids: when this ends, nothing of it is left
    INSIDE=1 exec unshare --mount --pid --fork --kill-child --mount-proc "$0" "$@"
fi
out=$(realpath -m "$1")
shift
python=${PYTHON:-.venv/bin/python}
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
work=$(mktemp -d)
port=$((20000 + RANDOM % 10000))
trap 'kill -9 $(jobs -p) 2> /dev/null; rm -rf "$work"' EXIT
chmod 755 "$work"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work"
cd "$work"
mkdir slurm

cat > slurm/slurm.conf << CONF
ClusterName=deme
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$work/slurm/munge.socket
CredType=cred/munge
StateSaveLocation=$work/slurm
SlurmdSpoolDir=$work/slurm/%n
SlurmctldPidFile=$work/slurm/slurmctld.pid
SlurmdPidFile=$work/slurm/%n.pid
SlurmctldLogFile=$work/slurm/slurmctld.log
SlurmdLogFile=$work/slurm/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=5
MinJobAge=3600
NodeName=n0 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=1 RealMemory=24000
NodeName=n1 NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=1 RealMemory=24000
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE
CONF
mount --bind slurm /etc/slurm
export PYTHONPATH=$work

head -c 1024 /dev/urandom > slurm/munge.key
chmod 400 slurm/munge.key
munged --force --foreground --key-file="$work/slurm/munge.key" \
    --socket="$work/slurm/munge.socket" --pid-file="$work/slurm/munge.pid" \
    --seed-file="$work/slurm/munge.seed" --log-file="$work/slurm/munge.log" 2> /dev/null &
until [ -S slurm/munge.socket ]; do sleep 0.2; done
slurmctld -D > /dev/null 2>&1 &
declare -A node
for name in n0 n1; do  # with its own process ids, so that all of a node dies at once
    unshare --pid --fork --kill-child --mount-proc slurmd -D -N $name > /dev/null 2>&1 &
    node[$name]=$!
done
for _ in $(seq 60); do
    [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ] && break
    sleep 1
done

kill_the_training_node() {
    until victim=$(squeue --noheader --states=RUNNING --format='%N %k' | grep make_deme) &&
        compgen -G 'runs/store/.partial/deme-2of*/out' > /dev/null; do sleep 0.2; done
    kill -9 "${node[${victim%% *}]}"
    echo "== $(date +%T) dead, with all that it ran: $victim"
}
killer=
if [ "${1:-}" = kill ]; then
    shift
    kill_the_training_node &
    killer=$!
fi
here=(--slurm-status-command squeue --slurm-init-seconds-before-status-checks 5)  # no accounting
"$python" -m snakemake --profile params/profiles/slurm "${here[@]}" "$@"
[ -z "$killer" ] || wait "$killer"
for job in $(squeue --noheader --states=all --format=%A | sort -n); do
    scontrol --oneliner show job "$job" |
        grep -oE '(JobState|Restarts|NodeList|BatchHost|RunTime|Comment)=[^ ]*' | paste -sd' '
done
"$python" - > "$out" << 'PYTHON'
import json, pathlib
for path in sorted(pathlib.Path("runs/store").glob("*/record.json")):
    print(json.loads(path.read_text())["content"], path.parent.name)
PYTHON
