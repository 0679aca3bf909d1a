//! Parsing of workload words. What the words mean is told in the parent module.

use super::*;
use core::str::FromStr;

const DIRTY_KEYS: &str = "rate= set= order= write= fill= zero= text= random= verify=";
const FILL_KEYS: &str = "mib= zero= text= random= verify=";
const HTTP_KEYS: &str = "ip= gw= ip6= port= fill= zero= text= random= verify=";
const MEMORY: &str = "a whole number of MiB from 1 to 1048576";
const MEMORY_OR_NONE: &str = "a whole number of MiB from 0 to 1048576";
const RATE: &str = "a whole number of MiB/s from 1 to 1048576, or max";
const VERIFY: &str = "a whole number of MiB/s from 0 to 1048576";
const PERCENT: &str = "a whole number of percent from 0 to 100";
const ADDRESS: &str = "an IPv4 address with its prefix length, as in 10.77.0.2/24";
const ADDRESS6: &str = "an IPv6 address with its prefix length, as in fd77::2/64";

/// One `key=value` word.
#[derive(Clone, Copy)]
struct Pair<'a> {
    word: &'a str,
    key: &'a str,
    value: &'a str,
}

impl<'a> Pair<'a> {
    fn parse(word: &'a str) -> Result<Self, WorkloadError> {
        match word.split_once('=') {
            Some((key, value)) if !key.is_empty() => Ok(Self { word, key, value }),
            Some(_) | None => Err(WorkloadError::NotKeyValue { word: Word::new(word) }),
        }
    }

    fn bad(&self, allowed: &'static str) -> WorkloadError {
        WorkloadError::BadValue { word: Word::new(self.word), allowed }
    }

    fn unknown(&self, mode: &'static str, allowed: &'static str) -> WorkloadError {
        WorkloadError::UnknownKey { word: Word::new(self.word), mode, allowed }
    }

    fn number<T: FromStr + PartialOrd>(
        &self,
        min: T,
        max: T,
        allowed: &'static str,
    ) -> Result<T, WorkloadError> {
        // FromStr takes a leading '+', which nobody means.
        let plain = self.value.bytes().all(|b| b.is_ascii_digit());
        let number = self.value.parse::<T>().ok().filter(|n| plain && *n >= min && *n <= max);
        number.ok_or(self.bad(allowed))
    }

    /// One of a few names.
    fn name<T: Copy>(&self, names: &[(&str, T)], allowed: &'static str) -> Result<T, WorkloadError> {
        let found = names.iter().find(|(name, _)| *name == self.value);
        found.map(|(_, value)| *value).ok_or(self.bad(allowed))
    }

    fn address<A: FromStr>(&self, prefix_max: u8, allowed: &'static str) -> Result<(A, u8), WorkloadError> {
        let (address, prefix) = self.value.split_once('/').ok_or(self.bad(allowed))?;
        let length = Pair { value: prefix, ..*self }.number(1, prefix_max, allowed)?;
        Ok((address.parse().map_err(|_| self.bad(allowed))?, length))
    }

    /// Stores a parsed value, once.
    fn set<T>(&self, slot: &mut Option<T>, value: T) -> Result<(), WorkloadError> {
        if slot.replace(value).is_some() {
            return Err(WorkloadError::Repeated { word: Word::new(self.word) });
        }
        Ok(())
    }
}

/// The keys of a fill, as far as they have been given.
#[derive(Default)]
struct FillWords {
    mib: Option<u32>,
    zero: Option<u8>,
    text: Option<u8>,
    random: Option<u8>,
    verify: Option<u32>,
}

