# shellcheck shell=bash
# Fuzz: looks for an input that breaks what must hold for any input (fuzz/properties.rs), by libFuzzer.
# Promise: the stable compiler does, and nothing needs to be installed but a C++ compiler; what is found stays in .dev/fuzz/.

FUZZ_TARGETS=(notice letter merge_patch cursor key conditions document)

# fuzz [TARGET] [SECONDS]: every target for a minute, unless told otherwise.
fuzz() {
    local targets=("${FUZZ_TARGETS[@]}") target
    if [[ ${1-} =~ ^[a-z] ]]; then
        [[ " ${FUZZ_TARGETS[*]} " == *" $1 "* ]] || die "no such target: $1" "one of ${FUZZ_TARGETS[*]}"
        targets=("$1")
        shift
    fi
    local seconds=${1:-60} failed=0
    [[ $seconds =~ ^[1-9][0-9]*$ ]] || die "seconds are a number, not $seconds" "./dev help"
    no_more "${@:2}"
    require_rust
    ((EUID == 0)) || find_cxx >/dev/null || die "there is no C++ compiler" "have it installed: sudo apt-get install $(package_of cxx)"
    provide linker cxx
    build_fuzzer
    for target in "${targets[@]}"; do fuzz_one "$target" "$seconds" || failed=1; done
    return "$failed"
}

build_fuzzer() {
    RUSTC_WRAPPER=$ROOT/fuzz/rustc CARGO_TARGET_DIR=$ROOT/target/fuzz \
        with_progress "building the fuzzer" cargo build --quiet --locked --release --manifest-path "$ROOT/fuzz/Cargo.toml"
}

fuzz_one() {
    local target=$1 seconds=$2 corpus=$DEV/fuzz/$1 log=$DEV/fuzz/$1.log status=0
    mkdir -p "$corpus"
    TIDINGS_FUZZ=$target "$ROOT/target/fuzz/release/fuzz" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 \
        -max_len=4096 -print_final_stats=1 -verbosity=1 -artifact_prefix="$DEV/fuzz/found-$target-" "$corpus" "$ROOT/fuzz/seeds/$target" \
        >"$log" 2>&1 || status=$?
    printf '%-12s %12s executions, %5s inputs kept: %s\n' "$target" "$(fuzz_stat number_of_executed_units "$log")" \
        "$(find "$corpus" -type f | wc -l)" "$( ((status == 0)) && echo 'nothing found' || echo "FOUND, see $log")"
    return "$status"
}

fuzz_stat() { sed -n "s/^stat::$1: *//p" "$2"; }
