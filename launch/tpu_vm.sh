#!/usr/bin/env bash
# A Cloud TPU slice from the queue to the bucket, run from your own machine. docs/launch.md
# goes through it step by step.
#
#   bash launch/tpu_vm.sh COMMAND NAME [FLAGS] [-- ARGUMENTS]
#
#   create   ask for a slice (queued resource) and wait until it is there
#   setup    this checkout, or --ref of --repository, and its environment on all workers
#   start    python -m radit_jax.main ARGUMENTS on all workers, in tmux
#   watch    all of the above where it is still to do, then wait for the end; after a
#            preemption the slice is asked for again and the same command goes on
#   status   state of the slice; per worker whether the run goes on, and its last line
#   logs     follow the log of one worker
#   stop     ask the run to save and stop; end watch first, or it will start it again
#   run      any command on all workers: run NAME -- gcloud storage cp gs://... .
#   copy     --from FOLDER of one worker to the bucket folder --to gs://...
#   delete   the slice and the request for it
#
# Flags; the name in brackets is a variable of the environment that does the same:
#   --project P [PROJECT]     by default that of your gcloud configuration
#   --zone Z [ZONE]           such as us-east5-a
#   --type T [TYPE]           such as v5p-128
#   --version V [VERSION]     of the TPU software; by default the one for the type
#   --spot, --reserved        tier of the request; by default on demand
#   --internal-ips            workers without public addresses
#   --create-flag F           one more flag for the request, as often as needed:
#                             --create-flag=--service-account=ADDRESS
#   --repository URL --ref R  clone that, rather than copy this checkout
#   --prepare C               a shell command for all workers at the end of every setup,
#                             such as mounting the disk that they share
#   --worker N                of logs and copy; 0 by default
#   --from F --to URL         of copy
#   --dry-run                 print every command and run none
# How patient it is, in seconds: POLL (30) between two looks at the state, PAUSE (60)
# before a lost slice is asked for again, doubled up to PAUSE_MOST (900) while that
# fails; TRIES (20) failures in a row are the end.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
commands=(create setup start watch status logs stop run copy delete)
flags=(--project --zone --type --version --spot --reserved --internal-ips --create-flag
  --repository --ref --prepare --worker --from --to --dry-run)
remote=radit_jax # the checkout on the workers, below the home folder

fail() {
  echo "error: $1" >&2
  exit 1
}

# nearest WORD OTHERS...: the one of the others that is most like the word.
nearest() {
  python3 -c 'import difflib, sys
print(*difflib.get_close_matches(sys.argv[1], sys.argv[2:], 1, 0.0))' "$@"
}

# The command line -------------------------------------------------------------------

if [ $# -eq 0 ] || [ "$1" = --help ]; then
  sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"
  exit 0
fi
command="$1"
shift
[[ " ${commands[*]} " == *" $command "* ]] ||
  fail "no command '$command'; did you mean $(nearest "$command" "${commands[@]}")?"
name="${1:-}"
case "$name" in
  "" | -*) fail "$command: which slice? Give its name first: $command NAME" ;;
esac
shift

project="${PROJECT:-}" zone="${ZONE:-}" type="${TYPE:-}" version="${VERSION:-}"
tier="" internal="" repository="" ref="" prepare="" worker_number=0 from="" to="" dry=""
create_flags=()
poll="${POLL:-30}" pause="${PAUSE:-60}" pause_most="${PAUSE_MOST:-900}" tries="${TRIES:-20}"
arguments=()
while [ $# -gt 0 ]; do
  flag="${1%%=*}"
  case "$flag" in
    --)
      shift
      arguments=("$@")
      break
      ;;
    --spot | --reserved)
      [ -z "$tier" ] || [ "$tier" = "$flag" ] || fail "$tier or $flag, not both"
      tier="$flag"
      ;;
    --internal-ips) internal=yes ;;
    --dry-run) dry=yes ;;
    *)
      [[ " ${flags[*]} " == *" $flag "* ]] ||
        fail "no flag '$flag'; did you mean $(nearest "$flag" "${flags[@]}")? What the \
run itself is given goes after --"
      if [ "$flag" != "$1" ]; then
        value="${1#*=}"
      elif [ $# -gt 1 ]; then
        value="$2"
        shift
      else
        fail "$flag: its value is missing"
      fi
      case "$flag" in
        --project) project="$value" ;;
        --zone) zone="$value" ;;
        --type) type="$value" ;;
        --version) version="$value" ;;
        --create-flag) create_flags+=("$value") ;;
        --repository) repository="$value" ;;
        --ref) ref="$value" ;;
        --prepare) prepare="$value" ;;
        --worker) worker_number="$value" ;;
        --from) from="$value" ;;
        --to) to="$value" ;;
      esac
      ;;
  esac
  shift
