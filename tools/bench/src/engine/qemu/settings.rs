//! What a scenario's settings are to QEMU: migration capabilities and parameters, the same for source and target.
//!
//! What no QEMU can do is refused here; what only some can is left to the QEMU at hand, which knows best.

use serde_json::{Map, Value, json};

use crate::engine::whole;
use crate::scenario::{Compression, EngineSetting, MemoryBacking, Scenario, Strategy};

/// The most connections that multifd can have.
const CHANNELS_MAX: u16 = 255;

/// The first version in which post-copy and multifd are meant to be used together.
const POST_COPY_MULTIFD_SINCE: (u32, u32) = (10, 1);

/// The least xbzrle cache, MiB: QEMU's default.
const XBZRLE_CACHE_MIB_MIN: u32 = 64;

/// The largest downtime-limit that QEMU takes, ms.
const DOWNTIME_LIMIT_MS_MAX: f64 = 2_000_000.0;

/// Migration settings in QEMU's words.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Settings {
    /// Capabilities to switch on.
    pub(super) capabilities: Vec<&'static str>,
    /// Parameters to set.
    pub(super) parameters: Map<String, Value>,
    /// Whether post-copy is to be started after the first round.
    pub(super) post_copy: bool,
}

impl Settings {
    /// What `setting` asks of a QEMU of `version`.
    ///
    /// # Errors
    /// What QEMU lacks, in words.
    pub(super) fn of(
        scenario: &Scenario,
        setting: &EngineSetting,
        version: Option<(u32, u32)>,
    ) -> Result<Self, String> {
        let EngineSetting {
            engine: _,
            strategy,
            streams,
            compression,
            bandwidth_mbit_s,
            // It has no check to leave out.
            verify: _,
            memory,
            local,
        } = setting;
        let Some(streams) = streams.fixed() else {
            return Err("choosing the number of its streams".to_owned());
        };
        if *local {
            return Err("handing memory over within one host".to_owned());
        }
        if *memory == MemoryBacking::Hugepages {
            return Err("huge pages in a way that is measured here".to_owned());
        }
        // Events tell rounds by the moment; the return path tells the source how the target fares, as libvirt has it.
        let mut capabilities = vec!["events", "return-path"];
        let mut parameters = Map::new();
        parameters.insert("downtime-limit".to_owned(), json!(whole(scenario.downtime_ms.max(1.0))));
        if scenario.downtime_ms > DOWNTIME_LIMIT_MS_MAX {
            return Err(format!("its downtime-limit is at most {DOWNTIME_LIMIT_MS_MAX} ms"));
        }
        // 0 is no limit; without being told QEMU keeps to 1 Gbit/s.
        let bytes_per_s = bandwidth_mbit_s.map_or(0, |mbit_s| whole(mbit_s * 1e6 / 8.0).max(1));
        parameters.insert("max-bandwidth".to_owned(), json!(bytes_per_s));
        let post_copy = match strategy {
            Strategy::PreCopy => false,
            Strategy::AutoConverge => {
                capabilities.push("auto-converge");
                false
            }
            Strategy::PostCopy => {
                capabilities.push("postcopy-ram");
                parameters.insert("max-postcopy-bandwidth".to_owned(), json!(bytes_per_s));
                true
            }
        };
        let mut multifd = streams > 1;
        match compression {
            Compression::None => {}
            Compression::Zstd => {
                multifd = true;
                parameters.insert("multifd-compression".to_owned(), json!("zstd"));
            }
            Compression::Xbzrle => {
                if multifd {
                    return Err("xbzrle over several streams".to_owned());
                }
                capabilities.push("xbzrle");
                let bytes = u64::from(xbzrle_cache_mib(scenario.memory_mib)) << 20;
                parameters.insert("xbzrle-cache-size".to_owned(), json!(bytes));
            }
            Compression::Lz4 => return Err("lz4; it has zstd and xbzrle".to_owned()),
            Compression::Auto => return Err("choosing by itself how pages are packed".to_owned()),
        }
        if multifd {
            check_multifd(streams, post_copy, version)?;
            capabilities.push("multifd");
            parameters.insert("multifd-channels".to_owned(), json!(streams.max(1)));
        }
        Ok(Self { capabilities, parameters, post_copy })
    }

    /// The capabilities as `migrate-set-capabilities` takes them.
    #[must_use]
    pub(super) fn capabilities_argument(&self) -> Value {
        let on = |name: &&str| json!({ "capability": name, "state": true });
        json!({ "capabilities": self.capabilities.iter().map(on).collect::<Vec<_>>() })
    }
}

fn check_multifd(streams: u16, post_copy: bool, version: Option<(u32, u32)>) -> Result<(), String> {
    if streams > CHANNELS_MAX {
        return Err(format!("more than {CHANNELS_MAX} streams"));
    }
    if post_copy && version.is_none_or(|version| version < POST_COPY_MULTIFD_SINCE) {
        let (major, minor) = POST_COPY_MULTIFD_SINCE;
        return Err(format!("post-copy over multifd before version {major}.{minor}"));
    }
    Ok(())
}

