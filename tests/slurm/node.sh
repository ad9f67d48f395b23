#!/bin/bash
# Init of one compute node: its own address, host name, shared memory, /mnt and slurmd. Arguments: FOLDER NAME ADDRESS/24.
set -eu
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never" || :; } # without a process of its own
folder=$1 name=$2 address=$3

hostname "$name"
mount -t tmpfs -o size=2g tmpfs /dev/shm
mount -t tmpfs -o size=1g tmpfs /mnt
touch "$folder/run/$name.up"
until ip link show eth0 >/dev/null 2>&1; do pause 0.02; done # the other end plugs the cable in
ip link set lo up
ip address add "$address" dev eth0
ip link set eth0 up
ip route add default via "${address%.*}.1"
slurmd -D -N "$name" -f "$SLURM_CONF" &
while :; do wait -n || pause 1; done