impl FillWords {
    /// Takes `pair` if it is one of the keys about content; says whether it was.
    fn take(&mut self, pair: &Pair<'_>) -> Result<bool, WorkloadError> {
        match pair.key {
            "zero" => pair.set(&mut self.zero, pair.number(0, 100, PERCENT)?)?,
            "text" => pair.set(&mut self.text, pair.number(0, 100, PERCENT)?)?,
            "random" => pair.set(&mut self.random, pair.number(0, 100, PERCENT)?)?,
            "verify" => pair.set(&mut self.verify, pair.number(0, RATE_MIB_S_MAX, VERIFY)?)?,
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Takes the keys about content, and `fill=MiB`.
    fn take_with_amount(&mut self, pair: &Pair<'_>) -> Result<bool, WorkloadError> {
        if pair.key == "fill" {
            pair.set(&mut self.mib, pair.number(0, MEMORY_MIB_MAX, MEMORY_OR_NONE)?)?;
            return Ok(true);
        }
        self.take(pair)
    }

    /// Omitted kinds have no share, except that random pages take the rest if they are not named.
    fn finish(self) -> Result<Fill, WorkloadError> {
        let (zero, text) = (self.zero.unwrap_or(0), self.text.unwrap_or(0));
        let random = self.random.unwrap_or(100u8.saturating_sub(zero.saturating_add(text)));
        let total = u32::from(zero) + u32::from(text) + u32::from(random);
        let shares = Shares::new(zero, text, random).ok_or(WorkloadError::Shares { total })?;
        let verify_mib_s = self.verify.unwrap_or(VERIFY_MIB_S_DEFAULT);
        Ok(Fill { mib: self.mib.unwrap_or(0), shares, verify_mib_s })
    }
}

impl Workload {
    /// Parses `MODE key=value ...`, words being separated by white space.
    ///
    /// # Errors
    /// If a word is unknown, repeated or missing, or a value is not allowed; the error names the word.
    pub fn parse(words: &str) -> Result<Self, WorkloadError> {
        Self::from_words(words.split_ascii_whitespace())
    }

    /// Parses the mode and its keys from single words.
    ///
    /// # Errors
    /// As [`Workload::parse`].
    pub fn from_words<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Self, WorkloadError> {
        match words.next().ok_or(WorkloadError::Empty)? {
            "idle" => idle(words),
            "dirty" => dirty(words),
            "fill" => fill(words),
            "http" => http(words),
            word => Err(WorkloadError::UnknownMode { word: Word::new(word) }),
        }
    }
}

fn idle<'a>(mut words: impl Iterator<Item = &'a str>) -> Result<Workload, WorkloadError> {
    match words.next() {
        None => Ok(Workload::Idle),
        Some(word) => {
            Err(WorkloadError::UnknownKey { word: Word::new(word), mode: "idle", allowed: "no keys" })
        }
    }
}

fn dirty<'a>(words: impl Iterator<Item = &'a str>) -> Result<Workload, WorkloadError> {
    let (mut rate, mut set_mib, mut order, mut write) = (None, None, None, None);
    let mut fill = FillWords::default();
    for word in words {
        let pair = Pair::parse(word)?;
        match pair.key {
            "rate" if pair.value == "max" => pair.set(&mut rate, Rate::Max)?,
            "rate" => pair.set(&mut rate, Rate::MibPerSecond(pair.number(1, RATE_MIB_S_MAX, RATE)?))?,
            "set" => pair.set(&mut set_mib, pair.number(1, MEMORY_MIB_MAX, MEMORY)?)?,
            "order" => {
                let orders = [("linear", Order::Linear), ("random", Order::Random)];
                pair.set(&mut order, pair.name(&orders, "linear or random")?)?;
            }
            "write" => {
                let writes = [("word", Write::Word), ("page", Write::Page)];
                pair.set(&mut write, pair.name(&writes, "word or page")?)?;
            }
            _ if fill.take_with_amount(&pair)? => {}
            _ => return Err(pair.unknown("dirty", DIRTY_KEYS)),
        }
    }
    Ok(Workload::Dirty(Dirty {
        rate: rate.unwrap_or(Rate::MibPerSecond(100)),
        set_mib: set_mib.unwrap_or(64),
        order: order.unwrap_or(Order::Linear),
        write: write.unwrap_or(Write::Word),
        fill: fill.finish()?,
    }))
}