done
[ -n "$zone" ] || fail "the zone is not set; give --zone us-east5-a or ZONE=us-east5-a"
case "$command" in
  create | watch)
    # Now, rather than after the first preemption.
    [ -n "$type" ] || fail "the type is not set; give --type v5p-128 or TYPE=v5p-128"
    if [ -z "$version" ]; then
      case "$type" in
        v6e-*) version=v2-alpha-tpuv6e ;;
        v5p-*) version=v2-alpha-tpuv5 ;;
        v5litepod-*) version=v2-alpha-tpuv5-lite ;;
        v4-*) version=tpu-ubuntu2204-base ;;
        *) fail "type $type is none of v4-N, v5litepod-N, v5p-N, v6e-N (nearest: \
$(nearest "$type" v4-8 v5litepod-8 v5p-8 v6e-8)); for another kind give its TPU software \
with --version" ;;
      esac
    fi
    ;;
esac
case "$command" in
  start | watch)
    [ ${#arguments[@]} -gt 0 ] ||
      fail "$command: what is to run? Give it after --: -- --config configs/lm_ft.py"
    ;;
  run) [ ${#arguments[@]} -gt 0 ] || fail "run: which command? Give it after --" ;;
  copy)
    [ -n "$from" ] || fail "copy: which folder? Give --from runs/paper"
    [[ "$to" == gs://?* ]] || fail "copy: '$to' is no bucket; give --to gs://BUCKET/FOLDER"
    ;;
  setup)
    [ -z "$repository" ] || [ -n "$ref" ] ||
      fail "--repository without --ref; give a branch, a tag or a commit"
    ;;
esac

place=(--zone="$zone")
[ -z "$project" ] || place+=(--project="$project")
# --quiet asks nothing: watch may run where nobody can answer.
ssh_place=("${place[@]}" --quiet)
[ -z "$internal" ] || ssh_place+=(--internal-ip)

# Running and asking -----------------------------------------------------------------

exec 3>&1 # --dry-run prints there, also where an answer is captured

show() {
  local line
  line="$(printf '%q ' "$@")"
  echo "${line% }" >&3
}

do_it() {
  if [ -n "$dry" ]; then show "$@"; else "$@"; fi
}

# on WORKERS COMMAND: a shell command on all workers or on one of them.
on() {
  do_it gcloud compute tpus tpu-vm ssh "$name" "${ssh_place[@]}" --worker="$1" \
    --command="$2"
}

# worker.sh of WORKERS with these arguments, whole whatever is in them.
worker() {
  local line
  line="$(printf '%q ' "bash" "$remote/launch/worker.sh" "${@:2}")"
  on "$1" "${line% }"
}

# describe KIND FIELD: a field of the request (queued-resources) or of the slice
# (tpu-vm); nothing if there is none. Fails if the cloud cannot be asked.
describe() {
  local -a ask=(gcloud compute tpus "$1" describe "$name" "${place[@]}"
    --format="value($2)")
  local answer problem
  if [ -n "$dry" ]; then
    show "${ask[@]}"
    return
  fi
  problem="$(mktemp)"
  if answer="$("${ask[@]}" 2>"$problem")"; then
    rm "$problem"
    echo "$answer"
  elif grep -q NOT_FOUND "$problem"; then
    rm "$problem"
  else
    cat "$problem" >&2
    rm "$problem"
    return 1
  fi
}

say() {
  echo "$name: $*" >&2
}

# Steps: each ends with the status of what it did, since watch goes on after a failure
# and bash then ignores set -e. --------------------------------------------------------

request() {
  local -a extra=()
  [ -z "$tier" ] || extra+=("$tier")
  [ -z "$internal" ] || extra+=(--internal-ips)
  do_it gcloud compute tpus queued-resources create "$name" --node-id="$name" \
    "${place[@]}" --accelerator-type="$type" --runtime-version="$version" \
    ${extra[@]+"${extra[@]}"} ${create_flags[@]+"${create_flags[@]}"}
}

# Wait until the request is ACTIVE; fails, with the reason, if it never will be.
wait_active() {
  local state last=""
  while :; do
    state="$(describe queued-resources state.state)" || return 1
    [ -z "$dry" ] || return 0
    [ "$state" = "$last" ] || say "${state:-no such request}"
    last="$state"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED)
        say "$(describe queued-resources state.failedData.error.message)"
        return 1
        ;;
      "" | SUSPENDING | SUSPENDED | DELETING) return 1 ;;
    esac
    sleep "$poll"
  done
}

create() {
  request
  wait_active || fail "$name did not become ACTIVE, see above; \
'launch/tpu_vm.sh delete $name --zone $zone' frees the name"
}

# The checkout as it is: tracked files and new ones, not what .gitignore names.
pack() {
  # shellcheck disable=SC2016
  do_it bash -c 'set -euo pipefail
cd "$1"
git ls-files -z --cached --others --exclude-standard |
  while IFS= read -r -d "" file; do if [ -e "$file" ]; then printf "%s\0" "$file"; fi; done |
  tar --null --files-from=- --create --gzip --file="$2"' pack "$root" "$1"
}

send_checkout() {
  local folder code=0
  folder="$(mktemp -d)"
  local archive="$folder/$remote.tar.gz"
  # Old sources go, so that a file that was moved is not there twice.
  pack "$archive" &&
    do_it gcloud compute tpus tpu-vm scp "$archive" "$name:" "${ssh_place[@]}" --worker=all &&
    on all "mkdir -p $remote && cd $remote && rm -rf radit_jax configs launch && \
tar --extract --gzip --file=../$remote.tar.gz" || code=$?
  rm -r "$folder"
  return "$code"
}

clone_checkout() {
  [ -n "$repository" ] ||
    repository="$(git -C "$root" remote get-url origin 2>/dev/null)" ||
    fail "--ref $ref: of which repository? Give --repository URL"
  local url commit
  url="$(printf %q "$repository")"
  commit="$(printf %q "$ref")"
  on all "{ [ -d $remote/.git ] || git clone --quiet $url $remote; } && cd $remote && \
git fetch --quiet $url $commit && git checkout --quiet FETCH_HEAD"
}

setup() {
  if [ -n "$ref" ]; then
    clone_checkout || return
  else
    send_checkout || return
  fi
  worker all install || return
  [ -z "$prepare" ] || on all "$prepare"
}

start() {
  worker all start "${arguments[@]}"
}

state_of_run="if [ -e $remote/launch/worker.sh ]; then \
bash $remote/launch/worker.sh state; else echo none; fi"

status() {
  local found
  found="$(describe queued-resources state.state)"
  [ -n "$dry" ] || echo "request: ${found:-none}"
  found="$(describe tpu-vm state)"
  [ -n "$dry" ] || echo "slice: ${found:-none}"
  on all "echo \"\$(hostname): \$($state_of_run)\"; tail -n 1 $remote.log 2>/dev/null || true"
}

# One of: lost (the slice is gone, or never came), waiting, running, none (nothing runs
# or ran on it), the exit status of a run that ended, unknown (the cloud or worker 0
# does not answer).
look() {
  local found
  found="$(describe queued-resources state.state)" || found=unknown
  case "$found" in
    "" | FAILED | SUSPENDING | SUSPENDED | DELETING) echo lost && return ;;
    ACTIVE) ;;
    unknown) echo unknown && return ;;
    *) echo waiting && return ;;
  esac
  found="$(describe tpu-vm state)" || found=unknown
  case "$found" in
    "" | PREEMPTED | TERMINATED) echo lost && return ;;
    unknown) echo unknown && return ;;
  esac
  found="$(on 0 "$state_of_run" | tail -n 1)" || found=unknown
  case "$found" in
    running | none | [0-9]*) echo "$found" ;;
    *) echo unknown ;;
  esac
}

