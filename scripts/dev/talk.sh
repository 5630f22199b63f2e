# shellcheck shell=bash
# Talk: how ./dev speaks and waits.
# Promise: results go to stdout and talk goes to stderr; nothing waits in silence for over two seconds or without a deadline.

# A pipe nobody writes to. Reading it with a timeout is a sleep without a child process: it ends at once when ./dev is
# stopped, and leaves no `sleep` behind that would hold the caller's stderr open.
exec 8<> <(:)

pause() { read -r -t "$1" -u 8 || true; }

say() { printf '%s\n' "$*" >&2; }

# die WHAT [HINT]
die() {
    say "error: $1"
    [[ -z ${2-} ]] || say "hint: $2"
    exit 1
}

# no_more [ARGS..]: what a command does not know is refused before anything is done, and not passed over.
no_more() { (($# == 0)) || die "no such argument: $1" "./dev help"; }

# still WHAT SECONDS: the progress line.
still() { say "... $1 ($2 s)"; }

# with_progress WHAT COMMAND...: runs COMMAND in the foreground and says now and then that it is still at it.
with_progress() {
    local what=$1 status=0
    shift
    tick "$what" &
    local ticker=$!
    "$@" || status=$?
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    return "$status"
}

# The loop asks for its parent, so that it ends by itself when ./dev is killed.
tick() {
    local what=$1 begun_s=$SECONDS
    pause 2
    while kill -0 $$ 2>/dev/null; do
        still "$what" $((SECONDS - begun_s))
        pause 10
    done
}

# logged LOG WHAT COMMAND...: runs COMMAND quietly, with its output in LOG, and shows the end of it when COMMAND fails.
logged() {
    local log=$1 what=$2
    shift 2
    if ! with_progress "$what" into "$log" "$@"; then
        show_end_of "$log"
        die "$what failed" "the whole log is $log"
    fi
}

into() {
    local log=$1
    shift
    "$@" >>"$log" 2>&1
}

show_end_of() {
    [[ -s $1 ]] || return 0
    say "--- the end of $1"
    tail -n 25 "$1" >&2
    say "---"
}

# Only one ./dev at a time changes what runs here. The lock is the open file: it cannot outlive its holder.
take_lock() {
    exec 9>"$DEV/lock"
    wait_for_lock --exclusive 9
}

# Different brokers may be changed at the same time, but not while everything is brought up or down.
take_broker_lock() {
    exec 9>"$DEV/lock" 7>"$DEV/lock.broker-$1"
    wait_for_lock --shared 9
    wait_for_lock --exclusive 7
}

release_lock() { exec 7>&- 9>&-; }

wait_for_lock() {
    flock --nonblock "$@" && return
    say "... another ./dev is at work here, waiting for it"
    flock --timeout 900 "$@" || die "another ./dev has been at work in $DEV for 15 minutes" "see which: ps -ef | grep dev"
}