fn fill<'a>(words: impl Iterator<Item = &'a str>) -> Result<Workload, WorkloadError> {
    let mut fill = FillWords::default();
    for word in words {
        let pair = Pair::parse(word)?;
        match pair.key {
            "mib" => pair.set(&mut fill.mib, pair.number(1, MEMORY_MIB_MAX, MEMORY)?)?,
            _ if fill.take(&pair)? => {}
            _ => return Err(pair.unknown("fill", FILL_KEYS)),
        }
    }
    if fill.mib.is_none() {
        return Err(WorkloadError::Missing { mode: "fill", key: "mib=MiB" });
    }
    Ok(Workload::Fill(fill.finish()?))
}

fn http<'a>(words: impl Iterator<Item = &'a str>) -> Result<Workload, WorkloadError> {
    let (mut ip, mut gateway, mut ip6, mut port) = (None, None, None, None);
    let mut fill = FillWords::default();
    for word in words {
        let pair = Pair::parse(word)?;
        match pair.key {
            "ip" => pair.set(&mut ip, pair.address::<Ipv4Addr>(32, ADDRESS)?)?,
            "gw" => {
                let address = pair.value.parse().map_err(|_| pair.bad("an IPv4 address"))?;
                pair.set(&mut gateway, address)?;
            }
            "ip6" => pair.set(&mut ip6, pair.address::<Ipv6Addr>(128, ADDRESS6)?)?,
            "port" => pair.set(&mut port, pair.number(1, u16::MAX, "a port from 1 to 65535")?)?,
            _ if fill.take_with_amount(&pair)? => {}
            _ => return Err(pair.unknown("http", HTTP_KEYS)),
        }
    }
    Ok(Workload::Http(Http {
        ip: ip.ok_or(WorkloadError::Missing { mode: "http", key: "ip=ADDR/LEN" })?,
        gateway,
        ip6,
        port: port.unwrap_or(80),
        fill: fill.finish()?,
    }))
}

impl FromStr for Workload {
    type Err = WorkloadError;