renew() {
  local found
  found="$(describe queued-resources state.state)" || return
  [ -z "$found" ] || delete || return
  request || return
  wait_active && setup && start
}

watch_dry() {
  echo "# where there is no such request yet:"
  request
  wait_active
  setup
  start
  echo "# then, every $poll s:"
  describe queued-resources state.state
  describe tpu-vm state
  on 0 "$state_of_run"
  echo "# and once the slice is lost, before all of the above again:"
  delete
}

# A run's exit status 75 is radit_jax's word for: saved after a signal, can go on.
watch() {
  local found last=first failures=0 wait_for="$pause" ok
  while :; do
    found="$(look)"
    [ "$found" = "$last" ] || say "$found"
    ok=yes
    case "$found" in
      lost)
        [ "$last" = first ] || sleep "$wait_for"
        renew || ok=""
        if [ -n "$ok" ]; then
          wait_for="$pause"
        else
          wait_for=$((wait_for * 2 < pause_most ? wait_for * 2 : pause_most))
        fi
        ;;
      unknown) ok="" ;;
      waiting | running) ;;
      none) { setup && start; } || ok="" ;;
      75) start || ok="" ;;
      *)
        if [ "$last" = first ]; then
          # Of an earlier run. What is complete is skipped, so this one may be the same.
          { setup && start; } || ok=""
        elif [ "$found" = 0 ]; then
          say "the run is finished"
          return
        elif [ "$found" = "$last" ]; then
          # Twice: workers of a preempted slice die before its state says so.
          on 0 "tail -n 30 $remote.log" >&2 || true
          fail "the run on $name ended with status $found; the end of its log is above"
        fi
        ;;
    esac
    if [ -n "$ok" ]; then failures=0; else failures=$((failures + 1)); fi
    [ "$failures" -lt "$tries" ] || fail "$name: $failures failures in a row, see above"
    last="$found"
    sleep "$poll"
  done
}

copy() {
  on "$worker_number" "cd $remote && gcloud storage rsync --recursive \
$(printf '%q %q' "$from" "$to")"
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$name" "${place[@]}" --force --quiet
}

case "$command" in
  watch) if [ -n "$dry" ]; then watch_dry; else watch; fi ;;
  logs) on "$worker_number" "tail -n 100 -F $remote.log" ;;
  stop) worker all stop ;;
  run) on all "cd $remote && $(printf '%q ' "${arguments[@]}")" ;;
  *) "$command" ;;
esac
