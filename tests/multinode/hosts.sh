#!/usr/bin/env bash
# Hosts on one machine: network, process, mount, name and IPC namespaces of their own, an sshd each where $SSHD names one,
# on one bridge. Used by walk.py and tests/chaos inside namespaces of their own, with which everything made here goes away.
#   hosts.sh bridge         the network, with this side at 10.77.0.1
#   hosts.sh up 2           host 2, at 10.77.0.12, with a home and a /tmp of its own and the folder $BASE shared with all
#   hosts.sh off 2          power loss: the link goes, then every process
#   hosts.sh link 2 down    the cable alone (up: plugged in again)
#   hosts.sh in 2 CMD...    a command on host 2, with this environment
#   hosts.sh slow 2         200 Mbit/s on that cable (fast: as before)
set -euo pipefail
BASE=${BASE:?a folder for keys, homes and logs} NET=10.77.0

start() {
  local i=$1 dir=$BASE/hosts/$1 ip=$NET.$((10 + $1))
  mkdir -p "$dir"/tmp; rm -f "$dir/ready"; [ -d "$dir/home" ] || cp -r "$BASE/home" "$dir/home"  # a disk outlives a power loss
  [ -z "${SSHD:-}" ] || sed "s/@IP@/$ip/" "$BASE/sshd_config" > "$dir/sshd_config"
  IP=$ip NAME=host$i DIR=$dir setsid unshare --net --pid --fork --mount --uts --ipc --mount-proc --kill-child \
    "$0" inside </dev/null >"$dir/log" 2>&1 &
  local pid=$!
  until [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.02; done
  ip link add "host$i" type veth peer name eth0 netns "$pid"
  ip link set "host$i" master bridge up
  echo "$pid" > "$dir/pid"
  for _ in $(seq 200); do answers "$dir" "$ip" && return; sleep 0.05; done
  echo "host$i does not answer:" >&2; cat "$dir/log" >&2; exit 1
}

answers() { [ -e "$1/ready" ] && { [ -z "${SSHD:-}" ] || (exec 3<>"/dev/tcp/$2/22") 2>/dev/null; }; }

inside() {  # process 1 of a host
  mount --make-rprivate /
  for folder in $KEEP; do  # Python, where it lies in the home that is about to be covered
    mkdir -p "$DIR/home/${folder#"$HOST_HOME"/}"
    mount --bind "$folder" "$DIR/home/${folder#"$HOST_HOME"/}"
  done
  mount --rbind "$DIR/home" "$HOST_HOME"
  mount -t tmpfs -o size=1g tmpfs /dev/shm
  mount -t tmpfs tmpfs /run; mkdir -p /run/sshd
  if ! grep -q '^sshd:' /etc/passwd; then
    { cat /etc/passwd; echo 'sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin'; } > /run/passwd; mount --bind /run/passwd /etc/passwd
  fi
  hostname "$NAME"
  printf '127.0.0.1 localhost\n%s %s\n' "$IP" "$NAME" > /run/hosts; mount --bind /run/hosts /etc/hosts
  for folder in ${KEEP_TMP:-}; do  # and where it lies in /tmp
    mkdir -p "$DIR$folder"
    mount --bind "$folder" "$DIR$folder"
  done
  mount --rbind "$DIR/tmp" /tmp
  until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
  ip addr add "$IP/24" dev eth0; ip link set eth0 up; ip link set lo up
  [ -z "${SSHD:-}" ] || "$SSHD" -f "$DIR/sshd_config" -E "$DIR/sshd.log"
  touch "$DIR/ready"
  while :; do sleep 3600 & wait $!; done
}

off() {
  local dir=$BASE/hosts/$1 pid
  pid=$(cat "$dir/pid")
  ip link set "host$1" down
  kill -9 "$(cat "/proc/$pid/task/$pid/children")"
  ip link del "host$1" 2>/dev/null || true
}

within() {  # its process 1 is the only child of the one that made its namespaces
  local pid child; pid=$(cat "$BASE/hosts/$1/pid"); child=$(cat "/proc/$pid/task/$pid/children"); shift
  exec nsenter --target "${child% }" --net --pid --mount --uts --ipc -- "$@"
}

case ${1:-} in
bridge)
  ip link set lo up
  ip link add bridge type bridge; ip addr add $NET.1/24 dev bridge; ip link set bridge up ;;
up) start "$2" ;;
inside) inside ;;
off) off "$2" ;;
in) shift; within "$@" ;;
slow) tc qdisc add dev "host$2" root tbf rate 200mbit burst 256kbit latency 400ms ;;
fast) tc qdisc del dev "host$2" root ;;
link) ip link set "host$2" "$3" ;;
*) sed -n 2,10p "$0"; exit 2 ;;
esac
