#!/usr/bin/env bash
# A real SLURM cluster of a few nodes on this one machine, for the tests. As root, on Debian or
# Ubuntu: apt-get install slurm-wlm munge
#
#     tests/cluster/start.sh DIR [NODES]       # 2 nodes if not said; everything lies in DIR
#     export SLURM_CONF=DIR/slurm.conf       # what sbatch, squeue and the tests go by
#     tests/cluster/start.sh node DIR NAME     # a node that was killed comes back
#     tests/cluster/start.sh stop DIR
#
# ACCT=1 adds accounting (slurmdbd on MariaDB): apt-get install slurmdbd mariadb-server
# DIR/local is another disk on every node, like the /tmp of real nodes, where mounting is allowed.
set -euo pipefail
HERE="$(cd "$(dirname "$0")" && pwd)"
PATH="$PATH:/usr/sbin:/sbin"

say() { echo "start.sh: $*" >&2; }

stop() {
    local dir="$1" name pid
    # the nodes first, so that no job is started again
    for name in slurmd- slurmctld slurmdbd mariadb munge/; do
        for file in "$dir/$name"*pid; do
            [[ -s "$file" ]] || continue
            pid="$(<"$file")"
            kill "$pid" 2>/dev/null || continue
            for _ in $(seq 50); do
                kill -0 "$pid" 2>/dev/null || break
                sleep 0.1
            done
            kill -KILL "$pid" 2>/dev/null || true
        done
    done
    # not sed -i: where /etc/hosts is mounted it cannot be replaced, only written
    { grep -v "# $dir$" /etc/hosts || true; } >"$dir/hosts"
    cat "$dir/hosts" >/etc/hosts
}

free_ports() {
    python3 - "$1" <<'PY'
import socket, sys
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(each.getsockname()[1] for each in held))
PY
}

wait_for() { # WHAT COMMAND...
    local what="$1"
    shift
    local end=$((SECONDS + 30))
    while ((SECONDS < end)); do
        "$@" >/dev/null 2>&1 && return
        sleep 0.1
    done
    say "$what did not come up in 30 s; see the logs in $DIR"
    stop "$DIR"
    exit 1
}

