# shellcheck shell=bash
# Processes: starts servers that outlive ./dev, and finds them again.
# Promise: a process counts as ours only while its pid AND its start time are the recorded ones, so a reused pid is never
# taken for ours, and never killed.

record_of() { printf '%s/run/%s' "$DEV" "$1"; }
log_of() { printf '%s/log/%s.log' "$DEV" "$1"; }

# launch NAME COMMAND...: starts COMMAND in a session of its own, so that closing the terminal does not end it.
# The process writes its own record before it becomes COMMAND: there is no moment at which it runs unrecorded.
launch() {
    local name=$1 record log
    shift
    record=$(record_of "$name")
    log=$(log_of "$name")
    rm -f "$record"
    [[ ! -f $log ]] || mv "$log" "$log.old"
    # Descriptors 7 to 9 are the locks and the pause of ./dev, and none of the server's business.
    # shellcheck disable=SC2016 # the inner shell expands these
    setsid bash -c 'source "$0"; write_record "$1"; shift; exec "$@"' "$SCRIPTS/processes.sh" "$record" "$@" \
        </dev/null >"$log" 2>&1 7>&- 8>&- 9>&- &
    for _ in {1..500}; do
        [[ ! -s $record ]] || return 0
        pause 0.02
    done
    give_up "$name" "$name could not be launched"
}

write_record() {
    local birth
    birth=$(state_and_birth $$)
    printf '%s %s\n' $$ "${birth#* }" >"$1.new"
    mv "$1.new" "$1"
}

# Prints e.g. `S 123456`: the state, and the start in clock ticks since boot. A program's name may contain spaces and
# parentheses, so the fields are counted from the last parenthesis.
state_and_birth() {
    local stat
    { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
    # shellcheck disable=SC2086 # split into fields on purpose
    set -- ${stat##*) }
    printf '%s %s' "$1" "${20}"
}

# state_of NAME: running, frozen or stopped. A zombie has stopped: it only waits for its parent to notice.
state_of() {
    local pid birth now
    if read -r pid birth 2>/dev/null <"$(record_of "$1")" && now=$(state_and_birth "$pid") && [[ ${now#* } == "$birth" ]]; then
        case $now in
            [ZX]*) echo stopped ;;
            [Tt]*) echo frozen ;;
            *) echo running ;;
        esac
    else
        echo stopped
    fi
}

alive() { [[ $(state_of "$1") != stopped ]]; }

pid_of() {
    local pid
    read -r pid _ <"$(record_of "$1")" && echo "$pid"
}

# stop_process NAME SIGNAL LIMIT_S: asks with SIGNAL, and insists when LIMIT_S have passed.
stop_process() {
    local name=$1 signal=$2 limit_s=$3 pid
    if alive "$name"; then
        pid=$(pid_of "$name")
        # A frozen process hears nothing but CONT and KILL.
        kill "-$signal" "$pid" 2>/dev/null || true
        kill -CONT "$pid" 2>/dev/null || true
        wait_until_gone "$name" "$limit_s" || kill_process "$name"
    fi
    rm -f "$(record_of "$name")"
}

# The whole group: a server's helpers must not outlive it.
kill_process() {
    alive "$1" || return 0
    kill -KILL -- "-$(pid_of "$1")" 2>/dev/null || true
    wait_until_gone "$1" 10 || die "$1 does not die" "its pid is $(pid_of "$1")"
}

wait_until_gone() {
    local name=$1 limit_s=$2 begun_s=$SECONDS told_s=2
    while alive "$name"; do
        local waited_s=$((SECONDS - begun_s))
        ((waited_s < limit_s)) || return 1
        if ((waited_s >= told_s)); then
            still "stopping $name" "$waited_s"
            told_s=$((told_s + 5))
        fi
        pause 0.05
    done
}

# wait_ready NAME LIMIT_S CHECK...: until CHECK succeeds. Gives up early when the process is gone.
wait_ready() {
    local name=$1 limit_s=$2 begun_s=$SECONDS told_s=2
    shift 2
    until "$@"; do
        local waited_s=$((SECONDS - begun_s))
        alive "$name" || give_up "$name" "$name stopped while starting"
        ((waited_s < limit_s)) || give_up "$name" "$name was not ready after $limit_s s"
        if ((waited_s >= told_s)); then
            still "starting $name" "$waited_s"
            told_s=$((told_s + 5))
        fi
        pause 0.05
    done
}

give_up() {
    show_end_of "$(log_of "$1")"
    die "$2" "the whole log is $(log_of "$1")"
}

# port NAME: the port that NAME was given, if it ever was.
port() { cat "$DEV/ports/$1" 2>/dev/null || true; }

# choose_port NAME: keeps the port of last time while it is free, so that addresses stay the same over restarts.
# New ports come from below the kernel's ephemeral range, where no client's own socket can sit on them.
choose_port() {
    local file=$DEV/ports/$1 candidate
    if [[ -s $file ]] && is_free "$(<"$file")"; then return; fi
    rm -f "$file"
    until candidate=$((20000 + RANDOM % 12000)) && ! is_promised "$candidate" && is_free "$candidate"; do :; done
    echo "$candidate" >"$file"
}

is_free() { ! (: <>"/dev/tcp/${2-127.0.0.1}/$1") 2>/dev/null; }
is_promised() { grep -qsx "$1" "$DEV"/ports/*; }
