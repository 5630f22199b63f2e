# shellcheck shell=bash
# Upgrade: from another version to this one and back, under load (tests/it/upgrade.rs).
# Promise: the other version is built from git in .dev/upgrade; the checkout stays as it is.

# upgrade [REVISION]: from this revision, which is the one before the newest migration by itself.
upgrade() {
    local before=$DEV/upgrade revision=${1-}
    no_more "${@:2}"
    require_rust
    [[ -n $revision ]] || revision=$(before_the_newest_migration)
    git -C "$ROOT" rev-parse --quiet --verify "$revision^{commit}" >/dev/null ||
        die "there is no revision ${revision:-before the newest migration} here" "a full clone has all of them; ./dev upgrade REVISION takes another"
    take_lock
    provide linker "${OWN_SERVERS[@]}"
    bring_up_servers
    release_lock
    use_servers
    say "from $(git -C "$ROOT" log -1 --format='%h (%as)' "$revision")"
    check_out_before "$before" "$revision"
    with_progress "building it" \
        cargo build --quiet --locked --bin tidings --manifest-path "$before/Cargo.toml" --target-dir "$before/target"
    cd "$ROOT" || exit
    TIDINGS_BEFORE=$before cargo test --locked --test it -- --ignored --nocapture upgrade::
}

before_the_newest_migration() {
    local newest
    newest=$(git -C "$ROOT" log -1 --format=%H -- migrations) && [[ -n $newest ]] && echo "$newest^"
}

# What was built of it stays, the sources are all new to cargo. The first time there is nothing to be taken away.
check_out_before() {
    find "$1" -mindepth 1 -maxdepth 1 ! -name target -exec rm -rf {} + 2>/dev/null || true
    mkdir -p "$1"
    git -C "$ROOT" archive "$2" | tar -x -m -C "$1"
}