/// A cache that holds a working set of half of memory: a page that is not in it when it is sent again is sent whole.
/// QEMU takes powers of two up to the size of memory.
fn xbzrle_cache_mib(memory_mib: u32) -> u32 {
    let half = memory_mib / 2;
    let power = if half == 0 { 1 } else { 1 << half.ilog2() };
    power.max(XBZRLE_CACHE_MIB_MIN.min(if memory_mib == 0 { 1 } else { 1 << memory_mib.ilog2() }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{Streams, file};

    fn scenario() -> Scenario {
        let text = r#"
            title = "t"
            summary = "s"
            [engines.qemu]
            kind = "qemu"
            [[scenarios]]
            name = "one"
            title = "one"
            guest = "idle"
            memory_mib = 1088
            downtime_ms = 49.6
            engines = ["qemu"]
        "#;
        file::parse("test", text).unwrap().scenarios.remove(0)
    }

    fn of(change: impl FnOnce(&mut EngineSetting)) -> Result<Settings, String> {
        let scenario = scenario();
        let mut setting = scenario.engines[0].clone();
        change(&mut setting);
        Settings::of(&scenario, &setting, Some((7, 2)))
    }

    #[test]
    fn plain_pre_copy_is_limited_by_its_downtime_alone() {
        let settings = of(|_| {}).unwrap();
        assert_eq!(settings.capabilities, ["events", "return-path"]);
        assert_eq!(Value::Object(settings.parameters), json!({ "downtime-limit": 50, "max-bandwidth": 0 }));
        assert!(!settings.post_copy);
        let limited = of(|setting| setting.bandwidth_mbit_s = Some(8.0)).unwrap();
        assert_eq!(limited.parameters["max-bandwidth"], json!(1_000_000));
    }

    #[test]
    fn streams_and_packing_become_multifd_and_xbzrle() {
        let multifd = of(|setting| setting.streams = 4.into()).unwrap();
        assert!(multifd.capabilities.contains(&"multifd"));
        assert_eq!(multifd.parameters["multifd-channels"], json!(4));
        assert!(!multifd.parameters.contains_key("multifd-compression"));
        let zstd = of(|setting| setting.compression = Compression::Zstd).unwrap();
        assert!(zstd.capabilities.contains(&"multifd"));
        assert_eq!(
            (&zstd.parameters["multifd-channels"], &zstd.parameters["multifd-compression"]),
            (&json!(1), &json!("zstd"))
        );
        let xbzrle = of(|setting| setting.compression = Compression::Xbzrle).unwrap();
        assert!(xbzrle.capabilities.contains(&"xbzrle") && !xbzrle.capabilities.contains(&"multifd"));
        assert_eq!(xbzrle.parameters["xbzrle-cache-size"], json!(512_u64 << 20));
        let on = json!({ "capability": "xbzrle", "state": true });
        assert_eq!(xbzrle.capabilities_argument()["capabilities"][2], on);
    }

    #[test]
    fn strategies_become_capabilities() {
        let converging = of(|setting| setting.strategy = Strategy::AutoConverge).unwrap();
        assert!(converging.capabilities.contains(&"auto-converge") && !converging.post_copy);
        let post_copy = of(|setting| setting.strategy = Strategy::PostCopy).unwrap();
        assert!(post_copy.capabilities.contains(&"postcopy-ram") && post_copy.post_copy);
    }

    #[test]
    fn what_qemu_lacks_is_named() {
        let lacking = |change: fn(&mut EngineSetting), word: &str| {
            let what = of(change).unwrap_err();
            assert!(what.contains(word), "{what}");
        };
        lacking(|setting| setting.compression = Compression::Lz4, "lz4");
        lacking(|setting| setting.compression = Compression::Auto, "by itself");
        lacking(|setting| (setting.compression, setting.streams) = (Compression::Xbzrle, 2.into()), "xbzrle");
        lacking(|setting| setting.streams = Streams::AUTO, "number");
        lacking(|setting| setting.local = true, "one host");
        lacking(|setting| setting.memory = MemoryBacking::Hugepages, "huge pages");
        lacking(|setting| setting.streams = 256.into(), "255");
        lacking(|setting| (setting.strategy, setting.streams) = (Strategy::PostCopy, 2.into()), "10.1");
        let (scenario, mut setting) = (scenario(), scenario().engines.remove(0));
        (setting.strategy, setting.streams) = (Strategy::PostCopy, 2.into());
        assert!(Settings::of(&scenario, &setting, Some((10, 1))).is_ok());
        assert!(Settings::of(&scenario, &setting, None).is_err());
    }

    #[test]
    fn a_cache_is_a_power_of_two_within_memory() {
        let sizes = [(0, 1), (16, 16), (64, 64), (100, 64), (128, 64), (512, 256), (1088, 512), (4096, 2048)];
        for (memory_mib, cache_mib) in sizes {
            assert_eq!(xbzrle_cache_mib(memory_mib), cache_mib, "{memory_mib}");
        }
    }
}
