#!/usr/bin/env bash
# Nodes with addresses of their own on one machine: network namespaces on a switch, to try a run of several nodes.
#
#   cluster/namespaces.sh up 2              nodes 0 and 1 with the addresses 10.99.0.1 and 10.99.0.2; more can be added
#   cluster/namespaces.sh run 0 COMMAND...  COMMAND on node 0
#   cluster/namespaces.sh link 1 down       node 1 is cut off; `link 1 up` puts it back
#   cluster/namespaces.sh status            the nodes, their links, and how many processes run on each
#   cluster/namespaces.sh down              ends what runs on the nodes and removes them
#
# Needs root and iproute2. The nodes share files, processors and memory with the machine, and nothing else: they reach
# neither the machine's own network nor the outside. Only namespaces called rlprm<TAG><number> are ever touched;
# RLPRM_TAG (letters, empty unless set) keeps several sets apart.
set -euo pipefail

tag=${RLPRM_TAG:-}
net=10.99.0

fail() {
    echo "namespaces.sh: $*" >&2
    exit 1
}

usage() {
    sed -n '4,8s/^#   //p' "$0" >&2
    exit 2
}

name() { echo "rlprm${tag}$1"; }

switch="rlprm${tag}switch"

# Numbers of the nodes there are.
nodes() { ip netns list | sed -nE "s/^rlprm${tag}([0-9]+)( .*)?$/\1/p" | sort -n; }

exists() { ip netns list | grep -qE "^$1( |$)"; }

require() {
    [[ $tag =~ ^[a-z]*$ ]] || fail "RLPRM_TAG is '$tag'; expected lower-case letters only"
    command -v ip >/dev/null || fail "the program ip is missing; install iproute2 (Debian: apt-get install iproute2)"
    [[ $(id -u) == 0 ]] || fail "network namespaces need root; run it with sudo, or as root in a privileged container"
}

number() {
    [[ ${1:-} =~ ^[0-9]+$ ]] || usage
}

node() {
    number "$@"
    exists "$(name "$1")" || fail "there is no node $1 (there: $(nodes | tr '\n' ' ')); make it with: namespaces.sh up $(($1 + 1))"
}

up() {
    number "$@"
    (($1 >= 1 && $1 <= 200)) || fail "$1 nodes; expected 1 to 200"
    if ! exists "$switch"; then
        ip netns add "$switch" || fail "this machine does not allow network namespaces (see above); use a machine or container that does"
        ip -n "$switch" link add name switch type bridge
        ip -n "$switch" link set switch up
    fi
    for ((i = 0; i < $1; i++)); do
        local it
        it=$(name "$i")
        exists "$it" || ip netns add "$it"
        ip -n "$it" link set lo up
        if ! ip -n "$it" link show "rlprm$i" >/dev/null 2>&1; then
            ip -n "$it" link add name "rlprm$i" type veth peer name "port$i" netns "$switch"
            ip -n "$it" address add "$net.$((i + 1))/24" dev "rlprm$i"
            ip -n "$switch" link set "port$i" master switch
        fi
        ip -n "$switch" link set "port$i" up
        ip -n "$it" link set "rlprm$i" up
    done
    status
}

status() {
    local i it state
    for i in $(nodes); do
        it=$(name "$i")
        state=$(ip -n "$it" -br link show "rlprm$i" 2>/dev/null | awk '{print $2}')
        echo "node $i: $it, $net.$((i + 1)), link ${state:-missing}, $(ip netns pids "$it" | wc -l) processes"
    done
    [[ -n $(nodes) ]] || echo "no nodes; make two with: namespaces.sh up 2"
}

run() {
    node "$@"
    [[ $# -ge 2 ]] || usage
    local i=$1
    shift
    exec ip netns exec "$(name "$i")" "$@"
}

link() {
    node "$@"
    [[ ${2:-} == up || ${2:-} == down ]] || usage
    ip -n "$(name "$1")" link set "rlprm$1" "$2"
}

# Process ids on all nodes.
running() {
    local i
    for i in $(nodes); do ip netns pids "$(name "$i")"; done
}

# Send a signal to everything on the nodes; what has ended meanwhile does not matter.
tell() { running | xargs -r kill "-$1" 2>/dev/null || true; }

down() {
    local i
    # links first: a Ray node that is asked to end while it is cut off takes half a minute and leaves its agents behind
    for i in $(nodes); do ip -n "$(name "$i")" link set "rlprm$i" up 2>/dev/null || true; done
    tell TERM
    for ((i = 0; i < 50; i++)); do
        [[ -n $(running) ]] || break
        sleep 0.2
    done
    for ((i = 0; i < 50; i++)); do
        [[ -n $(running) ]] || break
        tell KILL
        sleep 0.1
    done
    [[ -z $(running) ]] || fail "these processes do not end: $(running | tr '\n' ' ')"
    for i in $(nodes); do ip netns delete "$(name "$i")"; done
    if exists "$switch"; then ip netns delete "$switch"; fi
}

[[ $# -ge 1 ]] || usage
command=$1
shift
case $command in
up | run | link | status | down)
    require
    "$command" "$@"
    ;;
*) usage ;;
esac
