//! The committed seeds of the fuzz targets, held against what must hold for any input. `./dev fuzz` looks for more.

use std::{fs, path::Path};

#[path = "../../fuzz/properties.rs"]
mod properties;

#[test]
fn every_seed_keeps_every_property() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    for (target, property) in properties::ALL {
        let found: Vec<_> = fs::read_dir(seeds.join(target)).unwrap().map(|seed| seed.unwrap().path()).collect();
        assert!(!found.is_empty(), "{target} has no seeds");
        for seed in found {
            eprintln!("{}", seed.display());
            property(&fs::read(seed).unwrap());
        }
    }
}