start_munge() {
    mkdir -p -m 755 "$DIR/munge"
    (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge/key")
    munged --key-file="$DIR/munge/key" --socket="$DIR/munge/socket" \
        --pid-file="$DIR/munge/pid" --log-file="$DIR/munge/log" --seed-file="$DIR/munge/seed"
    wait_for munged munge --socket="$DIR/munge/socket" --no-input
}

start_accounting() {
    local database="$DIR/database" socket="$DIR/database/socket" password
    password="$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')"
    mariadb-install-db --no-defaults --user=root --datadir="$database" --skip-test-db \
        --auth-root-authentication-method=normal >"$DIR/mariadb.log" 2>&1
    mariadbd --no-defaults --user=root --datadir="$database" --socket="$socket" \
        --port="$1" --bind-address=127.0.0.1 --pid-file="$DIR/mariadb.pid" \
        --innodb-buffer-pool-size=64M --innodb-lock-wait-timeout=900 >>"$DIR/mariadb.log" 2>&1 &
    wait_for MariaDB mariadb-admin --no-defaults --user=root --socket="$socket" ping
    mariadb --no-defaults --user=root --socket="$socket" --execute="
        create database slurm_acct_db;
        create user slurm@'127.0.0.1' identified by '$password';
        create user slurm@localhost identified by '$password';
        grant all on slurm_acct_db.* to slurm@'127.0.0.1';
        grant all on slurm_acct_db.* to slurm@localhost;"
    (
        umask 077 # slurmdbd refuses a file that others can read
        cat >"$DIR/slurmdbd.conf" <<CONF
AuthType=auth/munge
AuthInfo=socket=$DIR/munge/socket
DbdHost=$HOST
DbdAddr=127.0.0.1
DbdPort=$2
SlurmUser=root
LogFile=$DIR/slurmdbd.log
PidFile=$DIR/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$1
StorageUser=slurm
StoragePass=$password
StorageLoc=slurm_acct_db
CONF
    )
    cat >>"$SLURM_CONF" <<CONF
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$2
# with munge, the path of its socket
AccountingStoragePass=$DIR/munge/socket
CONF
    slurmdbd
    wait_for slurmdbd bash -c "exec 3<>/dev/tcp/127.0.0.1/$2"
}

start_node() {
    mkdir -p "$DIR/local" "$DIR/spool-$1"
    local own_disk=(unshare --mount bash -c 'mount -t tmpfs node "$0" && exec "$@"' "$DIR/local")
    if ! "${own_disk[@]}" true 2>/dev/null; then
        say "mounting is not allowed here: $1 has no disk of its own"
        own_disk=()
    fi
    "${own_disk[@]}" slurmd -N "$1"
}

if [[ "${1:-}" == stop && $# -eq 2 ]]; then
    stop "$(cd "$2" && pwd)"
    exit
fi
if [[ "${1:-}" == node && $# -eq 3 ]]; then
    DIR="$(cd "$2" && pwd)"
    export SLURM_CONF="$DIR/slurm.conf"
    start_node "$3"
    exit
fi
if [[ $# -lt 1 || $# -gt 2 || ! "${2:-2}" =~ ^[1-9]$ ]]; then
    say "usage: start.sh DIR [NODES, 1 to 9] | node DIR NAME | stop DIR"
    exit 2
fi
NEEDED="slurmctld slurmd munged sbatch"
[[ "${ACCT:-0}" == 1 ]] && NEEDED+=" slurmdbd mariadbd"
for program in $NEEDED; do
    if ! command -v "$program" >/dev/null; then
        say "$program is not installed: apt-get install slurm-wlm munge (ACCT=1: and slurmdbd mariadb-server)"
        exit 2
    fi
done
mkdir -p -m 755 "$1"
DIR="$(cd "$1" && pwd)"
NODES="${2:-2}"
HOST="$(hostname -s)"
export SLURM_CONF="$DIR/slurm.conf"
# A new cluster counts its jobs from 1 again, and must not meet what an old one left.
if [[ -e "$SLURM_CONF" ]]; then
    say "$DIR holds a cluster already; stop it and give a new folder"
    exit 2
fi
mkdir -p "$DIR/state"
read -ra PORTS <<<"$(free_ports $((NODES + 3)))"
sed -e "s|@HOST@|$HOST|g; s|@DIR@|$DIR|g; s|@CTLD_PORT@|${PORTS[0]}|g" \
    -e "s|@SLURMD_TIMEOUT@|${SLURMD_TIMEOUT:-6}|g" "$HERE/slurm.conf.in" >"$SLURM_CONF"
NAMES=()
for ((i = 1; i <= NODES; i++)); do
    NAMES+=("seadtest$i")
    echo "NodeName=seadtest$i NodeHostname=$HOST NodeAddr=127.0.0.1 Port=${PORTS[i + 2]}" \
        "CPUs=2 RealMemory=4000 State=UNKNOWN" >>"$SLURM_CONF"
done
# the ranks meet at the name of the first node
echo "127.0.0.1 ${NAMES[*]} # $DIR" >>/etc/hosts
start_munge
if [[ "${ACCT:-0}" == 1 ]]; then
    start_accounting "${PORTS[1]}" "${PORTS[2]}"
fi
slurmctld
for name in "${NAMES[@]}"; do
    start_node "$name"
done
all_idle() { [[ "$(sinfo -h -N -p low -t idle -o %N | sort -u | wc -l)" == "$NODES" ]]; }
wait_for "a node" all_idle
say "$NODES nodes are up: export SLURM_CONF=$SLURM_CONF"
