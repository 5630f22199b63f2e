# shellcheck shell=bash
# Planted: bugs that the tests have to catch, a patch each in tests/planted. A test that cannot fail proves nothing.
# Promise: the checkout stays as it is. A bug is planted in a copy of it, in .dev/planted, which is built in a folder of its own.
# Above its diff a patch says what is wrong with it, and in lines `caught-by: TEST` which tests have to fail: each of `tests/it`, by its
# whole name. One that is somewhere else has arguments for cargo test before its name: `caught-by: --lib relay::cursor::tests::..`.
# Not here, on purpose: tests that need the examples (`applications`, `convergence`). Building those too would make each bug dearer.

PLANTED=$ROOT/tests/planted
PLANTED_COPY=$DEV/planted/copy
PLANTED_LOG=$DEV/planted/log

# planted [--check] [NAME..]: all of them, unless some are named. With --check it only looks whether each can be planted.
planted() {
    local bugs check=
    if [[ ${1-} == --check ]]; then check=yes && shift; fi
    choose_bugs "$@"
    check_bugs
    [[ -z $check ]] || return 0
    require_rust
    take_lock
    provide linker "${OWN_SERVERS[@]}"
    bring_up_servers
    release_lock
    use_servers
    make_planted_copy
    tests_pass
    plant_all
}

choose_bugs() {
    local bug
    bugs=("$@")
    ((${#bugs[@]} > 0)) || mapfile -t bugs < <(basename --suffix=.patch "$PLANTED"/*.patch)
    for bug in "${bugs[@]}"; do
        [[ -f $PLANTED/$bug.patch ]] || die "no such bug: $bug" "they are in tests/planted"
    done
}

# Cheap, and nothing is built for it: whether each still applies, and names tests that there are.
check_bugs() {
    local bug test rotten=0
    for bug in "${bugs[@]}"; do
        git -C "$ROOT" apply --check "$PLANTED/$bug.patch" || { say "$bug does not apply any more: renew it" && rotten=1; }
        [[ -n $(catchers "$bug") ]] || { say "$bug names no test that catches it" && rotten=1; }
        while IFS=$'\t' read -r _ test; do
            grep -qrw --include='*.rs' "fn ${test##*::}" "$ROOT"/{tests,sdk,src} || { say "$bug: there is no test $test" && rotten=1; }
        done < <(catchers "$bug")
    done
    ((rotten == 0)) || die "planted bugs have to be renewed, see above" "they are in tests/planted"
}

# catchers BUG..: of each test that has to fail a line: arguments for cargo test, a tab, its name.
catchers() {
    local patches=("${@/#/$PLANTED/}")
    awk '/^caught-by: / { test = $NF; $1 = $NF = ""; gsub(/^ +| +$/, ""); print ($0 == "" ? "--test it" : $0) "\t" test }' \
        "${patches[@]/%/.patch}" | sort -u
}

# What git knows of the checkout, changes that are not committed included. It is git that brings the copy up to date, so that a file that
# is as it was keeps its time, and cargo builds what differs. The copy is a checkout to its tests; its servers are ours.
make_planted_copy() {
    local state objects
    mkdir -p "$PLANTED_COPY" "$PLANTED_LOG"
    objects=$(git -C "$ROOT" rev-parse --path-format=absolute --git-path objects) || die "$ROOT is no checkout of git"
    state=$(git -C "$ROOT" stash create)
    git init --quiet "$PLANTED_COPY"
    echo "$objects" >"$PLANTED_COPY/.git/objects/info/alternates"
    PLANTED_STATE=$(git -C "$ROOT" rev-parse "${state:-HEAD}")
    uproot
    ln -sfn "$DEV" "$PLANTED_COPY/.dev"
}

uproot() { git -C "$PLANTED_COPY" reset --quiet --hard "$PLANTED_STATE"; }

# A test that fails without a bug says nothing when it fails with one.
tests_pass() {
    local test
    build_planted nothing "${bugs[@]}" || give_up_planting nothing "the tests cannot be built"
    run_catchers nothing "${bugs[@]}"
    while IFS=$'\t' read -r _ test; do
        has_come_to ok "$test" nothing || give_up_planting nothing "$test does not pass although no bug is planted"
    done < <(catchers "${bugs[@]}")
}

plant_all() {
    local bug missed=0 begun_s
    for bug in "${bugs[@]}"; do
        begun_s=$SECONDS
        git -C "$PLANTED_COPY" apply "$PLANTED/$bug.patch"
        build_planted "$bug" "$bug" || give_up_planting "$bug" "$bug does not compile any more: renew it"
        run_catchers "$bug" "$bug"
        judge "$bug" $((SECONDS - begun_s)) || missed=$((missed + 1))
        uproot
    done
    say "bugs planted: ${#bugs[@]}, not caught: $missed"
    ((missed == 0)) || die "tests that do not fail prove nothing" "what they said is in $PLANTED_LOG"
}

# judge BUG SECONDS: each test that it names has to have failed.
judge() {
    local by=() missed=() test
    while IFS=$'\t' read -r _ test; do
        if has_come_to FAILED "$test" "$1"; then by+=("$test"); else missed+=("$test"); fi
    done < <(catchers "$1")
    if ((${#missed[@]} == 0)); then
        printf 'caught      %-38s by %s (%d s)\n' "$1" "$(in_words "${by[@]}")" "$2"
    else
        printf 'NOT CAUGHT  %-38s by %s (%d s)\n' "$1" "$(in_words "${missed[@]}")" "$2"
        return 1
    fi
}

in_words() {
    local all
    all=$(printf ', %s' "$@")
    echo "${all#, }"
}

# build_planted LOG BUG..: the tests that catch them. An error here is one of the compiler's.
build_planted() {
    local log=$1 targets arguments
    shift
    mapfile -t targets < <(catchers "$@" | cut -f 1 | sort -u)
    : >"$PLANTED_LOG/$log"
    for arguments in "${targets[@]}"; do
        with_progress "building with $log planted" cargo_planted "$log" "$arguments" --no-run || return 1
    done
}

# run_catchers LOG BUG..: what they came to stands in the log. That some fail is what is hoped for.
run_catchers() {
    local log=$1 targets arguments names
    shift
    mapfile -t targets < <(catchers "$@" | cut -f 1 | sort -u)
    for arguments in "${targets[@]}"; do
        mapfile -t names < <(catchers "$@" | awk -F '\t' -v target="$arguments" '$1 == target { print $2 }')
        with_progress "testing with $log planted" cargo_planted "$log" "$arguments" -- --exact "${names[@]}" || true
    done
}

cargo_planted() {
    local log=$1 target
    read -ra target <<<"$2"
    shift 2
    CARGO_TARGET_DIR=$DEV/planted/target RUST_BACKTRACE=0 into "$PLANTED_LOG/$log" \
        cargo test --locked --manifest-path "$PLANTED_COPY/Cargo.toml" "${target[@]}" "$@"
}

# has_come_to RESULT TEST LOG: a test that was not found, or not finished, has come to nothing.
has_come_to() { grep --quiet --line-regexp --fixed-strings "test $2 ... $1" "$PLANTED_LOG/$3"; }

give_up_planting() {
    show_end_of "$PLANTED_LOG/$1"
    die "$2" "the whole log is $PLANTED_LOG/$1"
}
