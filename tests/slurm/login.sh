#!/bin/bash
# Init of the login machine: the controller, munge and the switch of the cluster's network. Arguments: FOLDER ADDRESS/24.
set -eu
exec {never}<> <(:)
pause() { read -rt "$1" -u "$never" || :; } # without a process of its own
folder=$1 address=$2

hostname login
mount --make-rprivate /
# No name service: a look-up of a name that is not in the file would wait for a server that is not there.
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/nsswitch.conf" /etc/nsswitch.conf
ip link set lo up
ip link add br0 type bridge
ip address add "$address" dev br0
ip link set br0 up

munged --force --foreground --key-file="$folder/etc/munge.key" --socket="$folder/run/munge.sock" \
  --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed" &
until [ -S "$folder/run/munge.sock" ]; do pause 0.02; done
slurmctld -D -i -f "$SLURM_CONF" &
touch "$folder/run/login.up"
while :; do wait -n || pause 1; done # reaps what is left to it; its end ends the whole cluster
