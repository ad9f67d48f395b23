# Everything below is the same for every run; slurm/README.md explains it. The values above are the run's own.
set -u

say() { printf '%(%F %T)T capstan: %s\n' -1 "$*"; }
# A simple command, so that $! is Python itself and not a subshell that a signal would end in its place.
# -P: nothing is imported from the folder that the job was submitted in.
python=(${CONTAINER[@]+"${CONTAINER[@]}"} "$PYTHON" -Pm ${CARRIED[@]+"${CARRIED[@]}"})

# Slurm signals this script alone (--signal=B:USR1@...), and this script the driver alone: Ray must outlive the commit.
asked=
driver=
forward() {
  asked=$1 interrupted=yes
  say "got SIG$1: the run commits and ends"
  if [ -n "$driver" ]; then kill -s "$1" "$driver" 2>/dev/null; fi
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

# One task on each node: Ray's head on the first, a worker that joins it on every other. Its token comes in by stdin.
ray_node() {
  "${python[@]}" trainer.store.scratch "${LOCAL%/*}" # what jobs that were killed have left on this node
  mkdir -m 700 "$LOCAL" || exit 1 # never one that exists: on a shared /tmp it could be somebody else's
  trap 'rm -rf -- "$LOCAL"' EXIT
  exec 9<"$LOCAL" && flock 9 # nobody takes it for left as long as this node's Ray lives, which inherits the lock
  (umask 077 && cat >"$LOCAL/token")
  echo "$SLURM_STEP_ID" >"$LOCAL/step" # steps of cluster.slurm.setup came before it
  local options=(--block --disable-usage-stats --num-cpus="$RAY_CPUS" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --object-store-memory=268435456 --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0
    --include-log-monitor=false) # the driver takes no logs from Ray: ranks write theirs to the run's store
  if [ "$SLURM_PROCID" = 0 ]; then
    options+=(--head --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS#*:}" --temp-dir="$LOCAL/ray"
      --include-dashboard=false --ray-client-server-port="$CLIENT_PORT")
  else
    until (exec 3<>"/dev/tcp/${RAY_ADDRESS/://}") 2>/dev/null; do sleep 0.2; done
    options+=(--address="$RAY_ADDRESS")
  fi
  local ray stopping=
  trap 'stopping=yes; kill "$ray" 2>/dev/null' TERM
  "${python[@]}" ray.scripts.scripts start "${options[@]}" >"$LOCAL/start.log" 2>&1 &
  ray=$!
  wait "$ray" || wait "$ray"
  [ -n "$stopping" ] || tail -n 30 "$LOCAL/start.log" >&2 # nobody asked it to end
  [ -n "$stopping" ]
}

start_ray() {
  local address port
  # The name may stand for this machine's loopback address, which no other node reaches.
  address=$(getent ahostsv4 "${nodes[0]}" | awk '$1 !~ /^127\./ { print $1; exit }')
  read -r port CLIENT_PORT < <("${python[@]}" launcher.cluster.slurm.job ports)
  export CLIENT_PORT RAY_ADDRESS=${address:-$(hostname -I | awk '{ print $1 }')}:$port
  export LOCAL=$LOCAL_DIR/capstan-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$LOCAL/token RAY_CPUS
  export RAY_agent_register_timeout_ms=${RAY_agent_register_timeout_ms:-300000} # its agents are late on a busy node
  export RAY_USAGE_STATS_ENABLED=0 RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # it ends when its work has ended
  srun --overlap $([ -n "${SPARES:-}" ] && echo --no-kill || echo --kill-on-bad-exit=1) --label --cpu-bind=none \
    --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
    --cpus-per-task="$CPUS_PER_NODE" \
    bash -uc "$(declare -p python); $(declare -f ray_node); ray_node" \
    < <(head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n') &
  step=$!
  until (exec 3<>"/dev/tcp/${RAY_ADDRESS/://}") 2>/dev/null; do
    if [ -n "$asked" ] || ! kill -0 "$step" 2>/dev/null; then return 1; fi
    sleep 0.2
  done
}

# The run's servers, a step of their own on the last nodes, beside the ranks where these are there, too. It is started again where a task of it is killed.
serve() {
  local over='' task='' each=$(((SERVERS + SERVER_NODES - 1) / SERVER_NODES))
  trap 'over=yes; end_servers "$task"' TERM
  for _ in {1..10}; do
    srun --job-name=servers --overlap --overcommit --kill-on-bad-exit=1 --cpu-bind=none --nodes="$SERVER_NODES" \
      --nodelist="$(list "${nodes[@]: -$SERVER_NODES}")" --ntasks="$SERVERS" --ntasks-per-node="$each" \
      --cpus-per-task="$((CPUS_PER_NODE > each ? CPUS_PER_NODE / each : 1))" \
      "${python[@]}" launcher.cluster.slurm.step server "$RUN_URI" &
    task=$!
    if wait "$task"; then return; fi # a server that is given up has told the run so
    if [ -n "$over" ]; then
      wait "$task"
      return
    fi
    sleep 5
  done
  kill -s USR1 $$
}
end_servers() { end_step servers "$1"; }
# A signal to srun would kill them at once, and say so as if that were an error.
end_step() {
  local id
  id=$(squeue --steps --noheader --jobs="$SLURM_JOB_ID" --format="%i %j" | awk -v name="$1" '$2 == name { print $1; exit }')
  scancel --signal=TERM "$id" 2>/dev/null # a node on which the step has ended says that there is none
  timeout 30 tail --pid="$2" -f /dev/null || kill "$2"
}

# A keeper on each node of the ranks, from which they are forked, and on each spare. It outlives the step of the ranks.
# One that is killed is started again, so that the ranks that follow have one.
keep() {
  local on=("${ranks[@]}" ${spares[@]+"${spares[@]}"})
  srun --job-name=keepers --overlap --overcommit ${SPARES:+--no-kill} --cpu-bind=none --nodes="${#on[@]}" \
    --nodelist="$(list "${on[@]}")" --ntasks="${#on[@]}" --ntasks-per-node=1 \
    --cpus-per-task="$CPUS_PER_NODE" bash -uc "$(declare -f keep_here); "'keep_here "$@"' keep \
    "${python[@]}" launcher.cluster.slurm.step keeper "$RUN_URI" "$SUBMISSION" &
  keepers=$!
}
keep_here() {
  local over=
  trap over=yes TERM
  for _ in {1..10}; do
    if "$@" || [ -n "$over" ]; then return 0; fi
  done
}

# A job with spares outlives a node that is lost, so nobody would miss this script. Tasks on its last two nodes do.
watch_first_node() {
  local on=("${nodes[@]:1}")
  if [ "${#on[@]}" -gt 2 ]; then on=("${on[@]: -2}"); fi
  srun --job-name=watch --overlap --overcommit --no-kill --nodes="${#on[@]}" --nodelist="$(list "${on[@]}")" \
    --ntasks="${#on[@]}" --ntasks-per-node=1 bash -uc "$(declare -f miss_first_node); miss_first_node ${nodes[0]}" &
  watching=$!
}
miss_first_node() {
  local now
  while sleep "${WATCH_SECONDS:-60}"; do
    now=$(squeue --noheader --jobs="$SLURM_JOB_ID" --states=RUNNING --format=%N) && [ -n "$now" ] || continue
    if scontrol show hostnames "$now" | grep -qxF "$1"; then continue; fi
    if scontrol show job "$SLURM_JOB_ID" | grep -q ' Requeue=0 '; then
      scancel "$SLURM_JOB_ID" # the next job of its chain goes on
    else
      scontrol requeue "$SLURM_JOB_ID"
    fi
  done
}

# Whether the ranks are to be started again in this job, by what has become of them and of its nodes, and on which nodes.
again() {
  local answer next left
  read -r answer next left < <(
    scontrol show node "$(list "${ranks[@]}" ${spares[@]+"${spares[@]}"} ${others[@]+"${others[@]}"})" --json |
      "${python[@]}" launcher.cluster.slurm.job again "$RUN_URI" --exit-code "$code" --signal "$asked" \
        --ranks "$(list "${ranks[@]}")" --spares "$(list ${spares[@]+"${spares[@]}"})"
  )
  if [ "${answer:-}" != again ]; then return 1; fi
  IFS=, read -ra ranks <<<"$next"
  IFS=, read -ra spares <<<"${left:-}"
}
list() { local IFS=,; echo "$*"; }

# Its exit code is in $code. A signal interrupts `wait`, whose status is then the signal's and not the driver's.
wait_for_driver() {
  while
    interrupted=
    wait "$driver"
    code=$?
    [ -n "$interrupted" ]
  do :; done
}

# In an earlier job of a chain the run may have ended; then there is nothing to do.
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
read -r verdict code < <("${python[@]}" launcher.cluster.slurm.job begin "$RUN_URI" --submission "$SUBMISSION" "${nodes[@]}")
if [ "${verdict:-}" != run ]; then exit "${code:-1}"; fi

say "run $RUN_NAME, start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"
step=
serving=
keepers=
watching=
ranks=("${nodes[@]:0:$RANK_NODES}") # in the order of their ranks
spares=("${nodes[@]:$RANK_NODES:${SPARES:-0}}")
others=("${nodes[@]:$((RANK_NODES + ${SPARES:-0}))}") # those of servers
if [ -n "${SPARES:-}" ]; then watch_first_node; fi
code=70 # Ray did not start
if [ "$LAUNCH" = direct ]; then
  if [ -n "${SERVERS:-}" ]; then
    serve &
    serving=$!
  fi
  if [ -n "${KEEPER:-}" ]; then keep; fi
  while
    # srun would number the ranks by the names of their nodes.
    if [ -n "${SPARES:-}" ]; then export CAPSTAN_RANK_NODES=$(list "${ranks[@]}"); fi
    # Rank 0 is on this node; a container need not have scontrol to say so.
    MASTER_ADDR=${ranks[0]} srun --kill-on-bad-exit=1 --cpu-bind=none ${keepers:+--overlap} --nodes="$RANK_NODES" \
      --nodelist="$(list "${ranks[@]}")" --ntasks="$((RANKS_PER_NODE * RANK_NODES))" \
      --ntasks-per-node="$RANKS_PER_NODE" --cpus-per-task="$((CPUS_PER_NODE / RANKS_PER_NODE))" \
      "${python[@]}" launcher.cluster.slurm.step rank "$RUN_URI" "$SUBMISSION" &
    driver=$!
    wait_for_driver
    driver=
    [ -n "$keepers" ] && [ "$code" != 0 ] && [ -z "$asked" ] && again
  do :; done
elif start_ray; then
  "${python[@]}" launcher.drive.driver "$RUN_URI" --submission "$SUBMISSION" --address "$RAY_ADDRESS" --fixed &
  driver=$!
  if [ -n "$asked" ]; then kill -s "$asked" "$driver"; fi
  wait_for_driver
fi
driver=
if [ -n "$serving" ]; then
  kill "$serving"
  wait "$serving"
fi
if [ -n "$keepers" ]; then
  end_step keepers "$keepers"
  wait "$keepers"
fi
if [ -n "$watching" ]; then
  end_step watch "$watching"
  wait "$watching"
fi

# The kind of end (finished, stopped, preempted, a failure within the budget) is decided and recorded in one place.
trap '' TERM USR1 # requeueing sends SIGTERM to this very script
used=$SLURM_JOB_NODELIST
if [ "$LAUNCH" = direct ]; then used=$(list "${ranks[@]}" ${others[@]+"${others[@]}"}); fi # a lost one may have been replaced
read -r verdict answer < <(scontrol show node "$used" --json |
  "${python[@]}" launcher.cluster.slurm.job end "$RUN_URI" --exit-code "$code" --signal "$asked")

if [ -n "$step" ]; then
  # Its first task is on this very node, and has written down which step it is.
  scancel --signal=TERM "$SLURM_JOB_ID.$(cat "$LOCAL/step" 2>/dev/null)" 2>/dev/null
  timeout 15 tail --pid="$step" -f /dev/null || kill "$step" # a node that is gone never says that it has ended
  wait "$step"
fi
if [ "${verdict:-}" != requeue ]; then exit "${answer:-1}"; fi
if [ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then # not cancelled, or requeued by Slurm
  # Held until the list of excluded nodes is written, which Slurm allows for a pending job only.
  scontrol requeuehold "$SLURM_JOB_ID"
  if [ -n "$answer" ]; then scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$answer"; fi
  scontrol release "$SLURM_JOB_ID"
fi
exit 75
