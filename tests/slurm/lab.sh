#!/bin/bash
# lab.sh: a real Slurm cluster on one Linux machine, without systemd or cgroups.
#
#   install [PKG...]   install Slurm and munge (and PKG...) with apt-get
#   up | down          start / end the cluster; both may be repeated
#   status             hosts, cables, nodes and jobs
#   run CMD...         run CMD on the login host, in the current directory
#   on HOST CMD...     run CMD on HOST (node1, node2, ...), outside any job
#   cut NODE           unplug NODE's network cable; its processes go on
#   crash NODE         NODE loses power: unplugged, and every process ended
#   heal NODE          plug NODE in again; boot it, or start its slurmd, if need be
#
# Each host is a set of network, PID, mount, UTS and IPC namespaces: it has its own
# hostname, address, /run and /dev/shm, and shares all other files, as on a parallel file
# system.  "login" runs slurmctld and the bridge that the nodes are plugged into.  Nothing
# can be reached from, or reaches, the machine's own network.  Logs: SLURM_LAB_DIR/log.
#
# Environment:
#   SLURM_LAB_DIR=/tmp/slurm-lab   where it keeps its files; several labs, each with its own, do not see each other
# and, read by `up`:
#   SLURM_LAB_NODES=2      number of nodes
#   SLURM_LAB_CPUS=16      CPUs per node, as Slurm sees it (no CPU is bound or reserved)
#   SLURM_LAB_GPUS=8       GPUs per node, likewise (there need not be any)
#   SLURM_LAB_LOCAL=       directories, such as a cache, that each host has for itself
set -eu
LAB=${SLURM_LAB_DIR:-/tmp/slurm-lab}
NET=10.77.0                       # login is .1, nodeN is .(10+N)
NODES=${SLURM_LAB_NODES:-2} CPUS=${SLURM_LAB_CPUS:-16} GPUS=${SLURM_LAB_GPUS:-8}
SELF=$(readlink -f "$0")

die() { echo "lab.sh: $*" >&2; exit 1; }
wanted() { echo login; for ((i = 1; i <= NODES; i++)); do echo "node$i"; done; }
started() { [ ! -d "$LAB/pid" ] || ls -v "$LAB/pid"; }
isnode() { [[ ${1:-} = node* && -e $LAB/pid/$1 ]] || die "no such node: ${1:-}"; }

# A host lives as long as its `unshare`, whose pid is in $LAB/pid/HOST.
unshare_pid() {
    local pid; pid=$(cat "$LAB/pid/$1" 2>/dev/null) || return 1
    tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q " _host $1 " && echo "$pid"
}
init_pid() { local pid; pid=$(unshare_pid "$1") && pgrep -P "$pid"; }   # the host's PID 1
isup() { init_pid "$1" >/dev/null; }
door() { local pid; pid=$(init_pid "$1") || die "$1 is not up"; echo "-t $pid -n -p -m -u -i"; }
enter() { local door; door=$(door "$1") || exit 1; shift; nsenter $door -- "$@"; }
# Signals do not pass nsenter, so CMD gets a TERM when nsenter ends.
user() { local door; door=$(door "$1") || exit 1; shift; exec nsenter $door --wdns="$PWD" -- setpriv --pdeathsig TERM -- "$@"; }

configure() {
    mkdir -p "$LAB"/{slurm,ssh,log,pid}; chmod 755 "$LAB"
    echo "${SLURM_LAB_LOCAL:-}" >"$LAB/local"
    (umask 077; head -c 128 /dev/urandom >"$LAB/munge.key")
    { echo "127.0.0.1 localhost"; echo "$NET.1 login"
      for ((i = 1; i <= NODES; i++)); do echo "$NET.$((10 + i)) node$i"; done; } >"$LAB/hosts"
    cat >"$LAB/slurm/slurm.conf" <<END
ClusterName=lab
SlurmctldHost=login
SlurmUser=root
# cred_expire is also how long a requeued job waits before it starts again (default 120 s).
AuthInfo=cred_expire=5
StateSaveLocation=/run/slurmctld
SlurmdSpoolDir=/run/slurmd
TmpFS=/run
SlurmctldLogFile=$LAB/log/slurmctld.log
SlurmdLogFile=$LAB/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
JobCompType=jobcomp/filetxt
JobCompLoc=$LAB/log/jobcomp.log
# Let nodes claim more CPUs and memory than the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# Shorter than the defaults, for tests.
SlurmdTimeout=20
KillWait=5
SchedulerParameters=sched_interval=5,bf_interval=5
MinJobAge=3600
ReturnToService=2
NodeName=node[1-$NODES] CPUs=$CPUS RealMemory=1000000 Gres=gpu:$GPUS
PartitionName=lab Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
    # No cgroup is used, but slurmd ends if it cannot tell which cgroup version there is.
    echo "CgroupPlugin=cgroup/v1" >"$LAB/slurm/cgroup.conf"
    : >"$LAB/slurm/gres.conf"
    for ((i = 0; i < GPUS; i++)); do                # a GPU has to be a device: here, /dev/null's
        mknod "$LAB/slurm/gpu$i" c 1 3; echo "Name=gpu File=/etc/slurm/gpu$i" >>"$LAB/slurm/gres.conf"
    done
    if [ -x /usr/sbin/sshd ]; then                  # ssh between all hosts, without passwords
        ssh-keygen -q -t ed25519 -N '' -f "$LAB/ssh/key"
        printf '%s\n' "HostKey /etc/ssh/key" "AuthorizedKeysFile /etc/ssh/key.pub" "StrictModes no" >"$LAB/ssh/sshd_config"
        printf '%s\n' "IdentityFile /etc/ssh/key" "StrictHostKeyChecking no" \
            "UserKnownHostsFile /dev/null" "LogLevel ERROR" >"$LAB/ssh/ssh_config"
    fi
}