    fn from_str(words: &str) -> Result<Self, Self::Err> {
        Self::parse(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::{String, ToString};

    fn error(words: &str) -> String {
        Workload::parse(words).unwrap_err().to_string()
    }

    #[test]
    fn defaults_and_values() {
        assert_eq!(Workload::parse(" idle "), Ok(Workload::Idle));
        let dirty = Workload::parse("dirty rate=500 set=256 order=random write=page fill=10 zero=25 text=50")
            .unwrap();
        let shown =
            "dirty rate=500 set=256 order=random write=page fill=10 zero=25 text=50 random=25 verify=32";
        assert_eq!(dirty.to_string(), shown);
        let shown = "dirty rate=100 set=64 order=linear write=word fill=0 zero=0 text=0 random=100 verify=32";
        assert_eq!(Workload::parse("dirty").unwrap().to_string(), shown);
        let http =
            Workload::parse("http ip=10.77.0.2/24 gw=10.77.0.1 ip6=fd77::2/64 fill=800 verify=0").unwrap();
        let shown = "http ip=10.77.0.2/24 gw=10.77.0.1 ip6=fd77::2/64 port=80 \
                     fill=800 zero=0 text=0 random=100 verify=0";
        assert_eq!(http.to_string(), shown);
    }

    #[test]
    fn refusals_name_the_word_and_what_is_allowed() {
        let refused = [
            ("", "idle, dirty, fill, http"),
            ("dance", "unknown workload 'dance'"),
            ("idle now", "'idle' does not know 'now'"),
            ("dirty fast", "'fast' is not of the form key=value"),
            ("dirty =5", "'=5' is not of the form"),
            ("dirty speed=5", "does not know 'speed=5'; it takes rate="),
            ("dirty rate=0", "'rate=0': the value must be a whole number of MiB/s from 1"),
            ("dirty rate=+5", "'rate=+5'"),
            ("dirty rate=", "'rate='"),
            ("dirty rate=5 rate=6", "'rate=6' gives its key a second time"),
            ("dirty set=2000000", "from 1 to 1048576"),
            ("dirty order=up", "linear or random"),
            ("dirty write=byte", "word or page"),
            ("dirty ip=1.2.3.4/8", "does not know 'ip=1.2.3.4/8'"),
            ("fill", "needs mib=MiB"),
            ("fill mib=0", "from 1 to"),
            ("fill mib=5 fill=5", "does not know 'fill=5'"),
            ("fill mib=5 zero=50 text=60", "add up to 110 percent"),
            ("fill mib=5 random=60", "add up to 60 percent"),
            ("fill mib=5 zero=101", "from 0 to 100"),
            ("http", "needs ip=ADDR/LEN"),
            ("http ip=10.0.0.1", "an IPv4 address with its prefix"),
            ("http ip=10.0.0.1/33", "an IPv4 address with its prefix"),
            ("http ip=10.0.0.1/0", "an IPv4 address with its prefix"),
            ("http ip=10.0.0.256/8", "an IPv4 address with its prefix"),
            ("http ip=10.0.0.1/8 gw=x", "an IPv4 address"),
            ("http ip=10.0.0.1/8 ip6=fe80::1", "an IPv6 address with its prefix"),
            ("http ip=10.0.0.1/8 port=0", "a port from 1 to 65535"),
        ];
        for (words, message) in refused {
            let said = error(words);
            assert!(said.contains(message), "{words:?} was refused with {said:?}, not with {message:?}");
        }
    }

    #[test]
    fn the_memory_needed_is_the_job_and_the_guest() {
        let needed = |words| Workload::parse(words).unwrap().memory_mib_min() - OVERHEAD_MIB;
        assert_eq!(needed("idle"), 0);
        assert_eq!(needed("dirty set=100 fill=20"), 120);
        assert_eq!(needed("fill mib=7"), 7);
        assert_eq!(needed("http ip=10.0.0.1/8 fill=800"), 800);
    }

    #[test]
    fn a_long_word_is_cut_between_characters() {
        let said = error(&std::format!("{}ü", "x".repeat(Word::LEN_MAX - 1)));
        assert!(said.contains(&std::format!("'{}'", "x".repeat(Word::LEN_MAX - 1))), "{said}");
    }

    fn fills() -> impl Strategy<Value = Fill> {
        (1..=MEMORY_MIB_MAX, 0u8..=100, 0u8..=100, 0..=RATE_MIB_S_MAX).prop_map(
            |(mib, zero, text, verify_mib_s)| {
                let text = text.min(100 - zero);
                Fill { mib, shares: Shares { zero, text }, verify_mib_s }
            },
        )
    }

    fn dirties() -> impl Strategy<Value = Dirty> {
        let rate = prop_oneof![Just(Rate::Max), (1..=RATE_MIB_S_MAX).prop_map(Rate::MibPerSecond)];
        let order = prop_oneof![Just(Order::Linear), Just(Order::Random)];
        let write = prop_oneof![Just(Write::Word), Just(Write::Page)];
        (rate, 1..=MEMORY_MIB_MAX, order, write, fills())
            .prop_map(|(rate, set_mib, order, write, fill)| Dirty { rate, set_mib, order, write, fill })
    }

    fn https() -> impl Strategy<Value = Http> {
        let ip = (any::<Ipv4Addr>(), 1u8..=32);
        let ip6 = proptest::option::of((any::<Ipv6Addr>(), 1u8..=128));
        (ip, any::<Option<Ipv4Addr>>(), ip6, 1..=u16::MAX, fills())
            .prop_map(|(ip, gateway, ip6, port, fill)| Http { ip, gateway, ip6, port, fill })
    }

    proptest! {
        #[test]
        fn what_is_shown_parses_back(workload in prop_oneof![
            Just(Workload::Idle),
            dirties().prop_map(Workload::Dirty),
            fills().prop_map(Workload::Fill),
            https().prop_map(Workload::Http),
        ]) {
            prop_assert_eq!(Workload::parse(&workload.to_string()), Ok(workload));
        }

        #[test]
        fn any_text_is_parsed_or_refused(words in "(idle|dirty|fill|http)?( [a-z0-9]{0,6}=?.{0,8}){0,4}") {
            if let Err(error) = Workload::parse(&words) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}
