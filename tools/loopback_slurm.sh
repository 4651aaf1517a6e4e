#!/usr/bin/env bash
# A SLURM cluster of one node on this machine, to try and test jobs on: its controller, its node and munge, without
# systemd, accounting or cgroups. It needs root and Debian's packages: apt-get install slurm-wlm munge
#
#   tools/loopback_slurm.sh start FOLDER [CPUS]    starts it; FOLDER is made and holds all its files
#   export SLURM_CONF=FOLDER/slurm.conf            then sbatch, squeue and srun find it; the partition is "loopback"
#   tools/loopback_slurm.sh stop FOLDER            ends it with all its jobs
set -euo pipefail

usage() {
  sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
  exit 2
}

[[ $# -ge 2 ]] || usage
command=$1
folder=$(realpath -m "$2")
PATH=$PATH:/usr/sbin:/sbin
host=$(hostname -s)

free_ports() {
  python3 - <<'PYTHON'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(one.getsockname()[1] for one in sockets))
PYTHON
}

configure() {
  local cpus=$1 ports
  read -ra ports <<<"$(free_ports)"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=loopback
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# Credentials live as long as a requeued job waits before it starts again.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
# Requeued jobs are looked at by the periodic schedulers alone, by default twice a minute.
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
# The machine may have fewer CPUs and less memory than jobs ask for.
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=1000000 State=UNKNOWN
PartitionName=loopback Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
}

start() {
  if [[ $EUID -ne 0 ]]; then
    echo "$0: needs root" >&2
    exit 1
  fi
  for program in munged slurmctld slurmd sbatch; do
    if ! command -v "$program" >/dev/null; then
      echo "$0: there is no $program; apt-get install slurm-wlm munge" >&2
      exit 1
    fi
  done
  mkdir -p "$folder/state" "$folder/spool"
  chmod 755 "$folder"
  configure "$1"
  export SLURM_CONF=$folder/slurm.conf
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munge.pid" \
    --log-file="$folder/munge.log" --seed-file="$folder/munge.seed" 2>>"$folder/munge.log"
  slurmctld
  slurmd -N "$host"
  for _ in $(seq 150); do
    if [[ $(sinfo --noheader --format=%T 2>/dev/null) == idle ]]; then
      echo "export SLURM_CONF=$SLURM_CONF"
      return
    fi
    sleep 0.2
  done
  echo "$0: the node did not become idle; see $folder/*.log" >&2
  tail -n 5 "$folder"/*.log >&2
  stop
  exit 1
}

alive() {
  local state
  state=$(sed 's/.*) //' "/proc/$1/stat" 2>/dev/null) && [[ $state != Z* ]]
}

stop() {
  export SLURM_CONF=$folder/slurm.conf
  timeout 10 scancel --user=root --signal=KILL --full 2>/dev/null || true
  timeout 10 scancel --user=root 2>/dev/null || true
  local name pid
  for name in slurmd slurmctld munge; do
    if [[ -s $folder/$name.pid ]]; then
      pid=$(<"$folder/$name.pid")
      kill "$pid" 2>/dev/null || true
      for _ in $(seq 50); do
        alive "$pid" || break
        sleep 0.1
      done
      kill -KILL "$pid" 2>/dev/null || true
    fi
  done
}

case $command in
  start) start "${3:-2}" ;;
  stop) stop ;;
  *) usage ;;
esac
