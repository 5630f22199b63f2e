# shellcheck shell=bash
# Instructions: counts what the hot paths execute (bench/src/bin/hot_paths.rs), and compares it with the figures that are committed.
# Promise: the same figures whatever else the machine does. Another compiler or C library makes other figures: they stand in the file,
# and where they differ nothing is compared.

INSTRUCTIONS=$ROOT/bench/instructions.tsv
# In percent. Random keys and ids change the way through a map by less.
INSTRUCTIONS_TOLERANCE=3
INSTRUCTIONS_TIMES=1000

# instructions [--accept]: without it, fails when a path costs more than the tolerance allows, or less without having been told.
instructions() {
    [[ ${1---accept} == --accept && $# -le 1 ]] || die "instructions takes --accept and nothing else" "./dev help"
    require_rust
    provide linker valgrind
    cd "$ROOT" || exit
    with_progress "building the hot paths" cargo build --quiet --locked --release --package tidings-bench --bin hot_paths
    local counted=$DEV/instructions.tsv
    count_all >"$counted"
    if [[ ${1-} == --accept ]]; then
        cp "$counted" "$INSTRUCTIONS"
        say "written to ${INSTRUCTIONS#"$ROOT"/}"
    else
        [[ $(head -n 1 "$counted") == $(head -n 1 "$INSTRUCTIONS") ]] ||
            die "these figures cannot be compared: counted with $(head -n 1 "$counted"), committed with $(head -n 1 "$INSTRUCTIONS")" \
                "on the commit before yours, ./dev instructions --accept makes figures of this machine"
        compare_instructions "$INSTRUCTIONS" "$counted"
    fi
}

count_all() {
    local path
    printf '# %s, %s\n' "$(rustc --version)" "$(ldd --version | head -n 1)"
    while read -r path; do
        printf '%s\t%s\n' "$path" $((($(count_run "$path" $((INSTRUCTIONS_TIMES + 1))) - $(count_run "$path" 1)) / INSTRUCTIONS_TIMES))
    done < <(hot_paths list)
}

hot_paths() { "${CARGO_TARGET_DIR:-$ROOT/target}/release/hot_paths" "$@"; }

# count_run PATH TIMES: the instructions of the whole process.
count_run() {
    valgrind --tool=callgrind --callgrind-out-file=/dev/null \
        "${CARGO_TARGET_DIR:-$ROOT/target}/release/hot_paths" run "$ROOT/bench/profile.schema.json" "$1" "$2" 2>&1 |
        sed -n 's/^==[0-9]*== Collected : //p'
}

compare_instructions() {
    awk -F '\t' -v tolerance="$INSTRUCTIONS_TOLERANCE" '
        /^#/ { next }
        NR == FNR { committed[$1] = $2; next }
        {
            change = $1 in committed ? 100 * ($2 / committed[$1] - 1) : 0
            off = !($1 in committed) || change > tolerance || change < -tolerance
            verdict = !($1 in committed) ? "not committed" : change > tolerance ? "COSTS MORE" : change < -tolerance ? "costs less: --accept it" : ""
            printf "%-45s %10d %10d %+6.1f %%  %s\n", $1, committed[$1], $2, change, verdict
            missed += off
            delete committed[$1]
        }
        END { for (path in committed) { print path " is no path any more"; missed++ } exit missed > 0 }' "$1" "$2"
}