# PID 1 of a host: $1 name, $2 address.
host() {
    umask 022
    hostname "$1"
    for dir in /run /dev/shm $(cat "$LAB/local"); do mount -t tmpfs -o mode=1777 tmpfs "$dir"; done
    mount -t sysfs sysfs /sys                       # shows this host's interfaces, and no cgroups
    mount --bind "$LAB/hosts" /etc/hosts
    mount --bind "$LAB/slurm" /etc/slurm
    mkdir -p /run/{munge,slurmctld,slurmd,sshd}
    ip link set lo up
    [ "$1" != login ] || ip link add eth0 type bridge
    until ip addr add "$2/24" dev eth0 2>/dev/null; do sleep 0.05; done
    ip link set eth0 up
    munged --key-file="$LAB/munge.key" --log-file="$LAB/log/munged.$1.log" \
        --pid-file=/run/munge/munged.pid --seed-file=/run/munge/munged.seed
    if [ -e "$LAB/ssh/key" ]; then mount --bind "$LAB/ssh" /etc/ssh; /usr/sbin/sshd; fi
    if [ "$1" = login ]; then slurmctld; else slurmd; fi
    while :; do sleep 3600 & wait $!; done          # bash reaps the orphans
}

boot() {
    local addr=$NET.1 pid=
    [ "$1" = login ] || addr=$NET.$((10 + ${1#node}))
    setsid unshare --net --uts --ipc --mount --pid --mount-proc --kill-child \
        bash "$SELF" _host "$1" "$addr" </dev/null >"$LAB/log/host.$1.log" 2>&1 &
    echo $! >"$LAB/pid/$1"
    for _ in {1..100}; do pid=$(init_pid "$1") && break; sleep 0.05; done
    [ -n "$pid" ] || die "$1 did not start: see $LAB/log/host.$1.log"
    if [ "$1" != login ]; then
        until enter login ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
        ip link add "$1" netns "$(init_pid login)" type veth peer name eth0 netns "$pid"
        enter login ip link set "$1" master eth0 up
    fi
}

halt() {
    local pid; pid=$(init_pid "$1") || return 0
    kill -9 "$pid"                                  # and with it all of its PID namespace
    while unshare_pid "$1" >/dev/null; do sleep 0.05; done
}

up() {
    [ "$(id -u)" = 0 ] || die "needs root"
    command -v slurmctld slurmd munged >/dev/null || die "first: $0 install"
    local host down=
    for host in $(wanted); do isup "$host" || down=$host; done
    if [ -z "$down" ] && [ "$(started | wc -l)" = $((NODES + 1)) ]; then echo "already up"; else
        down; configure; for host in $(wanted); do boot "$host"; done
    fi
    for _ in {1..300}; do
        if [ "$(enter login sinfo -hNo %T 2>/dev/null | grep -cE '^(idle|mixed|allocated)$')" = "$NODES" ]; then
            enter login sinfo -N; return
        fi
        sleep 0.1
    done
    status; die "the nodes did not become ready: see $LAB/log"
}

down() {
    local host; for host in $(started); do halt "$host"; done
    rm -rf "$LAB"/{slurm,ssh,log,pid,local,hosts,munge.key}
    [ ! -d "$LAB" ] || rmdir "$LAB"
}

status() {
    [ -d "$LAB/pid" ] || { echo "down"; return; }
    local host; for host in $(started); do
        isup "$host" && echo "$host up" || echo "$host down"
    done
    enter login ip -br link show type veth; enter login sinfo -N; enter login squeue
}

heal() {
    isup "$1" || { boot "$1"; return; }
    enter login ip link set "$1" up
    # HUP makes slurmd register at once; slurmctld asks a node that was down every two minutes.
    enter "$1" sh -c 'kill -HUP $(cat /run/slurmd.pid) 2>/dev/null || slurmd'
}

cmd=${1:-}; [ $# = 0 ] || shift
case $cmd in
    install) apt-get update -q; DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -yq --no-install-recommends \
                 slurmctld slurmd slurm-client munge iproute2 procps util-linux "$@" ;;
    up|down|status) "$cmd" ;;
    run) user login "$@" ;;
    on) user "$@" ;;
    cut) isnode "$@"; enter login ip link set "$1" down ;;
    crash) isnode "$@"; isup "$1" || die "$1 is down"; enter login ip link del "$1"; halt "$1" ;;
    heal) isnode "$@"; heal "$1" ;;
    _host) host "$@" ;;
    *) sed -n '2,/^set/s/^# \{0,1\}//p' "$SELF"; exit 2 ;;
esac
